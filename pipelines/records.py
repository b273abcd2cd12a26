"""What travels between the steps of the build: small values, and never pixels across a shuffle."""

import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from collavo.panoptic.maps import PanopticMap
from collavo.sources.coco_panoptic import Annotation
from collavo.sources.image_paths import without_extension
from schemas.crayon_row import CrayonRow, Dialogue

SOURCES = ("coco", "scenes", "llava", "folder", "crayon")
"""Kinds of source, in the order in which they give an image its id, path and licence."""


class Input(NamedTuple):
    """One entry of one source: it ends in a row or in the rejects, and the accounts say so."""

    source: str
    entry_id: str


class Reject(NamedTuple):
    """An input that makes no row: one line of `rejects.jsonl`."""

    id: str
    source: str
    stage: str
    reason: str
    detail: str


class Mention(NamedTuple):
    """An input that names an image.

    `image_path` is relative to the source's root; `uri` finds the file; `mask_uri` the mask of the annotation.
    """

    input: Input
    image_path: str
    uri: str
    license_id: int | None = None
    annotation: Annotation | None = None
    mask_uri: str = ""
    dialogue: Dialogue | None = None

    def reject(self, stage: str, reason: str, detail: str) -> Reject:
        return Reject(self.input.entry_id, self.input.source, stage, reason, detail)


class ImageTask(NamedTuple):
    """One image to make a row of: all its mentions, the one that gives id and path first."""

    mentions: tuple[Mention, ...]

    @property
    def image_id(self) -> str:
        return without_extension(self.mentions[0].image_path)

    @property
    def uris(self) -> list[str]:
        """The files named, without repetition; they differ in their extension at most."""
        return list(dict.fromkeys(mention.uri for mention in self.mentions))

    @property
    def annotated(self) -> Mention | None:
        return next((mention for mention in self.mentions if mention.annotation), None)

    def rejects(self, stage: str, reason: str, detail: str) -> list[Reject]:
        """One line per mention."""
        return [mention.reject(stage, reason, detail) for mention in self.mentions]


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image read and checked; `rgb` is None where its annotation says all."""

    task: ImageTask
    uri: str
    image_bytes: bytes
    size_wh: tuple[int, int]
    rgb: np.ndarray | None
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class SegmentedImage:
    """An image with its panoptic map."""

    image: LoadedImage
    panoptic: PanopticMap
    segmenter: str
    """What made the map, as the JSON text of `Segmenter.facts`."""


Segmented = SegmentedImage | list[Reject]
"""An image with its map, or the reject lines of all its inputs."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A row that lacks only its instructions, with who named it, what segmented it and what its steps cost."""

    row: CrayonRow
    uri: str
    inputs: tuple[Input, ...]
    segmenters: tuple[str, ...]
    seconds: dict[str, float]


Batch = tuple[int, bytes]
"""Some elements in one, and their number: a runner spends time and memory on each thing that it passes on."""


def packed(elements: Sequence[Any]) -> Batch:
    return len(elements), zlib.compress(pickle.dumps(elements, protocol=pickle.HIGHEST_PROTOCOL), 1)


def unpacked(batch: Batch) -> Any:
    """Back from `packed`; the bytes are of this very run."""
    return pickle.loads(zlib.decompress(batch[1]))
