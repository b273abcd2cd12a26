"""How well a base reads charts that it has not seen: the figures of the embedded base's card.

    python benchmarks/base_quality.py [--base DIR]

Every token is predicted with the true tokens before it. What counts of an answer is yes or no, a count, or a word
without its number: how it is put into a sentence is a matter of taste.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import torch

from collavo.errors import UserError
from collavo.runs import load_base
from collavo.scenes import draw_scene, scene_seed
from collavo.training.batches import IGNORED, collate
from pretraining.word_grids import Lesson, WordPrompt, chart_example, draw_chart

LESSONS: tuple[Lesson, ...] = ("all", "tiles")

FIRST_CHART = 10**7
"""Pre-training draws charts of lower numbers."""

SAID: dict[str, Callable[[str], object]] = {
    "whether": str,
    "count": lambda text: re.findall(r"\d+", text)[-1:],
    "what": lambda text: text.lstrip("0123456789"),
}
"""What counts of an answer, by what was asked for; the first tokens may begin another sentence."""


def kind_of(answer: str) -> str:
    """What a chart was asked for, as the answer tells."""
    if "#" in answer:
        return "what"
    return "count" if re.search(r"\d", answer) else "whether"


def main() -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", default="tiny", help="a base (default: tiny)")
    parser.add_argument("--charts", type=int, default=40, help="default: 40")
    flags = parser.parse_args()
    try:
        model, processor = load_base(flags.base, torch.float32)
    except UserError as error:
        parser.error(f"--base {str(error).removeprefix('--preset ')}")
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer)
    right: dict[str, list[bool]] = defaultdict(list)
    for number, lesson in product(range(flags.charts), LESSONS):
        chart = draw_chart(FIRST_CHART + number, processor.grid_hw, lesson)
        picture = draw_scene(scene_seed(0, number), (192, 144)).image
        example = chart_example(chart, picture, processor)
        with torch.no_grad():
            outputs = model(**collate([example], processor.tokenizer.pad_token_id).inputs)
        found = outputs.logits[0].argmax(-1)
        labels, sequence_ids = example.labels, example.sequence_ids
        for position in range(1, len(chart.dialogues) + 1):
            places = ((sequence_ids[1:] == position) & (labels[1:] != IGNORED)).nonzero().squeeze(1)
            kind = kind_of(processor.tokenizer.decode(labels[places + 1]))
            if kind == "what":
                # The name follows a token that ends with #, which may be the first of the answer, and then has rivals.
                tokens = processor.tokenizer.batch_decode(labels[places + 1, None])
                places = places[next(i for i, token in enumerate(tokens, start=1) if "#" in token) :]
            truth, answer = (processor.tokenizer.decode(ids[places + at]) for ids, at in ((labels, 1), (found, 0)))
            right[f"{kind}, {lesson}"].append(SAID[kind](truth) == SAID[kind](answer))
    for kind, answers in right.items():
        print(f"{kind:12} {100 * sum(answers) / len(answers):5.1f} % of {len(answers)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
