"""Words in the place of a Crayon Prompt's signal: what charts ask, what they say, and queries that begin as names."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_config, tiny_model, tiny_tokenizer

from collavo.instructions.text import find_boxes
from collavo.model.crayon_prompt import CrayonPrompt
from collavo.model.query_init import ClassWords, begin_with_names
from pretraining.box_loss import cover
from pretraining.word_grids import WordPrompt, draw_chart
from schemas.categories import COCO_PANOPTIC

GRID_HW = (12, 12)
COUNTED = re.compile(
    r"(?:How many|Count the|What is the number of) (.+?)(?: are on.*| do you read.*| can you read\?|\.|\?)"
)
ANY = re.compile(r"Is(?: there)? any (.+?) (?:on the chart|in this picture)\?")
WHETHER = re.compile(
    r"(?:Is there|Does the chart have|Does the chart contain|Can you read) (.+?)(?: on the| in the|\?).*"
)
NAMED = re.compile(r"(?:|It is |Sure, it is |That is |I read )\(#(\d+) ([^)]+)\)\.")


def boxes_of(chart) -> dict[tuple[str, int], tuple[int, int, int, int]]:
    """What stands on a chart, read out of its maps: the box in cells of every word and number."""
    semantic, numbering = chart.semantic_ids.numpy(), chart.numbering_ids.numpy()
    found = {}
    for word in COCO_PANOPTIC.things:
        for number in np.unique(numbering[semantic == word.label + 1]):
            y, x = np.nonzero((semantic == word.label + 1) & (numbering == number))
            found[word.display_name, int(number)] = (x.min(), y.min(), x.max() + 1, y.max() + 1)
    return found


def is_near(text: str, box: tuple[int, int, int, int], cells: float = 0.25) -> bool:
    """Whether a text's box is this one, to 0.1 of a cell and two decimals, or to that many cells more or less."""
    return np.abs(np.array(find_boxes(text)[0]) * 12 - box).max() < cells


def test_questions_about_charts_have_the_answers_that_their_maps_give() -> None:
    singular = {form: c.display_name for c in COCO_PANOPTIC.things for form in (c.with_article, c.singular)}
    plural = {c.plural: c.display_name for c in COCO_PANOPTIC.things}
    kinds = set()
    fits = []
    for index in range(240):
        chart = draw_chart(index, GRID_HW, "all" if index % 4 else "whether")
        boxes = boxes_of(chart)
        for (_, question), (_, answer) in chart.dialogues:
            if find_boxes(question):
                kind = "what"
                name = NAMED.fullmatch(answer)
                x_min, y_min, x_max, y_max = boxes[name[2], int(name[1])]
                box = np.array(find_boxes(question)[0]) * 12
                assert (box - [x_min, y_min, x_max, y_max] < [1.25, 1.25, np.inf, np.inf]).all()
                assert (box - [x_min, y_min, x_max, y_max] > [-np.inf, -np.inf, -1.25, -1.25]).all()
                fits.append(is_near(question, boxes[name[2], int(name[1])], cells=1.25))
            elif counted := COUNTED.fullmatch(question):
                kind = "count"
                count, name = re.fullmatch(
                    r"(?:|The chart has |I can read |There is (?=1 )|There are (?!1 ))(\d+)(?: (.+))?\.", answer
                ).groups()
                assert int(count) == sum(word == plural[counted[1]] for word, _ in boxes)
                assert name is None or {**singular, **plural}[name] == plural[counted[1]]
            else:
                kind = "whether"
                asked = ANY.fullmatch(question) or WHETHER.fullmatch(question)
                there = any(word == singular[asked[1]] for word, _ in boxes)
                assert answer == ("Yes." if there else "No.")
            kinds.add((kind, answer == "No." or " 0 " in f" {answer} "))
            assert kind == "whether" or index % 4
    assert kinds == {("whether", True), ("whether", False), ("count", True), ("count", False), ("what", False)}
    # A thin word, or one behind others, has fewer cells than its box: the grid gives each cell to one only.
    assert np.mean(fits) > 0.9


