"""The rules of a battle, one by one, on hand-placed units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

pytest.importorskip("numba")

from mtrl_envs.smac import kernels
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.kernels import (
    COOLDOWN,
    DAMAGE,
    HEALTH,
    LIFE,
    MEMORY,
    MOVE,
    RADIUS,
    SHOTS,
    STOP,
    TARGET,
    TICKS,
    WAIT,
    X,
    Y,
)
from mtrl_envs.smac.scenarios import HORIZON, TYPES, Rules, parse

ATTACK = 5  # the first attack action
UP, RIGHT, DOWN, LEFT = range(4)
LETTERS = [one.letters for one in TYPES]
ONE = np.ones(1, bool)
Place = tuple[float, float]


def arena(name: str, places: Sequence[Place], rules: Rules = Rules(), seed: int = 0) -> Battles:  # noqa: B008 - frozen
    """One battle with its units moved to ``places``."""
    battles = Battles([parse(name)], 1, rules)
    battles.reset(ONE, np.array([seed]))
    battles.floats[0, X], battles.floats[0, Y] = np.array(places, np.float32).T
    observe(battles)
    return battles


def observe(battles: Battles) -> None:
    """Write observations, state and legal actions of a hand-made situation."""
    battles._observe(np.ones(battles.size, bool))


def fight(battles: Battles, orders: Mapping[int, int], noise: np.ndarray | None = None) -> None:
    """One step in which unit i moves (order 0-3) or attacks unit ``order - 5``; the others stop. Without noise in the
    cooldowns, unless it is given."""
    f, k = battles.floats[0], battles.ints[0]
    n = f.shape[1]
    for i in range(n):
        order = orders.get(i, STOP)
        k[MOVE, i], k[TARGET, i] = min(order, STOP), order - ATTACK if order >= ATTACK else -1
    if noise is None:
        noise = np.zeros((TICKS, n), np.float32)
    walls = battles.rules.walls_cause_death
    kernels.fight(f, k, noise, walls, np.empty(n, np.float32), np.empty((2, n), np.float32))


# Moving.


@pytest.mark.parametrize("kind", range(6), ids=LETTERS)
@pytest.mark.parametrize(("order", "way"), [(UP, (0, 1)), (RIGHT, (1, 0)), (DOWN, (0, -1)), (LEFT, (-1, 0))])
def test_a_step_moves_half_a_second_at_the_types_speed(kind: int, order: int, way: Place) -> None:
    battles = arena(f"1{LETTERS[kind]}_vs_1m", [(16, 16), (30, 30)])
    fight(battles, {0: order})
    place = battles.floats[0, [X, Y], 0]
    np.testing.assert_allclose(place, 16 + np.array(way) * TYPES[kind].velocity / 2, atol=1e-5)


def test_the_dead_neither_move_nor_push_nor_shoot() -> None:
    battles = arena("2m_vs_1m", [(10, 10), (10.1, 10), (12, 10)])
    battles.floats[0, LIFE, 0] = 0
    fight(battles, {0: ATTACK + 2})
    np.testing.assert_array_equal(battles.floats[0, X, :2], np.array([10, 10.1], np.float32))
    assert battles.floats[0, LIFE, 2] == 45
    fight(battles, {0: UP})
    assert battles.floats[0, Y, 0] == 10


@pytest.mark.parametrize(("name", "gap"), [("2m_vs_1m", 0.5), ("1m1s_vs_1m", 0.3), ("2s_vs_1m", 1.0)])
def test_overlapping_units_end_side_by_side(name: str, gap: float) -> None:
    battles = arena(name, [(10, 10), (10 + gap, 10), (30, 30)])
    reach = float(battles.floats[0, RADIUS, :2].sum())
    fight(battles, {})
    move = (reach - gap) / 2
    np.testing.assert_allclose(battles.floats[0, X, :2], [10 - move, 10 + gap + move], atol=1e-5)
    np.testing.assert_array_equal(battles.floats[0, Y, :2], [10, 10])


def test_touching_units_stay() -> None:
    battles = arena("2m_vs_1m", [(10, 10), (10.75, 10), (30, 30)])
    fight(battles, {})
    np.testing.assert_array_equal(battles.floats[0, X, :2], np.array([10, 10.75], np.float32))


@pytest.mark.parametrize(
    ("place", "order"), [((0.5, 16), LEFT), ((31.5, 16), RIGHT), ((16, 0.5), DOWN), ((16, 31.5), UP)]
)
def test_walls_kill_unless_switched_off(place: Place, order: int) -> None:
    deadly = arena("1m_vs_1m", [place, (16, 16)])
    fight(deadly, {0: order})
    assert deadly.floats[0, LIFE, 0] == 0
    safe = arena("1m_vs_1m", [place, (16, 16)], Rules(walls_cause_death=False))
    fight(safe, {0: order})
    assert safe.floats[0, LIFE, 0] == 45
    axis = X if order in (LEFT, RIGHT) else Y
    assert safe.floats[0, axis, 0] == (0 if order in (LEFT, DOWN) else 32)


# Shooting.


@pytest.mark.parametrize("kind", range(6), ids=LETTERS)
def test_range_is_strict(kind: int) -> None:
    reach = TYPES[kind].range
    at = arena(f"1{LETTERS[kind]}_vs_1m", [(8, 16), (8 + reach, 16)])
    fight(at, {0: ATTACK + 1})
    assert at.floats[0, LIFE, 1] == 45
    inside = arena(
        f"1{LETTERS[kind]}_vs_1m", [(8, 16), (float(np.nextafter(np.float32(8 + reach), np.float32(0))), 16)]
    )
    fight(inside, {0: ATTACK + 1})
    assert inside.floats[0, LIFE, 1] == 45 - TYPES[kind].damage


# A shot sets the cooldown c, which falls by 1/16 from the next tick on: the next shot is ceil(16 c) + 1 ticks later.
@pytest.mark.parametrize(("kind", "shots"), list(enumerate((8, 5, 3, 6, 9, 8))), ids=LETTERS)
def test_shots_in_80_ticks(kind: int, shots: int) -> None:
    battles = arena(f"1{LETTERS[kind]}_vs_1s", [(8, 16), (9.5, 16)])
    landed = 0
    for _ in range(10):
        battles.floats[0, LIFE, 1] = 160
        fight(battles, {0: ATTACK + 1})
        landed += battles.ints[0, SHOTS, 0]
        assert battles.floats[0, LIFE, 1] == 160 - battles.ints[0, SHOTS, 0] * battles.floats[0, DAMAGE, 0]
    assert landed == shots


def test_noise_is_added_to_the_cooldown_of_a_shot() -> None:
    battles = arena("1m_vs_1m", [(8, 16), (12, 16)])
    noise = np.zeros((TICKS, 2), np.float32)
    noise[0, 0], noise[1:, 0] = 0.1, 9
    fight(battles, {0: ATTACK + 1}, noise)
    assert battles.floats[0, WAIT, 0] == pytest.approx(0.61 + 0.1 - 7 / 16, abs=1e-6)
    assert battles.floats[0, WAIT, 1] == -8 / 16  # falls without bound while idle


def test_the_noise_of_a_battle_lies_between_minus_one_and_two_ticks() -> None:
    size = 2000
    battles = Battles([parse("1m_vs_1s")], size)
    every = np.ones(size, bool)
    battles.reset(every, np.arange(size))
    battles.floats[:, X], battles.floats[:, Y] = np.array([10, 14], np.float32), 16
    battles.step(np.full((size, 1), ATTACK))
    noise = battles.floats[:, WAIT, 0] - (0.61 - 7 / 16)
    assert -1 / 16 <= noise.min() < -0.95 / 16
    assert 1.95 / 16 < noise.max() < 2 / 16
    assert noise.mean() == pytest.approx(0.5 / 16, abs=4 * (3 / 16) / np.sqrt(12 * size))


def test_two_units_can_kill_each_other_and_nobody_wins() -> None:
    battles = arena("1m_vs_1m", [(14, 16), (18, 16)])
    battles.floats[0, LIFE] = 9
    outcome = battles.step(np.array([[ATTACK]]))
    assert not battles.floats[0, LIFE].any()
    assert outcome.terminated[0]
    assert not outcome.success[0]
    assert not outcome.truncated[0]
    assert outcome.reward[0] == pytest.approx(9 / 45)


def test_overkill_is_not_paid_and_damage_adds_up() -> None:
    battles = arena("3m_vs_2m", [(14, 15), (14, 16), (14, 17), (18, 16), (30, 30)])
    battles.floats[0, LIFE, 3] = 20
    outcome = battles.step(np.full((1, 3), ATTACK))
    assert battles.floats[0, LIFE, 3] == 0
    assert outcome.reward[0] == pytest.approx(20 / 45 / 2)
    assert not outcome.terminated[0]


def test_an_attack_idles_after_its_target_died() -> None:
    battles = arena("1m_vs_2m", [(14, 16), (18, 16), (18, 17.5)])
    battles.floats[0, LIFE, 1] = 5
    fight(battles, {0: ATTACK + 1})
    assert battles.floats[0, LIFE].tolist() == [45, 0, 45]
    assert battles.floats[0, X, 0] == 14


def test_all_damage_is_lost_health() -> None:
    size, rng = 32, np.random.default_rng(0)
    battles = Battles([parse("3s5z_vs_3s6z")], size, Rules(walls_cause_death=False))
    battles.reset(np.ones(size, bool), np.arange(size))
    hits = 0
    for _ in range(60):
        before = battles.floats[:, LIFE].copy()
        running = ~battles.clocks.over
        battles.step(np.argmax(rng.random(battles.legal.shape) * battles.legal, 2))
        dealt = np.zeros_like(before)
        b, i = np.nonzero(battles.ints[:, SHOTS] * running[:, None])
        np.add.at(dealt, (b, battles.ints[b, TARGET, i]), battles.ints[b, SHOTS, i] * battles.floats[b, DAMAGE, i])
        np.testing.assert_allclose(before - battles.floats[:, LIFE], np.minimum(dealt, before), atol=1e-4)
        hits += len(b)
    assert hits > 1000


def test_a_mirrored_start_gives_a_mirrored_battle() -> None:
    """The same orders, seen from the other side: left for right, and each team in the other's place."""
    rng, n = np.random.default_rng(1), 4
    swap, turn = np.r_[n : 2 * n, :n], np.array([UP, LEFT, DOWN, RIGHT, STOP])
    places = [(centre + x, 16 + y) for centre in (14, 18) for x, y in rng.uniform(-2, 2, (n, 2))]
    here = arena("1s3m", places)
    there = arena("1s3m", [(32 - places[i][0], places[i][1]) for i in swap])
    for _ in range(40):
        noise = rng.uniform(-1 / 16, 2 / 16, (TICKS, 2 * n)).astype(np.float32)
        orders = {}
        for i in range(2 * n):
            foes = range(n, 2 * n) if i < n else range(n)
            orders[i] = int(rng.choice([*range(5), *[ATTACK + j for j in foes] * 4]))
        fight(here, orders, noise)
        mirrored = {
            int(swap[i]): int(turn[order]) if order < ATTACK else ATTACK + int(swap[order - ATTACK])
            for i, order in orders.items()
        }
        fight(there, mirrored, noise[:, swap])
        np.testing.assert_allclose(here.floats[0, X], 32 - there.floats[0, X][swap], atol=1e-3)
        np.testing.assert_allclose(here.floats[0, Y], there.floats[0, Y][swap], atol=1e-3)
        np.testing.assert_array_equal(here.floats[0, LIFE], there.floats[0, LIFE][swap])
    assert (here.floats[0, LIFE] == 0).sum() >= 2


