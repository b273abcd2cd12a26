"""What travels between the steps of the build: small values, and never pixels across a shuffle."""

import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from collavo.errors import Rejected
from collavo.panoptic.maps import PanopticMap
from collavo.segmenters import NoSegmenter
from collavo.sources.coco_panoptic import Annotation
from schemas.crayon_row import CrayonRow, Dialogue

SOURCES = ("crayon", "coco", "scenes", "coco_instances", "llava", "folder", "dataset")
"""Kinds of source. Where several name an image, the first of these gives it its id, path and licence."""

REJECT_REASONS = {
    "list": {
        "several_images": "the entry names or holds several images, a row one; `--image_column` chooses in a tar shard",
        "malformed_entry": "the entry lacks fields or turns that its format demands",
        "turns_do_not_alternate": "human and gpt do not speak in turn, so nobody knows what answers what",
        "duplicate_id": "the COCO file lists the same image, or its annotation, twice",
        "unknown_category": "a category id is not in the file's own `categories`",
        "unknown_image": "the annotation is of an image that its file does not list",
        "missing_value": "a row of `--from_crayon` lacks a value that every row has",
        "bad_value": "a value of a row of `--from_crayon` is none that a row can have",
        "broken_map": "the map of a row of `--from_crayon` does not fit its picture's size or its segments",
        "path_escapes_root": "the path leads out of the folder that it has to stay in",
        "bad_path": "the path names no file, or is not UTF-8 text",
    },
    "merge": {
        "duplicate_entry": "another entry says the same about the same image",
        "other_annotation": "another entry annotates the same image otherwise, and was taken",
    },
    "read": {
        "missing_file": "there is no such file",
        "unreadable_file": "the storage refuses to read the file",
        "not_a_file": "the path names a folder, a pipe or a device",
        "oversized_file": "the file is larger than any image may be",
        "unreachable_url": "the server of an http(s) URL refuses it, does not answer or stays busy",
    },
    "decode": {
        "not_an_image": "the file is in no image format that is read here",
        "broken_image": "the image ends early or its data are damaged",
        "oversized_image": "the image has more pixels than `--max_pixels`; it was not decoded",
    },
    "segment": {
        "no_annotation": "with `--segmenter annotations`, no source annotates this image",
        "missing_file": "there is no such mask",
        "unreadable_file": "the storage refuses to read the mask",
        "not_a_file": "the mask's path names a folder, a pipe or a device",
        "oversized_file": "the mask's file is larger than any mask may be",
        "unreachable_url": "the server of the mask's URL refuses it or does not answer",
        "broken_mask": "the mask is no readable PNG",
        "mask_size_mismatch": "mask and image differ in size",
        "ambiguous_orientation": "EXIF turns the image; its mask fits as stored and as turned; `--mask_frame` decides",
        "unlisted_segment": "pixels of the mask carry an id that the annotation does not list",
        "empty_segment": "the annotation lists a segment that has no pixel",
        "repeated_segment": "the annotation lists an id twice, or lists 0",
        "non_finite_logits": "the network's output is not finite",
        "segmenter_failed": "the network failed on this image; the detail says how",
    },
    "write": {
        "other_annotation": "the same picture lies elsewhere with another annotation, which was taken",
        "damaged_row": "a finished row holds this picture, but is damaged, so that nothing brings its map",
    },
}
"""All reasons why an input makes no row, by the step that finds them. The documentation prints this table."""


UNSEEN = json.dumps(NoSegmenter.facts, sort_keys=True)
"""The segmenter of a picture that none has looked at. No class may be called absent from it."""


class Input(NamedTuple):
    """An entry of a source. It ends either in a row or in the rejects, and the accounts check that."""

    source: str
    entry_id: str


class Reject(NamedTuple):
    """An input that makes no row, as a line of `rejects.jsonl`; stage and reason are keys of `REJECT_REASONS`."""

    id: str
    source: str
    stage: str
    reason: str
    detail: str


