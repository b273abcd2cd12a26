"""Compare how a CPU's threads are used, in turns: sharing every operation, or as the commands use them.

    python benchmarks/cpu_threads.py --data out/*.parquet [--steps 6] [--images 6] [--rounds 2]

A training of the small preset gives each thread sequences of its own, and an evaluation of a small model keeps to one
thread. Here both also run with operations shared by all threads, as torch does by itself. What that means shows beside
other work (`yes > /dev/null`). Losses and answers may differ by rounding. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from measure import circumstances

from collavo import device, evaluate, train
from collavo.runs import read_metrics
from collavo.training import loop
from collavo.training.arguments import PRESETS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=6, help="of each phase, the first of which is not counted")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args(argv)
    threads = torch.get_num_threads()
    found: dict[str, dict[str, list[float]]] = {"seconds a step": {}, "questions per s": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2 * arguments.rounds):
            way = ("shared", "apart")[(number + 1) // 2 % 2]  # there and back
            run = Path(folder) / way
            flags = ["--data", *arguments.data, "--preset", "tiny", "--device", "cpu", "--output_dir", str(run)]
            steps = ["--max_steps", str(arguments.steps), "--overwrite"]
            asked = ["--max_images", str(arguments.images), "--device", "cpu"]
            with _operations_shared() if way == "shared" else nullcontext():
                assert train.main([*flags, *steps]) == 0
                assert evaluate.main(["--model", str(run), "--data", *arguments.data, *asked]) == 0
            torch.set_num_threads(threads)
            for line in read_metrics(run):
                if "loss" in line and line["step"] not in (1, arguments.steps + 1):
                    seconds = found["seconds a step"].setdefault(f"{line['stage']}, {way}", [])
                    seconds.append(PRESETS["tiny"].arguments["batch_size"] / line["samples_per_s"])
            report = json.loads((run / "evaluation" / "evaluation.json").read_text())
            found["questions per s"].setdefault(way, []).append(report["questions_per_s"])
    medians = {what: {name: round(statistics.median(v), 2) for name, v in of.items()} for what, of in found.items()}
    print(json.dumps({**medians, "threads": threads, **circumstances()}))


@contextmanager
def _operations_shared() -> Iterator[None]:
    """Compute as torch does by itself."""
    with (
        mock.patch.object(loop, "_pieces_at_once", lambda *_: 1),
        mock.patch.object(device, "limit_threads", lambda _: None),
    ):
        yield


if __name__ == "__main__":
    main()
