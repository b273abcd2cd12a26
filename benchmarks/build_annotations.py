"""Time the build from annotations beside a plain script that does the same work.

    python benchmarks/build_annotations.py [--count 2000] [--size 640x480] [--repeats 5]

Both read the same drawn scenes as COCO panoptic and LLaVA files and write the same rows, on one core each, in turns.
The plain script uses Pillow and numpy as most tutorials do: it decodes image and mask, makes one boolean mask per
segment, and computes area, box and index map from it. Class statistics and phrasings come from the same functions as in
the build, and pyarrow writes one table at the end. Before anything is timed, all columns of all rows are compared; of
the maps' PNGs, which are compressed differently, the pixels.

Start-up (imports, the graph, the report) is the time for one image. Rates are given without it, with it, and without it
by CPU time, which other work on the machine hardly changes. Prints a table, the shares of the build's steps, and as the
last line JSON.
"""

import argparse
import hashlib
import io
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import (
    Run,
    add_common_flags,
    build,
    cached_scenes,
    circumstances,
    compare_with_build,
    run,
    size_text,
    source_flags,
)
from PIL import Image

from collavo.cli import size_wh
from collavo.instructions.choose import ClassStatistics
from collavo.instructions.phrasebook import load_phrasebook
from collavo.instructions.write import InstructionOptions, present_things, write_instructions
from collavo.panoptic.colors import segment_palette
from collavo.panoptic.index_png import decode_index_map
from schemas.categories import COCO_PANOPTIC, MAX_NUMBERING
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow, Dialogue, Segment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=size_wh, default="640x480")
    parser.add_argument("--core", type=int, default=0, help="the core that both run on")
    add_common_flags(parser)
    parser.add_argument("--plain", nargs=2, type=Path, metavar=("SCENES", "OUTPUT"), help="only run the plain script")
    args = parser.parse_args()
    if args.plain:
        plain_script(*args.plain)
        return

    many, one = (cached_scenes(args.cache, count, args.size) for count in (args.count, 1))
    ours_output, plain_output = args.cache / "out-build", args.cache / "out-plain.parquet"

    def ours(scenes: Path) -> Run:
        return run(build(*source_flags(scenes), "--output", str(ours_output)), {args.core})

    def plain(scenes: Path) -> Run:
        command = [sys.executable, __file__, "--plain", str(scenes), str(plain_output)]
        return run(command, {args.core})

    ours(many), plain(many)  # not timed: fills the page cache, and makes what is compared
    check_equal(ours_output, plain_output)
    print(f"{args.count} rows are equal; load average {circumstances()['load_average']}", flush=True)

    figures: dict[str, list[Run]] = {name: [] for name in ("ours", "plain", "ours 1", "plain 1")}
    steps: Counter[str] = Counter()
    for repeat in range(args.repeats):
        for name, runner in (("ours", ours), ("plain", plain)):
            figures[f"{name} 1"].append(runner(one))
            figures[name].append(runner(many))
            if name == "ours":
                steps.update(json.loads((ours_output / "manifest.json").read_text())["seconds"])
        seconds = ", ".join(f"{name} {figures[name][-1].seconds:.1f} s" for name in ("ours", "plain"))
        print(f"repeat {repeat + 1}: {seconds}", flush=True)
    report(args, figures, {step: seconds / args.repeats for step, seconds in steps.items()})


def report(args: argparse.Namespace, figures: dict[str, list[Run]], steps: dict[str, float]) -> None:
    result = compare_with_build(figures, "plain", args.count, "images/s, one core")
    total = statistics.mean(one.seconds for one in figures["ours"])
    rest = {"start-up": statistics.mean(one.seconds for one in figures["ours 1"])}
    rest["runner and the rest"] = total - sum(steps.values()) - rest["start-up"]
    print("of the build's time: " + ", ".join(f"{k} {v / total:.0%}" for k, v in {**steps, **rest}.items()))
    shares = {step: round(seconds / total, 3) for step, seconds in {**steps, **rest}.items()}
    sizes = {"count": args.count, "size": size_text(args.size), "repeats": args.repeats}
    print(json.dumps({"benchmark": "build_annotations", **sizes, **result, "shares": shares, **circumstances()}))


