"""What happens to one image, as plain functions: read it, segment it by its annotation, draft its row.

Each step adds the seconds that it took. An image that cannot be used comes back as the reject lines of its inputs.
"""

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import numpy as np

from collavo.errors import Rejected
from collavo.images import decode_rgb, turn_upright, verify_image
from collavo.panoptic.coco_png import decode_segment_runs
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.instances import Instance, instances_map
from collavo.panoptic.maps import IdRuns, PanopticMap, SegmentInfo, build_panoptic_map
from collavo.sources.coco_panoptic import segment_infos
from collavo.sources.image_paths import other_extensions, without_extension
from collavo.storage import exists, is_local, read_bytes
from collavo.web import is_url
from pipelines.job import CrayonJob
from pipelines.records import Draft, ImageTask, LoadedImage, Mention, Reject, Segmented, SegmentedImage
from pipelines.sources import finished_pictures
from pipelines.spill import read_drafts, spilled_pictures
from schemas.crayon_row import CrayonRow

_FILES_AHEAD = 8

_FINDING = threading.Lock()
"""The threads of a worker find known pictures once for all of them: of a million, they take some 300 MB."""

_ANNOTATIONS = {kind: json.dumps({"name": kind}) for kind in ("annotations", "instance annotations")}


class Fetched(NamedTuple):
    """A file that a task names, with the mentions of it, and the mask of its annotation; or why one cannot be read."""

    task: ImageTask
    uri: str
    data: bytes | Rejected
    mask: bytes | Rejected
    seconds: dict[str, float]


def fetch_ahead(tasks: Sequence[tuple[ImageTask, bool]]) -> Iterator[list[Fetched]]:
    """Fetch the files of tasks, see `fetch_files`; those of a store or the web several at once and ahead of their turn,
    since a file takes longer to come from there than to be decoded."""
    pool = ThreadPoolExecutor(_FILES_AHEAD)
    waiting: deque[Future[list[Fetched]] | None] = deque()
    try:
        for place, (task, with_mask) in enumerate(tasks):
            for ahead in tasks[place + len(waiting) : place + _FILES_AHEAD]:
                waiting.append(None if all(map(is_local, ahead[0].uris)) else pool.submit(fetch_files, *ahead))
            fetched = waiting.popleft()
            yield fetched.result() if fetched else fetch_files(task, with_mask)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fetch_files(task: ImageTask, with_mask: bool) -> list[Fetched]:
    """Read the bytes of a task's image.

    Most tasks name one file. Where the files named differ in their extension and more than one of them exists, each is
    an image of its own.

    Args:
        with_mask: whether the mask of its annotation is needed, if it has one.
    """
    fetched = []
    for part, uri in _existing_files(task):
        seconds: dict[str, float] = {}
        mask: bytes | Rejected = b""
        with _timed(seconds, "read"):
            try:
                found, data = _first_existing(uri)
            except Rejected as error:
                fetched.append(Fetched(part, uri, error, mask, seconds))
                continue
            if with_mask and part.annotated and (mask_uri := part.annotated.mask_uri):
                try:
                    mask = read_bytes(mask_uri)
                except Rejected as error:
                    mask = error
        fetched.append(Fetched(part, found, data, mask, seconds))
    return fetched


def read_images(fetched: Iterable[Fetched], max_pixels: int, with_rgb: bool) -> tuple[list[LoadedImage], list[Reject]]:
    """Make sure that the files of a task decode.

    Args:
        max_pixels: bound on width x height.
        with_rgb: whether a model needs the pixels; otherwise the image is only verified.

    Returns:
        the images that can be used, and the rejects of the inputs of those that cannot.
    """
    loaded: list[LoadedImage] = []
    rejects: list[Reject] = []
    for file in fetched:
        outcome = _read_image(file, max_pixels, with_rgb)
        if isinstance(outcome, LoadedImage):
            loaded.append(outcome)
        else:
            rejects += outcome
    return loaded, rejects


def segment_by_annotation(image: LoadedImage, job: CrayonJob) -> Segmented:
    """Make the panoptic map out of the image's COCO mask or instances, or reject the image."""
    annotated = image.task.annotated
    try:
        with _timed(image.seconds, "segment"):
            if annotated is None:
                raise Rejected(
                    "no_annotation", "no source annotates this image; a network sees it if --images names it too"
                )
            if annotated.annotation is None:
                panoptic, kind = _map_of_instances(annotated, image, job), "instance annotations"
            else:
                infos = segment_infos(annotated.annotation.segments)
                runs = _mask_runs(annotated, image, infos, job.mask_frame)
                panoptic, kind = build_panoptic_map(runs, infos, job.categories), "annotations"
    except Rejected as error:
        return image.task.rejects("segment", error, annotated.mask_uri if annotated else "")
    return SegmentedImage(image, panoptic, _ANNOTATIONS[kind])


