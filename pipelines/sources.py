"""The sources: each reader turns files into mentions of images, and entries that name none into rejects."""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from posixpath import basename, dirname, join
from typing import BinaryIO, Final, Literal, NamedTuple, TypeVar

from apache_beam.pvalue import TaggedOutput

from collavo.dataset import checked_row, opened_parquet, stated_facts
from collavo.dataset import read_records as read_crayon_records
from collavo.errors import Rejected, StoreOutage, UserError
from collavo.panoptic.index_png import panoptic_map_of
from collavo.row_checks import check_schema, digest_of
from collavo.sources.coco_instances import stream_image_instances
from collavo.sources.coco_panoptic import AnnotatedImage, stream_annotated_images
from collavo.sources.dialogues import DialogueEntry, stream_dialogues
from collavo.sources.image_paths import checked_relative, image_names, is_hidden, is_utf8
from collavo.sources.json_files import open_json
from collavo.sources.records import is_tar, parquet_parts, stream_records
from collavo.storage import (
    FAULTS,
    canonical,
    exists,
    fault_line,
    fixed_part,
    is_folder,
    is_local,
    is_nowhere,
    list_files,
    local_path,
    open_random,
    open_read,
)
from pipelines.records import UNSEEN, Draft, Input, Mention, Reject
from schemas.categories import CategorySet

Entry = TypeVar("Entry")

REJECT_TAG: Final = "rejected"
"""Tag of the reject lines that a step emits beside its output."""

RejectOutput = TaggedOutput[Literal["rejected"], Reject]


def reject_output(reject: Reject) -> RejectOutput:
    """Tag a reject line for the output of a step."""
    return TaggedOutput(REJECT_TAG, reject)


class CocoSource(NamedTuple):
    """A COCO file with the folder of its images; `name` is `coco`, `scenes` or `coco_instances`.

    `masks_root` is the folder of a panoptic file's masks, `labels` the label of each of its category ids, and `split`
    where all its images go, empty for by content.
    """

    name: str
    json_uri: str
    images_root: str
    masks_root: str
    labels: Mapping[int, int]
    split: str = ""


class LlavaSource(NamedTuple):
    """A file of dialogues with the root of its images; `name` is `llava` or `scenes`.

    `short_path` begins the ids of its dialogues about no image; no two sources share one.
    """

    name: str
    json_uri: str
    image_root: str
    short_path: str
    split: str = ""


class ImagesSource(NamedTuple):
    """Images by glob, folder, or list file (`.txt`, a path or URI per line); relative lines lie below `image_root`."""

    pattern: str
    image_root: str
    split: str = ""


class RecordSource(NamedTuple):
    """A Parquet file or tar shard that holds its images."""

    uri: str
    image_column: str | None
    split: str = ""


class RecordPart(NamedTuple):
    """What is read at once of such a file: some row groups of a Parquet file, None for all; of a trial, `most` records
    at the beginning."""

    source: RecordSource
    groups: tuple[int, ...] | None = None
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """All that a job reads, in any combination.

    `root` is the folder that all images lie in, from which the ids of rows count.
    """

    root: str = ""
    coco: tuple[CocoSource, ...] = ()
    llava: tuple[LlavaSource, ...] = ()
    images: tuple[ImagesSource, ...] = ()
    records: tuple[RecordSource, ...] = ()
    crayon_files: tuple[str, ...] = ()

    @property
    def scenes_only(self) -> bool:
        """Whether nothing but sample scenes is read."""
        names = {source.name for source in self.coco} | {source.name for source in self.llava}
        return names == {"scenes"} and not (self.images or self.records or self.crayon_files)


def read_coco(source: CocoSource, root: str) -> Iterator[Mention | RejectOutput]:
    """Stream a COCO file into mentions."""
    stream: Callable[..., Iterator[AnnotatedImage | Rejected]] = stream_annotated_images
    flag = "coco_panoptic"
    if source.name == "coco_instances":
        stream, flag = stream_image_instances, "coco_instances"
    make_mention = partial(_coco_mention, source, _ImageFolder(source.images_root), root)
    with opened_json(flag, source.json_uri) as file:
        for entry in stream(file, source.json_uri, source.labels):
            yield _mention_or_reject(source.name, source.json_uri, entry, make_mention)


