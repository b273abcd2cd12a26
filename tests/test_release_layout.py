"""CoLLaVO-7B's layout as a mode of the model, against plain torch; and that the mode does all the model does."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import sentencepiece
import torch
from internlm_reference import Weights, random_weights, release_logits, release_shapes, save_checkpoint
from torch import nn

from collavo.errors import UserError
from collavo.import_base.release import load_release
from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.model.adapters import quantize_language_model
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import IMAGE_TOKEN

GRID, PATCH, RANK, WIDTH = 3, 14, 8, 128
CONFIG = {
    "model_type": "internlm",
    "architectures": ["CoLLaVOModel"],
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bias": False,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(release_shapes(CONFIG, RANK, WIDTH, GRID, PATCH))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    folder = save_checkpoint(tmp_path_factory.mktemp("release"), CONFIG, weights)
    (folder / "corpus.txt").write_text("a user asks, an assistant helps after fully understanding an image\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"4": {"content": "renamed"}}}))
    return folder


@pytest.fixture(scope="module")
def loaded(release: Path) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    return load_release(release, image_size=GRID * PATCH, dtype=torch.float32)


@pytest.fixture
def model(loaded: tuple[CollavoForConditionalGeneration, CollavoProcessor]) -> CollavoForConditionalGeneration:
    return copy.deepcopy(loaded[0])


@pytest.fixture(scope="module")
def samples(loaded: tuple[CollavoForConditionalGeneration, CollavoProcessor]) -> list[dict[str, Any]]:
    """Two questions of different length about different images, one image token each."""
    tokenizer = loaded[1].tokenizer
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "ids": [1, *tokenizer(before, add_special_tokens=False).input_ids, image, *tokenizer(after).input_ids[1:]],
            "image_token": image,
            "pixels": torch.randn(3, GRID * PATCH, GRID * PATCH, generator=generator),
            "semantic": torch.randint(0, 134, (GRID, GRID), generator=generator),
            "numbering": torch.randint(0, 21, (GRID, GRID), generator=generator),
        }
        for before, after in (("helps after. ", " [UNUSED_TOKEN_146]user\nasks"), ("a ", " user asks a user, an image"))
    ]


def inputs(samples: list[dict[str, Any]], pad_id: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch."""
    rows = []
    for sample in samples:
        at = sample["ids"].index(sample["image_token"])
        rows.append(sample["ids"][:at] + [sample["image_token"]] * GRID**2 + sample["ids"][at + 1 :])
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad_id] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.stack([sample["pixels"] for sample in samples]),
        "semantic_ids": torch.stack([sample["semantic"] for sample in samples]),
        "numbering_ids": torch.stack([sample["numbering"] for sample in samples]),
    }


def logits(model: Any, samples: list[dict[str, Any]]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs(samples)).logits