class Mention(NamedTuple):
    """An input that names an image, or a dialogue about none, whose `uri` is empty.

    `image_path` is relative to the root of all sources, `uri` is where the file lies, `mask_uri` where the annotation's
    mask lies. `instances` is the JSON text of the image's size that the file states, [width, height] or null, and of
    its instance annotations. `split` is the source's own.
    """

    input: Input
    image_path: str
    uri: str
    license_id: int | None = None
    annotation: Annotation | None = None
    mask_uri: str = ""
    dialogue: Dialogue | None = None
    instances: str = ""
    split: str = ""

    def reject(self, stage: str, reason: str, detail: str) -> Reject:
        """Reject this input."""
        return Reject(self.input.entry_id, self.input.source, stage, reason, detail)


class ImageTask(NamedTuple):
    """An image to make a row of, with all its mentions. The first one gives the row its id and path."""

    mentions: tuple[Mention, ...]

    @property
    def split(self) -> str:
        """The split that a source has put the image in, validation where they disagree; empty where none has."""
        return max(mention.split for mention in self.mentions)

    @property
    def uris(self) -> list[str]:
        """The files named, each once; they differ at most in their extension."""
        return list(dict.fromkeys(mention.uri for mention in self.mentions))

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The inputs that name it."""
        return tuple(mention.input for mention in self.mentions)

    @property
    def dialogues(self) -> tuple[Dialogue, ...]:
        """What was said about it, by any input."""
        return tuple(mention.dialogue for mention in self.mentions if mention.dialogue)

    @property
    def annotated(self) -> Mention | None:
        """The mention that brings an annotation, if any does."""
        panoptic = next((mention for mention in self.mentions if mention.annotation), None)
        return panoptic or next((mention for mention in self.mentions if mention.instances), None)

    def rejects(self, stage: str, error: Rejected, uri: str = "") -> list[Reject]:
        """Reject the image: one line for each input that names it, each with the file at fault, the image's unless
        another is given."""
        uri, detail = uri or self.mentions[0].uri, str(error)
        detail = detail if uri in detail else f"{uri}: {detail}"
        return [mention.reject(stage, error.reason, detail) for mention in self.mentions]


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image that was read and checked; `rgb` is None where its annotation is used and no model sees it."""

    task: ImageTask
    path: str
    """Of the file that was found, relative to the root of all sources."""

    image_bytes: bytes
    size_wh: tuple[int, int]
    """Upright."""

    orientation: int
    """EXIF's, 1 to 8; 1 for an image that is stored upright."""

    rgb: np.ndarray | None
    seconds: dict[str, float]
    mask: bytes | Rejected = b""
    """The file that `mask_uri` of its annotation names, or why it cannot be read."""


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
    """A row without its instructions, the inputs that named it, what segmented it, and the seconds that it took."""

    row: CrayonRow
    inputs: tuple[Input, ...]
    segmenters: tuple[str, ...]
    seconds: dict[str, float]
    unfamiliar: bool = False
    """Whether the segmenter knows no pictures like this one."""

    split_stated: bool = False
    """Whether a source says which split the row is in; otherwise its content decides."""

    @property
    def is_scored(self) -> bool:
        """Whether a network made the map: what it finds has scores."""
        return any(segment.score is not None for segment in self.row.segments)


Packed = tuple[int, bytes]
"""The number of some elements, and all of them pickled as one: a runner spends time and memory on each thing that it
passes on."""


def packed(elements: Sequence[Any]) -> Packed:
    """Make one thing of some elements."""
    return len(elements), zlib.compress(pickle.dumps(elements, protocol=pickle.HIGHEST_PROTOCOL), 1)


def unpacked(pack: Packed) -> Any:
    """Take elements out of what `packed` made. The bytes are this run's own, so that unpickling is safe."""
    return pickle.loads(zlib.decompress(pack[1]))
