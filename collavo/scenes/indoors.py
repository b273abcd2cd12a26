"""Drawings of furniture, food, and of what stands and lies about in a home or an office."""

import math

import numpy as np

from collavo.scenes.drawing import DARK, LIGHT, STEEL, WOOD, Color, Dice, Drawing, contrast, shade, spread_points
from collavo.scenes.thing import ANY, thing

_LEAF = (92, 150, 66)


@thing("chair", 0.95, "brown red blue green white grey yellow black", seat=(0.2, 0.8, 0.52))
def chair(d: Drawing, paint: Color, dice: Dice) -> None:
    dark = shade(paint, 0.72)
    d.line("18,50 18,92", 5, shade(dark, 0.8), edge=True, at="0,0 44,0")
    if dice.chance(0.5):
        d.box(12, 0, 68, 9, paint, corner=3, at="0,0 0,20")
        d.line("16,4 16,56", 6, paint, edge=True, at="0,0 48,0")
    else:
        d.box(12, 0, 68, 46, paint, corner=9)
        d.box(19, 6, 61, 38, shade(paint, 1.25), corner=6, edge=False)
    d.poly("14,50 66,50 76,62 4,62", shade(paint, 1.15))
    d.box(4, 61, 76, 68, dark, corner=2)
    d.line("8,68 8,106", 6, dark, edge=True, at="0,0 64,0")


