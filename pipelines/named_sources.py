"""The sources that a command line names: their files, checked to be there, with the split and the classes of each."""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from posixpath import basename, join

from collavo.categories import labels_by_id
from collavo.cli import naming
from collavo.dataset import category_set, check_complete
from collavo.dataset import notes as file_notes
from collavo.errors import UserError
from collavo.sources.records import NoImageColumn, ignored_columns, is_record_file, is_tar
from collavo.storage import canonical, exists, fixed_part, is_local
from pipelines.options import SourceFlags
from pipelines.source_categories import SourceCategories
from pipelines.sources import (
    CocoSource,
    ImagesSource,
    LlavaSource,
    RecordSource,
    Sources,
    folder_of,
    is_absolute,
    is_list,
    listed_paths,
    open_records,
    path_in,
    source_named,
    visible_files,
)


def named_sources(flags: SourceFlags, sets: SourceCategories, notes: list[str]) -> Sources:
    """List the sources that the flags name.

    Args:
        sets: takes note of the classes of each.
        notes: takes what the user should know, a line each.

    Raises:
        UserError: for flags that do not fit each other, and for files that are not there or cannot be used.
    """
    if len(flags.coco_images) != len(flags.coco):
        raise UserError(
            f"--coco_images names {len(flags.coco_images)} folders for {len(flags.coco)} COCO files; each file "
            "needs the folder of its images"
        )
    masks = flags.coco_masks or tuple(uri.removesuffix(".gz").removesuffix(".json") for uri in flags.coco_panoptic)
    if len(masks) != len(flags.coco_panoptic):
        raise UserError(f"--coco_masks names {len(masks)} folders for {len(flags.coco_panoptic)} --coco_panoptic files")
    if flags.llava_json and not flags.image_root:
        raise UserError("--llava_json needs --image_root, the folder that its image paths start from")
    for name in ("coco_panoptic", "coco_instances", "coco_images", "coco_masks", "llava_json", "image_root", "dataset"):
        for uri in masks if name == "coco_masks" else as_tuple(getattr(flags, name)):
            if is_local(uri) and not exists(uri) and not (name == "dataset" and fixed_part(uri) != uri):
                if name == "coco_masks" and not flags.coco_masks:
                    raise UserError(
                        f"--coco_panoptic {flags.coco_panoptic[masks.index(uri)]}: its masks are looked for in {uri}, "
                        "which is not there; --coco_masks names their folder, and --coco_instances reads instance files"
                    )
                raise UserError(f"--{name} {uri}: there is no such file or folder")
    own = [sets.of_annotations("coco_panoptic", uri) for uri in flags.coco_panoptic]
    own += [sets.of_annotations("coco_instances", uri) for uri in flags.coco_instances]
    crayon_files = tuple(
        uri
        for pattern in flags.from_crayon
        for uri in _files_named("from_crayon", pattern, lambda name: name.endswith(".parquet"), ".parquet")
    )
    if crayon_files:
        with naming("from_crayon"):
            check_complete(crayon_files)
            sets.add_finished(category_set(crayon_files), crayon_files)
            notes.extend(file_notes(crayon_files))
    tables = [labels_by_id(source, sets.target, sets.renamed) for source in own]
    splits = _parallel("coco_split", flags.coco_split, flags.coco, notes)
    names = ("coco",) * len(flags.coco_panoptic) + ("coco_instances",) * len(flags.coco_instances)
    masks += ("",) * len(flags.coco_instances)
    columns = zip(names, flags.coco, flags.coco_images, masks, tables, splits, strict=True)
    coco = tuple(CocoSource(*of_file) for of_file in columns)
    root = flags.image_root or ""
    llava_splits = _parallel("llava_split", flags.llava_split, flags.llava_json, notes)
    llava = tuple(
        LlavaSource("llava", uri, root, short, split)
        for uri, short, split in zip(flags.llava_json, _short_paths(flags.llava_json), llava_splits, strict=True)
    )
    image_splits = _parallel("images_split", flags.images_split, flags.images, notes)
    images = tuple(ImagesSource(pattern, root, s) for pattern, s in zip(flags.images, image_splits, strict=True))
    shards = [_record_files(path, notes) for path in flags.dataset]
    dataset_splits = _parallel("dataset_split", flags.dataset_split, flags.dataset, notes, shards)
    for path, uris in zip(flags.dataset, shards, strict=True):
        notes += _columns_note(path, uris[0], flags.image_column)
    return Sources(
        root=_common_root([*(source.images_root for source in coco), *([root] if llava else [])], images, notes),
        coco=coco,
        llava=llava,
        images=images,
        records=tuple(
            RecordSource(uri, flags.image_column, split)
            for uris, split in zip(shards, dataset_splits, strict=True)
            for uri in uris
        ),
        crayon_files=crayon_files,
    )


