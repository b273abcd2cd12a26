"""The life of one image, step by step, as plain functions: read it, segment it by its annotation, draft its row.

Each step adds the seconds that it took. An image that cannot be used comes back as the reject lines of its inputs.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from collavo.errors import Rejected
from collavo.images import decode_rgb, verify_image
from collavo.instructions.choose import stable_hash
from collavo.panoptic.coco_png import decode_segment_runs
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.maps import build_panoptic_map
from collavo.sources.coco_panoptic import segment_infos
from collavo.sources.image_paths import other_extensions, without_extension
from collavo.storage import exists, read_bytes
from pipelines.records import Draft, ImageTask, LoadedImage, Reject, Segmented, SegmentedImage
from schemas.crayon_row import CrayonRow

_ANNOTATIONS = json.dumps({"name": "annotations"})


def read_image(task: ImageTask, max_pixels: int, with_rgb: bool) -> tuple[LoadedImage | None, list[Reject]]:
    """Read an image's bytes and make sure that they decode.

    Args:
        max_pixels: bound on width x height.
        with_rgb: whether a model needs the pixels; otherwise the image is only verified.

    Returns:
        the image, None if it cannot be used; and the rejects, of all its inputs or only of those that name another
        existing file of the same id.
    """
    seconds: dict[str, float] = {}
    stage = "read"
    rejects: list[Reject] = []
    try:
        with _timed(seconds, "read"):
            uri, data = _first_existing(task)
            task, rejects = _without_rivals(task, uri)
        stage = "decode"
        with _timed(seconds, "decode"):
            rgb = decode_rgb(data, max_pixels) if with_rgb else None
            size_wh = verify_image(data, max_pixels).size_wh if rgb is None else (rgb.shape[1], rgb.shape[0])
    except Rejected as error:
        return None, rejects + task.rejects(stage, error)
    return LoadedImage(task, uri, data, size_wh, rgb, seconds), rejects


def segment_by_annotation(image: LoadedImage) -> Segmented:
    """Make the panoptic map out of the image's COCO mask, or reject the image."""
    annotated = image.task.annotated
    try:
        with _timed(image.seconds, "segment"):
            if annotated is None or annotated.annotation is None:
                raise Rejected("no_annotation", "no source annotates this image; --segmenter auto would ask a model")
            runs = decode_segment_runs(read_bytes(annotated.mask_uri), image.size_wh)
            panoptic = build_panoptic_map(runs, segment_infos(annotated.annotation.segments))
    except Rejected as error:
        return image.task.rejects("segment", error)
    return SegmentedImage(image, panoptic, _ANNOTATIONS)


def draft_row(segmented: SegmentedImage, embed_image: bool, validation_ratio: float) -> Draft:
    """Make the row of an image, without its instructions.

    Args:
        embed_image: whether the row holds the image's bytes or only refers to it by its path.
        validation_ratio: share of images that go to the validation split, by hash of their id.
    """
    image, task = segmented.image, segmented.image.task
    with _timed(image.seconds, "encode"):
        row = CrayonRow(
            image_id=task.image_id,
            image_bytes=image.image_bytes if embed_image else None,
            image_path=task.image_id + image.uri.removeprefix(without_extension(image.uri)),
            width=image.size_wh[0],
            height=image.size_wh[1],
            sources=tuple(sorted({mention.input.source for mention in task.mentions})),
            license_id=next((m.license_id for m in task.mentions if m.license_id is not None), None),
            split=split_of(task.image_id, validation_ratio),
            panoptic_png=encode_index_map(segmented.panoptic.index_map, segmented.panoptic.segments),
            segments=segmented.panoptic.segments,
            conversations=tuple(mention.dialogue for mention in task.mentions if mention.dialogue),
        )
    inputs = tuple(mention.input for mention in task.mentions)
    return Draft(row, image.uri, inputs, (segmented.segmenter,), image.seconds)


def split_of(image_id: str, validation_ratio: float) -> str:
    """Choose `train` or `validation` by a hash of the image id alone."""
    return "validation" if stable_hash("split", image_id) < validation_ratio * 2**64 else "train"


def _first_existing(task: ImageTask) -> tuple[str, bytes]:
    """Read the first file that exists, of those named or else of those whose extension differs from the first one's."""
    for uri in (*task.uris, *other_extensions(task.uris[0])):
        try:
            return uri, read_bytes(uri)
        except Rejected as error:
            if error.reason != "missing_file":
                raise
    raise Rejected("missing_file", task.uris[0])


def _without_rivals(task: ImageTask, uri: str) -> tuple[ImageTask, list[Reject]]:
    """Take out the mentions of other existing files with the same id: `cat.jpg` and `cat.png` cannot both be `cat`."""
    rivals = {other for other in task.uris if other != uri and exists(other)}
    if not rivals:
        return task, []
    kept = tuple(mention for mention in task.mentions if mention.uri not in rivals)
    lost = [mention for mention in task.mentions if mention.uri in rivals]
    return ImageTask(kept), [m.reject("read", "duplicate_id", f"{m.uri} has the image id of {uri}") for m in lost]


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
