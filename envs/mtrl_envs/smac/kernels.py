"""The rules of a battle, compiled by numba: one battle after the other, one unit after the other.

The rules are those of SMAX 0.2.0 (Rutherford et al. 2023, https://arxiv.org/abs/2311.10090), written afresh;
``docs/battles.md`` states them and lists every difference. Arithmetic is float32 in a fixed order without contraction
or reassociation, so that a battle gives the same bits whatever else is in the batch.

Compiled code is cached where numba's ``cache=True`` puts it: ``__pycache__`` beside this file, or the user's cache
folder if that is read-only (``NUMBA_CACHE_DIR`` overrides). Numba sees that the code is stale by *this file's* content,
so the kernels call nothing and read no constant from elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from mtrl.types import Array, Outcome

NUM_TYPES = 6
UP, RIGHT, DOWN, LEFT, STOP = range(5)
ATTACK = 5  # the first attack action
UNIT_FEATURES, OWN_FEATURES, STATE_FEATURES = 7 + NUM_TYPES, 4 + NUM_TYPES, 5 + NUM_TYPES  # widths, the last per unit
TICKS = 8

_DT = np.float32(1 / 16)
_SIZE, _HALF, _QUARTER = np.float32(32), np.float32(16), np.float32(8)
_ZERO, _ONE = np.float32(0), np.float32(1)
_SPREAD = np.float32(4)  # starts are this wide in both axes
_TINY = np.float32(1e-6)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_START, _NOISE, _WALK, _AIM = range(4)  # streams of random numbers

# Two packed arrays, since numba takes several times longer to compile a dozen.
# Rows of ``f`` [13, U] float32, the numbers of one battle's units, allies first. LIFE is the health left (a unit lives
# while it is positive), WAIT the cooldown left (seconds), HOME where the unit started; then what its type can do.
X, Y, LIFE, WAIT, HOME_X, HOME_Y, VELOCITY, DAMAGE, RANGE, SIGHT, RADIUS, HEALTH, COOLDOWN = range(13)
# Rows of ``k`` [5, U] int16: type; of the last step the move (0-3, else 4), the unit attacked (else -1) and the hits
# landed; the last target that the scripted policy remembers (else -1).
KIND, MOVE, TARGET, SHOTS, MEMORY = range(5)
F_ROWS, K_ROWS = 13, 5


class Clocks(NamedTuple):
    """Of B battles, arrays [B]: ``key`` uint64 (the mixed seed), ``step`` int64, ``over`` bool (ended, or never
    started), ``illegal`` int64 (actions refused so far)."""

    key: Array
    step: Array
    over: Array
    illegal: Array


def _entry(function: Any) -> Any:
    """Compile a kernel that Python calls; those that only kernels call become part of it."""
    return numba.njit(function, cache=True, nogil=True)


@numba.njit
def mix(z: Any) -> Any:
    """The finaliser of splitmix64 (Steele et al. 2014): uint64 -> uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit
def uniform(key: Any, step: int, stream: int, index: int) -> Any:
    """The float32 in [0, 1) that belongs to (key, step, stream, index): no generator, hence no state to keep."""
    counter = np.uint64(((step << 2 | stream) << 16) + index + 1)
    return np.float32(mix(key + counter * _GOLDEN) >> np.uint64(40)) * np.float32(2**-24)


@numba.njit
def distance(f: Array, i: int, j: int) -> float:
    """Between the centres of units i and j."""
    dx, dy = f[X, j] - f[X, i], f[Y, j] - f[Y, i]
    return math.sqrt(dx * dx + dy * dy)


