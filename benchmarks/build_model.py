"""Time the build with a model beside a bare loop over the same model and batches.

    python benchmarks/build_model.py [--count 1000] [--size 320x240] [--repeats 5]

The loop decodes each image and hands batches to the segmenter, and does nothing else: what it takes, no pipeline can
save. The build does the same, and reads, encodes, phrases and writes. Both run in processes of their own on the same
cores, in turns, with a Mask2Former of random weights whose size is that of a small real one; that both made the
same maps is checked by their segments. Start-up (imports, loading the model, the graph, the report) is what each
takes for one image; rates are given without it, with it, and, without it, by CPU time, which hardly feels what else the
machine does. Prints a table, and one line of JSON last.
"""

import argparse
import json
import sys
from pathlib import Path

from measure import Run, add_common_flags, build, cached_scenes, circumstances, run, spread, summary

BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--input_size", type=int, default=192, help="side of the square that the model sees")
    parser.add_argument("--checkpoint", type=Path, help="a Mask2Former (default: one of random weights)")
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    add_common_flags(parser)
    parser.add_argument("--loop", nargs=2, type=Path, metavar=("IMAGES", "OUTPUT"), help="only run the bare loop")
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.cache / "random-mask2former"
    if args.loop:
        bare_loop(*args.loop, checkpoint, args.input_size)
        return
    if not checkpoint.exists():
        save_random_model(checkpoint)

    width, height = map(int, args.size.split("x"))
    many, one = (cached_scenes(args.cache, count, (width, height)) / "images" for count in (args.count, 1))
    ours_output, loop_output = args.cache / "out-model", args.cache / "out-loop.json"
    model = ["--segmenter_checkpoint", str(checkpoint), "--segmenter_input_size", str(args.input_size)]
    model += ["--device", "cpu", "--batch_size", str(BATCH_SIZE)]

    def ours(images: Path) -> Run:
        return run(build("--images", str(images), "--output", str(ours_output), *model), set(args.cores))

    def loop(images: Path) -> Run:
        same = ["--input_size", str(args.input_size), "--checkpoint", str(checkpoint)]
        return run([sys.executable, __file__, "--loop", str(images), str(loop_output), *same], set(args.cores))

    ours(one), loop(one)  # not timed: fills the page cache
    figures: dict[str, list[Run]] = {name: [] for name in ("ours", "loop", "ours 1", "loop 1")}
    for repeat in range(args.repeats):
        for name, runner in (("ours", ours), ("loop", loop)):
            figures[f"{name} 1"].append(runner(one))
            figures[name].append(runner(many))
        print(
            f"repeat {repeat + 1}: build {figures['ours'][-1].seconds:.1f} s, loop {figures['loop'][-1].seconds:.1f} s",
            flush=True,
        )
    check_equal(ours_output, loop_output)
    report(args, figures)


def report(args: argparse.Namespace, figures: dict[str, list[Run]]) -> None:
    rates: dict[str, list[float]] = {}
    for name in ("ours", "loop"):
        pairs = list(zip(figures[name], figures[f"{name} 1"], strict=True))
        rates[name] = [(args.count - 1) / (whole.seconds - startup.seconds) for whole, startup in pairs]
        rates[f"{name} with start-up"] = [args.count / whole.seconds for whole, _ in pairs]
        rates[f"{name} by CPU time"] = [
            (args.count - 1) / (whole.cpu_seconds - startup.cpu_seconds) for whole, startup in pairs
        ]
    print(f"{'images/s':<22}{'build':>24}{'bare loop':>24}{'ratio':>22}")
    result: dict[str, object] = {}
    for label in ("", " with start-up", " by CPU time"):
        ratios = [a / b for a, b in zip(rates[f"ours{label}"], rates[f"loop{label}"], strict=True)]
        build_rate, loop_rate = spread(rates[f"ours{label}"]), spread(rates[f"loop{label}"])
        print(f"{label.strip() or 'without start-up':<22}{build_rate:>24}{loop_rate:>24}{spread(ratios):>22}")
        result[f"ratio{label}"] = summary(ratios)
    startups = {name: [one.seconds for one in figures[f"{name} 1"]] for name in ("ours", "loop")}
    print(f"{'start-up, s':<22}{spread(startups['ours']):>24}{spread(startups['loop']):>24}")
    result |= {name: summary(values) for name, values in rates.items()}
    result |= {f"start-up s, {name}": summary(values) for name, values in startups.items()}
    setting = {"benchmark": "build_model", "count": args.count, "size": args.size, "input_size": args.input_size}
    print(json.dumps({**setting, "cores_used": args.cores, "repeats": args.repeats, **result, **circumstances()}))


def bare_loop(images: Path, output: Path, checkpoint: Path, input_size: int) -> None:
    """Decode, segment, and keep only how many pixels each segment has, to show that it was done."""
    from collavo.images import decode_rgb
    from collavo.segmenters import load_segmenter

    segmenter = load_segmenter(
        "mask2former", checkpoint=str(checkpoint), input_size=input_size, device="cpu", batch_size=BATCH_SIZE
    )
    files = sorted(images.iterdir())
    areas: dict[str, list[int]] = {}
    for first in range(0, len(files), BATCH_SIZE):
        batch = files[first : first + BATCH_SIZE]
        maps = segmenter.segment([decode_rgb(file.read_bytes()) for file in batch])
        areas.update((f.stem, [s.area for s in m.segments]) for f, m in zip(batch, maps, strict=True))
    output.write_text(json.dumps(areas))


def check_equal(ours_output: Path, loop_output: Path) -> None:
    from collavo.dataset import read_rows

    rows = read_rows(sorted(ours_output.glob("*.parquet")))
    if {row.image_id: [s.area for s in row.segments] for row in rows} != json.loads(loop_output.read_text()):
        raise SystemExit("the build and the loop found different segments")


def save_random_model(checkpoint: Path) -> None:
    """A Mask2Former over COCO's classes, of random weights: its cost is real, its answers are not."""
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    from pretraining.segmenter import segmenter_config

    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(segmenter_config())
    with torch.no_grad():  # as drawn, no query is sure of anything, and post-processing has nothing to do
        model.class_predictor.weight.mul_(150)
    model.save_pretrained(checkpoint)


if __name__ == "__main__":
    main()
