"""The suite of battles: names, tasks, both faces and that they agree, pictures."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")
pytest.importorskip("pettingzoo")

from mtrl import registry
from mtrl.registry import UnknownNameError
from mtrl.spaces import make_spec
from mtrl.testing import check_suite
from mtrl.vector import MultiTaskVectorEnv
from mtrl.vector.env import InProcess
from mtrl_agents.ppo import PPO
from mtrl_envs.smac import SMAC, Rules, build, kernels
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.render import TEAMS, view
from mtrl_envs.smac.scenarios import TYPES, groups, parse, stats
from tests.vector.drive import assert_same, drive

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PettingZoo's tests import its own deprecated games
    from pettingzoo.test import parallel_api_test, parallel_seed_test

# Win rate, return and length of 400 battles of SMAX 0.2.0 with its scripted policy on both sides, and return and length
# with random legal allies; measured with jaxmarl 0.2.0.
REFERENCE = {
    "3m": (0.477, 1.384, 13.9, 0.172, 18.0),
    "8m": (0.445, 1.349, 17.4, 0.180, 21.1),
    "2s3z": (0.515, 1.435, 71.7, 0.198, 52.5),
    "3s5z": (0.420, 1.341, 82.0, 0.205, 55.2),
    "5m_vs_6m": (0.000, 0.573, 12.5, 0.141, 18.2),
    "10m_vs_11m": (0.033, 0.735, 15.9, 0.166, 20.9),
    "3s5z_vs_3s6z": (0.000, 0.624, 56.1, 0.178, 51.5),
    "3s_vs_5z": (0.000, 0.298, 32.1, 0.209, 41.2),
    "6h_vs_8z": (0.000, 0.623, 27.3, 0.331, 35.6),
}


def random_legal(battles: Battles, rng: np.random.Generator) -> np.ndarray:
    return np.argmax(rng.random(battles.legal.shape) * battles.legal, 2)


def arrays(battles: Battles, b: int | slice) -> list[np.ndarray]:
    every = (battles.floats, battles.ints, battles.obs, battles.state, battles.legal, *battles.clocks)
    return [array[b].copy() for array in every]


def equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


# Names.


@pytest.mark.parametrize(
    ("name", "allies", "enemies"),
    [
        ("3m", "mmm", "mmm"),
        ("2s3z", "sszzz", "sszzz"),
        ("3s_vs_5z", "sss", "zzzzz"),
        ("3s5z_vs_3s6z", "ssszzzzz", "ssszzzzzz"),
        ("6h_vs_8z", "hhhhhh", "zzzzzzzz"),
        ("1M2zg_vs_4m", "Mgg", "mmmm"),
    ],
)
def test_names_say_the_teams(name: str, allies: str, enemies: str) -> None:
    letters = {i: one.letters[-1] for i, one in enumerate(TYPES)}
    found = parse(name)
    assert ("".join(letters[i] for i in found.allies), "".join(letters[i] for i in found.enemies)) == (allies, enemies)


@pytest.mark.parametrize(
    "name", ["", "m", "0m", "03m", "3q", "3m_vs_", "_vs_3m", "3m_vs_3m_vs_3m", "101m", "smacv2_0_units"]
)
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(UnknownNameError, match="smac"):
        parse(name)


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean '5m_vs_6m'.*letters: m marine"):
        SMAC().tasks("5m_v_6m")


def test_groups_follow_the_papers() -> None:
    named = groups()
    assert len(named["all"]) == 14
    for stem, train in (("marine-easy", 3), ("marine-hard", 3), ("stalker-zealot", 3)):
        assert len(named[f"{stem}-train"]) == train
        assert set(named[f"{stem}-train"]) <= set(named[f"{stem}-test"])
        assert set(named[f"{stem}-heldout"]) == set(named[f"{stem}-test"]) - set(named[f"{stem}-train"])
    assert [len(named[f"{stem}-test"]) for stem in ("marine-easy", "marine-hard", "stalker-zealot")] == [10, 12, 13]
    assert tuple(SMAC().groups) == tuple(named)


def test_every_named_map_has_a_measured_score() -> None:
    for group in groups():
        for task in SMAC().tasks(group):
            assert 0 < task.score[0] < task.score[1] < 2, task.name
            assert "measured" not in task.score_source
            assert "mean returns" in task.score_source
    (other,) = SMAC().tasks("3h_vs_4z")
    assert other.score == (0, 2)
    (variant,) = SMAC(Rules(walls_cause_death=False)).tasks("3m")
    assert variant.score == (0, 2)
    assert variant.protocol["walls_cause_death"] == "False"


# The contract.


@pytest.mark.parametrize("group", ["3m", "stalker-zealot-train", "3s_vs_5z", "smacv2_5_units", "2zg1M"])
def test_the_suite_keeps_the_contract(group: str) -> None:
    report = check_suite(SMAC(), group, full=True)
    assert report.findings == (), report


def test_the_suite_is_found_by_name() -> None:
    tasks = registry.tasks("mtrl_envs.smac:SMAC/marine-hard-train")
    assert [task.name for task in tasks] == ["smac/3m", "smac/5m_vs_6m", "smac/9m_vs_10m"]
    assert [task.agents for task in tasks] == [3, 5, 9]


def test_maps_of_equal_sizes_share_a_group() -> None:
    tasks = [task for name in ("2s3z", "5m", "3m") for task in SMAC().tasks(name)]
    spec = make_spec(tasks)
    assert [group.tasks for group in spec.groups] == [(0, 1), (2,)]
    assert sorted(spec.groups[0].leaves) == ["alive", "legal", "state", "vector"]


def test_listing_imports_no_environment_package() -> None:
    code = (
        "import sys; from mtrl_envs.smac import SMAC; SMAC().tasks('all');"
        "assert not {'numba', 'pettingzoo', 'PIL'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["numba", "pettingzoo"])
def test_a_missing_extra_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("mtrl_envs.smac."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install 'mtrl-suite\[smac\]'"):
        build("3m")


# One battle as a ParallelEnv.


@pytest.mark.parametrize("name", ["3m", "3s_vs_5z", "smacv2_5_units"])
def test_pettingzoos_own_tests(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parallel_api_test(build(name), num_cycles=300)
    parallel_seed_test(lambda: build(name), num_cycles=50)
    assert "Passed" in capsys.readouterr().out


def test_the_dead_stay_and_are_paid() -> None:
    env = build("3m")
    _, infos = env.reset(seed=0)
    assert all(info["alive"] and info["success"] is False for info in infos.values())
    dead, terminated = 0, {}
    while env.agents:
        acting = env.agents
        obs, rewards, terminated, _, infos = env.step(env.script())
        assert len(set(rewards.values())) == 1
        assert list(obs) == list(infos) == acting == env.possible_agents
        for agent, info in infos.items():
            if not info["alive"]:
                dead += 1
                assert not obs[agent]["observation"].any()
                assert obs[agent]["action_mask"].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert dead > 0
    assert all(terminated.values())
    with pytest.raises(ValueError, match="reset first"):
        env.step({})


def test_resets_without_a_seed_follow_from_the_last_one() -> None:
    left, right = build("3m"), build("3m")
    seen = []
    for env in (left, right):
        env.reset(seed=5)
        env.reset()
        seen.append(env.state())
    assert np.array_equal(*seen)
    left.reset()
    assert not np.array_equal(left.state(), seen[0])


@pytest.mark.parametrize("name", ["2s3z", "5m_vs_6m"])
def test_the_face_of_one_battle_is_the_batch(name: str) -> None:
    env, batch, rng = build(name), Battles([parse(name)], 3), np.random.default_rng(0)
    batch.reset(np.ones(3, bool), np.array([7, 8, 9]))
    obs, _ = env.reset(seed=8)
    while env.agents:
        for i, agent in enumerate(env.agents):
            assert np.array_equal(obs[agent]["observation"], batch.obs[1, i])
            assert np.array_equal(obs[agent]["action_mask"], batch.legal[1, i])
        assert np.array_equal(env.state(), batch.state[1])
        actions = random_legal(batch, rng)
        outcome = batch.step(actions)
        obs, rewards, terminated, truncated, infos = env.step(dict(zip(env.agents, actions[1].tolist(), strict=True)))
        agent = env.possible_agents[0]
        found = (rewards[agent], terminated[agent], truncated[agent], infos[agent]["success"])
        assert found == tuple(array[1] for array in outcome)


def test_vector_of_two_maps_pays_rows_alike_and_replays() -> None:
    tasks = [task for name in ("2s3z", "5m") for task in SMAC().tasks(name)]
    envs = MultiTaskVectorEnv(tasks, 2, seed=3)
    envs.reset()
    rng, rewards = np.random.default_rng(0), []
    for _ in range(60):
        (group,) = envs.obs.leaves
        legal = envs.obs.leaves[group]["legal"]
        _, reward, *_ = envs.step({group: np.argmax(rng.random(legal.shape) * legal, 1)})
        assert (np.ptp(np.reshape(reward, (4, 5)), 1) == 0).all()
        rewards.append(reward)
    envs.close()
    assert np.sum(rewards) > 0


def test_the_dead_are_not_alive_in_the_vector() -> None:
    """``alive`` is false exactly where a unit sees nothing of itself; dead units are there when time is up, too."""
    (task,) = SMAC().tasks("2m_vs_1z")
    envs = MultiTaskVectorEnv([replace(task, horizon=12)], 8, seed=3)
    assert envs.spec.tasks[0].shared_reward
    envs.reset()
    dead = cut = 0
    for step, _, _ in drive(envs, 120):
        for obs, rows in ((step.obs, step.active), (step.next, ~step.terminated)):
            leaves = obs.leaves["smac"]
            np.testing.assert_array_equal(leaves["alive"][rows], leaves["vector"][rows, -10] > 0)  # own health
            assert (leaves["legal"].sum(1)[rows & ~leaves["alive"]] == 1).all()
        dead += (~step.obs.leaves["smac"]["alive"]).sum()
        cut += (step.truncated & ~step.next.leaves["smac"]["alive"]).sum()
    envs.close()
    assert dead > 0
    assert cut > 0


def test_a_policy_learns_nothing_from_the_dead() -> None:
    """PPO's terms are 0 in their rows, and their means those over living rows; the critic learns from all."""
    run = drive_ppo(rollout=64, minibatches=1, epochs=1)
    living = run.rollout.living
    assert (living == 0).any()
    items, _ = run._prepare()
    (batch,) = items.minibatches(1, run.generator)
    own, dead = batch.columns["living"].flatten(), batch.columns["living"].flatten() == 0
    for name in ("policy", "critic"):
        loss, _ = run._losses(batch, name)
        assert bool((loss[dead] == 0).all()) == (name == "policy")
        if name == "policy":
            mean = (loss / own)[~dead].mean()
            torch.testing.assert_close(loss @ batch.weight, mean, atol=1e-6, rtol=1e-5)


