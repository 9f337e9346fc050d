"""The vector against probe environments whose every number is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode

from mtrl.spaces import make_spec
from mtrl.types import Decision, Task
from mtrl.vector import EnvironmentFailedError, EpisodeList, MultiTaskVectorEnv, Pinned, episode_seed
from mtrl.vector.actions import random_actions
from mtrl.vector.views import PaddedVectorEnv
from tests.vector.drive import assert_same, begin_and_drive, drive
from tests.vector.probes import HORIZON, Team, Walk, tasks

Make = Callable[..., MultiTaskVectorEnv]


def test_rows_follow_group_then_task_then_copy(make: Make) -> None:
    envs = make(tasks("counter", "team", "walk", "counter-b"), [2, 2, 1, 1])
    names = [envs.spec.tasks[task].name.removeprefix("probe/") for task in envs.slot_tasks]
    assert names == ["counter", "counter", "counter-b", "team", "team", "walk"]
    assert envs.layout.rows == {"probe": slice(0, 3), "probe-2": slice(3, 9), "probe-3": slice(9, 10)}
    envs.reset()
    assert envs.num_envs == 10
    assert envs.obs.task.tolist() == [0, 0, 3, 1, 1, 1, 1, 1, 1, 2]
    assert envs.obs.leaves["probe-2"]["vector"][:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert set(envs.obs.leaves["probe-2"]) == {"vector", "state", "legal", "alive"}


def test_counter_transitions_are_the_known_ones(make: Make) -> None:
    """Every transition of every episode, from the seed and the actions alone."""
    envs = make(tasks("counter", "counter-b"), 3, seed=11)
    envs.reset()
    horizons = {0: HORIZON, 1: 4}
    index, steps = [0] * 6, [0] * 6
    for step, after, episodes in drive(envs, 60):
        ended = {episode.slot: episode for episode in episodes}
        for slot in range(6):
            task, seed = envs.slot_tasks[slot], episode_seed(11, slot, index[slot])
            length = int(np.random.default_rng(np.random.PCG64(seed)).integers(1, 11))
            action = int(step.decision.action["probe"][slot])
            steps[slot] += 1
            assert step.obs.leaves["probe"]["vector"][slot, 0] == steps[slot] - 1
            assert step.obs.first[slot] == (steps[slot] == 1)
            assert step.reward[slot] == steps[slot] + action
            assert step.success[slot] == (action == 3)
            assert step.next.leaves["probe"]["vector"][slot].tolist() == [steps[slot], action, seed % 1000]
            assert step.next.leaves["probe"]["legal"][slot].tolist() == [
                True,
                steps[slot] % 2,
                True,
                steps[slot] % 2 == 0,
            ]
            assert not step.next.first[slot]
            assert step.terminated[slot] == (steps[slot] == length)
            assert step.truncated[slot] == (steps[slot] == horizons[task] < length)
            if steps[slot] in (length, horizons[task]):
                assert ended[slot].length == steps[slot]
                assert (ended[slot].index, ended[slot].seed, ended[slot].task) == (index[slot], seed, task)
                index[slot], steps[slot] = index[slot] + 1, 0
                new = [0, -1, episode_seed(11, slot, index[slot]) % 1000]
                assert after.leaves["probe"]["vector"][slot].tolist() == new
            else:
                assert slot not in ended
                assert_same(after.leaves["probe"]["vector"][slot], step.next.leaves["probe"]["vector"][slot])
    assert min(index) > 5


def test_episode_books(make: Make) -> None:
    envs = make(tasks("counter"), 2)
    envs.reset(seed=3)
    rets, seen = np.zeros(2), [[], []]
    for step, _, episodes in drive(envs, 50):
        rets += step.reward
        for slot in range(2):
            seen[slot].append(int(step.decision.action["probe"][slot]))
        for episode in episodes:
            slot = episode.slot
            assert episode.ret == rets[slot]
            assert episode.journal.task == "probe/counter"
            assert episode.journal.actions.tolist() == seen[slot]
            assert episode.success == (3 in seen[slot])
            assert episode.success_last == (seen[slot][-1] == 3)
            assert episode.terminated == bool(step.terminated[slot])
            rets[slot], seen[slot] = 0.0, []


def test_terminated_wins_and_no_success_is_none(make: Make) -> None:
    envs = make(tasks("picture"))
    envs.reset()
    *_, (step, _, (episode,)) = drive(envs, 5)
    assert step.terminated.tolist() == [True]
    assert step.truncated.tolist() == [False]
    assert episode.success is None
    assert episode.success_last is None


def test_success_told_now_and_then(make: Make) -> None:
    envs = make(tasks("walk"), 4)
    envs.reset()
    told, ends = np.zeros(4, bool), set()
    for step, _, episodes in drive(envs, 100):
        told |= step.success
        for episode in episodes:
            assert episode.success == told[episode.slot]
            assert episode.success_last == step.success[episode.slot]
            told[episode.slot] = False
            ends.add((episode.length % 2, episode.success))
    assert (0, True) in ends  # such an episode's last step told nothing


def test_arrays_are_never_written_again(make: Make) -> None:
    """The picture's environment reuses one array; what was handed out must keep its values."""
    envs = make(tasks("picture", "walk"))
    envs.reset()
    first = envs.obs
    kept = first.leaves["probe"]["image"].copy()
    seen = drive(envs, 12)
    assert_same(first.leaves["probe"]["image"], kept)
    red = [int(step.next.leaves["probe"]["image"][0, 0, 0, 0]) for step, _, _ in seen]
    assert red == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    before = [int(step.obs.leaves["probe"]["image"][0, 0, 0, 0]) for step, _, _ in seen]
    assert before == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    actions = random_actions(envs, np.random.default_rng(0))
    envs.step_async(actions)
    sent = actions["probe"].copy()
    actions["probe"][...] = 1 - actions["probe"]
    envs.step_wait(Decision(actions, {}))
    assert envs.state_dict()["slots"][0]["actions"][-1] == sent[0]


