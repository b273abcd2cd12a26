"""What a run is said to hold on its GPU, against what layers save and weights take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_model import tiny_config

from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import add_adapters, quantize_language_model
from collavo.training.arguments import PRESETS, TrainArguments
from collavo.training.memory import Shape, check_memory, estimate
from collavo.training.stages import CRAYON_PROMPT, StagedModel, cit_stage

ADAPTERS = ("image_cit", "vl_cit")
LLAVA_7B = Shape(4096, 11008, 32, 4096, 32064, 303_000_000 + 21_000_000)
INTERNLM2_7B = Shape(4096, 14336, 32, 1024, 92544, 303_000_000 + 21_000_000)
GB = 1e9


def saved_bytes(model: Any, tokens: int) -> int:
    """Bytes of the storages that the only decoder layer saves for its backward pass, weights aside."""
    layer = model.get_base_model().model.language_model.layers[0]
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    forward, kept = layer.forward, []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # a storage that is freed would lend its address to the next one
        return tensor

    def hooked(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return forward(*args, **kwargs)

    layer.forward = hooked
    config = model.get_base_model().config
    cells = config.grid_hw[0] * config.grid_hw[1]
    input_ids = torch.randint(10, 300, (1, tokens))
    input_ids[:, :cells] = config.image_token_id
    labels = torch.where(torch.arange(tokens) < tokens - 8, -100, input_ids)
    side = config.vision_config.image_size
    ids = {name: torch.ones(1, *config.grid_hw, dtype=torch.int64) for name in ("semantic_ids", "numbering_ids")}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=input_ids, labels=labels, pixel_values=torch.randn(1, 3, side, side).bfloat16(), **ids,
            supervised_only=True, use_cache=False)  # fmt: skip
    layer.forward = forward
    return sum(storages.values())


@pytest.mark.slow  # a layer of 7B quantised on a CPU
def test_the_count_of_a_layer_is_what_a_layer_of_real_width_saves():
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": 32}  # fmt: skip
    config = tiny_config(text=text, crayon_width=1024)
    model = CollavoForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    quantize_language_model(model, torch.bfloat16, torch.device("cpu"))
    staged = StagedModel(add_adapters(model, ADAPTERS, 64, 64).train(), ADAPTERS)
    for parameter in staged.parameters_of((CRAYON_PROMPT, *ADAPTERS)).values():
        parameter.data = parameter.data.float()
    staged.enter(cit_stage("image_cit", ADAPTERS))
    model.enable_input_require_grads()  # as a layer finds it that has others before it
    short, long = 64, 320
    measured = (saved_bytes(staged.model, long) - saved_bytes(staged.model, short)) / (long - short)
    assert Shape.of(config).saved_per_token(64) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("preset", "shape"), [("collavo-7b", LLAVA_7B), ("collavo-internlm2-7b", INTERNLM2_7B)])
@pytest.mark.parametrize(("gigabytes", "changes"), [(80, {}), (24, {"gradient_checkpointing": True})])
def test_the_longest_sequences_of_the_7b_presets_fit_with_a_tenth_to_spare(
    preset: str, shape: Shape, gigabytes: int, changes: dict[str, Any]
):
    arguments = TrainArguments(data=("x",), **{**PRESETS[preset].arguments, **changes})
    check_memory(shape, arguments, 2, arguments.max_length, 500, int(0.9 * gigabytes * GB))


def test_what_does_not_fit_is_refused_with_flags_that_make_it_fit():
    arguments = TrainArguments(data=("x",))
    with pytest.raises(UserError, match=r"8 x 4,096 tokens.* has 72\.0 GB; it fits with --micro_batch_size 2;"):
        check_memory(LLAVA_7B, arguments, 2, 4096, 500, int(72 * GB))
    with pytest.raises(UserError, match=r"it fits with --micro_batch_size \d --gradient_checkpointing;"):
        check_memory(LLAVA_7B, arguments, 2, 4096, 500, int(21 * GB))
    with pytest.raises(UserError, match="nothing but a smaller --max_length"):
        check_memory(LLAVA_7B, arguments, 2, 4096, 500, int(8 * GB))


def test_weights_are_counted_as_the_model_has_them():
    config = tiny_config()
    shape, model = Shape.of(config), CollavoForConditionalGeneration(config)
    linear = [m for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linear == sum(m.weight.numel() for m in linear)
    adapted = add_adapters(model, ADAPTERS, 4, 4)
    assert shape.adapter(4) == sum(p.numel() for name, p in adapted.named_parameters() if ".vl_cit." in name)
    parts = estimate(shape, replace(TrainArguments(data=("x",)), quantize=False), 2, 0, 0)
    whole = sum(p.nbytes // 2 for name, p in model.named_parameters() if "lora" not in name and "crayon" not in name)
    assert parts["weights"] == pytest.approx(whole, rel=0.15)  # biases, norms and positions are left out
