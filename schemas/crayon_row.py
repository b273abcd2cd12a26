"""The crayon row, version 1: all data about one image, in one Parquet row.

    image, width, height, ...    the picture and its origin
    panoptic_map, segments       an indexed PNG whose pixels point into the list of segments
    instructions                 questions and answers made from the segments
    conversations                dialogues of other data sets about the picture, verbatim

`CRAYON_SCHEMA` is the one definition: writers use it, and readers compare a file with it. The classes below have its
columns as fields; `CrayonRow.as_record` and `CrayonRow.from_record` convert between the two.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa

from schemas.categories import CATEGORIES, Category

SCHEMA_VERSION = 1
"""It grows when a column changes its name, type or meaning; readers refuse other versions."""

TASKS = ("counting", "class_to_box", "box_to_class", "list_objects", "list_objects_with_boxes", "class_to_binary")

SPLITS = ("train", "validation")

METADATA_PREFIX = "collavo."
"""Begins this project's keys in a file's key-value metadata: `collavo.schema_version`, `collavo.segmenters`, ..."""

# `datasets` shows an image for exactly this type and these field names; for any other, `large_binary` too, a dict.
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

_SEGMENT = pa.struct(
    [
        ("id", pa.int32()),
        ("category_id", pa.int32()),
        ("label", pa.int32()),
        ("category", pa.string()),
        ("is_thing", pa.bool_()),
        ("is_crowd", pa.bool_()),
        ("numbering", pa.int32()),
        ("box_xyxy", pa.list_(pa.float32())),
        ("area", pa.int32()),
        ("score", pa.float32()),
    ]
)

_INSTRUCTION = pa.struct(
    [
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("label", pa.string()),
        ("polarity", pa.string()),
        ("segment_ids", pa.list_(pa.int32())),
        ("template_id", pa.string()),
    ]
)

_DIALOGUE = pa.struct(
    [
        ("id", pa.string()),
        ("turns", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
    ]
)

# `datasets` needs a description of image columns only. Lists are left out: its versions below 4 do not know `List`.
_HUGGINGFACE = {"info": {"features": {"image": {"_type": "Image"}, "panoptic_map": {"_type": "Image"}}}}

CRAYON_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", _IMAGE),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sources", pa.list_(pa.string())),
        pa.field("license_id", pa.int32()),
        pa.field("split", pa.string()),
        pa.field("panoptic_map", _IMAGE),
        pa.field("segments", pa.list_(_SEGMENT)),
        pa.field("instructions", pa.list_(_INSTRUCTION)),
        pa.field("conversations", pa.list_(_DIALOGUE)),
    ],
    metadata={"huggingface": json.dumps(_HUGGINGFACE), f"{METADATA_PREFIX}schema_version": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One panoptic segment of an image.

    `box_xyxy` bounds its visible part, in pixels of the upright image; the maximum is exclusive. `numbering` counts the
    instances of a class, largest first, from 1 to 20; it is 0 for crowds and for instances after the 20th. `score` is
    None for annotated segments.
    """

    id: int
    label: int
    box_xyxy: tuple[float, float, float, float]
    area: int
    numbering: int
    is_crowd: bool = False
    score: float | None = None

    @property
    def category(self) -> Category:
        return CATEGORIES[self.label]

    def as_record(self) -> dict[str, Any]:
        category = self.category
        return {
            "id": self.id,
            "category_id": category.category_id,
            "label": self.label,
            "category": category.display_name,
            "is_thing": category.is_thing,
            "is_crowd": self.is_crowd,
            "numbering": self.numbering,
            "box_xyxy": self.box_xyxy,
            "area": self.area,
            "score": self.score,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        x_min, y_min, x_max, y_max = record["box_xyxy"]
        return cls(
            id=record["id"],
            label=record["label"],
            box_xyxy=(x_min, y_min, x_max, y_max),
            area=record["area"],
            numbering=record["numbering"],
            is_crowd=record["is_crowd"],
            score=record["score"],
        )


@dataclass(frozen=True, slots=True)
class Instruction:
    """One templated question about an image with its answer.

    `label` is the answer in the form that evaluation compares ("13", "yes", "person"). `polarity` says whether the
    class of the question is `present` or `absent`. `segment_ids` are the segments that the answer is made from."""

    task: str
    question: str
    answer: str
    label: str | None
    polarity: str | None
    segment_ids: tuple[int, ...]
    template_id: str

    def as_record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(**{**record, "segment_ids": tuple(record["segment_ids"])})


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation in LLaVA's format: its id, and its turns (`human` | `gpt`, text), verbatim."""

    id: str
    turns: tuple[tuple[str, str], ...]

    def as_record(self) -> dict[str, Any]:
        return {"id": self.id, "turns": [{"from": speaker, "value": value} for speaker, value in self.turns]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        return cls(record["id"], tuple((turn["from"], turn["value"]) for turn in record["turns"]))


@dataclass(frozen=True, slots=True)
class CrayonRow:
    """One image with its segments, instructions and dialogues; see `CRAYON_SCHEMA` for the columns.

    `image_bytes` is None if the data set only refers to its images, by `image_path`.
    """

    image_id: str
    image_bytes: bytes | None
    image_path: str
    width: int
    height: int
    sources: tuple[str, ...]
    license_id: int | None
    split: str
    panoptic_png: bytes
    segments: tuple[Segment, ...]
    instructions: tuple[Instruction, ...] = field(default=())
    conversations: tuple[Dialogue, ...] = field(default=())

    def as_record(self) -> dict[str, Any]:
        """Convert the row to nested plain values, for `pyarrow` with `CRAYON_SCHEMA`."""
        return {
            "image_id": self.image_id,
            "image": {"bytes": self.image_bytes, "path": self.image_path},
            "width": self.width,
            "height": self.height,
            "sources": self.sources,
            "license_id": self.license_id,
            "split": self.split,
            "panoptic_map": {"bytes": self.panoptic_png, "path": f"{self.image_id}.png"},
            "segments": [segment.as_record() for segment in self.segments],
            "instructions": [instruction.as_record() for instruction in self.instructions],
            "conversations": [dialogue.as_record() for dialogue in self.conversations],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Make a row of one element of `table.to_pylist()`."""
        return cls(
            image_id=record["image_id"],
            image_bytes=record["image"]["bytes"],
            image_path=record["image"]["path"],
            width=record["width"],
            height=record["height"],
            sources=tuple(record["sources"]),
            license_id=record["license_id"],
            split=record["split"],
            panoptic_png=record["panoptic_map"]["bytes"],
            segments=tuple(map(Segment.from_record, record["segments"])),
            instructions=tuple(map(Instruction.from_record, record["instructions"])),
            conversations=tuple(map(Dialogue.from_record, record["conversations"])),
        )


def metadata_of(facts: Mapping[str, Any]) -> dict[bytes, bytes]:
    """Encode facts of a run (seed, templates, segmenters, ...) as key-value metadata of a file, each value as JSON."""
    return {f"{METADATA_PREFIX}{key}".encode(): json.dumps(value).encode() for key, value in facts.items()}


def file_facts(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Decode the facts that `metadata_of` encoded, from `ParquetFile.metadata.metadata`."""
    return {
        key.decode().removeprefix(METADATA_PREFIX): json.loads(value)
        for key, value in metadata.items()
        if key.startswith(METADATA_PREFIX.encode())
    }