@numba.njit
def push_apart(f: Array, push: Array) -> None:
    """Living units that overlap move apart, all at once: each by half the overlap, along the line of their centres.
    ``push`` [2, U] float32 is scratch."""
    n = f.shape[1]
    for i in range(n):
        push[0, i] = push[1, i] = _ZERO
    for i in range(n):
        if f[LIFE, i] <= _ZERO:
            continue
        radius = f[RADIUS, i]
        for j in range(i + 1, n):
            reach = radius + f[RADIUS, j]
            dx, dy = f[X, i] - f[X, j], f[Y, i] - f[Y, j]
            square = dx * dx + dy * dy
            if square >= reach * reach or f[LIFE, j] <= _ZERO:
                continue
            overlap = max(reach / (math.sqrt(square) + _TINY) - _ONE, _ZERO)
            push[0, i] += dx * overlap
            push[0, j] -= dx * overlap
            push[1, i] += dy * overlap
            push[1, j] -= dy * overlap
    for i in range(n):
        f[X, i] += push[0, i] / np.float32(2)
        f[Y, i] += push[1, i] / np.float32(2)


@numba.njit
def _place(f: Array, key: Any, n_allies: int) -> None:
    """Where the units of a fixed map start: in a square of 4 x 4 around (8, 16) or (24, 16)."""
    for i in range(f.shape[1]):
        centre = _QUARTER if i < n_allies else _SIZE - _QUARTER
        f[X, i] = centre + _SPREAD * (uniform(key, 0, _START, 4 * i) - np.float32(0.5))
        f[Y, i] = _HALF + _SPREAD * (uniform(key, 0, _START, 4 * i + 1) - np.float32(0.5))


@numba.njit
def _place_randomly(f: Array, key: Any, n_allies: int) -> None:
    """SMACv2's starts: teams mirrored, or one team in the centre and the other around it in up to four groups."""
    n = f.shape[1]
    coins = 4 * n
    if uniform(key, 0, _START, coins) < np.float32(0.5):
        for i in range(n):
            twin = i - n_allies
            if 0 <= twin < n_allies:
                f[X, i], f[Y, i] = _SIZE - f[X, twin], f[Y, twin]
            else:
                f[X, i] = _HALF * uniform(key, 0, _START, 4 * i) + (_ZERO if i < n_allies else _HALF)
                f[Y, i] = _SIZE * uniform(key, 0, _START, 4 * i + 1)
        return
    allies_inside = uniform(key, 0, _START, coins + 1) < np.float32(0.5)
    for i in range(n):
        f[X, i], f[Y, i] = _HALF, _HALF
        if (i < n_allies) != allies_inside:
            group = int(4 * uniform(key, 0, _START, 4 * i + 3))
            outwards = _HALF * (_ONE - uniform(key, 0, _START, coins + 2 + group))
            f[X, i] += outwards if group & 1 else -outwards
            f[Y, i] += outwards if group & 2 else -outwards
        f[X, i] += _SPREAD * (uniform(key, 0, _START, 4 * i) - np.float32(0.5))
        f[Y, i] += _SPREAD * (uniform(key, 0, _START, 4 * i + 1) - np.float32(0.5))


@_entry
def reset(
    floats: Array,
    ints: Array,
    clocks: Clocks,
    stats: Array,
    n_allies: int,
    kinds: Array,
    drawn: Array,
    mask: Array,
    seeds: Array,
) -> None:
    """Start the battles in ``mask`` [B] with ``seeds`` [B] uint64. ``kinds`` [B, U] int16 are their types unless
    ``drawn`` [B], which draws types and places. ``stats`` [6, 7] float32 is the table of types."""
    n = floats.shape[2]
    push = np.empty((2, n), np.float32)
    for b in range(len(mask)):
        if not mask[b]:
            continue
        f, k, key = floats[b], ints[b], mix(seeds[b] + _GOLDEN)
        clocks.key[b], clocks.step[b], clocks.over[b], clocks.illegal[b] = key, 0, False, 0
        for i in range(n):
            k[KIND, i] = kinds[b, i]
            if drawn[b]:
                mirrored = n_allies <= i < 2 * n_allies
                k[KIND, i] = k[KIND, i - n_allies] if mirrored else int(NUM_TYPES * uniform(key, 0, _START, 4 * i + 2))
            for column in range(stats.shape[1]):
                f[VELOCITY + column, i] = stats[k[KIND, i], column]
            f[LIFE, i], f[WAIT, i] = f[HEALTH, i], _ZERO
            k[MOVE, i], k[TARGET, i], k[SHOTS, i], k[MEMORY, i] = STOP, -1, 0, -1
        if drawn[b]:
            _place_randomly(f, key, n_allies)
        else:
            _place(f, key, n_allies)
        push_apart(f, push)
        for i in range(n):
            f[X, i] = min(max(f[X, i], _ONE), _SIZE - _ONE)
            f[Y, i] = min(max(f[Y, i], _ONE), _SIZE - _ONE)
            f[HOME_X, i], f[HOME_Y, i] = f[X, i], f[Y, i]


