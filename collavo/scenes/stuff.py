"""Stuff: textures of grounds, walls and water, and drawings of trees, buildings, mountains and windows."""

import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from collavo.scenes.canvas import Canvas, Light
from collavo.scenes.drawing import Color, Dice, Drawing, oval_points, shade, spread_points

_GREENS = ((74, 138, 66), (98, 156, 74), (58, 116, 70), (128, 162, 74), (196, 132, 54), (206, 160, 66))
_FACADES = ((214, 150, 120), (226, 196, 150), (170, 186, 196), (190, 120, 100), (236, 222, 196), (150, 160, 150))
_PLAIN = (246, 244, 238)


def _texture(
    dice: Dice, size_wh: tuple[int, int], far: Color, near: Color, cell_wh: tuple[float, float], rough: int, fine: int
) -> Image.Image:
    """Return a gradient from top to bottom with blotches of the cell's size (pixels) and fine grain."""
    w, h = size_wh
    down = np.arange(h)[:, None, None] * 256 // max(1, h - 1)
    column = ((np.array(far) * (256 - down) + np.array(near) * down) // 256).astype(np.uint8)
    coarse = Image.fromarray(dice.grain(2 + int(h / max(1, cell_wh[1])), 2 + int(w / max(1, cell_wh[0]))))
    blotches = coarse.point([v * rough // 128 for v in range(256)]).resize(size_wh, Image.Resampling.BICUBIC)
    bumps = ImageChops.add(blotches, Image.fromarray(dice.grain(h, w)).point([v * fine // 128 for v in range(256)]))
    return ImageChops.add(
        Image.fromarray(column).resize(size_wh, Image.Resampling.NEAREST),
        Image.merge("RGB", (bumps,) * 3),
        offset=-rough - fine,
    )


def ground(canvas: Canvas, name: str, top_px: np.ndarray | float, far: Color, near: Color, marks: str) -> None:
    """Paint grass, sand, snow, water or paving below a line, with `marks` on it: blades, waves, dots or none ("")."""
    (width, height), dice = canvas.size_wh, canvas.dice
    size = (width, height - max(0, int(np.min(top_px))))
    cell = canvas.unit * 0.06
    picture = _texture(dice, size, far, near, (cell * (5 if marks == "waves" else 2.5), cell), 12, 8)
    pen = ImageDraw.Draw(picture)
    for _ in range(int(120 * width / canvas.unit) if marks else 0):
        x, y = dice.uniform(0, width), size[1] * math.sqrt(dice.uniform(0, 1))
        tone = tuple(int(a + (b - a) * y / size[1]) for a, b in zip(far, near, strict=True))
        s = canvas.unit * (0.005 + 0.012 * y / size[1])
        if marks == "blades":
            blade = (x - s * 0.5, y - s, x, y, x + s * 0.5, y - s * 1.2)
            pen.line(blade, shade(tone, dice.pick((0.82, 0.88, 1.14))), max(1, round(s * 0.28)))
        elif marks == "waves":
            crest = (x - s * 2.5, y, x - s, y - s * 0.3, x + s, y - s * 0.3, x + s * 2.5, y)
            pen.line(crest, shade(tone, 1.28), max(1, round(s * 0.28)))
        else:
            pen.ellipse((x - s * 0.3, y - s * 0.2, x + s * 0.3, y + s * 0.2), shade(tone, dice.pick((0.84, 0.9, 1.3))))
    canvas.cover(name, top_px, picture)


def road(canvas: Canvas, top_px: int, bottom_px: int, tone: Color) -> None:
    """Paint a road from side to side, with a kerb and a dashed line in the middle."""
    (width, height), edge = canvas.size_wh, max(1, canvas.unit // 80)
    size = (width, height - top_px)
    picture = _texture(canvas.dice, size, shade(tone, 0.95), shade(tone, 1.06), (canvas.unit * 0.2,) * 2, 8, 14)
    pen, middle, step = ImageDraw.Draw(picture), (bottom_px - top_px) // 2, canvas.unit * 0.2
    pen.rectangle((0, 0, width, edge), shade(tone, 1.5))
    for k in range(int(width / step) + 2):
        corners = ((k - 0.4, -edge), (k + 0.15, -edge), (k + 0.05, edge), (k - 0.5, edge))
        pen.polygon([(x * step, middle + y) for x, y in corners], (236, 230, 210))
    canvas.cover("road", top_px, picture)


def sky(canvas: Canvas, horizon: float) -> None:
    """Paint the sky to a little below the horizon (a fraction of the height), with sun or moon, stars and clouds."""
    (width, height), light, dice, r = canvas.size_wh, canvas.light, canvas.dice, canvas.unit * 0.05
    deep = min(height, int(height * horizon) + 2 + canvas.unit // 10)
    picture = Image.new("RGB", canvas.size_wh)
    picture.paste(_texture(dice, (width, deep), *light.sky, (canvas.unit, canvas.unit * 0.3), 6, 2))
    pen, x = ImageDraw.Draw(picture), dice.uniform(0.1, 0.9) * width
    if light.weather == "clear" and light.time == "night":
        for _ in range(60):
            u, v, s = dice.uniform(0, width), dice.uniform(0, deep), canvas.unit * dice.uniform(0.001, 0.0035)
            pen.ellipse((u - s, v - s, u + s, v + s), (236, 236, 220))
        y = deep * dice.uniform(0.15, 0.4)
        pen.ellipse((x - r, y - r, x + r, y + r), (250, 244, 214))
        pen.ellipse((x - r * 0.5, y - r * 1.1, x + r * 1.3, y + r * 0.8), light.sky[0])
    elif light.weather == "clear":
        y = deep * (dice.uniform(0.12, 0.4) if light.time == "day" else dice.uniform(0.55, 0.8))
        for k in range(6):
            q = r * (1.9 - k * 0.18)
            pen.ellipse((x - q, y - q, x + q, y + q), shade(light.sky[1], 1.1 + k * 0.12) if k < 5 else (255, 244, 196))
    canvas.cover("sky", 0, picture)
    for _ in range(dice.integer(0, 4) if light.weather == "clear" else 6):
        cloud, tone = Drawing(), shade(light.sky[1], 1.5 if light.weather == "clear" else dice.uniform(0.88, 1.3))
        for k in range(6):
            q = dice.uniform(11, 18) * (1.2 if k in (2, 3) else 0.8)
            cloud.oval(k * 17, -q * 0.6, q * 1.25, q, (*tone, 225), edge=False)
        cloud.box(-12, -11, 98, 2, (*tone, 225), corner=6, edge=False)
        canvas.stand("sky", cloud, dice.uniform(0, 1), horizon * dice.uniform(0.2, 0.75), dice.uniform(0.2, 0.5))


def tree(dice: Dice, kind: str) -> Drawing:
    """Draw a "round" tree, a "conifer" or a "palm", about 120 high."""
    d, leaf = Drawing(), shade(dice.pick(_GREENS if kind == "round" else _GREENS[:4]), dice.uniform(0.85, 1.1))
    if kind == "conifer":
        d.box(-5, -16, 5, 0, (112, 80, 56))
        for k in range(4):
            y, r = -12 - k * 24, 34 - k * 7
            d.poly([(-r, y), (0, y - 42), (r, y), (r * 0.4, y - 4), (-r * 0.4, y - 4)], shade(leaf, 0.66 + k * 0.06))
    elif kind == "palm":
        d.line("0,0 6,-50 18,-92", 8, (150, 116, 78), edge=True, smooth=True)
        for k, (x, y) in enumerate(oval_points(0, 0, 23, 17, -190, 15)[::3]):
            frond = [(18, -92), (18 + x, y - 109), (18 + 2 * x, 2 * y - 84), (18 + x, y - 98)]
            d.blob(frond, shade(leaf, 0.8 + k % 3 * 0.1))
    else:
        d.poly("-6,0 -3,-50 3,-50 6,0", (112, 80, 56))
        for k, (x, y) in enumerate((*spread_points(8, 30), *spread_points(3, 12))):
            d.oval(x, y * 0.85 - 82, 19, 18, shade(leaf, 0.9 - y * 0.004), edge=k < 8)
        for _ in range(14):
            up = dice.uniform(58, 112)
            d.oval(dice.uniform(-38, 38), -up, 3.5, 3, shade(leaf, 1.18 if up > 80 else 0.78), edge=False)
    return d


def building(dice: Dice, light: Light) -> Drawing:
    """Draw a house front of 2 to 6 floors, each 26 high."""
    d, wall = Drawing(), shade(dice.pick(_FACADES), dice.uniform(0.88, 1.05))
    columns, rows = dice.integer(2, 4), dice.integer(2, 6)
    w, h, lit = columns * 22 + 8, rows * 26 + 30, light.time in ("night", "evening")
    d.box(0, -h, w, 0, wall)
    if dice.chance(0.5):
        d.poly([(-6, -h), (w / 2, -h - 30), (w + 6, -h)], dice.pick(((170, 84, 66), (110, 104, 110), (140, 92, 70))))
    else:
        d.box(-3, -h - 7, w + 3, -h, shade(wall, 0.75))
    for k in range(rows * columns):
        x, y = 8 + k % columns * 22, -h + 8 + k // columns * 26
        dark = (92, 110, 130) if lit else (164, 200, 220)
        d.box(x, y, x + 14, y + 17, (255, 222, 128) if lit and dice.chance(0.6) else dark)
        d.line([(x + 7, y), (x + 7, y + 17)], 1.4, shade(wall, 1.4))
        d.line([(x - 1, y + 18), (x + 15, y + 18)], 2, shade(wall, 0.7))
    door = 8 + 22 * dice.integer(0, columns - 1)
    d.box(door, -20, door + 14, 0, dice.pick(((120, 66, 50), (60, 96, 80), (70, 80, 120))))
    return d


def mountains(dice: Dice, tone: Color, high: float, snowy: bool) -> Drawing:
    """Draw a range 130 wide with peaks up to `high`."""
    d = Drawing()
    peaks = [(x + dice.uniform(-6, 6), dice.uniform(0.5, 1) * high) for x in range(-4, 110, max(3, int(high * 0.8)))]
    for x, y in sorted(peaks, key=lambda peak: -peak[1]):
        half, body = y * dice.uniform(0.9, 1.3), shade(tone, dice.uniform(0.88, 1.08))
        flank = [(0, -1), (0.35, -0.6), (1, 0), (0.2, 0), (-0.06, -0.5)]
        cap = [(0, -1), (0.21, -0.76), (0.1, -0.68), (0.02, -0.76), (-0.08, -0.64), (-0.16, -0.72), (-0.24, -0.73)]
        d.poly([(x + u * half, v * y) for u, v in ((-1, 0), (-0.4, -0.55), *flank[:3])], body)
        d.poly([(x + u * half, v * y) for u, v in flank], shade(body, 0.82), edge=False)
        if snowy:
            d.poly([(x + u * half, v * y) for u, v in cap], (244, 247, 252), edge=False)
    d.box(-15, -2, 115, 0, tone, edge=False)
    return d


def fence(dice: Dice, length: float) -> Drawing:
    """Draw pickets or rails, 24 high."""
    d, paint, pickets = Drawing(), dice.pick((_PLAIN, (164, 116, 74), (120, 90, 66), (206, 190, 160))), dice.chance(0.5)
    for y in (-17, -8):
        d.box(0, y, length, y + (3 if pickets else 5), shade(paint, 0.88))
    for x in np.arange(3, length, 8 if pickets else 26):
        d.poly([(x - 2.4, 0), (x - 2.4, -20), (x, -24 if pickets else -21), (x + 2.4, -20), (x + 2.4, 0)], paint)
    return d


def window(dice: Dice, light: Light) -> Drawing:
    d, frame, w = Drawing(), dice.pick((_PLAIN, (150, 106, 70), (236, 226, 204))), dice.pick((70, 90, 110))
    d.box(0, 0, w, 84, frame)
    pane, (top, bottom) = d.box(5, 5, w - 5, 79, light.sky[1]), light.sky
    with d.within(pane):
        for k in range(5):
            band = tuple(a + (b - a) * k // 5 for a, b in zip(top, bottom, strict=True))
            d.box(0, k * 10, w, k * 10 + 11, band, edge=False)
        for _ in range(8 if light.time == "night" else 0):
            d.oval(dice.uniform(8, w - 8), dice.uniform(8, 50), 1, 1, (240, 240, 220), edge=False)
        hill = shade((96, 148, 84), 0.4 if light.time == "night" else 1)
        d.blob([(-20, 84), (w * 0.2, 60), (w * 0.5, 67), (w * 0.8, 56), (w + 20, 84)], hill, edge=False)
    d.line([(w / 2, 4), (w / 2, 80)], 4, frame, edge=True)
    d.line([(4, 35), (w - 4, 35)], 4, frame, edge=True)
    d.box(-5, 81, w + 5, 89, frame)
    return d


def curtain(paint: Color) -> Drawing:
    d = Drawing()
    with d.within(d.poly([(2, 0), (38, 0), *((x, 118 - x // 5 % 2 * 2) for x in range(40, -5, -5))], paint)):
        for k, x in enumerate(range(3, 42, 5)):
            d.line([(x, -4), (x * 1.1 - 2, 122)], 2.4, shade(paint, 0.78 if k % 2 else 1.18))
    return d


def sideboard(dice: Dice) -> Drawing:
    """Draw a low table, 140 long and 46 high."""
    d, wood = Drawing(), dice.pick(((156, 108, 66), (206, 168, 120), (236, 230, 220), (96, 70, 56)))
    d.box(12, -40, 19, 0, shade(wood, 0.7), at="0,0 110,0")
    d.box(4, -40, 136, -26, shade(wood, 0.86))
    d.box(0, -46, 140, -39, wood, corner=2)
    return d


def rug(paint: Color) -> Drawing:
    d = Drawing()
    for k, r in enumerate((1, 0.86, 0.62, 0.36)):
        d.oval(0, 0, 60 * r, 17 * r, shade(paint, 1.5 if k % 2 else 1), edge=k == 0)
    return d


def wall(canvas: Canvas, name: str, paint: Color) -> None:
    """Paint a wall over the whole frame: plain or papered ("wall"), of bricks or of tiles."""
    (width, height), dice, bricks = canvas.size_wh, canvas.dice, name == "wall-brick"
    picture = _texture(dice, canvas.size_wh, shade(paint, 1.06), shade(paint, 0.94), (canvas.unit * 0.5,) * 2, 8, 4)
    pen, paper = ImageDraw.Draw(picture), dice.pick(("plain", "stripes", "dots"))
    w, h = (canvas.unit * size for size in ((0.11, 0.042) if bricks else (0.085, 0.085)))
    gap = 1 + max(1, canvas.unit // 200)
    if name != "wall":
        picture.paste(shade(paint, 1.45 if bricks else 0.82), (0, 0, width, height))
    for k in range(0 if name == "wall" and paper == "plain" else int(width / w) + 2):
        for j in range(int(height / h) + 1):
            x, y = int((k - (j % 2 / 2 if bricks or paper == "dots" else 0)) * w), int(j * h)
            if name != "wall":
                tone = shade(paint, dice.uniform(0.86, 1.08) if bricks else dice.uniform(0.97, 1.04))
                pen.rectangle((x, y, max(x, int(x + w) - gap), max(y, int(y + h) - gap)), tone)
            elif paper == "stripes":
                pen.rectangle((x, y, x + w * 0.4, y + h), shade(paint, 0.94))
            else:
                pen.ellipse((x, y, x + w * 0.25, y + w * 0.25), shade(paint, 0.88))
    canvas.cover(name, 0, picture)


def boards(canvas: Canvas, name: str, top_px: int, paint: Color, stripe: Color | None = None) -> None:
    """Paint a wooden floor or table top in perspective, or a tablecloth with stripes."""
    (width, height), dice = canvas.size_wh, canvas.dice
    deep, step, middle = height - top_px, canvas.unit * 0.26, width / 2
    picture = _texture(dice, (width, deep), shade(paint, 0.9), paint, (canvas.unit * 0.5, canvas.unit * 0.02), 10, 6)
    pen, thick = ImageDraw.Draw(picture), max(1, canvas.unit // 240)

    def across(k: float, y: float) -> float:
        return middle + k * step * (y + 1.2 * deep) / (2.2 * deep)

    for k in range(-int(width / step) - 2, int(width / step) + 3):
        if stripe:
            corners = ((k, 0), (k + 0.4, 0), (k + 0.4, deep), (k, deep))
            pen.polygon([(across(column, y), y) for column, y in corners], stripe)
            continue
        pen.line((across(k, 0), 0, across(k, deep), deep), shade(paint, 0.72), thick)
        for _ in range(2):
            y = dice.uniform(0, deep)
            pen.line((across(k, y), y, across(k + 1, y), y), shade(paint, 0.76), thick)
    canvas.cover(name, top_px, picture)
