"""Write a trained segmenter as a checkpoint like others: network, processor, classes, card and figures."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from collavo.categories import CATEGORIES_FILE
from collavo.model_card import card_head, licence_of
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.quiet import without_loading_report
from collavo.segmenter_training.finetuning import SegmentedRows, Steps
from collavo.segmenter_training.judging import Judged, judge, table
from collavo.segmenters.universal import Network, UniversalSegmenter

CARD, FIGURES = "README.md", "figures.json"

_TOLD = ("*token*", "vocab*", "merges.txt", "preprocessor_config.json", "processor_config.json")
"""What a base says of its inputs, in files that stay true."""

_CHOSEN_ON = 20
"""Train rows on which the thresholds are chosen."""

_TEXT = Path(__file__).with_name("card.md")


def save_network(folder: Path, model: Any, base: Network, rows: SegmentedRows) -> None:
    """Write weights, configurations and classes, of which it is noted which ones the rows of the training do not show.

    Raises:
        OSError, SafetensorError: if the disk refuses.
    """
    if base.framing.edges is None and base.framing.size_hw:
        model.config.input_size_hw = list(base.framing.size_hw)
    elif base.framing.edges and base.framing.size_hw is None:  # which may have followed from the base's classes
        model.config.input_edges = list(base.framing.edges)
    with without_loading_report():
        model.save_pretrained(folder)
    for pattern in _TOLD:
        for file in base.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if not any((folder / name).exists() for name in _TOLD[-2:]) and base.framing.size_hw:
        height, width = base.framing.size_hw
        said = {
            "image_processor_type": type(model).__name__.partition("For")[0] + "ImageProcessor",
            "size": {"height": height, "width": width},
            "image_mean": base.framing.mean,
            "image_std": base.framing.std,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(said, indent=2) + "\n")
    # In the file, ids are the network's own numbers.
    records = [{**record, "id": label} for label, record in enumerate(rows.categories.as_records())]
    unseen = [category.name for category in rows.categories if category.label not in rows.shown]
    stated = {"name": rows.categories.name, "unseen": unseen, "categories": records}
    (folder / CATEGORIES_FILE).write_text(json.dumps(stated, indent=1) + "\n")


def choose_preset(folder: Path, rows: SegmentedRows, device: str) -> str:
    """Choose the thresholds with which a saved network does best on some rows, and note them in its configuration."""
    segmenter = UniversalSegmenter(str(folder), device=device, batch_size=1, categories=rows.categories)
    step = max(len(rows.places) // _CHOSEN_ON, 1)
    some = replace(rows, places=rows.places[::step][:_CHOSEN_ON])
    qualities = {}
    for name in ("default", "scenes"):
        segmenter.thresholds = THRESHOLD_PRESETS[name]
        qualities[name] = judge(segmenter, some).quality
    best = max(qualities, key=lambda name: qualities[name])
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "segmenter_preset": best}, indent=2) + "\n", encoding="utf-8")
    return best


def write_card(
    folder: Path, name: str, checkpoint: str, base: Network, judged: Judged, options: Steps, files: Sequence[str]
) -> None:
    """Write the card, and the figures as JSON."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = list(config["id2label"].values())
    licence = licence_of(base.folder)
    data = ", ".join(sorted({Path(file).resolve().parent.name for file in files}))
    head = card_head(
        licence,
        base_model=checkpoint,
        pipeline_tag="image-segmentation",
        library_name="transformers",
        tags=["panoptic-segmentation", config["model_type"], "collavo"],
        model_name=name,
        eval_results=[
            EvalResult("image-segmentation", "crayon", data, "pq", judged.quality, metric_name="panoptic quality")
        ],
    )
    text = _TEXT.read_text(encoding="utf-8").format(
        name=name,
        family=config["model_type"],
        classes=len(names),
        named=", ".join(names[:20]) + ", ..." * (len(names) > 20),
        base=checkpoint,
        data=data,
        steps=options.steps,
        batch=options.batch_size,
        rate=options.learning_rate,
        preset=config["segmenter_preset"],
        table="\n".join(table(judged)),
        licence=licence["license_name"],
    )
    (folder / CARD).write_text(f"{head}{text}", encoding="utf-8")
    figures = {
        "images": judged.images,
        "panoptic_quality": judged.quality,
        "by_class": {each: quality._asdict() for each, quality in judged.by_class.items()},
        "blind_guess": judged.guess and judged.guess.quality,
        "training": asdict(options),
    }
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
