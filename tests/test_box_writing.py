"""Charts that ask where words stand, and the layers that learn to answer with boxes."""

import numpy as np
import pytest
import torch
from test_word_grids import GRID_HW, boxes_of

from collavo.embedded import TINY
from collavo.instructions.text import parse_objects
from collavo.runs import load_base
from collavo.training.batches import collate
from pretraining.base import CHART_PICTURES, chart_picture
from pretraining.box_writing import Writer, box_overlaps, cut, grow, known_sequences
from pretraining.word_grids import MOST_BOXES, WordPrompt, chart_example, draw_chart
from schemas.categories import COCO_PANOPTIC


def test_answers_list_every_place_of_the_word_with_its_box_or_say_that_there_is_none() -> None:
    names = {category.display_name for category in COCO_PANOPTIC}
    singular = {category.singular: category.display_name for category in COCO_PANOPTIC.things}
    counts, fits = set(), []
    for index in range(80):
        chart = draw_chart(index, GRID_HW, "where")
        boxes = boxes_of(chart)
        for (_, question), (_, answer) in chart.dialogues:
            asked = max((word for word in singular if f" {word}" in question), key=len)
            start, end = answer.find("("), answer.rfind("]")
            mentions = parse_objects(answer[start : end + 1], names) if start >= 0 else []
            own = [number for name, number in boxes if name == singular[asked]]
            assert {mention.name for mention in mentions} <= {singular[asked]}
            numbers = [mention.numbering for mention in mentions]
            assert numbers == sorted(numbers) and set(own) <= set(numbers)  # a thin one may have no cell
            counts.add(len(mentions))
            for mention in mentions:
                if (cells := boxes.get((mention.name, mention.numbering))) and mention.box:
                    fits.append(np.abs(np.array(mention.box) * 12 - cells).max() < 1.25)
    assert counts == set(range(MOST_BOXES + 1))
    assert np.mean(fits) > 0.9


def test_the_embedded_base_writes_a_box_near_each_place_of_a_word() -> None:
    model, processor = load_base(TINY, torch.float32)
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer)
    overlaps: list[float] = []
    for index in range(10**6, 10**6 + 3):
        chart = draw_chart(index, processor.grid_hw, "where")
        for turns in chart.dialogues:
            overlaps += box_overlaps(model, processor, chart, turns, chart_picture(index % CHART_PICTURES))
    assert len(overlaps) > 10
    assert np.mean(overlaps) > 0.25


@pytest.mark.slow
def test_new_layers_change_nothing_until_they_learn_and_their_heads_begin_at_the_cells_of_the_word() -> None:
    base, processor = load_base(TINY, torch.float32)
    cut(base, 4)
    base.model.crayon_prompt = WordPrompt(base, processor.tokenizer)
    examples = [
        chart_example(draw_chart(index, processor.grid_hw, "where"), np.zeros((48, 48, 3), np.uint8), processor)
        for index in range(60)
    ]
    known = list(known_sequences(base, processor, "where", iter(examples)))
    inputs = collate(examples[:2], processor.tokenizer.pad_token_id).inputs
    with torch.no_grad():
        before = base(**inputs).logits
        grown = grow(base)
        grown.model.crayon_prompt = WordPrompt(grown, processor.tokenizer)
        torch.testing.assert_close(grown(**inputs).logits, before)
    grown.set_attn_implementation("eager")
    grown.requires_grad_(False)
    writer = Writer(grown, processor)
    charts = [each for each in known if each.written]
    writer.begin(charts[:52])
    with torch.no_grad():
        _, figures = writer.loss_at_words(writer.batch(charts[52:]))
    assert figures["edges"] > 0.3  # of four edges of one object among all tokens; 0.02 with random heads
