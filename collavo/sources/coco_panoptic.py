"""Read COCO's panoptic annotation files as streams.

The files exceed 300 MB, so only their image list (file name and licence by id) is held in memory.

Source: the COCO panoptic data format, https://cocodataset.org/#format-data.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.errors import Rejected, UserError
from collavo.panoptic.maps import SegmentInfo
from collavo.sources import fault_in_json
from schemas.categories import BY_CATEGORY_ID


class Annotation(NamedTuple):
    """An image's panoptic annotation, in a compact form."""

    mask_name: str
    """Path of the PNG below the folder of masks."""

    segments: tuple[tuple[int, int, int], ...]
    """(id, category_id, iscrowd) of each."""


class AnnotatedImage(NamedTuple):
    """An image of a COCO panoptic file; `annotation` is None if the file has none for it."""

    entry_id: str
    file_name: str
    license_id: int | None
    annotation: Annotation | None


def stream_annotated_images(file: BinaryIO) -> Iterator[AnnotatedImage | Rejected]:
    """Yield all images of a COCO panoptic file, annotated ones first; an unusable entry becomes a `Rejected`.

    Args:
        file: open and seekable; first the image list is read, then the annotations.

    Raises:
        UserError: if the file is not JSON to its end, or not of the panoptic format.
    """
    try:
        images: dict[int, tuple[str, int | None]] = {}
        for image in ijson.items(file, "images.item", use_float=True):
            if not isinstance(image["file_name"], str):
                raise UserError(f"image {image['id']} should have a text 'file_name'")
            if image["id"] in images:
                detail = f"'images' lists the id again, for {image['file_name']}"
                yield Rejected("duplicate_id", detail, str(image["id"]))
            else:
                license_id = image.get("license")
                images[image["id"]] = (image["file_name"], license_id if isinstance(license_id, int) else None)
        if not images:
            raise UserError("it lists no 'images'")
        file.seek(0)
        annotated = set()
        for record in ijson.items(file, "annotations.item", use_float=True):
            image_id = record["image_id"]
            if "segments_info" not in record:
                raise UserError("its annotations have no 'segments_info', so it is not panoptic")
            if image_id not in images:
                yield Rejected("unknown_image", "an annotation of an image not in 'images'", str(image_id))
            elif image_id in annotated:
                yield Rejected("duplicate_id", "a second annotation of the same image", str(image_id))
            else:
                annotated.add(image_id)
                yield AnnotatedImage(str(image_id), *images[image_id], _annotation(record))
    except (ijson.JSONError, KeyError, TypeError) as error:
        raise UserError(f"not COCO panoptic JSON to its end ({fault_in_json(error)})") from error
    for image_id, (file_name, license_id) in images.items():
        if image_id not in annotated:
            yield AnnotatedImage(str(image_id), file_name, license_id, None)


def segment_infos(segments: Sequence[tuple[int, int, int]]) -> list[SegmentInfo]:
    """Look up the labels of an `Annotation`'s segments.

    Raises:
        Rejected: `unknown_category` for a category id that is not one of COCO's 133.
    """
    infos = []
    for id_, category_id, is_crowd in segments:
        category = BY_CATEGORY_ID.get(category_id)
        if category is None:
            raise Rejected("unknown_category", f"category_id {category_id} is not one of COCO panoptic's 133")
        infos.append(SegmentInfo(id_, category.label, bool(is_crowd)))
    return infos


def _annotation(record: Mapping[str, Any]) -> Annotation:
    segments = tuple((s["id"], s["category_id"], s.get("iscrowd", 0)) for s in record["segments_info"])
    if not isinstance(record["file_name"], str) or not all(isinstance(n, int) for segment in segments for n in segment):
        expected = "a text 'file_name', and whole numbers 'id', 'category_id' and 'iscrowd' of every segment"
        raise UserError(f"the annotation of image {record['image_id']} should have {expected}")
    return Annotation(record["file_name"], segments)
