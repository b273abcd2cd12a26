"""Data sets that hold their images: Parquet files, as the hub has them, and WebDataset's tar shards, read as streams.

An image is a column `image` (bytes, or a struct of `bytes` and `path`) or a member such as `000001.jpg` of a tar; what
has the same name but for its extension belongs to it. Dialogues are taken from `conversations` or `messages`, in any
shape that `collavo.sources.dialogues` reads. All other columns and members are left alone.
"""

import io
import json
import posixpath
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from collavo.errors import Rejected, UserError
from collavo.sources.dialogues import dialogue_of
from collavo.sources.image_paths import is_image_name
from schemas.crayon_row import Dialogue

DIALOGUE_COLUMNS = ("conversations", "messages")
_ROWS_IN_MEMORY = 50
_PARQUET, _TAR = b"PAR1", (".tar", ".tar.gz", ".tgz")


class ImageRecord(NamedTuple):
    """An image with its bytes; `path` is what the record calls it, unique within its file."""

    path: str
    data: bytes
    dialogue: Dialogue | None


def is_record_file(name: str) -> bool:
    """Tell whether a file of a folder or glob is one of a data set, by its name."""
    return name.lower().endswith((".parquet", *_TAR))


def stream_records(file: BinaryIO, name: str, image_column: str | None = None) -> Iterator[ImageRecord | Rejected]:
    """Yield all images of a Parquet file or tar shard, in order; an unusable one comes as the error that says why.

    Args:
        file: open for reading; seekable for Parquet.
        name: its path, for messages and for the paths of its records.
        image_column: the Parquet column with the images; None for `image`.

    Raises:
        UserError: where the file is neither, is damaged, or has no images.
    """
    stem = posixpath.basename(name)
    try:
        if name.lower().endswith(_TAR):
            yield from _tar_records(file, stem)
        else:
            yield from _parquet_records(file, name, stem, image_column or "image")
    except (pa.ArrowException, tarfile.TarError, EOFError) as error:
        raise UserError(f"{name}: cannot be read ({str(error).strip().splitlines()[0]})") from error


def count_records(file: BinaryIO, name: str) -> int:
    """Count records: of a Parquet file exactly, of a tar shard by its size and its first ones."""
    if not name.lower().endswith(_TAR):
        return cast(int, pq.ParquetFile(file).metadata.num_rows)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    first = sum(1 for _ in islice(stream_records(file, name), _ROWS_IN_MEMORY))
    return round(first * size / file.tell()) if first == _ROWS_IN_MEMORY else first


def ignored_columns(columns: Sequence[str], image_column: str | None = None) -> list[str]:
    """Return those of a Parquet file's columns that nothing is taken from."""
    used = {image_column or "image", "id", *DIALOGUE_COLUMNS}
    return [column for column in columns if column not in used]


def _parquet_records(file: BinaryIO, name: str, stem: str, image_column: str) -> Iterator[ImageRecord | Rejected]:
    parquet = pq.ParquetFile(file)
    names = parquet.schema_arrow.names
    if image_column not in names:
        raise UserError(f"{name}: has no column {image_column!r}; its columns are {', '.join(names)}")
    columns = [column for column in (image_column, "id", *DIALOGUE_COLUMNS) if column in names]
    row = 0
    for batch in parquet.iter_batches(batch_size=_ROWS_IN_MEMORY, columns=columns):
        for record in batch.to_pylist():
            yield _record(f"{stem}/{row:06d}", record[image_column], record)
            row += 1


def _tar_records(file: BinaryIO, stem: str) -> Iterator[ImageRecord | Rejected]:
    """Yield the records of a tar. Their members stand together and share what their names begin with, up to the first
    dot."""
    key = ""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            if not member.isfile():
                continue
            folder, base = posixpath.split(member.name)
            its_key = posixpath.join(folder, base.partition(".")[0])
            if members and its_key != key:
                yield from _tar_record(stem, key, members)
                members = {}
            key = its_key
            content = tar.extractfile(member)
            members[base.partition(".")[2].lower()] = content.read() if content else b""
    if members:
        yield from _tar_record(stem, key, members)


def _tar_record(stem: str, key: str, members: Mapping[str, bytes]) -> Iterator[ImageRecord | Rejected]:
    image = next((name for name in members if is_image_name(f"x.{name}")), None)
    if image is None:
        yield Rejected("not_an_image", f"its members are {', '.join(f'.{name}' for name in members)}", f"{stem}/{key}")
        return
    try:
        said = json.loads(members["json"]) if "json" in members else {}
    except ValueError as error:
        yield Rejected("malformed_entry", f"{key}.json is not JSON ({error})", f"{stem}/{key}")
        return
    said = said if isinstance(said, dict) else {"conversations": said}
    yield _record(f"{stem}/{key}.{image}", members[image], said)


def _record(path: str, image: Any, said: Mapping[str, Any]) -> ImageRecord | Rejected:
    # A list of one is what chat data sets have; of several, none is the picture that a row is about.
    if isinstance(image, list):
        if len(image) != 1:
            return Rejected("several_images", f"the record holds {len(image)} images, a row holds one", path)
        image = image[0]
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        found = f"only the path {image['path']!r}" if isinstance(image, Mapping) and image.get("path") else "nothing"
        return Rejected("missing_file", f"the record holds no image bytes, {found}", path)
    has_dialogue = any(said.get(column) for column in DIALOGUE_COLUMNS)
    try:
        dialogue = dialogue_of(said, str(said.get("id") or path)) if has_dialogue else None
    except Rejected as error:
        return Rejected(error.reason, str(error), path)
    return ImageRecord(path, data, dialogue)
