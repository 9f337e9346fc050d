"""Samplers: known answers, frequencies, shared slots, exact resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtrl import checkpoint, runs
from mtrl.config import ConfigError, parse_config
from mtrl.registry import UnknownNameError, tasks
from mtrl.sampler import Progress, Sampled, SamplerConfig, spread, stretch, task_weights
from mtrl.spaces import make_spec
from mtrl.train import train
from mtrl.types import Episode, Journal, Spec, TaskInfo
from tests.test_train import assert_same_state, config, records

KINDS = ["round_robin", "uniform", "weighted", "success_balanced", "learnability", "learning_progress", "exp3", "alp"]
SPEC = Spec(tuple(TaskInfo(name, "g", 10, (0.0, 2.0)) for name in "abcd") + (TaskInfo("e", "other", 10),), ())
NO_ACTIONS = np.zeros(0)


def episode(
    task: int, *, success: bool | None = None, ret: float = 0.0, slot: int = 0, seed: int = 0, length: int = 1
) -> Episode:
    journal = Journal(SPEC.tasks[task].name, seed, NO_ACTIONS)
    return Episode(
        task=task,
        slot=slot,
        index=0,
        seed=seed,
        ret=ret,
        length=length,
        success=success,
        success_last=success,
        terminated=True,
        journal=journal,
    )


def sampled(kind: str, slots: tuple[int, ...] = (0, 1), **options: Any) -> Sampled:
    return Sampled(SamplerConfig.model_validate({"kind": kind, **options}), SPEC, slots, seed=3)


def teach(sampler: Sampled, rates: list[float], episodes: int = 200) -> None:
    """Results of tasks 0..3 with these success rates, the same number of each."""
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        for task, rate in enumerate(rates):
            sampler.update(episode(task, success=bool(rng.random() < rate)))


def score(sampler: Sampled, *errors: float) -> None:
    """Value errors of an update that follows as many steps as there are errors; the same in all rows."""
    sampler.learned(SimpleNamespace(errors=np.repeat(np.array(errors)[:, None], 2, axis=1)))  # pyright: ignore[reportArgumentType]


def frequencies(sampler: Sampled, draws: int = 4000) -> np.ndarray:
    before = sampler.drawn.copy()
    for index in range(draws):
        sampler.assign(0, index)
    return (sampler.drawn - before) / draws


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_the_probabilities(kind: str) -> None:
    """Chi-square at .1 %; only tasks of the slot's group; the floor is kept."""
    sampler = sampled(kind, floor=0.2, weights={} if kind == "round_robin" else {"a": 3.0, "c": 0.5})
    teach(sampler, [0.9, 0.5, 0.1, 0.0], 60)
    allowed = np.array([True] * 4 + [False])
    expected = sampler.probs(allowed)
    assert expected.sum() == pytest.approx(1)
    assert expected[4] == 0
    assert expected[:4].min() >= 0.2 / 4 - 1e-12
    found = frequencies(sampler)
    assert (4000 * (found[:4] - expected[:4]) ** 2 / expected[:4]).sum() < 16.3
    assert found[4] == 0


def test_known_probabilities() -> None:
    allowed = np.array([True] * 4 + [False])
    weighted = sampled("weighted", weights={"a": 3.0, "c": 4.0}, floor=0.0)
    np.testing.assert_allclose(weighted.probs(allowed), [3 / 9, 1 / 9, 4 / 9, 1 / 9, 0])
    for kind, expected in {"success_balanced": [0, 0.5, 1, 1], "learnability": [0, 0.25, 0, 0]}.items():
        sampler = sampled(kind, floor=0.0)
        for task, successes in enumerate([(True, True), (True, False), (False, False), (False, False)]):
            for success in successes:
                sampler.update(episode(task, success=success))
        weights = np.array([*expected, 0])
        np.testing.assert_allclose(sampler.probs(allowed), weights / weights.sum(), atol=1e-12)


