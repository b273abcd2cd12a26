"""The canvas of a scene: its size, its light, and the layers that are painted from back to front."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from collavo.scenes.drawing import Color, Dice, Drawing, Sprite, rasterize
from collavo.scenes.thing import Thing
from schemas.categories import COCO_PANOPTIC, Category

_SKIES: dict[str, tuple[Color, Color]] = {
    "morning": ((126, 172, 226), (255, 212, 184)),
    "day": ((84, 156, 230), (202, 230, 248)),
    "evening": ((104, 96, 170), (255, 158, 92)),
    "night": ((30, 40, 96), (70, 84, 146)),
}
_TINTS = {"morning": (255, 238, 226), "day": (255, 255, 255), "evening": (255, 222, 190), "night": (158, 168, 214)}


@dataclass(frozen=True, slots=True)
class Light:
    """`side` is 1 if the light comes from the left, -1 if from the right."""

    time: str
    weather: str
    side: int
    indoors: bool

    @property
    def sky(self) -> tuple[Color, Color]:
        """Return the sky's colours at the top and at the horizon."""
        top, bottom = _SKIES[self.time]
        if self.weather == "clear":
            return top, bottom
        grey = ((44, 50, 72), (84, 90, 110)) if self.time == "night" else ((150, 160, 174), (208, 213, 220))
        return _between(top, grey[0], 0.66), _between(bottom, grey[1], 0.66)

    @property
    def tint(self) -> Color:
        """Return the colour that white has at this hour."""
        if self.indoors:
            return (255, 236, 204) if self.time == "night" else (255, 255, 255)
        return _between((0, 0, 0), _TINTS[self.time], 1 if self.weather == "clear" else 0.93)

    @property
    def is_hard(self) -> bool:
        """Tell whether things cast long shadows."""
        return not self.indoors and self.weather == "clear" and self.time != "night"


def _between(a: Color, b: Color, share: float) -> Color:
    return tuple(int(x + (y - x) * share) for x, y in zip(a, b, strict=True))


@dataclass(slots=True, eq=False)
class Layer:
    """A sprite with its top left corner at (x, y). Layers of greater depth are nearer and hide the others.

    `thing` is None for stuff. `base_y` is where a thing touches the ground, None if it hangs, flies or sits on another
    thing. `on` is the ground's category, or the thing, that bears it.
    """

    sprite: Sprite
    x: int
    y: int
    depth: float
    category: Category
    thing: Thing | None = None
    colors: tuple[str, ...] = ()
    is_crowd: bool = False
    base_y: int | None = None
    on: "Category | Layer | None" = None


@dataclass(frozen=True, slots=True)
class Surface:
    """A region in which some kinds of things may be put.

    `box_xyxy` bounds their lowest points (their centres if they hang or fly), in fractions of the frame. A thing of one
    metre has the size `far` at its top and `near` at its bottom, in short sides of the frame.
    """

    category: Category
    things: tuple[str, ...]
    box_xyxy: tuple[float, float, float, float]
    far: float
    near: float
    hangs: bool


@dataclass
class Canvas:
    size_wh: tuple[int, int]
    dice: Dice
    light: Light
    layers: list[Layer] = field(default_factory=list)
    surfaces: list[Surface] = field(default_factory=list)

    @property
    def unit(self) -> int:
        """Return the short side in pixels; all sizes are fractions of it."""
        return min(self.size_wh)

    def cover(self, name: str, top_px: np.ndarray | float, picture: Image.Image) -> None:
        """Fill what lies below the line `top_px` (one height, or one for each column) with stuff."""
        width, height = self.size_wh
        line = np.broadcast_to(np.asarray(top_px, np.float64), (width,))
        y = max(0, int(line.min()))
        covered, edge = np.full((height - y, width), 255, np.uint8), np.arange(y, min(height, int(line.max()) + 1))
        covered[: len(edge)] = np.clip(edge[:, None] + 1 - line, 0, 1) * 255 + 0.5
        picture = picture.crop((0, 0, width, height - y))
        picture.putalpha(Image.fromarray(covered))
        self._append(name, Sprite(picture, covered >= 128), 0, y)

    def stand(self, name: str, drawing: Drawing, x: float, y: float, span: float) -> Layer:
        """Put a drawing of stuff on (x, y), in fractions of the frame; `span` is in short sides."""
        sprite = rasterize(drawing, span * self.unit, light=self.light.side, relief=0.5)
        w, h = sprite.picture.size
        return self._append(name, sprite, round(x * self.size_wh[0] - w / 2), round(y * self.size_wh[1]) - h)

    def _append(self, name: str, sprite: Sprite, x: int, y: int) -> Layer:
        self.layers.append(Layer(sprite, x, y, len(self.layers) - 1000, COCO_PANOPTIC.by_display_name[name]))
        return self.layers[-1]

    def surface(
        self,
        name: str,
        things: str,
        box_xyxy: tuple[float, float, float, float],
        far: float,
        near: float,
        hangs: bool = False,
        weight: int = 4,
    ) -> None:
        """Offer room to things (names with ", " between them); more `weight` brings more of them here."""
        surface = Surface(COCO_PANOPTIC.by_display_name[name], tuple(things.split(", ")), box_xyxy, far, near, hangs)
        self.surfaces += [surface] * weight

    def owners(self, layers: list[Layer]) -> np.ndarray:
        """Return the layer that each pixel belongs to: int32 [H, W], its position in `layers` + 1, or 0."""
        owners = np.zeros(self.size_wh[::-1], np.int32)
        for position, layer in enumerate(layers, 1):
            x, y = max(0, layer.x), max(0, layer.y)
            mask = layer.sprite.mask[y - layer.y :, x - layer.x :]
            seen = owners[y : y + mask.shape[0], x : x + mask.shape[1]]
            seen[mask[: seen.shape[0], : seen.shape[1]]] = position
        return owners

    def painted(self, layers: list[Layer]) -> Image.Image:
        """Paint the layers from back to front, with shadows under the things that stand."""
        frame = Image.new("RGB", self.size_wh)
        for layer in layers:
            if layer.base_y is not None:
                _cast_shadow(frame, layer, self.light)
            frame.paste(layer.sprite.picture, (layer.x, layer.y), layer.sprite.picture)
        return frame


def _cast_shadow(frame: Image.Image, layer: Layer, light: Light) -> None:
    """Lay the silhouette on the ground, away from the light: squeezed, sheared row by row and blurred."""
    w, h = layer.sprite.picture.size
    lean, squeeze, strength, blur = (0.5, 0.26, 100, 0.02) if light.is_hard else (0.12, 0.12, 84, 0.04)
    rows, shift, pad = max(2, round(h * squeeze)), round(h * lean), 2 + round(max(w, h) * blur * 2)
    flat = np.asarray(layer.sprite.picture.getchannel(3).resize((w, rows), Image.Resampling.BOX))
    shadow = np.zeros((rows + 2 * pad, w + shift + 2 * pad), np.uint8)
    for row in range(rows):
        away = pad + shift * (rows - row if light.side > 0 else row) // rows
        shadow[pad + row, away : away + w] = flat[row]
    soft = Image.fromarray(shadow).filter(ImageFilter.GaussianBlur(max(w, h) * blur))
    kept = soft.point([255 - value * strength // 255 for value in range(256)])
    x, y = layer.x - pad - (shift if light.side < 0 else 0), layer.y + h - rows - pad + round(0.02 * h)
    box = (x, y, x + kept.width, y + kept.height)
    frame.paste(ImageChops.multiply(frame.crop(box), Image.merge("RGB", (kept,) * 3)), box[:2])
