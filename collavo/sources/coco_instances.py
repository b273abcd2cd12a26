"""COCO's *instance* annotation files, read as streams: masks of things, for counting and boxes without panoptic masks.

The annotations of one image stand scattered over a file of half a gigabyte. So the file is read once, each annotation
goes to a temporary file, and what is kept in memory is where those of each image lie. An image one of whose annotations
cannot be used is one reject: without that object, its counts and what it is said not to show would be wrong.

Source: the COCO data format, https://cocodataset.org/#format-data, object detection.
"""

import json
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ijson

from collavo.errors import Rejected, UserError
from collavo.sources import MAX_ID, crowd_of, fault_in_json, image_key, whole_id
from collavo.sources.coco_panoptic import AnnotatedImage, listed_images
from schemas.categories import LEFT_OUT


def stream_image_instances(file: BinaryIO, name: str, labels: Mapping[int, int]) -> Iterator[AnnotatedImage | Rejected]:
    """Yield all images of a COCO instance file in the file's order; an unusable entry comes as the error that says why.

    Args:
        file: open, seekable, plain UTF-8; see `collavo.sources.json_files.open_json`.
        name: its path, for messages.
        labels: the label of each category id of the file, see `collavo.categories.labels_by_id`.

    Raises:
        UserError: if the file is not JSON to its end, or not of the instance format, or none of its annotations can be
            used.
    """
    try:
        images = yield from listed_images(file, name)
        with tempfile.TemporaryFile() as store:
            places: dict[str, array[int]] = {}
            spoiled: dict[str, Rejected] = {}
            any_usable, fault = False, ""
            for record in ijson.items(file, "annotations.item", use_float=True):
                if "segments_info" in record:
                    raise UserError(f"{name}: its annotations have 'segments_info'; --coco_panoptic reads such a file")
                image_id = image_key(record.get("image_id"))
                if image_id is None or image_id not in images:
                    detail, entry_id = "an annotation of an image not in 'images'", f"annotation {record.get('id')}"
                    fault = fault or f"{entry_id}: {detail}, {record.get('image_id')!r:.80}"
                    yield Rejected("unknown_image", detail, entry_id)
                    continue
                try:
                    instance = _instance(record, labels)
                except Rejected as error:
                    detail = f"annotation {record.get('id')}: {error}"
                    fault = fault or detail
                    spoiled.setdefault(image_id, Rejected(error.reason, detail, image_id))
                    continue
                any_usable = True
                if instance:
                    text = json.dumps(instance, separators=(",", ":")).encode()
                    places.setdefault(image_id, array("Q")).extend([store.tell(), len(text)])
                    store.write(text)
            if not any_usable:  # what is left would be images without an object, which teach that there is never any
                if fault:
                    raise UserError(f"{name}: none of its annotations can be used; {fault}")
                file.seek(0)
                if next(ijson.items(file, "annotations"), None) is None:
                    raise UserError(f"{name}: it has no 'annotations'; --images takes images of which nothing is known")
            for image_id, image in images.items():
                yield spoiled.get(image_id) or image._replace(instances=_listed(places.get(image_id), store))
    except (ijson.JSONError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: not COCO instance JSON to its end ({fault_in_json(error)})") from error


def _instance(record: Mapping[str, Any], labels: Mapping[int, int]) -> list[Any] | None:
    """Return `[id, label, iscrowd, segmentation]`, None for an instance of a class that is left out.

    The id is 0 for one that no row can hold: COCO's crowds have twelve digits, other tools count from 0 or write texts.
    Such an instance is numbered where its map is made.

    Raises:
        Rejected: `malformed_entry` or `unknown_category`.
    """
    id_, category_id = whole_id(record.get("id")) or 0, whole_id(record.get("category_id"))
    is_crowd = crowd_of(record)
    if is_crowd is None:
        raise Rejected("malformed_entry", f"'iscrowd' should be 0 or 1, it is {record['iscrowd']!r:.80}")
    if category_id is None:
        raise Rejected("malformed_entry", "an annotation needs a whole number 'category_id'")
    if category_id not in labels:
        raise Rejected("unknown_category", f"category_id {category_id} is not in the file's categories")
    if labels[category_id] == LEFT_OUT:
        return None
    segmentation = record.get("segmentation")
    if not isinstance(segmentation, list | dict) or not segmentation:
        raise Rejected("malformed_entry", "an instance without a 'segmentation'; a box alone makes no map")
    return [id_ if 0 < id_ <= MAX_ID else 0, labels[category_id], int(is_crowd), segmentation]


def _listed(places: "array[int] | None", store: BinaryIO) -> str | None:
    """Read the annotations of an image back as one list."""
    texts = []
    for offset, length in zip(places[::2], places[1::2], strict=True) if places else ():
        store.seek(offset)
        texts.append(store.read(length).decode())
    return f"[{','.join(texts)}]" if texts else None