def test_team_rows(make: Make) -> None:
    """Rows of a team end together; agent 2 dies after step 2 and is blank from then on."""
    envs = make(tasks("team"), 2, seed=1)
    envs.reset()
    steps, lengths = [0, 0], set()
    for step, _, episodes in drive(envs, 120):
        ended = {episode.slot: episode for episode in episodes}
        for slot in range(2):
            rows, seed = slice(3 * slot, 3 * slot + 3), int(step.obs.leaves["probe"]["vector"][3 * slot, 2])
            steps[slot] += 1
            leaves = {name: leaf[rows] for name, leaf in step.next.leaves["probe"].items()}
            actions = step.decision.action["probe"][rows]
            died = steps[slot] >= 2
            over = slot in ended
            odd = bool(seed % 2)
            assert step.reward[rows].tolist() == [actions[0], actions[1], actions[2] if steps[slot] <= 2 else 0.0]
            assert step.terminated[rows].tolist() == [over and not odd] * 3
            assert step.truncated[rows].tolist() == [over and odd] * 3
            lives = not over or odd
            assert leaves["alive"].tolist() == [lives, lives, not died and lives]
            if lives:
                assert leaves["vector"][0].tolist() == [0, steps[slot], seed]
                assert leaves["legal"][0].tolist() == [True, False, True]
            if died:
                assert leaves["vector"][2].tolist() == [0, 0, 0]
                assert leaves["legal"][2].tolist() == [True, False, False]
            assert leaves["state"][:, 0].tolist() == [steps[slot]] * 3
            assert step.success[rows].tolist() == [steps[slot] == 3] * 3
            if over:
                episode = ended[slot]
                assert episode.terminated == (not odd)
                assert episode.journal.actions.shape == (steps[slot], 3)
                assert episode.success == (steps[slot] >= 3)
                lengths.add((steps[slot], odd))
                steps[slot] = 0
    assert {(2, True), (2, False), (5, True), (5, False)} <= lengths


def test_run_seed_decides_everything(make: Make) -> None:
    one, other = make(tasks("all"), seed=4), make(tasks("all"), seed=9)
    one.reset()
    other.reset(seed=4)
    assert_same(drive(one, 40), drive(other, 40))
    one.reset()
    other.reset(seed=5)
    assert not np.array_equal(one.obs.leaves["probe-2"]["vector"], other.obs.leaves["probe-2"]["vector"])


