"""Export crayon data for other trainers: `python -m collavo.export_data --data out/*.parquet --to llava --output DIR`.

The formats are those of `collavo.export_formats`. An export appears whole, in a folder of its own, and ends with an
account of every row.
"""

import argparse
import io
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track

from collavo.cli import Parser
from collavo.dataset import find_files, read_rows
from collavo.errors import Rejected, UserError
from collavo.export_formats import FORMATS, Picture, WriteRow, entries_of, fault_of, with_image_token
from collavo.sources.image_paths import checked_relative
from schemas.crayon_row import SPLITS, CrayonRow

_STAGING = ".unfinished"
_EXPORTED = re.compile(
    r"images|panoptic|(llava|dataset_info)\.json|(rows|crayon)\.jsonl|(train|validation)-\d+\.parquet"
)

# Where it is not Pillow's name of the format.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}

_DESCRIPTION = """\
Export crayon data for other trainers: as conversations about an image each, or
row by row. Dialogues stay as they are; the questions about an image make one
conversation per task. A summary tells what became of every row.

formats:
  llava         llava.json, images/
                for LLaVA's --data_path DIR/llava.json --image_folder DIR
  llamafactory  crayon.jsonl, dataset_info.json, images/
                for LLaMA-Factory's dataset_dir: DIR, dataset: crayon
  trl           train-00000.parquet, validation-00000.parquet, ...
                for load_dataset("DIR"): columns `images` and `messages`
  jsonl         rows.jsonl, images/, panoptic/
                every column of a row, images and maps as paths
"""

_EPILOG = """\
examples:
  python -m collavo.export_data --data out/*.parquet --to llava --split train \\
      --output exports/llava
  python -m collavo.export_data --data out --to trl --what instructions \\
      --output exports/trl
"""


Account = Counter[tuple[str, str]]
"""How many of a kind (`rows`, `entries`, ...) had which fate (`train`, `missing_file`, ...)."""

