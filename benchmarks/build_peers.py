"""Time the whole build beside Ray Data and Daft, start-up included.

    python -m venv peers && peers/bin/pip install 'ray[data]' daft -e .
    python benchmarks/build_peers.py --peers_python peers/bin/python [--counts 1500 6000] [--repeats 3]

All read the same drawn scenes (COCO panoptic) and write Parquet that holds the images: read, verify, mask to map, boxes
and numbering, PNG, rows. Everything runs on all cores that this process may use, in turns, and each run is a process of
its own from its first import to its end. There are two variants of the peers:

    own      with this package's own functions
    plain    with the steps as one writes them: Pillow decodes, panopticapi's sum over channels gives ids, numpy
             compares each with the map

With `--model`, all segment the images by a small Mask2Former of random weights instead, the peers with one copy in each
of as many processes as there are cores. A loop over the same model, spread over the cores by hand, runs beside them.

The peers write no instructions, merge nothing and check no accounts; the build does all of that besides. Prints a line
per run, a table, and as the last line JSON.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1500, 6000])
    parser.add_argument("--size", default="640x480")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/collavo-benchmarks"), help="scenes are drawn here once"
    )
    parser.add_argument("--peers_python", type=Path, help="a Python that has ray, daft and this package")
    parser.add_argument("--steps", nargs="+", default=["own", "plain"], choices=("own", "plain"))
    parser.add_argument("--model", action="store_true", help="segment by a small model, instead of by annotation")
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="also time the build with so many workers")
    parser.add_argument("--peer", nargs=4, metavar=("NAME", "STEPS", "SCENES", "OUTPUT"), help="only run a peer")
    args = parser.parse_args()
    if args.peer:
        name, steps, scenes, output = args.peer
        PEERS[name](steps, Path(scenes), output)
        return

    from measure import build, cached_scenes, circumstances, run, source_flags

    from collavo.cli import size_wh

    cores = set(os.sched_getaffinity(0))
    python = str(args.peers_python or sys.executable)
    steps = ["model"] if args.model else args.steps
    peers = [(name, step) for name in ("ray", "daft") for step in steps] + [("loop", "model")] * args.model
    result: dict[str, Any] = {}
    for count in args.counts:
        scenes = cached_scenes(args.cache, count, size_wh(args.size))
        flags = source_flags(scenes)[:-4]  # no dialogues: the peers read none
        if args.model:
            from build_model import save_random_model

            checkpoint = args.cache / "random-mask2former"
            if not checkpoint.exists():
                save_random_model(checkpoint, "embedded")
            os.environ["BENCHMARK_CHECKPOINT"] = str(checkpoint)
            model = ["--segmenter_checkpoint", str(checkpoint), "--segmenter_input_size", "192", "--device", "cpu"]
            flags = ["--images", str(scenes / "images"), *model, "--batch_size", str(BATCH_SIZE)]
        commands = {"build": build(*flags, "--output", str(args.cache / "out-peers"))}
        for workers in args.workers:
            commands[f"build, {workers} workers"] = [*commands["build"], "--direct_num_workers", str(workers)]
        for name, step in peers:
            output = str(args.cache / f"out-{name}")
            commands[f"{name} {step}"] = [python, __file__, "--peer", name, step, str(scenes), output]
        rates: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(args.repeats + 1):
            for name, command in commands.items():
                took = run(command, cores)
                if repeat:  # the first one fills the page cache
                    rates[name].append(count / took.seconds)
                print(f"{count} {name}: {took.seconds:.1f} s, {took.cpu_seconds:.1f} CPU s", flush=True)
        print(f"\n{count} images, start-up included{'':<12}images/s (median, low-high){'':<8}build is")
        ours = statistics.median(rates["build"])
        for name, values in rates.items():
            median = statistics.median(values)
            print(f"{name:<36}{median:>8.1f} ({min(values):.1f}-{max(values):.1f}){ours / median:>18.2f} times")
        result[str(count)] = {name: [round(value, 1) for value in values] for name, values in rates.items()}
    print(json.dumps({"benchmark": "build_peers", "size": args.size, "images/s": result, **circumstances()}))


def entries_of(scenes: Path) -> list[dict[str, Any]]:
    """List what is to be done: an entry per image, as COCO's file has it."""
    coco = json.loads((scenes / "panoptic.json").read_text())
    annotations = {annotation["image_id"]: annotation for annotation in coco["annotations"]}
    return [
        {
            "image": str(scenes / "images" / image["file_name"]),
            "mask": str(scenes / "panoptic" / annotations[image["id"]]["file_name"]),
            "segments": json.dumps(annotations[image["id"]]["segments_info"]),
        }
        for image in coco["images"]
    ]


def row_by_own(entry: dict[str, Any]) -> dict[str, Any]:
    """Make a row with this package's functions."""
    from collavo.images import verify_image
    from collavo.panoptic.coco_png import decode_segment_runs
    from collavo.panoptic.index_png import encode_index_map
    from collavo.panoptic.maps import SegmentInfo, build_panoptic_map
    from schemas.categories import COCO_PANOPTIC

    data = Path(entry["image"]).read_bytes()
    header = verify_image(data)
    infos = [
        SegmentInfo(s["id"], COCO_PANOPTIC.by_category_id[s["category_id"]].label, is_crowd=bool(s["iscrowd"]))
        for s in json.loads(entry["segments"])
    ]
    runs = decode_segment_runs(Path(entry["mask"]).read_bytes(), header.size_wh, [info.id for info in infos])
    panoptic = build_panoptic_map(runs, infos, COCO_PANOPTIC)
    segments = [segment.as_record() for segment in panoptic.segments]
    return {"path": entry["image"], "image": data, "map": encode_index_map(panoptic), "segments": json.dumps(segments)}