def test_tiles_cover_a_chart_and_a_box_lies_in_the_tile_that_answers() -> None:
    for index in range(40):
        chart = draw_chart(index, GRID_HW, "tiles")
        boxes = boxes_of(chart)
        assert len(boxes) == 4 and (chart.semantic_ids > 0).all()
        parts = 0
        for (_, question), (_, answer) in chart.dialogues:
            name = NAMED.fullmatch(answer)
            x_min, y_min, x_max, y_max = boxes[name[2], 1]
            box = np.array(find_boxes(question)[0]) * 12
            assert (box + 0.25 > [x_min, y_min, x_min, y_min]).all() and (
                box - 0.25 < [x_max, y_max, x_max, y_max]
            ).all()
            parts += not is_near(question, boxes[name[2], 1])
        assert 0 < parts < len(chart.dialogues)


@given(st.lists(st.integers(0, 100), min_size=4, max_size=4), st.sampled_from([(12, 12), (3, 7)]))
def test_a_box_covers_its_share_of_every_cell(hundredths: list[int], grid_hw: tuple[int, int]) -> None:
    """Against a count of pixels of a hundred by a hundred per cell."""
    (x_min, x_max), (y_min, y_max) = sorted(hundredths[:2]), sorted(hundredths[2:])
    rows, columns = grid_hw
    pixels = np.zeros((rows * 100, columns * 100))
    pixels[y_min * rows : y_max * rows, x_min * columns : x_max * columns] = 1
    shares = pixels.reshape(rows, 100, columns, 100).mean((1, 3)).ravel()
    box = (x_min / 100, y_min / 100, x_max / 100, y_max / 100)
    np.testing.assert_allclose(cover(box, grid_hw), shares, atol=1e-5)


def test_a_word_on_a_chart_is_what_the_first_layer_reads_where_it_stands_in_a_text() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    layer_norm = model.model.language_model.layers[0].input_layernorm
    torch.nn.init.normal_(layer_norm.weight)
    tokens = tokenizer(" cat", add_special_tokens=False).input_ids
    read = layer_norm(model.model.language_model.embed_tokens.weight[tokens].sum(0))
    semantic = torch.tensor([[[COCO_PANOPTIC.by_display_name["cat"].label + 1, 0]]])
    cells = WordPrompt(model, tokenizer)(semantic, torch.zeros_like(semantic))
    torch.testing.assert_close(cells[0, 0], read, rtol=1e-3, atol=1e-3)
    assert not cells[0, 1].any()
    assert [*WordPrompt(model, tokenizer).parameters()] == []


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.booleans(), st.booleans())
def test_a_crayon_prompt_can_begin_with_any_vectors_that_fit_its_width(rank: int, semantic: bool, more: bool) -> None:
    width, hidden = 40, 80 if more else 96
    prompt = CrayonPrompt(width, hidden, 133, semantic=semantic, numbering=True)
    some = torch.randn(rank, hidden)
    names, numbers = torch.randn(134, rank) @ some, torch.randn(21, rank) @ some
    prompt.begin_with(names, numbers, torch.ones(hidden))
    ids, counts = torch.randint(134, (2, 3, 4)), torch.randint(21, (2, 3, 4))
    expected = numbers[counts] + (names[ids] if semantic else 0)
    torch.testing.assert_close(prompt(ids, counts), expected.flatten(1, 2), rtol=1e-3, atol=1e-3)


def test_queries_too_narrow_for_all_names_keep_what_is_largest_in_them() -> None:
    model, tokenizer = tiny_model(open_prompt=False), tiny_tokenizer()
    begin_with_names(model, tokenizer)
    names, _, _ = ClassWords(tokenizer, COCO_PANOPTIC).vectors(model)
    ids = torch.arange(134)[None, None]
    said = model.model.crayon_prompt(ids, torch.zeros_like(ids))[0]
    assert model.model.crayon_prompt.linear_1.in_features < 64
    closest = torch.nn.functional.cosine_similarity(said[1:], names[1:])
    assert closest.min() > 0 and closest.mean() > 0.6


def test_queries_cannot_begin_as_names_where_the_signal_enters_elsewhere() -> None:
    model = tiny_model(tiny_config(crayon_signal="low_rank_branches"), open_prompt=False)
    with pytest.raises(ValueError, match="low_rank_branches"):
        begin_with_names(model, tiny_tokenizer())