# Reward and end.


def test_a_won_battle_returns_two() -> None:
    size = 64
    battles = Battles([parse("2s3z")], size)
    battles.reset(np.ones(size, bool), np.arange(size))
    ret, won, lost = np.zeros(size), np.zeros(size, bool), np.zeros(size, bool)
    while not battles.clocks.over.all():
        outcome = battles.step(battles.script())
        ret += outcome.reward
        won |= outcome.success
        lost |= outcome.terminated & ~outcome.success
        assert not (outcome.terminated & outcome.truncated).any()
    assert 0 < won.sum() < size
    np.testing.assert_allclose(ret[won], 2, atol=1e-6)
    assert (ret[~won] < 1).all()
    assert (battles.floats[lost, LIFE, : battles.n_allies] == 0).all()


def test_an_enemy_that_dies_at_a_wall_is_paid() -> None:
    battles = arena("1m_vs_1m", [(10, 10), (20, 32.3)])  # as if pushed over the border
    outcome = battles.step(np.array([[STOP]]))
    assert outcome.reward[0] == pytest.approx(2)
    assert outcome.success[0]
    assert outcome.terminated[0]


def test_truncated_after_exactly_100_steps_then_still() -> None:
    battles = arena("1m_vs_1m", [(2, 2), (30, 30)], Rules(enemy_shoots=False))
    for step in range(HORIZON):
        outcome = battles.step(np.array([[STOP]]))
        assert outcome.truncated[0] == (step == HORIZON - 1)
        assert not outcome.terminated[0]
    before = battles.floats.copy()
    outcome = battles.step(np.array([[UP]]))
    assert not (outcome.terminated[0])
    assert not (outcome.truncated[0])
    assert outcome.reward[0] == 0
    np.testing.assert_array_equal(before, battles.floats)