def read_llava(source: LlavaSource, root: str) -> Iterator[Mention | RejectOutput]:
    """Stream a file of dialogues into mentions."""
    with opened_json("llava_json", source.json_uri) as file:
        for number, entry in enumerate(stream_dialogues(file, source.json_uri)):
            yield _mention_or_reject(
                source.name, source.json_uri, entry, partial(_dialogue_mention, source, root, number)
            )


def read_images(source: ImagesSource, root: str) -> Iterator[Mention | RejectOutput]:
    """Turn a glob, folder or list file into mentions of images."""
    with source_named("images", source.pattern):
        paths, _ = listed_paths(source.pattern)
    for path in paths:
        yield _mention_or_reject("folder", source.pattern, path, lambda path: _file_mention(source, root, path))


def divide_records(part: RecordPart) -> Iterator[RecordPart]:
    """Divide a Parquet file by its row groups, so that several workers read it; a tar shard and a trial stay whole."""
    uri = part.source.uri
    if part.most or is_tar(uri):
        yield part
        return
    with source_named("dataset", uri), open_records(uri) as file:
        yield from (part._replace(groups=groups) for groups in parquet_parts(file, uri))


def read_records(part: RecordPart) -> Iterator[tuple[Mention, bytes] | RejectOutput]:
    """Stream a data set that holds its images into mentions with the images' bytes, which are empty for a dialogue
    about none."""
    source = part.source
    with source_named("dataset", source.uri), open_records(source.uri) as file:
        for record in islice(stream_records(file, source.uri, source.image_column, part.groups), part.most):
            if isinstance(record, Rejected):
                yield _rejected("dataset", source.uri, record)
            else:
                uri = record.path if record.data else ""
                named = Input("dataset", record.path)
                yield Mention(named, record.path, uri, dialogue=record.dialogue, split=source.split), record.data or b""


def open_records(uri: str) -> BinaryIO:
    """Open a Parquet file or tar shard; on a store, a tar is read ahead, as its reader asks for 10 kB at a time."""
    return open_read(uri) if is_tar(uri) else open_random(uri)


@lru_cache(maxsize=1)
def finished_pictures(crayon_files: tuple[str, ...]) -> frozenset[bytes]:
    """Read the SHA-256 of all pictures of some data sets that a segmenter has seen; of schema version 1, which lacks
    it, none."""
    found: set[bytes] = set()
    for uri in crayon_files:
        with opened_parquet(uri) as parquet:
            seen = stated_facts(parquet.metadata.metadata, uri).get("segmenters") != [UNSEEN]
            if seen and "image_sha256" in parquet.schema_arrow.names:
                digests = (digest_of(record) for record in read_crayon_records(parquet, columns=["image_sha256"]))
                found.update(filter(None, digests))
    return frozenset(found)


def read_crayon_rows(uri: str, categories: CategorySet, keep_image_bytes: bool) -> Iterator[Draft | RejectOutput]:
    """Read finished rows back as drafts, for new instructions; their old ones are left behind.

    Args:
        categories: their set, which is the job's.
    """
    with source_named("from_crayon", uri), opened_parquet(uri) as parquet:
        check_schema(parquet.schema_arrow, uri)
        facts = stated_facts(parquet.metadata.metadata, uri)
        segmenters, unfamiliar = tuple(facts.get("segmenters", ())), frozenset(facts.get("unfamiliar", ()))
        for record in read_crayon_records(parquet):
            try:
                row = checked_row(record, categories, with_instructions=False)
                if row.panoptic_png is not None:  # as another tool may have left it
                    panoptic_map_of(row.panoptic_png, row.segments, categories, row.size_wh)
            except Rejected as error:
                yield _rejected("crayon", uri, error)
                continue
            if row.image_sha256 is None and row.image_bytes is not None:  # of schema version 1
                row = replace(row, image_sha256=hashlib.sha256(row.image_bytes).hexdigest())
            row = row if keep_image_bytes else replace(row, image_bytes=None)
            # The file says by what its pictures were segmented, not which by what; an empty map may be nobody's.
            seen_by = tuple(segmenter for segmenter in segmenters if segmenter != UNSEEN)
            made_by = (UNSEEN,) if seen_by != segmenters and not row.segments else seen_by
            read = (Input("crayon", row.image_id),)
            yield Draft(row, read, made_by, {}, unfamiliar=row.image_id in unfamiliar, split_stated=True)


