"""The places of scenes: which stuff lies where, and which things may stand, hang or fly there."""

from collections.abc import Callable
from functools import partial

import numpy as np

from collavo.scenes import stuff
from collavo.scenes.canvas import Canvas
from collavo.scenes.drawing import COLORS, Color, shade

_AIR = "flying bird, flying bird, kite, airplane"
_FOOD = "apple, orange, banana, carrot, pizza, donut, cake"
_PETS = "dog, cat, bird"
_GRASS = ((150, 190, 96), (96, 150, 66)), ((206, 186, 110), (168, 146, 74)), ((120, 170, 90), (76, 130, 62))
_PAVING = ((176, 172, 168), (200, 196, 192)), ((196, 184, 164), (214, 204, 186))
_SNOW = (((216, 226, 240), (244, 246, 250)),)
_CLOTHS = ((250, 248, 244), COLORS["red"]), ((113, 152, 213), COLORS["white"]), ((131, 187, 126), COLORS["yellow"])
_WOODS: tuple[Color, ...] = ((190, 136, 88), (150, 100, 66), (220, 186, 142), (120, 84, 62), (232, 224, 212))


def _wavy(canvas: Canvas, level: float, swell: float) -> np.ndarray:
    """Return a rolling line about `level`, a fraction of the height: y in pixels for each column."""
    across = np.arange(canvas.size_wh[0]) / canvas.unit
    # Arcs of parabolas instead of a sine, because their last bit is the same on any machine.
    phase = (across * canvas.dice.uniform(1.5, 4) + canvas.dice.uniform(0, 2)) % 2 - 1
    return level * canvas.size_wh[1] + swell * canvas.unit * 4 * phase * (1 - np.abs(phase))


def _trees(canvas: Canvas, kind: str, bases: tuple[float, float], count: int, spans: tuple[float, float]) -> None:
    for y in sorted(canvas.dice.uniform(*bases) for _ in range(count)):
        canvas.stand("tree", stuff.tree(canvas.dice, kind), canvas.dice.uniform(0, 1), y, canvas.dice.uniform(*spans))


def _town(canvas: Canvas, base: float, scale: float, density: float) -> None:
    """Put a row of houses; `scale` is short sides per 100 units of the drawing."""
    x = canvas.dice.uniform(-0.1, 0.05)
    while x < 1:
        house = stuff.building(canvas.dice, canvas.light)
        size = house.size_wh()
        wide = size[0] / 100 * scale * canvas.unit / canvas.size_wh[0]
        if canvas.dice.chance(density):
            canvas.stand("building", house, x + wide / 2, base, max(size) / 100 * scale)
        x += wide


def _range(canvas: Canvas, base: float, high: float, snowy: bool) -> None:
    tone = canvas.dice.pick(((112, 124, 150), (96, 130, 110), (140, 120, 116), (104, 110, 130)))
    wide = 1.3 * canvas.size_wh[0] / canvas.unit
    canvas.stand("mountain", stuff.mountains(canvas.dice, tone, 130 * high / wide, snowy), 0.5, base, wide)


def _fence(canvas: Canvas, y: float, high: float) -> None:
    wide = 1.1 * canvas.size_wh[0] / canvas.unit
    canvas.stand("fence", stuff.fence(canvas.dice, 24 * wide / high), 0.5, y, wide)


def _open_air(canvas: Canvas, horizon: float, peaks: float, towns: float, snowy: bool = False) -> None:
    """Paint the sky and the horizon: mountains or houses, with the given probabilities, or nothing."""
    stuff.sky(canvas, horizon)
    chance = canvas.dice.uniform(0, 1)
    if chance < peaks:
        _range(canvas, horizon + 0.02, canvas.dice.uniform(0.16, 0.36), snowy)
    elif chance < peaks + towns:
        _town(canvas, horizon + 0.02, canvas.dice.uniform(0.12, 0.2), 0.8)
    canvas.surface("sky", _AIR, (0.04, 0.06, 0.96, horizon * 0.6), 0.17, 0.14, hangs=True, weight=1)


