"""A battle as a picture: shapes tell the types, colours the teams, bars the health, beams who is shooting whom."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtrl.types import Array
from mtrl_envs.smac.battle import Battles
from mtrl_envs.smac.kernels import HEALTH, KIND, LIFE, RADIUS, SHOTS, TARGET, X, Y
from mtrl_envs.smac.scenarios import HORIZON, TYPES

Colour = tuple[int, int, int]
Point = tuple[float, float]

PIXELS = 640
_FINE = 2  # drawn this many times larger, then shrunk: smooth edges
_MAP = 32.0
_CLOSEST, _MARGIN = 14.0, 3.0  # map units that the picture shows at least, and around the units
_ENLARGE = 1.15  # shapes are a little larger than the circles that collide, to be told apart

_GROUND: Colour = (22, 26, 35)
_GRID: Colour = (31, 37, 49)
_WALL: Colour = (122, 60, 66)
_SHADE: Colour = (12, 14, 20)
_TEXT: Colour = (214, 220, 232)
_FAINT: Colour = (124, 134, 152)
_WHITE: Colour = (255, 255, 255)
_GOOD: Colour = (96, 214, 128)
_FAIR: Colour = (255, 196, 72)
_POOR: Colour = (240, 84, 84)
TEAMS: tuple[Colour, Colour] = ((86, 170, 255), (255, 112, 94))
# Corners of the shape of each type and its turn in degrees; 0 corners: a disc.
_SHAPES = {
    "marine": (0, 0),
    "marauder": (4, 45),
    "stalker": (4, 0),
    "zealot": (6, 0),
    "zergling": (3, 90),
    "hydralisk": (5, 90),
}


class View(NamedTuple):
    """The square of the map that is shown: its left and upper edge in map units and fine pixels per map unit."""

    left: float
    top: float
    scale: float

    def __call__(self, x: float, y: float) -> Point:
        """Map units to fine pixels; the map's y axis points up."""
        return (x - self.left) * self.scale, (self.top - y) * self.scale


def view(battles: Battles, b: int) -> View:
    """Around all units, the fallen included, so that the picture moves only as they do."""
    x, y = battles.floats[b, X], battles.floats[b, Y]
    side = max(float(np.ptp(x)), float(np.ptp(y))) + 2 * _MARGIN
    side = min(max(side, _CLOSEST), _MAP)
    left, low = (
        min(max((float(axis.min()) + float(axis.max()) - side) / 2, 0.0), _MAP - side) for axis in (x, y)
    )  # inside the map
    return View(left, low + side, PIXELS * _FINE / side)


def draw(battles: Battles, b: int) -> Array:
    """Battle b as it stands, [640, 640, 3] uint8."""
    f, k, n_allies = battles.floats[b], battles.ints[b], battles.n_allies
    at, units = view(battles, b), range(f.shape[1])
    image = Image.new("RGB", (PIXELS * _FINE, PIXELS * _FINE), _GROUND)
    beams = Image.new("RGBA", image.size)
    glow, pen = ImageDraw.Draw(beams), ImageDraw.Draw(image)
    _ground(pen, at, battles.rules.walls_cause_death)
    places = [at(float(f[X, i]), float(f[Y, i])) for i in units]
    living = sorted((i for i in units if f[LIFE, i] > 0), key=lambda i: places[i][1])
    shooting = [i for i in units if k[SHOTS, i] > 0]
    radius = f[RADIUS] * _ENLARGE * at.scale
    for i in set(units) - set(living):
        _cross(pen, places[i], 0.28 * at.scale, _blend(TEAMS[i >= n_allies], _GROUND, 0.4))
    for i in shooting:
        _beam(glow, places[i], places[k[TARGET, i]], TEAMS[i >= n_allies])
    image.paste(beams, (0, 0), beams)
    for i in living:
        _unit(pen, places[i], float(radius[i]), TYPES[k[KIND, i]].name, TEAMS[i >= n_allies])
    for i in shooting:
        _spark(pen, places[k[TARGET, i]], 0.15 * at.scale, TEAMS[i >= n_allies])
    for i in living:
        _bar(pen, places[i], float(radius[i]), float(f[LIFE, i] / f[HEALTH, i]))
    _title(pen, battles, b)
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINE)


