from typing import Any

import pytest
import yaml

from collavo.data_card import size_category
from pipelines.card import dataset_card

MANIFEST: dict[str, Any] = {
    "configuration": {"image_storage": "embed"},
    "rows": 12,
    "files": [{"name": f"{split}-00000-of-00001.parquet", "sha256": split} for split in ("train", "validation")],
    "rows_by_split": {"train": 11, "validation": 1},
    "inputs": {"coco": 11, "llava": 4},
    "instructions": {"counting": 30, "class_to_binary": 2},
    "conversations": 4,
    "segments": {"person": 3, "sky": 9},
    "rejects": {"missing_file": 2},
    "segmenters": [{"name": "annotations"}, {"segmenter": "mask2former", "checkpoint": "some/id"}],
    "categories": {"name": "COCO panoptic", "categories": [{}] * 133},
    "finished": "2026-11-28T10:00:00+00:00",
    "versions": {"collavo": "0.1.0"},
}


def test_the_card_has_what_hub_tools_ask_for() -> None:
    text = dataset_card(MANIFEST, "crayon_coco")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "other" and metadata["size_categories"] == ["n<1K"]
    assert "image-text-to-text" in metadata["task_categories"]
    assert metadata["configs"][0]["data_files"] == [
        {"split": "train", "path": "train-*.parquet"},
        {"split": "validation", "path": "validation-*.parquet"},
    ]
    assert "train 11, validation 1" in text and "32: counting 30, class_to_binary 2" in text
    assert "annotations; mask2former, `some/id`" in text and "12 of 2 of 133 classes" in text


def test_a_split_without_files_is_not_promised() -> None:
    references = {"image_storage": "reference"}
    text = dataset_card({**MANIFEST, "files": MANIFEST["files"][:1], "configuration": references}, "x")
    assert "`image` has the path of a file" in text
    assert [f["split"] for f in yaml.safe_load(text.split("---")[1])["configs"][0]["data_files"]] == ["train"]


@pytest.mark.parametrize(
    "rows, name",
    [(999, "n<1K"), (1000, "1K<n<10K"), (118_287, "100K<n<1M"), (99_000_000, "10M<n<100M"), (10**9, "n>100M")],
)
def test_sizes_are_the_hubs_words(rows: int, name: str) -> None:
    assert size_category(rows) == name
