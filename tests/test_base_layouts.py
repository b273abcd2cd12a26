"""Whole ways from published layouts to answers, at toy width; and the tokens that the bases were trained with."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from internlm_reference import internlm2_shapes, random_weights
from test_import_base import clip as clip_fixture
from test_import_base import llama as llama_fixture
from test_import_base import llava as llava_fixture
from test_import_base import save_language_model, save_older_llava, save_original_llava
from test_internlm import MARKERS, checkpoint, internlm2_config
from tiny_model import scene_rows, write_crayon_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, SiglipVisionConfig, SiglipVisionModel, pipeline

from collavo import evaluate, export_model, train
from collavo.errors import UserError
from collavo.import_base import sentencepiece_tokenizers
from collavo.import_base.__main__ import main as import_base
from collavo.import_base.assemble import assemble_from_parts
from collavo.import_base.published import read_tokenizer
from collavo.model.prompt import CHAT_FORMATS, render_conversation, show_supervision

clip, llama, llava = clip_fixture, llama_fixture, llava_fixture

VICUNA_TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.",
    "USER: What colour is the car? ASSISTANT: Red. USER: Where? ASSISTANT: It is on the left.",
]
QWEN3_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP 2 of one resolution, as it is published: the vision half of a `siglip` checkpoint, with pooling head."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(5)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=60, patch_size=14
    )
    SiglipVisionModel(config).save_pretrained(folder)
    options = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 60, "width": 60}}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save_language_model(folder, "qwen3", tie_word_embeddings=True, max_position_embeddings=1024)
    tokens = AutoTokenizer.from_pretrained(folder)
    tokens.add_tokens(["<think>", "</think>"])
    tokens.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def internlm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internlm2")
    (folder / "corpus.txt").write_text("\n".join(["hello world, how many people are in the image?"] * 40))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        hard_vocab_limit=False, model_type="bpe", byte_fallback=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", user_defined_symbols=MARKERS,
        minloglevel=2,
    )  # fmt: skip
    config = internlm2_config(max_position_embeddings=1024)
    language = folder / "language"
    language.mkdir()
    return checkpoint(language, config, random_weights(internlm2_shapes(config)), folder / "tokenizer.model")


def test_siglip_gives_its_last_layer_but_one_without_its_head(siglip: Path, qwen3: Path) -> None:
    model, processor = assemble_from_parts(siglip, qwen3, dtype=torch.float32)
    assert model.config.grid_hw == processor.grid_hw == (4, 4) and processor.image_processor.size["height"] == 56
    assert not any("vision_tower.head" in name for name in model.state_dict())
    assert processor.image_processor.image_mean == (0.5, 0.5, 0.5) and processor.image_processor.resample == 2
    pixels = torch.randn(2, 3, 56, 56)
    original = SiglipVisionModel.from_pretrained(siglip)
    with torch.inference_mode():
        expected = original(pixels, output_hidden_states=True).hidden_states[-2]
        found = torch.stack(model.get_image_features(pixels).pooler_output)
        torch.testing.assert_close(found, model.model.multi_modal_projector(expected))


def test_siglips_positions_are_interpolated_as_transformers_does(siglip: Path, qwen3: Path) -> None:
    model, _ = assemble_from_parts(siglip, qwen3, image_size=84, dtype=torch.float32)
    pixels = torch.randn(1, 3, 84, 84)
    with torch.inference_mode():
        expected = SiglipVisionModel.from_pretrained(siglip)(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(model.model.vision_tower(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_a_siglip_of_any_resolution_is_refused_in_one_line(siglip: Path, qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(UserError, match="has no fixed grid; a SigLIP 2 of one resolution has"):
        assemble_from_parts(tmp_path, qwen3)


def test_qwen3_is_asked_as_its_own_template_asks_without_thinking(siglip: Path, qwen3: Path) -> None:
    _, processor = assemble_from_parts(siglip, qwen3, dtype=torch.float32)
    assert processor.chat_format == "qwen3"
    ours = processor.render([("human", "How many?")], has_image=False).input_ids
    own = AutoTokenizer.from_pretrained(qwen3)
    messages = [{"role": "user", "content": "How many?"}]
    text = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert ours == own(text, add_special_tokens=False).input_ids


_TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
_ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OWN_TEMPLATES = {
    "plain": _TURNS + _ASKS,
    # As Qwen 2, Qwen 2.5 and SmolLM2, each with a system text of its own.
    "a system text": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}"
    "{% endif %}" + _TURNS + _ASKS,
    # As Llama 2: the system text inside the first question, a space before the end, a beginning for each question.
    "within the question": "{% set told = namespace(by='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set told.by = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + told.by + m.content + ' [/INST]' }}{% set told.by = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    # As Mistral's first and Nemo, without spaces.
    "no system text": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}",
    # As Zephyr.
    "roles": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}


@pytest.mark.parametrize("template", OWN_TEMPLATES)
def test_prompts_have_the_tokens_of_a_language_models_own_template(
    template: str, clip: Path, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "language")
    (tmp_path / "language" / "chat_template.jinja").write_text(OWN_TEMPLATES[template])
    flags = ["--vision", str(clip), "--language", str(tmp_path / "language"), "--image_size", "56"]
    assert import_base([*flags, "--output", str(tmp_path / "base")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    assert (processor.chat_format == "chatml") == (template == "plain")
    own = AutoTokenizer.from_pretrained(tmp_path / "language")
    turns = [("human", "How many?"), ("gpt", "3 dogs."), ("human", "Where?")]
    told = [("system", "Be kind."), ("human", "How many?")]
    for given in (turns[:1], turns, told) if template != "no system text" else (turns[:1], turns):
        messages = [
            {"role": {"human": "user", "gpt": "assistant"}.get(who, who), "content": text} for who, text in given
        ]
        text = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = processor.render(given, has_image=False)
        assert prompt.input_ids == own(text, add_special_tokens=False).input_ids
        assert processor.apply_chat_template(messages, add_generation_prompt=True) == text
    stop = own.convert_tokens_to_ids("<|im_end|>" if OWN_TEMPLATES[template].endswith(_ASKS) else "</s>")
    ends = GenerationConfig.from_pretrained(tmp_path / "base").eos_token_id
    supervised = [i for i in processor.render(turns).labels if i != -100]
    assert supervised[-1] == stop and stop in ends and processor.tokenizer.decode(supervised).strip()[:7] == "3 dogs."
    if template == "no system text":
        assert own.decode(processor.render(told, has_image=False).input_ids) == "<s>[INST]Be kind.\n\nHow many?[/INST]"


INTERNLM2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What InternLM2's chat models are published with: `<s>`, then each message between markers, with its role."""