def _country(
    canvas: Canvas, ground: str, colors: tuple[tuple[Color, Color], ...], trees: str, peaks: float, things: str
) -> None:
    dice, hz, snowy = canvas.dice, canvas.dice.uniform(0.34, 0.5), ground == "snow"
    _open_air(canvas, hz, peaks, 0.4 * (1 - peaks), snowy or dice.chance(0.3))
    stuff.ground(canvas, ground, _wavy(canvas, hz, 0.015), *dice.pick(colors), marks="" if snowy else "blades")
    if dice.chance(0.3):
        _town(canvas, hz + 0.06, 0.16, 0.3)
    _trees(canvas, dice.pick(trees.split()), (hz + 0.02, hz + 0.12), dice.integer(1, 6), (0.22, 0.46))
    if dice.chance(0.45):
        _fence(canvas, hz + 0.13, 0.09)
    path = not snowy and dice.chance(0.3)
    if path:
        stuff.ground(canvas, "pavement", _wavy(canvas, dice.uniform(0.8, 0.88), 0.02), *_PAVING[1], marks="dots")
        canvas.surface(
            "pavement", f"person, bicycle, bench, suitcase, {_PETS}", (0, 0.93, 1, 1.02), 0.3, 0.34, weight=1
        )
    canvas.surface(ground, things, (0, hz + 0.15, 1, 0.78 if path else 1.02), 0.16, 0.26 if path else 0.34)


def _shore(canvas: Canvas, land: str, things: str) -> None:
    dice, hz = canvas.dice, canvas.dice.uniform(0.28, 0.4)
    edge = dice.uniform(0.44, 0.58) if land == "sand" else dice.uniform(0.6, 0.74)
    _open_air(canvas, hz, 0.35, 0.1 if land == "sand" else 0.45)
    waters = (((60, 130, 186), (96, 184, 206)), ((40, 96, 150), (70, 150, 180)), ((90, 150, 170), (140, 200, 196)))
    stuff.ground(canvas, "sea", hz * canvas.size_wh[1], *dice.pick(waters), marks="waves")
    if land == "sand":
        sands = (((226, 204, 160), (242, 222, 172)), ((214, 186, 140), (232, 208, 164)))
        stuff.ground(canvas, "sand", _wavy(canvas, edge, 0.02), *dice.pick(sands), marks="dots")
        _trees(canvas, "palm", (edge + 0.02, edge + 0.12), dice.pick((0, 0, 1, 2)), (0.5, 0.64))
    else:
        stuff.ground(canvas, land, edge * canvas.size_wh[1], *dice.pick(_PAVING), marks="dots")
        if dice.chance(0.4):
            _fence(canvas, edge + 0.03, 0.1)
    canvas.surface("sea", "boat, boat, boat, surfboard", (0.04, hz + 0.06, 0.96, edge - 0.03), 0.1, 0.2, weight=2)
    canvas.surface(land, things, (0, edge + 0.1, 1, 1.02), 0.18, 0.34)


def _street(canvas: Canvas) -> None:
    (_, height), dice = canvas.size_wh, canvas.dice
    hz, bottom = dice.uniform(0.4, 0.5), dice.uniform(0.84, 1.0)
    top = hz + 0.12
    stuff.sky(canvas, hz)
    _town(canvas, hz, dice.uniform(0.3, 0.42), 0.9)
    _trees(canvas, "round", (hz, hz + 0.02), dice.integer(0, 3), (0.3, 0.42))
    stuff.ground(canvas, "pavement", hz * height, *_PAVING[0], marks="dots")
    if dice.chance(0.3):
        _fence(canvas, hz + 0.03, 0.08)
    tone = dice.pick(((92, 94, 102), (110, 108, 112), (78, 80, 90)))
    stuff.road(canvas, round(top * height), round(bottom * height), tone)
    if bottom < 0.97:
        near = f"person, person, fire hydrant, bench, suitcase, umbrella, {_PETS}"
        stuff.ground(canvas, "pavement", bottom * height, *_PAVING[0], marks="dots")
        canvas.surface("pavement", near, (0, bottom + 0.05, 1, 1.02), 0.3, 0.33, weight=2)
    far = "person, traffic light, traffic light, stop sign, stop sign, fire hydrant, bench, potted plant"
    canvas.surface("pavement", far, (0.02, hz + 0.05, 0.98, top - 0.005), 0.2, 0.22, weight=3)
    canvas.surface("road", "car, bus, truck, car, bus, bicycle", (0.02, top + 0.12, 0.98, bottom - 0.03), 0.2, 0.27)
    canvas.surface("sky", _AIR, (0.04, 0.06, 0.96, hz * 0.4), 0.15, 0.13, hangs=True, weight=1)


def _room(canvas: Canvas, walls: str, floor: float) -> None:
    """Paint a wall, often with a window and curtains, sometimes with room for a clock."""
    (width, height), dice, name = canvas.size_wh, canvas.dice, canvas.dice.pick(walls.split())
    bricks = ((176, 96, 76), (190, 128, 100), (206, 196, 186))
    paints = bricks if name == "wall-brick" else tuple(shade(color, 1.6) for color in COLORS.values())
    stuff.wall(canvas, name, dice.pick(paints))
    if dice.chance(0.65):
        x, span = dice.uniform(0.18, 0.82), min(0.42, floor * height / canvas.unit - 0.12)
        pane = canvas.stand("window", stuff.window(dice, canvas.light), x, floor - 0.09 * canvas.unit / height, span)
        w, h = pane.sprite.picture.size
        paint = dice.paint(dice.pick(tuple(COLORS)))
        for side in (-1, 1) if dice.chance(0.5) else ():
            edge = x + side * w * 0.56 / width
            canvas.stand("curtain", stuff.curtain(paint), edge, (pane.y + h * 1.1) / height, h * 1.25 / canvas.unit)
    if dice.chance(0.6):
        canvas.surface(name, "clock", (0.06, 0.12, 0.94, floor * 0.45), 0.36, 0.36, hangs=True, weight=1)


