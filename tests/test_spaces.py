"""Spaces to leaves, tasks to groups, against answers written by hand."""

from __future__ import annotations

import pickle
import re
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

from mtrl.spaces import Codec, SpaceError, codec, make_spec
from mtrl.testing import Probes
from mtrl.testing.team import Team
from mtrl.types import Group, Task

TWO = Discrete(2)
THREE = Discrete(3)


def written(made: Codec, obs: Any, info: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
    """What a codec writes into row 1 of three; the other rows must stay as they are."""
    out = {name: np.full((3, *box.shape), 7).astype(box.dtype) for name, box in made.leaves.items()}
    before = {name: array.copy() for name, array in out.items()}
    made.write(obs, info or {}, out, 1)
    for name, array in out.items():
        np.testing.assert_array_equal(array[[0, 2]], before[name][[0, 2]])
    return {name: array[1] for name, array in out.items()}


@pytest.mark.parametrize(
    ("space", "obs", "vector", "low", "high"),
    [
        (Box(-1, 2, (2,), np.float32), np.array([0.5, 2], np.float32), [0.5, 2], [-1, -1], [2, 2]),
        (Box(-1, 1, (2,), np.float64), np.array([0.5, 1]), [0.5, 1], [-1, -1], [1, 1]),
        (Box(-1, 1, (), np.float32), np.float32(0.25), [0.25], [-1], [1]),
        (Box(-1, 1, (2, 2), np.float32), np.eye(2, dtype=np.float32), [1, 0, 0, 1], [-1] * 4, [1] * 4),
        (Box(0, 9, (2,), np.int64), np.array([3, 9]), [3, 9], [0, 0], [9, 9]),
        (Discrete(4), 2, [0, 0, 1, 0], [0] * 4, [1] * 4),
        (Discrete(3, start=5), 7, [0, 0, 1], [0] * 3, [1] * 3),
        (MultiDiscrete([2, 3]), np.array([1, 0]), [0, 1, 1, 0, 0], [0] * 5, [1] * 5),
        (MultiDiscrete([2, 3], start=[1, -1]), np.array([2, -1]), [0, 1, 1, 0, 0], [0] * 5, [1] * 5),
        (MultiBinary(3), np.array([1, 0, 1], np.int8), [1, 0, 1], [0] * 3, [1] * 3),
    ],
)
def test_numbers_become_a_vector(
    space: gym.Space[Any], obs: Any, vector: list[float], low: list[float], high: list[float]
) -> None:
    made = Codec(space, TWO)
    assert list(made.leaves) == ["vector"]
    box = made.leaves["vector"]
    assert box.dtype == np.float32
    np.testing.assert_array_equal(box.low, np.array(low, np.float32))
    np.testing.assert_array_equal(box.high, np.array(high, np.float32))
    found = written(made, obs)["vector"]
    assert found.dtype == np.float32
    assert found.tolist() == vector


def test_dictionary_is_taken_apart_in_its_own_order() -> None:
    inner = Dict([("c", Box(0, 1, (1,), np.float32)), ("b", MultiBinary(2))])
    made = Codec(Dict([("z", Discrete(2)), ("a", inner)]), TWO)
    obs = {"a": {"b": np.array([1, 0], np.int8), "c": np.array([0.5], np.float32)}, "z": 1}
    assert written(made, obs)["vector"].tolist() == [0, 1, 0.5, 1, 0]


def test_images() -> None:
    last = Codec(Box(0, 255, (4, 5, 3), np.uint8), TWO)
    picture = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert last.leaves["image"].shape == (3, 4, 5)
    np.testing.assert_array_equal(written(last, picture)["image"], np.moveaxis(picture, 2, 0))
    first = Codec(Box(0, 255, (3, 4, 5), np.uint8), TWO)
    np.testing.assert_array_equal(written(first, picture.reshape(3, 4, 5))["image"], picture.reshape(3, 4, 5))
    grey = Codec(Box(0, 255, (4, 5), np.uint8), TWO)
    np.testing.assert_array_equal(written(grey, picture[..., 0])["image"], picture[None, ..., 0])
    assert grey.leaves["image"].dtype == np.uint8


def test_named_leaves() -> None:
    space = Dict(
        {
            "observation": Box(-1, 1, (2,), np.float32),
            "state": Box(-2, 2, (2, 2), np.float32),
            "tokens": Box(0, 99, (4,), np.int64),
            "action_mask": Box(0, 1, (3,), np.int8),
        }
    )
    made = Codec(space, THREE)
    kinds = {name: (box.shape, box.dtype) for name, box in made.leaves.items()}
    assert kinds == {
        "vector": ((2,), np.float32),
        "state": ((4,), np.float32),
        "tokens": ((4,), np.int32),
        "legal": ((3,), np.bool_),
    }
    obs = {
        "observation": np.array([0, 1], np.float32),
        "state": np.array([[1, 2], [0, -1]], np.float32),
        "tokens": np.array([5, 6, 0, 0]),
        "action_mask": np.array([1, 0, 1], np.int8),
    }
    found = written(made, obs)
    assert found["state"].tolist() == [1, 2, 0, -1]
    assert found["tokens"].tolist() == [5, 6, 0, 0]
    assert found["legal"].tolist() == [True, False, True]
    assert found["vector"].tolist() == [0, 1]


def test_key_legal_is_the_mask_too() -> None:
    made = Codec(Dict({"x": Discrete(2), "legal": MultiBinary(3)}), THREE)
    assert written(made, {"x": 0, "legal": np.array([0, 1, 1], np.int8)})["legal"].tolist() == [False, True, True]


def test_mask_in_the_info() -> None:
    made = Codec(Box(0, 1, (1,), np.float32), THREE, task="a/b", mask_in_info=True)
    obs = np.zeros(1, np.float32)
    assert written(made, obs, {"action_mask": np.array([0, 1, 0], np.int8)})["legal"].tolist() == [False, True, False]
    with pytest.raises(KeyError, match="a/b: info\\['action_mask'\\] was there at the first reset"):
        written(made, obs, {})


def test_team_adds_state_and_alive() -> None:
    made = Codec(TWO, THREE, state=Box(-1, 1, (2, 3), np.float32), team=True)
    assert made.leaves["state"].shape == (6,)
    assert (made.leaves["alive"].shape, made.leaves["alive"].dtype) == ((), np.bool_)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (Text(5), TWO, r"a/b: observation: Text.* has no leaf"),
        (Dict({"m": Text(5)}), TWO, r"a/b: observation\['m'\]: Text.* token ids in 'tokens'"),
        (Tuple((TWO, TWO)), TWO, "has no leaf"),
        (Box(0, 1, (3, 4, 5), np.float32), TWO, "an image must be uint8, got float32"),
        (Dict({"a": Box(0, 255, (3, 4, 5), np.uint8), "b": Box(0, 255, (4, 5), np.uint8)}), TWO, "second 'image'"),
        (Dict({"legal": MultiBinary(2), "action_mask": MultiBinary(2)}), TWO, "second 'legal'"),
        (Dict({"o": TWO, "tokens": Discrete(9)}), TWO, r"observation\['tokens'\] must be a Box"),
        (Dict({"o": TWO, "legal": MultiBinary(2)}), Box(-1, 1, (2,), np.float32), "need a Discrete action space"),
        (Dict({}), TWO, "holds nothing to observe"),
        (TWO, Discrete(3, start=1), r"must start at 0, got start=1; .* declare Discrete\(3\), and add 1 again in step"),
        (
            TWO,
            Box(-1, 1, (2, 3), np.float32),
            r"must have rank 1, got shape \(2, 3\); flatten it .* shape \(6,\), resh",
        ),
        (TWO, Box(-np.inf, np.inf, (2,), np.float32), r"Box actions must be bounded, .*; give it bounds .* \(2,\)\)"),
        (TWO, Box(-1, 1, (2,), np.int64), r"must be floating-point numbers, .*; enumerate it as Discrete\(9\) in"),
        (TWO, MultiDiscrete([2, 3]), r"must be Discrete or Box, got MultiDiscrete.*; enumerate it as Discrete\(6\) in"),
        (TWO, MultiBinary(3), r"must be Discrete or Box, got MultiBinary.*; enumerate it as Discrete\(8\) in"),
        (TWO, Text(5), "must be Discrete or Box, got Text.*; turn it into one Discrete or one bounded Box"),
    ],
)
def test_what_has_no_place_names_the_place(observation: gym.Space[Any], action: gym.Space[Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        Codec(observation, action, task="a/b")
    assert str(caught.value).startswith("a/b: ")


def test_mask_in_the_info_beside_one_in_the_observation() -> None:
    with pytest.raises(SpaceError, match="second 'legal'"):
        Codec(Dict({"o": TWO, "legal": MultiBinary(2)}), TWO, mask_in_info=True)


@pytest.mark.parametrize("task", Probes().tasks("everything"), ids=lambda task: task.name)
def test_codecs_go_to_workers_and_write_the_same(task: Task) -> None:
    made = codec(task)
    copy = pickle.loads(pickle.dumps(made))  # noqa: S301 - our own
    assert copy.leaves == made.leaves
    assert copy.action == made.action
    env = task.build()
    obs, info = env.reset(seed=0)
    if task.agents > 1:
        agent = env.possible_agents[0]
        obs, info = obs[agent], info[agent]
    first, second = written(made, obs, info), written(copy, obs, info)
    for leaf in first:
        np.testing.assert_array_equal(first[leaf], second[leaf])


# From tasks to a spec.


class Fixed(gym.Env[Any, Any]):
    """Has the spaces it is given; counts how many of it were built."""

    built = 0

    def __init__(self, observation: gym.Space[Any], action: gym.Space[Any]) -> None:
        Fixed.built += 1
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}


def task(name: str, observation: gym.Space[Any], action: gym.Space[Any] = TWO, **more: Any) -> Task:
    return Task(name, partial(Fixed, observation, action), 10, **more)


def flat(size: int, low: float = -1.0, high: float = 1.0) -> Box:
    return Box(low, high, (size,), np.float32)


def homes(*tasks: Task) -> list[str]:
    return [info.group for info in make_spec(tasks).tasks]


class Bare(gym.Env[Any, Any]):
    """Lacks its spaces, but for those that it is given."""

    def __init__(self, **spaces: Any) -> None:
        vars(self).update(spaces)

    def reset(self, **options: Any) -> Any:
        return 0, {}


class Uninformed(Bare):
    def reset(self, **options: Any) -> Any:
        return np.zeros(3, np.float32)


class UninformedTeam(Team):
    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed)[0]


