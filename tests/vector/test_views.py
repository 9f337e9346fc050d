"""The padded view: known answers of the padding, the view against the vector it shows, Gymnasium's own tools."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from mtrl import registry
from mtrl.types import Array, Decision, Group, Obs, Spec, TaskInfo
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.views import PaddedVectorEnv, Padding, make

PROBES = "mtrl.testing:Probes"
DISCRETE = f"{PROBES}/discrete+{PROBES}/image+{PROBES}/masked+{PROBES}/team"


def box(low: float, high: float, *shape: int, dtype: Any = np.float32) -> Box:
    return Box(low, high, shape, dtype)


def spec(*groups: Group) -> Spec:
    """One task per task id of the groups, named t0, t1, ..."""
    home = {task: group.name for group in groups for task in group.tasks}
    return Spec(tuple(TaskInfo(f"t{i}", home[i], 9) for i in sorted(home)), groups)


# Task 0 and 2 in "wide", task 1 in "masked": task ids do not follow the groups.
WIDE = Group("wide", {"image": box(0, 9, 1, 1, 2, dtype=np.uint8), "vector": box(-1, 1, 2)}, Discrete(2), (0, 2))
MASKED = Group(
    "masked",
    {"vector": box(-5, 5, 1), "legal": box(0, 1, 3, dtype=np.bool_), "alive": box(0, 1, dtype=np.bool_)},
    Discrete(3),
    (1,),
)
RAGGED = Obs(
    {
        "wide": {
            "image": np.array([[[[7, 8]]], [[[1, 2]]]], np.uint8),
            "vector": np.array([[0.5, -0.5], [0.25, 1.0]], np.float32),
        },
        "masked": {
            "vector": np.array([[3.0], [-4.0]], np.float32),
            "legal": np.array([[False, True, True], [False, True, False]]),
            "alive": np.array([True, False]),
        },
    },
    np.array([0, 2, 1, 1]),
    np.array([True, False, False, True]),
)


def test_observations_are_laid_side_by_side() -> None:
    padding = Padding(spec(WIDE, MASKED))
    padded = padding.pad(RAGGED)
    assert list(padded["task"]) == [0, 2, 1, 1]
    np.testing.assert_array_equal(
        padded["observation"], [[0.5, -0.5, 7, 8], [0.25, 1, 1, 2], [3, 0, 0, 0], [-4, 0, 0, 0]]
    )
    np.testing.assert_array_equal(padded["action_mask"], [[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(padded["alive"], [[1], [1], [1], [0]])
    assert {name: array.dtype for name, array in padded.items()} == {
        name: space.dtype for name, space in padding.observation_space.items()
    }
    observation = padding.observation_space["observation"]
    assert isinstance(observation, Box)
    np.testing.assert_array_equal(observation.low, [-5, -1, 0, 0])
    np.testing.assert_array_equal(observation.high, [5, 1, 9, 9])
    np.testing.assert_array_equal(padding.flat(padded)[1], [0.25, 1, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(padding.flat_space.high, [5, 1, 9, 9, 1, 1, 1])


def test_unpad_inverts_pad() -> None:
    padding = Padding(spec(WIDE, MASKED))
    back = padding.unpad(padding.pad(RAGGED), RAGGED.first)
    np.testing.assert_array_equal(back.task, RAGGED.task)
    np.testing.assert_array_equal(back.first, RAGGED.first)
    assert back.leaves.keys() == RAGGED.leaves.keys()
    for name, leaves in RAGGED.leaves.items():
        assert back.leaves[name].keys() == leaves.keys()
        for leaf, array in leaves.items():
            assert back.leaves[name][leaf].dtype == array.dtype
            np.testing.assert_array_equal(back.leaves[name][leaf], array)


def test_unflat_inverts_flat() -> None:
    padding = Padding(spec(WIDE, MASKED))
    padded = padding.pad(RAGGED)
    back = padding.unflat(padding.flat(padded))
    for name in ("observation", "task"):
        np.testing.assert_array_equal(back[name], padded[name])


def test_row_without_legal_actions_shows_action_0() -> None:
    leaves = dict(RAGGED.leaves["masked"], legal=np.array([[False, False, False], [False, False, True]]))
    obs = Obs({"masked": leaves}, np.array([1, 1]), np.array([False, False]))
    mask = Padding(spec(WIDE, MASKED)).pad(obs)["action_mask"]
    np.testing.assert_array_equal(mask, [[1, 0, 0], [0, 0, 1]])


def test_leaves_stay_apart_without_flatten() -> None:
    other = Group("other", dict(WIDE.leaves, vector=box(-3, 0, 2)), Discrete(4), (1,))
    padding = Padding(spec(WIDE, other), flatten=False)
    assert set(padding.observation_space.keys()) == {"image", "vector", "task", "action_mask"}
    assert padding.observation_space["image"] == WIDE.leaves["image"]
    assert padding.observation_space["vector"] == box(-3, 1, 2)
    leaves = RAGGED.leaves["wide"]
    obs = Obs({"wide": leaves, "other": leaves}, np.array([0, 2, 1, 1]), np.zeros(4, bool))
    padded = padding.pad(obs)
    for leaf, array in leaves.items():
        assert padded[leaf].dtype == array.dtype
        np.testing.assert_array_equal(padded[leaf], np.concatenate([array, array]))
        np.testing.assert_array_equal(padding.unpad(padded, obs.first).leaves["other"][leaf], array)
    with pytest.raises(ValueError, match="flatten=True"):
        _ = padding.flat_space


def test_box_actions_are_scaled_to_the_groups_bounds() -> None:
    leaves = {"vector": box(-1, 1, 1)}
    one = Group("one", leaves, Box(np.array([0, -2], np.float32), np.array([10, 2], np.float32)), (0,))
    two = Group("two", leaves, box(-1, 1, 3), (1,))
    padding = Padding(spec(one, two))
    assert padding.action_space == box(-1, 1, 3)
    task = np.array([0, 0, 1])
    actions = np.array([[-1, 1, 0.9], [0, -0.5, 0.9], [0.1, -0.2, 0.3]], np.float32)
    found = padding.unpad_action(actions, {"task": task})
    np.testing.assert_array_equal(found["one"], [[0, 2], [5, -1]])
    np.testing.assert_array_equal(found["two"], actions[2:])
    assert found["one"].dtype == np.float32
    np.testing.assert_array_equal(
        padding.pad_action(found, task), np.array([[-1, 1, 0], [0, -0.5, 0], [0.1, -0.2, 0.3]], np.float32)
    )


def test_scaled_actions_never_leave_their_bounds() -> None:
    low, high = np.array([0.1, -1e8], np.float32), np.array([0.7, 1e-3], np.float32)
    padding = Padding(spec(Group("one", {"vector": box(-1, 1, 1)}, Box(low, high), (0,))))
    for corner in (-1.0, 1.0):
        action = padding.unpad_action(np.full((1, 2), corner, np.float32), {"task": np.array([0])})["one"][0]
        assert ((low <= action) & (action <= high)).all()


def test_discrete_actions_are_checked() -> None:
    padding = Padding(spec(WIDE, MASKED))
    padded = padding.pad(RAGGED)
    found = padding.unpad_action(np.array([1, 0, 2, 1]), padded)
    assert {name: actions.tolist() for name, actions in found.items()} == {"wide": [1, 0], "masked": [2, 1]}
    np.testing.assert_array_equal(padding.pad_action(found, padded["task"]), [1, 0, 2, 1])
    with pytest.raises(ValueError, match=r"row 1, task 't2': action 2 is illegal, legal are \[0, 1\].*illegal='first'"):
        padding.unpad_action(np.array([1, 2, 2, 1]), padded)
    with pytest.raises(ValueError, match=r"row 3, task 't1': action 0 is illegal, legal are \[1\]"):
        padding.unpad_action(np.array([1, 0, 2, 0]), padded)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"action {wrong} is outside \[0, 3\)"):
            padding.unpad_action(np.array([wrong, 0, 2, 1]), padded)
    with pytest.raises(ValueError, match="integers"):
        padding.unpad_action(np.array([1.0, 0.0, 2.0, 1.0]), padded)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        padding.unpad_action(np.array([1, 0, 2]), padded)


def test_illegal_actions_can_become_the_first_legal_one() -> None:
    padding = Padding(spec(WIDE, MASKED), illegal="first")
    padded = padding.pad(RAGGED)
    found = padding.unpad_action(np.array([2, 1, 0, 0]), padded)
    assert {name: actions.tolist() for name, actions in found.items()} == {"wide": [0, 1], "masked": [1, 1]}
    with pytest.raises(ValueError, match="outside"):
        padding.unpad_action(np.array([3, 1, 0, 0]), padded)


def test_what_one_view_cannot_hold() -> None:
    continuous = Group("continuous", {"vector": box(-1, 1, 1)}, box(-1, 1, 1), (1,))
    with pytest.raises(ValueError, match=r"\['wide'\] have Discrete actions and \['continuous'\] have Box"):
        Padding(spec(WIDE, continuous))
    with pytest.raises(ValueError, match="'wide' and 'masked' differ"):
        Padding(spec(WIDE, MASKED), flatten=False)
    with pytest.raises(ValueError, match="'error', 'first'"):
        Padding(spec(WIDE, MASKED), illegal="last")  # pyright: ignore[reportArgumentType]


def legal_actions(view: PaddedVectorEnv, rng: np.random.Generator) -> Array:
    if isinstance(view.single_action_space, Discrete):
        return np.where(view.action_masks(), rng.random(view.action_masks().shape), -1).argmax(axis=1)
    return rng.uniform(-1, 1, view.action_space.shape or ()).astype(np.float32)


@pytest.mark.parametrize("suite", [DISCRETE, f"{PROBES}/continuous"])
def test_view_shows_what_the_vector_does(suite: str) -> None:
    tasks, rng = registry.tasks(suite), np.random.default_rng(0)
    view = PaddedVectorEnv(MultiTaskVectorEnv(tasks, 2))
    native = MultiTaskVectorEnv(tasks, 2)
    padding = view.padding
    observation, _ = view.reset(seed=3)
    native.reset(seed=3)
    ends = 0
    for _ in range(25):
        for name, array in padding.pad(native.obs).items():
            np.testing.assert_array_equal(observation[name], array)
        assert view.observation_space.contains(observation)
        actions = legal_actions(view, rng)
        assert view.action_space.contains(actions)
        groups = padding.unpad_action(actions, padding.pad(native.obs))
        native.step_async(groups)
        step, _ = native.step_wait(Decision(groups, {}))
        observation, reward, terminated, truncated, info = view.step(actions)
        np.testing.assert_array_equal(reward, step.reward)
        np.testing.assert_array_equal(terminated, step.terminated)
        np.testing.assert_array_equal(truncated, step.truncated)
        np.testing.assert_array_equal(info["success"], step.success)
        done = terminated | truncated
        ends += int(done.sum())
        if done.any():
            np.testing.assert_array_equal(info["_final_obs"], done)
            following = padding.pad(step.next)
            for row in np.flatnonzero(done):
                assert view.single_observation_space.contains(info["final_obs"][row])
                for name, array in following.items():
                    np.testing.assert_array_equal(info["final_obs"][row][name], array[row])
        else:
            assert "final_obs" not in info
    assert ends > view.num_envs
    view.close()
    native.close()
    assert view.envs.closed


def test_seed_decides_everything() -> None:
    view = make(f"{PROBES}/observation", 6)
    first, again, other = (view.reset(seed=seed)[0]["observation"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    view.close()


def test_observations_are_the_callers_own() -> None:
    view = make(f"{PROBES}/masked", 2)
    observation, _ = view.reset(seed=0)
    masks = view.action_masks()
    observation["action_mask"][...] = 0
    np.testing.assert_array_equal(view.action_masks(), masks)
    view.close()


def test_gymnasium_wrappers() -> None:
    view = make(f"{PROBES}/discrete", 12, seed=5)
    envs = DictInfoToList(RecordEpisodeStatistics(view))
    envs.reset()
    rng, seen = np.random.default_rng(0), 0
    for _ in range(20):
        *_, infos = envs.step(legal_actions(view, rng))
        for episode in view.envs.episodes:  # one row per slot here
            info = infos[episode.slot]
            assert (info["episode"]["r"], info["episode"]["l"]) == (episode.ret, episode.length)
            assert info["final_info"]["episode"]["seed"] == episode.seed
            assert info["task"] == episode.task
            seen += 1
    assert seen > 100
    envs.close()


def test_gymnasium_ids() -> None:
    gym.register(
        "mtrl-test/Discrete-v0", vector_entry_point="mtrl.vector.views:make", kwargs={"suite": f"{PROBES}/discrete"}
    )
    try:
        for num_envs, rows in ((1, 6), (12, 12)):
            envs = gym.make_vec("mtrl-test/Discrete-v0", num_envs=num_envs, seed=4)
            assert isinstance(envs, PaddedVectorEnv)
            assert envs.num_envs == rows
            assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
            assert envs.reset()[0]["observation"].shape == (rows, 2)
            envs.close()
    finally:
        del gym.registry["mtrl-test/Discrete-v0"]


def test_rows_must_fit() -> None:
    for num_envs in (7, 0, -6):
        with pytest.raises(ValueError, match="multiple of 6, such as 6"):
            make(f"{PROBES}/discrete", num_envs)
    view = make(f"{PROBES}/team", 6)  # a team of two fills two rows
    assert (view.num_envs, len(view.envs.slot_tasks)) == (6, 3)
    view.close()


def test_view_imports_neither_torch_nor_sb3() -> None:
    code = "import sys, mtrl.vector.views; assert not {'torch', 'stable_baselines3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
