"""Prepares one row for the report: pictures as data URIs, segments with their colours and labels."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from collavo.errors import Rejected
from collavo.images import decode_rgb
from collavo.panoptic.colors import crayon_color, segment_palette
from collavo.panoptic.index_png import decode_index_map
from schemas.categories import Category, CategorySet
from schemas.crayon_row import CrayonRow, Dialogue, Instruction, Segment

_MAX_SEGMENTS, _MAX_INSTRUCTIONS, _MAX_DIALOGUES = 60, 24, 3

_THUMBNAIL_SIDE_PX = 512
"""Longer side of the pictures, enough for half a window's width."""


class ShownSegment(NamedTuple):
    """A segment with its position in the row, its crayon colour, and the colour of text upon that.

    `anchor_xy` is where its label stands on the map: a pixel of the segment near its centre, as fractions of the image;
    None if the map does not show it.
    """

    position: int
    segment: Segment
    color: str
    ink: str
    anchor_xy: tuple[float, float] | None


class ShownInstruction(NamedTuple):
    """An instruction, and the positions in the list of segments of those that it rests on."""

    instruction: Instruction
    rests_on: list[int]


class Sample(NamedTuple):
    """A row, without its pictures, and where it lies. A picture that cannot be shown is None; then its fault says why,
    unless the row has no picture."""

    place: str
    row: CrayonRow
    image: str | None
    image_fault: str
    crayon_map: str | None
    map_fault: str
    segments: list[ShownSegment]
    instructions: list[tuple[str, list[ShownInstruction]]]
    """By task."""

    dialogues: tuple[Dialogue, ...]


def make_sample(place: str, row: CrayonRow, categories: CategorySet) -> Sample:
    """Make what the report shows of a row; its size is bounded whatever the row holds."""
    segments = row.segments[:_MAX_SEGMENTS]
    image, image_fault = _image(row) if row.has_image else (None, "")
    crayon_map, map_fault = None, ""
    anchors_xy: dict[int, tuple[float, float]] = {}
    try:
        if row.panoptic_png is not None:
            index_map = np.asarray(_thumbnail(decode_index_map(row.panoptic_png), Image.Resampling.NEAREST))
            palette = np.array(segment_palette(row.segments, categories), dtype=np.uint8)
            crayon_map = _data_uri(Image.fromarray(palette[index_map]), "png", compress_level=1)
            anchors_xy = _anchors_xy(index_map)
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged data
        map_fault = f"The map cannot be decoded ({type(error).__name__})"
    return Sample(
        place=place,
        row=replace(row, image_bytes=None, panoptic_png=row.panoptic_png and b""),
        image=image,
        image_fault=image_fault,
        crayon_map=crayon_map,
        map_fault=map_fault,
        segments=[
            _shown(position, segment, categories[segment.label], anchors_xy.get(position + 1))
            for position, segment in enumerate(segments)
        ],
        instructions=_by_task(row.instructions[:_MAX_INSTRUCTIONS], segments),
        dialogues=row.conversations[:_MAX_DIALOGUES],
    )


def _image(row: CrayonRow) -> tuple[str | None, str]:
    if row.image_bytes is None:
        return None, f"Not in the data set, which refers to it as {row.image_path}"
    try:
        rgb = decode_rgb(row.image_bytes)
    except Rejected as error:
        return None, f"The image cannot be decoded: {error}"
    return _data_uri(_thumbnail(rgb, Image.Resampling.LANCZOS), "webp", quality=75, method=1), ""


def _shown(position: int, segment: Segment, category: Category, anchor_xy: tuple[float, float] | None) -> ShownSegment:
    red, green, blue = color = crayon_color(category, segment.numbering)
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return ShownSegment(position, segment, css_color(color), "#000" if is_light else "#fff", anchor_xy)


def _by_task(
    instructions: Sequence[Instruction], segments: Sequence[Segment]
) -> list[tuple[str, list[ShownInstruction]]]:
    positions = {segment.id: position for position, segment in enumerate(segments)}
    shown = [ShownInstruction(i, [positions[id_] for id_ in i.segment_ids if id_ in positions]) for i in instructions]
    return [(task, list(group)) for task, group in groupby(shown, key=lambda entry: entry.instruction.task)]


def _anchors_xy(index_map: np.ndarray) -> dict[int, tuple[float, float]]:
    """Find for each value in a map the pixel nearest to the mean of its pixels, as fractions of the map's sides."""
    height, width = index_map.shape
    values = index_map.ravel()
    y, x = np.divmod(np.arange(values.size), width)
    counts = np.maximum(np.bincount(values), 1)
    y_mean, x_mean = np.bincount(values, y) / counts, np.bincount(values, x) / counts
    distances = (y - y_mean[values]) ** 2 + (x - x_mean[values]) ** 2
    least = np.full(len(counts), np.inf)
    np.minimum.at(least, values, distances)
    candidates = np.flatnonzero(distances == least[values])
    found, first = np.unique(values[candidates], return_index=True)
    nearest = candidates[first]
    x_shares, y_shares = (x[nearest] + 0.5) / width, (y[nearest] + 0.5) / height
    return dict(zip(found.tolist(), zip(x_shares.tolist(), y_shares.tolist(), strict=True), strict=True))


def _thumbnail(pixels: np.ndarray, resample: Image.Resampling) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_SIDE_PX, _THUMBNAIL_SIDE_PX), resample)
    return image


def _data_uri(image: Image.Image, encoding: str, **options: Any) -> str:
    encoded = io.BytesIO()
    image.save(encoded, encoding, **options)
    return f"data:image/{encoding};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def css_color(color_rgb: tuple[int, int, int]) -> str:
    """Write an RGB colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*color_rgb)
