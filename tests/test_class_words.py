"""Words that the embedded base is taught beside those of COCO and of the scenes."""

import numpy as np
import pytest
import torch
from conftest import needs_tiny_base
from tiny_model import tiny_tokenizer

from collavo.embedded import TINY
from collavo.runs import load_base
from collavo.training.batches import collate
from pretraining import class_words
from pretraining.class_words import known_and_new_words, with_whole_words
from pretraining.word_grids import WordPrompt, chart_example, draw_chart
from schemas.categories import COCO_PANOPTIC

KNOWN = len(COCO_PANOPTIC)


def test_the_words_are_many_and_come_behind_cocos_classes() -> None:
    categories = known_and_new_words()
    assert categories.categories[:KNOWN] == COCO_PANOPTIC.categories
    new = {category.display_name for category in categories[KNOWN:]}
    assert {"pedestrian", "pole", "forklift", "helmet", "tumor", "runway"} <= new and len(new) > 300
    assert not new & {category.display_name for category in COCO_PANOPTIC}


@pytest.mark.parametrize(
    "text", ["Is there any at all?", "(#2 Pole) [0.10, 0.25, 0.30, 1.00]", "polemic Pedestrian xpole"]
)
def test_text_without_new_words_keeps_its_tokens(text: str) -> None:
    before = tiny_tokenizer()
    after = with_whole_words(before, known_and_new_words())
    assert after(f"{text} and a pole.")["input_ids"][: len(before(text)["input_ids"])] == before(text)["input_ids"]


@needs_tiny_base
def test_a_word_and_its_counted_form_are_one_token_each_to_the_base_in_the_package() -> None:
    _, processor = load_base(TINY, torch.float32)
    tokenizer = processor.tokenizer
    for category in known_and_new_words():
        for form in filter(None, (category.display_name, category.singular, category.plural)):
            if "-" not in form:
                assert len(tokenizer(f" {form}")["input_ids"]) == len(form.split())
            assert tokenizer.decode(tokenizer(f"See: {form}.")["input_ids"]) == f"See: {form}."


def test_nothing_learns_but_the_new_words(tmp_path, monkeypatch) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("zeppelin\ngargoyle\n")
    monkeypatch.setattr(class_words, "WORDS", listed)
    flags = ["--start", TINY, "--steps", "2", "--batch_size", "1", "--output", str(tmp_path / "run")]
    assert class_words.main(flags) == 0
    (before, processor), (after, taught) = (
        load_base(base, torch.float32) for base in (TINY, str(tmp_path / "run/model"))
    )
    first = len(processor.tokenizer)
    assert taught.tokenizer.convert_ids_to_tokens(range(first, len(taught.tokenizer))) == [
        "Ġzeppelin", "Ġzeppelins", "Ġgargoyle", "Ġgargoyles",
    ]  # fmt: skip
    weights, old = after.state_dict(), before.state_dict()
    grown = [name for name in old if old[name].shape != weights[name].shape]
    assert grown and all(torch.equal(old[name][:first], weights[name][:first]) for name in grown)
    assert all(torch.equal(old[name], weights[name]) for name in old if name not in grown)
    model, again = load_base(TINY, torch.float32)
    class_words.add_words(model, again, known_and_new_words())
    begun = class_words._QUIETED * model.get_input_embeddings().weight[first:]
    learned = after.get_input_embeddings().weight[first:] - begun
    assert learned.norm(dim=1).min() > 0.02  # rounding to bfloat16 changes less


@needs_tiny_base
def test_the_base_in_the_package_reads_words_that_no_scene_and_no_class_of_coco_has() -> None:
    model, processor = load_base(TINY, torch.float32)
    categories = known_and_new_words()
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer, categories)
    new = categories[KNOWN:]
    right = []
    for number in range(4):
        things = [new[i] for i in np.random.default_rng(number).choice(len(new), 12, replace=False)]
        chart = draw_chart(10**7 + number, processor.grid_hw, "tiles", things)
        example = chart_example(chart, np.zeros((144, 192, 3), np.uint8), processor)
        with torch.no_grad():
            outputs = model(**collate([example], processor.tokenizer.pad_token_id).inputs)
        tokens = {processor.tokenizer(f" {word.display_name}")["input_ids"][0] for word in things}
        places = [i for i, label in enumerate(example.labels.tolist()) if label in tokens]
        right += [int(outputs.logits[0, i - 1].argmax()) == int(example.labels[i]) for i in places]
    assert len(right) > 30 and np.mean(right) > 0.65  # of a dozen words each chart could show
