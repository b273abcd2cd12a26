"""Drawings of people and animals."""

from collavo.scenes.drawing import DARK, LIGHT, Color, Dice, Drawing, oval_points, shade, spread_points
from collavo.scenes.thing import ANY, thing

_SKINS = ((250, 214, 184), (236, 188, 148), (206, 150, 108), (158, 106, 72), (112, 74, 52))
_HAIRS = ((44, 34, 32), (92, 58, 36), (168, 106, 52), (222, 180, 96), (176, 70, 40), (190, 188, 186))
_CLOTHS = ((52, 70, 116), (70, 66, 74), (120, 96, 72), (92, 112, 140), (58, 88, 74), (140, 66, 70), (212, 200, 176))
_FRINGES = ("-10,12 -8.5,2 0,-1.5 8.5,2 10,12 7,6 -3,5", "-9.5,10 -8,2 0,-1 8,2 9.5,10 6,6 2,7 -6,5")
_ARMS = (((15, 43), (16, 56)), ((16, 42), (10, 54)), ((17, 38), (23, 27)), ((18, 28), (21, 11)))


def _eye(d: Drawing, x: float, y: float, r: float) -> None:
    d.oval(x, y, r, r * 1.15, DARK, edge=False)
    d.oval(x - r * 0.3, y - r * 0.4, r * 0.35, r * 0.35, LIGHT, edge=False)


@thing("person", 1.7, ANY, "shirt")
def person(d: Drawing, paint: Color, dice: Dice) -> None:
    skin, hair, cloth, shoe = dice.pick(_SKINS), dice.pick(_HAIRS), dice.pick(_CLOTHS), dice.pick(_CLOTHS)
    legs = dice.pick(("trousers", "trousers", "shorts", "skirt"))
    stride, long_hair = dice.uniform(5, 10), dice.chance(0.4)
    for side in (-1, 1):
        leg = [(side * 4.5, 56), (side * (stride + 4) / 2, 74), (side * stride, 93)]
        d.line(leg, 8, cloth if legs == "trousers" else skin, edge=True)
        if legs == "shorts":
            d.line(leg[:2], 9.5, cloth, edge=True)
        d.oval(side * (stride + 2), 96, 5.5, 3.4, shoe)
    if long_hair:
        d.blob("-10,8 0,0 10,8 11,24 8,31 -8,31 -11,24", hair)
    if legs == "skirt":
        d.poly("-9,50 9,50 16,74 0,76 -16,74", cloth)
    for side in (-1, 1):
        elbow, hand = dice.pick(_ARMS[: 3 if side < 0 else 4])
        arm = [(side * 10, 30), (side * elbow[0], elbow[1]), (side * hand[0], hand[1])]
        d.line(arm, 5.6, skin, edge=True)
        d.oval(*arm[2], 3.2, 3.2, skin, edge=False)
        d.line(arm[:2], 7, shade(paint, 0.92), edge=True)
    d.line("0,18 0,26", 6.5, shade(skin, 0.85))
    with d.within(d.blob("-10,25.5 0,26.5 10,25.5 12.5,31 10.5,44 11,59 0,61 -11,59 -10.5,44 -12.5,31", paint)):
        for y in range(32, 60, 9) if dice.chance(0.25) else ():
            d.line([(-14, y), (14, y)], 3.6, shade(paint, 1.55 if sum(paint) < 500 else 0.7))
    d.oval(0, 12, 9, 10.5, skin)
    d.blob(dice.pick(_FRINGES), hair)
    d.oval(0, 12.5, 1.2, 1.5, DARK, edge=False, at="-3.4,0 3.4,0")
    d.line("-3,17 0,18.2 3,17", 1.1, shade(skin, 0.55), smooth=True)


def _bird(d: Drawing, paint: Color, wing: str) -> None:
    d.poly("16,40 -14,34 -18,46 -10,54 20,58", shade(paint, 0.72))
    d.blob("8,46 28,34 52,30 70,20 86,16 98,26 96,42 84,58 62,72 36,70 18,60", paint)
    d.blob("46,66 66,66 84,50 92,40 84,44 62,54", shade(paint, 1.6 if sum(paint) < 560 else 0.85), edge=False)
    d.blob(wing, shade(paint, 0.72))
    d.poly("96,24 118,31 97,36", (240, 168, 44))
    _eye(d, 85, 27, 4)


@thing("bird", 0.3, "red blue yellow black white brown grey green", turn_deg=6)
def bird(d: Drawing, paint: Color, dice: Dice) -> None:
    d.line("46,66 47,86 54,86", 3, (196, 126, 48), at="0,0 10,0")
    _bird(d, paint, "20,48 40,38 62,42 54,58 34,64 4,58")


@thing("flying bird", 0.35, "red blue yellow black white brown grey green", turn_deg=20, category="bird")
def flying_bird(d: Drawing, paint: Color, dice: Dice) -> None:
    d.blob("34,42 30,14 12,-16 46,2 62,38", shade(paint, 0.6))
    _bird(d, paint, "36,50 26,86 4,112 40,100 66,52")


