"""Crayon data on disk: which files make up a data set, its rows, and a row's picture."""

import errno
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from posixpath import basename, dirname, join
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from collavo.categories import read_categories
from collavo.errors import LeftOut, Rejected, UserError, first_line
from collavo.images import decode_rgb
from collavo.panoptic.index_png import panoptic_map_of
from collavo.panoptic.maps import PanopticMap
from collavo.row_checks import check_record, check_schema, digest_of, schema_version
from collavo.sources.image_paths import checked_relative, is_hidden
from collavo.storage import (
    FAULTS,
    MANIFEST,
    exists,
    fault_line,
    fixed_part,
    is_folder,
    is_local,
    list_files,
    local_path,
    open_random,
    refuse_pipe,
)
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CrayonRow, file_facts

_ROWS_IN_MEMORY = 50
_SHARD_NAME = re.compile(r"(crayon|train|validation)-\d{5}-of-(\d{5})\.parquet")


def find_files(paths: Sequence[str]) -> list[str]:
    """Find the Parquet files of one data set or several, checked to be crayon data, with no shard missing.

    Files that another tool has written again - `datasets`, pandas, Polars, DuckDB - are as good as our own: columns may
    be of wider types, and metadata may be gone.

    Args:
        paths: files, folders whose `*.parquet` are meant (on a disk those below, if a folder itself has none), or glob
            patterns, on a disk or in a store.

    Raises:
        UserError: for a path that is not there, a file that is not crayon data, or an incomplete set of shards.
    """
    files = sorted({file for path in paths for file in _files_of(path)})
    for file in files:
        check_schema(_schema_of(file), file)
    check_complete(files)
    return files


def check_complete(files: Sequence[str]) -> None:
    """Refuse files of a data set some shards of which are not among them.

    Raises:
        UserError: naming the folder, and what is there of how many.
    """
    for folder in {dirname(file) for file in files}:
        _check_complete(folder, [basename(file) for file in files if dirname(file) == folder])


def category_set(files: Sequence[Path | str]) -> CategorySet:
    """Read the set of classes that the rows of some files have.

    Raises:
        UserError: where files have different sets.
    """
    sets = _category_sets(files)
    first_uri, first = next(iter(sets.items()))
    for uri, other in sets.items():
        if [c.name for c in other] != [c.name for c in first]:
            raise UserError(f"{uri} has the classes of {other.name}, {first_uri} those of {first.name}")
        if otherwise := [c.name for c, d in zip(other, first, strict=True) if c.is_thing != d.is_thing]:
            raise UserError(f"{otherwise[0]!r} is a thing in one of {uri} and {first_uri}, and stuff in the other")
    return first


def notes(files: Sequence[Path | str]) -> list[str]:
    """Say what a user should know of some files, a line each."""
    lines = []
    if old := [file for file in files if schema_version(_schema_of(file)) == 1]:
        are = f"{len(old)} files, {old[0]} first, are" if len(old) > 1 else f"{old[0]} is"
        lines.append(f"{are} of schema version 1: no row has an image_sha256")
    for file in files:
        if match := re.search(r"(?<![a-z])(train|val|valid|validation|dev|test)(?![a-z])", basename(file).lower()):
            other = "validation" if match[1] == "train" else "train"
            if count := count_rows([file], other):
                rows = "1 row" if count == 1 else f"{count:,} rows"
                lines.append(
                    f"{file} holds {rows} of the split {other!r}: the column `split` counts, not a file's name"
                )
    return lines


def check_repeats(files: Sequence[str]) -> None:
    """Refuse data sets that hold the same picture: a model would learn it twice, or be judged on what it has seen.

    Raises:
        UserError: naming two data sets, how many pictures they share, and how to merge them.
    """
    seen: dict[bytes, tuple[str, str]] = {}
    repeated: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)  # whether in another split, by data sets
    for file in files:
        if "image_sha256" not in _schema_of(file).names:
            continue
        with opened_parquet(file) as parquet:
            for record in read_records(parquet, columns=["image_sha256", "split"]):
                if isinstance(record, Rejected) or (digest := digest_of(record)) is None:
                    continue
                split, folder = seen.setdefault(digest, (record["split"], dirname(file)))
                if folder != dirname(file) or split != record["split"]:
                    repeated[folder, dirname(file)].append(split != record["split"])
    if repeated:
        (one, other), crossing = next(iter(repeated.items()))
        splits = f", {sum(crossing)} of them in another split," * any(crossing)
        if one == other:
            raise UserError(
                f"{len(crossing)} pictures of {one or '.'} are in both splits, and a model would be judged on what it "
                f"has seen; merge their rows with build_crayon.py --from_crayon {one or '.'}"
            )
        raise UserError(
            f"{len(crossing)} pictures of {one} are in {other} too{splits} and would count twice; merge the data sets "
            f"with build_crayon.py --from_crayon {one} {other}"
        )


