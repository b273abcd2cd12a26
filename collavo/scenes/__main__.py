"""The command `python -m collavo.scenes`."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.progress import track

from collavo.scenes.write import OutputError, write_scenes

_DESCRIPTION = """\
Draw sample scenes with exact panoptic annotation, and dialogues about them.

A scene is a picture of a place - a park, a beach, a street, a kitchen table - with things that stand, hang and hide one
another. The annotation is in COCO's panoptic format, the dialogues are in LLaVA's: what reads those reads these."""

_EPILOG = """\
files:
  OUTPUT/images/scene-000000.jpg      the pictures
  OUTPUT/panoptic/scene-000000.png    their segments: id = R + 256 G + 65536 B, 0 is unlabelled
  OUTPUT/panoptic.json                COCO panoptic: images, annotations, categories
  OUTPUT/dialogues.json               LLaVA: id, image (relative to OUTPUT), conversations
  The JSON files are written last: where they are, everything is.

Scene I of a data set depends on --seed, I and --size alone. So --count 10 gives the first ten scenes of --count 100,
and several machines share the work with --start.

examples:
  python -m collavo.scenes --output data/scenes --count 1000
  python -m collavo.scenes --output data/small --count 20000 --size 128x128 --seed 7
  python -m collavo.scenes --output data/validation --count 200 --start 1000"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _Parser(
        prog="python -m collavo.scenes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="where the data set goes; a new or empty folder")
    add("--count", metavar="N", required=True, type=_whole(1), help="scenes to draw")
    add("--size", metavar="WxH", type=_size, default="640x480", help="their size in pixels (default: 640x480)")
    add("--seed", metavar="S", type=_whole(0), default=0, help="another seed, other scenes (default: 0)")
    add("--start", metavar="I", type=_whole(0), default=0, help="number of the first scene (default: 0)")
    add("--overwrite", action="store_true", help="replace the scenes that an earlier run left in the folder")
    flags = parser.parse_args(argv)

    def progress(indices: range) -> Sequence[int]:
        return track(indices, description="Drawing scenes")  # type: ignore[return-value]

    try:
        write_scenes(flags.output, flags.count, flags.size, flags.seed, flags.start, flags.overwrite, progress)
    except OutputError as error:
        parser.error(str(error))


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to 999999999")
        return int(text)

    return number


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 32 <= min(width, height) <= max(width, height) <= 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, sides from 32 to 8192, such as 640x480")
    return width, height


if __name__ == "__main__":
    main()
