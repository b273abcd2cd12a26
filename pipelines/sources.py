"""The sources as Beam steps: each turns files into mentions of images, and what cannot be one into rejects."""

import posixpath
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from posixpath import join
from typing import Final, Literal, NamedTuple, TypeVar

import pyarrow.parquet as pq
from apache_beam.pvalue import TaggedOutput

from collavo.dataset import check_schema
from collavo.errors import Rejected, UserError
from collavo.sources.coco_panoptic import AnnotatedImage, stream_annotated_images
from collavo.sources.image_paths import checked_relative, is_utf8
from collavo.sources.llava import LlavaEntry, stream_entries
from collavo.storage import FAULTS, canonical, is_folder, list_files, open_random, open_read
from pipelines.records import Draft, Input, Mention, Reject
from schemas.crayon_row import CrayonRow, file_facts

Entry = TypeVar("Entry")

REJECT_TAG: Final = "rejected"
"""Tag of the reject lines that a step emits beside its output."""

RejectOutput = TaggedOutput[Literal["rejected"], Reject]


def reject_output(reject: Reject) -> RejectOutput:
    return TaggedOutput(REJECT_TAG, reject)


class CocoSource(NamedTuple):
    """A COCO panoptic file with the folders of its images and masks; `name` is `coco` or `scenes`."""

    name: str
    json_uri: str
    images_root: str
    masks_root: str


class LlavaSource(NamedTuple):
    """A LLaVA file with the root of its images; `name` is `llava` or `scenes`."""

    name: str
    json_uri: str
    image_root: str


class ImagesSource(NamedTuple):
    """Images by glob, folder, or list file (`.txt`, a path or URI per line); relative lines lie below `image_root`."""

    pattern: str
    image_root: str


@dataclass(frozen=True, slots=True)
class Sources:
    """All that a job reads: finished rows, or any combination of the others."""

    coco: tuple[CocoSource, ...] = ()
    llava: tuple[LlavaSource, ...] = ()
    images: tuple[ImagesSource, ...] = ()
    crayon_files: tuple[str, ...] = ()

    @property
    def scenes_only(self) -> bool:
        names = {source.name for source in self.coco} | {source.name for source in self.llava}
        return names == {"scenes"} and not self.images


def read_coco(source: CocoSource) -> Iterator[Mention | RejectOutput]:
    """Stream a COCO panoptic file into mentions."""
    with _naming("coco_panoptic", source.json_uri), open_read(source.json_uri) as file:
        for entry in stream_annotated_images(file):
            yield _mention_or_reject(source.name, entry, lambda image: _coco_mention(source, image))


def read_llava(source: LlavaSource) -> Iterator[Mention | RejectOutput]:
    """Stream a LLaVA file into mentions."""
    with _naming("llava_json", source.json_uri), open_read(source.json_uri) as file:
        for entry in stream_entries(file):
            yield _mention_or_reject(source.name, entry, lambda dialogue: _llava_mention(source, dialogue))


def read_images(source: ImagesSource) -> Iterator[Mention | RejectOutput]:
    """Turn a glob, folder or list file into mentions of images."""
    root = source.image_root if _is_list(source.pattern) else _fixed_part(source.pattern)
    with _naming("images", source.pattern):
        paths = _listed_paths(source.pattern)
    for path in paths:
        yield _mention_or_reject("folder", path, lambda path: _file_mention(source, root, path))


def read_crayon_rows(uri: str, keep_image_bytes: bool) -> Iterator[Draft]:
    """Read finished rows back as drafts, for new instructions; their old ones are left behind."""
    with _naming("from_crayon", uri), open_random(uri) as file:
        parquet = pq.ParquetFile(file)
        check_schema(parquet.schema_arrow, uri)
        segmenters = tuple(file_facts(parquet.metadata.metadata).get("segmenters", ()))
        for batch in parquet.iter_batches(batch_size=50):
            for record in batch.to_pylist():
                row = CrayonRow.from_record({**record, "instructions": ()})
                row = row if keep_image_bytes else replace(row, image_bytes=None)
                yield Draft(row, uri, (Input("crayon", row.image_id),), segmenters, {})


@contextmanager
def _naming(flag: str, uri: str) -> Iterator[None]:
    """Say which flag named a source that cannot be read."""
    try:
        yield
    except (UserError, *FAULTS) as error:
        raise UserError(f"--{flag} {uri}: {str(error).removeprefix(f'{uri}: ')}") from error


def _mention_or_reject(
    source: str, entry: Entry | Rejected, make_mention: Callable[[Entry], Mention]
) -> Mention | RejectOutput:
    try:
        if isinstance(entry, Rejected):
            raise entry
        return make_mention(entry)
    except Rejected as error:
        return reject_output(Reject(error.entry_id, source, "list", error.reason, str(error)))


def _coco_mention(source: CocoSource, image: AnnotatedImage) -> Mention:
    path = _inside(image.entry_id, image.file_name)
    mask_uri = ""
    if image.annotation:
        mask_uri = join(source.masks_root, _inside(image.entry_id, image.annotation.mask_name))
    uri = canonical(join(source.images_root, path))
    return Mention(Input(source.name, image.entry_id), path, uri, image.license_id, image.annotation, mask_uri)


def _llava_mention(source: LlavaSource, entry: LlavaEntry) -> Mention:
    path = _inside(entry.dialogue.id, entry.image)
    uri = canonical(join(source.image_root, path))
    return Mention(Input(source.name, entry.dialogue.id), path, uri, dialogue=entry.dialogue)


def _file_mention(source: ImagesSource, root: str, path: str) -> Mention:
    """A file below `root`, or a line of a list file."""
    if not is_utf8(path) or "\0" in path:
        readable = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise Rejected("bad_path", "the file's name is not UTF-8 text", readable)
    if _is_list(source.pattern) and not _is_absolute(path):
        relative = _inside(path, path)
        return Mention(Input("folder", path), relative, canonical(join(root, relative)))
    relative = path.removeprefix(root.rstrip("/") + "/") if root else path
    return Mention(Input("folder", path), relative.split("://")[-1].lstrip("/"), canonical(path))


def _inside(entry_id: str, path: str) -> str:
    try:
        return checked_relative(path)
    except Rejected as error:
        raise Rejected(error.reason, str(error), entry_id) from error


def _listed_paths(pattern: str) -> list[str]:
    if _is_list(pattern):
        with open_read(pattern) as file:
            return [path for line in file if (path := line.decode(errors="surrogateescape").strip())]
    if paths := list_files(pattern):
        return paths
    raise UserError("names no file; a folder, a glob in quotes, or a .txt list would work")


def _is_list(pattern: str) -> bool:
    return pattern.endswith(".txt")


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or "://" in path


def _fixed_part(pattern: str) -> str:
    """The folder above the first wildcard, from which image ids count: `a/b` of `a/b/*/c.jpg`."""
    wildcard = min((pattern.find(c) for c in "*?[" if c in pattern), default=len(pattern))
    return pattern.rstrip("/") if is_folder(pattern) else posixpath.dirname(pattern[:wildcard])
