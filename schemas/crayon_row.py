"""The crayon row, version 2: everything known about one image, in one Parquet row.

    image_id, image, width, ...  what the picture is and where it came from
    panoptic_map, segments       what is in it: an indexed PNG whose pixels point into the list of segments
    instructions                 questions and answers derived from the segments
    conversations                dialogues other people wrote about the picture, verbatim

A dialogue about no image is a row of its own: its image and map are null, its lists of segments and instructions empty.

`CRAYON_SCHEMA` is the one definition: the writer is handed it, readers compare a file with it. The classes below mirror
its columns one to one; `CrayonRow.as_record` and `CrayonRow.from_record` go between the two.

Version 1 had no `image_sha256` and no `other_paths`, its classes were COCO's, and every row had an image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa

from schemas.categories import Category

SCHEMA_VERSION = 2
"""Raised when a column changes its name, type or meaning; version 1 can still be read."""

TASKS = ("counting", "class_to_box", "box_to_class", "list_objects", "list_objects_with_boxes", "class_to_binary")

SPLITS = ("train", "validation")

IMAGE_TOKEN = "<image>"
"""Stands for the image in the text of a dialogue."""

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
        pa.field("image_sha256", pa.string()),
        pa.field("image", _IMAGE),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("other_paths", pa.list_(pa.string())),
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

    `category_id` is the number that the class has in its set's source, `label` its position in the set, `category` its
    display name. `box_xyxy` bounds what is visible of it, in pixels of the upright image, edges exclusive at the
    maximum. `numbering` counts the instances of a class, largest first, from 1 to 20; 0 marks what is not numbered:
    crowds, and instances after the 20th. `score` is None for annotated segments.
    """

    id: int
    category_id: int
    label: int
    category: str
    is_thing: bool
    is_crowd: bool
    numbering: int
    box_xyxy: tuple[float, float, float, float]
    area: int
    score: float | None

    @classmethod
    def of(
        cls,
        category: Category,
        id: int,
        box_xyxy: tuple[float, float, float, float],
        area: int,
        numbering: int,
        is_crowd: bool = False,
        score: float | None = None,
    ) -> Self:
        """Make a segment of a class."""
        return cls(
            id=id,
            category_id=category.category_id,
            label=category.label,
            category=category.display_name,
            is_thing=category.is_thing,
            is_crowd=is_crowd,
            numbering=numbering,
            box_xyxy=box_xyxy,
            area=area,
            score=score,
        )

    def as_record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        x_min, y_min, x_max, y_max = record["box_xyxy"]
        return cls(**{**{name: record[name] for name in cls.__slots__}, "box_xyxy": (x_min, y_min, x_max, y_max)})


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
        return cls(**{**{name: record[name] for name in cls.__slots__}, "segment_ids": tuple(record["segment_ids"])})


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation: its id and its (`human` | `gpt`, text) turns, verbatim; a `system` turn may stand first."""

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

    `image_bytes` is None where the data set refers to its images instead of holding them; `image_path` then finds them.
    `other_paths` are those at which the sources had the same bytes again. A dialogue about no image has none of
    `image_sha256`, `image_path`, `width`, `height` and `panoptic_png`.
    """

    image_id: str
    image_sha256: str | None
    image_bytes: bytes | None
    image_path: str | None
    width: int | None
    height: int | None
    sources: tuple[str, ...]
    license_id: int | None
    split: str
    panoptic_png: bytes | None
    segments: tuple[Segment, ...] = field(default=())
    instructions: tuple[Instruction, ...] = field(default=())
    conversations: tuple[Dialogue, ...] = field(default=())
    other_paths: tuple[str, ...] = field(default=())

    @property
    def has_image(self) -> bool:
        return self.panoptic_png is not None

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height of a row that has an image."""
        if self.width is None or self.height is None:
            raise ValueError(f"row {self.image_id} has no image")
        return self.width, self.height

    def as_record(self) -> dict[str, Any]:
        """Return the row as nested plain values, ready for `pyarrow` with `CRAYON_SCHEMA`."""
        image = {"bytes": self.image_bytes, "path": self.image_path} if self.has_image else None
        panoptic_map = {"bytes": self.panoptic_png, "path": f"{self.image_id}.png"} if self.has_image else None
        return {
            "image_id": self.image_id,
            "image_sha256": self.image_sha256,
            "image": image,
            "width": self.width,
            "height": self.height,
            "other_paths": self.other_paths,
            "sources": self.sources,
            "license_id": self.license_id,
            "split": self.split,
            "panoptic_map": panoptic_map,
            "segments": [segment.as_record() for segment in self.segments],
            "instructions": [instruction.as_record() for instruction in self.instructions],
            "conversations": [dialogue.as_record() for dialogue in self.conversations],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Make the row out of one element of `table.to_pylist()`, of version 2 or 1."""
        image, panoptic_map = record["image"] or {}, record["panoptic_map"] or {}
        return cls(
            image_id=record["image_id"],
            image_sha256=record.get("image_sha256"),
            image_bytes=image.get("bytes"),
            # `datasets` drops the path of a picture that it encodes again, as where `map` returns whole rows.
            image_path=record["image_id"] if image.get("path") is None and image.get("bytes") else image.get("path"),
            width=_whole(record["width"]),
            height=_whole(record["height"]),
            sources=tuple(record["sources"]),
            license_id=_whole(record["license_id"]),
            split=record["split"],
            panoptic_png=panoptic_map.get("bytes"),
            segments=tuple(map(Segment.from_record, record["segments"])),
            instructions=tuple(map(Instruction.from_record, record["instructions"])),
            conversations=tuple(map(Dialogue.from_record, record["conversations"])),
            other_paths=tuple(record.get("other_paths") or ()),
        )


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


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