# Actions.


def test_legal_actions() -> None:
    near, at, far = (12.99, 10), (13.0, 10), (14, 10)  # of a unit at x = 8 with range 5
    battles = arena("2m_vs_4m", [(8, 10), (20, 20), near, at, far, (9, 10)])
    battles.floats[0, LIFE, 5] = 0
    observe(battles)
    assert battles.legal[0, 0].tolist() == [True] * 5 + [True, False, False, False]
    assert battles.legal[0, 1].tolist() == [True] * 5 + [False] * 4
    battles.floats[0, LIFE, 0] = 0
    observe(battles)
    assert battles.legal[0, 0].tolist() == [False] * 4 + [True] + [False] * 4


@pytest.mark.parametrize("action", [ATTACK, ATTACK + 1, -1, 99])
def test_an_illegal_action_idles_and_is_counted(action: int) -> None:
    battles = arena("1m_vs_1m", [(10, 10), (15.05, 10)], Rules(enemy_shoots=False))
    battles.step(np.array([[action]]))  # the enemy comes into range during the step
    assert battles.floats[0, X, 1] < 14
    assert battles.floats[0, LIFE].tolist() == [45, 45]
    assert battles.floats[0, [X, Y], 0].tolist() == [10, 10]
    assert battles.clocks.illegal[0] == 1
    battles.step(np.array([[ATTACK]]))
    assert battles.clocks.illegal[0] == 1
    assert battles.floats[0, LIFE, 1] < 45