def row_by_plain(entry: dict[str, Any]) -> dict[str, Any]:
    """Make a row with Pillow and numpy."""
    import numpy as np
    from PIL import Image

    data = Path(entry["image"]).read_bytes()
    Image.open(io.BytesIO(data)).convert("RGB").load()
    rgb = np.array(Image.open(entry["mask"]).convert("RGB"), dtype=np.uint32)
    ids = rgb[:, :, 0] + 256 * rgb[:, :, 1] + 256 * 256 * rgb[:, :, 2]
    found = []
    for info in json.loads(entry["segments"]):
        mask = ids == info["id"]
        ys, xs = np.where(mask)
        found.append((info["category_id"], -len(ys), xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, mask))
    found.sort(key=lambda item: item[:4])
    index, segments, seen = np.zeros(ids.shape, np.uint8), [], dict[int, int]()
    for place, (category, area, *box, mask) in enumerate(found):
        index[mask] = place + 1
        seen[category] = seen.get(category, 0) + 1
        segments.append({"class": category, "area": -area, "box": list(map(int, box)), "number": seen[category]})
    file = io.BytesIO()
    Image.fromarray(index).save(file, "PNG")
    return {"path": entry["image"], "image": data, "map": file.getvalue(), "segments": json.dumps(segments)}


ROWS = {"own": row_by_own, "plain": row_by_plain}


class ByModel:
    """Makes rows of a batch with a model of its own, as a stateful function of the peers."""

    def __init__(self) -> None:
        import torch

        from collavo.segmenters import load_segmenter

        torch.set_num_threads(1)
        options = {"input_size": 192, "device": "cpu", "batch_size": BATCH_SIZE}
        self.segmenter = load_segmenter("transformers", checkpoint=os.environ["BENCHMARK_CHECKPOINT"], **options)

    def rows(self, paths: list[str]) -> list[dict[str, Any]]:
        from collavo.images import decode_rgb
        from collavo.panoptic.index_png import encode_index_map

        rows = []
        for first in range(0, len(paths), BATCH_SIZE):
            data = [Path(path).read_bytes() for path in paths[first : first + BATCH_SIZE]]
            for path, image, panoptic in zip(
                paths[first : first + BATCH_SIZE],
                data,
                self.segmenter.segment(list(map(decode_rgb, data))),
                strict=True,
            ):
                segments = json.dumps([segment.as_record() for segment in panoptic.segments])
                rows.append({"path": path, "image": image, "map": encode_index_map(panoptic), "segments": segments})
        return rows


def with_ray(steps: str, scenes: Path, output: str) -> None:
    import ray

    ray.init(log_to_driver=False, include_dashboard=False)
    data = ray.data.from_items(entries_of(scenes))
    if steps == "model":

        class Rows(ByModel):
            def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
                return columns(self.rows(list(batch["image"])))

        data = data.map_batches(Rows, batch_size=32, concurrency=len(os.sched_getaffinity(0)))
    else:
        data = data.map(ROWS[steps])
    data.write_parquet(output)


def with_daft(steps: str, scenes: Path, output: str) -> None:
    import daft
    from daft import DataType

    kind = DataType.struct(dict.fromkeys(("image", "map"), DataType.binary()) | {"segments": DataType.string()})
    data = daft.from_pylist(entries_of(scenes))
    cores = len(os.sched_getaffinity(0))
    make = ROWS.get(steps)

    @daft.cls(max_concurrency=cores, use_process=True)
    class Rows(ByModel if make is None else object):
        @daft.method.batch(return_dtype=kind, batch_size=32)
        def of(self, image: daft.Series, mask: daft.Series, segments: daft.Series) -> list[dict[str, Any]]:
            if make is None:
                return self.rows(image.to_pylist())
            entries = zip(image.to_pylist(), mask.to_pylist(), segments.to_pylist(), strict=True)
            return [make({"image": i, "mask": m, "segments": s}) for i, m, s in entries]

    made = Rows().of(data["image"], data["mask"], data["segments"])
    data.select(data["image"].alias("path"), made.alias("row")).write_parquet(output, write_mode="overwrite")


def with_loop(steps: str, scenes: Path, output: str) -> None:
    """Spread a loop over the cores by hand: a process each, with every so-many-th image."""
    cores = len(os.sched_getaffinity(0))
    code = "import build_peers, sys; build_peers.loop_part(*sys.argv[1:])"
    parts = [[sys.executable, "-c", code, str(scenes), output, str(part), str(cores)] for part in range(cores)]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    started = [subprocess.Popen(part, env=environment) for part in parts]
    if sum(process.wait() for process in started):
        raise SystemExit("a part of the loop failed")


def loop_part(scenes: str, output: str, part: str, parts: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [entry["image"] for entry in entries_of(Path(scenes))][int(part) :: int(parts)]
    Path(output).mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(ByModel().rows(paths)), f"{output}/{part}.parquet")


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


PEERS = {"ray": with_ray, "daft": with_daft, "loop": with_loop}


if __name__ == "__main__":
    main()
