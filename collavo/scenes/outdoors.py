"""Drawings of vehicles, street furniture and what people take outside."""

import numpy as np

from collavo.scenes.drawing import (
    DARK,
    LIGHT,
    STEEL,
    WOOD,
    Color,
    Dice,
    Drawing,
    contrast,
    oval_points,
    shade,
    spread_points,
)
from collavo.scenes.thing import ANY, thing

_GLASS = (168, 208, 226)
_STOP = (
    "9,1 1,0 0,5 9,8 8,14 0,13",
    "0,0 9,0 4.5,0 4.5,14",
    "4,0 0,4 0,10 4,14 9,10 9,4 5,0",
    "0,14 0,0 8,0 9,4 8,8 0,8",
)


def _wheels(d: Drawing, at: str) -> None:
    for r, fill in ((10.5, (52, 50, 56)), (5.775, (196, 198, 204)), (2.1, (120, 122, 128))):
        d.oval(0, 0, r, r, fill, edge=r == 10.5, at=at)


@thing("car", 4.2, ANY)
def car(d: Drawing, paint: Color, dice: Dice) -> None:
    if dice.chance(0.5):
        roof, pillar = "22,24 34,4 66,3 82,24 82,32 22,32", 52
        panes = ("29,23 38,8 50,8 50,23", "54,8 65,8 75,23 54,23")
    else:
        roof, pillar = "8,24 14,4 66,3 84,24 84,32 8,32", 42
        panes = ("14,23 19,8 40,8 40,23", "44,8 65,8 77,23 44,23")
    d.poly("30,52 70,52 70,58 30,58", (40, 40, 44), edge=False)
    d.poly(roof, paint)
    for pane in panes:
        d.poly(pane, _GLASS)
    d.line([(pillar - 8, 22), (pillar - 3, 10)], 1.6, LIGHT)
    d.blob("1,36 4,26 24,23 80,23 98,28 103,38 102,50 90,53 10,53 1,48", paint)
    d.line([(pillar, 24), (pillar, 48)], 1, shade(paint, 0.6))
    d.line([(pillar + 4, 32), (pillar + 10, 32)], 1.8, shade(paint, 0.5))
    d.line("2,46 101,46", 2.4, shade(paint, 0.72))
    d.oval(99, 35, 3, 3.6, (255, 240, 176))
    d.oval(4, 35, 2.6, 3.4, (216, 62, 54))
    d.oval(23, 53, 13, 13, shade(paint, 0.5), edge=False, at="0,0 57,0")
    _wheels(d, "23,55 80,55")


@thing("bus", 7.0, "red blue green yellow white orange")
def bus(d: Drawing, paint: Color, dice: Dice) -> None:
    with d.within(d.box(0, 0, 132, 56, paint, corner=6)):
        d.box(0, 38, 132, 45, shade(paint, dice.pick((0.6, 1.6))), edge=False)
    panes = "0,0 17,0 34,0 51,0 68,0"
    d.box(6, 10, 20, 30, _GLASS, corner=2, at=panes)
    d.line("10,26 15,14", 1.4, LIGHT, at=panes)
    d.box(96, 10, 109, 52, shade(_GLASS, 0.8), corner=2)
    d.line("102.5,11 102.5,51", 1.2, shade(paint, 0.5))
    d.box(114, 8, 131, 34, _GLASS, corner=3)
    d.box(30, 2, 80, 7, (40, 40, 44), corner=2, edge=False)
    d.line("36,4.5 74,4.5", 1.8, (250, 196, 74))
    d.oval(129, 48, 3, 3.6, (255, 240, 176))
    _wheels(d, "24,56 84,56")


