"""To transformers, the model is LLaVA with two inputs more: its signature, its ways to decode, its loaders."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import encoded
from PIL import Image
from serving import data_url, served, user
from test_modeling import IMAGE, inputs
from tiny_model import GRID, scene_rows, tiny_config, tiny_model
from tiny_run import save_tiny_run
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaModel,
    pipeline,
)

from collavo.chat import main as chat_main
from collavo.export_model import main as export_main
from collavo.inference import picture_of_row
from collavo.model import CollavoConfig, CollavoForConditionalGeneration, CollavoModel, CollavoProcessor

SIGNALS = [{}, {"crayon_signal": "low_rank_branches", "branch_rank": 4}]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize(
    ("ours", "theirs"), [(CollavoForConditionalGeneration, LlavaForConditionalGeneration), (CollavoModel, LlavaModel)]
)
@pytest.mark.parametrize("method", ["forward", "get_image_features"])
def test_the_parameters_are_llavas_in_llavas_order_and_ours_come_after(ours: Any, theirs: Any, method: str) -> None:
    llava, found = (dict(inspect.signature(getattr(each, method)).parameters) for each in (theirs, ours))
    keywords = llava.pop("kwargs")
    assert list(found)[: len(llava)] == list(llava)
    if method == "forward":  # its annotation lists keywords such as `output_attentions`
        assert found["kwargs"].annotation.__args__ == keywords.annotation.__args__


def test_keys_and_values_are_taken_by_the_name_they_had_before() -> None:
    model, batch = tiny_model(), inputs(1)
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        wanted = model(**batch | {"input_ids": torch.cat([batch["input_ids"], token], 1), "attention_mask": None})
        found = model(input_ids=token, past_key_values=first.cache)
    torch.testing.assert_close(found.logits[:, -1], wanted.logits[:, -1])


@pytest.mark.parametrize("changes", SIGNALS)
def test_every_way_to_decode_greedily_gives_the_same_tokens(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(tiny_config(**changes)), inputs(1)
    wanted = model.generate(**batch, **GREEDY)
    for way in (
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model(tiny_config(**changes))},
    ):
        assert torch.equal(model.generate(**batch, **GREEDY, **way), wanted), way


@pytest.mark.parametrize("changes", SIGNALS)
def test_beams_see_all_images_of_their_row_and_the_vision_tower_sees_them_once(changes: dict[str, Any]) -> None:
    model, four = tiny_model(tiny_config(**changes)), inputs(4)
    pictures = {name: four[name][[0, 2, 1, 3]] for name in ("pixel_values", "semantic_ids", "numbering_ids")}
    ids = torch.cat([four["input_ids"][:2], four["input_ids"][2:]], dim=1)
    seen: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    options = {**GREEDY, "num_beams": 3}
    together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **pictures, **options)
    assert seen == [4]
    for row in range(2):
        own = {name: tensor[2 * row : 2 * row + 2] for name, tensor in pictures.items()}
        alone = model.generate(input_ids=ids[[row]], attention_mask=torch.ones_like(ids[[row]]), **own, **options)
        assert torch.equal(together[[row]], alone)


def test_the_prefill_of_generate_runs_the_language_head_on_one_position() -> None:
    model, widths = tiny_model(), []
    model.lm_head.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    model.generate(**inputs(), **GREEDY)
    assert set(widths) == {1}


def test_left_pads_without_a_mask_are_not_attended() -> None:
    model, batch = tiny_model(), inputs(1)
    wanted = model.generate(**batch, **GREEDY, pad_token_id=2)[:, -6:]
    padded = torch.nn.functional.pad(batch.pop("input_ids"), (5, 0), value=2)
    del batch["attention_mask"]
    assert torch.equal(model.generate(input_ids=padded, **batch, **GREEDY, pad_token_id=2)[:, -6:], wanted)


def test_embeddings_may_stand_for_tokens() -> None:
    model, batch = tiny_model(), inputs()
    with torch.no_grad():
        wanted = model(**batch).logits
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embedded, **batch).logits, wanted)


@pytest.mark.parametrize("changes", [SIGNALS[0], pytest.param(SIGNALS[1], marks=pytest.mark.slow)])
def test_it_is_exported_as_a_graph(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(tiny_config(**changes)), inputs()
    exported = torch.export.export(model, (), {**batch, "use_cache": False}, strict=False)
    other = inputs(seed=5)
    with torch.no_grad():
        found = exported.module()(**other, use_cache=False).logits
        torch.testing.assert_close(found, model(**other, use_cache=False).logits)


def test_reentrant_checkpointing_is_refused_in_one_sentence() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="needs checkpointing that is not reentrant: use_reentrant=False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    model.activation_checkpointing_enable()
    again = tiny_model().train()
    again.activation_checkpointing_enable({})  # as peft's prepare_model_for_kbit_training does
    again(**inputs(2), labels=inputs(2)["input_ids"]).loss.backward()
    assert again.model.crayon_prompt.linear_2.weight.grad.any()


def test_the_class_token_of_the_vision_tower_gets_no_signal() -> None:
    model, batch = tiny_model(), inputs(1)
    ids = torch.cat([batch["input_ids"][:, :2], torch.full((1, 1), IMAGE), batch["input_ids"][:, 2:]], dim=1)
    options = {**batch, "input_ids": ids, "attention_mask": None, "vision_feature_select_strategy": "full"}
    reached: list[torch.Tensor] = []
    layer = model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kw: reached.append(kw["crayon_signal"]), with_kwargs=True)
    with torch.no_grad():
        model(**options)
    assert reached[0][0].abs().sum(-1).nonzero().flatten().tolist() == list(range(3, 3 + GRID * GRID))


def test_the_default_configuration_agrees_with_itself() -> None:
    config = CollavoConfig()
    assert config.grid_hw == (35, 35) and config.image_seq_length == 35 * 35
    assert CollavoConfig(vision_config={"model_type": "clip_vision_model"}).image_seq_length == 7 * 7


@pytest.mark.parametrize("changes", [*SIGNALS, {"class_tokens": [[5 + i] for i in range(133)]}])
def test_weights_may_wait_on_a_disk_or_in_the_memory_of_the_cpu(changes: dict[str, Any], tmp_path: Path) -> None:
    model, batch = tiny_model(tiny_config(**changes)), inputs()
    model.save_pretrained(tmp_path / "model")
    places = {"device_map": {"model": "disk", "lm_head": "cpu"}, "offload_folder": str(tmp_path / "offloaded")}
    on_disk = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", **places)
    offloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    cpu_offload(offloaded, torch.device("cpu"))
    with torch.no_grad():
        wanted = model(**batch).logits
        for found in (on_disk, offloaded):
            assert found.model.crayon_prompt.linear_1.weight.is_meta and torch.equal(found(**batch).logits, wanted)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with two adapters and its two exports."""
    folder = tmp_path_factory.mktemp("forms")
    run = save_tiny_run(folder / "run")
    forms = {"run": run, "merged": folder / "merged", "adapter": folder / "adapter"}
    export_main(["--model", str(run), "--output", str(forms["merged"]), "--as", "merged", "--dtype", "float32"])
    export_main(["--model", str(run), "--output", str(forms["adapter"]), "--as", "adapter"])
    return forms


