"""The models in the package: opened only if whole, as good as their cards say, and made by the commands named there."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from builds import REPOSITORY, tiny_mask2former
from conftest import needs_scenes_model, needs_tiny_base
from safetensors.torch import load_file

from collavo import embedded
from collavo.embedded import CHECKSUMS, find_embedded
from collavo.errors import UserError
from collavo.images import decode_rgb
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.runs import load_base
from collavo.scenes import draw_scene, scene_seed
from collavo.segmenters import load_segmenter
from collavo.training.batches import IGNORED, collate
from pretraining import base, segmenter, word_lists
from pretraining.positions import show_positions
from pretraining.word_grids import WordPrompt, chart_example, draw_chart
from schemas.categories import COCO_PANOPTIC

PQ_TOLERANCE = 0.01
"""On another CPU a near-tie may fall the other way."""

BATCH_NORMS = ("running_mean", "running_var", "num_batches_tracked")
"""Parts of a batch norm that every batch moves, at any rate."""


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """Assets of random weights, with their checksums; the base is there in name only."""
    tiny_mask2former(tmp_path / "segmenter")
    (tmp_path / "tiny_base").mkdir()
    (tmp_path / "tiny_base" / "model.safetensors").write_bytes(b"weights")
    files = ("segmenter/model.safetensors", "tiny_base/model.safetensors")
    sums = subprocess.run(["sha256sum", *files], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / CHECKSUMS).write_text(sums.stdout)
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    return tmp_path


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_an_embedded_model_is_found_by_its_name_and_told_apart_by_its_weights(assets):
    found = find_embedded("scenes")
    assert found is not None and found.folder == assets / "segmenter"
    facts = load_segmenter("transformers", checkpoint="scenes", device="cpu").facts
    assert (facts["checkpoint"], facts["revision"]) == ("scenes", f"sha256:{found.sha256}")
    assert find_embedded("./scenes") is find_embedded("org/scenes") is None


def test_damaged_weights_are_refused_in_one_line(assets):
    for folder in ("segmenter", "tiny_base"):
        flip_a_byte(assets / folder / "model.safetensors")
    with pytest.raises(UserError) as of_segmenter:
        load_segmenter("transformers", checkpoint="scenes", device="cpu")
    with pytest.raises(UserError) as of_base:
        load_base("tiny", torch.float32)
    for error in (of_segmenter, of_base):
        assert "model.safetensors: damaged" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["segmenter/model.safetensors", CHECKSUMS])
def test_what_is_missing_is_named(assets, missing):
    (assets / missing).unlink()
    with pytest.raises(UserError, match=rf"{missing}: No such file or directory"):
        find_embedded("scenes")


@needs_scenes_model
def test_the_segmenter_in_the_package_is_whole_and_sees_at_its_own_size():
    assert find_embedded("scenes") is not None
    facts = load_segmenter("transformers", checkpoint="scenes", device="cpu").facts
    assert facts["input_size_hw"] == list(segmenter.INPUT_HW)
    assert facts["thresholds"] == asdict(THRESHOLD_PRESETS["scenes"])


@needs_tiny_base
def test_the_base_in_the_package_is_whole_and_loads():
    assert find_embedded("tiny") is not None
    model, processor = load_base("tiny", torch.float32)
    assert model.config.image_token_index == processor.image_token_id


@needs_tiny_base
def test_the_base_in_the_package_finds_words_that_are_laid_over_pictures_it_never_saw():
    """What Crayon Prompt Tuning rests on; no adapter beside frozen embeddings could teach it to say yes and no."""
    model, processor = load_base("tiny", torch.float32)
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer)
    right = []
    for number in range(4):
        chart = draw_chart(10**7 + number, processor.grid_hw, "whether")
        picture = draw_scene(scene_seed(0, number), (192, 144)).image
        example = chart_example(chart, picture, processor)
        with torch.no_grad():
            outputs = model(**collate([example], processor.tokenizer.pad_token_id).inputs)
        labels = example.labels
        supervised = (labels[1:] != IGNORED).nonzero().squeeze(1)
        right += (outputs.logits[0, supervised].argmax(-1) == labels[supervised + 1]).tolist()
    assert sum(right) / len(right) > 0.97  # of three tokens of an answer, the last two are always the same


@needs_scenes_model
def test_the_segmenter_in_the_package_sees_what_is_in_a_scene():
    segmenter = load_segmenter("transformers", checkpoint="scenes", device="cpu")
    right = []
    for number in range(3):
        scene = draw_scene(scene_seed(4_000_037, number), (320, 240))
        labels = {0: -1} | {s.id: s.category.label for s in scene.segments}
        (found,) = segmenter.segment([scene.image])
        found_labels = np.array([-1, *(s.label for s in found.segments)])[found.index_map]
        right.append(np.mean(np.vectorize(labels.get)(scene.ids) == found_labels))
    assert np.mean(right) > 0.9


@needs_scenes_model
def test_the_segmenter_in_the_package_tells_what_is_no_scene(real):
    segmenter = load_segmenter("transformers", checkpoint="scenes", device="cpu")
    photograph = next((real / "coco").rglob("*.jpg"))
    pictures = [decode_rgb(photograph.read_bytes()), draw_scene(scene_seed(4_000_037, 0), (320, 240)).image]
    assert [found.unfamiliar for found in segmenter.segment(pictures)] == [True, False]


def words_of(listing: str) -> list[str]:
    """The words of a list, however it is written, each as often as it is in it."""
    if "#" in listing:
        return re.findall(r"\(#\d+ ([^)]+)\)", listing)
    if "/" in listing or re.search(r" \d", listing):
        return [re.match(r"\D+(?= \d)", run)[0] for run in listing.split(" / ")]
    return listing.split(", ")


def test_questions_about_lists_have_the_answers_that_their_lists_give():
    names = {c.with_article if c.is_thing else c.display_name: c.display_name for c in COCO_PANOPTIC}
    plurals = {c.plural or c.display_name: c.display_name for c in COCO_PANOPTIC}
    kinds = set()
    about = (word_lists.list_dialogues, word_lists.short_list_dialogues)
    for turns in (turns for index in range(100) for dialogues in about for turns in dialogues(index)):
        listing, first = re.fullmatch(r"The list: (.+?)\. ([^.]+\??.)", turns[0][1]).groups()
        words = words_of(listing)
        questions = [first, *(text for _, text in turns[2::2])]
        for question, (_, answer) in zip(questions, turns[1::2], strict=True):
            if match := re.fullmatch(r"How many (.+?)(?: are in the list)?\?", question):
                assert answer == f"{words.count(plurals[match[1]])}."
            elif match := re.fullmatch(r"Which word comes after (.+)\?", question):
                others = [word for word in words[words.index(match[1]) :] if word != match[1]]
                assert answer == f"{(others or ['None'])[0]}."
            elif question == "Which words are there?":
                assert answer == ", ".join(dict.fromkeys(words)) + "."
            elif question == "Write it with numbers.":
                assert words_of(answer.removesuffix(".")) == words
            else:
                match = re.fullmatch(r"Is there (.+) in the list\?|(.+)\?", question)
                assert answer == ("Yes." if (match[2] or names[match[1]]) in words else "No.")
            kinds.add((" ".join(question.split()[:2]) if " " in question else "", answer in ("Yes.", "0.", "None.")))
    assert len(kinds) >= 9


def test_what_is_in_the_package_is_small():
    files = [file for file in embedded.ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6


@pytest.mark.slow
@needs_scenes_model
def test_the_segmenter_is_as_good_as_its_card_says(tmp_path):
    """On the first of the scenes that the card's figures come from, which no training has seen."""
    figures = embedded.ASSETS / "segmenter" / "figures.json"
    if not figures.exists():
        pytest.skip("the card of the embedded segmenter has no figures yet")
    expected = json.loads(figures.read_text())["first_40"]
    command = [sys.executable, "benchmarks/segmenter_quality.py", "--count", "40", "--device", "cpu"]
    run = subprocess.run(
        [*command, "--cache", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])["panoptic_quality"]
    for group in ("all", "things", "stuff"):
        assert found[group]["pq"] == pytest.approx(expected[group]["pq"], abs=PQ_TOLERANCE)


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_segmenters_training_goes_on_where_it_stopped_and_leaves_a_segmenter(tmp_path):
    run = tmp_path / "run"
    flags = ["--output", str(run), "--batch_size", "2", "--pool", "4", "--height", "64", "--width", "96"]
    for steps in ("1", "2"):
        assert segmenter.main([*flags, "--steps", steps]) == 0
    assert steps_logged(run) == [1, 2]
    trained = load_segmenter("transformers", checkpoint=str(run / "model"), device="cpu")
    assert trained.facts["input_size_hw"] == [64, 96]
    (panoptic,) = trained.segment([np.zeros((30, 40, 3), np.uint8)])
    assert panoptic.index_map.shape == (30, 40)


