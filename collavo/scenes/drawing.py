"""Vector drawings, and the pictures of them with exact coverage.

A `Drawing` is a list of polygons and strokes in units of its own, y downwards. `rasterize` turns it, at any size and
angle, into a `Sprite`: a picture with soft shading, and a mask of the pixels that are at least half covered. All chance
comes from `Dice` and all pixels from integer arithmetic, so a seed gives the same bytes on every machine.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Color = tuple[int, ...]
"""RGB; in a drawing also RGBA, where A is the opacity."""

Points = str | Sequence[Sequence[float]] | np.ndarray
"""Vertices: "0,0 10,5 ..." or pairs of numbers."""

T = TypeVar("T")

COLORS: dict[str, Color] = {
    "red": (204, 46, 44),
    "orange": (240, 132, 34),
    "yellow": (248, 208, 62),
    "green": (78, 158, 72),
    "blue": (52, 108, 196),
    "purple": (126, 76, 164),
    "pink": (242, 146, 180),
    "brown": (132, 86, 52),
    "black": (50, 48, 54),
    "white": (244, 242, 236),
    "grey": (150, 152, 158),
}
"""The eleven basic colour words of English, as they look at noon."""

DARK, LIGHT, STEEL, WOOD = (48, 46, 54), (244, 242, 238), (186, 190, 198), (150, 100, 60)

_HOLE: Color = (0, 0, 0, 0)
_ONCE = "0,0"


class Dice:
    """Chance from a seed, the same on any machine: uses only the generator's exact `random` and `bytes`."""

    def __init__(self, *seed: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self._generator.random())

    def chance(self, probability: float) -> bool:
        return float(self._generator.random()) < probability

    def integer(self, low: int, high: int) -> int:
        """Return a number from `low` to `high`, both included."""
        return low + int((high + 1 - low) * float(self._generator.random()))

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return [options[i] for i in np.argsort(self._generator.random(len(options)), kind="stable")]

    def grain(self, height: int, width: int) -> np.ndarray:
        """Return independent bytes: uint8 [height, width]."""
        return np.frombuffer(self._generator.bytes(height * width), np.uint8).reshape(height, width)

    def paint(self, name: str) -> Color:
        """Return a shade of the named colour, so that no two reds are alike."""
        gain = self.uniform(0.88, 1.08)
        return tuple(max(0, min(255, int(c * gain + self.uniform(-7, 7)))) for c in COLORS[name])


def shade(color: Color, gain: float) -> Color:
    """Darken a colour (gain below 1), or lighten it towards white (above 1)."""
    lit = (int(c * gain if gain <= 1 else c + (255 - c) * (gain - 1)) for c in color[:3])
    return (*lit, *color[3:])


def contrast(paint: Color, dice: Dice, names: str) -> tuple[str, Color]:
    """Pick one of the named colours that stands out from `paint`: its name and its value."""
    far = [name for name in names.split() if sum(abs(a - b) for a, b in zip(COLORS[name], paint, strict=True)) > 140]
    name = dice.pick(far)
    return name, COLORS[name]


@lru_cache(maxsize=4096)
def _parsed(text: str) -> np.ndarray:
    return np.array([[float(number) for number in pair.split(",")] for pair in text.split()])


def _vertices(points: Points) -> np.ndarray:
    return _parsed(points) if isinstance(points, str) else np.asarray(points, np.float64)


@lru_cache(maxsize=64)
def _arc(start_deg: float, end_deg: float) -> np.ndarray:
    whole = end_deg - start_deg >= 360
    turn = np.radians(
        np.linspace(start_deg, end_deg, max(6, math.ceil((end_deg - start_deg) / 11)), endpoint=not whole)
    )
    return np.stack([np.cos(turn), np.sin(turn)], 1)


def oval_points(x: float, y: float, rx: float, ry: float, start_deg: float = 0, end_deg: float = 360) -> np.ndarray:
    """Return points of an ellipse or an arc of it, clockwise from the right: float64 [n, 2]."""
    return _arc(start_deg, end_deg) * (rx, ry) + (x, y)


def spread_points(count: int, radius: float = 1, start_deg: float = -90) -> np.ndarray:
    """Return `count` points at equal distances on a circle about the origin: float64 [count, 2]."""
    turn = np.radians(start_deg + 360 / count * np.arange(count))
    return np.stack([np.cos(turn), np.sin(turn)], 1) * radius


_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None]
_CATMULL_ROM = (
    0.5
    * np.concatenate([_STEPS**0, _STEPS, _STEPS**2, _STEPS**3], 1)
    @ np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]])
)


