"""The report of a data set: one HTML page to look at, which needs neither network nor JavaScript.

Its size and the time that it takes do not grow with the data set: figures come from the manifest, pictures from one row
group each of a few shards, examples of rejects from the head of their file.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from posixpath import join
from typing import Any

from jinja2 import Environment, StrictUndefined

from collavo.storage import REPORT, open_write
from pipelines.report_sample import Sample, css_color
from schemas.categories import CategorySet
from schemas.crayon_row import TASKS

_TEMPLATE = Path(__file__).with_name("report.html.jinja")

_SAMPLES, _SAMPLED_SHARDS = 16, 64

_ANSWER_BINS = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 257)
"""Answer lengths in words at which a bar begins: most answers are a word or two, listings run to hundreds."""

_EXAMPLES_PER_REASON = 3

Tally = list[tuple[str, float]]
"""Labels and counts, in the order of their bars."""


def samples_of_shard(position: int, shards: int) -> int:
    """Choose how many rows a shard, at a position among all, offers as samples, so that no file is read again."""
    return -(-_SAMPLES // shards) if position % -(-shards // _SAMPLED_SHARDS) == 0 else 0


def write_report(output: str, manifest: Mapping[str, Any], samples: Sequence[Sample], rejects: bytes) -> None:
    """Write `report.html` into the folder of a data set.

    Args:
        output: the folder, in any storage.
        manifest: what `manifest.json` will hold.
        samples: of which some are shown, evenly chosen.
        rejects: the beginning of the rejects file; its last line may be cut off.
    """
    stated = manifest["categories"]
    categories = CategorySet.from_records(stated["name"], stated["categories"])
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = json.dumps
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        manifest=manifest,
        elapsed=_elapsed(manifest),
        cautions=cautions(manifest),
        samples=[samples[place] for place in evenly(len(samples), _SAMPLES)],
        answer_bins=_ANSWER_BINS,
        histogram=histogram,
        mean=_mean,
        quantile=quantile,
        classes=sorted(manifest["segments"].items(), key=lambda item: (-item[1], item[0])),
        class_colors={name: css_color(category.color_rgb) for name, category in categories.by_display_name.items()},
        tasks=[(task, manifest["instructions"][task]) for task in TASKS if task in manifest["instructions"]],
        examples=_reject_examples(rejects),
    )
    with open_write(join(output, REPORT)) as file:
        # A JSON escape can bring in a lone surrogate, which UTF-8 cannot hold.
        file.write(html.encode(errors="backslashreplace"))


def cautions(manifest: Mapping[str, Any]) -> list[str]:
    """Say what makes many of the rows doubtful, a line each."""
    lines = []
    if count := manifest["unfamiliar"]:
        pictures = "1 picture is" if count == 1 else f"{count:,} pictures are"
        lines.append(f"{pictures} unlike all that the segmenter knows: much of what it names there will be wrong.")
    if (crowds := manifest["crowds"]) > manifest["things"] / 2:  # of COCO's, 1 in 80
        lines.append(
            f"{crowds:,} of {manifest['things']:,} objects are crowds (iscrowd or ignore is 1), whose classes are not "
            "counted or located. CVAT marks each mask drawn by brush so; with iscrowd: 0 there, each is an object."
        )
    return lines


def histogram(counts: Mapping[int, int], starts: Sequence[int] | None = None) -> Tally:
    """Count how many numbers fall into each bin, from the first filled bin to the last.

    Args:
        starts: the numbers at which bins begin, ascending; the last bin is open-ended. None makes some twenty of one
            width, up to the 99th percentile.
    """
    if not counts:
        return []
    starts = starts or _even_starts(quantile(counts, 0.99))
    tally: Counter[int] = Counter()
    for number, count in counts.items():
        tally[bisect_right(starts, number) - 1] += count
    return [(_bin_label(starts, place), tally[place]) for place in range(min(tally), max(tally) + 1)]


def quantile(counts: Mapping[int, int], share: float) -> int:
    """Find the least number that at least `share` of the counted ones do not exceed; 0 if nothing was counted."""
    remaining = share * sum(counts.values())
    for number in sorted(counts):
        remaining -= counts[number]
        if remaining <= 0:
            return number
    return 0


def _mean(counts: Mapping[int, int]) -> float:
    return sum(number * count for number, count in counts.items()) / max(sum(counts.values()), 1)


def _even_starts(reach: int) -> range:
    width = max(-(-reach // 20), 1)
    return range(0, reach + width + 1, width)


def _bin_label(starts: Sequence[int], place: int) -> str:
    if place + 1 == len(starts):
        return f"{starts[place]}+"
    first, last = starts[place], starts[place + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def _elapsed(manifest: Mapping[str, Any]) -> str:
    return str(datetime.fromisoformat(manifest["finished"]) - datetime.fromisoformat(manifest["started"]))


def _reject_examples(head: bytes) -> dict[str, list[dict[str, str]]]:
    """Pick the first few rejects of each reason."""
    examples: dict[str, list[dict[str, str]]] = {}
    for line in head[: head.rfind(b"\n") + 1].splitlines():
        reject = json.loads(line)
        of_reason = examples.setdefault(reject["reason"], [])
        if len(of_reason) < _EXAMPLES_PER_REASON:
            of_reason.append(reject)
    return examples


def evenly(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` positions out of `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]
