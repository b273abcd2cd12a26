"""The model card of a run: what it was trained from, on what, how, and how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = """\
---
library_name: peft
base_model: {base}
tags: [collavo, vision-language-model, qlora]
---

# CoLLaVO: {name}

Crayon Prompt and QLoRA adapters on `{base}`, trained with collavo {collavo} on {started}.

| | |
|---|---|
| data | {files} Parquet files (checksums in `train_args.json`) |
| steps | {steps}, of {batch_size} sequences |
| language model | {quantized}, LoRA rank {lora_rank}, alpha {lora_alpha}, adapters {adapters} |
| queries | {queries} |
| learning rates | Crayon Prompt Tuning {cpt_learning_rate:g}, instruction tuning {cit_learning_rate:g}, both to \
{final_learning_rate:g} |
| last validation loss | {validation} |

Every argument is in `train_args.json`, every step in `metrics.jsonl`.

```
python -m collavo.evaluate --model {folder} --data out/*.parquet
python -m collavo.chat --model {folder} --image picture.jpg --prompt "What is on the left?"
```

Crayon data hold other people's images and dialogues; their licences, and the base's, bound what this model may be used
for.
"""


def write_model_card(file: Path, args: Mapping[str, Any], metrics: Path) -> None:
    """Write the card of a finished run.

    Args:
        args: the contents of `train_args.json`.
        metrics: the run's `metrics.jsonl`.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    phases = {line["phase"]: line["step"] for line in lines}
    evaluated = [line for line in lines if any(key.startswith("validation_") for key in line)]
    losses = {key: value for key, value in evaluated[-1].items() if "loss" in key} if evaluated else {}
    facts = {
        **args,
        "name": file.parent.name,
        "folder": file.parent,
        "collavo": args["versions"]["collavo"],
        "files": len(args["files"]),
        "steps": ", ".join(f"{phase} up to {step}" for phase, step in phases.items()),
        "quantized": "NF4, doubly quantised" if args["quantize"] else args["dtype"],
        "adapters": ", ".join(f"`{name}`" for name in args["adapter_names"]) or "none",
        "validation": ", ".join(f"{key[11:-5]} {value:.3f}" for key, value in losses.items()) or "none measured",
    }
    file.write_text(_TEMPLATE.format_map(facts))