def _parallel(
    flag: str, given: tuple[str, ...], sources: Sequence[str], notes: list[str], files: Sequence[Sequence[str]] = ()
) -> tuple[str, ...]:
    """Choose a split for each source; an empty one stands for a choice by content.

    Args:
        files: of each source, where it has several.
    """
    if not given:
        names = {uri: basename(uri.rstrip("/")) for uri in sources}
        for source, uris in zip(sources, files, strict=False):
            names |= {uri: uri.removeprefix(f"{source.rstrip('/')}/") for uri in uris if uri.startswith(source)}
        for uri, name in names.items():
            if match := re.search(r"(?<![a-z])(train|val|validation|test)(?![a-z])", name.lower()):
                notes.append(
                    f"{uri} says {match[1]!r} in its name, but pictures are split by their content; --{flag} keeps a "
                    "source's own split"
                )
                break
        return ("",) * len(sources)
    if len(given) == 1:
        return given * len(sources)
    if len(given) != len(sources):
        raise UserError(f"--{flag} names {len(given)} splits for {len(sources)} sources; name one, or one for each")
    return given


def _short_paths(uris: Sequence[str]) -> list[str]:
    """Name files by their paths below the folder that all of them lie in."""
    paths = [canonical(uri) for uri in uris]
    root = _shared_folder([posixpath.dirname(path) for path in paths])
    return [path.removeprefix(root).lstrip("/") for path in paths]


def _common_root(roots: Sequence[str], images: Sequence[ImagesSource], notes: list[str]) -> str:
    """Return the folder that all images lie in, from which their ids count: the same however the command was typed."""
    folders = [canonical(join(root, "x")).removesuffix("/x") for root in roots]
    for source in images:
        folders += {posixpath.dirname(path) for path in _list_for_root(source, notes)}
    return _shared_folder(folders)


def _shared_folder(folders: Sequence[str]) -> str:
    # By parts, not by characters; `s3:` is one of them, and two kinds of storage share none.
    shared = posixpath.commonprefix([folder.split("/") for folder in folders])
    return "/".join(shared) or ("/" if shared else "".join(folders[:1]))


def _list_for_root(source: ImagesSource, notes: list[str]) -> list[str]:
    with source_named("images", source.pattern):
        paths, hidden = listed_paths(source.pattern)
    if hidden:
        files = "hidden file is" if hidden == 1 else "hidden files are"
        notes.append(f"{source.pattern}: {hidden:,} {files} left out")
    if not is_list(source.pattern):
        below = folder_of(source.pattern)
        return [path_in(below, path) for path in paths]
    named = {path if is_absolute(path) else join(source.image_root, "x") for path in paths}
    return [canonical(path) for path in named]


def _files_named(flag: str, pattern: str, is_wanted: Callable[[str], bool], kind: str) -> list[str]:
    """List the files of a kind that a glob or folder names."""
    with source_named(flag, pattern):
        listed = visible_files(pattern)[0]
    found = [uri for uri in listed if is_wanted(uri)]
    if not found:
        kinds = Counter(posixpath.splitext(uri)[1] or "without suffix" for uri in listed).most_common(3)
        others = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds)
        remedy = "; these are of save_to_disk, to_parquet writes what is read here" if ".arrow" in dict(kinds) else ""
        raise UserError(f"--{flag} {pattern}: names no {kind} file{f', but {others}' if others else ''}{remedy}")
    return found


def _record_files(path: str, notes: list[str]) -> list[str]:
    """List the files of a data set, without the Parquet files that img2dataset puts beside its tars: their rows say
    where each picture came from."""
    found = _files_named("dataset", path, is_record_file, ".parquet or .tar")
    tars = {re.sub(r"\.(tar|tar\.gz|tgz)$", "", uri, flags=re.IGNORECASE) for uri in found if is_tar(uri)}
    kept = [uri for uri in found if is_tar(uri) or posixpath.splitext(uri)[0] not in tars]
    if beside := len(found) - len(kept):
        files = "a .parquet file is" if beside == 1 else f"{beside:,} .parquet files are"
        notes.append(f"{path}: {files} left out, as a tar of the same name holds the pictures")
    return kept


def _columns_note(path: str, uri: str, image_column: str | None) -> list[str]:
    """Name the columns of a data set that nothing is taken from; its first file stands for all."""
    with source_named("dataset", uri), open_records(uri) as file:
        try:
            unused = ignored_columns(file, uri, image_column)
        except NoImageColumn as error:
            raise UserError(f"{error}; --image_column names the one with the images") from error
    return [f"{path}: nothing is taken from the columns {', '.join(unused)}"] if unused else []


def as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the values of a flag that takes one or several, and may be unset."""
    return value if isinstance(value, tuple) else (value,) if value else ()
