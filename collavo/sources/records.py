"""Data sets that hold their images: Parquet files, as the hub has them, and WebDataset's tar shards, read as streams.

An image is a column `image` (bytes, or a struct of `bytes` and `path`) or a member such as `000001.jpg` of a tar. Up to
its first dot, a member's name is its key, the rest its column; neighbours of the same key make a record.
Dialogues are taken from `conversations`, `messages` or `texts`, in any shape that `collavo.sources.dialogues` reads.
All other columns and members are left alone.
"""

import gzip
import io
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Self, cast

import pyarrow as pa
import pyarrow.parquet as pq

from collavo.errors import Rejected, UserError
from collavo.sources import parsed_json
from collavo.sources.dialogues import asks_about_image, dialogue_of, listed_turns
from collavo.sources.image_paths import is_hidden, is_image_name, is_utf8, without_extension
from schemas.crayon_row import IMAGE_TOKEN, Dialogue

_COLUMNS_BESIDE = ("id", "system", "conversations", "messages", "texts")
"""What is read of a record besides its image."""

_ROWS_IN_MEMORY = 50

_BYTES_PER_PART = 32 << 20
"""Of a Parquet file, what one worker reads at once, if its row groups are no larger."""

_GZIP, _TAR = b"\x1f\x8b", (".tar", ".tar.gz", ".tgz")


class NoImageColumn(UserError):
    """A Parquet file has no column of the name asked for, or several may hold its images."""


class ImageRecord(NamedTuple):
    """An image, or a dialogue about none, whose `data` are None; `path` names the record, uniquely within its file."""

    path: str
    data: bytes | None
    dialogue: Dialogue | None


def is_record_file(name: str) -> bool:
    """Tell whether a file of a folder or glob is one of a data set, by its name."""
    return name.lower().endswith(".parquet") or is_tar(name)


def is_tar(name: str) -> bool:
    """Tell a tar shard, which is read from its start to its end, from a Parquet file, by its name."""
    return name.lower().endswith(_TAR)


def parquet_parts(file: BinaryIO, name: str) -> Iterator[tuple[int, ...]]:
    """Divide the row groups of a Parquet file into parts of some size: each is opened again, with its footer."""
    with _damage_named(name):
        metadata = pq.ParquetFile(file).metadata
        groups: list[int] = []
        size = 0
        for group in range(metadata.num_row_groups):
            groups.append(group)
            size += metadata.row_group(group).total_byte_size
            if size >= _BYTES_PER_PART or group == metadata.num_row_groups - 1:
                yield tuple(groups)
                groups, size = [], 0


def stream_records(
    file: BinaryIO, name: str, image_column: str | None = None, groups: Sequence[int] | None = None
) -> Iterator[ImageRecord | Rejected]:
    """Yield all images of a Parquet file or tar shard, in order; an unusable one comes as the error that says why.

    Args:
        file: open for reading, and seekable.
        name: its path, for messages and for the paths of its records.
        image_column: the column with the images. None for Parquet's `image`, or else its only column of images; in a
            tar, for the only image of a record, or the only one whose column is a mere extension.
        groups: of a Parquet file, the row groups that are read, neighbours; None for all.

    Raises:
        UserError: where the file is neither, is damaged, or has no images.
    """
    stem = posixpath.basename(name)
    with _damage_named(name):
        if is_tar(name):
            for key, members in _members_by_key(file):
                if isinstance(members, Rejected):
                    yield Rejected(members.reason, str(members), f"{stem}/{key}")
                else:
                    yield _tar_record(stem, key, members, image_column)
        else:
            yield from _parquet_records(file, name, stem, image_column, groups)


def count_records(file: BinaryIO, name: str) -> int:
    """Count records: of a Parquet file exactly, of a tar shard by its size and its first ones."""
    if not is_tar(name):
        return cast(int, pq.ParquetFile(file).metadata.num_rows)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    first = sum(1 for _ in islice(stream_records(file, name), _ROWS_IN_MEMORY))
    return round(first * size / file.tell()) if first == _ROWS_IN_MEMORY else first


def ignored_columns(file: BinaryIO, name: str, image_column: str | None = None) -> list[str]:
    """Return the columns of a Parquet file that nothing is taken from, or those of a tar shard's first records.

    Raises:
        UserError: as `stream_records` does.
    """
    with _damage_named(name):
        if not is_tar(name):
            schema = pq.read_schema(file)
            used = {_image_column(schema, name, image_column), *_COLUMNS_BESIDE}
            return [column for column in schema.names if column not in used]
        unused: dict[str, None] = {}
        for _, members in islice(_members_by_key(file), _ROWS_IN_MEMORY):
            if isinstance(members, Rejected):
                continue
            images = _images_of(members, image_column)
            # What is no record is a reject with a reason of its own.
            unused |= dict.fromkeys(set(members) - {*images, "json"}) if len(images) == 1 else {}
        return sorted(unused)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{name}: cannot be read ({str(error).strip().splitlines()[0]})") from error


