"""Train CoLLaVO from crayon data: `python -m collavo.train --data out/*.parquet`.

Reads:    Parquet files that pipelines/build_crayon.py wrote, and a base model
Writes:   a run directory, see collavo/runs.py
Not here: the steps, see collavo/training/loop.py; which weights move, see collavo/training/stages.py
"""

import os
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from collavo.errors import UserError
from collavo.training.arguments import parse_arguments
from collavo.training.run import TrainingRun


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 where training had to stop, 2 for what it was given, 130 where it was
    interrupted."""
    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes one speaks
    try:
        arguments, preset = parse_arguments(argv, torch.cuda.is_available())
        console.print(
            f"Preset {arguments.preset}: {preset.about}. Another one: --preset tiny, collavo-7b, or a base of yours.",
            highlight=False,
            soft_wrap=True,
        )
        TrainingRun(arguments, preset.base, console).train()
    except UserError as error:
        print(f"collavo.train: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("collavo.train: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    console.print(f"Trained: {arguments.output_dir}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