# The scripted policy.


def decide(battles: Battles, unit: int, step: int = 0) -> int:
    rules = battles.rules
    return kernels.script(
        battles.floats[0],
        battles.ints[0],
        unit,
        battles.clocks.key[0],
        step,
        battles.n_allies,
        rules.enemy_shoots,
        rules.enemy_random_target,
    )


def test_enemies_attack_the_closest_and_keep_to_it() -> None:
    battles = arena("3m_vs_1m", [(12, 16), (13, 16), (2, 2), (16, 16)])
    assert decide(battles, 3) == ATTACK + 1
    battles.floats[0, X, :2] = 13, 12
    assert decide(battles, 3) == ATTACK + 1  # not the closest any more
    battles.floats[0, X, 1] = 10.9
    assert decide(battles, 3) == ATTACK + 0  # out of range: forgotten
    battles.floats[0, X, 0] = 3
    decide(battles, 3)
    assert battles.ints[0, MEMORY, 3] == -1


def test_enemies_may_pick_at_random() -> None:
    battles = arena("3m_vs_1m", [(12, 16), (13, 16), (14, 18), (16, 16)], Rules(enemy_random_target=True))
    chosen = set()
    for step in range(60):
        battles.ints[0, MEMORY, 3] = -1
        chosen.add(decide(battles, 3, step))
    assert chosen == {ATTACK, ATTACK + 1, ATTACK + 2}


