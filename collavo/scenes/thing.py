"""What a kind of thing is: its size in the world, the colours it comes in, and the function that draws it."""

from collections.abc import Callable
from dataclasses import dataclass

from collavo.scenes.drawing import Color, Dice, Drawing
from schemas.categories import COCO_PANOPTIC, Category

Draw = Callable[[Drawing, Color, Dice], str | None]
"""Draws one thing in a colour, y downwards, and returns the name of a second colour if it plainly has two."""

ANY = "red orange yellow green blue purple pink brown black white grey"


@dataclass(frozen=True, slots=True)
class Thing:
    """A kind of thing.

    `span_m` is its longer side in metres. `part` names what has the colour ("shirt"), or is empty for all of it. It may
    lean by up to `turn_deg`. `seat` is where another thing may sit: left, right and height, in fractions of its box.
    """

    category: Category
    span_m: float
    colors: tuple[str, ...]
    part: str
    turn_deg: float
    flips: bool
    seat: tuple[float, float, float] | None
    draw: Draw


DRAWABLE: dict[str, Thing] = {}
"""All kinds of things that can be drawn, by name; the modules of drawings fill it."""


def thing(
    name: str,
    span_m: float,
    colors: str = "",
    part: str = "",
    turn_deg: float = 0,
    flips: bool = True,
    seat: tuple[float, float, float] | None = None,
    category: str = "",
) -> Callable[[Draw], Draw]:
    """Register a drawing under a name, which is also its category's unless `category` is given."""

    def register(draw: Draw) -> Draw:
        kind = COCO_PANOPTIC.by_display_name[category or name]
        DRAWABLE[name] = Thing(kind, span_m, tuple(colors.split()), part, turn_deg, flips, seat, draw)
        return draw

    return register
