"""The metadata at the head of a dataset card, which `datasets` and the hub read.

Source: the hub's dataset card metadata, https://huggingface.co/docs/hub/datasets-cards.
"""

from collections.abc import Mapping, Sequence

import yaml

CARD = "README.md"

_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M")


def front_matter(
    name: str, rows: int, task_categories: Sequence[str], files_by_split: Mapping[str, str], content: str
) -> str:
    """Write the metadata as YAML between two lines of dashes.

    Args:
        files_by_split: a pattern of file names for each split, which makes `load_dataset` show these splits.
        content: whatever differs where the files do. `datasets` keeps what it has loaded by the folder's last name and
            by this metadata, and looks at no file: without it, another data set in a folder `out` would be the last.
    """
    data_files = [{"split": split, "path": pattern} for split, pattern in files_by_split.items()]
    metadata = {
        "pretty_name": name,
        "license": "other",
        "license_name": "as-the-sources",
        "language": ["en"],
        "task_categories": list(task_categories),
        "tags": ["collavo", "crayon", "panoptic-segmentation"],
        "size_categories": [size_category(rows)],
        "configs": [{"config_name": "default", "description": content, "data_files": data_files}],
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n"


def size_category(rows: int) -> str:
    """Return the hub's word for a number of rows."""
    place = next((place for place, size in enumerate(_SIZES) if rows < size), len(_SIZES))
    if place == 0:
        return "n<1K"
    return f"{_SIZE_NAMES[place - 1]}<n<{_SIZE_NAMES[place]}" if place < len(_SIZES) else "n>100M"
