"""Export crayon data for other trainers: `python -m collavo.export_data --data out/*.parquet --to llava --output DIR`.

Reads:    Parquet files that pipelines/build_crayon.py wrote
Writes:   a folder for the export alone, whole or not at all; and an account of every row on the terminal
Not here: the formats, see collavo/export_formats.py
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import collavo
from collavo.cli import REQUIRED, flag, naming, output_folder, parse, run
from collavo.data_card import CARD, front_matter
from collavo.dataset import count_rows, find_files, image_bytes, read_rows
from collavo.errors import LeftOut, Rejected, UserError
from collavo.export_formats import (
    DATA_FILES,
    FORMATS,
    ExportedImage,
    WriteRow,
    entries_of,
    fault_of,
    with_image_token,
    without_system,
)
from collavo.images import format_and_turned
from collavo.sources.image_paths import checked_relative
from collavo.storage import is_local
from schemas.crayon_row import SPLITS, CrayonRow

_EXPORTED = re.compile(r"README\.md|images|panoptic|dataset_info\.json|(train|validation)(\.jsonl?|-\d+\.parquet)")

_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
"""Of the formats whose extension is not Pillow's name for them."""

_DESCRIPTION = """\
Export crayon data for other trainers: as conversations about one image or none,
or row by row. Dialogues stay as they are; the questions about an image make one
conversation per task. A dataset card comes with it, and a summary accounts for
every row.

formats, each with the same for validation in files of its own:
  llava         train.json, images/
                for LLaVA's --data_path DIR/train.json --image_folder DIR
  llamafactory  train.jsonl, dataset_info.json, images/
                for LLaMA-Factory's dataset_dir: DIR, dataset: crayon (to
                validate: crayon_validation)
  trl           train-00000.parquet, ...
                for load_dataset("DIR"): columns `images` and `messages`
  swift         train.jsonl, images/
                for ms-swift, with ROOT_IMAGE_DIR=DIR: --dataset DIR/train.jsonl
  jsonl         train.jsonl, images/, panoptic/
                every column of a row, images and maps as paths
"""

_EPILOG = """\
examples:
  python -m collavo.export_data --data out/*.parquet --to llava --split train \\
      --output exports/llava
  python -m collavo.export_data --data out --to trl --what instructions \\
      --output exports/trl
"""

_CARD_BODY = """\
{head}
# {name}

Crayon instruction data in the format `{to}`: {count:,} entries about {images:,} images, exported by
[collavo](https://arxiv.org/abs/2402.11248) {version}. The images and dialogues are other people's, under the licences
of their sources; the instructions were made from templates.
"""

Account = defaultdict[str, Counter[str]]
"""How many things of each kind (`rows`, `entries`, ...) ended in which way (`train`, `missing_file`, ...)."""