@pytest.mark.parametrize(("place", "way"), [((16, 24), UP), ((24, 16), RIGHT), ((16, 8), DOWN), ((8, 16), LEFT)])
def test_enemies_walk_towards_what_they_see(place: Place, way: int) -> None:
    battles = arena("1m_vs_1m", [place, (16, 16)])
    assert decide(battles, 1) == way


def test_enemies_walk_towards_any_of_those_they_see() -> None:
    battles = arena("2m_vs_1m", [(16, 24), (16, 8), (16, 16)])
    assert {decide(battles, 2, step) for step in range(40)} == {UP, DOWN}


def test_enemies_that_see_nobody_walk_to_the_point_opposite_to_their_start() -> None:
    battles = Battles([parse("1m_vs_1m")], 1)
    battles.reset(ONE, np.array([3]))
    home = battles.floats[0, [X, Y], 1].copy()
    assert decide(battles, 1) == LEFT
    battles.floats[0, X, :], battles.floats[0, Y, :] = [30, 32 - home[0]], [30, 32 - home[1] - 0.5]
    assert decide(battles, 1) == UP


def test_ties_between_ways_go_to_the_first() -> None:
    battles = arena("1m_vs_1m", [(21, 21), (16, 16)])
    assert decide(battles, 1) == UP
    battles = arena("1m_vs_1m", [(11, 11), (16, 16)])
    assert decide(battles, 1) == DOWN
    battles = arena("1m_vs_1m", [(21, 11), (16, 16)])
    assert decide(battles, 1) == RIGHT


def test_peaceful_enemies_walk_instead_of_shooting() -> None:
    battles = arena("1m_vs_1m", [(13, 16), (16, 16)], Rules(enemy_shoots=False))
    assert decide(battles, 1) == LEFT
    assert battles.script().tolist() == [[ATTACK]]  # the allies' script shoots


# Observations.


def test_observation_of_every_number() -> None:
    battles = arena("1m1s_vs_2m", [(10, 10), (13, 14), (14, 10), (10, 6)])
    f, k = battles.floats[0], battles.ints[0]
    f[LIFE] = 30, 80, 9, 45
    f[WAIT] = 0.305, 1.87, 9, -3
    k[MOVE] = STOP, UP, LEFT, STOP
    k[TARGET] = -1, -1, -1, 1
    observe(battles)
    row = battles.obs[0, 0].reshape(-1)
    marine, stalker = [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]
    expected = [
        *(80 / 160, 3 / 9, 4 / 9, 0, 1, 0, 1, *stalker),
        *(9 / 45, 4 / 9, 0, -1, 0, 0, 1, *marine),
        *(1, 0, -4 / 9, 0, 0, 5 / 6, 0, *marine),  # attacks ally 1, which enemies number 0: action 5 of 0..6
        *(30 / 45, 10 / 32, 10 / 32, 0.5, *marine),
    ]
    np.testing.assert_allclose(row, expected, atol=1e-6)
    k[TARGET, 1], k[MOVE, 1], k[TARGET, 3] = 3, STOP, 0
    observe(battles)
    assert battles.obs[0, 0, 5] == pytest.approx(6 / 6)  # the ally attacks enemy 1: action 6 of 0..6
    assert battles.obs[0, 0, 2 * 13 + 5] == pytest.approx(6 / 6)


def test_actions_of_enemies_can_be_hidden() -> None:
    battles = arena("2m_vs_1m", [(10, 10), (12, 10), (14, 10)], Rules(see_enemy_actions=False))
    battles.ints[0, MOVE], battles.ints[0, TARGET, 2] = UP, 0
    observe(battles)
    row = battles.obs[0, 0]
    assert row[3:6].tolist() == [0, 1, 0]
    assert row[13 + 3 : 13 + 6].tolist() == [0, 0, 0]
    assert row[13] == 1


def test_sight_is_strict_and_ends_with_death() -> None:
    battles = arena("1m_vs_2m", [(8, 16), (17, 16), (float(np.nextafter(np.float32(17), np.float32(0))), 16)])
    assert not battles.obs[0, 0, :13].any()
    assert battles.obs[0, 0, 13:26].any()
    battles.floats[0, LIFE, 2] = 0
    observe(battles)
    assert not battles.obs[0, 0, :26].any()
    battles.floats[0, LIFE] = 0, 45, 45
    observe(battles)
    assert not battles.obs[0, 0].any()


