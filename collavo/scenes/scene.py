"""What a drawn scene is: the picture, its segments, and what is known about them."""

from dataclasses import dataclass

import numpy as np

from schemas.categories import BY_CATEGORY_ID, Category

Dialogue = tuple[tuple[str, str], ...]
"""A conversation: (`human` | `gpt`, text) turns in LLaVA's manner, `<image>` in the first."""


@dataclass(frozen=True, slots=True)
class SceneSegment:
    """One segment of the panoptic map, by what is visible of it.

    `box_xywh` and `area` are in pixels. `colors` names the colour or the two colours of a thing, or of its `part`
    ("shirt") where that is not empty. `base_y` is the height where a thing touches what it is on, None for what hangs
    or flies and for stuff; `on` is the id of the segment that bears it, where that can be seen.
    """

    id: int
    category_id: int
    is_crowd: bool
    box_xywh: tuple[int, int, int, int]
    area: int
    colors: tuple[str, ...]
    part: str
    base_y: int | None
    on: int | None

    @property
    def category(self) -> Category:
        return BY_CATEGORY_ID[self.category_id]


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn picture with exact annotation.

    `image` uint8 [H, W, 3] RGB; `ids` int32 [H, W], the id of the segment of each pixel, 0 where there is none.
    `time` is morning, day, evening or night; `weather` clear, cloudy, rainy or snowy (clear indoors).
    """

    image: np.ndarray
    ids: np.ndarray
    segments: tuple[SceneSegment, ...]
    place: str
    time: str
    weather: str
    dialogues: tuple[Dialogue, ...]