@lru_cache(maxsize=256)
def _neighbours(count: int, closed: bool) -> np.ndarray:
    """Return the four points that shape each piece of a curve: int64 [pieces, 4]."""
    first = np.arange(count if closed else count - 1)[:, None] + np.arange(-1, 3)
    return first % count if closed else np.clip(first, 0, count - 1)


def _curve(points: Points, closed: bool) -> np.ndarray:
    """Return a smooth curve through the points (Catmull-Rom)."""
    p = _vertices(points)
    curve = (_CATMULL_ROM @ p[_neighbours(len(p), closed)]).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def _turn(angle_deg: float) -> np.ndarray:
    c, s = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    return np.array([[c, s], [-s, c]])


@dataclass(frozen=True, slots=True)
class _Shape:
    kind: Literal["fill", "stroke", "clip", "unclip"]
    points: np.ndarray
    fill: Color = _HOLE
    width: float = 0
    edge: bool = False


@dataclass
class Drawing:
    """Shapes in painting order.

    `edge` draws a thin dark outline. `at` lists shifts: the shape is drawn once at each of them. A fill of None cuts a
    hole. `style` is `edge` and `at`, as `poly` takes them.
    """

    shapes: list[_Shape] = field(default_factory=list)

    def poly(self, points: Points, fill: Color | None, edge: bool = True, at: Points = _ONCE) -> np.ndarray:
        """Draw a polygon; return its vertices, to draw within."""
        vertices = _vertices(points)
        for shift in _vertices(at):
            self.shapes.append(_Shape("fill", vertices + shift, fill or _HOLE, edge=edge and fill is not None))
        return vertices

    def blob(self, points: Points, fill: Color | None, **style: Any) -> np.ndarray:
        """Draw a smooth closed curve through the points."""
        return self.poly(_curve(points, closed=True), fill, **style)

    def oval(
        self, x: float, y: float, rx: float, ry: float, fill: Color | None, turn_deg: float = 0, **style: Any
    ) -> np.ndarray:
        flat = oval_points(0, 0, rx, ry)
        return self.poly((flat @ _turn(turn_deg) if turn_deg else flat) + (x, y), fill, **style)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, fill: Color | None, corner: float = 0, **style: Any
    ) -> np.ndarray:
        """Draw an upright rectangle, its corners rounded by `corner`."""
        if not corner:
            return self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, **style)
        r, a, b = corner, (x0 + corner, y0 + corner), (x1 - corner, y1 - corner)
        corners = ((b[0], b[1], 0), (a[0], b[1], 90), (a[0], a[1], 180), (b[0], a[1], 270))
        return self.poly(np.concatenate([oval_points(x, y, r, r, d, d + 90) for x, y, d in corners]), fill, **style)

    def line(
        self, points: Points, width: float, fill: Color, edge: bool = False, smooth: bool = False, at: Points = _ONCE
    ) -> None:
        """Draw a stroke with round joints and ends."""
        vertices = _curve(points, closed=False) if smooth else _vertices(points)
        for shift in _vertices(at):
            self.shapes.append(_Shape("stroke", vertices + shift, fill, width, edge))

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, fill: Color, edge: bool = False) -> None:
        """Draw the outline of an ellipse; its inside stays open."""
        circle = oval_points(x, y, rx, ry)
        self.line(np.concatenate([circle, circle[:1]]), width, fill, edge)

    @contextmanager
    def within(self, polygon: np.ndarray) -> Iterator[None]:
        """Clip to the polygon all that is drawn in this block."""
        self.shapes.append(_Shape("clip", polygon))
        yield
        self.shapes.append(_Shape("unclip", np.empty((0, 2))))

    def add(self, other: "Drawing", x: float = 0, y: float = 0, scale: float = 1, turn_deg: float = 0) -> None:
        """Add another drawing, turned and scaled about its origin and moved to (x, y)."""
        matrix = _turn(turn_deg) * scale
        for s in other.shapes:
            self.shapes.append(_Shape(s.kind, s.points @ matrix + (x, y), s.fill, s.width * scale, s.edge))

    def size_wh(self) -> tuple[float, float]:
        """Return width and height of the shapes, without the width of strokes and what is clipped."""
        clipped, shown = False, []
        for s in self.shapes:
            clipped = s.kind == "clip" or (clipped and s.kind != "unclip")
            if not clipped:
                shown.append(s.points)
        width, height = np.ptp(np.concatenate(shown), axis=0).tolist()
        return width, height


@dataclass(slots=True)
class Sprite:
    """A drawing in pixels: an RGBA picture, and the pixels covered by half or more: bool [h, w]."""

    picture: Image.Image
    mask: np.ndarray


