"""Suites of tasks, one module each, and Gymnasium ids for people who only want the environments::

    import gymnasium as gym
    envs = gym.make_vec("mtrl_envs:mtrl/minigrid-mt3-v0", num_envs=6)  # two copies of three tasks

The id makes the padded view (``mtrl.vector.views``): one row per task and copy, autoreset in the same step. Keyword
arguments go to ``mtrl.vector.views.make``. Registering them imports no environment package.
"""

import gymnasium as gym

GROUPS = {
    "atari": ("8", "26", "57"),
    "dmc": ("18", "benchmark", "all"),
    "metaworld": ("mt3", "mt5", "mt10", "mt25", "mt50", "ml10-train", "ml10-test", "ml45-train", "ml45-test"),
    "minigrid": ("mt3", "mt5", "mt7", "babyai"),
    "robotics": ("adroit", "adroit-sparse", "kitchen", "all"),
    "text": ("coin", "treasure", "simple", "cooking", "easy", "all"),
}
"""Groups that have an id, by suite; written out, since asking the suites would import their packages."""

for _suite, _groups in GROUPS.items():
    for _group in _groups:
        gym.register(
            id=f"mtrl/{_suite}-{_group}-v0",
            vector_entry_point="mtrl.vector.views:make",
            kwargs={"suite": f"{_suite}/{_group}"},
        )