@pytest.mark.slow
def test_the_segmenters_training_can_go_on_from_a_segmenter(tmp_path):
    flags = ["--batch_size", "1", "--pool", "1", "--height", "64", "--width", "96", "--half_size_steps", "0"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert segmenter.main([*flags, "--output", str(first), "--steps", "1"]) == 0
    further = ["--output", str(second), "--start", str(first / "model"), "--learning_rate", "1e-9", "--steps", "1"]
    assert segmenter.main([*flags, *further]) == 0
    before, after = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    assert all(torch.equal(weight, after[name]) for name, weight in before.items() if not name.endswith(BATCH_NORMS))


@pytest.mark.slow
def test_the_bases_training_goes_on_where_it_stopped_and_leaves_a_base(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "TOKENIZER_SCENES", 20)
    run = tmp_path / "run"
    for steps in ("1", "2"):
        assert base.main(["--output", str(run), "--batch_size", "2", "--steps", steps]) == 0
    assert steps_logged(run) == [1, 2]
    model, processor = load_base(str(run / "model"), torch.float32)
    assert model.config.image_token_index == processor.image_token_id


@pytest.mark.slow
@needs_tiny_base
@pytest.mark.parametrize("frozen", [False, True])
def test_pretraining_can_go_on_from_a_base(tmp_path, monkeypatch, frozen):
    """Past the short lists, and with the words that its tokenizer has."""
    monkeypatch.setattr(base, "SHORT_LISTS_FIRST", 1)
    monkeypatch.setattr(base, "SIMPLE_CHARTS_NEXT", (("tiles", 1),))
    monkeypatch.setattr(base, "ROTATION", ("all",))
    monkeypatch.setattr(base, "CHART_PICTURES", 1)
    start, run = str(embedded.ASSETS / "tiny_base"), tmp_path / "run"
    flags = ["--output", str(run), "--start", start, "--first_step", "1", "--batch_size", "2", "--steps", "2"]
    assert base.main([*flags, *["--freeze_vision"] * frozen]) == 0
    (before, theirs), (after, ours) = (load_base(base, torch.float32) for base in (start, str(run / "model")))
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    weights = after.state_dict()
    moved = {name for name, weight in before.state_dict().items() if not torch.equal(weight, weights[name])}
    vision = {"vision_tower", "multi_modal_projector"}
    assert {name.split(".")[1] for name in moved} & {"language_model", *vision} == (
        {"language_model"} if frozen else {"language_model", *vision}
    )
    assert not any("crayon_prompt.linear_2" in name for name in moved)  # it waits, closed, for its own tuning


def told_column(model, pixel_values) -> float:
    """How much a linear reading of the projector's output tells of columns, on pictures it was not fitted to."""
    with torch.no_grad():
        features = model.model.multi_modal_projector(model.model.vision_tower(pixel_values).last_hidden_state[:, 1:])
    columns = (torch.arange(features.shape[1]) % 12 - 5.5).double()
    fitted, others = (some.flatten(0, 1).double() for some in features.split(len(features) // 2))
    middle, repeats = fitted.mean(0), len(features) // 2
    reading = torch.linalg.lstsq(fitted - middle, columns.repeat(repeats)[:, None], rcond=1e-6, driver="gelsd").solution
    missed = ((others - middle) @ reading).squeeze(1) - columns.repeat(repeats)
    return float(1 - missed.var() / columns.var())


@pytest.mark.slow
def test_image_tokens_tell_their_places_once_they_are_shown(monkeypatch):
    """A projector's output behind a tower of random weights tells no column; with the code of places it does."""
    monkeypatch.setattr(base, "TOKENIZER_SCENES", 1)
    with monkeypatch.context() as without:
        without.setattr(base, "show_positions", lambda *_: None)
        model, processor = base.new_base()
    pictures = [draw_scene(scene_seed(0, number), (192, 144)).image for number in range(32)]
    pixel_values = torch.stack([processor.pixel_values(picture) for picture in pictures])
    assert told_column(model, pixel_values) < 0.2
    show_positions(model, pixel_values)
    assert told_column(model, pixel_values) > 0.7
