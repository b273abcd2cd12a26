"""COCO's *instance* annotation files, read as streams: masks of things, for counting and boxes without panoptic masks.

The annotations of one image stand scattered over a file of half a gigabyte. So the file is read once, each annotation
goes to a temporary file, and what is kept in memory is where those of each image lie.

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
            for record in ijson.items(file, "annotations.item", use_float=True):
                problem = _problem(record, images, labels)
                if problem:
                    yield problem
                    continue
                category_id = whole_id(record["category_id"])
                label = labels[-1 if category_id is None else category_id]
                if label == LEFT_OUT:
                    continue
                kept = [whole_id(record["id"]), label, int(bool(record.get("iscrowd"))), record["segmentation"]]
                text = json.dumps(kept, separators=(",", ":")).encode()
                places.setdefault(image_key(record["image_id"]) or "", array("Q")).extend([store.tell(), len(text)])
                store.write(text)
            for image_id, image in images.items():
                yield _image(image_id, image, places.get(image_id), store)
    except (ijson.JSONError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: not COCO instance JSON to its end ({fault_in_json(error)})") from error


def _problem(record: Any, images: Mapping[str, Any], labels: Mapping[int, int]) -> Rejected | None:
    image_id = image_key(record.get("image_id"))
    id_, category_id = (whole_id(record.get(key)) for key in ("id", "category_id"))
    entry_id = f"annotation {record.get('id')}"
    if id_ is None or category_id is None or image_id is None:
        detail = "an annotation needs an 'image_id' and whole numbers 'id' and 'category_id'"
        return Rejected("malformed_entry", detail, entry_id)
    if image_id not in images:
        return Rejected("unknown_image", "an annotation of an image not in 'images'", entry_id)
    if category_id not in labels:
        return Rejected("unknown_category", f"category_id {category_id} is not in the file's categories", entry_id)
    if not isinstance(record.get("segmentation"), list | dict) or not record["segmentation"]:
        return Rejected("malformed_entry", "an instance without a 'segmentation'; a box alone makes no map", entry_id)
    return None


def _image(image_id: str, image: Mapping[str, Any], places: "array[int] | None", store: BinaryIO) -> ImageInstances:
    texts = []
    for offset, length in zip(places[::2], places[1::2], strict=True) if places else ():
        store.seek(offset)
        texts.append(store.read(length).decode())
    license_id, width, height = (whole_id(image.get(key)) for key in ("license", "width", "height"))
    size_wh = (width, height) if width and height else None
    return ImageInstances(image_id, image["file_name"], license_id, size_wh, f"[{','.join(texts)}]" if texts else None)
