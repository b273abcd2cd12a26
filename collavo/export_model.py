"""Export a trained model: `python -m collavo.export_model --model runs/collavo --output models/mine --as merged`.

Reads:    a run directory and the base it was trained on
Writes:   a whole model without adapters, or a run directory with one adapter; and export.json
Checks:   that the export answers with the logits of the run, before it takes its place
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from collavo.cli import Parser
from collavo.device import resolve_device
from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor
from collavo.runs import CRAYON, EXPORT, TRAIN_ARGS, load_run, read_train_args, save_run
from schemas.categories import MAX_NUMBERING, SEMANTIC_INDICES

_DESCRIPTION = """\
Turn a run directory into something simpler.

  merged   a whole model: the adapters added to the unquantised base in --dtype,
           each sum in float32, rounded once; without peft,
           CollavoForConditionalGeneration.from_pretrained(DIR) loads it
  adapter  a run directory with one adapter in place of two, its rank the sum of
           theirs; plain peft loads it

What was trained on an NF4 base is merged into the base before quantisation,
which is not the same model: its logits differ by what quantisation does, and
that difference is told."""

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of logits allowed, as a share of the largest logit: sums in another order, in this precision."""

_ONE_ADAPTER = "cit"  # as the one of a run with --adapters single is called
_TOKENS_COMPARED = 16