@numba.njit
def script(f: Array, k: Array, i: int, key: Any, step: int, n_allies: int, shoots: bool, random_target: bool) -> int:
    """What the scripted policy makes unit i do: 0-3 move, 5 + j attack unit j of the battle. Updates its memory.

    It keeps its last target while that is in range, else takes the closest (or a random) one; without any in range it
    walks towards a visible opponent drawn anew at every step, or towards the point opposite to where it started.
    """
    first, last = (n_allies, f.shape[1]) if i < n_allies else (0, n_allies)
    reach, sight = f[RANGE, i], f[SIGHT, i]
    visible, in_range, nearest = 0, 0, -1
    shortest, keep = _SIZE * _SIZE, False
    for j in range(first, last):
        gap = distance(f, i, j)
        if f[LIFE, j] <= _ZERO or gap >= sight:
            continue
        visible += 1
        if gap < reach:
            in_range += 1
            keep = keep or j == k[MEMORY, i]
            if gap < shortest:
                shortest, nearest = gap, j
    if in_range == 0:
        k[MEMORY, i] = -1
    elif not keep:
        if random_target:
            nearest = _pick(f, i, first, last, reach, int(in_range * float(uniform(key, step, _AIM, i))))
        k[MEMORY, i] = nearest
    if in_range > 0 and shoots:
        return ATTACK + k[MEMORY, i]
    if visible > 0:
        j = _pick(f, i, first, last, sight, int(visible * float(uniform(key, step, _WALK, i))))
        dx, dy = f[X, j] - f[X, i], f[Y, j] - f[Y, i]
    else:
        dx, dy = _SIZE - f[HOME_X, i] - f[X, i], _SIZE - f[HOME_Y, i] - f[Y, i]
    best = max(abs(dx), abs(dy))
    if dy == best:
        return UP
    if dx == best:
        return RIGHT
    return DOWN if -dy == best else LEFT


@numba.njit
def _pick(f: Array, i: int, first: int, last: int, reach: float, skip: int) -> int:
    """The living unit number ``skip`` of [first, last) that is nearer to i than ``reach``."""
    for j in range(first, last):
        if f[LIFE, j] > _ZERO and distance(f, i, j) < reach:
            if skip == 0:
                return j
            skip -= 1
    return -1


@numba.njit
def is_legal(f: Array, i: int, action: int, n_allies: int) -> bool:
    """Whether ally i may take ``action`` now."""
    if action == STOP:
        return True
    if action < 0 or action >= ATTACK + f.shape[1] - n_allies or f[LIFE, i] <= _ZERO:
        return False
    if action < STOP:
        return True
    target = n_allies + action - ATTACK
    return f[LIFE, target] > _ZERO and distance(f, i, target) < f[RANGE, i]