def test_tasks_that_report_no_success_are_judged_by_their_score() -> None:
    sampler = sampled("success_balanced", floor=0.0)
    for task, ret in enumerate([2.0, 1.0, -5.0, 9.0]):  # the score of these tasks is the return / 2, cut to [0, 1]
        sampler.update(episode(task, ret=ret))
    np.testing.assert_allclose(sampler.probs(np.array([True] * 4 + [False])), [0, 1 / 3, 2 / 3, 0, 0], atol=1e-12)


def test_where_success_is_told_with_success_only_the_rest_is_not_solved() -> None:
    sampler = sampled("success_balanced", floor=0.0)
    for task in (0, 1):
        sampler.update(replace(episode(task, ret=1.8), success=True))
    sampler.update(episode(0, ret=1.8))  # no signal: not solved, though its score is .9
    np.testing.assert_allclose(sampler.probs(np.array([True] * 2 + [False] * 3)), [1, 0, 0, 0, 0], atol=1e-12)
    other = sampled("success_balanced", floor=0.0)
    other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        one.update(episode(1, ret=1.8))
    np.testing.assert_array_equal(sampler.probs(np.ones(5, bool)), other.probs(np.ones(5, bool)))
    assert sampler.probs(np.array([False, True, False, False, False]))[1] == 1
    assert sampler._success[1] == 0.5


def test_exp3_pays_for_change() -> None:
    """One slot, two rounds: the first result of a task has nothing to change from, the second pays |change| / P."""
    sampler = sampled("exp3", slots=(0,), floor=0.2, warmup=0)
    allowed = np.array([True] * 4 + [False])
    sampler.assign(0, 0)
    task = int(np.flatnonzero(sampler.drawn)[0])
    sampler.update(episode(task, ret=0.0))
    sampler.update(episode(task, ret=2.0))  # the mean score goes from 0 to 1/2, drawn with probability 1/4
    gain = 0.2 * 0.5 / 0.25 / 4
    weights = np.exp(np.where(np.arange(4) == task, gain, 0.0))
    np.testing.assert_allclose(sampler.probs(allowed)[:4], 0.8 * weights / weights.sum() + 0.05)