def drive_ppo(**options: Any) -> PPO:
    """An agent with a full rollout of battles."""
    tasks = SMAC().tasks("3m")
    agent = PPO(make_spec(tasks), PPO.Config(**options), seed=0)
    envs = MultiTaskVectorEnv(tasks, 4, seed=0)
    envs.reset()
    actor = agent.actor(envs.layout, explore=True)
    while not agent.rollout.full:
        decision = actor(envs.obs)
        envs.step_async(decision.action)
        agent.observe(envs.step_wait(decision)[0])
    envs.close()
    return agent


def test_tasks_can_be_sent_to_workers() -> None:
    for task in SMAC().tasks("all"):
        again: Any = pickle.loads(pickle.dumps(task))  # noqa: S301 - made here
        assert (again.name, again.protocol) == (task.name, task.protocol)


# A batch of battles.


@pytest.mark.parametrize(
    "names", [("3m",), ("2s3z", "5m", "smacv2_5_units"), ("5m_vs_6m",), ("3s5z_vs_3s6z",), ("27m_vs_30m",)]
)
def test_a_batch_is_its_battles_bit_for_bit(names: tuple[str, ...]) -> None:
    size, maps = 5, [parse(name) for name in names]
    batch, singles = Battles(maps, size), [Battles(maps, 1) for _ in range(size)]
    chosen, seeds, one = np.arange(size) % len(maps), np.arange(size) * 10, np.ones(1, bool)
    batch.reset(np.ones(size, bool), seeds, chosen)
    for b, single in enumerate(singles):
        single.reset(one, seeds[b : b + 1], chosen[b : b + 1])
    rng, ended = np.random.default_rng(0), 0
    for _ in range(60):
        actions = random_legal(batch, rng)
        outcome = [array.copy() for array in batch.step(actions)]
        for b, single in enumerate(singles):
            alone = single.step(actions[b : b + 1])
            assert all(x[b] == y[0] for x, y in zip(outcome, alone, strict=True))
            assert equal(arrays(batch, b), arrays(single, 0))
        over = outcome[1] | outcome[2]
        ended += over.sum()
        seeds, chosen = seeds + over, np.where(over, (chosen + 1) % len(maps), chosen)
        batch.reset(over, seeds, chosen)
        for b in np.flatnonzero(over):
            singles[b].reset(one, seeds[b : b + 1], chosen[b : b + 1])
            assert equal(arrays(batch, int(b)), arrays(singles[b], 0))
    assert ended