def read_rows(
    files: Sequence[Path | str],
    split: str | None = None,
    left_out: LeftOut | None = None,
    *,
    image_id: str | None = None,
) -> Iterator[CrayonRow]:
    """Read the rows of some files, in order, a bounded number in memory.

    Pictures of row groups that hold no wanted row are not read.

    Args:
        split: `train` or `validation`; None for all rows.
        left_out: where damaged rows are counted; None if there must be none.
        image_id: of the rows that are wanted; None for all.

    Raises:
        UserError: for a damaged file, and for a damaged row where `left_out` is None.
    """
    sets: dict[str, CategorySet] = {}
    for file in files:
        with opened_parquet(file) as parquet:
            categories = _stated_set(parquet.schema_arrow, str(file))
            if categories is None:
                sets = sets or _category_sets(files)
                categories = sets[str(file)]
            groups = set(range(parquet.num_row_groups))
            for column, value in (("split", split), ("image_id", image_id)):
                groups &= groups if value is None else set(_groups_that_may_hold(parquet, column, value))
            for record in chain.from_iterable(read_records(parquet, group=group) for group in sorted(groups)):
                try:
                    row = checked_row(record, categories)
                except Rejected as error:
                    if left_out is None:
                        raise UserError(f"{file}: row {error.entry_id}: {error.reason}: {error}") from error
                    left_out.add(error.reason, f"row {error.entry_id} of {basename(file)}", str(error))
                    continue
                if split in (None, row.split) and image_id in (None, row.image_id):
                    yield row


def _groups_that_may_hold(parquet: pq.ParquetFile, column: str, value: str) -> Iterator[int]:
    """Find the row groups that have a value in a column, or none where there should be one."""
    equal = pc.fill_null(pc.equal(parquet.read(columns=[column])[column], value), True)
    first = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if pc.any(equal.slice(first, rows)).as_py():
            yield group
        first += rows


def checked_row(
    record: Mapping[str, Any] | Rejected, categories: CategorySet, with_instructions: bool = True
) -> CrayonRow:
    """Make the row that `read_records` yielded.

    Raises:
        Rejected: as `check_record`.
    """
    if isinstance(record, Rejected):
        raise record
    record = record if with_instructions else {**record, "instructions": ()}
    check_record(record, categories)
    return CrayonRow.from_record(record)


def count_rows(files: Sequence[Path | str], split: str | None = None) -> int:
    """Count the rows of some files, of one split or all.

    Raises:
        UserError: for a damaged file.
    """
    rows = 0
    for file in files:
        with opened_parquet(file) as parquet:
            if split is None:
                rows += parquet.metadata.num_rows
            else:
                rows += pc.sum(pc.equal(parquet.read(columns=["split"])["split"], split)).as_py() or 0
    return rows


