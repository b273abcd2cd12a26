"""The command `python -m collavo.scenes`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from collavo import cli
from collavo.cli import REQUIRED, flag, naming, on_disk, size_wh

_DESCRIPTION = """\
Draw sample scenes with exact panoptic annotation, and dialogues about them.

A scene is a picture of a place - a park, a beach, a street, a kitchen table -
with things that stand, hang and hide one another. The annotation is in COCO's
panoptic format, the dialogues are in LLaVA's."""

_EPILOG = """\
files:
  DIR/images/scene-000000.jpg      the pictures
  DIR/panoptic/scene-000000.png    their segments: id = R + 256 G + 65536 B,
                                   0 is unlabelled
  DIR/panoptic.json                COCO panoptic
  DIR/dialogues.json               LLaVA, image paths relative to DIR
  The folder appears whole, when all scenes are drawn.

Scene I of a data set depends on --seed, I and --size alone. So --count 10 gives
the first ten scenes of --count 100, and several machines can share the work
with --start.

examples:
  python -m collavo.scenes --output data/scenes --count 1000
  python -m collavo.scenes --output data/small --count 20000 --size 128x128
  python -m collavo.scenes --output data/validation --count 200 --start 1000"""


@dataclass(frozen=True, slots=True)
class Flags:
    output: str = flag(REQUIRED, "folder for the data set, new or empty", kind=on_disk, metavar="DIR")
    count: int = flag(REQUIRED, "scenes to draw", kind=int, least=1)
    size: tuple[int, int] = flag((640, 480), "their size in pixels (default: 640x480)", kind=size_wh, metavar="WxH")
    seed: int = flag(0, "another seed gives other scenes", least=0)
    start: int = flag(0, "number of the first scene", least=0)
    overwrite: bool = flag(False, "replace the scenes that an earlier run left in the folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return cli.run("collavo.scenes", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    usage = "python -m collavo.scenes --output DIR --count N [options]"
    options = {"prog": "python -m collavo.scenes", "usage": usage, "description": _DESCRIPTION, "epilog": _EPILOG}
    flags = cli.parse(Flags, argv, **options)
    from rich.console import Console

    from collavo.progress import Progress
    from collavo.scenes.write import write_scenes

    with Progress(Console()) as progress, naming("output"):
        drawing = partial(progress.track, name="Drawing scenes", total=flags.count)
        write_scenes(flags.output, flags.count, flags.size, flags.seed, flags.start, flags.overwrite, drawing)


if __name__ == "__main__":
    raise SystemExit(main())