def test_state_of_every_number() -> None:
    battles = arena("1s_vs_1m", [(8, 12), (20, 30)])
    battles.floats[0, LIFE], battles.floats[0, WAIT] = (40, 45), (0.187, -2)
    observe(battles)
    expected = [40 / 160, 8 / 32, 12 / 32, 0.1, 0, 0, 1, 0, 0, 0, 1, 20 / 32, 30 / 32, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(battles.state[0], expected, atol=1e-6)
    battles.floats[0, LIFE, 1] = 0
    observe(battles)
    assert battles.state[0, 10:].tolist() == [0] * 10 + [0, 1]


@pytest.mark.parametrize(("name", "obs", "state"), [("3m", 75, 66), ("2s3z", 127, 110), ("3s5z", 205, 176)])
def test_sizes(name: str, obs: int, state: int) -> None:
    battles = Battles([parse(name)], 2)
    n = len(parse(name).allies)
    assert battles.obs.shape == (2, n, obs)
    assert battles.state.shape == (2, state)
    assert battles.legal.shape == (2, n, 5 + n)


# Starts.


def test_fixed_maps_start_in_two_squares() -> None:
    size = 500
    battles = Battles([parse("1m_vs_1m")], size)  # nobody to be pushed by
    battles.reset(np.ones(size, bool), np.arange(size))
    offset = battles.floats[:, [X, Y]] - np.array([[8, 24], [16, 16]])
    assert -2 <= offset.min() < -1.95
    assert 1.95 < offset.max() <= 2
    np.testing.assert_allclose(offset.mean(0), 0, atol=4 * (4 / np.sqrt(12 * size)))
    assert abs(np.corrcoef(offset.reshape(size, 4).T) - np.eye(4)).max() < 4 / np.sqrt(size)


def test_units_start_whole_ready_and_apart() -> None:
    battles = Battles([parse("3s5z")], 8)
    battles.reset(np.ones(8, bool), np.arange(8))
    f, k = battles.floats, battles.ints
    np.testing.assert_array_equal(f[:, LIFE], f[:, HEALTH])
    assert not f[:, WAIT].any()
    assert (k[:, MOVE] == STOP).all()
    assert (k[:, [TARGET, MEMORY]] == -1).all()
    names = [TYPES[kind].name for kind in k[0, kernels.KIND]]
    assert names == (["stalker"] * 3 + ["zealot"] * 5) * 2
    np.testing.assert_allclose(f[0, COOLDOWN], ([1.87] * 3 + [0.86] * 5) * 2)


def test_smacv2_draws_types_and_places() -> None:
    size, n = 4000, 5
    battles = Battles([parse("smacv2_5_units")], size)
    battles.reset(np.ones(size, bool), np.arange(size))
    kinds, x, y = battles.ints[:, kernels.KIND], battles.floats[:, X], battles.floats[:, Y]
    np.testing.assert_array_equal(kinds[:, :n], kinds[:, n:])
    share = np.bincount(kinds[:, :n].ravel(), minlength=6) / (size * n)
    np.testing.assert_allclose(share, 1 / 6, atol=4 * np.sqrt(5 / 36 / (size * n)))
    assert x.min() >= 1
    assert x.max() <= 31
    centred = np.all((np.hypot(x - 16, y - 16) < 4.5).reshape(size, 2, n), axis=2)
    error = 4 * np.sqrt(0.25 / size)
    surrounded = np.any(centred, axis=1)
    assert surrounded.mean() == pytest.approx(0.5, abs=error)
    assert centred[surrounded, 0].mean() == pytest.approx(0.5, abs=1.5 * error)
    mirrored = np.isclose(x[:, :n], 32 - x[:, n:], atol=1.2) & np.isclose(y[:, :n], y[:, n:], atol=1.2)
    assert mirrored[~surrounded].mean() > 0.97  # pushes move a few
    outer = np.where(centred[surrounded, :1], x[surrounded, n:], x[surrounded, :n])
    assert outer.mean() == pytest.approx(16, abs=0.5)
    assert outer.std() > 6
