"""Measure how well a base reads new word grids (charts): the figures in the embedded base's card.

    python benchmarks/base_quality.py [--base DIR]

The base predicts every token of an answer from the true tokens before it. Yes or no, the count, or the word without its
number has to be right; the rest of the sentence does not matter. Answers with boxes are generated; their mean IoU with
the true boxes counts, in order, and 0 for each box too few or too many.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from measure import circumstances

from collavo import cli
from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from collavo.runs import load_base
from collavo.scenes import draw_scene, scene_seed
from collavo.training.batches import IGNORED, collate
from pretraining.box_writing import box_overlaps
from pretraining.class_words import known_and_new_words
from pretraining.word_grids import Chart, Lesson, WordPrompt, chart_example, draw_chart
from schemas.categories import COCO_PANOPTIC, Category

LESSONS: tuple[Lesson, ...] = ("all", "tiles")

FIRST_CHART = 10**7
"""Pre-training draws charts with lower numbers."""

SAID: dict[str, Callable[[str], object]] = {
    "whether": str,
    "count": lambda text: re.findall(r"\d+", text)[-1:],
    "what": lambda text: text.lstrip("0123456789"),
}
"""The part of an answer that has to be right, by kind of question; its first tokens may begin another sentence."""


def kind_of(answer: str) -> str:
    """Return the kind of question that an answer belongs to."""
    if "#" in answer:
        return "what"
    return "count" if re.search(r"\d", answer) else "whether"


def main() -> None:
    """Run the command; the module's docstring describes it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", default="tiny", help="a base (default: tiny)")
    parser.add_argument("--charts", type=int, default=40, help="default: 40")
    flags = parser.parse_args()
    model, processor = load_base(flags.base, torch.float32)
    categories = known_and_new_words()
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer, categories)
    for title, things in {
        "words of COCO's classes": COCO_PANOPTIC.things,
        "other words": categories[len(COCO_PANOPTIC) :],
    }.items():
        print(title)
        _measure(model, processor, flags.charts, things)
    print(json.dumps(circumstances()))


def _measure(
    model: CollavoForConditionalGeneration, processor: CollavoProcessor, charts: int, things: Sequence[Category]
) -> None:
    """Print the figures of so many charts of each kind, each of which chooses from as many words as COCO has things."""

    def drawn(number: int, lesson: Lesson) -> tuple[Chart, np.ndarray]:
        chosen = np.random.default_rng(number).permutation(len(things))[: len(COCO_PANOPTIC.things)]
        some = [things[i] for i in sorted(chosen)]
        picture = draw_scene(scene_seed(0, number), (192, 144)).image
        return draw_chart(FIRST_CHART + number, processor.grid_hw, lesson, some), picture

    right: dict[str, list[bool]] = defaultdict(list)
    for number, lesson in product(range(charts), LESSONS):
        chart, picture = drawn(number, lesson)
        example = chart_example(chart, picture, processor)
        with torch.no_grad():
            outputs = model(**collate([example], processor.tokenizer.pad_token_id).inputs)
        found = outputs.logits[0].argmax(-1)
        labels, sequence_ids = example.labels, example.sequence_ids
        for position in range(1, len(chart.dialogues) + 1):
            places = ((sequence_ids[1:] == position) & (labels[1:] != IGNORED)).nonzero().squeeze(1)
            kind = kind_of(processor.tokenizer.decode(labels[places + 1]))
            if kind == "what":
                # Look behind the token with the #, because what comes before may be worded differently.
                tokens = processor.tokenizer.batch_decode(labels[places + 1, None])
                places = places[next(i for i, token in enumerate(tokens, start=1) if "#" in token) :]
            truth, answer = (processor.tokenizer.decode(ids[places + at]) for ids, at in ((labels, 1), (found, 0)))
            right[f"{kind}, {lesson}"].append(SAID[kind](truth) == SAID[kind](answer))
    for kind, answers in right.items():
        print(f"{kind:12} {100 * sum(answers) / len(answers):5.1f} % of {len(answers)}")
    overlaps: list[float] = []
    for number in range(charts):
        chart, picture = drawn(number, "where")
        for turns in chart.dialogues:
            overlaps += box_overlaps(model, processor, chart, turns, picture)
    print(f"boxes        mean IoU {np.mean(overlaps):.2f} of {len(overlaps)}")


if __name__ == "__main__":
    raise SystemExit(cli.run("base_quality", main))