def draft_row(segmented: SegmentedImage, job: CrayonJob) -> Draft:
    """Make the row of an image, without its instructions."""
    image, task, panoptic = segmented.image, segmented.image.task, segmented.panoptic
    with _timed(image.seconds, "encode"):
        png = encode_index_map(panoptic)
        row = replace(_row(image, job), panoptic_png=png, segments=panoptic.segments)
    return Draft(row, task.inputs, (segmented.segmenter,), image.seconds, panoptic.unfamiliar, bool(task.split))


def draft_known(image: LoadedImage, job: CrayonJob) -> Draft | None:
    """Make the draft of a picture that no network has to see again, None where it is not known.

    The rows of a finished data set are among the drafts already: what is said here of one of its pictures is merged
    with its row. For one that a stopped build had segmented, its map is taken from there.
    """
    if not (job.output.resume or job.sources.crayon_files):
        return None
    task, row = image.task, _row(image, job)
    digest = bytes.fromhex(row.image_sha256 or "")
    with _FINDING:
        block = spilled_pictures(job.publication.segmented, job.work).get(digest) if job.output.resume else None
        if block is None and digest not in finished_pictures(job.sources.crayon_files):
            return None
    if block is None:
        return Draft(row, task.inputs, (), image.seconds, split_stated=bool(task.split))
    (segmented,) = read_drafts([block])
    row = replace(row, panoptic_png=segmented.row.panoptic_png, segments=segmented.row.segments)
    return replace(segmented, row=row, inputs=task.inputs, seconds=image.seconds, split_stated=bool(task.split))


def draft_dialogue(task: ImageTask, job: CrayonJob) -> Draft:
    """Make the row of a dialogue about no image."""
    mention = task.mentions[0]
    digest = hashlib.sha256(json.dumps([dialogue.turns for dialogue in task.dialogues]).encode()).hexdigest()
    row = CrayonRow(
        image_id=mention.image_path,
        image_sha256=None,
        image_bytes=None,
        image_path=None,
        width=None,
        height=None,
        sources=(mention.input.source,),
        license_id=None,
        split=task.split or split_of(digest, job.output.validation_ratio),
        panoptic_png=None,
        conversations=task.dialogues,
    )
    return Draft(row, task.inputs, (), {}, split_stated=bool(task.split))


def merge_drafts(first: Draft, second: Draft) -> tuple[Draft, list[Reject]]:
    """Make one draft of two about the same picture: the same bytes at two paths, or in two data sets.

    Returns:
        the draft, with the dialogues, sources and paths of both; and the rejects of the second one's inputs where it is
        annotated otherwise.
    """
    row, other = first.row, second.row
    if (
        _is_annotated(first)
        and _is_annotated(second)
        and [s.as_record() for s in row.segments] != [s.as_record() for s in other.segments]
    ):
        detail = f"{other.image_path} has the bytes of {row.image_path} and another annotation"
        return first, [Reject(e.entry_id, e.source, "write", "other_annotation", detail) for e in second.inputs]
    paths = [path for path in (*row.other_paths, other.image_path, *other.other_paths) if path]
    merged = replace(
        row,
        sources=tuple(sorted({*row.sources, *other.sources})),
        license_id=row.license_id if row.license_id is not None else other.license_id,
        conversations=tuple(dict.fromkeys((*row.conversations, *other.conversations))),
        other_paths=tuple(path for path in dict.fromkeys(paths) if path != row.image_path),
    )
    return replace(first, row=merged, inputs=(*first.inputs, *second.inputs)), []


def _is_annotated(draft: Draft) -> bool:
    """Tell whether a draft's map is of an annotation. A finished row names all that segmented its file."""
    return not draft.is_scored and bool(set(draft.segmenters) & set(_ANNOTATIONS.values()))


def split_of(digest: str, validation_ratio: float) -> str:
    """Choose `train` or `validation` by a SHA-256 in hexadecimal digits, the picture's: the same picture is in the same
    split in every data set."""
    return "validation" if int(digest[:16], 16) < validation_ratio * 2**64 else "train"


def _row(image: LoadedImage, job: CrayonJob) -> CrayonRow:
    """Make an image's row, without its map."""
    mentions = image.task.mentions
    digest = hashlib.sha256(image.image_bytes).hexdigest()
    return CrayonRow(
        image_id=image.path,
        image_sha256=digest,
        image_bytes=image.image_bytes if job.output.embed_images else None,
        image_path=image.path,
        width=image.size_wh[0],
        height=image.size_wh[1],
        sources=tuple(sorted({mention.input.source for mention in mentions})),
        license_id=next((m.license_id for m in mentions if m.license_id is not None), None),
        split=image.task.split or split_of(digest, job.output.validation_ratio),
        panoptic_png=None,
        conversations=image.task.dialogues,
    )


