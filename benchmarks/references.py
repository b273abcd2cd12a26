"""Freeze what the commands produce before a refactoring, and compare it afterwards.

    python benchmarks/references.py --freeze /tmp/references.json       before the change
    python benchmarks/references.py --compare /tmp/references.json      after each step that should change nothing

It draws 120 scenes, builds them from annotations and 24 of them with the embedded network, trains 20 steps of the
tiny preset, evaluates and asks the trained model. Rows, losses and answers have to be equal to the last bit; seconds
are shown side by side. Losses depend on the processor, so freeze and compare on one machine.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).parents[1]

_LOSSES = ("step", "phase", "loss", "gradient_norm", "validation_crayon_loss", "validation_dialogue_loss")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--freeze", type=Path, metavar="JSON", help="write the references")
    action.add_argument("--compare", type=Path, metavar="JSON", help="compare with references written before")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, seconds = _references(Path(folder))
    if flags.freeze:
        flags.freeze.write_text(json.dumps({"references": found, "seconds": seconds}, indent=1) + "\n")
        print(f"frozen: {flags.freeze}")
        return 0
    frozen = json.loads(flags.compare.read_text())
    differing = [name for name, value in frozen["references"].items() if found[name] != value]
    for name, value in frozen["seconds"].items():
        print(f"{name:<22}{value:8.1f} s before{seconds[name]:8.1f} s now")
    for name in differing:
        print(f"{name} differs:\n  before {frozen['references'][name]}\n  now    {found[name]}")
    print("references differ: " + ", ".join(differing) if differing else "all references are equal")
    return int(bool(differing))


def _references(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What the commands produced, and the seconds that each of them took."""
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}

    def run(name: str, *command: str) -> str:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True)
        seconds[name] = round(time.perf_counter() - start, 1)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    build = ["pipelines/build_crayon.py", "--runner", "DirectRunner"]
    annotated, predicted, model = (str(folder / name) for name in ("annotated", "predicted", "run"))
    run("build_annotations", *build, "--scenes", "120", "--segmenter", "annotations", "--output", annotated)
    found["rows_annotations"] = _rows_sha256(Path(annotated))
    run("build_network", *build, "--scenes", "24", "--output", predicted)
    found["rows_network"] = _rows_sha256(Path(predicted))
    run("train", "-m", "collavo.train", "--data", annotated, "--output_dir", model, "--max_steps", "10")
    lines = map(json.loads, (Path(model) / "metrics.jsonl").read_text().splitlines())
    found["losses"] = [{key: line[key] for key in _LOSSES if key in line} for line in lines]
    run("evaluate", "-m", "collavo.evaluate", "--model", model, "--data", annotated, "--split", "validation")
    found["evaluation"] = json.loads((Path(model) / "evaluation" / "evaluation.json").read_text())["results"]
    image = next(Path(folder).rglob("scene-000002.jpg"))
    asked = ["-m", "collavo.chat", "--model", model, "--image", str(image), "--prompt", "How many dogs are there?"]
    found["chat"] = run("chat", *asked)
    return found, seconds


def _rows_sha256(data: Path) -> str:
    """Of all rows in order of their id, whatever the files' names and metadata."""
    rows = [row for file in sorted(data.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    rows.sort(key=lambda row: str(row["image_id"]))
    return hashlib.sha256(json.dumps(rows, default=bytes.hex, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
