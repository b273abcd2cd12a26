"""What the flags of training reach: the optimizer, the weights, the batches and the evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from test_training import metrics
from tiny_model import save_world, tiny_tokenizer
from torch import nn

from collavo import train
from collavo.training.batches import MicroBatch
from collavo.training.loop import Trainer, learning_rate_at

COMMON = (
    "--device cpu --precision fp32 --no-quantize --batch_size 4 --micro_batch_size 4 --lora_rank 2 --max_length 600 "
    "--workers 0 --seed 1"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and data for all tests of this file."""
    return save_world(tmp_path_factory.mktemp("world"), 16)


Train = Callable[..., Path]


@pytest.fixture
def trained(world: Path, tmp_path: Path) -> Train:
    """Runs a training with flags of its own, and returns its directory."""

    def run(*flags: str) -> Path:
        data = ["--data", str(world / "rows.parquet"), "--preset", str(world / "base")]
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        assert train.main([*data, "--output_dir", str(folder), *COMMON.split(), *flags]) == 0
        return folder

    return run


def test_the_rates_of_both_phases_and_a_clipped_gradient_reach_the_optimizer(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, seen = torch.optim.AdamW.step, []

    def noted(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        (group,) = optimizer.param_groups
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        seen.append((group["lr"], float(nn.utils.get_total_norm(gradients)), group["weight_decay"]))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    rates = {"cpt": 2e-3, "cit": 1e-2}
    flags = [f"--{phase}_learning_rate={rate}" for phase, rate in rates.items()]
    run = trained("--max_steps", "3", *flags, "--final_learning_rate", "1e-3", "--max_grad_norm", "0.01")
    expected = [learning_rate_at(number, 3, rate, 1e-3) for rate in rates.values() for number in range(3)]
    assert [rate for rate, _, _ in seen] == pytest.approx(expected)
    before = [line["gradient_norm"] for line in metrics(run) if "loss" in line]
    assert max(before) > 0.01
    assert [norm for _, norm, _ in seen] == pytest.approx([min(norm, 0.01) for norm in before], rel=1e-3)
    assert {decay for _, _, decay in seen} == {0.0}
    seen.clear()
    run = trained("--max_steps", "1", "--max_grad_norm", "0")
    before = [line["gradient_norm"] for line in metrics(run) if "loss" in line]
    assert [norm for _, norm, _ in seen] == pytest.approx(before)  # 0 is for no limit, not for no gradient


def test_adapters_have_the_rank_and_the_alpha_asked_for(trained: Train) -> None:
    run = trained("--max_steps", "1", "--lora_rank", "3", "--lora_alpha", "6")
    for adapter in ("image_cit", "vl_cit"):
        config = json.loads((run / "adapters" / adapter / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (3, 6)
        weights = load_file(run / "adapters" / adapter / "adapter_model.safetensors")
        assert {min(weight.shape) for weight in weights.values()} == {3}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, MicroBatch]]:
    """What a training passes through the model: the model, and the micro-batch."""
    loss, seen = Trainer._loss, list[tuple[Any, MicroBatch]]()

    def noted(trainer: Trainer, piece: MicroBatch, tokens: int) -> torch.Tensor:
        seen.append((trainer._staged.model, piece))
        return loss(trainer, piece, tokens)

    monkeypatch.setattr(Trainer, "_loss", noted)
    return seen


def questions(pieces: list[tuple[Any, MicroBatch]]) -> list[str]:
    """The prompts and answers of all sequences, as text; those of packed ones follow each other."""
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(ids) for _, piece in pieces for ids in piece.inputs["input_ids"]]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_linear_layers_lie_in_nf4_and_compute_in_the_precision_asked_for(
    trained: Train, pieces: list[tuple[Any, MicroBatch]], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    computed, forward = set(), Linear4bit.forward

    def noted(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
        computed.add((layer.compute_dtype, torch.is_autocast_enabled("cpu")))
        out: torch.Tensor = forward(layer, x)
        return out

    monkeypatch.setattr(Linear4bit, "forward", noted)
    trained("--max_steps", "1", "--quantize", "--precision", precision)
    model, _ = pieces[0]
    stored = [module.weight for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(stored) == 14  # seven in each of two layers
    assert {(weight.dtype, weight.quant_type) for weight in stored} == {(torch.uint8, "nf4")}
    assert computed == {{"bf16": (torch.bfloat16, True), "fp32": (torch.float32, False)}[precision]}


def test_tasks_that_are_not_asked_for_are_not_learned(trained: Train, pieces: list[tuple[Any, MicroBatch]]) -> None:
    trained("--phase", "cpt", "--max_steps", "1", "--tasks", "class_to_binary", "--instructions_per_sequence", "1")
    asked = questions(pieces)
    assert asked and all(any(word in text for word in ("Is there", "Does the", "Can you see")) for text in asked)


def test_as_many_instructions_share_a_sequence_as_are_asked_for(
    trained: Train, pieces: list[tuple[Any, MicroBatch]]
) -> None:
    for most in (1, 3):
        pieces.clear()
        trained("--phase", "cpt", "--max_steps", "1", "--instructions_per_sequence", str(most))
        ids = [piece.inputs.get("sequence_ids", torch.zeros(1)) for _, piece in pieces]
        assert max(int(of_piece.max()) for of_piece in ids) == (most if most > 1 else 0)


@pytest.mark.parametrize(
    ("wanted", "kinds"), [("none", set()), ("dialogues", {"dialogue"}), ("all", {"dialogue", "crayon"})]
)
def test_prompts_begin_with_the_objects_where_asked(
    trained: Train, pieces: list[tuple[Any, MicroBatch]], wanted: str, kinds: set[str]
) -> None:
    flags = ("--max_steps", "3", "--crayon_share", "0.5", "--tasks", "class_to_binary", "--max_length", "1000")
    trained(*flags, "--object_list", wanted)
    assert {pair[1].kind for pair in pieces if "(#1" in questions([pair])[0]} == kinds


def test_validation_losses_are_those_of_tokens_and_come_as_often_as_asked(trained: Train) -> None:
    flags = ("--max_steps", "2", "--crayon_share", "0.5", "--eval_steps", "1", "--max_eval_samples", "3")
    runs = [metrics(trained(*flags, "--micro_batch_size", size)) for size in ("1", "4")]
    one, four = ([line for line in run if "validation_crayon_loss" in line] for run in runs)
    assert [line["step"] for line in one] == [1, 2, 3, 4]
    # Means of micro-batches' means would differ: their sequences have from one to dozens of supervised tokens.
    for kind in ("crayon", "dialogue"):
        name = f"validation_{kind}_loss"
        found, expected = ([line[name] for line in lines if name in line] for lines in (one, four))
        assert found == pytest.approx(expected, rel=1e-4)