def test_a_question_gets_the_same_words_from_every_form_in_every_way(forms, tmp_path, capsys) -> None:
    image = tmp_path / "scene.png"
    image.write_bytes(encoded(Image.fromarray(picture_of_row(scene_rows(1)[0], None).image)))
    question, answers = "How many dogs are there?", {}
    blocks = [{"type": "image", "path": str(image)}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": blocks}]
    for form, folder in forms.items():
        asked = ["--model", str(folder), "--image", str(image), "--prompt", question, "--max_new_tokens", "8"]
        assert chat_main([*asked, "--segmenter_checkpoint", "scenes"]) == 0
        answers[form, "chat"] = capsys.readouterr().out.rstrip("\n").split("\n")[-1].strip()
        assert type(AutoConfig.from_pretrained(folder)) is CollavoConfig
        ask = pipeline("image-text-to-text", model=str(folder))
        assert type(ask.model) is CollavoForConditionalGeneration and type(ask.processor) is CollavoProcessor
        ask.processor.segmenter = "scenes"  # the base of this run is no folder that "auto" knows
        said = ask(chat, generate_kwargs={"max_new_tokens": 8, "do_sample": False}, return_full_text=False)
        answers[form, "pipeline"] = said[0]["generated_text"].strip()
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        processor.segmenter = "scenes"
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        batch = processor.apply_chat_template(chat, add_generation_prompt=True, **options)
        tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
        answers[form, "generate"] = processor.decode(tokens, skip_special_tokens=True).strip()
    folder = forms["adapter"]  # the server opens a folder as chat does
    with served(folder, "--segmenter_checkpoint", "scenes") as (client, _):
        asked = {"model": folder.name, "messages": [user(question, data_url(image.read_bytes()))], "max_tokens": 8}
        answers["adapter", "server"] = client.chat.completions.create(**asked).choices[0].message.content
    assert len(set(answers.values())) == 1 and all(answers.values()), answers


@pytest.mark.parametrize("form", ["run", "merged"])
def test_a_pipeline_answers_chats_together_as_alone(forms, form) -> None:
    image = Image.fromarray(picture_of_row(scene_rows(1)[0], None).image)
    ask = pipeline("image-text-to-text", model=str(forms[form]))
    ask.processor.segmenter = "scenes"
    questions = ["Who?", "How many dogs are there in this picture, and where?", "Is there a car?"]
    chats = [[user(question, "")] for question in questions]
    for chat in chats:
        chat[0]["content"][0] = {"type": "image", "image": image}
    options = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": False}, "return_full_text": False}
    alone = [said[0]["generated_text"] for said in ask(chats, **options)]
    together = [said[0]["generated_text"] for said in ask(chats, batch_size=3, **options)]
    assert together == alone and len(set(alone)) == 3


def test_exports_go_anywhere_with_what_they_need(forms, tmp_path) -> None:
    home = forms["run"].parent
    for form in ("merged", "adapter"):
        texts = [file.read_text() for file in forms[form].rglob("*") if file.suffix in (".json", ".md", ".jinja")]
        assert texts and not any(str(home) in text for text in texts)
        card = (forms[form] / "README.md").read_text()
        for said in ("license: other", "base_model: ../run-base", "pipeline_tag: image-text-to-text", "# CoLLaVO: "):
            assert said in card
    moved = tmp_path / "elsewhere"
    home.rename(moved)  # with its base, to which the way is the same
    try:
        AutoModelForImageTextToText.from_pretrained(moved / "adapter")
    finally:
        moved.rename(home)
