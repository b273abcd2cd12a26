"""Train CoLLaVO on crayon data: `python -m collavo.train --data out/*.parquet`.

Reads:    Parquet files that pipelines/build_crayon.py wrote, and a base model
Writes:   a run directory, see collavo/runs.py
Not here: the flags, see collavo/training/arguments.py; the run itself, see collavo/training/run.py
"""

import os
from collections.abc import Sequence
from contextlib import ExitStack

from collavo import cli
from collavo.errors import UserError
from collavo.training.arguments import parse_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 1 if training had to stop, 2 for wrong input, 130 if
    interrupted."""
    # Which of several GPUs has no memory left, say.
    rank = f", rank {os.environ.get('RANK', '0')}" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    return cli.run(f"collavo.train{rank}", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    arguments = parse_arguments(argv)

    # These take seconds to import, so the flags are parsed first.
    from rich.console import Console

    from collavo.training.run import TrainingRun

    # Of several processes, only the first prints.
    console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False, markup=False)
    console.print(f"Preset {arguments.preset}: {arguments.about}; --preset names another, see --help.", soft_wrap=True)
    try:
        with ExitStack() as held:
            TrainingRun(arguments, console, held).train()
    except KeyboardInterrupt:
        raise UserError("interrupted; --resume continues from the last checkpoint", 130) from None


if __name__ == "__main__":
    raise SystemExit(main())
