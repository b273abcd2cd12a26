"""What a run is said to hold on its GPU, against what layers save and weights take."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_model import tiny_config

from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import add_adapters, quantize_language_model
from collavo.training.arguments import PRESETS, TrainArguments
from collavo.training.display import memory_table
from collavo.training.memory import LongestBatch, Shape, check_memory, estimate
from collavo.training.stages import ALIGN, CPT, CRAYON_PROMPT, PROJECTOR, StagedModel, cit_stage

ADAPTERS = ("image_cit", "vl_cit")
LLAVA_7B = Shape(4096, 11008, 32, 4096, 32064, 303_000_000, 21_000_000, 1024)
INTERNLM2_7B = Shape(4096, 14336, 32, 1024, 92544, 303_000_000, 21_000_000, 1024)
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
    sequence_ids = (torch.arange(tokens) >= cells)[None].long()  # packed, for which keys and values are repeated
    side = config.vision_config.image_size
    ids = {name: torch.ones(1, *config.grid_hw, dtype=torch.int64) for name in ("semantic_ids", "numbering_ids")}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=input_ids, labels=labels, pixel_values=torch.randn(1, 3, side, side).bfloat16(), **ids,
            sequence_ids=sequence_ids, supervised_only=True, use_cache=False)  # fmt: skip
    layer.forward = forward
    return sum(storages.values())


@pytest.mark.slow  # a layer of 7B quantised on a CPU
@pytest.mark.parametrize(("feed_forward", "key_value_heads"), [(11008, 32), (14336, 8)], ids=["Llama", "InternLM2"])
def test_the_count_of_a_layer_is_what_a_layer_of_real_width_saves(feed_forward: int, key_value_heads: int):
    text = {"hidden_size": 4096, "intermediate_size": feed_forward, "num_hidden_layers": 1, "num_attention_heads": 32,
        "num_key_value_heads": key_value_heads}  # fmt: skip
    config = tiny_config(text=text, crayon_width=1024)
    model = CollavoForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    quantize_language_model(model, torch.bfloat16, torch.device("cpu"))
    staged = StagedModel(add_adapters(model, ADAPTERS, 64, 64).train(), ADAPTERS)
    for parameter in staged.parameters_of((PROJECTOR, CRAYON_PROMPT, *ADAPTERS)).values():
        parameter.data = parameter.data.float()
    model.enable_input_require_grads()  # as a layer finds it that has others before it
    short, long = 64, 320
    for stage, rank in ((ALIGN, 0), (CPT, 0), (cit_stage("image_cit", ADAPTERS), 64)):
        staged.enter(stage)
        measured = (saved_bytes(staged.model, long) - saved_bytes(staged.model, short)) / (long - short)
        assert Shape.of(config).saved_per_token(rank) == pytest.approx(measured, rel=0.02)


def longest_batches(arguments: TrainArguments) -> dict[str, LongestBatch]:
    """The longest that every phase may have."""
    return dict.fromkeys(("align", "cpt", "cit"), LongestBatch(arguments.micro_batch_size, arguments.max_length, 500))


@pytest.mark.parametrize(("preset", "shape"), [("collavo-7b", LLAVA_7B), ("collavo-internlm2-7b", INTERNLM2_7B)])
@pytest.mark.parametrize(("gigabytes", "changes"), [(80, {}), (24, {"gradient_checkpointing": True})])
def test_the_longest_sequences_of_the_7b_presets_fit_with_a_tenth_to_spare(
    preset: str, shape: Shape, gigabytes: int, changes: dict[str, Any]
):
    arguments = TrainArguments(data=("x",), **{**PRESETS[preset].arguments, **changes})
    check_memory(shape, arguments, 2, longest_batches(arguments), int(0.9 * gigabytes * GB))


def test_what_does_not_fit_is_refused_with_flags_that_make_it_fit():
    arguments = TrainArguments(data=("x",))
    batches = longest_batches(arguments)
    with pytest.raises(UserError, match=r"of cit, 8 x 4,096 tokens.* has 72\.0 GB; it fits with --micro_batch_size 2;"):
        check_memory(LLAVA_7B, arguments, 2, batches, int(72 * GB))
    with pytest.raises(UserError, match=r"it fits with --micro_batch_size \d --gradient_checkpointing;"):
        check_memory(LLAVA_7B, arguments, 2, batches, int(21 * GB))
    with pytest.raises(UserError, match="nothing but a smaller --max_length"):
        check_memory(LLAVA_7B, arguments, 2, batches, int(8 * GB))
    # What would not fit where an adapter learns does where none is active.
    check_memory(LLAVA_7B, replace(arguments, micro_batch_size=3), 2, {"cpt": batches["cpt"]}, int(72 * GB))


def test_the_table_holds_each_phase_against_the_gpu(capsys: pytest.CaptureFixture[str]):
    arguments = TrainArguments(data=("x",), **PRESETS["collavo-7b"].arguments)
    longest = {"align": LongestBatch(2, 1300, 60), "cpt": LongestBatch(2, 1672, 400), "cit": LongestBatch(2, 4096, 500)}
    needs = check_memory(LLAVA_7B, arguments, 2, longest, int(80 * GB))
    Console(width=80).print(memory_table(needs, longest, int(80 * GB)), highlight=False)
    assert (
        capsys.readouterr().out
        == """\
GPU memory, reckoned             align        cpt        cit
tokens of the longest batch  2 x 1,300  2 x 1,672  2 x 4,096
weights                         4.6 GB     4.6 GB     4.6 GB
adapters and queries            1.4 GB     1.4 GB     2.1 GB
gradients and optimizer       336.0 MB   405.2 MB     4.2 GB
activations                    11.3 GB    14.5 GB    54.5 GB
logits                         61.6 MB   410.4 MB   513.0 MB
reserve                         2.2 GB     2.4 GB     4.1 GB
together                       19.9 GB    23.7 GB    70.1 GB
of 80.0 GB free on the GPU        25 %       30 %       88 %
"""
    )


def test_weights_are_counted_as_the_model_has_them():
    config = tiny_config()
    shape, model = Shape.of(config), CollavoForConditionalGeneration(config)
    linear = [m for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linear == sum(m.weight.numel() for m in linear)
    adapted = add_adapters(model, ADAPTERS, 4, 4)
    assert shape.adapter(4) == sum(p.numel() for name, p in adapted.named_parameters() if ".vl_cit." in name)
    arguments = replace(TrainArguments(data=("x",)), quantize=False)
    parts = estimate(shape, arguments, 2, "cit", LongestBatch(0, 0, 0))
    base = [(name, p) for name, p in model.named_parameters() if "lora" not in name and "crayon" not in name]
    whole = sum(p.numel() * (6 if "projector" in name else 2) for name, p in base)
    assert parts["weights"] == pytest.approx(whole, rel=0.15)  # biases, norms and positions are left out