@numba.njit
def fight(f: Array, k: Array, noise: Array, walls: bool, damage: Array, push: Array) -> None:
    """The 8 ticks of a step, with MOVE and TARGET fixed; ``noise`` [8, U] (seconds) is added to the cooldown of a shot
    at its tick. ``damage`` [U] and ``push`` [2, U] float32 are scratch."""
    n = f.shape[1]
    for i in range(n):
        k[SHOTS, i] = 0
    for tick in range(TICKS):
        for i in range(n):
            damage[i] = _ZERO
        for i in range(n):  # shots are judged before anything moves, so that two units can kill each other
            j = k[TARGET, i]
            hit = (
                j >= 0
                and f[WAIT, i] <= _ZERO
                and f[LIFE, i] > _ZERO
                and f[LIFE, j] > _ZERO
                and distance(f, i, j) < f[RANGE, i]
            )
            if hit:
                damage[j] += f[DAMAGE, i]
                k[SHOTS, i] += 1
                f[WAIT, i] = f[COOLDOWN, i] + noise[tick, i]
            else:
                f[WAIT, i] -= _DT
        for i in range(n):
            if f[LIFE, i] <= _ZERO:
                continue
            way = f[VELOCITY, i] * _DT
            if k[MOVE, i] == UP:
                f[Y, i] += way
            elif k[MOVE, i] == RIGHT:
                f[X, i] += way
            elif k[MOVE, i] == DOWN:
                f[Y, i] -= way
            elif k[MOVE, i] == LEFT:
                f[X, i] -= way
            f[X, i] = min(max(f[X, i], _ZERO), _SIZE)
            f[Y, i] = min(max(f[Y, i], _ZERO), _SIZE)
            f[LIFE, i] = max(f[LIFE, i] - damage[i], _ZERO)
            if walls and (f[X, i] <= _ZERO or f[X, i] >= _SIZE or f[Y, i] <= _ZERO or f[Y, i] >= _SIZE):
                f[LIFE, i] = _ZERO
        push_apart(f, push)


@_entry
def step(
    floats: Array,
    ints: Array,
    clocks: Clocks,
    outcome: Outcome,
    rules: Any,
    n_allies: int,
    limit: int,
    actions: Array,
    mask: Array,
) -> None:
    """One step of the battles in ``mask`` [B] that are not over; the others stand still. ``actions`` [B, n_allies] are
    int64. Battles are truncated after ``limit`` steps."""
    n = floats.shape[2]
    n_enemies = n - n_allies
    noise, before = np.empty((TICKS, n), np.float32), np.empty(n, np.float32)
    damage, push = np.empty(n, np.float32), np.empty((2, n), np.float32)
    for b in range(len(mask)):
        outcome.reward[b], outcome.success[b] = 0.0, False
        outcome.terminated[b] = outcome.truncated[b] = False
        if clocks.over[b] or not mask[b]:
            continue
        f, k, key, time = floats[b], ints[b], clocks.key[b], clocks.step[b]
        for i in range(n):
            before[i] = f[LIFE, i]
            if i < n_allies:
                action = actions[b, i]
                if not is_legal(f, i, action, n_allies):
                    action = STOP
                    clocks.illegal[b] += 1
                code = action + (n_allies if action >= ATTACK else 0)
            elif f[LIFE, i] <= _ZERO:
                code = STOP
            else:
                code = script(f, k, i, key, time, n_allies, rules.enemy_shoots, rules.enemy_random_target)
            k[MOVE, i] = min(code, STOP)
            k[TARGET, i] = code - ATTACK if code >= ATTACK else -1
            for tick in range(TICKS):
                noise[tick, i] = _DT * (np.float32(3) * uniform(key, time, _NOISE, tick * n + i) - _ONE)
        fight(f, k, noise, rules.walls_cause_death, damage, push)
        allies_left, enemies_left, lost = 0, 0, 0.0
        for i in range(n_allies):
            allies_left += f[LIFE, i] > _ZERO
        for i in range(n_allies, n):
            enemies_left += f[LIFE, i] > _ZERO
            lost += float(before[i] - f[LIFE, i]) / float(f[HEALTH, i])
        clocks.step[b] = time + 1
        outcome.success[b] = enemies_left == 0 and allies_left > 0
        outcome.reward[b] = lost / n_enemies + (1.0 if outcome.success[b] else 0.0)
        outcome.terminated[b] = enemies_left == 0 or allies_left == 0
        outcome.truncated[b] = not outcome.terminated[b] and time + 1 >= limit
        clocks.over[b] = outcome.terminated[b] or outcome.truncated[b]