def test_the_release_gives_the_logits_of_its_own_layout(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]], weights: Weights
) -> None:
    for sample in samples:
        reference = release_logits(weights, CONFIG, **sample)
        ours = logits(model, [sample])[0, :, : CONFIG["vocab_size"]]
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objects", ["(#1 user) [0.10, 0.20, 0.30, 0.40]", ""])
def test_prompts_have_the_tokens_of_the_releases_own_code(
    release: Path, loaded: tuple[CollavoForConditionalGeneration, CollavoProcessor], objects: str
) -> None:
    """`make_system_prompt` and `make_and_add_prompt_and_im_mask` compose them; `<image>` is cut out."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(release / "tokenizer.model"))
    listed = f"The image includes {objects}." if objects else "None of detailed object information for image."
    before = "AI assistant should give helpful and detailed answers to user after fully understanding an image. "
    after = f" [UNUSED_TOKEN_146]user\n{listed} who asks?[UNUSED_TOKEN_145]\n[UNUSED_TOKEN_146]assistant\n"
    image = [loaded[1].image_token_id] * GRID**2
    expected = [model.bos_id(), *model.encode(before), *image, *model.encode(after)]
    assert loaded[1].render([("human", "who asks?")], objects).input_ids == expected


def test_a_left_padded_batch_gives_what_each_gives_alone(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    together = logits(model, samples)
    for row, sample in enumerate(samples):
        alone = logits(model, [sample])[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=0, atol=1e-4)


def test_greedy_decoding_with_a_cache_gives_the_tokens_of_the_reference(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]], weights: Weights
) -> None:
    model.generation_config.eos_token_id = None
    generated = model.generate(**inputs(samples), max_new_tokens=5, do_sample=False)[:, -5:]
    for row, sample in enumerate(samples):
        ids = list(sample["ids"])
        for _ in range(5):
            ids.append(int(release_logits(weights, CONFIG, **{**sample, "ids": ids})[-1].argmax()))
        assert generated[row].tolist() == ids[-5:]


def test_beams_are_those_of_generation_without_a_cache(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
    cached = model.generate(**inputs(samples), **options)
    assert torch.equal(cached, model.generate(**inputs(samples), use_cache=False, **options))


def test_every_branch_and_query_matters_at_image_tokens_and_nowhere_before_them(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    sample = samples[0]
    before = sample["ids"].index(sample["image_token"])
    usual = logits(model, [sample])[0]
    parts = {name: part for name, part in model.model.crayon_prompt.named_children() if list(part.parameters())}
    for layer in model.model.low_rank_branches:
        parts |= {f"image {name}": branch for name, branch in layer.image.items()}
        parts |= {f"crayon {name}": branch for name, branch in layer.crayon.items()}
    for name, part in parts.items():
        parameter = next(part.parameters())
        kept = parameter.detach().clone()
        parameter.data.mul_(1.5)
        changed = logits(model, [sample])[0]
        parameter.data.copy_(kept)
        assert torch.equal(changed[:before], usual[:before]), name
        assert not torch.allclose(changed[before:], usual[before:], rtol=0, atol=1e-4), name


def test_text_alone_passes_by_the_branches(model: CollavoForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, 9, 300]])
    with torch.inference_mode():
        usual = model(input_ids=ids).logits
        for parameter in model.model.low_rank_branches.parameters():
            parameter.fill_(torch.nan)
        assert torch.equal(model(input_ids=ids).logits, usual)


def test_gradient_checkpointing_gives_the_same_gradients(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    batch, text = inputs(samples), {"input_ids": torch.tensor([[1, 5, 9, 300]])}
    usual = model(**text).logits
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name, _ in model.model.named_parameters():
        if "low_rank_branches" in name or "crayon_prompt" in name:
            assert plain[f"model.{name}"].abs().sum() > 0, name
    assert torch.equal(model.eval()(**text).logits, usual)  # recomputation, which stops halfway, left nothing behind
    assert all(branch._signal is None and not branch._handles for branch in model.model.low_rank_branches)


def test_adapters_on_the_linear_layers_leave_the_branches_in_place(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    usual = logits(model, samples)
    targets = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\..*_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    torch.testing.assert_close(logits(adapted, samples), usual)  # LoRA starts at zero


def test_quantised_linear_layers_keep_their_branches(
    model: CollavoForConditionalGeneration, samples: list[dict[str, Any]]
) -> None:
    quantize_language_model(model, torch.float32, torch.device("cpu"))
    usual = logits(model, samples)
    for layer in model.model.low_rank_branches:
        for name, branch in [*layer.image.items(), *layer.crayon.items()]:
            kept = branch[1].weight.detach().clone()
            branch[1].weight.data.zero_()
            assert not torch.allclose(logits(model, samples), usual), name
            branch[1].weight.data.copy_(kept)


def test_the_model_survives_saving(
    loaded: tuple[CollavoForConditionalGeneration, CollavoProcessor], samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    restored = CollavoForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(restored, samples), logits(model, samples))
    assert restored.config.crayon_signal == "low_rank_branches"
    tokenizer = CollavoProcessor.from_pretrained(tmp_path).tokenizer
    stop = tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]")
    assert restored.generation_config.eos_token_id == [stop, tokenizer.eos_token_id]


def test_training_from_scratch_in_this_mode_starts_closed_and_can_open() -> None:
    text = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = CollavoConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=63,
        crayon_width=16,
        crayon_signal="low_rank_branches",
        branch_rank=4,
    )
    model = CollavoForConditionalGeneration(config).eval()
    batch = {"input_ids": torch.tensor([[1, 63, 63, 63, 63, 7, 8]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    maps = [torch.randint(0, high, (2, 1, 2, 2)) for high in (134, 21)]
    first, second = (model(**batch, semantic_ids=maps[0][i], numbering_ids=maps[1][i]) for i in range(2))
    assert torch.equal(first.logits, second.logits)
    first.logits.square().mean().backward()
    assert model.model.crayon_prompt.linear_2.weight.grad.abs().sum() > 0
    assert all(layer.image["qkv"][1].weight.grad.abs().sum() > 0 for layer in model.model.low_rank_branches)
    with pytest.raises(ValueError, match="needs semantic_queries, numbering_queries or both"):
        CollavoForConditionalGeneration(
            CollavoConfig(**{**config.to_dict(), "semantic_queries": False, "numbering_queries": False})
        )


@pytest.mark.parametrize(
    "name, problem",
    [
        ("seg_num_embed.weight", "missing: model.crayon_prompt.numbering_queries.weight"),
        ("model.layers.1.attention.wqkv.Plora_seg_B.weight", "missing: model.low_rank_branches.1.crayon.qkv.1.weight"),
        ("vit.vision_tower.vision_model.embeddings.patch_embedding.weight", "not in the layout of CoLLaVO-7B"),
        ("model.layers.0.feed_forward.w2.Plora_main.weight", "missing: .*layers.0.mlp.down_proj.weight"),
    ],
)
def test_an_incomplete_release_is_refused_in_one_line(
    name: str, problem: str, release: Path, weights: Weights, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, CONFIG, {key: tensor for key, tensor in weights.items() if key != name})
    (tmp_path / "tokenizer.model").write_bytes((release / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=problem) as refusal:
        load_release(tmp_path)
    assert str(refusal.value).startswith(f"release {tmp_path}: ") and "\n" not in str(refusal.value)


class Packed(nn.Module):
    """A layer whose weights are stored as bytes, as bitsandbytes stores them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = linear, torch.zeros(1, dtype=torch.uint8)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states)


def test_branches_compute_in_their_own_type_where_the_first_layer_is_stored_in_another(
    loaded: tuple[CollavoForConditionalGeneration, CollavoProcessor], samples: list[dict[str, Any]]
) -> None:
    model = copy.deepcopy(loaded[0])
    for layer in model.model.low_rank_branches:
        for branch in layer.image.values():
            branch[0] = Packed(branch[0])
    assert torch.equal(logits(model, samples), logits(loaded[0], samples))
