"""Measure how the build goes faster with more workers, and what of each image crosses a shuffle.

    python benchmarks/build_workers.py [--count 400] [--size 160x120] [--seconds 0.2] [--workers 1 2 4]

No network runs: a stand-in sleeps for --seconds per image, as a worker waits for its GPU, so that more workers than
cores can be compared. The rest of the build takes the cores as ever. Rates are given without start-up, which is the
time for one image. Prints a table, and as the last line JSON.
"""

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_common_flags, cached_scenes, circumstances, size_text

from collavo.cli import size_wh
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from pipelines import graph, plan, records, spill
from pipelines.command import main as build
from pipelines.job import ModelConfig
from schemas.categories import COCO_PANOPTIC


class Sleeper:
    """Finds the same two things in every picture, after a nap."""

    categories = COCO_PANOPTIC

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.facts = {"segmenter": "sleeper"}

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        time.sleep(self._seconds * len(images))
        return [build_panoptic_map(_halves(image), (SegmentInfo(1, 0), SegmentInfo(2, 119))) for image in images]


def _halves(image: np.ndarray) -> np.ndarray:
    ids = np.ones(image.shape[:2], dtype=np.int32)
    ids[: len(ids) // 2] = 2
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400, help="scenes to draw")
    parser.add_argument("--size", type=size_wh, default="160x120")
    parser.add_argument("--seconds", type=float, default=0.2, help="that the stand-in sleeps for each image")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    add_common_flags(parser)
    args = parser.parse_args()

    model = ModelConfig(partial(Sleeper, args.seconds), batch_size=8, max_batch_pixels=16_000_000, model_copies=None)
    plan._model = lambda *_: model  # type: ignore[assignment]

    def seconds_of(scenes: Path, workers: int) -> float:
        flags = ["--images", f"{scenes}/images/", "--output", f"{args.cache}/out-workers", "--overwrite", "--discard"]
        flags += ["--segmenter_checkpoint", "scenes"]  # which is here; the stand-in takes its place
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            assert build([*flags, "--direct_num_workers", str(workers)]) == 0
        return time.perf_counter() - start

    one, many = (cached_scenes(args.cache, count, args.size) for count in (1, args.count))
    shuffled = _count_packed()
    seconds_of(many, 1)
    per_image = sum(shuffled) / args.count
    rates: dict[int, float] = {}
    for workers in args.workers:
        startup = seconds_of(one, workers)
        rates[workers] = (args.count - 1) / (seconds_of(many, workers) - startup)
        print(f"{workers} workers: {rates[workers]:.1f} images/s, start-up {startup:.1f} s", flush=True)
    print(f"an image puts {per_image:.0f} bytes into shuffles")
    result: dict[str, Any] = {"benchmark": "build_workers", "count": args.count, "size": size_text(args.size)}
    result |= {"seconds": args.seconds, "images/s": rates, "shuffled bytes per image": round(per_image)}
    print(json.dumps(result | circumstances()))


def _count_packed() -> list[int]:
    """Have the sizes of all packs noted that are made in this process from now on."""
    sizes: list[int] = []

    def counted(elements: Sequence[Any]) -> records.Packed:
        pack = records.packed(elements)
        sizes.append(len(pack[1]))
        return pack

    graph.packed = spill.packed = counted  # type: ignore[assignment]
    return sizes


if __name__ == "__main__":
    main()
