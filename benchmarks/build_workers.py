"""Measure how the build goes faster with more workers, and what graph, shuffle and store add to each image.

    python benchmarks/build_workers.py [--count 400] [--size 160x120] [--seconds 0.2] [--workers 1 2 4]
        [--store s3://BUCKET/FOLDER]

No network runs: a stand-in sleeps for --seconds per image, as a worker waits for its GPU, so that more workers than
cores can be compared. The rest of the build takes the cores as ever. A rate is that from when the first worker takes
its first batch until the last one is done with its last. What the graph adds is the CPU time of a build from
annotations in one process, less that of the same steps called one after the other; what a store adds, that of such a
build from and to it, less that of one on the disk. Prints a table, and as the last line JSON.
"""

import argparse
import contextlib
import io
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import add_common_flags, cached_scenes, circumstances, size_text

from collavo.cli import size_wh
from collavo.instructions.choose import ClassStatistics
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.storage import delete, open_write
from pipelines import graph, plan, records, spill
from pipelines.command import main as build
from pipelines.image_steps import draft_row
from pipelines.job import ModelConfig
from pipelines.options import parse_flags
from pipelines.publish import publish
from pipelines.sources import read_coco
from schemas.categories import COCO_PANOPTIC


class Sleeper:
    """Finds the same two things in every picture, after a nap."""

    categories = COCO_PANOPTIC

    def __init__(self, seconds: float, log: Path) -> None:
        self._seconds = seconds
        self._log = log
        self.facts = {"segmenter": "sleeper"}

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        start = time.monotonic()
        time.sleep(self._seconds * len(images))
        with self._log.open("a") as log:  # of all workers
            log.write(f"{start} {time.monotonic()}\n")
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
    parser.add_argument("--store", metavar="URI", help="a folder for scenes and rows, whose content is deleted")
    add_common_flags(parser)
    args = parser.parse_args()

    log = args.cache / "naps.txt"
    model = ModelConfig(
        partial(Sleeper, args.seconds, log), batch_size=8, max_batch_pixels=16_000_000, model_copies=None
    )
    plan._model = lambda *_: model  # type: ignore[assignment]

    def rate_of(scenes: Path, workers: int) -> float:
        log.unlink(missing_ok=True)
        flags = ["--images", f"{scenes}/images/", "--output", f"{args.cache}/out-workers", "--overwrite", "--discard"]
        flags += ["--segmenter_checkpoint", "scenes"]  # which is here; the stand-in takes its place
        with contextlib.redirect_stdout(io.StringIO()):
            assert build([*flags, "--direct_num_workers", str(workers)]) == 0
        naps = [[*map(float, line.split())] for line in log.read_text().splitlines()]
        return args.count / (max(end for _, end in naps) - min(start for start, _ in naps))

    one, many = (cached_scenes(args.cache, count, args.size) for count in (1, args.count))
    shuffled = _count_packed()
    rates = {1: rate_of(many, 1)}  # in this process
    per_image = sum(shuffled) / args.count
    for workers in args.workers:
        rates[workers] = rates.get(workers) or rate_of(many, workers)
        print(f"{workers} workers: {rates[workers]:.2f} images/s", flush=True)
    print(f"an image puts {per_image:.0f} bytes into shuffles")
    added = _added_per_image(one, many, args)
    print("CPU milliseconds an image: " + ", ".join(f"{name} {ms:.2f}" for name, ms in added.items()))
    result: dict[str, Any] = {"benchmark": "build_workers", "count": args.count, "size": size_text(args.size)}
    result |= {"seconds": args.seconds, "images/s": rates, "shuffled bytes per image": round(per_image)}
    result |= {"CPU ms per image": added}
    print(json.dumps(result | circumstances()))


def _added_per_image(one: Path, many: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measure the CPU milliseconds that an annotated image costs: its steps alone, in the graph, and with a store."""

    def flags_of(scenes: Path | str, output: Path | str) -> list[str]:
        flags = ["--coco_panoptic", f"{scenes}/panoptic.json", "--coco_images", f"{scenes}/images", "--overwrite"]
        return [*flags, "--output", str(output), "--num_shards", "4"]

    def milliseconds_of(work: Callable[[list[str]], object], few: list[str], all_: list[str]) -> float:
        seconds = []
        with contextlib.redirect_stdout(io.StringIO()):
            for flags in (few, few, all_):  # once more, for what is loaded once
                start = time.process_time()
                work(flags)
                seconds.append(time.process_time() - start)
        return 1000 * (seconds[2] - seconds[1]) / (args.count - 1)

    def whole(flags: list[str]) -> None:
        assert build([*flags, "--direct_num_workers", "1"]) == 0

    local = [flags_of(scenes, args.cache / "out-workers") for scenes in (one, many)]
    added = {"steps": milliseconds_of(_steps_alone, *local), "whole": milliseconds_of(whole, *local)}
    if args.store:
        for scenes in (one, many):
            for file in filter(Path.is_file, scenes.rglob("*")):
                with open_write(f"{args.store}/{scenes.name}/{file.relative_to(scenes)}") as copy:
                    copy.write(file.read_bytes())
        stored = [flags_of(f"{args.store}/{scenes.name}", f"{args.store}/out") for scenes in (one, many)]
        added["whole, from and to the store"] = milliseconds_of(whole, *stored)
        delete([f"{args.store}/"])
    return added


def _steps_alone(words: list[str]) -> None:
    """Do what the graph does to annotated images, one step after the other."""
    job = plan.make_plan(*parse_flags(words), share_gpu=False).job
    (source,) = job.sources.coco
    mentions = list(read_coco(source, job.sources.root))
    writer = spill.SpillWriter(f"{job.work}/drafts", job.categories)
    for _, tasks in graph._merge(0, [records.packed(mentions)]):
        for image in graph._read(tasks, job):
            writer.append(draft_row(graph._segment_annotated(image, job), job))
    packs = writer.close()
    places = [place for pack in packs for place in records.unpacked(pack)]
    statistics = ClassStatistics.of(len(job.categories.things))
    for place in places:
        statistics.add_image(place.present)
    splits = Counter(place.split for place in places)
    counts = {split: graph.count_shards(rows, job.output.num_shards) for split, rows in splits.items()}
    of_shard = defaultdict(list)
    for pack in packs:
        for shard, some in graph._drafts_by_shard(pack, counts, {}, {}):
            of_shard[shard].append(some)
    written = [
        written
        for shard, some in of_shard.items()
        for written in graph._write_shards((shard, {"drafts": some, "rejects": []}), job, statistics, {}, counts)
    ]
    publish(job.publication, written, {"coco": len(mentions)}, job.categories, 0, 0)
    delete([job.publication.folder])


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
