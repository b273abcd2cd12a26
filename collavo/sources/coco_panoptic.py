"""Read COCO's panoptic annotation files as streams, and the list of images that all of COCO's files have.

The files exceed 300 MB, so only their image list (file name and licence by id) is held in memory.

Source: the COCO panoptic data format, https://cocodataset.org/#format-data.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.errors import Rejected, UserError
from collavo.panoptic.maps import SegmentInfo
from collavo.sources import MAX_ID, crowd_of, fault_in_json, image_key, whole_id


class Annotation(NamedTuple):
    """An image's panoptic annotation, in a compact form."""

    mask_name: str
    """Path of the PNG below the folder of masks."""

    segments: tuple[tuple[int, int, int], ...]
    """(id, label, iscrowd) of each."""


class AnnotatedImage(NamedTuple):
    """An image of a COCO file.

    Of a panoptic file, `annotation` is None where it has none for the image. Of an instance file, `instances` is JSON
    text of a list of `[id, label, iscrowd, segmentation]`, as compact as it can be passed around, and None where the
    image has none. `size_wh` is what the file says of the image's size.
    """

    entry_id: str
    file_name: str
    license_id: int | None
    size_wh: tuple[int, int] | None
    annotation: Annotation | None = None
    instances: str | None = None


def stream_annotated_images(
    file: BinaryIO, name: str, labels: Mapping[int, int]
) -> Iterator[AnnotatedImage | Rejected]:
    """Yield all images of a COCO panoptic file, annotated ones first; an unusable entry comes as the error that says
    why.

    Args:
        file: open, seekable, plain UTF-8 (see `collavo.sources.json_files.open_json`); the image list and the
            annotations are read one after the other.
        name: its path, for messages.
        labels: the label of each category id of the file, see `collavo.categories.labels_by_id`.

    Raises:
        UserError: if the file is not JSON to its end, or not of the panoptic format.
    """
    try:
        images = yield from listed_images(file, name)
        annotated = set()
        for record in ijson.items(file, "annotations.item", use_float=True):
            if "segments_info" not in record:
                kind = "; --coco_instances reads such a file" if "segmentation" in record else ""
                raise UserError(f"{name}: its annotations have no 'segments_info', so it is not panoptic{kind}")
            image_id = image_key(record.get("image_id"))
            entry_id = str(record.get("image_id"))
            if image_id is None or image_id not in images:
                yield Rejected("unknown_image", "an annotation of an image not in 'images'", entry_id)
            elif image_id in annotated:
                yield Rejected("duplicate_id", "a second annotation of the same image", entry_id)
            else:
                annotated.add(image_id)
                annotation = _annotation(record, labels)
                if isinstance(annotation, Rejected):
                    yield annotation
                else:
                    yield images[image_id]._replace(annotation=annotation)
    except (ijson.JSONError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: not COCO panoptic JSON to its end ({fault_in_json(error)})") from error
    for image_id, image in images.items():
        if image_id not in annotated:
            yield image


def listed_images(file: BinaryIO, name: str) -> Generator[Rejected, None, dict[str, AnnotatedImage]]:
    """Read the images that a COCO file lists, by their key, and yield what is wrong with others; the file is at its
    beginning afterwards.

    Raises:
        UserError: if it lists none that can be used.
    """
    images: dict[str, AnnotatedImage] = {}
    fault = "it lists no 'images'"
    for record in ijson.items(file, "images.item", use_float=True):
        if "neg_category_ids" in record:
            raise UserError(
                f"{name}: LVIS annotates only some of an image's objects ('neg_category_ids'), so counts, and what an "
                "image does not show, would be wrong; such files cannot be used"
            )
        image_id, file_name = image_key(record.get("id")), record.get("file_name")
        if image_id is None or not isinstance(file_name, str):
            fault = f"an image needs 'id' and 'file_name', found {str(record)[:80]}"
            yield Rejected("malformed_entry", fault)
        elif image_id in images:
            yield Rejected("duplicate_id", f"'images' lists the id again, for {file_name}", image_id)
        else:
            license_id, width, height = (whole_id(record.get(key)) for key in ("license", "width", "height"))
            size_wh = (width, height) if width and height else None
            license_id = license_id if 0 <= (license_id or 0) <= MAX_ID else None
            images[image_id] = AnnotatedImage(image_id, file_name, license_id, size_wh)
    if not images:
        raise UserError(f"{name}: {fault}")
    file.seek(0)
    return images


def segment_infos(segments: Sequence[tuple[int, int, int]]) -> list[SegmentInfo]:
    """Return the segments of an `Annotation`."""
    return [SegmentInfo(id_, label, bool(is_crowd)) for id_, label, is_crowd in segments]


def _annotation(record: Mapping[str, Any], labels: Mapping[int, int]) -> Annotation | Rejected:
    listed = record["segments_info"] if isinstance(record["segments_info"], list) else [None]
    segments = [_segment(segment) for segment in listed]
    if not isinstance(record.get("file_name"), str) or None in segments:
        wrong = next((s for s, parsed in zip(listed, segments, strict=True) if parsed is None), record.get("file_name"))
        detail = "an annotation needs a 'file_name', and whole numbers 'id' and 'category_id' of every segment; found "
        return Rejected("malformed_entry", f"{detail}{str(wrong)[:80]}", str(record["image_id"]))
    known = [segment for segment in segments if segment is not None]
    if unknown := [category_id for _, category_id, _ in known if category_id not in labels]:
        detail = f"category_id {unknown[0]} is not in the file's categories"
        return Rejected("unknown_category", detail, str(record["image_id"]))
    segments_of_set = ((id_, labels[category_id], is_crowd) for id_, category_id, is_crowd in known)
    return Annotation(record["file_name"], tuple(segments_of_set))


def _segment(segment: Any) -> tuple[int, int, int] | None:
    """Id, category id and iscrowd, whatever other fields hold."""
    if not isinstance(segment, Mapping):
        return None
    id_, category_id = whole_id(segment.get("id")), whole_id(segment.get("category_id"))
    is_crowd = crowd_of(segment)
    if id_ is None or id_ < 0 or category_id is None or is_crowd is None:
        return None
    return id_, category_id, int(is_crowd)
