"""Judge a segmenter on rows whose maps are the truth: panoptic quality, by class, beside what a blind guess gets."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image

from collavo.categories import categories_of_checkpoint
from collavo.embedded import find_embedded
from collavo.errors import Rejected, UserError
from collavo.hub import find_checkpoint
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.panoptic.quality import ClassQuality, PanopticQuality
from collavo.segmenter_training.finetuning import Place, SegmentedRows
from collavo.segmenters import Segmenter, load_segmenter
from schemas.categories import CategorySet

_GRID_HW = (96, 128)
"""Places that the blind guess tells apart."""

_GUESSED_FROM = 1000
"""Rows that it is made of at most."""


class Judged(NamedTuple):
    """Figures of a segmenter on some rows."""

    images: int
    quality: float
    """The mean over the classes, 0 to 1."""

    by_class: Mapping[str, ClassQuality]
    guess: "Judged | None"
    """The same of the blind guess; None where there are no rows to make it of."""


def judge(
    segmenter: Segmenter, rows: SegmentedRows, most: int | None = None, guessing: SegmentedRows | None = None
) -> Judged:
    """Segment rows one by one and compare; where a picture cannot be segmented, nothing is found in it.

    Args:
        segmenter: of the rows' own set.
        most: rows to judge on at most.
        guessing: rows of which the blind guess is made: for each place in a picture, its most frequent class.
    """
    quality, blind = PanopticQuality(rows.categories), PanopticQuality(rows.categories)
    guess = _most_frequent(islice(guessing.read(guessing.places), _GUESSED_FROM), rows.categories) if guessing else None
    images = 0
    for place, image, truth in rows.read(rows.places[:most]):
        try:
            (found,) = segmenter.segment([image])
        except Rejected as error:
            rows.damaged[place] = error
            found = build_panoptic_map(np.zeros(image.shape[:2], np.int32), (), rows.categories)
        quality.add(truth, found)
        images += 1
        if guess is not None:
            blind.add(truth, _as_map(guess, truth.index_map.shape, rows.categories))
    of_guess = None if guess is None else Judged(images, blind.mean(), blind.by_class(), None)
    return Judged(images, quality.mean(), quality.by_class(), of_guess)


def open_for(checkpoint: str, categories: CategorySet, device: str) -> Segmenter:
    """Load a network to judge on rows of a set; unknown is what it calls by a name that the set lacks, and what is
    stuff to it and a thing in the set, for all of it in a picture would count as one.

    Raises:
        UserError: as `load_segmenter`, and where nothing is left.
    """
    embedded = find_embedded(checkpoint)
    try:
        folder = embedded.folder if embedded else find_checkpoint(checkpoint, weights=())
        own = categories_of_checkpoint(folder, checkpoint, categories)
    except OSError:
        own = categories  # loading it says what is wrong
    foreign = {
        category.name: ""
        for key, category in own.by_key.items()
        if key not in categories.by_key or (categories.by_key[key].is_thing and not category.is_thing)
    }
    if len(foreign) == len(own):
        named = ", ".join(list(foreign)[:3])
        raise UserError(
            f"{checkpoint}: none of its {len(own)} classes ({named}, ...) is one of the rows' and of its kind"
        )
    return load_segmenter(
        "transformers", checkpoint=checkpoint, device=device, categories=categories, category_map=foreign, batch_size=1
    )


def table(judged: Judged) -> list[str]:
    """Return the figures as Markdown, best classes first."""
    guess = judged.guess
    lines = ["| class | PQ | true | found | wrong |" + " blind guess |" * bool(guess), "|---|---:|---:|---:|---:|"]
    lines[1] += "---:|" * bool(guess)
    rows: list[tuple[str, float, Sequence[object], float]] = []
    for name, each in sorted(judged.by_class.items(), key=lambda item: -item[1].quality):
        blind_one = guess.by_class.get(name) if guess else None
        counts = (each.truth, each.found, each.wrong)
        rows.append((name, each.quality, counts, blind_one.quality if blind_one else 0.0))
    rows.append((f"mean of {judged.images} pictures", judged.quality, ("", "", ""), guess.quality if guess else 0))
    for name, quality, columns, blind in rows:
        cells = [name, f"{100 * quality:.1f}", *map(str, columns), *([f"{100 * blind:.1f}"] if guess else [])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _most_frequent(rows: Iterable[tuple[Place, np.ndarray, PanopticMap]], categories: CategorySet) -> np.ndarray:
    """Return the semantic index that most maps have at each place, int [height, width]."""
    counts = np.zeros((categories.semantic_indices, *_GRID_HW), np.int64)
    places = np.indices(_GRID_HW)
    for *_, panoptic in rows:
        indices = np.array([0, *(segment.label + 1 for segment in panoptic.segments)])
        counts[indices[_resized(panoptic.index_map, _GRID_HW)], places[0], places[1]] += 1
    return counts[1:].argmax(0) + 1


def _as_map(indices: np.ndarray, size_hw: tuple[int, ...], categories: CategorySet) -> PanopticMap:
    """Make a map of one segment a class."""
    ids = _resized(indices, size_hw)
    infos = [SegmentInfo(int(index), int(index) - 1) for index in np.unique(ids)]
    return build_panoptic_map(ids, infos, categories)


def _resized(indices: np.ndarray, size_hw: tuple[int, ...]) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(indices, dtype=np.int32))
    return np.asarray(image.resize((size_hw[1], size_hw[0]), Image.Resampling.NEAREST))