def test_a_used_battle_starts_like_a_fresh_one() -> None:
    used, fresh = (Battles([parse("smacv2_5_units")], 1) for _ in range(2))
    one = np.ones(1, bool)
    used.reset(one, np.array([1]))
    for _ in range(30):
        used.step(used.script())
    for battles in (used, fresh):
        battles.reset(one, np.array([2]))
    assert equal(arrays(used, 0), arrays(fresh, 0))


def test_masks_leave_the_others_alone() -> None:
    battles = Battles([parse("3m")], 3)
    battles.reset(np.ones(3, bool), np.arange(3))
    battles.step(battles.script())
    before = arrays(battles, slice(None))
    mask = np.array([False, True, False])
    outcome = battles.step(battles.script(), mask)
    assert outcome.reward[[0, 2]].tolist() == [0, 0]
    battles.reset(np.array([False, False, True]), np.array([-1, -1, 2]))
    after = arrays(battles, slice(None))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(before, after, strict=True))
    assert battles.clocks.step.tolist() == [1, 2, 0]


def test_battles_that_were_never_started_stand_still() -> None:
    battles = Battles([parse("3m")], 2)
    outcome = battles.step(np.zeros((2, 3), int))
    assert not any(array.any() for array in outcome)
    assert battles.clocks.step.tolist() == [0, 0]
    assert battles.legal[0, 0].tolist() == [False] * 4 + [True] + [False] * 3