@thing("couch", 2.1, "red blue green brown grey purple yellow pink orange", seat=(0.15, 0.85, 0.62))
def couch(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(12, 66, 20, 78, WOOD, at="0,0 128,0")
    d.box(10, 0, 150, 60, shade(paint, 0.75), corner=14)
    d.box(16, 6, 79, 46, shade(paint, 0.9), corner=10, at="0,0 65,0")
    d.box(16, 38, 79, 58, shade(paint, 1.12), corner=7, at="0,0 65,0")
    d.box(8, 54, 152, 70, shade(paint, 0.75), corner=4)
    d.box(-4, 24, 24, 72, paint, corner=11, at="0,0 140,0")


@thing("potted plant", 0.8, "brown white blue red orange grey yellow", "pot")
def potted_plant(d: Drawing, paint: Color, dice: Dice) -> None:
    leaf = dice.pick(((70, 140, 66), (96, 160, 74), (52, 116, 72), (120, 168, 84)))
    if dice.chance(0.5):  # a fan of pointed leaves
        for k, a in enumerate((-64, 60, -40, 38, -18, 20, 0)):
            blade = Drawing()
            blade.blob([(0, 0), (7, -30), (0, -66 + abs(a) * 0.25), (-7, -30)], shade(leaf, 0.8 + k * 0.07))
            d.add(blade, 50, 76, turn_deg=a)
    else:  # a bush, in flower or not
        for k, (x, y) in enumerate(((30, 56), (70, 56), (24, 38), (76, 38), (38, 22), (62, 22), (50, 42))):
            d.oval(x, y, 18, 16, shade(leaf, 0.82 + k * 0.06))
        petal = dice.pick(((236, 90, 110), (250, 210, 90), LIGHT))
        for _ in range(dice.pick((0, 7))):
            d.oval(dice.uniform(24, 76), dice.uniform(16, 60), 5, 5, petal)
    d.poly("26,80 74,80 67,118 33,118", paint)
    d.box(21, 70, 79, 84, shade(paint, 1.12), corner=3)


@thing("tv", 1.1)
def tv(d: Drawing, paint: Color, dice: Dice) -> None:
    d.poly("62,76 82,76 88,88 56,88", (74, 74, 82))
    d.box(44, 86, 100, 92, (60, 60, 66), corner=3)
    d.box(0, 0, 144, 80, (42, 42, 48), corner=4)
    shown = dice.pick(((60, 96, 140), (44, 60, 84), (110, 170, 214), (54, 56, 66)))
    with d.within(d.box(5, 5, 139, 73, shown, edge=False)):
        d.poly("20,0 60,0 10,80 -30,80", shade(shown, 1.15), edge=False)
        if dice.chance(0.5):
            d.oval(dice.uniform(30, 110), 28, 12, 12, (252, 220, 120), edge=False)
            d.blob("-20,80 10,46 50,60 90,44 130,58 160,50 160,90", (86, 150, 90), edge=False)


@thing("laptop", 0.36, "grey white black blue pink", "case")
def laptop(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(14, 0, 106, 64, shade(paint, 0.8), corner=4)
    d.box(18, 4, 102, 58, dice.pick(((70, 130, 200), (40, 60, 96), (216, 226, 238), (120, 190, 160))), edge=False)
    for k, y in enumerate((14, 24, 34, 44) if dice.chance(0.6) else ()):
        d.line([(26, y), (60 + 13 * (k % 3), y)], 3, dice.pick(((250, 190, 70), (246, 246, 250), (230, 110, 110))))
    d.poly("14,64 106,64 120,86 0,86", paint)
    d.box(0, 85, 120, 91, shade(paint, 0.7), corner=2)
    d.poly("22,67 98,67 102,76 18,76", shade(paint, 0.5) if sum(paint) > 250 else (110, 110, 118), edge=False)
    for x in range(26, 100, 9):
        d.line([(x, 67), (x * 1.06 - 4, 76)], 1.2, paint)
    d.line("19,71.5 101,71.5", 1.2, paint)
    d.poly("50,79 70,79 72,83 48,83", shade(paint, 0.8), edge=False)


@thing("cell phone", 0.15, "black white blue pink red", "case", turn_deg=35)
def cell_phone(d: Drawing, paint: Color, dice: Dice) -> None:
    d.box(0, 0, 52, 104, paint, corner=8)
    screen = d.box(4, 8, 48, 96, dice.pick(((60, 110, 190), (120, 80, 160), (50, 150, 140), (240, 150, 90))), corner=3)
    with d.within(screen):
        d.oval(40, 20, 26, 22, (250, 214, 140), edge=False)
    for k in range(9):
        x, y = 10 + k % 3 * 11, 52 + k // 3 * 14
        icon = dice.pick((LIGHT, (96, 200, 120), (246, 190, 70), (236, 96, 96)))
        d.box(x, y, x + 8, y + 9, icon, corner=2, edge=False)


@thing("book", 0.26, ANY, "cover", turn_deg=12)
def book(d: Drawing, paint: Color, dice: Dice) -> None:
    if dice.chance(0.3):  # lying open
        d.poly("-4,12 60,16 124,12 124,84 60,88 -4,84", paint)
        for side in (-1, 1):
            d.blob([(60 + side * x, y) for x, y in ((0, 14), (24, 6), (58, 8), (58, 78), (24, 76), (0, 84))], LIGHT)
            line = [(60 + side * 8, 23), (60 + side * 50, 20)]
            d.line(line, 2, (150, 148, 150), at="0,0 0,9 0,18 0,27 0,36 0,45")
        return
    d.poly("8,6 84,6 84,112 8,112", shade(paint, 0.6))
    d.poly("6,104 80,104 84,110 10,110", (250, 246, 232), edge=False)
    d.poly("76,2 84,8 84,110 76,104", (236, 230, 212), edge=False)
    d.box(0, 0, 78, 104, paint, corner=2)
    d.box(0, 0, 10, 104, shade(paint, 0.75), edge=False)
    d.box(20, 14, 68, 34, shade(paint, 1.6), corner=2, edge=False)
    d.line("26,24 62,24", 3.4, shade(paint, 0.5))
    d.oval(44, 66, 15, 15, shade(paint, 1.35), edge=False)


@thing("clock", 0.35, ANY, "rim", flips=False)
def clock(d: Drawing, paint: Color, dice: Dice) -> None:
    d.oval(50, 50, 50, 50, paint)
    d.oval(50, 50, 41, 41, (250, 248, 240))
    for k, (x, y) in enumerate(spread_points(12)):
        d.line([(50 + x * 37, 50 + y * 37), (50 + x * 31, 50 + y * 31)], 2 if k % 3 else 4, DARK)
    for length, width in ((20, 5), (30, 3.4)):
        a = math.radians(dice.integer(0, 11) * 30 + 7)
        d.line([(50, 50), (50 + length * math.sin(a), 50 - length * math.cos(a))], width, DARK)
    d.oval(50, 50, 4, 4, (210, 60, 56), edge=False)


@thing("vase", 0.35, "blue white red green purple orange yellow pink")
def vase(d: Drawing, paint: Color, dice: Dice) -> None:
    petal = dice.pick(((236, 84, 100), (250, 206, 84), (246, 246, 240), (170, 110, 200), (246, 150, 180)))
    for x, y in ((24, -24), (76, -22), (50, -38)):
        d.line([(50, 20), ((x + 50) / 2, y + 26), (x, y)], 3, (80, 140, 70), smooth=True)
        d.oval(x, y, 6.5, 6.5, petal, at=spread_points(5, 8))
        d.oval(x, y, 5, 5, (240, 180, 70), edge=False)
    d.blob("40,12 24,2 16,-8 30,-6 44,4", (96, 160, 84))
    with d.within(d.blob("36,10 64,10 60,26 78,50 76,74 62,98 38,98 24,74 22,50 40,26", paint)):
        d.line("14,0 86,0", 4, shade(paint, 0.7), at=dice.pick(("", "0,46 0,58 0,70")))
    d.oval(50, 10, 15, 4, shade(paint, 0.6))


@thing("scissors", 0.2, "red blue green yellow black orange purple", "handles", turn_deg=180)
def scissors(d: Drawing, paint: Color, dice: Dice) -> None:
    spread = dice.uniform(9, 22)
    for side in (-1, 1):
        half = Drawing()
        half.poly([(-side * 2, 4), (side * 7, -8), (side * 3.5, -62), (-side * 2, -72)], STEEL)
        half.line([(0, 2), (-side * 9, 26)], 7, paint, edge=True)
        half.ring(-side * 15, 42, 12, 17, 7.5, paint, edge=True)
        d.add(half, turn_deg=side * spread)
    d.oval(0, 0, 4, 4, (110, 112, 120))


@thing("teddy bear", 0.4, "brown white pink grey yellow")
def teddy_bear(d: Drawing, paint: Color, dice: Dice) -> None:
    pale, dark = shade(paint, 1.45) if sum(paint) < 600 else (226, 200, 170), shade(paint, 0.82)
    for side in (-1, 1):
        d.oval(50 + side * 28, 8, 14, 14, dark)
        d.oval(50 + side * 28, 9, 8, 8, pale, edge=False)
        d.oval(50 + side * 37, 72, 11, 21, dark, turn_deg=side * -38)
    d.oval(50, 82, 32, 30, paint)
    d.oval(50, 84, 20, 20, pale, edge=False)
    for side in (-1, 1):
        d.oval(50 + side * 30, 106, 16, 15, dark)
        d.oval(50 + side * 31, 107, 9, 9, pale, edge=False)
    d.oval(50, 32, 36, 31, paint)
    d.oval(50, 43, 16, 12, pale, edge=False)
    for x, y, r in ((50, 38, 5.4), (36, 27, 4.2), (64, 27, 4.2)):
        d.oval(x, y, r, r, DARK, edge=False)
    d.line("50,42 50,48", 1.8, DARK)


@thing("bottle", 0.3, "green brown blue red white yellow")
def bottle(d: Drawing, paint: Color, dice: Dice) -> None:
    slim = "40,0 60,0 59,30 74,46 76,60 76,126 72,132 28,132 24,126 24,60 26,46 41,30"
    wide = "40,8 60,8 62,20 76,36 74,70 76,104 72,130 28,130 24,104 26,70 24,36 38,20"
    d.blob(dice.pick((slim, wide)), (*paint, 215))
    d.box(38, -6, 62, 12, dice.pick(((140, 40, 50), (60, 56, 60), (210, 170, 80), (60, 110, 200))), corner=2)
    d.box(24.5, 68, 75.5, 104, dice.pick(((250, 246, 232), (240, 214, 150), (236, 236, 240))))
    d.line("34,80 66,80", 4, shade(paint, 0.6))
    d.line("38,91 62,91", 2.4, (120, 110, 104))
    d.line("34,46 33,62", 4, shade(paint, 1.6))


@thing("wine glass", 0.22)
def wine_glass(d: Drawing, paint: Color, dice: Dice) -> None:
    wine, level = dice.pick(((140, 22, 50), (140, 22, 50), (240, 220, 130), (240, 150, 150))), dice.uniform(20, 36)
    with d.within(d.blob("22,0 50,2 78,0 82,28 74,50 50,64 26,50 18,28", (226, 238, 246, 110))):
        d.box(0, level, 100, 80, (*wine, 225), edge=False)
        d.oval(50, level, 34, 4, (*shade(wine, 1.25), 225), edge=False)
    d.line("28,8 26,30 32,46", 3, (248, 252, 255), smooth=True)
    d.line("50,62 50,108", 5, (206, 222, 234), edge=True)
    d.oval(50, 112, 26, 6, (206, 222, 234))


@thing("cup", 0.11, ANY)
def cup(d: Drawing, paint: Color, dice: Dice) -> str | None:
    name, second = contrast(paint, dice, "white yellow blue red")
    pattern = dice.pick(("plain", "plain", "stripes", "dots"))
    d.line("78,28 104,28 106,58 78,66", 10, shade(paint, 0.85), edge=True, smooth=True)
    with d.within(d.poly("8,10 84,10 80,76 72,90 20,90 12,76", paint)):
        d.line("0,34 92,34", 10, second, at="0,0 0,22" if pattern == "stripes" else "")
        for k in range(12) if pattern == "dots" else ():
            d.oval(14 + k % 4 * 20 + k // 4 % 2 * 9, 32 + k // 4 * 20, 5.5, 5.5, second, edge=False)
    d.oval(46, 10, 38, 9, shade(paint, 1.3))
    d.oval(46, 12, 32, 6, dice.pick(((92, 58, 38), (176, 120, 60), (250, 246, 236))), edge=False)
    return None if pattern == "plain" else name


@thing("bowl", 0.2, "white blue red green yellow orange purple pink")
def bowl(d: Drawing, paint: Color, dice: Dice) -> None:
    content = dice.pick(((206, 74, 48), (244, 206, 110), (120, 170, 80), (236, 226, 206), shade(paint, 0.75)))
    d.box(34, 60, 66, 72, shade(paint, 0.8), corner=2)
    d.blob("0,12 100,12 96,38 78,60 62,68 38,68 22,60 4,38", paint)
    d.line("4,36 50,46 96,36", 5, shade(paint, 0.72), smooth=True)
    d.oval(50, 12, 50, 12, shade(paint, 1.25))
    d.oval(50, 13, 43, 8.5, content, edge=False)
    for k in range(7):
        d.oval(20 + k * 10, 12 + (k * 5) % 7 - 2, 5, 2.6, shade(content, 1.3 if k % 2 else 0.8), edge=False)


@thing("apple", 0.08, "red green yellow", turn_deg=15)
def apple(d: Drawing, paint: Color, dice: Dice) -> None:
    d.blob("50,12 68,3 90,10 100,38 93,70 74,94 58,96 50,93 42,96 26,94 7,70 0,38 10,10 32,3", paint)
    d.oval(50, 12, 13, 4.5, shade(paint, 0.7), edge=False)
    d.line("50,15 54,-8", 5, (104, 70, 44))
    d.blob("54,-2 68,-16 88,-14 74,0", _LEAF)
    d.oval(26, 34, 7, 12, shade(paint, 1.5), edge=False, turn_deg=18)


@thing("orange", 0.08, turn_deg=15)
def orange(d: Drawing, paint: Color, dice: Dice) -> None:
    skin = dice.paint("orange")
    d.oval(50, 50, 49, 47, skin)
    for k, (x, y) in enumerate(spread_points(9)):
        d.oval(50 + x * (22 + k % 2 * 12), 52 + y * (22 + k % 2 * 12), 2, 2, shade(skin, 0.8), edge=False)
    d.blob("50,8 60,-6 84,-8 74,6", _LEAF)
    d.oval(50, 9, 6, 3, (96, 120, 54), edge=False)
    d.oval(28, 32, 9, 7, shade(skin, 1.45), edge=False, turn_deg=-35)


@thing("banana", 0.2, "yellow green", turn_deg=180)
def banana(d: Drawing, paint: Color, dice: Dice) -> None:
    peel = paint if paint[0] > 150 else (156, 192, 74)
    for k in range(dice.pick((1, 1, 2, 3)))[::-1]:
        one = Drawing()
        one.blob("0,0 9,-3 16,26 40,52 74,66 104,62 108,69 92,84 58,90 24,70 5,36", shade(peel, 1 - 0.09 * k))
        one.line("10,24 32,56 62,74 96,70", 2.4, shade(peel, 0.72), smooth=True)
        one.line("4,2 5,-8", 7, (122, 98, 50))
        one.oval(105, 65, 4, 4, (88, 66, 40), edge=False)
        d.add(one, turn_deg=-16 * k)


@thing("carrot", 0.18, turn_deg=180)
def carrot(d: Drawing, paint: Color, dice: Dice) -> None:
    skin = dice.paint("orange")
    for a in (-34, 34, -12, 12):
        leaf = Drawing()
        leaf.blob("0,4 -6,-24 0,-42 6,-24", shade(_LEAF, 0.9 + a * 0.004))
        d.add(leaf, turn_deg=a)
    d.blob("-18,6 0,0 18,6 15,36 8,74 1,108 -2,108 -9,74 -16,36", skin)
    d.line("0,0 8,2", 2, shade(skin, 0.72), at="-13,22 4,38 -9,54 2,70")


@thing("pizza", 0.32, turn_deg=180)
def pizza(d: Drawing, paint: Color, dice: Dice) -> None:
    crust, cheese = (206, 146, 76), (250, 208, 98)
    if dice.chance(0.35):  # a slice
        d.poly("0,0 84,0 42,112", cheese)
        d.line("-2,0 42,-7 86,0", 15, crust, edge=True, smooth=True)
        spots = np.array([(24, 22), (58, 26), (40, 52), (43, 80)])
    else:
        d.oval(0, 0, 60, 60, crust)
        d.oval(0, 0, 52, 52, (214, 84, 46), edge=False)
        d.oval(0, 0, 47, 47, cheese, edge=False)
        for end in spread_points(8, 58)[:4]:
            d.line([end, -end], 1.8, shade(crust, 0.7))
        spots = np.concatenate([spread_points(6, 33), [(0, 0)]])
    for k, (x, y) in enumerate(spots):
        d.oval(x, y, 10.5, 10.5, (198, 60, 46))
        d.oval(x - 3, y - 2, 2, 2, (226, 112, 90), edge=False)
        d.oval(x * 0.6 + 10, y * 0.6 + 4, 4, 4, (84, 146, 66) if k % 2 else (60, 52, 50), edge=False)


@thing("donut", 0.1, "pink brown white yellow blue purple", "icing", turn_deg=180)
def donut(d: Drawing, paint: Color, dice: Dice) -> None:
    d.oval(0, 0, 50, 50, (214, 156, 90))
    waves = np.array([1.07, 0.93] * 8)[:, None]
    d.blob(spread_points(16, 43) * waves, paint)
    d.oval(0, 0, 20, 20, (196, 138, 76))
    d.oval(0, 0, 15, 15, None)
    for k, (x, y) in enumerate(spread_points(16, 32) if dice.chance(0.7) else ()):
        x, y = x * (0.84 + k * 7 % 16 * 0.02), y * (0.84 + k * 7 % 16 * 0.02)
        sprinkle = dice.pick((LIGHT, (250, 214, 80), (90, 170, 226), (226, 70, 90), (120, 200, 110)))
        d.line([(x, y), (x + dice.uniform(-5, 5), y + dice.uniform(-5, 5))], 3, sprinkle)


@thing("cake", 0.26, "pink brown white yellow blue green purple", "icing")
def cake(d: Drawing, paint: Color, dice: Dice) -> None:
    d.oval(60, 92, 70, 13, (232, 234, 238))
    side = d.blob(
        "6,40 60,48 114,40 114,84 104,92 60,98 16,92 6,84", dice.pick(((236, 196, 130), (130, 84, 54), (250, 232, 200)))
    )
    with d.within(side):
        d.line("0,66 60,75 120,66", 8, paint, smooth=True)
    d.blob("4,36 116,36 116,56 108,66 100,56 88,70 76,60 62,72 48,60 34,70 22,56 12,66 4,56", paint)
    d.oval(60, 36, 56, 15, shade(paint, 1.22))
    for x in (30, 60, 90):
        d.line([(x, 36), (x, 12)], 5, dice.pick(((90, 160, 226), (240, 90, 100), (250, 206, 80))), edge=True)
        d.blob([(x - 4, 4), (x, -8), (x + 4, 4), (x, 10)], (255, 190, 60))