_KINDS = ("rows", "images", "misread images", "entries", "skipped entries", "changed conversations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line."""

    data: tuple[str, ...] = flag(REQUIRED, "crayon files, or folders of them", many=True, metavar="PARQUET")
    to: str = flag(REQUIRED, ", ".join(FORMATS), choices=FORMATS, metavar="FORMAT")
    output: Path = flag(REQUIRED, "a folder for this export alone", kind=Path, metavar="DIR")
    overwrite: bool = flag(False, "replace the export that is there")
    split: str | None = flag(None, "train or validation rows only (default: both)", choices=SPLITS, metavar="NAME")
    what: str = flag("all", "instructions, conversations or all", choices=("instructions", "conversations", "all"),
        metavar="KIND")  # fmt: skip
    image_root: Path | None = flag(None, "folder of the images, if the rows only refer to them", kind=Path,
        metavar="DIR")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    usage = "python -m collavo.export_data --data PARQUET --to FORMAT --output DIR ..."
    options = {"prog": "python -m collavo.export_data", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    return run("collavo.export_data", lambda: _export(parse(Flags, argv, **options)))


def _export(flags: Flags) -> None:
    with naming("data"):
        files = find_files(flags.data)
    if flags.to == "jsonl" and flags.what != "all":
        raise UserError(f"--what {flags.what}: jsonl holds all columns of a row; leave --what out")
    if flags.image_root and not flags.image_root.is_dir():
        raise UserError(f"--image_root {flags.image_root}: there is no such folder")
    with naming("output"):
        _check_output(
            flags.output, [*map(Path, filter(is_local, files)), *filter(None, [flags.image_root])], flags.overwrite
        )
    account: Account = defaultdict(Counter)
    with output_folder(flags.output.resolve()) as folder, naming("data"):
        with FORMATS[flags.to](folder) as write:
            _write_rows(flags, files, write, account)
        if not account["images"]:
            raise UserError(f"nothing to export in {account['rows'].total():,} rows ({_fates(account['rows'])})")
        (folder / CARD).write_text(_card(flags, account), encoding="utf-8")
    for kind in _KINDS:
        if counts := account[kind]:
            print(f"{kind:<22}{counts.total():>12,}   {_fates(counts)}")
    print(f"Data: {flags.output}")


def _check_output(output: Path, read: Sequence[Path], overwrite: bool) -> None:
    """Refuse a folder that holds what is to be read, or anything that no export wrote, or an export to be kept."""
    for source in read:
        if source.resolve().is_relative_to(output.resolve()):
            raise UserError(f"{output}: holds {source}, which is to be read; name another folder")
    present = list(output.glob("*"))
    foreign = [path.name for path in present if not _EXPORTED.fullmatch(path.name)]
    if foreign or (present and not any(path.is_file() and path.name != CARD for path in present)):
        name = min(foreign or [path.name for path in present])
        raise UserError(f"{output}: holds {name}, which no export wrote; name an empty folder")
    if present and not overwrite:
        raise UserError(f"{output}: holds an export already; --overwrite would replace it")


def _write_rows(flags: Flags, files: Sequence[str], write: WriteRow, account: Account) -> None:
    from rich.console import Console

    from collavo.progress import Progress

    seen: set[str] = set()
    file_names: set[str] = set()
    damaged = LeftOut()
    with Progress(Console(stderr=True), transient=True) as progress:
        for row in progress.track(read_rows(files, left_out=damaged), "Exporting rows", count_rows(files)):
            if row.image_id in seen:
                raise UserError(f"two rows have the image id {row.image_id!r}; export one data set at a time")
            seen.add(row.image_id)
            wanted = flags.split in (None, row.split)
            account["rows"][_write_row(row, flags, write, account, file_names) if wanted else "of_another_split"] += 1
    account["rows"].update(damaged.counts)
    for line in damaged.lines():
        print(f"left out: {line}")


def _write_row(row: CrayonRow, flags: Flags, write: WriteRow, account: Account, file_names: set[str]) -> str:
    """Write one row; return its split, or the reason why it was left out."""
    entries = []
    for entry in entries_of(row, flags.what) if flags.to != "jsonl" else ():
        if fault := fault_of(entry.turns, flags.to, row.has_image):
            account["skipped entries"][fault] += 1
            continue
        if flags.to == "llava" and (said := without_system(entry.turns)) != entry.turns:
            entry = entry._replace(turns=said)
            account["changed conversations"]["system_turn_left_out"] += 1
        entries.append(entry._replace(turns=with_image_token(entry.turns)) if row.has_image else entry)
        if entry.dialogue_id is not None and entries[-1].turns != entry.turns:
            account["changed conversations"]["image_token_added"] += 1
    if not entries and flags.to != "jsonl":
        return "without_entries"
    try:
        image = _image_of(row, flags, account, file_names)
        write(row, image, entries)
    except Rejected as error:
        return error.reason
    for entry in entries:
        account["entries"]["instructions" if entry.dialogue_id is None else "conversations"] += 1
    account["images"]["written" if image else "none"] += 1
    return row.split


def _image_of(row: CrayonRow, flags: Flags, account: Account, file_names: set[str]) -> ExportedImage | None:
    """Read a row's image and name its file; None for dialogues about no image.

    Raises:
        Rejected: if the image cannot be had.
        UserError: if another row's image has the same name.
    """
    if not row.has_image or row.image_path is None:
        return None
    stem = checked_relative(row.image_id)
    data = image_bytes(row.image_path, row.image_bytes, flags.image_root)
    format_name, is_turned = format_and_turned(data)
    extension = _EXTENSIONS.get(format_name, format_name.lower())
    # Ids have an extension, but it need not be that of the format, and rows of other origin may have none.
    name = stem if stem.lower().endswith((f".{extension}", f".{format_name.lower()}")) else f"{stem}.{extension}"
    if name in file_names:
        raise UserError(
            f"the images of two rows would be the file {name!r}; rename one of them, or export one data set at a time"
        )
    file_names.add(name)
    if is_turned and flags.to in ("llava", "llamafactory", "swift"):  # these trainers do not read EXIF
        account["misread images"]["exif_orientation_ignored"] += 1
    return ExportedImage(name, data)


def _card(flags: Flags, account: Account) -> str:
    splits = [split for split in SPLITS if account["rows"][split]]
    files = {split: DATA_FILES[flags.to].format(split=split) for split in splits}
    count = (
        account["images"]["written"]
        if flags.to == "jsonl"
        else sum(account["entries"][kind] for kind in ("instructions", "conversations"))
    )
    name = flags.output.resolve().name
    tasks = ["image-text-to-text", "visual-question-answering"]
    head = front_matter(name, count, tasks, files, f"exported {datetime.now(UTC).isoformat()}")
    return _CARD_BODY.format(
        head=head, name=name, to=flags.to, count=count, images=account["images"]["written"], version=collavo.__version__
    )


def _fates(counts: Counter[str]) -> str:
    return ", ".join(f"{fate} {count:,}" for fate, count in sorted(counts.items()))


if __name__ == "__main__":
    raise SystemExit(main())