def test_internlm2s_prompts_have_the_tokens_of_its_own_template(internlm2: Path, siglip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(internlm2, folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {
        "<|im_end|>": model.piece_to_id("[UNUSED_TOKEN_145]"),
        "<|im_start|>": model.piece_to_id("[UNUSED_TOKEN_146]"),
    }
    added = {str(place): {"content": name, "special": True} for name, place in ids.items()}
    entries = {"added_tokens_decoder": added, "chat_template": INTERNLM2_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))
    _, processor = assemble_from_parts(siglip, folder, dtype=torch.float32)
    assert processor.chat_format == "chatml"
    turns = [("system", "Be kind."), ("human", "hello  world"), ("gpt", "two people"), ("human", "how many?")]
    for given in (turns, turns[1:], turns[1:2]):
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        messages = [{"role": roles[speaker], "content": text} for speaker, text in given]
        template = jinja2.Environment().from_string(INTERNLM2_TEMPLATE)
        text = template.render(messages=messages, bos_token="<s>", add_generation_prompt=True)
        expected = [model.bos_id()]
        for part in re.split(
            r"(<\|im_(?:start|end)\|>)", text.removeprefix("<s>")
        ):  # sentencepiece itself knows no names
            expected += [ids[part]] if part in ids else model.encode(part)
        assert processor.render(given, has_image=False).input_ids == expected


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """A tokenizer in the form of Llama's, and the sentencepiece model that it was made of."""
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "corpus.txt").write_text("\n".join(VICUNA_TEXTS * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=420, hard_vocab_limit=False,
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
             for i in range(len(model))]  # fmt: skip
    pieces = [(model.id_to_piece(i), model.get_score(i), kind) for i, kind in enumerate(kinds)]
    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = sentencepiece_tokenizers._merges(pieces)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = "\N{LOWER ONE EIGHTH BLOCK}"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    parts = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", model.bos_id())])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder, model


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_vicunas_prompts_have_the_tokens_that_llava_was_trained_with(
    saved: bool, file: str, vicuna: tuple[Path, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    """LLaVA tokenizes what stands before and behind the image apart, and so does its tokenizer around `</s>`."""
    folder, model = vicuna
    (tmp_path / "tokenizer.model").write_bytes(model.serialized_model_proto())
    tokenizer = read_tokenizer(folder if file == "tokenizer.json" else tmp_path)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("human", "<image>\nWhat colour?"), ("gpt", "Red."), ("human", "Where?"), ("gpt", "On the left.")]
    prompt = render_conversation(tokenizer, CHAT_FORMATS["vicuna"], turns, 2)
    system, image, end = VICUNA_TEXTS[0], tokenizer.convert_tokens_to_ids("<image>"), model.eos_id()
    first, second = "\nWhat colour? ASSISTANT: Red.", "USER: Where? ASSISTANT: On the left."
    opening = [model.bos_id(), *model.encode(f"{system} USER: "), image, image]
    assert prompt.input_ids == [*opening, *model.encode(first), end, *model.encode(second), end]
    answers = [i for i in prompt.labels if i != -100]
    assert answers == [*model.encode("Red."), end, *model.encode("On the left."), end]
    shown = show_supervision(tokenizer, prompt).plain
    assert "ASSISTANT: Red.</s>" in shown and "Where? ASSISTANT: On the left.</s>" in shown
    marked = show_supervision(tokenizer, prompt, in_color=False).plain
    assert marked.replace(">>", "").replace("<<", "") == shown
    assert re.findall(r">>\s*(.*?)<<", marked) == ["Red.</s>", "On the left.</s>"]


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_a_tokenizer_file_says_itself_where_spaces_are_put(
    scheme: str, vicuna: tuple[Path, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    """Of a Llama that was tuned with markers of its own: no space behind each of them, as Vicuna's file has it."""
    entries = json.loads((vicuna[0] / "tokenizer.json").read_text())
    entries["normalizer"] = None
    space = {"type": "Metaspace", "replacement": "\N{LOWER ONE EIGHTH BLOCK}", "prepend_scheme": scheme, "split": False}
    backend = Tokenizer.from_str(json.dumps({**entries, "pre_tokenizer": space}))
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(vicuna[0] / name, tmp_path)
    text = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    read_tokenizer(tmp_path).save_pretrained(tmp_path / "saved")
    for tokenizer in (read_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        found = render_conversation(tokenizer, CHAT_FORMATS["chatml"], [("human", "Where?")], 0).input_ids
        assert found == [1, *backend.encode(text, add_special_tokens=False).ids]
        assert tokenizer.decode(found) == f"<s>{text}"


def test_a_fine_tunes_added_tokens_and_ends_come_with_a_sentencepiece_file(
    vicuna: tuple[Path, sentencepiece.SentencePieceProcessor], tmp_path: Path
) -> None:
    _, model = vicuna
    for number, entries in enumerate(
        (
            {"added_tokens_decoder": {str(len(model)): {"content": "<|im_end|>", "special": True}}},
            {},  # in the older file
        )
    ):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "tokenizer.model").write_bytes(model.serialized_model_proto())
        (folder / "tokenizer_config.json").write_text(json.dumps({**entries, "eos_token": "<|im_end|>"}))
        (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": len(model)}))
        tokenizer = read_tokenizer(folder)
        assert tokenizer.eos_token_id == len(model) == len(tokenizer) - 1
        assert tokenizer("two<|im_end|>", add_special_tokens=False).input_ids == [*model.encode("two"), len(model)]


def test_markers_of_a_sentencepiece_file_are_single_tokens(tmp_path: Path) -> None:
    """Control pieces, as [INST] in Mistral's, and pieces that a chat model has renamed."""
    (tmp_path / "corpus.txt").write_text("one two three four five six seven\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]"],
        user_defined_symbols=["[UNUSED_TOKEN_0]"],
    )
    unused = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model")).piece_to_id("[UNUSED_TOKEN_0]")
    entries = {"added_tokens_decoder": {str(unused): {"content": "<|im_end|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    tokenizer = read_tokenizer(tmp_path)
    for marker in ("[INST]", "<|im_end|>"):
        (id_,) = tokenizer(marker, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(id_) == marker
        assert tokenizer.decode([id_], skip_special_tokens=True) == ""


def test_control_tokens_in_a_text_bring_no_spaces(vicuna: tuple[Path, sentencepiece.SentencePieceProcessor]) -> None:
    tokenizer = read_tokenizer(vicuna[0])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    prompt = render_conversation(tokenizer, CHAT_FORMATS["vicuna"], [("human", "Why</s>is it?"), ("gpt", "So")], 0)
    assert prompt.input_ids.count(tokenizer.eos_token_id) == 1
    assert "Why</s>" in tokenizer.decode(prompt.input_ids)


TRAIN = (
    "--device cpu --precision fp32 --batch_size 2 --align_batch_size 2 --micro_batch_size 2 --lora_rank 2 "
    "--max_length 1000 --max_steps 2 --workers 0 --checkpoint_steps 1 --no-quantize --object_list none "
    "--tasks class_to_binary counting"
)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llava", "llava older", "llava original", "clip+internlm2", "siglip2+qwen3"])
def test_a_published_layout_goes_all_the_way(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if layout.startswith("llava"):
        folder = request.getfixturevalue("llava")
        (tmp_path / "source").mkdir()
        if save := {"llava older": save_older_llava, "llava original": save_original_llava}.get(layout):
            folder = save(folder, tmp_path / "source")
        source = ["--llava", str(folder), "--image_size", "56"]
        steps = ["cpt"] * 2 + ["cit"] * 2
    else:
        vision, language = layout.split("+")
        folders = (request.getfixturevalue(vision.removesuffix("2")), request.getfixturevalue(language))
        source = ["--vision", str(folders[0]), "--language", str(folders[1]), "--image_size", "56"]
        steps = ["align"] * 2 + ["cpt"] * 2 + ["cit"] * 2
    base, run, merged = (str(tmp_path / name) for name in ("base", "run", "merged"))
    assert import_base([*source, "--output", base, "--dtype", "float32"]) == 0
    data = str(write_crayon_file(tmp_path / "rows.parquet", scene_rows(6)))
    flags = ["--data", data, "--preset", base, "--output_dir", run, *TRAIN.split()]
    assert train.main(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if "loss" in line] == steps
    assert (tmp_path / "run" / "projector.safetensors").exists() == ("align" in steps)
    assert train.main([*flags, "--resume"]) == 0
    ask = ["--data", data, "--device", "cpu", "--max_images", "1", "--tasks", "class_to_binary"]
    assert evaluate.main(["--model", run, *ask]) == 0
    export = ["--model", run, "--output", merged, "--as", "merged", "--dtype", "float32", "--device", "cpu"]
    assert export_model.main(export) == 0
    answers: Any = pipeline("image-text-to-text", model=merged)
    answers.processor.segmenter = None
    content = [{"type": "image", "image": np.zeros((40, 50, 3), np.uint8)}, {"type": "text", "text": "How many?"}]
    chat = [{"role": "user", "content": content}]
    said = answers(chat, return_full_text=False, max_new_tokens=3)
    assert isinstance(said[0]["generated_text"], str)
