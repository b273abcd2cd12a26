"""What the benchmarks of the build share: scenes drawn once, commands run and measured, figures in one line."""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from collavo.scenes import write_scenes

REPOSITORY = Path(__file__).parents[1]


class Run(NamedTuple):
    """A command that ended well: what it took, and its largest resident set, its children's included.

    `cpu_seconds` hardly feel what else the machine does meanwhile; on a core of its own they are the seconds, but for
    waiting.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_mib: float


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/collavo-benchmarks"), help="scenes are drawn here once"
    )
    parser.add_argument("--repeats", type=int, default=5)


def cached_scenes(cache: Path, count: int, size_wh: tuple[int, int]) -> Path:
    """A folder of drawn scenes, from an earlier run if it was completed."""
    folder = cache / f"scenes-{count}-{size_wh[0]}x{size_wh[1]}"
    if not (folder / "panoptic.json").exists():
        print(f"drawing {count} scenes into {folder}", flush=True)
        write_scenes(folder, count, size_wh, overwrite=True)
    return folder


def repeated_scenes(scenes: Path, times: int) -> Path:
    """Drawn scenes, each under as many names as asked for: files of their own to whoever reads them, by hard links."""
    folder = scenes.with_name(f"{scenes.name}-times-{times}")
    if (folder / "panoptic.json").exists():
        return folder
    coco, entries = (json.loads((scenes / f"{name}.json").read_text()) for name in ("panoptic", "dialogues"))
    count = len(coco["images"])
    images, annotations, dialogues = [], [], []
    for kind in ("images", "panoptic"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for copy in range(times):
        for image, annotation in zip(coco["images"], coco["annotations"], strict=True):
            for kind, file in (("images", image), ("panoptic", annotation)):
                link = folder / kind / f"{copy}-{file['file_name']}"
                link.unlink(missing_ok=True)
                link.hardlink_to(scenes / kind / file["file_name"])
            id_ = copy * count + image["id"]
            images.append({**image, "id": id_, "file_name": f"{copy}-{image['file_name']}"})
            annotations.append({**annotation, "image_id": id_, "file_name": f"{copy}-{annotation['file_name']}"})
        for entry in entries:
            name = entry["image"].removeprefix("images/")
            dialogues.append({**entry, "id": f"{copy}-{entry['id']}", "image": f"images/{copy}-{name}"})
    (folder / "dialogues.json").write_text(json.dumps(dialogues))
    (folder / "panoptic.json").write_text(json.dumps({**coco, "images": images, "annotations": annotations}))
    return folder


def source_flags(scenes: Path) -> list[str]:
    """Drawn scenes as COCO panoptic and LLaVA sources of the build."""
    flags = [
        "--coco_panoptic",
        scenes / "panoptic.json",
        "--coco_images",
        scenes / "images",
        "--segmenter",
        "annotations",
    ]
    return [*map(str, flags), "--llava_json", str(scenes / "dialogues.json"), "--image_root", str(scenes)]


def build(*flags: str) -> list[str]:
    """The command of the build."""
    return [sys.executable, str(REPOSITORY / "pipelines" / "build_crayon.py"), *flags, "--overwrite"]


def run(command: Sequence[str], cores: set[int]) -> Run:
    """Run a command on some cores, with as many threads in each of its processes; its output is shown if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    start, cpu_start = time.perf_counter(), _cpu_seconds_of_children()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    watch = _PeakWatch(process.pid)
    output, _ = process.communicate()
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds_of_children() - cpu_start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{output.decode()}")
    return Run(seconds, cpu_seconds, watch.stop() / 2**20)


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class _PeakWatch:
    """Samples the resident sets of a process and its descendants, and remembers the largest sum."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            try:
                parent = psutil.Process(self._pid)
                family = [parent, *parent.children(recursive=True)]
                self._peak = max(self._peak, sum(process.memory_info().rss for process in family))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


def summary(figures: Sequence[float]) -> dict[str, float]:
    """Median and spread, for JSON."""
    return {
        "median": round(statistics.median(figures), 3),
        "low": round(min(figures), 3),
        "high": round(max(figures), 3),
    }


def spread(figures: Sequence[float]) -> str:
    """Median and spread, for eyes."""
    return f"{statistics.median(figures):.2f} ({min(figures):.2f}-{max(figures):.2f})"


def machine_name() -> str:
    """The processor as Linux names it."""
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return named[1] if named else platform.machine()


def circumstances() -> dict[str, Any]:
    """What a figure is worth: machine, date, and how busy the machine is with other things."""
    return {
        "machine": machine_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": f"{date.today()}",
    }