@thing("cat", 0.45, "orange black white grey brown")
def cat(d: Drawing, paint: Color, dice: Dice) -> None:
    dark, pale = shade(paint, 0.7), shade(paint, 1.5)
    d.line("66,88 92,90 104,72 94,54 98,42", 9, dark, edge=True, smooth=True)
    with d.within(d.blob("22,98 18,80 28,54 50,42 72,54 82,80 78,98", paint)):
        for y in (60, 72, 84) if dice.chance(0.6) else ():
            d.line([(14, y), (32, y + 4)], 4, dark)
            d.line([(86, y), (68, y + 4)], 4, dark)
    d.blob("40,70 50,62 60,70 58,96 42,96", pale, edge=False)
    for side in (-1, 1):
        d.oval(50 + side * 10, 95, 9, 6, pale)
        d.poly([(50 + side * 29, 20), (50 + side * 28, -12), (50 + side * 6, 4)], paint)
        d.poly([(50 + side * 25, 10), (50 + side * 25, -4), (50 + side * 13, 4)], (236, 160, 160), edge=False)
    d.blob("18,26 28,6 50,2 72,6 82,26 70,46 50,50 30,46", paint)
    d.oval(50, 38, 13, 9, pale, edge=False)
    for side in (-1, 1):
        d.oval(50 + side * 13, 25, 6, 6.5, (190, 206, 92), edge=False)
        d.oval(50 + side * 13, 25, 2.2, 5.5, DARK, edge=False)
        for y in (34, 40):
            d.line([(50 + side * 12, 37), (50 + side * 37, y)], 1, dark)
    d.poly("46,33 54,33 50,38", (214, 110, 120), edge=False)


@thing("dog", 0.8, "brown black white grey orange")
def dog(d: Drawing, paint: Color, dice: Dice) -> None:
    dark, pale = shade(paint, 0.66), shade(paint, 1.35)
    d.line(dice.pick(("16,44 4,34 0,18", "16,44 2,46 -6,36")), 7, paint, edge=True, smooth=True)
    d.line("26,60 27,92", 9, shade(paint, 0.75), edge=True, at="0,0 48,0")
    with d.within(d.blob("12,48 22,38 50,38 76,34 88,46 84,62 66,68 40,66 20,68 12,60", paint)):
        d.oval(38, 44, 15, 12, dark if dice.chance(0.4) else paint, edge=False)
    for x in (18, 66):
        d.line([(x + 2, 58), (x, 92)], 10, paint, edge=True)
        d.oval(x + 3, 94, 7.5, 4.5, pale)
    d.line("72,46 82,28", 18, paint, edge=True)
    d.blob("72,20 78,4 94,0 106,8 124,16 126,26 112,34 94,34 80,32", paint)
    d.blob("106,20 120,16 127,22 120,31 106,31", pale, edge=False)
    d.oval(124, 17, 5, 4, DARK, edge=False)
    d.blob("108,31 117,30 116,42 110,43", (226, 104, 118))
    _eye(d, 99, 13, 3.6)
    d.blob("76,6 86,0 92,10 88,32 78,38 72,26", dark)
    d.line("70,38 88,44", 6, dice.pick(((206, 52, 48), (52, 100, 190), (58, 150, 90))))


@thing("cow", 2.2, "white brown black")
def cow(d: Drawing, paint: Color, dice: Dice) -> str:
    name, patch = ("black", (60, 50, 50)) if sum(paint) > 400 else ("white", (236, 230, 222))
    d.line("6,36 -4,44 -4,66", 3.5, paint, edge=True)
    d.oval(-4, 68, 4, 6, patch)
    d.oval(34, 62, 10, 7, (238, 170, 170))
    d.line("25,54 24,72 27,92", 10, shade(paint, 0.75), edge=True, at="0,0 54,0")
    with d.within(d.blob("4,38 14,30 40,34 68,30 86,32 92,46 84,60 60,64 36,62 18,64 6,54", paint)):
        for x, y in ((24, 38), (52, 50), (74, 34)):
            d.oval(x + dice.uniform(-5, 5), y, dice.uniform(9, 14), dice.uniform(7, 12), patch, edge=False)
    for x in (12, 82):
        d.line([(x, 50), (x - 1, 74), (x, 93)], 11, paint)
        d.line([(x, 90), (x, 94)], 12, (70, 60, 56))
    for side in (-1, 1):
        d.line([(100 + side * 12, 16), (100 + side * 18, 10), (100 + side * 17, 0)], 4, (226, 214, 186), edge=True)
        d.oval(100 + side * 19, 20, 9, 5, patch, turn_deg=side * 14)
    d.blob("88,18 100,12 112,18 112,36 109,52 100,56 91,52 88,36", paint)
    d.oval(100, 48, 12, 9, (240, 180, 176))
    for side in (-1, 1):
        d.oval(100 + side * 4, 48, 1.8, 2.6, DARK, edge=False)
        _eye(d, 100 + side * 6, 28, 2.8)
    return name


@thing("sheep", 1.1, "white black brown grey")
def sheep(d: Drawing, paint: Color, dice: Dice) -> None:
    face = (62, 54, 54) if sum(paint) > 330 else (226, 214, 200)
    d.line("0,64 0,94", 7, face, edge=True, at="26,0 38,0 64,0 76,0")
    fleece = spread_points(13, start_deg=0) * (40, 24) + (50, 44)
    d.oval(0, 0, 12, 12, paint, at=fleece)
    d.oval(50, 44, 44, 28, paint, edge=False)
    for x, y in fleece[::2]:
        d.line(oval_points(x * 0.62 + 19, y * 0.55 + 20, 8, 7, 20, 160), 1.6, shade(paint, 0.8))
    for side in (-1, 1):
        d.oval(92 + side * 15, 28, 9, 4.5, face, turn_deg=side * 22)
    d.blob("80,24 92,16 104,24 102,42 97,54 87,54 82,42", face)
    d.blob("78,22 84,10 92,14 100,10 106,22 98,26 86,26", paint)
    d.oval(87, 34, 3, 3, LIGHT if sum(face) < 400 else DARK, edge=False, at="0,0 10,0")
    d.oval(87, 34, 1.5, 1.8, DARK, edge=False, at="0,0 10,0")
