"""Export a trained model: `python -m collavo.export_model --model runs/collavo --output models/mine --as merged`.

Reads:    a run directory and the base it was trained on
Writes:   a whole model without adapters, or a run directory with one adapter; and export.json
Checks:   that the export has the logits of the run, before it takes its place
Not here: the arithmetic, see collavo/merge_adapters.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collavo.cli import REQUIRED, flag, naming, output_folder, parse, run
from collavo.errors import UserError

_DESCRIPTION = """\
Turn a run directory into something simpler.

  merged   a whole model: the adapters added to the unquantised base, each sum
           in float32 and rounded once to --dtype;
           CollavoForConditionalGeneration.from_pretrained(DIR) loads it, and
           peft is not needed
  adapter  a run directory with one adapter instead of two, its rank the sum of
           theirs; plain peft loads it

Adapters that were trained on an NF4 base are merged into the base before
quantisation. That is another model: its logits differ from the run's by what
quantisation does to them. With --dequantize they are merged into the NF4
weights that they were trained on, which is nearer to the run and further from
the base. The command prints the difference to the run as it was trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line."""

    model: Path = flag(REQUIRED, "a run directory", kind=Path, metavar="RUN")
    output: Path = flag(REQUIRED, "where the export goes; a new or empty folder", kind=Path, metavar="DIR")
    as_: str = flag(REQUIRED, "merged or adapter", choices=("merged", "adapter"), metavar="FORM")
    dtype: str | None = flag(None, "of merged weights (default: bfloat16)", choices=("bfloat16", "float32"))
    dequantize: bool = flag(False, "merge into the NF4 weights of the training, dequantised")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 1 for an export that has other logits than the run."""
    usage = "python -m collavo.export_model --model RUN --output DIR --as FORM [options]"
    options = {"prog": "python -m collavo.export_model", "usage": usage, "description": _DESCRIPTION}
    return run("collavo.export_model", lambda: _export(parse(Flags, argv, **options)))


def _export(flags: Flags) -> None:
    if flags.output.is_dir() and any(flags.output.iterdir()):
        raise UserError(f"--output {flags.output} is there already; name a new or empty folder")
    from importlib.metadata import version

    import torch

    from collavo.device import resolve_device
    from collavo.merge_adapters import TOLERANCES, export_adapter, export_merged
    from collavo.model_card import write_model_card
    from collavo.runs import EXPORT, base_from, read_train_args

    with naming("device"):
        device = resolve_device(flags.device)
    with naming("model"):
        args = read_train_args(flags.model)
    base = base_from(flags.model, flags.output)
    merged = flags.as_ == "merged"
    if not merged and not args["adapter_names"]:
        raise UserError(f"--as adapter: {flags.model} has no adapters; use --as merged")
    if not merged and flags.dtype:
        raise UserError("--dtype concerns merged weights; leave it out, or use --as merged")
    if flags.dequantize and not (merged and args["quantize"]):
        raise UserError("--dequantize concerns --as merged of a run that was trained on NF4; leave it out")
    # Of the merged weights; for an adapter, of the computation that checks it.
    is_float32 = flags.dtype == "float32" if merged else device.type == "cpu"
    dtype = torch.float32 if is_float32 else torch.bfloat16
    with output_folder(flags.output) as folder:
        with naming("model"):
            if merged:
                differences = export_merged(flags.model, folder, device, dtype, args, flags.dequantize)
            else:
                differences = export_adapter(flags.model, folder, device, dtype, args, base)
        for compared, difference in differences.items():
            print(f"Logits of {compared}: differ {difference}")
        difference, tolerance = next(iter(differences.values())), TOLERANCES[dtype]
        if not difference.largest <= tolerance * difference.of:
            found = f"the logits of the export differ from the run's {difference}"
            raise UserError(f"refused: {found}; at most {tolerance:g} of the largest is allowed", 1)
        facts = {
            "run": flags.model.resolve().name,
            "base": base,
            "form": flags.as_,
            "dtype": str(dtype).removeprefix("torch."),
            "object_list": args["object_list"],
            "logits": {compared: difference._asdict() for compared, difference in differences.items()},
            "versions": {name: version(name) for name in ("collavo", "torch", "transformers", "peft")},
        }
        (folder / EXPORT).write_text(json.dumps(facts, indent=2) + "\n")
        write_model_card(folder, flags.model, flags.as_, base, name=flags.output.resolve().name)
    print(f"Exported: {flags.output}")


if __name__ == "__main__":
    raise SystemExit(main())
