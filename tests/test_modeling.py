"""The model is LLaVA, and the Crayon Prompt comes in where, and only where, it should."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import GRID, tiny_config, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from collavo.model import CollavoForConditionalGeneration

IMAGE = 3
# Not every version of transformers that is allowed knows InternLM3.
LANGUAGE_MODELS = [name for name in ("llama", "qwen2", "qwen3", "mistral", "internlm3") if name in CONFIG_MAPPING]


def inputs(batch: int = 2, text: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 400, (batch, 2 + GRID * GRID + text), generator=generator)
    ids[:, 2 : 2 + GRID * GRID] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 14 * GRID, 14 * GRID, generator=generator),
        "semantic_ids": torch.randint(0, 134, (batch, GRID, GRID), generator=generator),
        "numbering_ids": torch.randint(0, 21, (batch, GRID, GRID), generator=generator),
    }


def as_llava(model: CollavoForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same weights in transformers' own class."""
    known = LlavaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    config = LlavaConfig(**{name: value for name, value in model.config.to_dict().items() if name in known})
    llava = LlavaForConditionalGeneration(config).eval()
    llava.load_state_dict({name: p for name, p in model.state_dict().items() if "crayon_prompt" not in name})
    return llava


def llava_logits(model: CollavoForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        return as_llava(model)(**plain).logits


@pytest.mark.parametrize("changes", [{"semantic_queries": False, "numbering_queries": False}, {}])
def test_without_queries_or_untrained_it_is_llava_logit_for_logit(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(tiny_config(**changes), open_prompt=False), inputs()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, llava_logits(model, batch))


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_the_signal_is_added_to_image_tokens_at_the_input_of_every_attention_module(language_model: str) -> None:
    model, batch = tiny_model(tiny_config({"model_type": language_model})), inputs()
    reference = as_llava(model)
    with torch.no_grad():
        cells = model.model.crayon_prompt(batch["semantic_ids"], batch["numbering_ids"])
        added = torch.zeros(2, batch["input_ids"].shape[1], cells.shape[-1])
        added[batch["input_ids"] == IMAGE] = cells.flatten(0, 1)
        reached = []

        def add(module: Any, args: Any, kwargs: Any) -> Any:
            reached.append(module)
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + added}

        for layer in reference.model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)
        expected = reference(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits
        found = model(**batch).logits
    assert len(reached) == 2
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, llava_logits(model, batch), atol=1e-3)


@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_generation_with_cache_repeats_what_full_forwards_say(language_model: str) -> None:
    model, batch = tiny_model(tiny_config({"model_type": language_model})), inputs()
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = batch["input_ids"]
    for _ in range(6):
        full = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            ids = torch.cat([ids, model(**full, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


def test_beams_see_the_crayon_map_of_their_own_image() -> None:
    model, batch = tiny_model(), inputs()
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    together = model.generate(**batch, **options)
    for row in range(2):
        alone = model.generate(**{name: tensor[row : row + 1] for name, tensor in batch.items()}, **options)
        assert torch.equal(together[row : row + 1], alone)


def test_left_padding_changes_no_answer() -> None:
    model = tiny_model()
    short, long = inputs(1, text=4, seed=2), inputs(1, text=9, seed=3)
    padded = {name: torch.cat([short[name], long[name]]) for name in ("pixel_values", "semantic_ids", "numbering_ids")}
    pad = torch.nn.functional.pad
    padded["input_ids"] = torch.cat([pad(short["input_ids"], (5, 0), value=2), long["input_ids"]])
    padded["attention_mask"] = torch.cat([pad(short["attention_mask"], (5, 0)), long["attention_mask"]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = model.generate(**padded, **options)[:, -5:]
    alone = [model.generate(**batch, **options)[:, -5:] for batch in (short, long)]
    assert torch.equal(together, torch.cat(alone))


def test_a_head_on_supervised_positions_only_gives_the_same_loss_and_gradients() -> None:
    results = []
    for supervised_only in (False, True):
        model, batch = tiny_model(), inputs()
        labels = batch["input_ids"].clone()
        labels[0, :-3] = -100
        labels[1, :-5] = -100
        outputs = model(**batch, labels=labels, supervised_only=supervised_only)
        outputs.loss.backward()
        results.append((outputs, model.model.crayon_prompt.linear_1.weight.grad))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[1][0].logits.shape == (8, 400)


@pytest.mark.parametrize(
    ("changes", "moves_with"),
    [
        ({}, {"semantic_ids", "numbering_ids"}),
        ({"numbering_queries": False}, {"semantic_ids"}),
        ({"semantic_queries": False}, {"numbering_ids"}),
    ],
)
def test_each_family_of_queries_can_be_switched_off(changes: dict[str, Any], moves_with: set[str]) -> None:
    model, batch = tiny_model(tiny_config(**changes)), inputs()
    with torch.no_grad():
        before = model(**batch).logits
        for name in ("semantic_ids", "numbering_ids"):
            after = model(**{**batch, name: (batch[name] + 1) % 20}).logits
            assert torch.equal(before, after) == (name not in moves_with)


def test_it_saves_and_loads_through_the_auto_classes(tmp_path: Path) -> None:
    model, batch = tiny_model(), inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is CollavoForConditionalGeneration
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_images_that_do_not_match_their_crayon_maps_are_refused() -> None:
    batch = inputs()
    with pytest.raises(ValueError, match="do not match, tokens: 72"):
        tiny_model()(**{**batch, **{name: batch[name][:1] for name in ("semantic_ids", "numbering_ids")}})
    with pytest.raises(ValueError, match="do not match, tokens: 72"):
        tiny_model()(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    batch["input_ids"][0, 2] = 5
    with pytest.raises(ValueError, match="do not match, tokens: 71"):
        tiny_model()(**batch)


def test_without_maps_every_cell_is_unknown() -> None:
    model, batch = tiny_model(), inputs()
    unknown = {name: torch.zeros_like(batch[name]) for name in ("semantic_ids", "numbering_ids")}
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(model(**plain).logits, model(**batch | unknown).logits)
        assert not torch.equal(model(**plain).logits, model(**batch).logits)