class Difference(NamedTuple):
    """How far two models' logits are apart on the same inputs, and the largest of the logits, for scale."""

    largest: float
    of: float

    def __str__(self) -> str:
        return f"by {self.largest:.2g} at most, where the largest is {self.of:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, 1 for an export that turned out wrong, 2 for what it was given."""
    flags = _build_parser().parse_args(argv)
    partial = flags.output.with_name(f".{flags.output.name}.partial")
    try:
        device = resolve_device(flags.device)
        args = read_train_args(flags.model)
        _check(flags, args)
        shutil.rmtree(partial, ignore_errors=True)
        dtype = _dtype(flags, device)
        export = _export_merged if flags.form == "merged" else _export_adapter
        differences = export(flags.model, partial, device, dtype, args)
    except UserError as error:
        print(f"collavo.export_model: error: {error}", file=sys.stderr)
        return 2
    for compared, difference in differences.items():
        print(f"Logits of {compared}: differ {difference}")
    difference, tolerance = next(iter(differences.values())), TOLERANCES[dtype]
    if not difference.largest <= tolerance * difference.of:
        shutil.rmtree(partial)
        print(f"collavo.export_model: refused: more than {tolerance:g} of the largest logit", file=sys.stderr)
        return 1
    facts = {
        "run": str(flags.model),
        "base": args["base"],
        "form": flags.form,
        "dtype": str(dtype).removeprefix("torch."),
        "object_list": args["object_list"],
        "logits": {compared: difference._asdict() for compared, difference in differences.items()},
        "versions": {name: version(name) for name in ("collavo", "torch", "transformers", "peft")},
    }
    (partial / EXPORT).write_text(json.dumps(facts, indent=2) + "\n")
    if flags.output.exists():
        flags.output.rmdir()
    partial.rename(flags.output)
    print(f"Exported: {flags.output}")
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m collavo.export_model",
        usage="python -m collavo.export_model --model RUN --output DIR --as FORM [options]",
        description=_DESCRIPTION,
    )
    add = parser.add_argument
    add("--model", metavar="RUN", type=Path, required=True, help="a run directory")
    add("--output", metavar="DIR", type=Path, required=True, help="where the export goes; a new or empty folder")
    add("--as", metavar="FORM", dest="form", choices=("merged", "adapter"), required=True, help="merged or adapter")
    add("--dtype", choices=("bfloat16", "float32"), help="of merged weights (default: bfloat16)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def _check(flags: argparse.Namespace, args: dict[str, Any]) -> None:
    if flags.output.exists() and (not flags.output.is_dir() or any(flags.output.iterdir())):
        raise UserError(f"--output {flags.output} is there already; name a new or empty folder")
    if flags.form == "adapter" and not args["adapter_names"]:
        raise UserError(f"--as adapter: {flags.model} has no adapters; use --as merged")
    if flags.form == "adapter" and flags.dtype:
        raise UserError("--dtype concerns merged weights; leave it out, or use --as merged")


def _dtype(flags: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Of the export where it is merged; of the computation in which an adapter is checked, else."""
    if flags.form == "merged":
        return torch.float32 if flags.dtype == "float32" else torch.bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _export_merged(
    run: Path, folder: Path, device: torch.device, dtype: torch.dtype, args: dict[str, Any]
) -> dict[str, Difference]:
    """Write a whole model. The first difference is that to the run on the same base, the second that to NF4."""
    model, processor = load_run(run, device, dtype, quantize=False)
    wanted = _logits(model, processor)
    merge_adapters(model).save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    del model
    merged = CollavoForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    found = _logits(merged.to(device), processor)  # type: ignore[arg-type]
    differences = {"the merged model and the run on the unquantised base": _difference(found, wanted)}
    del merged
    if args["quantize"]:
        quantized = _logits(load_run(run, device, dtype, quantize=True)[0], processor)
        differences["the merged model and the run on NF4, as it was trained"] = _difference(found, quantized)
    return differences


def _export_adapter(
    run: Path, folder: Path, device: torch.device, dtype: torch.dtype, args: dict[str, Any]
) -> dict[str, Difference]:
    """Write a run directory with one adapter."""
    model, processor = load_run(run, device, dtype)
    assert isinstance(model, PeftModel)  # for it has adapters
    wanted = _logits(model, processor)
    tuner: Any = model.base_model
    # Of all ways to combine adapters, this one has no cross terms: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
    tuner.add_weighted_adapter(
        args["adapter_names"], [1.0] * len(args["adapter_names"]), _ONE_ADAPTER, combination_type="cat"
    )
    folder.mkdir(parents=True)
    save_run(folder, model, [_ONE_ADAPTER], processor)
    shutil.copyfile(run / CRAYON, folder / CRAYON)  # as it was trained, in full precision
    (folder / TRAIN_ARGS).write_text(json.dumps({**args, "adapter_names": [_ONE_ADAPTER]}, indent=2) + "\n")
    del model, tuner
    found = _logits(load_run(folder, device, dtype)[0], processor)
    return {"the one adapter and the run": _difference(found, wanted)}


@torch.no_grad()
def merge_adapters(model: PeftModel | CollavoForConditionalGeneration) -> CollavoForConditionalGeneration:
    """Add all adapters to the weights beneath them, in place, each sum in float32 and rounded once; the model without
    adapters."""
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
    """Logits of the last tokens of two prompts, float32 on the CPU: random images under random crayon maps."""
    chance = torch.Generator().manual_seed(0)
    side, (rows, columns) = processor.image_processor.size["height"], processor.grid_hw
    prompt = processor.render([("human", "Describe the image in detail.")], objects="").input_ids
    inputs = {
        "input_ids": torch.tensor([prompt] * 2),
        "attention_mask": torch.ones(2, len(prompt), dtype=torch.int64),
        "pixel_values": torch.randn(2, 3, side, side, generator=chance),
        "semantic_ids": torch.randint(SEMANTIC_INDICES, (2, rows, columns), generator=chance),
        "numbering_ids": torch.randint(MAX_NUMBERING + 1, (2, rows, columns), generator=chance),
    }
    # Not in evaluation mode, which differs in nothing else: there bitsandbytes rounds what a CPU computes from NF4.
    outputs = model.train()(**{k: v.to(model.device) for k, v in inputs.items()}, logits_to_keep=_TOKENS_COMPARED)
    logits: torch.Tensor = outputs.logits.float().cpu()
    return logits


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    return Difference(float((found - wanted).abs().max()), float(wanted.abs().max()))


if __name__ == "__main__":
    raise SystemExit(main())