def rasterize(
    drawing: Drawing, span_px: float, turn_deg: float = 0, flip: bool = False, light: int = 1, relief: float = 1
) -> Sprite:
    """Paint a drawing whose longer side, before it is turned, is `span_px` long.

    Args:
        light: 1 if the light comes from the left, -1 if from the right.
        relief: how strongly the light models the shape.
    """
    shapes, scale = drawing.shapes, span_px / max(drawing.size_wh())
    fine = 4 if span_px < 80 else 3 if span_px < 160 else 2  # subpixels per pixel and direction
    matrix = _turn(turn_deg) * (scale * fine) * (-1 if flip else 1, 1)
    pad = fine * (1 + max(s.width for s in shapes) * scale / 2)
    points = np.concatenate([s.points for s in shapes]) @ matrix
    points -= points.min(0) - pad
    # The nudge above 0.5 keeps the last bit of a cosine, which differs between machines, from deciding where halves go.
    grid = np.floor(points + 0.50001).astype(np.int32)
    width, height = (math.ceil((extent + pad) / fine) for extent in points.max(0).tolist())
    sheet = Image.new("RGBX", (width * fine, height * fine))
    _paint(sheet, shapes, grid.ravel().tolist(), scale * fine, fine * min(2.0, max(0.5, span_px * 0.011)))
    x0, y0, x1, y1 = sheet.getchannel(3).reduce(fine).getbbox() or (0, 0, 1, 1)
    sheet = sheet.crop((x0 * fine, y0 * fine, x1 * fine, y1 * fine))
    mask = np.asarray(sheet.getchannel(3).point([0] + [255] * 255).reduce(fine)) >= 128
    return Sprite(_lit(sheet.reduce(fine), light, span_px * 0.05, relief), mask)


def _paint(sheet: Image.Image, shapes: list[_Shape], grid: list[int], scale: float, edge_px: float) -> None:
    target, pen, clip = sheet, ImageDraw.Draw(sheet), Image.new("L", (1, 1))
    start = 0
    for shape in shapes:
        xy = grid[start : start + 2 * len(shape.points)]
        start += len(xy)
        ink, outline = _ink(shape.fill), _ink(shade(shape.fill, 0.58)) if shape.edge else _HOLE
        if shape.kind == "clip":
            clip = Image.new("L", sheet.size)
            ImageDraw.Draw(clip).polygon(xy, fill=255)
            target = sheet.copy()
            pen = ImageDraw.Draw(target)
        elif shape.kind == "unclip":
            box = clip.getbbox() or (0, 0, 1, 1)
            sheet.paste(target.crop(box), box, clip.crop(box))
            pen = ImageDraw.Draw(sheet)
        elif shape.kind == "fill":
            pen.polygon(xy, fill=ink)
            if shape.edge:
                pen.line(xy + xy[:2], fill=outline, width=max(1, round(edge_px)))
        else:
            if shape.edge:
                _stroke(pen, xy, shape.width * scale + edge_px, outline)
            _stroke(pen, xy, shape.width * scale - shape.edge * edge_px, ink)


def _stroke(pen: ImageDraw.ImageDraw, xy: list[int], width: float, ink: Color) -> None:
    pen.line(xy, fill=ink, width=max(1, round(width)))
    r = width / 2 - 0.5
    if r >= 1:
        for x, y in zip(xy[::2], xy[1::2], strict=True):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)


def _ink(fill: Color) -> Color:
    """Return premultiplied RGBA."""
    alpha = fill[3] if len(fill) > 3 else 255
    return (*(c * alpha // 255 for c in fill[:3]), alpha)


def _lit(flat: Image.Image, light: int, radius_px: float, relief: float) -> Image.Image:
    """Shade the silhouette as if it were rounded: its blurred coverage is a height, whose slope faces the light or not.

    `flat` holds premultiplied colours, the result plain ones.
    """
    height = np.asarray(flat.getchannel(3).filter(ImageFilter.GaussianBlur(radius_px)), np.int16)
    gain = 262 - (255 - height) // 7
    strength = round(radius_px * relief * 14)
    gain[:, 1:-1] += (height[:, 2:] - height[:, :-2]) * (light * strength) >> 6
    gain[1:-1] += (height[2:] - height[:-2]) * strength >> 6
    pixels = np.array(flat)
    lit = pixels[..., :3] * (np.clip(gain, 150, 340) >> 1).astype(np.uint16)[..., None] >> 7
    pixels[..., :3] = np.minimum(lit, pixels[..., 3:])
    return Image.frombuffer("RGBa", flat.size, pixels.tobytes(), "raw", "RGBa", 0, 1).convert("RGBA")