def _existing_files(task: ImageTask) -> list[tuple[ImageTask, str]]:
    """Return the files of a task with the mentions of each. Mentions of a file that does not exist go to one that does,
    of the same name but for the extension."""
    uris = task.uris
    if len(uris) > 1:
        uris = [uri for uri in uris if is_url(uri) or exists(uri)]
    if len(uris) < 2:
        return [(task, uris[0] if uris else task.uris[0])]
    of_file = {
        uri: [m for m in task.mentions if m.uri == uri or (m.uri not in uris and uri == uris[0])] for uri in uris
    }
    return [(ImageTask(tuple(mentions)), uri) for uri, mentions in of_file.items()]


def _read_image(file: Fetched, max_pixels: int, with_rgb: bool) -> LoadedImage | list[Reject]:
    task, found, data, mask, seconds = file
    if isinstance(data, Rejected):
        return task.rejects("read", data)
    path = without_extension(task.mentions[0].image_path) + found.removeprefix(without_extension(found))
    outcome = decode_image(task, path, data, max_pixels, with_rgb, seconds)
    return replace(outcome, mask=mask) if isinstance(outcome, LoadedImage) else outcome


def decode_image(
    task: ImageTask, path: str, data: bytes, max_pixels: int, with_rgb: bool, seconds: dict[str, float]
) -> LoadedImage | list[Reject]:
    """Decode an image for a model, or make sure that it decodes."""
    try:
        with _timed(seconds, "decode"):
            rgb = decode_rgb(data, max_pixels) if with_rgb else None
            header = None if with_rgb else verify_image(data, max_pixels)
    except Rejected as error:
        return task.rejects("decode", error)
    if header:
        return LoadedImage(task, path, data, header.size_wh, header.orientation, None, seconds)
    assert rgb is not None
    return LoadedImage(task, path, data, (rgb.shape[1], rgb.shape[0]), 1, rgb, seconds)


def _first_existing(uri: str) -> tuple[str, bytes]:
    """Read a file, or one of the same name with another extension of images; of URLs, just this one."""
    for candidate in (uri, *(() if is_url(uri) else other_extensions(uri))):
        try:
            return candidate, read_bytes(candidate)
        except Rejected as error:
            if error.reason != "missing_file":
                raise
    raise Rejected("missing_file", uri)


def _mask_runs(
    annotated: Mention, image: LoadedImage, infos: list[SegmentInfo], mask_frame: str
) -> np.ndarray | IdRuns:
    """Read the segment ids of a mask in the frame of the upright image.

    Annotation tools differ in whether they apply EXIF. Where it turns an image by 90 degrees, the mask's size tells,
    but for squares; a turn by 180 degrees or a mirroring leaves no trace, and a guess would put boxes into wrong
    corners.
    """
    data = image.mask
    if isinstance(data, Rejected):
        raise data
    listed = [info.id for info in infos]
    if image.orientation == 1 or mask_frame == "upright":
        return decode_segment_runs(data, image.size_wh, listed)
    width, height = image.size_wh
    stored_wh = (height, width) if image.orientation >= 5 else (width, height)
    if mask_frame == "auto":
        if stored_wh == image.size_wh:
            detail = f"EXIF orientation {image.orientation} turns the image, and its mask fits either way"
            raise Rejected(
                "ambiguous_orientation", f"{detail}; --mask_frame stored or upright says how masks were made"
            )
        try:
            return decode_segment_runs(data, image.size_wh, listed)
        except Rejected as error:
            if error.reason != "mask_size_mismatch":
                raise
    runs = decode_segment_runs(data, stored_wh, listed)
    return turn_upright(np.repeat(runs.ids, runs.lengths).reshape(runs.size_hw), image.orientation)


def _map_of_instances(annotated: Mention, image: LoadedImage, job: CrayonJob) -> PanopticMap:
    stated_wh, listed = json.loads(annotated.instances)
    width, height = image.size_wh
    frame = job.mask_frame
    if frame == "auto" and image.orientation != 1:
        turned_by_90 = image.orientation >= 5 and width != height
        frames = {(width, height): "upright", (height, width): "stored"} if turned_by_90 and stated_wh else {}
        if (found := frames.get(tuple(stated_wh or ()))) is None:
            detail = f"EXIF orientation {image.orientation} turns the image, and nothing says whether its instances are"
            raise Rejected(
                "ambiguous_orientation", f"{detail} turned; --mask_frame stored or upright says how they were made"
            )
        frame = found
    if stated_wh and tuple(stated_wh) not in {(width, height), (height, width) if image.orientation >= 5 else ()}:
        detail = f"its instances are of an image of {stated_wh[0]} x {stated_wh[1]}, but it has {width} x {height}"
        raise Rejected("mask_size_mismatch", detail)
    taken = {id_ for id_, *_ in listed}
    free = (number for number in count(1) if number not in taken)
    instances = [
        Instance(SegmentInfo(id_ or next(free), label, bool(crowd)), mask) for id_, label, crowd, mask in listed
    ]
    orientation = image.orientation if frame == "stored" else 1
    return instances_map(instances, image.size_wh, job.categories, orientation)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