def test_different_seeds_give_different_battles() -> None:
    battles = Battles([parse("3m")], 100)
    battles.reset(np.ones(100, bool), np.arange(100) + 2**62)
    assert len(np.unique(battles.floats[:, kernels.X], axis=0)) == 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b.step(np.zeros((2, 3))), r"actions must be \[2, 3\] integers"),
        (lambda b: b.step(np.zeros((1, 3), int)), r"actions must be \[2, 3\] integers"),
        (lambda b: b.step(np.zeros((2, 3), int), np.ones(2)), r"mask must be \[2\] bool"),
        (lambda b: b.reset(np.ones(2, bool), np.array([0, -1])), "seeds must be"),
        (lambda b: b.reset(np.ones(2, bool), np.zeros(3, int)), "seeds must be"),
        (lambda b: b.reset(np.ones(2, bool), np.zeros(2, int), np.array([0, 1])), "scenario must hold"),
        (lambda b: Battles([], 1), "no maps"),
        (lambda b: Battles([parse("3m"), parse("5m")], 1), "3m 3 vs 3, 5m 5 vs 5"),
        (lambda b: Battles([parse("3m")], 0), "at least 1"),
        (lambda b: build("3m", render_mode="human"), "rgb_array"),
    ],
)
def test_wrong_arguments_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Battles([parse("3m")], 2))


