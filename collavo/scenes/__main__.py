"""The command `python -m collavo.scenes`."""

import argparse
import re
from collections.abc import Sequence

from rich.progress import track

from collavo.cli import Parser, whole_number
from collavo.errors import UserError
from collavo.scenes.write import write_scenes

_DESCRIPTION = """\
Draw sample scenes with exact panoptic annotation, and dialogues about them.

A scene is a picture of a place - a park, a beach, a street, a kitchen table -
with things that stand, hang and hide one another. The annotation is in COCO's
panoptic format, the dialogues are in LLaVA's: what reads those reads these."""

_EPILOG = """\
files:
  DIR/images/scene-000000.jpg      the pictures
  DIR/panoptic/scene-000000.png    their segments: id = R + 256 G + 65536 B,
                                   0 is unlabelled
  DIR/panoptic.json                COCO panoptic
  DIR/dialogues.json               LLaVA, image paths relative to DIR
  The JSON files are written last: where they are, everything is.

Scene I of a data set depends on --seed, I and --size alone. So --count 10 gives
the first ten scenes of --count 100, and several machines share the work with
--start.

examples:
  python -m collavo.scenes --output data/scenes --count 1000
  python -m collavo.scenes --output data/small --count 20000 --size 128x128
  python -m collavo.scenes --output data/validation --count 200 --start 1000"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m collavo.scenes", description=_DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="where the data set goes; a new or empty folder")
    add("--count", metavar="N", required=True, type=whole_number(1), help="scenes to draw")
    add("--size", metavar="WxH", type=_size, default="640x480", help="their size in pixels (default: 640x480)")
    add("--seed", metavar="S", type=whole_number(0), default=0, help="another seed, other scenes (default: 0)")
    add("--start", metavar="I", type=whole_number(0), default=0, help="number of the first scene (default: 0)")
    add("--overwrite", action="store_true", help="replace the scenes that an earlier run left in the folder")
    flags = parser.parse_args(argv)

    def progress(indices: range) -> Sequence[int]:
        return track(indices, description="Drawing scenes")  # type: ignore[return-value]

    try:
        write_scenes(flags.output, flags.count, flags.size, flags.seed, flags.start, flags.overwrite, progress)
    except UserError as error:
        parser.error(str(error))


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 32 <= min(width, height) <= max(width, height) <= 8192:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, sides from 32 to 8192, such as 640x480")
    return width, height


if __name__ == "__main__":
    main()