@contextmanager
def opened_parquet(file: Path | str, footer: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; whatever damage Arrow finds in the block becomes one line.

    Args:
        file: a path or a URI.
        footer: the file's, where it was read before; it is not read again then.

    Raises:
        UserError: for a file that cannot be read.
    """
    try:
        if is_local(str(file)):
            refuse_pipe(str(file))  # Arrow opens files of a disk itself, faster than through Python
        source = file if is_local(str(file)) else open_random(str(file))
        yield pq.ParquetFile(source, metadata=footer)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # names of columns are decoded when asked for
        raise UserError(f"{file}: cannot be read as Parquet ({first_line(error)})") from error


def read_records(
    parquet: pq.ParquetFile, columns: Sequence[str] | None = None, group: int | None = None
) -> Iterator[dict[str, Any] | Rejected]:
    """Yield the rows of a file, or of one row group, as plain values; one whose text is no text comes as an error."""
    groups = None if group is None else [group]
    number = sum(parquet.metadata.row_group(before).num_rows for before in range(group or 0))
    for batch in parquet.iter_batches(_ROWS_IN_MEMORY, row_groups=groups, columns=columns):
        try:
            records: Iterable[dict[str, Any] | Rejected] = batch.to_pylist()
        except UnicodeDecodeError:
            records = [_record_or_error(batch.slice(row, 1), number + row) for row in range(batch.num_rows)]
        yield from records
        number += batch.num_rows


def _record_or_error(batch: pa.RecordBatch, number: int) -> dict[str, Any] | Rejected:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Rejected("bad_value", f"text that is not UTF-8 ({error.reason})", str(number))


def image_bytes(path: str, data: bytes | None, image_root: Path | None) -> bytes:
    """Read the encoded image of a row.

    Args:
        path, data: the row's `image`; `data` is None where the row refers to its image.
        image_root: the folder that such paths start from.

    Raises:
        UserError: where the row refers to its image and no root is given, or the root's disk does not answer.
        Rejected: `missing_file`, `unreadable_file`, `path_escapes_root` or `bad_path`.
    """
    if data is not None:
        return data
    if image_root is None:
        raise UserError(
            f"the rows refer to their images ({path}) and do not hold them; --image_root must name their folder"
        )
    file = image_root / checked_relative(path)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        if not image_root.is_dir() or not any(os.scandir(image_root)):  # as an unmounted disk leaves it
            raise UserError(f"{image_root}: there is no file; is the disk of the images mounted?", 1) from error
        raise Rejected("missing_file", f"{file}: there is no such file") from error
    except OSError as error:
        if error.errno not in _FAULTS_OF_ONE_FILE:
            raise UserError(f"{file}: {error.strerror}", 1) from error
        raise Rejected("unreadable_file", f"{file}: {error.strerror}") from error


_FAULTS_OF_ONE_FILE = (
    errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,
)  # fmt: skip
"""A name or a permission. All else tells of a disk, on which the other files cannot be read either."""


def decoded_image(path: str, data: bytes | None, image_root: Path | None) -> np.ndarray:
    """Decode the image of a row as upright RGB, uint8 [height, width, 3].

    Raises:
        UserError, Rejected: as `image_bytes`, and as `collavo.images.decode_rgb`.
    """
    return decode_rgb(image_bytes(path, data, image_root))


def image_and_map(
    row: CrayonRow, image_root: Path | None, categories: CategorySet = COCO_PANOPTIC
) -> tuple[np.ndarray, PanopticMap]:
    """Decode a row's image, uint8 RGB [height, width, 3], and its map.

    Args:
        image_root: the folder of the images, for rows that refer to their image.
        categories: the set of the classes of the data set, see `category_set`.

    Raises:
        UserError: if no root is given and the row refers to its image.
        Rejected: if it has no image, or image or map are missing or damaged.
    """
    if row.image_path is None or row.panoptic_png is None:
        raise Rejected("without_image", "a dialogue about no image")
    image = decoded_image(row.image_path, row.image_bytes, image_root)
    size_wh = (image.shape[1], image.shape[0])
    return image, panoptic_map_of(row.panoptic_png, row.segments, categories, size_wh)


def _schema_of(file: Path | str) -> pa.Schema:
    with opened_parquet(file) as parquet:
        return parquet.schema_arrow


def stated_facts(metadata: Mapping[bytes, bytes] | None, file: Path | str) -> dict[str, Any]:
    """Read the facts of a build from a file's metadata. Those of its schema lack what is known only in the end.

    Raises:
        UserError: if they are damaged.
    """
    try:
        return file_facts(metadata or {})
    except ValueError as error:
        raise UserError(f"{file}: its metadata are damaged ({first_line(error)})") from error


def _category_sets(files: Sequence[Path | str]) -> dict[str, CategorySet]:
    """Return the set of each file that its metadata state; for files without, the one that their segments show, all
    files together, since one alone may lack some class."""
    stated: dict[str, CategorySet] = {}
    seen: dict[int, tuple[Mapping[str, Any], str]] = {}
    for uri in map(str, files):
        with opened_parquet(uri) as parquet:
            if found := _stated_set(parquet.schema_arrow, uri):
                stated[uri] = found
            else:
                _see_classes(parquet, uri, seen)
    if len(stated) == len({*map(str, files)}):
        return stated
    for known in (*stated.values(), COCO_PANOPTIC):
        if all(0 <= n < len(known) and known[n].display_name == s["category"] for n, (s, _) in seen.items()):
            shown = known
            break
    else:
        shown = _shown_set(seen)
    return {uri: stated.get(uri, shown) for uri in map(str, files)}


def _stated_set(schema: pa.Schema, file: str) -> CategorySet | None:
    if stated := stated_facts(schema.metadata, file).get("categories"):
        try:
            return CategorySet.from_records(stated["name"], stated["categories"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: its metadata state no set of classes ({first_line(error)})") from error
    return COCO_PANOPTIC if schema_version(schema) == 1 else None


def _see_classes(parquet: pq.ParquetFile, file: str, seen: dict[int, tuple[Mapping[str, Any], str]]) -> None:
    """Note a segment of each label, and the file that it is in."""
    for record in read_records(parquet, columns=["segments"]):
        for s in () if isinstance(record, Rejected) else record["segments"] or ():
            if s is None or None in (s["label"], s["category_id"], s["category"], s["is_thing"]):
                continue
            first, where = seen.setdefault(s["label"], (s, file))
            if (name := first["category"]) != s["category"]:
                other = "in another" if where == file else f"in one of {where}"
                raise UserError(
                    f"{file}: label {s['label']} is {s['category']!r} in one row and {name!r} {other}; another "
                    "tool has joined data sets of different classes, whose rows belong in files of their own"
                )


def _shown_set(seen: Mapping[int, tuple[Mapping[str, Any], str]]) -> CategorySet:
    """Make a set of the classes that segments have. Another tool dropped the metadata: classes that no segment has keep
    their place, but not their name."""
    file = next(iter(seen.values()))[1]
    if not 0 <= min(seen) <= max(seen) < _MOST_CLASSES:
        raise UserError(f"{file}: its segments have labels from {min(seen)} to {max(seen)}; no set has such classes")
    records = []
    for label in range(max(seen) + 1):
        unnamed = {"category_id": -1 - label, "category": f"unnamed {label}", "is_thing": False}
        segment = seen[label][0] if label in seen else unnamed
        name, number = segment["category"], segment["category_id"]
        records.append({"id": number, "name": name, "display_name": name, "isthing": segment["is_thing"]})
    return read_categories(records, file)


_MOST_CLASSES = 100_000
"""More of them come from a damaged label."""


def _files_of(path: str) -> list[str]:
    if is_local(path):
        file = Path(local_path(path))
        files = list_files(path) if not file.is_dir() else [str(found) for found in file.glob("*.parquet")]
        if not files and file.is_dir():  # as in a copy of a hub's data set, whose files lie in `data`
            below = sorted(found.relative_to(file) for found in file.rglob("*.parquet"))
            files = [str(file / found) for found in below if not is_hidden(str(found))]
    else:
        try:
            files = [] if is_folder(path) else list_files(path)
            if files != [path] and fixed_part(path) == path:
                files = list_files(f"{path.rstrip('/')}/*.parquet")
        except FAULTS as error:
            raise UserError(fault_line(path, error)) from error
    if not files:
        lacking = ".parquet file" if not is_local(path) or Path(local_path(path)).exists() else "such file or folder"
        raise UserError(f"{path}: there is no {lacking}; build data with pipelines/build_crayon.py")
    return files


def _check_complete(folder: str, names: Sequence[str]) -> None:
    for kind, total in {(match[1], match[2]) for name in names if (match := _SHARD_NAME.fullmatch(name))}:
        found = sum(name.startswith(f"{kind}-") and name.endswith(f"-of-{total}.parquet") for name in names)
        if found < int(total):
            raise UserError(
                f"{folder}: {found} of {int(total)} files {kind}-*.parquet; name them all, or build the data again"
            )
        if not is_local(folder) and not exists(join(folder, MANIFEST)):  # a local data set appears whole
            raise UserError(f"{folder}: there is no {MANIFEST}, so a build is writing there, or was stopped")
