"""Compare the CPU time of every command's `--help` with that of importing numpy and pyarrow.

    python benchmarks/help_cost.py [--repeats 5]

A command has to parse its flags before it imports anything heavy, so that a mistyped flag is answered at once. Each
round runs `python -c "import numpy, pyarrow.parquet"` and then every command in turn, so that other work on the machine
slows all of them alike. Prints the median CPU seconds (user and system) and their ratio to those of the imports, and as
the last line JSON.
"""

import argparse
import json
import statistics
import sys

from measure import REPOSITORY, circumstances, run, summary

COMMANDS = {
    "build_crayon": [str(REPOSITORY / "pipelines" / "build_crayon.py")],
    **{
        name: ["-m", f"collavo.{name}"]
        for name in ("train", "evaluate", "chat", "export_model", "export_data", "import_base", "scenes")
    },
}
IMPORTS = "numpy, pyarrow.parquet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="the core that all run on")
    args = parser.parse_args()

    def cpu_seconds(*arguments: str) -> float:
        return run([sys.executable, *arguments], {args.core}).cpu_seconds

    seconds: dict[str, list[float]] = {name: [] for name in (IMPORTS, *COMMANDS)}
    for _ in range(args.repeats):
        seconds[IMPORTS].append(cpu_seconds("-c", f"import {IMPORTS}"))
        for name, command in COMMANDS.items():
            seconds[name].append(cpu_seconds(*command, "--help"))
    baseline = statistics.median(seconds[IMPORTS])
    print(f"{'--help of':<24}{'CPU s':>8}{'ratio':>8}")
    for name, values in seconds.items():
        print(f"{name:<24}{statistics.median(values):>8.2f}{statistics.median(values) / baseline:>8.1f}")
    result = {name: {**summary(v), "ratio": round(statistics.median(v) / baseline, 2)} for name, v in seconds.items()}
    print(json.dumps({"benchmark": "help_cost", "repeats": args.repeats, "CPU s": result, **circumstances()}))


if __name__ == "__main__":
    main()