def _blend(over: Colour, under: Colour, share: float) -> Colour:
    mixed = [round(share * a + (1 - share) * b) for a, b in zip(over, under, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _ground(pen: ImageDraw.ImageDraw, at: View, walls: bool) -> None:
    for line in range(2, int(_MAP), 2):
        pen.line([at(line, 0), at(line, _MAP)], _GRID, _FINE)
        pen.line([at(0, line), at(_MAP, line)], _GRID, _FINE)
    edges = [at(0, 0), at(_MAP, 0), at(_MAP, _MAP), at(0, _MAP), at(0, 0)]
    pen.line(edges, _WALL if walls else _GRID, 8 * _FINE)


def _cross(pen: ImageDraw.ImageDraw, at: Point, reach: float, colour: Colour) -> None:
    x, y = at
    for side in (-reach, reach):
        pen.line([(x - side, y - reach), (x + side, y + reach)], colour, 2 * _FINE)


def _beam(pen: ImageDraw.ImageDraw, start: Point, end: Point, colour: Colour) -> None:
    for width, opacity in ((8, 46), (4, 90), (1.5, 255)):
        pen.line([start, end], (*colour, opacity), round(width * _FINE))


def _spark(pen: ImageDraw.ImageDraw, at: Point, r: float, colour: Colour) -> None:
    x, y = at
    pen.ellipse([x - r, y - r, x + r, y + r], _blend(colour, _WHITE, 0.25))


def _unit(pen: ImageDraw.ImageDraw, at: Point, radius: float, kind: str, colour: Colour) -> None:
    x, y = at
    corners, turn = _SHAPES[kind]
    rim, body = _blend(colour, _WHITE, 0.55), _blend(colour, _GROUND, 0.82)
    if corners == 0:
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], body, rim, 2 * _FINE)
        return
    angles = [math.radians(turn + 360 * corner / corners) for corner in range(corners)]
    shape = [(x + 1.12 * radius * math.cos(a), y - 1.12 * radius * math.sin(a)) for a in angles]
    pen.polygon(shape, body)
    pen.line([*shape, shape[0], shape[1]], rim, 2 * _FINE, joint="curve")


def _bar(pen: ImageDraw.ImageDraw, at: Point, radius: float, health: float) -> None:
    width, height = 1.7 * radius, 4 * _FINE
    left, top = at[0] - width / 2, at[1] - 1.1 * radius - 1.6 * height
    colour = _blend(_GOOD, _FAIR, 2 * health - 1) if health > 0.5 else _blend(_FAIR, _POOR, 2 * health)
    pen.rectangle([left - _FINE, top - _FINE, left + width + _FINE, top + height + _FINE], _SHADE)
    pen.rectangle([left, top, left + max(width * health, _FINE), top + height], colour)


def _title(pen: ImageDraw.ImageDraw, battles: Battles, b: int) -> None:
    """Along the top: how many of each team live and the share of health that is left to them; the step."""
    n, life, health = battles.n_allies, battles.floats[b, LIFE], battles.floats[b, HEALTH]
    top, height, middle = 16 * _FINE, 8 * _FINE, PIXELS * _FINE / 2
    for team, units in enumerate((slice(0, n), slice(n, None))):
        sign = 2 * team - 1
        near, far = middle + sign * 52 * _FINE, middle + sign * 262 * _FINE
        full = near + (far - near) * float(life[units].sum() / max(health[units].sum(), 1))
        for end, colour in ((far, _GRID), (full, TEAMS[team])):
            if abs(end - near) > height:
                pen.rounded_rectangle([min(near, end), top, max(near, end), top + height], height / 2, colour)
        label = f"{np.count_nonzero(life[units] > 0)} / {len(life[units])}"
        pen.text((far, top + 2.2 * height), label, TEAMS[team], _font(13), anchor="rm" if team else "lm")
    pen.text((middle, top + height / 2), f"{battles.clocks.step[b]}", _TEXT, _font(20), anchor="mm")
    pen.text((middle, top + 2.6 * height), f"of {HORIZON}", _FAINT, _font(11), anchor="mm")