def _image_column(schema: pa.Schema, name: str, asked: str | None) -> str:
    """Choose the column of images of a Parquet file: the one asked for, `image`, or the only one that holds bytes."""
    wanted = asked or "image"
    if wanted in schema.names:
        return wanted
    found = [field.name for field in schema if not asked and _holds_bytes(field.type)]
    if len(found) == 1:
        return found[0]
    which = f", and images may be in {' or '.join(found)}" if found else ""
    raise NoImageColumn(f"{name}: has no column {wanted!r}{which}; its columns are {', '.join(schema.names)}")


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_dictionary(type_):
        return _holds_bytes(type_.value_type)
    if pa.types.is_struct(type_):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in type_)
    return any(is_kind(type_) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _parquet_records(
    file: BinaryIO, name: str, stem: str, asked: str | None, groups: Sequence[int] | None
) -> Iterator[ImageRecord | Rejected]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    image_column = _image_column(parquet.schema_arrow, name, asked)
    columns = [column for column in (image_column, *_COLUMNS_BESIDE) if column in names]
    if repeated := [column for column in columns if names.count(column) > 1]:
        raise UserError(f"{name}: has several columns {repeated[0]!r}")
    row = sum(parquet.metadata.row_group(group).num_rows for group in range(groups[0] if groups else 0))
    for batch in parquet.iter_batches(_ROWS_IN_MEMORY, row_groups=groups, columns=columns):
        for record in batch.to_pylist():
            yield _record(f"{stem}/{row:06d}", record[image_column], record)
            row += 1


class _Member(tarfile.TarInfo):
    """Says that a header is damaged, where Python's reader takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a damaged header: {error}") from error


def _members_by_key(file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes] | Rejected]]:
    """Yield the keys of a tar, each with its members by column; of a link, the reject. Members of a key stand together,
    and one of a name that came already begins another record. Hidden ones are no part of any: macOS puts a `._0.jpg`
    beside each `0.jpg`. Tars that were joined into one file are read one after the other."""
    key = ""
    members: dict[str, bytes] = {}
    packed = file.read(len(_GZIP)) == _GZIP
    file.seek(0)
    stream = gzip.GzipFile(fileobj=file) if packed else file
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member, ignore_zeros=True) as tar:
        for member in tar:
            if (member.islnk() or member.issym()) and is_image_name(member.name) and not is_hidden(member.name):
                why = f"a link to {member.linkname}; pack files themselves, with tar --dereference --hard-dereference"
                yield member.name, Rejected("not_an_image", why)
            if not member.isreg() or is_hidden(member.name):
                continue
            folder, base = posixpath.split(member.name)
            its_key = posixpath.join(folder, base.partition(".")[0])
            column = base.partition(".")[2].lower()
            if members and (its_key != key or column in members):
                yield key, members
                members = {}
            key = its_key
            content = tar.extractfile(member)
            members[column] = content.read() if content else b""
    while packed and stream.read(1 << 20):  # at its end, a gzip checks what it unpacked
        pass
    if members:
        yield key, members


def _images_of(members: Mapping[str, bytes], image_column: str | None) -> list[str]:
    """Return the columns that may be a record's image: one, unless there is none or nothing says which it is."""
    if image_column:
        wanted = image_column.lower()
        return [wanted] if wanted in members else [column for column in members if without_extension(column) == wanted]
    images = [column for column in members if is_image_name(f"x.{column}")]
    plain = [column for column in images if "." not in column]
    return plain if len(plain) == 1 else images


def _tar_record(stem: str, key: str, members: Mapping[str, bytes], image_column: str | None) -> ImageRecord | Rejected:
    images = _images_of(members, image_column)
    if len(images) != 1:
        reason = "several_images" if images else "not_an_image"
        listed = ", ".join(f".{column}" for column in images or members)
        detail = f"its {'images' if images else 'members'} are {listed}"
        if "json" in members and not images:
            detail += "; tar --sort=name writes it beside its image, which is where it is read"
        return Rejected(reason, detail, f"{stem}/{key}")
    try:
        said = parsed_json(members["json"]) if "json" in members else {}
    except ValueError as error:
        return Rejected("malformed_entry", f"{key}.json is not JSON ({error})", f"{stem}/{key}")
    if not isinstance(said, dict):  # turns alone, or what says nothing here, such as boxes
        is_turn = isinstance(said, list) and said and isinstance(said[0], dict) and ({"from", "role"} & said[0].keys())
        said = {"conversations": said} if is_turn else {}
    return _record(f"{stem}/{key}.{images[0]}", members[images[0]], said)


def _record(path: str, image: Any, said: Mapping[str, Any]) -> ImageRecord | Rejected:
    if not is_utf8(path):
        return Rejected("bad_path", f"{path!r} is not UTF-8", path)
    # A list of one is what chat data sets have; of several, none is the picture that a row is about.
    if isinstance(image, list):
        if len(image) > 1:
            return Rejected("several_images", f"the record holds {len(image)} images, a row holds one", path)
        image = image[0] if image else None
    data, named = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, None)
    has_dialogue = bool(said.get("conversations") or said.get("messages") or listed_turns(said))
    if not (data and isinstance(data, bytes)) and (data is not None or named or not has_dialogue):
        found = f"only the path {named!r}" if named else f"only {data!r:.80}" if data else "nothing"
        remedy = "; store the bytes of the image file there, not base64 or its path" if named or data else ""
        return Rejected("missing_file", f"the record holds no image bytes, {found}{remedy}", path)
    try:
        dialogue = dialogue_of(said, str(said.get("id") or path)) if has_dialogue else None
    except Rejected as error:
        return Rejected(error.reason, str(error), path)
    if data is None and dialogue and asks_about_image(dialogue):
        return Rejected("missing_file", f"{IMAGE_TOKEN} or <img> in the text, but the record holds no image", path)
    return ImageRecord(path, data, dialogue)