def test_episode_seeds_are_apart() -> None:
    seeds = {episode_seed(run, slot, index) for run in range(10) for slot in range(10) for index in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert episode_seed(0, 1, 2) == int(np.random.SeedSequence([0, 1, 2]).generate_state(1)[0]) >> 1


def test_episode_list_parks_slots(make: Make) -> None:
    lists = EpisodeList([[(0, 5), (1, 6)], [], [(1, 7)]])
    pair = tasks("counter", "counter-b")
    envs = make(pair, [2, 1], schedule=lists)
    envs.reset()
    assert envs.active.tolist() == [True, False, True]
    assert envs.obs.leaves["probe"]["legal"][1].tolist() == [True, False, False, False]
    episodes = []
    for _ in range(40):
        was = envs.active
        actions = {"probe": np.where(was, 1, 99)}
        envs.step_async(actions)
        step, after = envs.step_wait(Decision(actions, {}))
        assert step.active.tolist() == was.tolist()
        assert not step.reward[~was].any()
        assert not (step.terminated | step.truncated)[~was].any()
        episodes += [(e.slot, e.task, e.seed) for e in envs.episodes]
        for slot in range(3):
            if envs.active[slot] and after.first[slot]:
                assert after.leaves["probe"]["vector"][slot, 2] == after.task[slot] + 5
    assert not envs.active.any()
    assert sorted(episodes) == [(0, 0, 5), (0, 1, 6), (2, 1, 7)]
    with pytest.raises(ValueError, match="the schedule given decides all seeds"):
        envs.reset(seed=1)


def test_schedule_must_fit_the_slot(make: Make) -> None:
    envs = make(tasks("counter", "walk"), schedule=EpisodeList([[(1, 0)], [(1, 0)]]))
    with pytest.raises(ValueError, match=r"slot 0 of group 'probe'.*cannot play 'probe/walk'"):
        envs.reset()
    with pytest.raises(ValueError, match="slot 0 got task 7"):
        make(tasks("counter"), schedule=EpisodeList([[(7, 0)]])).reset()


def test_shared_spec(make: Make) -> None:
    spec = make_spec(tasks("counter", "walk", "counter-b"))
    envs = make(tasks("counter-b"), spec=spec)
    envs.reset()
    assert envs.spec is spec
    assert envs.slot_tasks == (2,)
    assert list(envs.layout.rows) == ["probe"]
    with pytest.raises(ValueError, match="'probe/team' is not in the spec"):
        make(tasks("team"), spec=spec)
    other = replace(tasks("walk")[0], name="probe/counter")
    with pytest.raises(ValueError, match="'probe/counter' has other observations"):
        make([other], spec=spec)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"probe": [0]}, "no actions for group 'probe-2'"),
        ({"probe": [0], "probe2": [[0, 0]]}, "is 'probe2' meant"),
        ({"probe": [0], "probe-2": [[0, 0]], "x": [0]}, r"unknown groups \['x'\]"),
        ({"probe": [0, 1], "probe-2": [[0, 0]]}, r"group 'probe' must have shape \(1,\), got \(2,\)"),
        ({"probe": [0.0], "probe-2": [[0, 0]]}, "group 'probe' must be int64, got float64"),
        ({"probe": [4], "probe-2": [[0, 0]]}, r"group 'probe', row 0 \(row 0 .*'probe/counter': action 4 .*\[0, 3\]"),
        ({"probe": [-1], "probe-2": [[0, 0]]}, "action -1"),
        (
            {"probe": [0], "probe-2": [[0, np.nan]]},
            r"group 'probe-2', row 0 \(row 1 .*'probe/walk': action \[ 0. nan\]",
        ),
        ({"probe": [0], "probe-2": [[0, np.inf]]}, "inf"),
        ({"probe": [0], "probe-2": [[-1.5, 0]]}, "-1.5"),
    ],
)
def test_bad_actions_are_named(make: Make, actions: dict[str, list[float]], message: str) -> None:
    envs = make(tasks("counter", "walk"))
    envs.reset()
    with pytest.raises(ValueError, match=message):
        envs.step_async({name: np.asarray(action) for name, action in actions.items()})
    drive(envs, 2)  # nothing was sent: the vector goes on