@thing("truck", 6.5, "red blue green yellow white orange purple", "cab")
def truck(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(2, 48, 128, 56, (74, 74, 80))
    if dice.chance(0.6):
        d.box(0, 0, 88, 50, dice.pick((LIGHT, (206, 196, 176), (150, 160, 170), (226, 200, 120))), corner=2)
        d.line("10,2 10,48", 1.2, (140, 138, 136), at=[(x, 0) for x in range(0, 78, 11)])
    else:
        d.blob("6,34 24,14 44,8 66,14 82,34", dice.pick(((150, 108, 66), (196, 178, 130), (110, 110, 114))))
        d.poly("-2,24 90,24 86,50 2,50", shade(paint, 0.8))
    d.poly("92,50 92,8 98,4 118,4 126,26 132,30 132,54 92,54", paint)
    d.poly("98,10 115,10 122,27 98,27", _GLASS)
    d.line("102,24 108,12", 1.6, LIGHT)
    d.oval(129, 42, 3, 4, (255, 240, 176))
    _wheels(d, "20,57 44,57 112,57")


@thing("bicycle", 1.7, "red blue green yellow black orange pink white", "frame")
def bicycle(d: Drawing, paint: Color, dice: Dice) -> None:
    for x in (20, 86):
        for dx, dy in spread_points(10, 18)[:5]:
            d.line([(x - dx, 46 - dy), (x + dx, 46 + dy)], 0.9, STEEL)
        d.ring(x, 46, 19, 19, 4.4, (50, 48, 54))
    d.ring(48, 46, 5.5, 5.5, 3, (96, 96, 102))
    for tube in ("20,46 48,46 74,16 38,16 48,46", "20,46 38,16 35,6", "86,46 73,10"):
        d.line(tube, 4.4, paint)
    d.line("73,10 70,4 80,2 84,6", 3.6, DARK, smooth=True)
    d.blob("26,5 34,2 44,4 36,8", DARK)
    d.line("44,54 54,38", 2.6, DARK)


@thing("boat", 6.0, "red blue green yellow white orange brown", "hull")
def boat(d: Drawing, paint: Color, dice: Dice) -> None:
    if dice.chance(0.6):
        sail = dice.pick((LIGHT, (250, 232, 190), (226, 96, 80), (110, 160, 214)))
        d.line("50,6 50,84", 3.4, WOOD, edge=True)
        d.poly("54,10 60,34 84,72 54,76", sail)
        d.poly("46,14 40,40 16,74 46,76", shade(sail, 0.88))
        d.poly("50,6 50,0 62,3", (214, 60, 56))
        d.poly("2,80 98,80 84,100 16,100", paint)
    else:
        d.box(30, 44, 66, 82, LIGHT, corner=2)
        d.box(36, 24, 60, 46, LIGHT, corner=2)
        d.box(68, 40, 78, 82, shade(paint, 0.8))
        d.box(38, 28, 46, 36, _GLASS, at="0,0 12,0")
        d.oval(40, 62, 4, 4, _GLASS, at="0,0 12,0")
        d.poly("-6,70 30,78 100,74 110,66 94,100 12,100", paint)
    d.line("7,86 93,86", 3, shade(paint, 1.6))


@thing("airplane", 5.0, "white blue red yellow grey", "tail", turn_deg=12)
def airplane(d: Drawing, paint: Color, dice: Dice) -> None:
    d.poly("10,36 0,4 14,4 34,34", paint)
    d.poly("60,38 46,14 56,14 82,38", (190, 194, 202))
    d.blob("4,40 12,34 40,32 100,32 118,36 126,44 116,51 96,53 40,53 14,47", (234, 236, 240))
    d.line("10,46 122,46", 2.6, paint)
    d.oval(36, 40, 2.1, 2.6, (80, 120, 160), edge=False, at=[(x, 0) for x in range(0, 68, 8)])
    d.poly("112,36 118,37 122,41 112,41", _GLASS)
    d.poly("50,47 82,47 46,76 34,76", (204, 208, 216))
    d.blob("50,56 66,55 66,63 52,64", (150, 154, 164))
    d.poly("6,40 22,40 4,50 -4,50", shade(paint, 0.85))


@thing("traffic light", 2.6, "red yellow green", "light")
def traffic_light(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(21, 70, 29, 150, (92, 94, 100))
    d.box(14, 146, 36, 154, (74, 76, 82), corner=3)
    d.box(4, 0, 46, 84, dice.pick(((54, 56, 60), (54, 56, 60), (220, 176, 60))), corner=8)
    lit = 2 if paint[0] < 150 else 0 if paint[1] < 120 else 1
    for k, (off, on) in enumerate(
        (((96, 40, 38), (255, 74, 62)), ((98, 82, 40), (255, 210, 70)), ((36, 78, 44), (92, 230, 110)))
    ):
        d.oval(25, 16 + k * 26, 11, 11, on if k == lit else off)
        d.oval(22, 13 + k * 26, 4, 4, shade(on, 1.6) if k == lit else off, edge=False)
        d.line(oval_points(25, 16 + k * 26, 12.5, 12.5, 190, 350), 3, (30, 32, 36))


@thing("fire hydrant", 0.8, "red yellow blue orange")
def fire_hydrant(d: Drawing, paint: Color, dice: Dice) -> None:
    dark, cap = shade(paint, 0.72), dice.pick((STEEL, LIGHT, shade(paint, 0.8)))
    for x in (6, 66):
        d.box(x, 42, x + 28, 60, dark, corner=4)
        d.box(x - 2 if x < 50 else x + 20, 38, x + 8 if x < 50 else x + 30, 64, cap, corner=3)
    d.box(26, 24, 74, 120, paint, corner=4)
    d.oval(50, 24, 27, 22, paint)
    d.box(44, -8, 56, 6, cap, corner=3)
    d.box(20, 22, 80, 33, dark, corner=5)
    d.box(16, 114, 84, 128, dark, corner=5)
    d.oval(50, 58, 15, 15, cap)
    d.line("36,40 36,106", 4, shade(paint, 1.35))


@thing("stop sign", 2.2, flips=False)
def stop_sign(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(46, 60, 54, 180, STEEL)
    octagon = spread_points(8, start_deg=22.5)
    d.poly(octagon * 50 + (50, 46), LIGHT)
    d.poly(octagon * 44 + (50, 46), dice.paint("red"), edge=False)
    for k, letter in enumerate(_STOP):
        strokes = np.array([[float(c) for c in pair.split(",")] for pair in letter.split()])
        d.line(strokes * (1.55, 1.9) + (16 + k * 18.5, 33), 4, LIGHT)


@thing("bench", 1.6, "brown green red blue grey", seat=(0.1, 0.9, 0.55))
def bench(d: Drawing, paint: Color, dice: Dice) -> None:
    for leg in ("14,0 14,72", "14,44 10,74", "106,0 106,72", "106,44 110,74"):
        d.line(leg, 5, (70, 72, 78))
    for y in (2, 13, 24, 38, 46):
        d.box(0 if y > 30 else 4, y, 120 if y > 30 else 116, y + 8, paint, corner=2)


@thing("umbrella", 1.3, "red blue yellow green pink purple orange black", turn_deg=14)
def umbrella(d: Drawing, paint: Color, dice: Dice) -> str | None:
    name, second = contrast(paint, dice, "white yellow blue red") if dice.chance(0.5) else (None, shade(paint, 0.8))
    d.line("50,10 50,98 46,106 38,104 36,97", 3.6, dice.pick((WOOD, (90, 90, 96))), edge=True)
    d.line("50,-6 50,4", 3, DARK)
    tips, hem = range(-6, 107, 22), [(x, 46 - 6 * (k % 2)) for k, x in enumerate(range(106, -7, -11))]
    with d.within(d.poly(np.concatenate([oval_points(50, 46, 56, 46, 180, 360), hem]), paint)):
        for k in range(0, 5, 2):
            a, b = tips[k], tips[k + 1]
            d.poly([(50, 0), (50 + (a - 50) * 0.82, 16), (a, 50), (b, 50), (50 + (b - 50) * 0.82, 16)], second)
    return name


@thing("suitcase", 0.65, ANY, seat=(0.15, 0.85, 0.2))
def suitcase(d: Drawing, paint: Color, dice: Dice) -> None:
    d.line("48,18 50,4 80,4 82,18", 6, shade(paint, 0.66))
    with d.within(d.box(0, 16, 130, 96, paint, corner=9)):
        d.box(16, 10, 28, 100, shade(paint, 0.66), at="0,0 86,0")
        d.line("2,30 128,30", 1.6, shade(paint, 0.6))
    d.box(41, 24, 51, 34, (236, 206, 120), corner=1, at="0,0 38,0")


@thing("sports ball", 0.26, "red blue yellow green orange pink white", turn_deg=180)
def sports_ball(d: Drawing, paint: Color, dice: Dice) -> str | None:
    ball, spokes = d.oval(0, 0, 50, 50, paint), spread_points(5)
    with d.within(ball):
        if min(paint) > 200:  # white: a football
            d.poly(spokes * 19, DARK)
            for x, y in spokes:
                d.line([(x * 17, y * 17), (x * 34, y * 34)], 2.6, DARK)
                d.oval(x * 48, y * 48, 15, 15, DARK, edge=False)
            return "black"
        if paint[0] > 195 and 90 < paint[1] < 170 and paint[2] < 70:  # orange: a basketball
            d.line("-50,0 50,0", 3, DARK)
            d.line("0,-50 0,50", 3, DARK)
            for x in (-52, 52):
                d.ring(x, 0, 32, 42, 3, DARK)
            return None
        name, second = contrast(paint, dice, "white white yellow")
        for a in range(0, 360, 120):
            d.poly(np.concatenate([[(6, -8)], oval_points(0, 0, 60, 60, a, a + 60)]), second)
        d.oval(6, -8, 8, 8, second)
    return name


@thing("kite", 1.0, "red blue yellow green purple pink orange", turn_deg=25)
def kite(d: Drawing, paint: Color, dice: Dice) -> str:
    name, second = contrast(paint, dice, "yellow white blue")
    d.line("40,104 48,116 36,128 46,140 38,150", 2, DARK, smooth=True)
    for x, y in ((47, 116), (38, 130)):
        for side in (-1, 1):
            d.poly([(x + side * 9, y - 5), (x, y), (x + side * 9, y + 5)], second if side < 0 else paint)
    d.poly("40,0 80,42 40,106 0,42", paint)
    d.poly("40,0 80,42 40,42", second)
    d.poly("40,106 0,42 40,42", second)
    d.line("40,0 40,106", 2.4, WOOD)
    d.line("0,42 80,42", 2.4, WOOD)
    return name


@thing("surfboard", 2.0, "red blue yellow green pink orange white", turn_deg=18)
def surfboard(d: Drawing, paint: Color, dice: Dice) -> str:
    name, second = contrast(paint, dice, "white yellow blue red")
    with d.within(d.blob("0,-60 11,-40 16,-8 14,30 8,56 0,61 -8,56 -14,30 -16,-8 -11,-40", paint)):
        d.line("-20,10 20,-10", 9, second, at=dice.pick(("0,-24 0,-8", "0,26", "0,-20 0,32")))
    d.line("0,-52 0,54", 1.8, shade(paint, 0.6))
    return name
