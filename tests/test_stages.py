"""Which weights move in which stage, under NF4 and with gradient checkpointing."""

import bitsandbytes
import pytest
import torch
from peft.tuners.lora import LoraLayer
from test_packing import QUESTIONS, example
from tiny_model import tiny_config, tiny_model

from collavo.model.adapters import IMAGE_ADAPTER, LINEAR_LAYERS, add_adapters, quantize_language_model
from collavo.training.batches import MicroBatch, collate
from collavo.training.stages import ALIGN, CPT, CRAYON_PROMPT, PROJECTOR, Stage, StagedModel, StageError, cit_stage

ADAPTERS = ("image_cit", "vl_cit")
IMAGE_CIT, VL_CIT = (cit_stage(adapter, ADAPTERS) for adapter in ADAPTERS)


def staged_model(quantized: bool = True, checkpointing: bool = False) -> StagedModel:
    model = tiny_model(tiny_config({"hidden_size": 128, "intermediate_size": 256}))
    if quantized:
        quantize_language_model(model, torch.float32, torch.device("cpu"))
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(1)
    return StagedModel(add_adapters(model, ADAPTERS, rank=4, alpha=4).train(), ADAPTERS)


def batch(seed: int = 0) -> MicroBatch:
    return collate([example(QUESTIONS, seed), example(QUESTIONS[:2], seed + 1)], pad_token_id=2)


def snapshot(staged: StagedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in staged.model.state_dict().items()}


def moved(staged: StagedModel, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in snapshot(staged).items() if not torch.equal(tensor, before[name])}


def take_steps(staged: StagedModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for seed in range(steps):
        staged.model(**batch(seed).inputs, supervised_only=True).loss.backward()
        staged.check_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("quantized", "checkpointing"), [(True, True), (False, False)])
def test_each_stage_moves_its_own_weights_and_leaves_the_rest_bit_for_bit(quantized: bool, checkpointing: bool) -> None:
    staged = staged_model(quantized, checkpointing)
    optimizer = torch.optim.AdamW(staged.parameters_of((PROJECTOR, CRAYON_PROMPT, *ADAPTERS)).values(), lr=1e-2)
    for stage, expected in (
        (IMAGE_CIT, ("crayon_prompt", ".image_cit.")),
        (VL_CIT, ("crayon_prompt", ".vl_cit.")),
        (CPT, ("crayon_prompt",)),
        (ALIGN, ("multi_modal_projector",)),
        (IMAGE_CIT, ("crayon_prompt", ".image_cit.")),  # after a stage in which it had to rest
    ):
        before = snapshot(staged)
        staged.enter(stage)
        take_steps(staged, optimizer, 2)  # of a new adapter, A gets its first gradient when B has left zero
        learning = {name for name in before if any(part in name for part in expected)}
        assert moved(staged, before) == learning


def test_both_adapters_are_active_while_one_learns_and_none_in_crayon_prompt_tuning() -> None:
    staged = staged_model()
    inputs = batch().inputs
    for adapter in ADAPTERS:
        for name, parameter in staged.parameters_of((adapter,)).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)

    def logits(stage: Stage) -> torch.Tensor:
        staged.enter(stage)
        with torch.no_grad():
            return staged.model(**inputs).logits

    both = logits(IMAGE_CIT)
    assert torch.equal(both, logits(VL_CIT))
    assert not torch.allclose(both, logits(CPT))
    for adapter in ADAPTERS:
        assert not torch.allclose(both, logits(Stage("alone", (adapter,), (adapter,))))


def test_a_model_that_does_not_follow_its_stage_is_found_out() -> None:
    staged = staged_model()
    staged.enter(IMAGE_CIT)
    frozen = next(p for name, p in staged.parameters_of(("vl_cit",)).items() if "vl_cit" in name)
    frozen.requires_grad_(True)
    with pytest.raises(StageError, match=r"1 weights, such as .*vl_cit"):
        staged.check()
    frozen.requires_grad_(False)
    staged.model.base_model.set_adapter("image_cit")
    with pytest.raises(StageError, match="active"):
        staged.check()


def test_a_stage_does_not_change_in_the_middle_of_a_step() -> None:
    staged = staged_model()
    staged.enter(IMAGE_CIT)
    staged.model(**batch().inputs, supervised_only=True).loss.backward()
    with pytest.raises(StageError, match="entered while gradients of stage image_cit wait"):
        staged.enter(VL_CIT)
    staged.model.zero_grad(set_to_none=True)
    staged.enter(VL_CIT)


@pytest.mark.parametrize("group", ["crayon_prompt", "image_cit"])
def test_gradients_that_are_missing_or_all_zero_are_found_out(group: str) -> None:
    staged = staged_model()
    staged.enter(IMAGE_CIT)
    staged.model(**batch().inputs, supervised_only=True).loss.backward()
    staged.check_gradients()
    of_group = {name: parameter for name, parameter in staged.learning.items() if group in name}
    for parameter in of_group.values():
        parameter.grad.zero_()  # as reentrant checkpointing leaves them
    with pytest.raises(StageError, match=rf"{group}.* got gradients of zero"):
        staged.check_gradients()
    name, parameter = next(iter(of_group.items()))
    parameter.grad = None
    with pytest.raises(StageError, match=f"{name} got no gradient"):
        staged.check_gradients()


def gradients_of(staged: StagedModel) -> dict[str, torch.Tensor]:
    staged.model.zero_grad(set_to_none=True)
    staged.model(**batch().inputs, supervised_only=True).loss.backward()
    return {name: p.grad.clone() for name, p in staged.learning.items() if p.grad is not None}


def test_gradients_under_nf4_are_the_same_with_and_without_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        staged = staged_model(checkpointing=checkpointing)
        staged.enter(VL_CIT)
        found.append(gradients_of(staged))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_nf4_and_adapters_touch_the_linear_layers_of_the_language_model_and_nothing_else() -> None:
    model = tiny_model()
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    expected = {name for name in linear if LINEAR_LAYERS.fullmatch(name)}
    assert len(expected) == 2 * 7
    quantize_language_model(model, torch.float32, torch.device("cpu"))
    quantized = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert quantized == expected
    adapted = add_adapters(model, [IMAGE_ADAPTER], rank=4, alpha=4).get_base_model()
    assert {name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)} == expected