@contextmanager
def opened_json(flag: str, uri: str) -> Iterator[BinaryIO]:
    with source_named(flag, uri), open_read(uri) as raw, open_json(raw, uri) as file:
        yield file


@contextmanager
def source_named(flag: str, uri: str) -> Iterator[None]:
    """Say which flag named a source that cannot be read."""
    try:
        yield
    except StoreOutage:
        raise
    except (UserError, *FAULTS) as error:
        raise UserError(f"--{flag} {fault_line(uri, error)}") from error


def _mention_or_reject(
    source: str, uri: str, entry: Entry | Rejected, make_mention: Callable[[Entry], Mention]
) -> Mention | RejectOutput:
    try:
        if isinstance(entry, Rejected):
            raise entry
        return make_mention(entry)
    except Rejected as error:
        return _rejected(source, uri, error)


def _rejected(source: str, uri: str, error: Rejected) -> RejectOutput:
    """Reject an entry of a file; an id alone, such as `line 3`, does not tell which of several files it is in."""
    entry_id, detail = (_readable(text) for text in (error.entry_id, f"{uri}: {error}"))
    return reject_output(Reject(entry_id, source, "list", error.reason, detail))


def _readable(text: str) -> str:
    """Write bytes of a name that are not UTF-8, and halves of surrogate pairs, as escapes."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # a half that stands for no byte
        return text.encode(errors="backslashreplace").decode()


class _ImageFolder:
    """Where the images of a COCO file lie: at the paths that it names, or elsewhere below the folder.

    The first image decides, so that a store is not asked for each. If it is not where the file says, the folder is
    listed, and an image that is named without a folder is found in whatever one, if there is only one of that name.
    Named with a folder, it is another picture than one of the same name elsewhere.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._by_name: dict[str, str] | None = None

    def path_of(self, entry_id: str, file_name: str) -> str:
        """Return the path of an image; the one that is named, where none is found.

        Raises:
            Rejected: for a path that leads out of the folder.
        """
        relative = _inside(entry_id, file_name, self._folder)
        named = join(self._folder, relative)
        if self._by_name is None:
            self._by_name = {} if exists(named) else self._listed()
        found = (self._by_name.get(name) for name in image_names(entry_id, relative))
        return next(filter(None, found), named)

    def _listed(self) -> dict[str, str]:
        paths: dict[str, str] = {}
        for path in list_files(f"{self._folder.rstrip('/')}/"):
            paths[basename(path)] = "" if basename(path) in paths else path
        return paths


def _coco_mention(source: CocoSource, images: _ImageFolder, root: str, image: AnnotatedImage) -> Mention:
    mask_uri = instances = ""
    if image.annotation:
        mask_uri = join(source.masks_root, _inside(image.entry_id, image.annotation.mask_name, source.masks_root))
    if source.name == "coco_instances":
        instances = f"[{json.dumps(image.size_wh)},{image.instances or '[]'}]"
    path = images.path_of(image.entry_id, image.file_name)
    return Mention(
        Input(source.name, image.entry_id),
        path_below(root, path_in(source.images_root, path)),
        canonical(path),
        image.license_id,
        image.annotation,
        mask_uri,
        instances=instances,
        split=source.split,
    )


