"""Print every figure that this project claims for a GPU, side by side with its peer, in nine minutes at most.

    python benchmarks/gpu.py                       # on one GPU
    python benchmarks/gpu.py --device cpu          # the same commands at toy size, to see that they run
    python benchmarks/gpu.py --parts step sweep

Parts, each a command of its own within its own time:
    postprocess_cpu, postprocess_gpu   mask logits -> panoptic map, beside transformers' function
    segmenter_embedded                 images/s of the build job beside a bare loop over the same Mask2Former
    segmenter_swin_l                   the same in the shape of the paper's segmenter, at 768 pixels
    segmenter_shapes                   images/s of the segmenter alone in the shapes of EoMT, Mask2Former and DETR
    step                               a 7B-shaped dual-adapter step beside LLaVA's with one plain QLoRA
    sweep                              samples/s, percent of the measured bf16 matrix product rate and peak memory of
                                       that step, packed and not, with and without checkpointing, beside
                                       transformers' Trainer + peft + bitsandbytes as they come

All weights are random; no figure says anything of quality. What a part prints appears as it comes, so a part that runs
out of time leaves what it had. Failed parts are named in the end, and the exit status is 1. The last line is JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import circumstances

HERE = Path(__file__).parent


class Part(NamedTuple):
    """A benchmark's command on a GPU, the flags that make it a toy, and its time in seconds."""

    command: str
    toy: str
    seconds: int


PARTS = {
    "postprocess_cpu": Part("postprocess.py --threads 1 --images 4 --repeats 5", "--images 1 --repeats 3", 30),
    "postprocess_gpu": Part("postprocess.py --threads 1 --device cuda", "--images 1 --repeats 3 --device cpu", 30),
    "segmenter_embedded": Part(
        "build_model.py --device cuda --size 640x480 --input_size 320 --count 700 --repeats 1",
        "--device cpu --size 64x64 --input_size 64 --count 2",
        80,
    ),
    "segmenter_swin_l": Part(
        "build_model.py --device cuda --shape swin_l --size 640x480 --input_size 768 --count 200 --repeats 1",
        "--device cpu --shape swin_toy --size 64x64 --input_size 64 --count 2",
        100,
    ),
    "segmenter_shapes": Part(
        "segmenter_shapes.py --device cuda --batches 10 --shapes eomt_l mask2former_swin_l detr_r50",
        "--device cpu --batches 1 --shapes toy",
        60,
    ),
    "step": Part(
        "train_step.py --sizes 7b --device cuda --parts step --batch 4 --repeats 5",
        "--sizes toy --device cpu --repeats 1",
        80,
    ),
    "sweep": Part(
        "train_step.py --sizes 7b --device cuda --parts sweep --micro_batches 4 --repeats 3",
        "--sizes toy --device cpu --repeats 1 --micro_batches 1",
        150,
    ),
}
"""Together they take less than nine minutes."""

_TOY_PATIENCE = 5  # a CPU takes longer to start the commands, and nobody pays for its minutes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu, toy sizes"
    print(f"device: {name}, torch {torch.__version__}", flush=True)
    results: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for part in arguments.parts:
        print(f"\n== {part}", flush=True)
        start = time.perf_counter()
        try:
            results[part] = run_part(PARTS[part], arguments.device == "cpu")
        except PartFailed as error:
            failed[part] = str(error)
        print(f"-- {part}: {failed.get(part, 'done')}, {time.perf_counter() - start:.0f} s", flush=True)
    print(json.dumps({"benchmark": "gpu", "device": name, "results": results, "failed": failed, **circumstances()}))
    return int(bool(failed))


class PartFailed(Exception):
    """A part ended without its figures."""


def run_part(part: Part, toy: bool) -> Any:
    """Run the command of a part, showing its lines as they come; returns the JSON of its last line.

    Raises:
        PartFailed: if it fails, runs out of time, or ends without JSON.
    """
    script, *flags = part.command.split()
    flags += part.toy.split() if toy else []  # argparse takes the last value of a flag
    if script == "build_model.py":
        flags += ["--cores", *map(str, sorted(os.sched_getaffinity(0)))]
    command = [sys.executable, str(HERE / script), *flags]
    # A session of its own, so that what it has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    seconds = part.seconds * (_TOY_PATIENCE if toy else 1)
    alarm = _Alarm(process, seconds)
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        last = line.rstrip("\n") or last
        print(line, end="", flush=True)
    status = process.wait()
    if alarm.stop():
        raise PartFailed(f"out of its {seconds} seconds")
    if status:
        raise PartFailed(last[:200] or f"exit status {status}")
    try:
        return json.loads(last)
    except ValueError as error:
        raise PartFailed("it printed no figures") from error


class _Alarm:
    """End a process and its children when its time is over."""

    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self._process = process
        self._rang = False
        self._timer = threading.Timer(seconds, self._ring)
        self._timer.start()

    def _ring(self) -> None:
        self._rang = True
        os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> bool:
        """Return whether it was needed."""
        self._timer.cancel()
        return self._rang


if __name__ == "__main__":
    raise SystemExit(main())