def unbuildable() -> Any:
    raise KeyError("gone")


class Seedless(gym.Env[Any, Any]):
    observation_space = action_space = TWO

    def reset(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return np.zeros(2, np.float32), {}


@pytest.mark.parametrize(
    ("build", "agents", "message"),
    [
        (unbuildable, 1, rf"building its environment raised KeyError: 'gone' \({re.escape(__file__)}:\d+\)"),
        (Seedless, 1, r"reset\(seed=0\) raised TypeError: .* unexpected keyword argument 'seed'"),
        (Uninformed, 1, r"reset\(\) does not return .*; reset must return \(observation, info\)"),
        (UninformedTeam, 2, r"reset\(\) does not return .*; reset must return \(observation, info\)"),
        (Bare, 1, "the environment Bare has no observation_space; set self.observation_space to a gymnasium space"),
        (
            partial(Bare, observation_space=TWO, action_space=4),
            1,
            "the environment Bare has action_space 4, which is no gymnasium space; set self.action_space",
        ),
    ],
)
def test_what_an_environment_lacks_names_the_task(build: Any, agents: int, message: str) -> None:
    with pytest.raises(SpaceError, match=f"^a/b: {message}"):
        codec(Task("a/b", build, 5, agents=agents))


def test_declared_spaces_save_the_build() -> None:
    Fixed.built = 0
    assert codec(task("a/x", flat(2), spaces=(flat(3), TWO))).leaves["vector"].shape == (3,)
    assert Fixed.built == 0
    assert codec(task("a/x", flat(2))).leaves["vector"].shape == (2,)
    assert Fixed.built == 1


def test_groups_hold_what_shares_spaces() -> None:
    spec = make_spec(
        [
            task("a/one", flat(2)),
            task("a/two", flat(3)),
            task("a/three", flat(2)),
            task("a/four", flat(2), THREE),
            task("a/five", flat(2), flat(2)),
            task("a/six", flat(2), flat(2, -2.0, 2.0)),
            task("b/one", flat(2)),
        ]
    )
    assert [info.group for info in spec.tasks] == ["a", "a-2", "a", "a-3", "a-4", "a-5", "b"]
    assert [(group.name, group.tasks) for group in spec.groups] == [
        ("a", (0, 2)),
        ("a-2", (1,)),
        ("a-3", (3,)),
        ("a-4", (4,)),
        ("a-5", (5,)),
        ("b", (6,)),
    ]
    assert spec.group("a-3").action == THREE
    with pytest.raises(KeyError):
        spec.group("c")


def test_a_group_is_as_wide_as_its_tasks() -> None:
    spec = make_spec(
        [task("a/x", flat(2, -1, 5)), task("a/y", Box(np.array([0, -9]), np.array([1, 1]), dtype=np.float32))]
    )
    (group,) = spec.groups
    assert group.leaves["vector"].low.tolist() == [-1, -9]
    assert group.leaves["vector"].high.tolist() == [5, 5]


def test_masked_tasks_are_a_group_of_their_own() -> None:
    masked = Dict({"o": flat(2), "legal": MultiBinary(2)})
    assert homes(task("a/x", flat(2)), task("a/y", masked)) == ["a", "a-2"]


def test_groups_have_names_of_their_own_whatever_the_suites_are_called() -> None:
    tasks = task("dmc/a", flat(2)), task("dmc/b", flat(3)), task("dmc-2/a", flat(3)), task("dmc-2/b", flat(4))
    assert homes(*tasks) == ["dmc", "dmc-2", "dmc-2-2", "dmc-2-3"]


@pytest.mark.parametrize(
    ("space", "wrong"), [(Discrete(4), -1), (MultiDiscrete([3, 4]), [-1, 0]), (flat(2), np.ones(1))]
)
def test_what_numpy_would_take_but_does_not_fit(space: gym.Space[Any], wrong: Any) -> None:
    """An index from the end, and one number that is repeated."""
    one = codec(task("a/x", space))
    leaves = {name: np.zeros((1, *box.shape), box.dtype) for name, box in one.leaves.items()}
    with pytest.raises(SpaceError, match="does not fit its space"):
        one.write(np.asarray(wrong, np.float32) if isinstance(space, Box) else wrong, {}, leaves, 0)


def test_group_names_hold_no_dots_or_colons() -> None:
    """They become keys of modules and files."""
    assert homes(task("my.pkg:Suite/x", flat(2))) == ["my_pkg_Suite"]


@pytest.mark.parametrize("suite", ["perception", "trunk", "memory", "heads", "head", "train", "training", "keys"])
def test_no_group_is_called_as_a_part_of_a_network(suite: str) -> None:
    """Parameters are told apart by such names: heads of a group ``memory`` would pass for a memory. And torch refuses
    modules that are called as what it has itself."""
    assert homes(task(f"{suite}/x", flat(2))) == [f"{suite}-2"]


def test_infos_follow_the_tasks() -> None:
    made = make_spec([task("a/x", flat(2), score=(1.0, 3.0))])
    assert (made.tasks[0].name, made.tasks[0].horizon, made.tasks[0].score, made.tasks[0].agents) == (
        "a/x",
        10,
        (1.0, 3.0),
        1,
    )
    assert task("a/x", flat(2), score=(1.0, 3.0)).normalise(2.0) == 0.5
    assert isinstance(made.groups[0], Group)


def test_no_tasks_no_spec() -> None:
    with pytest.raises(ValueError, match="no tasks"):
        make_spec([])


class Lopsided(Team):
    """A team whose agents differ, or whose global state is no Box."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        if fault == "state":
            self.state_space = TWO  # type: ignore[assignment]

    def action_space(self, agent: str) -> gym.Space[Any]:
        return THREE if self.fault != "spaces" or agent == "left" else TWO


@pytest.mark.parametrize(
    ("build", "agents", "message"),
    [
        (Team, 3, "says agents=3 but its environment has 2"),
        (Team, 1, "says agents=1 but its environment has 2"),
        (partial(Fixed, TWO, TWO), 2, "says agents=2 but builds a single-agent environment"),
        (partial(Lopsided, "spaces"), 2, "agents 'left' and 'right' differ in spaces"),
        (partial(Lopsided, "state"), 2, "state_space must be a Box"),
    ],
)
def test_teams_that_cannot_be(build: Any, agents: int, message: str) -> None:
    with pytest.raises(SpaceError, match=f"a/team: .*{message}|a/team: {message}"):
        codec(Task("a/team", build, 5, agents=agents))