def test_calls_out_of_order(make: Make) -> None:
    envs = make(tasks("counter"))
    with pytest.raises(NoAsyncCallError, match="reset"):
        envs.step_async({"probe": np.zeros(1, int)})
    envs.reset()
    with pytest.raises(NoAsyncCallError, match="step_async"):
        envs.step_wait(Decision({}, {}))
    envs.step_async({"probe": np.zeros(1, int)})
    for call in (envs.reset, envs.state_dict, lambda: envs.step_async({"probe": np.zeros(1, int)})):
        with pytest.raises(AlreadyPendingCallError):
            call()
    envs.close()
    with pytest.raises(ClosedEnvironmentError):
        envs.reset()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"copies": 0}, "at least one"),
        ({"copies": [1, 2]}, "2 entries for 1 tasks"),
        ({"workers": -1}, "workers=-1"),
        ({"tasks": tasks("walk", "walk")}, "given twice"),
        ({"tasks": []}, "no tasks"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskVectorEnv(**{"tasks": tasks("counter"), **kwargs})  # pyright: ignore[reportArgumentType]


def test_gymnasium_face(make: Make) -> None:
    envs = make(tasks("counter", "walk", "team"), 2)
    native = make(tasks("counter", "walk", "team"), 2)
    assert isinstance(envs, gym.vector.VectorEnv)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    observation, info = envs.reset(seed=8)
    native.reset(seed=8)
    assert envs.observation_space.contains(observation)
    assert info["_task"].all()
    rng, ends = np.random.default_rng(0), 0
    for step, after, episodes in drive(native, 30):
        actions = random_actions(envs, rng)
        assert envs.action_space.contains(actions)
        observation, reward, terminated, truncated, info = envs.step(actions)
        assert envs.observation_space.contains(observation)
        assert_same(observation, dict(after.leaves))
        assert_same([reward, terminated, truncated], [step.reward, step.terminated, step.truncated])
        assert_same([info["task"], info["success"], info["active"]], [step.obs.task, step.success, step.active])
        done = terminated | truncated
        if not done.any():
            assert "final_obs" not in info
            continue
        assert_same(info["_final_obs"], done)
        assert_same(info["_final_info"], done)
        for row in np.flatnonzero(done):
            name, rows = next((n, r) for n, r in envs.layout.rows.items() if r.start <= row < r.stop)
            final = {leaf: array[row - rows.start] for leaf, array in step.next.leaves[name].items()}
            assert_same(info["final_obs"][row], final)
            (episode,) = (e for e in episodes if e.slot == [0, 1, 2, 3, 4, 4, 4, 5, 5, 5][row])
            told = info["final_info"]["episode"]
            assert (told["r"][row], told["l"][row], told["task"][row]) == (episode.ret, episode.length, episode.task)
            ends += 1
    assert ends > 10


def test_environment_errors_name_the_place_and_stay(make: Make) -> None:
    envs = make(tasks("counter", "faulty-raise"))
    envs.reset(seed=2)
    drive(envs, 2)
    where = rf"task 'probe/faulty-raise' \(slot 1, seed {episode_seed(2, 1, 0)}, step 3\): raised ZeroDivisionError"
    for _ in range(3):
        with pytest.raises(EnvironmentFailedError, match=where):
            drive(envs, 1)
    with pytest.raises(EnvironmentFailedError, match="physics exploded"):
        envs.reset()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("build", "reset raised OSError.'no such ROM'"),
        ("reset", "reset raised OSError.'no display'"),
        ("reward", "step 3.: returned the reward nan"),
        ("shape", "step 3.: observation does not fit"),
        ("observation", r"step 3.: observed nan \(1 such number, leaf 'vector'\)"),
        ("first", "step 0.: observed inf"),
    ],
)
def test_faults_are_named(make: Make, fault: str, message: str) -> None:
    envs = make(tasks(f"faulty-{fault}"))
    with pytest.raises(EnvironmentFailedError, match=message):
        begin_and_drive(envs)


