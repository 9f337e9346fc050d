"""A battle as a picture: shapes tell the types, colours the teams, bars the health, beams who is shooting whom."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtrl.types import Array
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.kernels import HEALTH, KIND, LIFE, RADIUS, SHOTS, TARGET, X, Y
from mtrl_envs.smac.scenarios import HORIZON, TYPES

Colour = tuple[int, int, int]

_PIXELS = 640
_FINE = 2  # drawn this many times larger, then shrunk: smooth edges
_SCALE = _PIXELS * _FINE / 32  # fine pixels per map unit
_ENLARGE = 1.15  # shapes are a little larger than the circles that collide, to be told apart

_GROUND: Colour = (22, 26, 35)
_GRID: Colour = (31, 37, 49)
_WALL: Colour = (96, 52, 58)
_TEXT: Colour = (214, 220, 232)
_FAINT: Colour = (124, 134, 152)
_GOOD: Colour = (96, 214, 128)
_FAIR: Colour = (255, 196, 72)
_POOR: Colour = (240, 84, 84)
_TEAMS: tuple[Colour, Colour] = ((86, 170, 255), (255, 112, 94))
# Corners of the shape of each type and its turn in degrees; 0 corners: a disc.
_SHAPES = {"marine": (0, 0), "marauder": (4, 45), "stalker": (4, 0), "zealot": (6, 0), "zergling": (3, 90),
           "hydralisk": (5, 90)}  # fmt: skip


def draw(battles: Battles, b: int) -> Array:
    """Battle b as it stands, [640, 640, 3] uint8. The map's y axis points up."""
    f, k, n_allies = battles.floats[b], battles.ints[b], battles.n_allies
    image = _ground(battles.rules.walls_cause_death).copy()
    beams = Image.new("RGBA", image.size)
    glow, pen = ImageDraw.Draw(beams), ImageDraw.Draw(image)
    units = range(f.shape[1])
    places = [(float(f[X, i]) * _SCALE, _PIXELS * _FINE - float(f[Y, i]) * _SCALE) for i in units]
    alive = [bool(f[LIFE, i] > 0) for i in units]
    for i in units:
        if not alive[i]:
            _cross(pen, places[i], _blend(_TEAMS[i >= n_allies], _GROUND, 0.35))
    for i in units:
        if k[SHOTS, i] > 0:
            _beam(glow, places[i], places[k[TARGET, i]], _TEAMS[i >= n_allies])
    image.paste(beams, (0, 0), beams)
    living = sorted((i for i in units if alive[i]), key=lambda i: places[i][1])
    radius = f[RADIUS] * _ENLARGE * _SCALE
    for i in living:
        _unit(pen, places[i], float(radius[i]), TYPES[k[KIND, i]].name, _TEAMS[i >= n_allies])
    for i in units:
        if k[SHOTS, i] > 0 and alive[k[TARGET, i]]:
            _spark(pen, places[k[TARGET, i]], _TEAMS[i >= n_allies])
    for i in living:
        _bar(pen, places[i], float(radius[i]), float(f[LIFE, i] / f[HEALTH, i]))
    _title(pen, battles, b, alive)
    return np.asarray(image.resize((_PIXELS, _PIXELS), Image.Resampling.LANCZOS))


@cache
def _ground(walls: bool) -> Image.Image:
    size = _PIXELS * _FINE
    image = Image.new("RGB", (size, size), _GROUND)
    pen = ImageDraw.Draw(image)
    for line in range(4, 32, 4):
        at = round(line * _SCALE)
        pen.line([(at, 0), (at, size)], _GRID, _FINE)
        pen.line([(0, at), (size, at)], _GRID, _FINE)
    pen.rectangle([0, 0, size - 1, size - 1], outline=_WALL if walls else _GRID, width=3 * _FINE)
    return image


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINE)


def _blend(over: Colour, under: Colour, share: float) -> Colour:
    mixed = [round(share * a + (1 - share) * b) for a, b in zip(over, under, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _cross(pen: ImageDraw.ImageDraw, at: tuple[float, float], colour: Colour) -> None:
    x, y = at
    reach = 0.28 * _SCALE
    for side in (-reach, reach):
        pen.line([(x - side, y - reach), (x + side, y + reach)], colour, 2 * _FINE)


def _beam(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: Colour) -> None:
    for width, opacity in ((7, 46), (4, 90), (1.5, 255)):
        pen.line([start, end], (*colour, opacity), round(width * _FINE))


def _spark(pen: ImageDraw.ImageDraw, at: tuple[float, float], colour: Colour) -> None:
    (x, y), r = at, 0.17 * _SCALE
    pen.ellipse([x - r, y - r, x + r, y + r], _blend(colour, (255, 255, 255), 0.25))


def _unit(pen: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, kind: str, colour: Colour) -> None:
    x, y = at
    corners, turn = _SHAPES[kind]
    rim, body = _blend(colour, (255, 255, 255), 0.55), _blend(colour, _GROUND, 0.82)
    if corners == 0:
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], body, rim, 2 * _FINE)
        return
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    shape = [(x + 1.12 * radius * math.cos(a), y - 1.12 * radius * math.sin(a)) for a in angles]
    pen.polygon(shape, body)
    pen.line([*shape, shape[0], shape[1]], rim, 2 * _FINE, joint="curve")


def _bar(pen: ImageDraw.ImageDraw, at: tuple[float, float], radius: float, health: float) -> None:
    width, height = 2 * radius, 3 * _FINE
    left, top = at[0] - width / 2, at[1] - 1.12 * radius - 2 * height
    colour = _blend(_GOOD, _FAIR, 2 * health - 1) if health > 0.5 else _blend(_FAIR, _POOR, 2 * health)
    pen.rectangle([left - _FINE, top - _FINE, left + width + _FINE, top + height + _FINE], (10, 12, 17))
    pen.rectangle([left, top, left + max(width * health, _FINE), top + height], colour)


def _title(pen: ImageDraw.ImageDraw, battles: Battles, b: int, alive: list[bool]) -> None:
    """Along the top: how many of each team live and the share of health that is left to them; the step."""
    size, n = _PIXELS * _FINE, battles.n_allies
    share = battles.floats[b, LIFE] / np.maximum(battles.floats[b, HEALTH], 1)
    top, height, middle = 16 * _FINE, 8 * _FINE, size / 2
    for team, units in enumerate((slice(0, n), slice(n, None))):
        sign = 2 * team - 1
        near, far = middle + sign * 52 * _FINE, middle + sign * 262 * _FINE
        full = near + (far - near) * float(share[units].mean())
        for end, colour in ((far, _GRID), (full, _TEAMS[team])):
            if abs(end - near) > height:
                box = [min(near, end), top, max(near, end), top + height]
                pen.rounded_rectangle(box, height / 2, colour)
        label = f"{sum(alive[units])} / {len(alive[units])}"
        pen.text((far, top + 2.2 * height), label, _TEAMS[team], _font(13), anchor="rm" if team else "lm")
    pen.text((middle, top + height / 2), f"{battles.clocks.step[b]}", _TEXT, _font(20), anchor="mm")
    pen.text((middle, top + 2.6 * height), f"of {HORIZON}", _FAINT, _font(11), anchor="mm")