def _dialogue_mention(source: LlavaSource, root: str, number: int, entry: DialogueEntry) -> Mention:
    named = Input(source.name, entry.dialogue.id)
    if entry.image is None:
        return Mention(named, f"{source.short_path}#{number}", "", dialogue=entry.dialogue, split=source.split)
    path = join(source.image_root, _inside(entry.dialogue.id, entry.image, source.image_root))
    short = path_below(root, path_in(source.image_root, path))
    return Mention(named, short, canonical(path), dialogue=entry.dialogue, split=source.split)


def _file_mention(source: ImagesSource, root: str, path: str) -> Mention:
    """Make a mention of a file below `root`, or of a line of a list file."""
    if not is_utf8(path) or "\0" in path:
        raise Rejected("bad_path", "the file's name is not UTF-8 text", path)
    below = folder_of(source.pattern)
    if is_list(source.pattern):
        below = "" if is_absolute(path) else source.image_root
        path = path if is_absolute(path) else join(source.image_root, _inside(path, path))
    short = path_below(root, path_in(below, path) if below else canonical(path))
    return Mention(Input("folder", path), short, canonical(path), split=source.split)


def _inside(entry_id: str, path: str, folder: str = "") -> str:
    """Check a path of an entry, relative to a folder, or absolute and below it, as some tools write it."""
    if folder and is_absolute(path):
        folder, path = local_path(join(folder, "")), local_path(path)
        path = path.removeprefix(folder).removeprefix(canonical(folder))
    try:
        return checked_relative(path)
    except Rejected as error:
        raise Rejected(error.reason, str(error), entry_id) from error


def path_in(folder: str, path: str) -> str:
    """Return the path of a file of a folder, links resolved: all of them, or, where one leads out of the folder, those
    to the folder alone. A row names a file by what is below."""
    top, uri = canonical(join(folder, "x")).removesuffix("x"), canonical(path)
    if uri.startswith(top) or not is_local(path):
        return uri
    return top + path.removeprefix(folder.rstrip("/")).lstrip("/")


def folder_of(pattern: str) -> str:
    """Return the folder below which the files of a glob or folder lie."""
    return pattern if is_folder(pattern) else dirname(fixed_part(pattern)) or "."


def path_below(root: str, uri: str) -> str:
    """Return the path of a file from the root of all sources, or from its own storage's where it lies elsewhere."""
    return uri.removeprefix(f"{root.rstrip('/')}/").split("://")[-1].lstrip("/")


def listed_paths(pattern: str) -> tuple[list[str], int]:
    """Return the files that a glob, folder or list file names, and the number of hidden ones, which are left out.

    Raises:
        UserError: if there are none.
    """
    if is_list(pattern):
        with open_read(pattern) as file:
            text = file.read().removeprefix(codecs.BOM_UTF8)
        if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # PowerShell's `>` writes it
            text = text.decode("utf-16", "replace").encode()
        lines = text.splitlines()
        return [path for line in lines if (path := line.decode(errors="surrogateescape").strip())], 0
    paths, hidden = visible_files(pattern)
    if paths:
        return paths, hidden
    if hidden:
        fault = "names hidden files only"
    elif is_nowhere(pattern):
        fault = "there is no such file or folder"
    else:
        fault = "no file matches" if fixed_part(pattern) != pattern else "holds no file"
    raise UserError(f"{fault}; a folder with files, a glob in quotes, or a .txt list would work")


def visible_files(pattern: str) -> tuple[list[str], int]:
    """Return the files that a glob or folder names, and the number of hidden ones, which are left out.

    Hidden is what is so below the folder that the user names, which may lie in a hidden one itself.
    """
    found = list_files(pattern)
    paths = [p for p in found if not is_hidden(p.removeprefix(pattern).removeprefix(fixed_part(pattern)))]
    return paths, len(found) - len(paths)


def is_list(pattern: str) -> bool:
    return pattern.lower().endswith(".txt")


def is_absolute(path: str) -> bool:
    return path.startswith("/") or "://" in path
