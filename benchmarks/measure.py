"""Helpers that the benchmarks share: draw scenes once, run and measure commands, summarise figures."""

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
sys.path.append(str(REPOSITORY))  # for `pretraining`, which no installation holds


class Run(NamedTuple):
    """What a successful command took, and the largest resident set of it and its children together.

    Other work on the machine hardly changes `cpu_seconds`. On an otherwise idle core they equal the seconds, less what
    the command waited.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_mib: float


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/collavo-benchmarks"), help="scenes are drawn here once"
    )
    parser.add_argument("--repeats", type=int, default=5)


def size_text(size_wh: tuple[int, int]) -> str:
    """Return a size as its flag takes it: 640x480."""
    return f"{size_wh[0]}x{size_wh[1]}"


def cached_scenes(cache: Path, count: int, size_wh: tuple[int, int], seed: int = 0) -> Path:
    """Draw scenes into a folder, or return that of an earlier run."""
    folder = cache / (f"scenes-{count}-{size_text(size_wh)}" + (f"-seed-{seed}" if seed else ""))
    if not (folder / "panoptic.json").exists():
        print(f"drawing {count} scenes into {folder}", flush=True)
        write_scenes(folder, count, size_wh, seed, overwrite=True, processes=len(os.sched_getaffinity(0)))
    return folder


def repeated_scenes(scenes: Path, times: int) -> Path:
    """Return a folder with each scene under several names, as hard links: to a reader they are different files."""
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
    """Return the build's flags that read drawn scenes as COCO panoptic and LLaVA sources."""
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
    """Return the build's command."""
    return [sys.executable, str(REPOSITORY / "pipelines" / "build_crayon.py"), *flags, "--overwrite"]


def run(command: Sequence[str], cores: set[int]) -> Run:
    """Run a command on some cores; show its output if it fails."""
    start, cpu_start = time.perf_counter(), _cpu_seconds_of_children()
    process = subprocess.Popen(
        command,
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
    """Sample the resident sets of a process and its descendants, and keep the largest sum."""

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
    """Return median, lowest and highest, for JSON."""
    return {
        "median": round(statistics.median(figures), 3),
        "low": round(min(figures), 3),
        "high": round(max(figures), 3),
    }


def spread(figures: Sequence[float]) -> str:
    """Return median, lowest and highest, for a table."""
    return f"{statistics.median(figures):.2f} ({min(figures):.2f}-{max(figures):.2f})"


def compare_with_build(figures: dict[str, list[Run]], other: str, count: int, title: str) -> dict[str, Any]:
    """Print the rates of the build and of another program that does the same work, and return them for JSON.

    Args:
        figures: runs of `ours` and of `other` on `count` images, and of both on one image as `ours 1` and so on. Runs
            on one image measure start-up.
        other: name of the other program.
        title: heading of the table's first column.
    """
    names = ("ours", other)
    rates: dict[str, list[float]] = {}
    for name in names:
        pairs = list(zip(figures[name], figures[f"{name} 1"], strict=True))
        rates[name] = [(count - 1) / (whole.seconds - startup.seconds) for whole, startup in pairs]
        rates[f"{name} with start-up"] = [count / whole.seconds for whole, _ in pairs]
        rates[f"{name} by CPU time"] = [
            (count - 1) / (whole.cpu_seconds - startup.cpu_seconds) for whole, startup in pairs
        ]
    startups = {name: [one.seconds for one in figures[f"{name} 1"]] for name in names}
    result: dict[str, Any] = {name: summary(values) for name, values in rates.items()}
    print(f"{title:<22}{'build':>24}{other:>24}{'ratio':>22}")
    for suffix in ("", " with start-up", " by CPU time"):
        ours, theirs = (rates[f"{name}{suffix}"] for name in names)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"{suffix.strip() or 'without start-up':<22}{spread(ours):>24}{spread(theirs):>24}{spread(ratios):>22}")
        result[f"ratio{suffix}"] = summary(ratios)
    print(f"{'start-up, s':<22}{spread(startups['ours']):>24}{spread(startups[other]):>24}")
    return result | {f"start-up s, {name}": summary(values) for name, values in startups.items()}


def machine_name() -> str:
    """Return the processor's name in Linux."""
    named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    return named[1] if named else platform.machine()


def circumstances() -> dict[str, Any]:
    """Return what a figure depends on: machine, date, and how busy the machine is with other work."""
    return {
        "machine": machine_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "date": f"{date.today()}",
    }
