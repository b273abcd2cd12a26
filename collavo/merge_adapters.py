"""Turn a run's adapters into none or into one, and measure by how much the logits change."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from collavo.runs import CRAYON, PROJECTOR, TRAIN_ARGS, load_run, save_run
from schemas.categories import MAX_NUMBERING

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""The largest difference of logits that is allowed, as a share of the largest logit: the sums run in another order."""

_OF_THIS_MACHINE = ("preset", "data", "files", "image_root", "output_dir")
"""Arguments of the training that are paths; an export goes elsewhere."""

_ONE_ADAPTER = "cit"  # the name that training gives to a single adapter
_TOKENS_COMPARED = 16


class Difference(NamedTuple):
    """The largest difference between two models' logits on the same inputs, and the largest logit, for scale."""

    largest: float
    of: float

    def __str__(self) -> str:
        return f"by {self.largest:.2g} at most, where the largest is {self.of:.2g}"


def export_merged(
    run: Path, folder: Path, device: torch.device, dtype: torch.dtype, args: dict[str, Any], dequantized: bool = False
) -> dict[str, Difference]:
    """Write a whole model, the adapters merged into its weights.

    Args:
        folder: an empty one.
        args: the run's, see `collavo.runs.read_train_args`.
        dequantized: merge into what NF4 made of the base's weights, and not into these.

    Returns:
        the difference to the run on the same base, unquantised or dequantised; for a run on NF4, second, that to the
        run as trained.
    """
    model, processor = load_run(run, device, dtype, quantize="dequantized" if dequantized else False)
    wanted = _logits(model, processor)
    merge_adapters(model).save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    del model
    merged = CollavoForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    found = _logits(merged.to(device), processor)
    base = "dequantised" if dequantized else "unquantised"
    differences = {f"the merged model and the run on the {base} base": _difference(found, wanted)}
    del merged
    if args["quantize"]:
        quantized = _logits(load_run(run, device, dtype, quantize=True)[0], processor)
        differences["the merged model and the run on NF4, as it was trained"] = _difference(found, quantized)
    return differences


def export_adapter(
    run: Path, folder: Path, device: torch.device, dtype: torch.dtype, args: dict[str, Any], base: str
) -> dict[str, Difference]:
    """Write a run directory with one adapter; arguments as for `export_merged`.

    Args:
        base: how the export names its base, see `collavo.runs.base_from`.

    Returns:
        the difference to the run.
    """
    model, processor = load_run(run, device, dtype)
    assert isinstance(model, PeftModel)  # the run has adapters
    wanted = _logits(model, processor)
    tuner: Any = model.base_model
    # peft's only way to combine adapters without cross terms: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
    tuner.add_weighted_adapter(
        args["adapter_names"], [1.0] * len(args["adapter_names"]), _ONE_ADAPTER, combination_type="cat"
    )
    kept = {name: value for name, value in args.items() if name not in _OF_THIS_MACHINE}
    kept |= {"base": base, "adapter_names": [_ONE_ADAPTER]}
    (folder / TRAIN_ARGS).write_text(json.dumps(kept, indent=2) + "\n")
    save_run(folder, model, [_ONE_ADAPTER], processor)
    for file in (run / name for name in (PROJECTOR, CRAYON) if (run / name).exists()):
        shutil.copyfile(file, folder / file.name)  # as trained, in full precision
    del model, tuner
    found = _logits(load_run(folder, device, dtype)[0], processor)
    return {"the one adapter and the run": _difference(found, wanted)}


@torch.no_grad()
def merge_adapters(model: PeftModel | CollavoForConditionalGeneration) -> CollavoForConditionalGeneration:
    """Add all adapters to the weights beneath them, in place, and return the model without adapters.

    Each weight is summed in float32 and rounded once; peft's own merge would round after every adapter.
    """
    if not isinstance(model, PeftModel):
        return model
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        deltas = [
            layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
            for name in layer.lora_A
        ]
        weight.copy_(weight.float() + sum(deltas))
    tuner: Any = model.base_model
    whole: CollavoForConditionalGeneration = tuner.unload()
    return whole


@torch.no_grad()
def _logits(model: Any, processor: CollavoProcessor) -> torch.Tensor:
    """Compute logits on two random images under random crayon maps: float32 [2, 16, vocabulary], on the CPU."""
    chance = torch.Generator().manual_seed(0)
    side, (rows, columns) = processor.image_processor.size["height"], processor.grid_hw
    prompt = processor.render([("human", "Describe the image in detail.")], objects="").input_ids
    inputs = {
        "input_ids": torch.tensor([prompt] * 2),
        "attention_mask": torch.ones(2, len(prompt), dtype=torch.int64),
        "pixel_values": torch.randn(2, 3, side, side, generator=chance),
        "semantic_ids": torch.randint(processor.categories.semantic_indices, (2, rows, columns), generator=chance),
        "numbering_ids": torch.randint(MAX_NUMBERING + 1, (2, rows, columns), generator=chance),
    }
    # In training mode, since in evaluation mode bitsandbytes rounds what a CPU computes from NF4. Nothing else differs:
    # dropout is off.
    outputs = model.train()(**{k: v.to(model.device) for k, v in inputs.items()}, logits_to_keep=_TOKENS_COMPARED)
    logits: torch.Tensor = outputs.logits.float().cpu()
    return logits


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    return Difference(float((found - wanted).abs().max()), float(wanted.abs().max()))
