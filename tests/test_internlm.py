"""InternLM v1 and 2, weights and tokenizer, against plain torch and against sentencepiece itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from internlm_reference import (
    Weights,
    internlm2_logits,
    internlm2_shapes,
    internlm_v1_logits,
    internlm_v1_shapes,
    random_weights,
    save_checkpoint,
)
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from collavo.errors import UserError
from collavo.import_base.assemble import assemble_from_parts
from collavo.import_base.sentencepiece_tokenizers import internlm_tokenizer
from collavo.model.prompt import CHAT_FORMATS, render_conversation

MARKERS = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "——"]
TEXTS = [
    "How many people are there in the image?",
    "  two  spaces, and one at the end ",
    "Sure, it is (#1 person) [0.00, 0.16, 0.29, 0.88].\n\n\tAnd then?",
    "你好世界 — déjà vu 😀 𝄞",
    "[UNUSED_TOKEN_146]user\nhello[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n",
    "one——two [UNUSED_TOKEN_14] <s",
    "",
]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model with the rules of InternLM's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join([*TEXTS, "people  in an   image", "hello hello world"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=MARKERS,
        character_coverage=0.98,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def internlm2_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "internlm2",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "bias": False,
        "rope_theta": 1000000,
        "rope_scaling": None,
        **changes,
    }


def internlm_v1_config(**changes: Any) -> dict[str, Any]:
    config = internlm2_config(model_type="internlm", bias=True, **changes)
    for name in ("rope_theta", "rope_scaling", "num_key_value_heads"):
        del config[name]
    return config


def checkpoint(folder: Path, config: dict[str, Any], weights: Weights, tokenizer_model: Path) -> Path:
    shutil.copy(tokenizer_model, save_checkpoint(folder, config, weights) / "tokenizer.model")
    return folder


def our_logits(clip: Path, folder: Path, ids: list[int]) -> torch.Tensor:
    model, _ = assemble_from_parts(clip, folder, image_size=28, dtype=torch.float32)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    "changes, tokens",
    [
        ({}, 20),
        ({"num_key_value_heads": 4}, 20),  # every head a group of its own
        ({"num_key_value_heads": 1}, 20),
        ({"bias": True}, 20),
        ({"model_type": "internlm"}, 20),  # as its first release called itself
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 20),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 100),  # beyond the trained length
    ],
)
def test_internlm2_gives_the_logits_of_its_own_layout(
    changes: dict[str, Any], tokens: int, clip: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    config = internlm2_config(**changes)
    weights = random_weights(internlm2_shapes(config))
    ids = torch.arange(tokens).mul(7).remainder(config["vocab_size"]).tolist()
    ours = our_logits(clip, checkpoint(tmp_path, config, weights, sentencepiece_model), ids)
    reference = internlm2_logits(weights, config, weights["model.tok_embeddings.weight"][ids])
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "rotary, tokens",
    [
        ({"base": 10000, "type": "origin"}, 100),
        ({"base": 10000, "type": "dynamic"}, 100),
        ({"base": 500, "type": "dynamic", "scaling_factor": 2.0}, 100),
        (None, 20),
    ],
)
def test_internlm_v1_gives_the_logits_of_its_own_layout(
    rotary: dict[str, Any] | None, tokens: int, clip: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    config = internlm_v1_config() | ({"rotary": rotary} if rotary else {})
    weights = random_weights(internlm_v1_shapes(config))
    ids = torch.arange(tokens).mul(7).remainder(config["vocab_size"]).tolist()
    ours = our_logits(clip, checkpoint(tmp_path, config, weights, sentencepiece_model), ids)
    reference = internlm_v1_logits(weights, {"rotary": {"base": 10000}, **config}, ids)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


def test_the_fast_tokenizer_gives_sentencepieces_ids(sentencepiece_model: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = internlm_tokenizer(sentencepiece_model.parent)
    for text in TEXTS:
        assert tokenizer(text).input_ids == [original.bos_id(), *original.encode(text)], text
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) == original.get_piece_size()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == original.eos_id()


def test_markers_are_left_out_of_decoded_answers_and_rare_letters_are_not(sentencepiece_model: Path) -> None:
    tokenizer = internlm_tokenizer(sentencepiece_model.parent)
    ids = tokenizer("<s>hello——you[UNUSED_TOKEN_145]</s>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello——you"


def test_a_chat_model_names_unused_tokens(sentencepiece_model: Path, tmp_path: Path) -> None:
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    position = original.piece_to_id("[UNUSED_TOKEN_146]")
    shutil.copy(sentencepiece_model, tmp_path)
    names = {"added_tokens_decoder": {str(position): {"content": "<|im_start|>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = internlm_tokenizer(tmp_path)
    assert tokenizer("<|im_start|>user", add_special_tokens=False).input_ids == [position, *original.encode("user")]
    assert len(tokenizer) == original.get_piece_size()


def test_the_tokenizer_survives_saving_and_renders_conversations(sentencepiece_model: Path, tmp_path: Path) -> None:
    tokenizer = internlm_tokenizer(sentencepiece_model.parent)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    restored = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("human", "hello  you 😀"), ("gpt", "two people")]
    rendered = [render_conversation(t, CHAT_FORMATS["collavo_release"], turns, 4, "") for t in (tokenizer, restored)]
    assert rendered[0] == rendered[1]
    assert rendered[0].input_ids[0] == tokenizer.bos_token_id
    answer = [i for i, s in zip(rendered[0].input_ids, rendered[0].supervised, strict=True) if s]
    assert tokenizer.decode(answer) == "two people[UNUSED_TOKEN_145]"


def test_a_tokenizer_with_other_rules_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("hello world\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=12, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"not InternLM's, which has BPE, byte fallback, .*no dummy prefix"):
        internlm_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "spoil, problem",
    [
        (lambda f, c, w: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
        (lambda f, c, w: (f / "tokenizer.model").write_bytes(b"\xff\xff"), "no sentencepiece model"),
        (lambda f, c, w: c.pop("rms_norm_eps"), "no entry 'rms_norm_eps' in config.json"),
        (lambda f, c, w: c.update(rope_scaling={"type": "yarn", "factor": 4.0}), "rotary embeddings of type 'yarn'"),
        (lambda f, c, w: c.update(num_key_value_heads=4), "wqkv.weight has shape .* 4 heads of 16 in 4 groups"),
        (lambda f, c, w: w.pop("model.layers.1.attention.wo.weight"), "missing: .*layers.1.self_attn.o_proj.weight"),
        (lambda f, c, w: w.update({"model.layers.0.extra.weight": torch.zeros(1)}), "of unknown name: .*extra.weight"),
    ],
)
def test_a_faulty_checkpoint_is_refused_in_one_line(
    spoil: Any, problem: str, clip: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    config = internlm2_config()
    weights = random_weights(internlm2_shapes(config))
    checkpoint(tmp_path, config, weights, sentencepiece_model)
    spoil(tmp_path, config, weights)
    save_checkpoint(tmp_path, config, weights)
    with pytest.raises(UserError, match=problem) as refusal:
        assemble_from_parts(clip, tmp_path, image_size=28)
    assert str(refusal.value).startswith(f"language {tmp_path}: ")
    assert "\n" not in str(refusal.value)
