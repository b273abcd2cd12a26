"""The parts of a drawn scene: the picture, its segments, and the dialogues."""

from dataclasses import dataclass

import numpy as np

from schemas.categories import COCO_PANOPTIC, Category

Dialogue = tuple[tuple[str, str], ...]
"""A conversation in LLaVA's form: turns of (`human` | `gpt`, text), with `<image>` in the first."""


@dataclass(frozen=True, slots=True)
class SceneSegment:
    """The visible part of one segment of the panoptic map.

    `box_xywh` and `area` are in pixels. `colors` names the one or two colours of a thing, or of its `part` ("shirt") if
    that is not empty. `base_y` is where a thing touches what it is on, None for stuff and things that hang or fly. `on`
    is the id of the segment that bears it, if that can be seen.
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
        return COCO_PANOPTIC.by_category_id[self.category_id]


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn picture with exact annotation.

    `image` is RGB, uint8 [H, W, 3]; `ids` the id of each pixel's segment, int32 [H, W], 0 for none. `place` is one of
    `places.PLACES`, `time` morning, day, evening or night, `weather` clear, cloudy, rainy or snowy (indoors clear).
    """

    image: np.ndarray
    ids: np.ndarray
    segments: tuple[SceneSegment, ...]
    place: str
    time: str
    weather: str
    dialogues: tuple[Dialogue, ...]
