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
from typing import Any, BinaryIO, NamedTuple

import ijson

from collavo.errors import Rejected, UserError
from collavo.sources import fault_in_json, image_key, whole_id
from schemas.categories import LEFT_OUT


class ImageInstances(NamedTuple):
    """An image of an instance file; `instances` is JSON text of a list of `[id, label, iscrowd, segmentation]`,
    as compact as it can be passed around, and None for an image without any."""

    entry_id: str
    file_name: str
    license_id: int | None
    size_wh: tuple[int, int] | None
    instances: str | None


def stream_image_instances(file: BinaryIO, name: str, labels: Mapping[int, int]) -> Iterator[ImageInstances | Rejected]:
    """Yield all images of a COCO instance file in the file's order; an unusable entry comes as the error that says why.

    Args:
        file: open, seekable, plain UTF-8; see `collavo.sources.json_files.open_json`.
        name: its path, for messages.
        labels: the label of each category id of the file, see `collavo.categories.labels_by_id`.

    Raises:
        UserError: if the file is not JSON to its end, or not of the instance format.
    """
    try:
        images: dict[str, Mapping[str, Any]] = {}
        for image in ijson.items(file, "images.item", use_float=True):
            image_id = image_key(image.get("id"))
            if image_id is None or not isinstance(image.get("file_name"), str):
                yield Rejected("malformed_entry", f"an image needs 'id' and 'file_name', found {str(image)[:80]}")
            elif image_id in images:
                yield Rejected("duplicate_id", f"'images' lists the id again, for {image['file_name']}", image_id)
            else:
                images[image_id] = image
        if not images:
            raise UserError(f"{name}: it lists no 'images'")
        file.seek(0)
        with tempfile.TemporaryFile() as store:
            places: dict[str, array[int]] = {}
            spoiled: dict[str, Rejected] = {}
            for record in ijson.items(file, "annotations.item", use_float=True):
                image_id = image_key(record.get("image_id"))
                if image_id is None or image_id not in images:
                    detail = "an annotation of an image not in 'images'"
                    yield Rejected("unknown_image", detail, f"annotation {record.get('id')}")
                    continue
                try:
                    instance = _instance(record, labels)
                except Rejected as error:
                    detail = f"annotation {record.get('id')}: {error}"
                    spoiled.setdefault(image_id, Rejected(error.reason, detail, image_id))
                    continue
                if instance:
                    text = json.dumps(instance, separators=(",", ":")).encode()
                    places.setdefault(image_id, array("Q")).extend([store.tell(), len(text)])
                    store.write(text)
            for image_id, image in images.items():
                yield spoiled.get(image_id) or _image(image_id, image, places.get(image_id), store)
    except (ijson.JSONError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: not COCO instance JSON to its end ({fault_in_json(error)})") from error


def _instance(record: Mapping[str, Any], labels: Mapping[int, int]) -> list[Any] | None:
    """Return `[id, label, iscrowd, segmentation]`, None for an instance of a class that is left out.

    Raises:
        Rejected: `malformed_entry` or `unknown_category`.
    """
    id_, category_id = whole_id(record.get("id")), whole_id(record.get("category_id"))
    if id_ is None or category_id is None:
        raise Rejected("malformed_entry", "an annotation needs whole numbers 'id' and 'category_id'")
    if category_id not in labels:
        raise Rejected("unknown_category", f"category_id {category_id} is not in the file's categories")
    if labels[category_id] == LEFT_OUT:
        return None
    segmentation = record.get("segmentation")
    if not isinstance(segmentation, list | dict) or not segmentation:
        raise Rejected("malformed_entry", "an instance without a 'segmentation'; a box alone makes no map")
    return [id_, labels[category_id], int(bool(record.get("iscrowd"))), segmentation]


def _image(image_id: str, image: Mapping[str, Any], places: "array[int] | None", store: BinaryIO) -> ImageInstances:
    texts = []
    for offset, length in zip(places[::2], places[1::2], strict=True) if places else ():
        store.seek(offset)
        texts.append(store.read(length).decode())
    license_id, width, height = (whole_id(image.get(key)) for key in ("license", "width", "height"))
    size_wh = (width, height) if width and height else None
    return ImageInstances(image_id, image["file_name"], license_id, size_wh, f"[{','.join(texts)}]" if texts else None)
