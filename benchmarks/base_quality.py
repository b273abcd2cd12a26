"""How well a base reads charts that it has not seen: the figures of the embedded base's card.

    python benchmarks/base_quality.py [--base DIR]

Answers are compared token by token, each given the true tokens before it. A word in a box counts without its number.
"""

import argparse
from collections import defaultdict

import torch

from collavo.scenes import draw_scene, scene_seed
from collavo.training.batches import IGNORED, collate
from collavo.training.charts import WordPrompt, chart_example, draw_chart
from collavo.training.run_directory import RunError, load_base

FIRST_CHART = 10**7
"""Pre-training draws charts of lower numbers."""


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
    except RunError as error:
        parser.error(f"--base {str(error).removeprefix('--preset ')}")
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer)
    right: dict[str, list[bool]] = defaultdict(list)
    for number in range(flags.charts):
        chart = draw_chart(FIRST_CHART + number, processor.grid_hw)
        picture = draw_scene(scene_seed(0, number), (192, 144)).image
        example = chart_example(chart, picture, processor)
        with torch.no_grad():
            outputs = model(**collate([example], processor.tokenizer.pad_token_id).inputs)
        found = outputs.logits[0].argmax(-1)
        labels, sequence_ids = example.labels, example.sequence_ids
        for position in range(1, len(chart.dialogues) + 1):
            places = ((sequence_ids[1:] == position) & (labels[1:] != IGNORED)).nonzero().squeeze(1)
            truth, answer = (processor.tokenizer.decode(ids[places + at]) for ids, at in ((labels, 1), (found, 0)))
            kind = {"Y": "whether", "N": "whether", "(": "what", "[": "where"}.get(truth.strip()[0], "count")
            if kind == "what":
                truth, answer = truth.strip().partition(" ")[2], answer.strip().partition(" ")[2]
            right[kind].append(truth == answer)
    for kind, answers in right.items():
        print(f"{kind:8} {100 * sum(answers) / len(answers):5.1f} % of {len(answers)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