def test_round_robin_takes_turns_and_warm_up_comes_first() -> None:
    sampler = sampled("round_robin")
    assert [sampler.assign(0, i).task for i in range(6)] == [0, 1, 2, 3, 0, 1]
    sampler = sampled("success_balanced", warmup=2)
    sampler.update(episode(0, success=True))
    assert sorted(sampler.assign(i % 2, i).task for i in range(8)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_learning_progress_known_answers() -> None:
    np.testing.assert_allclose(stretch(np.array([0.0, 0.1, 1.0])), [0, 0.5, 1])
    progress = Progress(3)
    progress.update(np.array([0.0, 5.0, 0.0]), np.array([5.0, 5.0, 0.0]))
    np.testing.assert_allclose(progress.base, [0, 0.75, 0])  # at most .75
    assert progress.seen.tolist() == [True, True, False]
    progress.update(np.array([5.0, 0.0, 0.0]), np.array([5.0, 0.0, 0.0]))  # from 0 a single 1
    np.testing.assert_allclose([progress.fast[0], progress.slow[0]], [0.1, 0.01])
    np.testing.assert_allclose(progress.value()[0], 0.5 - 0.01 * 0.9 / (0.01 + 0.1 * 0.98))
    assert progress.value()[0] == pytest.approx(0.4167, abs=1e-4)
    np.testing.assert_allclose(progress.fast[1], 1.0)  # without episodes: unchanged, not a failure
    assert progress.weights(np.ones(3, bool))[2] == 0


def test_learning_progress_prefers_what_is_being_learned() -> None:
    """Four tasks: solved, being learned, unlearnable, and not tried: most goes to the second."""
    sampler = sampled("learning_progress", floor=0.2, interval=20)
    rng = np.random.default_rng(0)
    for round_ in range(60):
        for task, rate in enumerate([1.0, round_ / 60, 0.0]):
            for _ in range(5):
                sampler.update(episode(task, success=bool(rng.random() < rate)))
    probs = sampler.probs(np.array([True] * 4 + [False]))
    assert probs.argmax() == 1
    assert probs[2] == pytest.approx(0.05)  # never succeeded: the floor


def test_alp_is_the_mean_change_between_a_tasks_episodes() -> None:
    sampler = sampled("alp", floor=0.0)
    allowed = np.array([True] * 4 + [False])
    for scores in ([0.0, 1.0, 0.0], [0.5, 0.5, 0.5], [0.0, 0.0, 0.5], [0.25]):
        task = int(sampler._played[:4].argmin())
        for each in scores:
            sampler.update(episode(task, ret=2 * each))
    np.testing.assert_allclose(sampler.probs(allowed), np.array([1, 0, 0.25, 0, 0]) / 1.25)
    for _ in range(11):  # changes of 0: a plain mean up to the tenth change, then a tenth each
        sampler.update(episode(2, ret=1.0))
    change = 0.5 / 10 * 0.9**3
    np.testing.assert_allclose(sampler.probs(allowed)[2], change / (1 + change))


def test_weights_name_tasks_parts_and_patterns() -> None:
    spec = Spec(tuple(TaskInfo(name, "g", 10) for name in ("x/a", "x/b", "y/a", "y/b", "z/c")), ())
    parts = ["x/all", "x/all", "y/a", "y/b", "z"]
    weights = {"y/a": 7.0, "x/all": 3.0, "*/a": 2.0, "[yz]/?": 5.0, "z": 4.0}
    assert task_weights(weights, spec, parts).tolist() == [3, 3, 7, 5, 4]
    assert task_weights({}, spec).tolist() == [1] * 5
    with pytest.raises(UnknownNameError, match=r"unknown task in sampler\.weights 'x/al'; did you mean 'x/all'\?"):
        task_weights({"x/al": 2.0}, spec, parts)
    with pytest.raises(UnknownNameError, match="or a pattern such as 'minigrid/"):
        task_weights({"w/*": 2.0}, spec, parts)


@pytest.mark.parametrize("kind", [*KINDS, "plr"])
def test_state_goes_on_bit_for_bit(kind: str) -> None:
    one, other = sampled(kind), sampled(kind)
    rng = np.random.default_rng(0)
    for index in range(120):
        task = one.assign(index % 2, index).task
        one.update(episode(task, success=bool(rng.integers(2)), slot=index % 2, seed=index))
        if index % 3 == 0:
            score(one, 0.3, float(rng.random()), 0.1)
    other.load_state_dict(one.state_dict())
    for index in range(120, 200):
        assert one.assign(0, index) == other.assign(0, index)
        result = episode(index % 4, ret=float(rng.random()), seed=index)
        for each in (one, other):
            each.update(result)
            if index % 3 == 0:
                score(each, 0.1, 0.2, float(index))


def test_slots_are_spread_over_kinds_of_tasks() -> None:
    assert spread(5, SPEC) == [1, 1, 1, 1, 1]
    assert spread(2, SPEC) == [1, 0, 0, 0, 1]
    assert spread(3, SPEC) == [1, 1, 0, 0, 1]
    assert spread(11, SPEC) == [3, 2, 2, 2, 2]
    for slots in range(2, 40):
        assert sum(spread(slots, SPEC)) == slots
    weighted = np.array([3.0, 3.0, 3.0, 3.0, 4.0])
    assert [spread(slots, SPEC, weighted) for slots in (2, 4, 8)] == [[1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [2, 2, 1, 1, 2]]
    with pytest.raises(ValueError, match="slots=1, but the tasks are of 2 kinds that cannot share one: g with 1"):
        spread(1, SPEC)


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task in sampler\.weights 'f'"):
        sampled("weighted", weights={"f": 1.0})
    with pytest.raises(ValueError, match="pinned"):
        sampled("pinned")
    with pytest.raises(ConfigError, match="slots shares environments among tasks"):
        parse_config({"suite": "mtrl.testing:Probes/both", "agent": {"kind": "random"}, "slots": 2})


@pytest.mark.parametrize(("kind", "workers"), [("learnability", 0), ("learnability", 2), ("plr", 0)])
def test_few_slots_play_many_tasks_and_resume_exactly(tmp_path: Path, kind: str, workers: int) -> None:
    """Every task is played on two slots; a run cut in the middle ends like the whole one, on either backend."""
    suite, ppo = "mtrl.testing:Probes/discrete", {"kind": "ppo", "rollout": 16, "epochs": 1}
    spec = make_spec(tasks(suite))
    options: dict[str, Any] = {"slots": 2, "sampler": {"kind": kind}, "copies": 1}
    whole = config(ppo, suite, **options)
    train(whole, tmp_path / "whole")
    train(whole.model_copy(update={"steps": 500, "workers": workers}), tmp_path / "cut")
    text = (tmp_path / "whole" / runs.CONFIG).read_text()
    (tmp_path / "cut" / runs.CONFIG).write_text(text)
    train(whole.model_copy(update={"workers": workers}), tmp_path / "cut", resume=True)
    assert_same_state(tmp_path / "whole", tmp_path / "cut")
    last = [record for record in records(tmp_path / "whole") if f"sampler/{spec.tasks[0].name}_prob" in record][-1]
    for task in spec.tasks:
        assert last[f"sampler/{task.name}_episodes"] > 0
        assert 0 < last[f"sampler/{task.name}_prob"] < 1
    levels = checkpoint.load(tmp_path / "whole" / runs.CHECKPOINTS).state["envs"]["schedule"]["levels"]
    assert (levels is not None) == (kind == "plr")
    if levels is not None:
        assert (levels["score"] >= 0).any(axis=1).all()
        assert levels["drawn"].max() > 0


def test_plr_draws_levels_and_new_seeds_as_often_as_it_says() -> None:
    """Chi-square at .1 % over all levels of four tasks and each task's new seeds; one task has no levels yet."""
    sampler = sampled("plr", floor=0.2, warmup=0, weights={"a": 3.0})
    played = [(0, 1, 0.3), (0, 2, 0.2), (1, 3, 0.25), (2, 4, 0.28)]
    for task, seed, error in played:
        sampler.update(episode(task, seed=seed))
        score(sampler, error)
    allowed = np.array([True] * 4 + [False])
    levels = sampler._levels
    assert levels is not None
    share = levels.probs(allowed)[[0, 0, 1, 2], [0, 1, 0, 0]] * np.array([3, 3, 1, 1])
    expected = np.concatenate((0.8 * share / share.sum(), [0.05] * 4))
    known, draws = {(task, seed): i for i, (task, seed, _) in enumerate(played)}, 4000
    found = np.zeros(8)
    for index in range(draws):
        levels.clock[:], levels.drawn[:] = 0, 0  # so that staleness stays as it is
        task, seed = sampler.assign(0, index)
        found[known.get((task, seed), 4 + task)] += 1
    assert found.sum() == draws
    assert ((found - draws * expected) ** 2 / (draws * expected)).sum() < 24.3


def test_plr_needs_an_agent_that_tells_its_errors(tmp_path: Path) -> None:
    plr: dict[str, Any] = {"slots": 2, "sampler": {"kind": "plr"}, "copies": 1}
    with pytest.raises(ConfigError, match="sampler plr scores by value errors, which 'random' does not tell; ppo does"):
        train(config({"kind": "random"}, "mtrl.testing:Probes/discrete", **plr), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_copies_of_a_mix_and_the_same_evaluation(tmp_path: Path) -> None:
    """Steps are shared 1 : 3; the evaluation plays the same episodes as without copies."""
    probes = "mtrl.testing:Probes"
    for name, suite in {
        "plain": f"{probes}/action+{probes}/constant",
        "mix": f"{probes}/action+{probes}/constant*3",
    }.items():
        train(config({"kind": "random"}, suite, copies=2, steps=80), tmp_path / name)
    plain, mix = (
        json.loads((tmp_path / name / runs.SUMMARY).read_text())["evaluation"]["tasks"] for name in ("plain", "mix")
    )
    assert [[e["seed"] for e in task["episodes"]] for task in plain.values()] == [
        [e["seed"] for e in task["episodes"]] for task in mix.values()
    ]
    slots = checkpoint.load(tmp_path / "mix" / runs.CHECKPOINTS).state["envs"]["slots"]
    assert len(slots) == 2 * (1 + 3)