@_entry
def script_allies(floats: Array, ints: Array, clocks: Clocks, n_allies: int, actions: Array) -> None:
    """Write the scripted policy's ``actions`` [B, n_allies] for the allies; the dead stop."""
    for b in range(len(actions)):
        f, k = floats[b], ints[b]
        for i in range(n_allies):
            if f[LIFE, i] <= _ZERO:
                actions[b, i] = STOP
            else:
                code = script(f, k, i, clocks.key[b], clocks.step[b], n_allies, True, False)
                actions[b, i] = code - (n_allies if code >= ATTACK else 0)


@_entry
def observe(
    floats: Array,
    ints: Array,
    n_allies: int,
    see_enemy_actions: bool,
    mask: Array,
    obs: Array,
    state: Array,
    legal: Array,
) -> None:
    """Write ``obs`` [B, n_allies, D], ``state`` [B, S] float32, ``legal`` [B, n_allies, A] bool where ``mask`` [B]."""
    n = floats.shape[2]
    for b in range(len(mask)):
        if not mask[b]:
            continue
        f, k, whole = floats[b], ints[b], state[b]
        for i in range(n):
            _own_features(f, k, i, whole, i * OWN_FEATURES)
            whole[n * OWN_FEATURES + i] = _ONE if i >= n_allies else _ZERO  # the bit of its team
        for i in range(n_allies):
            row, sight = obs[b, i], f[SIGHT, i]
            for action in range(legal.shape[2]):
                legal[b, i, action] = is_legal(f, i, action, n_allies)
            for j in range(n):
                if j == i:
                    continue
                at = (j if j < i else j - 1) * UNIT_FEATURES
                for column in range(at, at + UNIT_FEATURES):
                    row[column] = _ZERO
                if f[LIFE, i] <= _ZERO or f[LIFE, j] <= _ZERO or distance(f, i, j) >= sight:
                    continue
                row[at] = f[LIFE, j] / f[HEALTH, j]
                row[at + 1] = (f[X, j] - f[X, i]) / sight
                row[at + 2] = (f[Y, j] - f[Y, i]) / sight
                if j < n_allies or see_enemy_actions:
                    row[at + 3] = (k[MOVE, j] == RIGHT) - (k[MOVE, j] == LEFT)
                    row[at + 4] = (k[MOVE, j] == UP) - (k[MOVE, j] == DOWN)
                    row[at + 5] = _attack_feature(k[TARGET, j], j, n_allies, n - n_allies)
                row[at + 6] = min(max(f[WAIT, j] / f[COOLDOWN, j], _ZERO), _ONE)
                row[at + 7 + k[KIND, j]] = _ONE
            _own_features(f, k, i, row, (n - 1) * UNIT_FEATURES)


@numba.njit
def _own_features(f: Array, k: Array, i: int, out: Array, at: int) -> None:
    """Write 10 numbers of unit i: health, place, cooldown, type; in 0..1 while it is on the map, zeros when dead."""
    for column in range(at, at + OWN_FEATURES):
        out[column] = _ZERO
    if f[LIFE, i] > _ZERO:
        out[at] = f[LIFE, i] / f[HEALTH, i]
        out[at + 1] = f[X, i] / _SIZE
        out[at + 2] = f[Y, i] / _SIZE
        out[at + 3] = min(max(f[WAIT, i] / f[COOLDOWN, i], _ZERO), _ONE)
        out[at + 4 + k[KIND, i]] = _ONE


@numba.njit
def _attack_feature(target: int, j: int, n_allies: int, n_enemies: int) -> Any:
    """The last attack action of unit j over its team's largest action; enemies number the allies from the last one."""
    if target < 0:
        return _ZERO
    if j < n_allies:
        return np.float32(ATTACK + target - n_allies) / np.float32(ATTACK + n_enemies - 1)
    return np.float32(ATTACK + n_allies - 1 - target) / np.float32(ATTACK + n_allies - 1)