def check_equal(ours_output: Path, plain_output: Path) -> None:
    """Compare all rows column by column, and the index maps by their pixels."""
    ours = pa.concat_tables(pq.read_table(file) for file in sorted(ours_output.glob("*.parquet"))).sort_by("image_id")
    plain = pq.read_table(plain_output).sort_by("image_id")
    for name in CRAYON_SCHEMA.names:
        if name != "panoptic_map" and ours[name] != plain[name]:
            raise SystemExit(f"the rows differ in {name}")
    for a, b in zip(ours["panoptic_map"], plain["panoptic_map"], strict=True):
        if a["path"] != b["path"] or not np.array_equal(*(decode_index_map(m["bytes"].as_py()) for m in (a, b))):
            raise SystemExit(f"the maps differ: {a['path']}")


def plain_script(scenes: Path, output: Path) -> None:
    """Do what the build does for annotated images, step by step."""
    coco = json.loads((scenes / "panoptic.json").read_text())
    dialogues: dict[str, list[Dialogue]] = {}
    for entry in json.loads((scenes / "dialogues.json").read_text()):
        turns = tuple((turn["from"], turn["value"]) for turn in entry["conversations"])
        dialogues.setdefault(entry["image"], []).append(Dialogue(entry["id"], turns))
    annotations = {annotation["image_id"]: annotation for annotation in coco["annotations"]}
    statistics_ = ClassStatistics.of(len(COCO_PANOPTIC.things))
    rows = []
    for image in coco["images"]:
        row = plain_row(scenes, image, annotations[image["id"]], dialogues.get(f"images/{image['file_name']}", []))
        statistics_.add_image(present_things(row.segments, COCO_PANOPTIC))
        rows.append(row)

    phrasebook, options = load_phrasebook(), InstructionOptions()
    records: list[dict[str, Any]] = []
    for row in rows:
        record = row.as_record()
        size_wh = (row.width, row.height)
        instructions = write_instructions(
            str(row.image_sha256), size_wh, row.segments, COCO_PANOPTIC, phrasebook, statistics_, options
        )
        records.append({**record, "instructions": [instruction.as_record() for instruction in instructions]})
    pq.write_table(pa.Table.from_pylist(records, schema=CRAYON_SCHEMA), output, compression="zstd")


def plain_row(scenes: Path, image: dict[str, Any], annotation: dict[str, Any], dialogues: list[Dialogue]) -> CrayonRow:
    image_bytes = (scenes / "images" / image["file_name"]).read_bytes()
    pixels = np.array(Image.open(io.BytesIO(image_bytes)).convert("RGB"))
    rgb = np.array(Image.open(scenes / "panoptic" / annotation["file_name"]).convert("RGB")).astype(np.uint32)
    ids = rgb[:, :, 0] + 256 * rgb[:, :, 1] + 65536 * rgb[:, :, 2]
    assert ids.shape == pixels.shape[:2]

    found = []
    for info in annotation["segments_info"]:
        mask = ids == info["id"]
        ys, xs = np.where(mask)
        box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
        category = COCO_PANOPTIC.by_category_id[info["category_id"]]
        found.append((category.label, bool(info["iscrowd"]), -int(mask.sum()), box[1], box[0], box, info["id"], mask))
    found.sort(key=lambda item: item[:5])

    index_map = np.zeros(ids.shape, dtype=np.uint8)
    segments = []
    ordinals: Counter[int] = Counter()
    for position, (label, is_crowd, negative_area, _, _, box, id_, mask) in enumerate(found):
        index_map[mask] = position + 1
        ordinals[label] += 1
        numbering = 0 if is_crowd or ordinals[label] > MAX_NUMBERING else ordinals[label]
        segments.append(Segment.of(COCO_PANOPTIC[label], id_, box, -negative_area, numbering, is_crowd))

    png = Image.fromarray(index_map)
    png.putpalette([channel for color in segment_palette(segments, COCO_PANOPTIC) for channel in color])
    encoded = io.BytesIO()
    png.save(encoded, "PNG")
    digest, path = hashlib.sha256(image_bytes).hexdigest(), f"images/{image['file_name']}"
    return CrayonRow(
        image_id=path,
        image_sha256=digest,
        image_bytes=image_bytes,
        image_path=path,
        width=ids.shape[1],
        height=ids.shape[0],
        sources=("coco", "llava") if dialogues else ("coco",),
        license_id=image["license"],
        split=split_of(digest),
        panoptic_png=encoded.getvalue(),
        segments=tuple(segments),
        conversations=tuple(sorted(dialogues, key=lambda dialogue: dialogue.id)),
    )


def split_of(digest: str) -> str:
    from pipelines.image_steps import split_of  # here, so that the plain script's start-up is its own

    return split_of(digest, 0.05)


if __name__ == "__main__":
    main()
