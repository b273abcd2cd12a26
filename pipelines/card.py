"""The dataset card: `README.md` of a data set, with the metadata that `datasets` and the hub read.

Its `configs` are what makes `load_dataset("out")` show two splits of crayon rows. Figures come from the manifest.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collavo.data_card import front_matter
from schemas.crayon_row import SPLITS, TASKS

_CLASSES_SHOWN = 15

_REFERENCES = (
    "`panoptic_map` shows as a picture; `image` has the path of a file below the folder of the sources, and no bytes, "
    "so that `datasets` reads it only where that is the current folder"
)

_BODY = Path(__file__).with_name("card.md")


def dataset_card(manifest: Mapping[str, Any], name: str) -> str:
    """Write the card's text.

    Args:
        manifest: what `manifest.json` holds.
        name: of the data set's folder.
    """
    files = manifest["files"]
    splits = [split for split in SPLITS if any(file["name"].startswith(f"{split}-") for file in files)]
    tasks = ("image-text-to-text", "visual-question-answering", "image-segmentation")
    content = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
    patterns = {split: f"{split}-*.parquet" for split in splits}
    head = front_matter(name, manifest["rows"], tasks, patterns, f"sha256 of the files' own: {content}")
    segments: Mapping[str, int] = manifest["segments"]
    ranked = sorted(segments.items(), key=lambda item: (-item[1], item[0]))
    instructions: Mapping[str, int] = manifest["instructions"]
    rejects: Mapping[str, int] = manifest["rejects"]
    by_task = ", ".join(f"{task} {instructions[task]:,}" for task in TASKS if task in instructions)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejects.items()))
    refers = manifest["configuration"].get("image_storage") == "reference"
    body = _BODY.read_text(encoding="utf-8").format(
        name=name,
        path=name,
        finished=manifest["finished"][:10],
        version=manifest["versions"]["collavo"],
        splits=", ".join(splits),
        rows=", ".join(f"{split} {manifest['rows_by_split'].get(split, 0):,}" for split in splits),
        instructions=f"{sum(instructions.values()):,}: {by_task}" if instructions else "none",
        conversations=manifest["conversations"],
        segments=sum(segments.values()),
        classes_found=len(segments),
        classes=len(manifest["categories"]["categories"]),
        set_name=manifest["categories"]["name"],
        segmenters="; ".join(map(_segmenter, manifest["segmenters"])) or "nothing",
        rejects=f"{sum(rejects.values()):,}: {reasons}" if rejects else "none",
        frequent=", ".join(f"{category} {count:,}" for category, count in ranked[:_CLASSES_SHOWN]) or "none",
        sources=", ".join(sorted(manifest["inputs"])),
        pictures=_REFERENCES if refers else "`image` and `panoptic_map` show as pictures",
    )
    return f"{head}\n{body}"


def _segmenter(facts: Mapping[str, Any]) -> str:
    named = facts.get("segmenter") or facts.get("name") or "unknown"
    checkpoint = facts.get("checkpoint")
    return f"{named}, `{checkpoint}`" if checkpoint else str(named)
