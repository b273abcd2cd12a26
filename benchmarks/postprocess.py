"""Time mask logits -> panoptic map: `collavo.panoptic.postprocess` beside transformers' own function.

    python benchmarks/postprocess.py [--threads 1 2] [--device cpu] [--images 6] [--repeats 7]

Both read the same made-up logits: 100 queries of which 15 to 25 are sure of a class, 134 classes, 96 x 96 blob-like
masks, and draw 640 x 480 maps. With the `paper` preset the maps must be equal bit for bit before anything is timed; the
`default` preset has other rules, so transformers runs at the same thresholds, and how many pixels agree is printed.
Ours includes what transformers leaves to its caller: areas, boxes and numbers of the segments. The two take turns
within every repeat. Prints a table, and one line of JSON last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from measure import machine_name
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.postprocess import panoptic_from_logits
from collavo.panoptic.thresholds import THRESHOLD_PRESETS, MaskThresholds
from schemas.categories import COCO_PANOPTIC

SIZE_HW = (480, 640)
MASK_HW = (96, 96)
QUERIES, CLASSES = 100, 133

Logits = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    images = [made_up_logits(seed, args.device) for seed in range(args.images)]
    records = []
    print(f"{'preset':<9}{'threads':>8}{'transformers ms':>18}{'ours ms':>18}{'ratio':>7}{'equal pixels':>14}")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for preset, thresholds in THRESHOLD_PRESETS.items():
            agreement = statistics.mean(equal_pixels(logits, thresholds) for logits in images)
            if preset == "paper" and agreement < 1:
                raise SystemExit(f"the maps differ: only {agreement:.6f} of the pixels are equal")
            theirs_ms, ours_ms = time_in_turns(images, thresholds, args.repeats)
            ratio = statistics.median(theirs_ms) / statistics.median(ours_ms)
            print(
                f"{preset:<9}{threads:>8}{spread(theirs_ms):>18}{spread(ours_ms):>18}{ratio:>7.1f}{agreement:>14.4f}",
                flush=True,
            )
            records.append(
                {
                    "preset": preset,
                    "threads": threads,
                    "transformers_ms": round(statistics.median(theirs_ms), 2),
                    "ours_ms": round(statistics.median(ours_ms), 2),
                    "ratio": round(ratio, 2),
                    "equal_pixels": round(agreement, 4),
                }
            )
    print("per image, median (quartiles)")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    where = {"device": args.device, "machine": machine_name(), "date": f"{date.today()}"}
    print(json.dumps({"benchmark": "postprocess", "results": records, **versions, **where}))


def made_up_logits(seed: int, device: str) -> Logits:
    """Class logits [100, 134] and mask logits [100, 96, 96]: blobs that tile the image, one for every sure query."""
    random = torch.Generator().manual_seed(seed)
    sure = 15 + int(torch.randint(0, 11, (1,), generator=random))
    class_logits = torch.randn(QUERIES, CLASSES + 1, generator=random)
    class_logits[:, CLASSES] += 10
    class_logits[:sure, CLASSES] -= 10
    class_logits[torch.arange(sure), torch.randint(0, CLASSES, (sure,), generator=random)] += 12
    y, x = torch.meshgrid(torch.arange(MASK_HW[0]), torch.arange(MASK_HW[1]), indexing="ij")
    centre_y, centre_x = (torch.rand(QUERIES, 1, 1, generator=random) * side for side in MASK_HW)
    distance = (y - centre_y).abs() + (x - centre_x).abs()
    nearest_other = torch.stack([distance[:sure][torch.arange(sure) != q].amin(0) for q in range(QUERIES)])
    masks = (nearest_other - distance).clamp(-12, 12) + 0.3 * torch.randn(QUERIES, *MASK_HW, generator=random)
    return class_logits.to(device), masks.to(device)


def run_transformers(logits: Logits, thresholds: MaskThresholds) -> np.ndarray:
    outputs = SimpleNamespace(class_queries_logits=logits[0][None], masks_queries_logits=logits[1][None])
    stuff = {category.label for category in COCO_PANOPTIC if not category.is_thing}
    (result,) = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(
        outputs,
        threshold=thresholds.min_class_score,
        mask_threshold=thresholds.mask_probability,
        overlap_mask_area_threshold=thresholds.overlap,
        label_ids_to_fuse=stuff if thresholds.fuse_stuff else set(),
        target_sizes=[SIZE_HW],
    )
    return result["segmentation"].cpu().numpy()


def run_ours(logits: Logits, thresholds: MaskThresholds) -> PanopticMap:
    return panoptic_from_logits(*logits, SIZE_HW, thresholds)


def equal_pixels(logits: Logits, thresholds: MaskThresholds) -> float:
    ours = run_ours(logits, thresholds)
    assert ours.segments, "made-up logits without a segment time nothing"
    ids = np.array([0, *(segment.id for segment in ours.segments)])[ours.index_map]
    return float((ids == run_transformers(logits, thresholds)).mean())


def time_in_turns(images: list[Logits], thresholds: MaskThresholds, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds per image of transformers and of ours, `repeats` figures each; the maps end on the host in both."""
    theirs_ms: list[float] = []
    ours_ms: list[float] = []
    for repeat in range(repeats + 1):
        for run, figures in ((run_transformers, theirs_ms), (run_ours, ours_ms)):
            figures.append(milliseconds(run, images, thresholds))
        if repeat == 0:  # warms caches and allocators
            theirs_ms.clear()
            ours_ms.clear()
    return theirs_ms, ours_ms


def milliseconds(
    run: Callable[[Logits, MaskThresholds], object], images: list[Logits], thresholds: MaskThresholds
) -> float:
    start = time.perf_counter()
    for logits in images:
        run(logits, thresholds)
    return (time.perf_counter() - start) * 1000 / len(images)


def spread(figures: list[float]) -> str:
    low, middle, high = statistics.quantiles(figures, n=4)
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