# Random numbers.


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of splitmix64 seeded with 0 (the reference implementation, prng.di.unimi.it)."""
    golden = 0x9E3779B97F4A7C15
    found = [int(kernels.mix(np.uint64(golden * n % 2**64))) for n in (1, 2, 3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    n = 4000
    columns = np.array(
        [
            [float(kernels.uniform(np.uint64(key), step, stream, index)) for key in range(n)]
            for step, stream, index in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (99, 3, 500))
        ]
    )
    assert columns.min() >= 0
    assert columns.max() < 1
    np.testing.assert_allclose(columns.mean(1), 0.5, atol=4 / np.sqrt(12 * n))
    np.testing.assert_allclose(columns.var(1), 1 / 12, atol=4 * np.sqrt(1 / 180 / n))
    assert abs(np.corrcoef(columns) - np.eye(5)).max() < 4 / np.sqrt(n)


def test_the_table_of_types_has_the_kernels_rows() -> None:
    names = ("VELOCITY", "DAMAGE", "RANGE", "SIGHT", "RADIUS", "HEALTH", "COOLDOWN")
    assert [getattr(kernels, name) - kernels.VELOCITY for name in names] == list(range(7))
    assert stats().shape == (kernels.NUM_TYPES, 7)
    assert list(TYPES[0]._fields[2:]) == [name.lower() for name in names]


# Pictures.


def test_a_frame_shows_both_teams_where_they_are() -> None:
    env = build("3m", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame is not None
    assert frame.shape == (640, 640, 3)
    assert frame.dtype == np.uint8
    f = env.battles.floats[0]
    for i in range(6):
        x, y = (round(place / 2) for place in view(env.battles, 0)(float(f[kernels.X, i]), float(f[kernels.Y, i])))
        distances = [np.abs(frame[y, x].astype(int) - colour).sum() for colour in TEAMS]
        assert np.argmin(distances) == (i >= 3)
    for _ in range(9):
        env.step(env.script())
    later = env.render()
    assert later is not None
    assert not np.array_equal(frame, later)


def test_the_picture_lies_on_the_map_and_holds_all_units() -> None:
    battles = Battles([parse("2m")], 1)
    battles.reset(np.ones(1, bool), np.array([0]))
    battles.floats[0, kernels.X], battles.floats[0, kernels.Y] = (1, 2, 3, 4), (30, 31, 31, 30)
    left, top, scale = view(battles, 0)
    assert (left, top, 1280 / scale) == (0, 32, 14)
    battles.floats[0, kernels.X] = 0, 10, 20, 32
    assert view(battles, 0) == (0, 32, 40)


def test_no_frame_without_a_render_mode() -> None:
    env = build("3m")
    env.reset(seed=0)
    assert env.render() is None


@pytest.mark.parametrize("name", ["smacv2_20_units", "1m1M1s1z1zg1h"])
def test_every_type_and_every_moment_can_be_drawn(name: str) -> None:
    env = build(name, render_mode="rgb_array")
    env.reset(seed=1)
    while env.agents:
        env.step(env.script())
        if env.battles.clocks.step[0] % 8 == 0:
            env.render()
    assert env.render() is not None


# The guide.


def test_the_guides_code_runs() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "battles.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(compile(code, "battles.md", "exec"), {})


# Statistics.


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE)
def test_statistics_agree_with_smax(name: str) -> None:
    """Within three standard errors of the difference to the reference's 400 battles."""
    size, reference = 2000, REFERENCE[name]
    error = 3 * np.sqrt(1 / 400 + 1 / size)
    for scripted, (win, ret, length) in ((True, reference[:3]), (False, (0.0, *reference[3:]))):
        battles, rng = Battles([parse(name)], size), np.random.default_rng(0)
        battles.reset(np.ones(size, bool), np.arange(size))
        returns, won = np.zeros(size), np.zeros(size, bool)
        while not battles.clocks.over.all():
            outcome = battles.step(battles.script() if scripted else random_legal(battles, rng))
            returns += outcome.reward
            won |= outcome.success
        rate = max(won.mean(), win, 1 / 400)
        assert won.mean() == pytest.approx(win, abs=error * np.sqrt(rate * (1 - rate)))
        assert returns.mean() == pytest.approx(ret, abs=error * returns.std() + 0.001)
        # The reference ends battles after 101 steps instead of 100, at most one step more per battle.
        assert battles.clocks.step.mean() == pytest.approx(length, abs=error * battles.clocks.step.std() + 0.2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batched_in_a_vector_as_one_by_one(workers: int) -> None:
    """The vector's batched slots equal single ``ParallelEnv``s: maps of one size mixed, deaths, ends by time."""
    maps = [SMAC().tasks(name)[0] for name in ("2s3z", "5m", "3s_vs_5z", "2m_vs_1z")]
    tasks = [*maps[:2], replace(maps[2], horizon=30), replace(maps[3], horizon=12)]
    plain = MultiTaskVectorEnv([replace(task, batch=None) for task in tasks], 3, seed=4)
    batched = MultiTaskVectorEnv(tasks, 3, seed=4, workers=workers)
    try:
        plain.reset()
        batched.reset()
        assert_same(list(batched.obs), list(plain.obs))
        if isinstance(batched._backend, InProcess):
            lanes = batched._backend._runner._lanes.values()
            assert sorted(len(each.slots) for each in lanes) == [3, 3, 6]  # 2s3z and 5m share one
        seen = drive(plain, 120)
        assert_same(drive(batched, 120), seen)
        assert_same(batched.state_dict(), plain.state_dict())
        ended = [episode for _, _, episodes in seen for episode in episodes]
        assert {episode.task for episode in ended} == {0, 1, 2, 3}
        assert {episode.terminated for episode in ended} == {True, False}
    finally:
        plain.close()
        batched.close()
