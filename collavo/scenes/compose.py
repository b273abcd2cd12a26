"""Compose a scene: put things into a place, paint them, and annotate what is visible.

A thing that is hidden too much is taken out before anything is painted, so that the picture and its annotation hold
exactly the same things.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from collavo.scenes import creatures, indoors, outdoors  # noqa: F401  (they register what they draw)
from collavo.scenes.canvas import Canvas, Layer, Light, Surface
from collavo.scenes.dialogues import dialogues_about
from collavo.scenes.drawing import Dice, Drawing, rasterize
from collavo.scenes.places import ANYWHERE, FREQUENT, INDOORS, PLACES
from collavo.scenes.scene import Scene, SceneSegment
from collavo.scenes.thing import DRAWABLE, Thing
from schemas.categories import Category

_LEAST_VISIBLE_SHARE = 0.25
_LEAST_VISIBLE_AREA = 0.0012  # of the image
_SPANS = (0.075, 0.6)  # smallest and largest thing, in short sides
_SEATED = ("cat", "teddy bear", "book", "bird", "sports ball")
_FLOCKS = ("flying bird", "apple", "orange", "donut", "sheep", "sports ball", "cup", "kite", "carrot", "book", "person")
_CROWDS = ("person", "sheep", "orange", "apple", "book", "donut")


def draw_scene(seed: int, size_wh: tuple[int, int] = (640, 480)) -> Scene:
    """Draw the scene of a seed: the same bytes for the same seed and size on any machine.

    Raises:
        ValueError: for a side below 32 pixels.
    """
    if min(size_wh) < 32:
        raise ValueError(f"size {size_wh[0]}x{size_wh[1]}: a scene needs at least 32 pixels either way")
    dice = Dice(seed)
    place, time = dice.pick(FREQUENT), dice.pick(("morning", "day", "day", "day", "evening", "night"))
    wet = "snowy" if place == "mountains" else "rainy"
    weather = "clear" if place in INDOORS else dice.pick(("clear", "clear", "clear", "cloudy", wet))
    canvas = Canvas(size_wh, dice, Light(time, weather, dice.pick((1, -1)), place in INDOORS))
    PLACES[place](canvas)
    _populate(canvas)
    layers, owners = _settled(canvas)
    ids, segments = _annotated(canvas, layers, owners)
    image = _graded(canvas, canvas.painted(layers))
    dialogues = dialogues_about(segments, size_wh, place, time, weather, dice)
    return Scene(image, ids, segments, place, time, weather, dialogues)


def _populate(canvas: Canvas) -> None:
    """Put things into the place, sometimes also a flock of small ones, or a crowd as one region."""
    dice, room = canvas.dice, max(canvas.size_wh) / canvas.unit
    crowds = _CROWDS[canvas.light.indoors :]  # people do not crowd a room
    for gather, names in ((_crowd, crowds), (_flock, _FLOCKS)):
        homes = [(s, n) for s in canvas.surfaces for n in s.things if n in names and s.box_xyxy[1] < 0.8]
        if homes and dice.chance(0.06):
            gather(canvas, *dice.pick(homes))
    wanted = int(dice.integer(4, 13) * (0.6 + 0.4 * room))
    while wanted > 0:
        surface = dice.pick(canvas.surfaces)
        solid = not surface.hangs and surface.category.name != "sea"
        name = dice.pick(ANYWHERE.split(", ") if solid and dice.chance(0.12) else surface.things)
        count = dice.pick((1, 1, 1, 1, 1, 1, 2, 2, 3, 4) if solid else (1, 1, 2))
        for _ in range(count):
            _put(canvas, surface, DRAWABLE[name])
        wanted -= count


def _flock(canvas: Canvas, surface: Surface, name: str) -> None:
    """Put about a dozen of a kind, or thirty smaller ones."""
    many = canvas.dice.chance(0.4)
    for _ in range(canvas.dice.integer(26, 36) if many else canvas.dice.integer(10, 14)):
        _put(canvas, surface, DRAWABLE[name], shrink=0.6 if many else 0.75)


def _drawn(dice: Dice, kind: Thing) -> tuple[Drawing, tuple[str, ...]]:
    """Draw a thing of this kind, and return it with the names of its colours."""
    drawing, color = Drawing(), dice.pick(kind.colors or ("grey",))
    second = kind.draw(drawing, dice.paint(color), dice)
    return drawing, (color, *([second] if second else [])) if kind.colors else ()


def _put(canvas: Canvas, surface: Surface, kind: Thing, shrink: float = 1) -> None:
    """Draw a thing, find room for it in up to six tries, and perhaps put something on its seat."""
    dice, (width, height) = canvas.dice, canvas.size_wh
    drawing, colors = _drawn(dice, kind)
    wide, high = drawing.size_wh()
    x0, y0, x1, y1 = surface.box_xyxy
    for _ in range(6):
        x, down = dice.uniform(x0, x1) * width, dice.uniform(0, 1)
        y = (y0 + (y1 - y0) * down) * height
        size = (surface.far + (surface.near - surface.far) * down) * math.sqrt(kind.span_m) * dice.uniform(0.86, 1.16)
        span = min(max(size * shrink, _SPANS[0]), _SPANS[1]) * canvas.unit
        w, h = wide * span / max(wide, high), high * span / max(wide, high)
        if not _is_crowded(canvas, (x - w / 2, y - h, x + w / 2, y)):
            break
    else:
        return
    turn = dice.uniform(-kind.turn_deg, kind.turn_deg)
    layer = _laid(canvas, surface, kind, drawing, span, round(x), round(y), turn)
    layer.colors = colors
    if kind.seat and dice.chance(0.4):
        _seat(canvas, layer, kind.seat, DRAWABLE[dice.pick(_SEATED)])


def _laid(
    canvas: Canvas, surface: Surface, kind: Thing, drawing: Drawing, span: float, x: int, y: int, turn_deg: float = 0
) -> Layer:
    """Put a drawing on a point of a surface, or centre it there if things hang."""
    sprite = rasterize(drawing, span, turn_deg, kind.flips and canvas.dice.chance(0.5), canvas.light.side)
    w, h = sprite.picture.size
    layer = Layer(sprite, x - w // 2, y - h, y, kind.category, kind, base_y=y, on=surface.category)
    if surface.hangs:
        layer.y, layer.depth, layer.base_y, layer.on = y - h // 2, -1, None, None
    canvas.layers.append(layer)
    return layer


def _seat(canvas: Canvas, bearer: Layer, seat: tuple[float, float, float], kind: Thing) -> None:
    """Put something on a chair, bench, couch or suitcase."""
    dice, (w, h) = canvas.dice, bearer.sprite.picture.size
    drawing, colors = _drawn(dice, kind)
    span = max(_SPANS[0] * canvas.unit, dice.uniform(0.36, 0.5) * h)
    sprite = rasterize(drawing, span, flip=dice.chance(0.5), light=canvas.light.side)
    x = bearer.x + round(w * dice.uniform(seat[0], seat[1])) - sprite.picture.size[0] // 2
    y = bearer.y + round(h * (seat[2] + 0.06)) - sprite.picture.size[1]
    canvas.layers.append(Layer(sprite, x, y, bearer.depth + 0.5, kind.category, kind, colors, on=bearer))


def _crowd(canvas: Canvas, surface: Surface, name: str) -> None:
    """Put a distant crowd, or a heap, that nobody would count, as one region."""
    dice, kind, crowd = canvas.dice, DRAWABLE[name], Drawing()
    standing = name in ("person", "sheep")
    step = {"person": 24, "sheep": 84}.get(name, 76)
    for row in range(2) if standing else range(3, -1, -1):
        for k in range(9 if standing else 7 - row):
            shift, level = k + row * 0.5 + dice.uniform(-0.15, 0.15), row * 10 if standing else row * -66
            crowd.add(_drawn(dice, kind)[0], shift * step, level, dice.uniform(0.9, 1.05))
    x0, y0, x1, _ = surface.box_xyxy
    x, y = round(dice.uniform(x0, x1) * canvas.size_wh[0]), round((y0 + 0.02) * canvas.size_wh[1])
    _laid(canvas, surface, kind, crowd, dice.uniform(0.35, 0.5) * canvas.unit, x, y).is_crowd = True


def _is_crowded(canvas: Canvas, box_xyxy: tuple[float, float, float, float]) -> bool:
    """Tell whether a box would overlap that of another thing by more than a third of the smaller one."""
    x0, y0, x1, y1 = box_xyxy
    for layer in canvas.layers:
        w, h = layer.sprite.picture.size
        across, down = min(x1, layer.x + w) - max(x0, layer.x), min(y1, layer.y + h) - max(y0, layer.y)
        if layer.thing and across > 0 and down > 0 and across * down > 0.33 * min(w * h, (x1 - x0) * (y1 - y0)):
            return True
    return False


def _settled(canvas: Canvas) -> tuple[list[Layer], np.ndarray]:
    """Remove things until none is hidden too much; return the layers from back to front and the owner of each pixel."""
    least = _LEAST_VISIBLE_AREA * canvas.size_wh[0] * canvas.size_wh[1]
    layers = sorted(canvas.layers, key=lambda layer: layer.depth)
    while True:
        owners = canvas.owners(layers)
        visible = np.bincount(owners.ravel(), minlength=len(layers) + 1)[1:].tolist()
        gone = [
            layer
            for layer, area in zip(layers, visible, strict=True)
            if layer.thing and area < max(least, _LEAST_VISIBLE_SHARE * int(layer.sprite.mask.sum()))
        ]
        if not gone:
            return layers, owners
        layers = [layer for layer in layers if layer not in gone and layer.on not in gone]


def _annotated(canvas: Canvas, layers: list[Layer], owners: np.ndarray) -> tuple[np.ndarray, tuple[SceneSegment, ...]]:
    """Number the segments, one for each thing and one for all stuff of a class, and measure their visible parts."""
    from scipy.ndimage import find_objects  # here, because scipy takes longer to import than all the rest

    first: dict[Category, Layer] = {}
    heads = [layer if layer.thing else first.setdefault(layer.category, layer) for layer in layers]
    positions = {head: position for position, head in enumerate(dict.fromkeys(heads), 1)}
    numbers = [0]
    for head in positions:
        numbers.append(_fresh_id(canvas.dice, head.category, numbers))
    owners = np.take(np.array([0, *(positions[head] for head in heads)], np.int32), owners)
    areas = np.bincount(owners.ravel(), minlength=len(numbers)).tolist()
    segments = []
    for (head, position), box in zip(positions.items(), find_objects(owners, len(positions)), strict=True):
        if box is None:
            continue
        rows, columns = box
        bearer = positions[first[head.on] if isinstance(head.on, Category) else head.on] if head.on else 0
        below = owners[rows.stop : rows.stop + 3, columns]
        if isinstance(head.on, Category) and np.count_nonzero(below == bearer) * 2 <= below.size:
            bearer = 0  # something else lies below what is visible
        segments.append(
            SceneSegment(
                id=numbers[position],
                category_id=head.category.category_id,
                is_crowd=head.is_crowd,
                box_xywh=(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start),
                area=areas[position],
                colors=head.colors,
                part=head.thing.part if head.thing else "",
                base_y=head.base_y,
                on=numbers[bearer] or None,
            )
        )
    return np.take(np.array(numbers, np.int32), owners), tuple(segments)


def _fresh_id(dice: Dice, category: Category, taken: list[int]) -> int:
    """Return an id whose bytes resemble the class's colour, as in COCO's files, so that the PNG shows the classes."""
    while True:
        r, g, b = (max(0, min(255, c + dice.integer(-30, 30))) for c in category.color_rgb)
        new = r + 256 * g + 65536 * b
        if new not in taken:
            return new


def _graded(canvas: Canvas, frame: Image.Image) -> np.ndarray:
    """Lay the weather, the light of the hour and a little grain over the whole picture."""
    dice, light, (width, height) = canvas.dice, canvas.light, canvas.size_wh
    veil = Image.new("L", frame.size)
    pen = ImageDraw.Draw(veil)
    for _ in range(160 * width * height // canvas.unit**2 if light.weather in ("rainy", "snowy") else 0):
        x, y, s = dice.uniform(0, width), dice.uniform(0, height), canvas.unit * dice.uniform(0.003, 0.008)
        if light.weather == "snowy":
            pen.ellipse((x - s, y - s, x + s, y + s), 210)
        else:
            pen.line((x, y, x - s, y + s * 5), 110, max(1, canvas.unit // 300))
    frame.paste((236, 240, 248), (0, 0), veil)
    fall = np.outer((0.94, 1, 1, 1, 0.96), np.linspace(1, 0.9, 6)[:: light.side])
    glow = Image.fromarray((fall[..., None] * light.tint).astype(np.uint8))
    frame = ImageChops.multiply(frame, glow.resize(frame.size, Image.Resampling.BICUBIC))
    amount = dice.integer(4, 14)
    grain = Image.fromarray(dice.grain(height, width)).point([value * amount // 255 for value in range(256)])
    return np.asarray(ImageChops.add(frame, Image.merge("RGB", (grain,) * 3), offset=-amount // 2))