_KINDS = ("rows", "images", "misread images", "entries", "skipped entries", "changed conversations")


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0; what cannot be done exits with status 2 and one line that says why."""
    parser = _build_parser()
    flags = parser.parse_args(argv)
    try:
        files = find_files(flags.data)
        _check(flags, files)
        account = _reformat(files, flags)
    except (UserError, OSError, pa.ArrowException) as error:
        parser.error(str(error))
    for kind in sorted({kind for kind, _ in account}, key=_KINDS.index):
        total = sum(count for (its_kind, _), count in account.items() if its_kind == kind)
        print(f"{kind:<22}{total:>12,}   {_fates(account, kind)}")
    print(f"Data: {flags.output}")
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m collavo.export_data",
        usage="python -m collavo.export_data --data PARQUET --to FORMAT --output DIR ...",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    kinds = ("instructions", "conversations", "all")
    add("--data", metavar="PARQUET", nargs="+", required=True, help="crayon files, or folders of them")
    add("--to", metavar="FORMAT", choices=FORMATS, required=True, help=", ".join(FORMATS))
    add("--output", metavar="DIR", type=Path, required=True, help="a folder for this export alone")
    add("--overwrite", action="store_true", help="replace the export that is there")
    add("--split", metavar="NAME", choices=SPLITS, help="train or validation rows only (default: both)")
    add(
        "--what", metavar="KIND", choices=kinds, default="all", help="instructions, conversations or all (default: all)"
    )
    add("--image_root", metavar="DIR", type=Path, help="where the images are, for data that only refers to them")
    return parser


def _check(flags: argparse.Namespace, files: Sequence[Path]) -> None:
    if flags.to == "jsonl" and flags.what != "all":
        raise UserError(f"--what {flags.what}: jsonl holds all columns of a row; leave --what out")
    if flags.image_root and not flags.image_root.is_dir():
        raise UserError(f"--image_root {flags.image_root}: there is no such folder")
    for source in filter(None, (*files, flags.image_root)):
        if source.resolve().is_relative_to(flags.output.resolve()):
            raise UserError(f"--output {flags.output}: holds {source}, which is to be read; name another folder")


def _reformat(files: Sequence[Path], flags: argparse.Namespace) -> Account:
    account: Account = Counter()
    splits = (flags.split,) if flags.split else SPLITS
    total = sum(pq.read_metadata(file).num_rows for file in files)
    console = Console(stderr=True)
    hidden = not console.is_terminal
    rows = track(read_rows(files), "Reformatting", total, console=console, transient=True, disable=hidden)
    seen: set[str] = set()
    with _staged(flags.output, flags.overwrite) as staging:
        with FORMATS[flags.to](staging) as write:
            for row in rows:
                if row.image_id in seen:
                    found = f"--data: two rows have the image id {row.image_id!r}"
                    raise UserError(f"{found}; export one data set at a time")
                seen.add(row.image_id)
                fate = _export(row, flags, write, account) if row.split in splits else "of_another_split"
                account["rows", fate] += 1
        if not account["images", "written"]:
            raise UserError(f"--data: nothing to export in {total:,} rows ({_fates(account, 'rows')})")
    return account


def _export(row: CrayonRow, flags: argparse.Namespace, write: WriteRow, account: Account) -> str:
    """Write one row; its split, or the reason why it was not written."""
    entries = []
    for entry in entries_of(row, flags.what) if flags.to != "jsonl" else ():
        if fault := fault_of(entry.turns, flags.to):
            account["skipped entries", fault] += 1
            continue
        entries.append(entry._replace(turns=with_image_token(entry.turns)))
        if entry.dialogue_id is not None and entries[-1].turns != entry.turns:
            account["changed conversations", "image_token_added"] += 1
    if not entries and flags.to != "jsonl":
        return "without_entries"
    try:
        picture, is_turned = _picture_of(row, flags.image_root)
    except Rejected as error:
        return error.reason
    write(row, picture, entries)
    for entry in entries:
        account["entries", "instructions" if entry.dialogue_id is None else "conversations"] += 1
    account["images", "written"] += 1
    if is_turned and flags.to in ("llava", "llamafactory"):
        account["misread images", "exif_orientation_ignored"] += 1
    return row.split


def _picture_of(row: CrayonRow, image_root: Path | None) -> tuple[Picture, bool]:
    """The image to export, and whether it is stored turned, which LLaVA and LLaMA-Factory do not see."""
    stem = checked_relative(row.image_id)
    data = _read_image(row, image_root) if row.image_bytes is None else row.image_bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images and odd tags
            with Image.open(io.BytesIO(data)) as image:
                extension = _EXTENSIONS.get(str(image.format), str(image.format).lower())
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception as error:  # Pillow raises a dozen types on what is no image
        raise Rejected("not_an_image", f"{row.image_path}: {error}") from error
    return Picture(f"{stem}.{extension}", data), is_turned


def _read_image(row: CrayonRow, image_root: Path | None) -> bytes:
    if image_root is None:
        found = f"--data: the rows refer to their images ({row.image_path}) and do not hold them"
        raise UserError(f"{found}; --image_root must name the folder that such paths start from")
    path = image_root / checked_relative(row.image_path)
    if not path.is_file():
        raise Rejected("missing_file", str(path))
    return path.read_bytes()


@contextmanager
def _staged(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write an export in, whose content moves to `output` in the end, in place of an earlier export."""
    earlier = _earlier_export(output, overwrite)
    staging = output / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted(staging.iterdir(), key=Path.is_file):  # files name what is in folders, so they come last
            path.rename(output / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _earlier_export(output: Path, overwrite: bool) -> list[Path]:
    """What an earlier export left in the folder, refusing to touch anything else."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: not a folder")
    present = [path for path in output.glob("*") if path.name != _STAGING]
    foreign = [path.name for path in present if not _EXPORTED.fullmatch(path.name)]
    if foreign or (present and not any(path.is_file() for path in present)):
        name = min(foreign or [path.name for path in present])
        raise UserError(f"--output {output}: holds {name}, which is of no export; name an empty folder")
    if present and not overwrite:
        raise UserError(f"--output {output}: holds an export already; --overwrite would replace it")
    return present


def _fates(account: Account, kind: str) -> str:
    return ", ".join(f"{fate} {count:,}" for (its_kind, fate), count in sorted(account.items()) if its_kind == kind)


if __name__ == "__main__":
    sys.exit(main())
