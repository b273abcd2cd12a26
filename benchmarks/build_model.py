"""Time the build with a model beside a bare loop over the same model and batches.

    python benchmarks/build_model.py [--count 1000] [--size 320x240] [--repeats 5]
    python benchmarks/build_model.py --device cuda --shape swin_l --input_size 768 --count 200   # the paper's segmenter

The loop decodes each image and hands batches to the segmenter, and does nothing else, so no pipeline can be faster. The
build also reads, encodes, phrases and writes. Both run in their own processes on the same cores, in turns, with a
Mask2Former of random weights, in the shape of the embedded one or with Swin-L as its backbone. On a CPU the segments
of the embedded shape have to be equal; elsewhere the share of images with equal segments is printed. Start-up
(imports, loading the model, the graph, the report) is the time for one image. Rates are given without it, with it, and
without it by CPU time, which other work on the machine hardly changes. Prints a table, and as the last line JSON.
"""

import argparse
import json
import sys
from pathlib import Path

from measure import Run, add_common_flags, build, cached_scenes, circumstances, compare_with_build, run, size_text

from collavo.cli import size_wh

BATCH_SIZE = 8

SWIN = {  # width, depths and heads of the backbone
    "swin_l": (192, [2, 2, 18, 2], [6, 12, 24, 48]),
    "swin_toy": (24, [1, 1, 1, 1], [1, 2, 4, 8]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=size_wh, default="320x240")
    parser.add_argument("--input_size", type=int, default=192, help="side of the square that the model sees")
    parser.add_argument("--checkpoint", type=Path, help="a Mask2Former (default: one of random weights)")
    parser.add_argument("--shape", choices=("embedded", *SWIN), default="embedded", help="of the random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    add_common_flags(parser)
    parser.add_argument("--loop", nargs=2, type=Path, metavar=("IMAGES", "OUTPUT"), help="only run the bare loop")
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.cache / f"random-mask2former-{args.shape}"
    if args.loop:
        bare_loop(*args.loop, checkpoint, args.input_size, args.device)
        return
    if not checkpoint.exists():
        save_random_model(checkpoint, args.shape)

    many, one = (cached_scenes(args.cache, count, args.size) / "images" for count in (args.count, 1))
    ours_output, loop_output = args.cache / "out-model", args.cache / "out-loop.json"
    model = ["--segmenter_checkpoint", str(checkpoint), "--segmenter_input_size", str(args.input_size)]
    model += ["--device", args.device, "--batch_size", str(BATCH_SIZE)]

    def ours(images: Path) -> Run:
        return run(build("--images", str(images), "--output", str(ours_output), *model), set(args.cores))

    def loop(images: Path) -> Run:
        same = ["--input_size", str(args.input_size), "--checkpoint", str(checkpoint), "--device", args.device]
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
    agreement = equal_images(ours_output, loop_output)
    if agreement < 1 and args.device == "cpu" and args.shape == "embedded":
        raise SystemExit("the build and the loop found different segments")
    report(args, figures, agreement)


def report(args: argparse.Namespace, figures: dict[str, list[Run]], agreement: float) -> None:
    result = compare_with_build(figures, "loop", args.count, "images/s")
    sizes = {"count": args.count, "size": size_text(args.size), "input_size": args.input_size}
    sizes |= {"shape": args.shape, "device": args.device, "images_with_equal_segments": round(agreement, 4)}
    more = {"cores_used": args.cores, "repeats": args.repeats}
    print(json.dumps({"benchmark": "build_model", **sizes, **more, **result, **circumstances()}))


def bare_loop(images: Path, output: Path, checkpoint: Path, input_size: int, device: str) -> None:
    """Decode and segment the images, and write only the areas of the segments, as proof of the work."""
    from collavo.images import decode_rgb
    from collavo.segmenters import load_segmenter

    segmenter = load_segmenter(
        "transformers", checkpoint=str(checkpoint), input_size=input_size, device=device, batch_size=BATCH_SIZE
    )
    files = sorted(images.iterdir())
    areas: dict[str, list[int]] = {}
    for first in range(0, len(files), BATCH_SIZE):
        batch = files[first : first + BATCH_SIZE]
        maps = segmenter.segment([decode_rgb(file.read_bytes()) for file in batch])
        areas.update((f.name, [s.area for s in m.segments]) for f, m in zip(batch, maps, strict=True))
    output.write_text(json.dumps(areas))


def equal_images(ours_output: Path, loop_output: Path) -> float:
    """Return the share of the images in which the build and the loop found the same areas."""
    from collavo.dataset import read_rows

    rows = read_rows(sorted(ours_output.glob("*.parquet")))
    ours = {row.image_id: [s.area for s in row.segments] for row in rows}
    loop = json.loads(loop_output.read_text())
    return sum(ours.get(name) == areas for name, areas in loop.items()) / len(loop)


def save_random_model(checkpoint: Path, shape: str) -> None:
    """Save a Mask2Former over COCO's classes with random weights: its cost is real, its answers are not."""
    import torch
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    from pretraining.segmenter import segmenter_config

    config = segmenter_config()
    if shape in SWIN:
        width, depths, heads = SWIN[shape]
        backbone = SwinConfig(
            embed_dim=width, depths=depths, num_heads=heads, window_size=12, image_size=384,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        names = {"id2label": config.id2label, "label2id": config.label2id}
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=200, **names)
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():  # without this no query is sure of anything, and post-processing has nothing to do
        model.class_predictor.weight.mul_(150)
    model.save_pretrained(checkpoint)


if __name__ == "__main__":
    main()