def _table(canvas: Canvas, walls: str, cloths: bool, things: str) -> None:
    dice, top = canvas.dice, canvas.dice.uniform(0.42, 0.54)
    _room(canvas, walls, top)
    paint, stripe = dice.pick(tuple((wood, None) for wood in _WOODS) + (_CLOTHS if cloths else ()))
    stuff.boards(canvas, "table", round(top * canvas.size_wh[1]), paint, stripe)
    canvas.surface("table", things, (0.02, top + 0.12, 0.98, 1.02), 0.5, 0.74, weight=8)


def _living_room(canvas: Canvas) -> None:
    (width, height), dice, floor = canvas.size_wh, canvas.dice, canvas.dice.uniform(0.54, 0.64)
    _room(canvas, "wall wall wall wall-brick", floor)
    stuff.boards(canvas, "floor-wood", round(floor * height), dice.pick(_WOODS[:4]))
    if dice.chance(0.6):
        rug = stuff.rug(dice.paint(dice.pick(tuple(COLORS))))
        canvas.stand("rug", rug, dice.uniform(0.3, 0.7), floor + (1 - floor) * 0.8, dice.uniform(0.6, 0.85))
    if dice.chance(0.6):
        table = canvas.stand("table", stuff.sideboard(dice), dice.uniform(0.2, 0.8), floor + 0.05, 0.62)
        left, right = table.x / width + 0.06, (table.x + table.sprite.picture.size[0]) / width - 0.06
        level = (table.y + 5) / height
        goods = "tv, tv, vase, book, laptop, potted plant, teddy bear, bottle, cup"
        canvas.surface("table", goods, (left, level, right, level), 0.36, 0.36, weight=2)
    canvas.surface("floor-wood", _HOME, (0.04, floor + 0.12, 0.96, 1.02), 0.34, 0.44, weight=6)


_HOME = f"couch, couch, couch, chair, potted plant, teddy bear, sports ball, book, suitcase, person, umbrella, {_PETS}"
_SNOWY = "person, person, dog, bird, suitcase, bench"
_PARK = f"person, person, bench, bicycle, sports ball, umbrella, teddy bear, chair, {_PETS}"
_FARM = "cow, sheep, cow, sheep, dog, person, bird, truck, bicycle, cat"
_BEACH = "person, person, umbrella, surfboard, sports ball, chair, dog, bird, bottle, suitcase"
_QUAY = f"person, person, bench, suitcase, bicycle, umbrella, car, chair, {_PETS}"
_MEAL = f"{_FOOD}, {_FOOD}, bowl, bowl, wine glass, wine glass, cup, cup, bottle, vase, vase"
_WORK = "laptop, laptop, tv, tv, cell phone, cell phone, scissors, scissors, book, cup, potted plant, bottle, vase"

PLACES: dict[str, Callable[[Canvas], None]] = {
    "park": partial(_country, ground="grass", colors=_GRASS, trees="round round conifer", peaks=0.3, things=_PARK),
    "farm": partial(_country, ground="grass", colors=_GRASS, trees="round", peaks=0.6, things=_FARM),
    "mountains": partial(_country, ground="snow", colors=_SNOW, trees="conifer", peaks=1, things=_SNOWY),
    "beach": partial(_shore, land="sand", things=_BEACH),
    "harbour": partial(_shore, land="pavement", things=_QUAY),
    "street": _street,
    "kitchen": partial(_table, walls="wall-tile wall-tile wall wall-brick", cloths=True, things=_MEAL),
    "office": partial(_table, walls="wall wall wall-brick", cloths=False, things=_WORK),
    "living room": _living_room,
}
"""All places by name; each function lays out the stuff and says where things may go."""

FREQUENT = (*PLACES, "street", "kitchen", "office")
"""The places to draw from; those with many kinds of things come twice as often."""

INDOORS = ("kitchen", "office", "living room")

ANYWHERE = "apple, teddy bear, sports ball, book, suitcase, bird, cat, umbrella, cup, bottle, banana, potted plant"
"""Things that turn up anywhere, so that a place does not give its things away."""