def test_pinned_schedule_is_pure() -> None:
    schedule = Pinned((4, 2), 7)
    assert schedule.assign(1, 3) == (2, episode_seed(7, 1, 3))


class Precise(gym.Env):
    """Takes no action beyond its bounds, which float32 cannot write exactly."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-0.1, 0.1, (2,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        assert action.dtype == np.float64
        assert self.action_space.contains(action), action
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_bounds_in_float64_are_kept() -> None:
    envs = MultiTaskVectorEnv([Task("a/precise", Precise, 5)])
    envs.reset(seed=0)
    (group,) = envs.spec.groups
    envs.step_async({group.name: np.array([[0.1, -0.1]], np.float32)})
    envs.step_wait(Decision({}, {}))
    envs.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("text", r"returned the reward '1.0', not a number \(mtrl check tells how to mend it\)"),
        ("rewards", r"returned the reward array\(\[0., 0.\]\), not a number"),
        ("four", "returned 4 values, not the five of gymnasium.Env.step"),
        ("info", "returned the info None, not a dict"),
        ("success", "reports success='yes', not a boolean"),
        ("shape", r"observation does not fit its space: .*its shape is \(4,\)"),
    ],
)
def test_wrong_answers_are_told_in_the_words_of_the_interface(make: Make, fault: str, message: str) -> None:
    envs = make(tasks(f"faulty-{fault}"))
    with pytest.raises(EnvironmentFailedError, match=f"step 3\\): {message}") as caught:
        begin_and_drive(envs)
    assert "slots.py" not in str(caught.value)


class Quits(Team):
    """One agent is truncated at the first step while the others go on."""

    def step(self, actions: dict[str, int]) -> tuple[Any, Any, Any, Any, Any]:
        observations, rewards, terminated, truncated, infos = super().step(actions)
        if self._steps == 1:
            self.agents = [agent for agent in self.agents if agent != "a0"]
            truncated["a0"] = True
        return observations, rewards, terminated, truncated, infos


def test_a_team_whose_agent_is_truncated_alone_is_refused(make: Make) -> None:
    envs = make([Task("probe/quits", Quits, 50, agents=3)])
    with pytest.raises(EnvironmentFailedError, match=r"truncates \['a0'\] while others go on"):
        begin_and_drive(envs)


@pytest.mark.parametrize("what", ["reset", "step"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interruption_leaves_nothing_half_done(
    make: Make, workers: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook: what follows a new reset is as in a new vector, and nothing goes on from a torn state."""
    envs, fresh = (make(tasks("counter", "counter-b", "walk"), 2, workers=count) for count in (workers, 0))
    if what == "step":
        envs.reset(seed=1)
        drive(envs, 2)
    calls = iter([False, True])

    def interrupted(*args: Any, **kwargs: Any) -> None:
        if next(calls):
            raise KeyboardInterrupt

    backend: Any = envs._backend
    with monkeypatch.context() as patch:
        if workers:
            whole = backend._answer
            patch.setattr(backend, "_answer", lambda *args, **kw: (whole(*args, **kw), interrupted()))
        else:
            method = getattr(Walk, what)
            patch.setattr(Walk, what, lambda *args, **kw: (interrupted(), method(*args, **kw))[1])
        with pytest.raises(KeyboardInterrupt):
            envs.reset(seed=1) if what == "reset" else drive(envs, 1)
    if workers and what == "step":  # these go on where they were
        envs.step_wait(Decision({}, {}))
    else:
        for call in (envs.state_dict, lambda: envs.step_async({}), lambda: envs.step_wait(Decision({}, {}))):
            with pytest.raises(RuntimeError, match=r"left some slots ahead of others: call reset\(\)"):
                call()
    envs.reset(seed=5)
    fresh.reset(seed=5)
    assert_same(drive(envs, 12), drive(fresh, 12))


def test_tasks_are_asked_for_by_name_elsewhere() -> None:
    with pytest.raises(TypeError, match=r"give tasks, as in mtrl.tasks\('minigrid/mt3'\)"):
        MultiTaskVectorEnv("minigrid/mt3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"give a MultiTaskVectorEnv\(mtrl.tasks"):
        PaddedVectorEnv(tasks("counter"))  # type: ignore[arg-type]
