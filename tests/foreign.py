"""A second opinion on rows: what they say of a picture, recomputed from the annotation file and its masks.

Nothing of the package is imported here: numpy, Pillow and pyarrow read the same files, and the rules of numbering,
boxes and answers are written down once more.
"""

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

_MENTION = re.compile(r"\((?:#(\d+) )?([^()]+)\)(?: \[([0-9., ]+)\])?")
_BOX = re.compile(r"\[([0-9.]+), ([0-9.]+), ([0-9.]+), ([0-9.]+)\]")


def rows_of(files: Iterable[Path]) -> list[dict[str, Any]]:
    """All rows of some Parquet files, as plain values."""
    return [row for file in sorted(files) for row in pq.read_table(file).to_pylist()]


def check_rows(rows: list[dict[str, Any]], json_file: Path, masks: Path, split: str, name_of: dict[int, str]) -> int:
    """Make sure that the rows of a split say of every picture what the file and its masks say; the number of rows.

    Args:
        name_of: how rows call each category id of the file.
    """
    content = json.loads(json_file.read_text())
    things = {category["id"]: bool(category["isthing"]) for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    names = [a["file_name"].removesuffix(".png").removesuffix("_gtFine_panoptic") for a in content["annotations"]]
    by_name = {Path(row["image_id"]).stem.removesuffix("_leftImg8bit"): row for row in rows if row["split"] == split}
    assert by_name.keys() == set(names), by_name.keys() ^ set(names)
    for annotation, name in zip(content["annotations"], names, strict=True):
        row = by_name[name]
        size = images[annotation["image_id"]]["width"], images[annotation["image_id"]]["height"]
        assert (row["width"], row["height"]) == size
        pixels = np.asarray(Image.open(masks / annotation["file_name"])).astype(np.int64)
        ids = pixels[:, :, 0] + 256 * pixels[:, :, 1] + 65536 * pixels[:, :, 2]
        expected = _segments(ids, annotation["segments_info"], things, name_of)
        found = {
            s["id"]: (s["category_id"], s["category"], s["is_thing"], s["is_crowd"], s["numbering"],
                      tuple(s["box_xyxy"]), s["area"])
            for s in row["segments"]
        }  # fmt: skip
        assert found == expected, (name, found, expected)
        index = np.asarray(Image.open(io.BytesIO(row["panoptic_map"]["bytes"])))
        listed = np.array([0, *(s["id"] for s in row["segments"])])
        known = np.isin(ids, list(expected))
        assert (listed[index] == np.where(known, ids, 0)).all(), name
        _check_instructions(row)
    return len(names)


def _segments(
    ids: np.ndarray, infos: list[dict[str, Any]], things: dict[int, bool], name_of: dict[int, str]
) -> dict[int, tuple[Any, ...]]:
    of_class: dict[int, list[tuple[int, int, int, dict[str, Any]]]] = defaultdict(list)
    boxes = {}
    for info in infos:
        y, x = np.nonzero(ids == info["id"])
        boxes[info["id"]] = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
        first = int(y[0]) * ids.shape[1] + int(x[0])
        of_class[info["category_id"]].append((-len(y), first, info["id"], info))
    found = {}
    for category_id, members in of_class.items():
        number = 0
        for minus_area, _, id_, info in sorted(members, key=lambda member: member[:3]):
            number += not info["iscrowd"]
            numbering = 0 if info["iscrowd"] or number > 20 else number
            is_thing = things[category_id]
            found[id_] = (category_id, name_of[category_id], is_thing, bool(info["iscrowd"]), numbering,
                          boxes[id_], -minus_area)  # fmt: skip
    return found


def _check_instructions(row: dict[str, Any]) -> None:
    """Answers against the segments, which `check_rows` has found to be right."""
    of_name = defaultdict(list)
    by_id = {s["id"]: s for s in row["segments"]}
    for segment in row["segments"]:
        of_name[segment["category"]].append(segment)
    uncountable = {name for name, found in of_name.items() if any(s["numbering"] == 0 for s in found)}

    def box_text(segment: dict[str, Any]) -> str:
        sides = (row["width"], row["height"]) * 2
        return ", ".join(f"{edge / side:.2f}" for edge, side in zip(segment["box_xyxy"], sides, strict=True))

    for said in row["instructions"]:
        task, answer = said["task"], said["answer"]
        about = [by_id[id_] for id_ in said["segment_ids"]]
        if task == "counting":
            assert re.findall(r"\d+", answer) == [said["label"]] == [str(len(about))], said
            classes = {s["category"] for s in about}
            assert len(classes) <= 1 and not classes & uncountable, said
            assert all(s["is_thing"] and len(of_name[s["category"]]) == len(about) for s in about), said
        elif task == "class_to_binary":
            assert answer == {"yes": "Yes.", "no": "No."}[said["label"]] and bool(about) == (answer == "Yes."), said
        elif task == "box_to_class":
            (segment,) = about
            assert _BOX.search(said["question"])[0] == f"[{box_text(segment)}]", said
            assert said["label"] == segment["category"] and f"(#{segment['numbering']} {said['label']})" in answer, said
        elif about:
            mentions = [(int(n or 0), name, box) for n, name, box in _MENTION.findall(answer)]
            boxed = task != "list_objects"
            assert mentions == [(s["numbering"], s["category"], box_text(s) if boxed else "") for s in about], said
            if task == "class_to_box":
                assert about == of_name[about[0]["category"]], said
        else:  # lists are about what is there, and boxes of a class may be none
            assert task == "class_to_box" and "There is no " in answer, said
