"""A run directory as training leaves it, without the training: the tiny base with random queries and adapters."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_model import tiny_model, tiny_processor

from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import add_adapters
from collavo.runs import save_run

ADAPTERS = ("image_cit", "vl_cit")


def talkative_model() -> CollavoForConditionalGeneration:
    """The tiny model with weights large enough that every prompt, image and map has an answer of its own."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.model.crayon_prompt.parameters():
            parameter.normal_(std=0.5)
        for parameter in model.model.language_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def save_tiny_run(folder: Path, adapters: tuple[str, ...] = ADAPTERS, **train_args: Any) -> Path:
    """A run of a talkative base, whose adapters and Crayon Prompt make a difference."""
    base = folder.with_name(f"{folder.name}-base")
    model, processor = talkative_model(), tiny_processor()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    folder.mkdir()
    if adapters:
        adapted = add_adapters(model, adapters, rank=4, alpha=8)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    args = {
        "base": str(base),
        "queries": "both",
        "attention": "sdpa",
        "quantize": False,
        "object_list": "dialogues",
        "adapter_names": list(adapters),
        **train_args,
    }
    (folder / "train_args.json").write_text(json.dumps(args))
    save_run(folder, adapted if adapters else model, adapters, processor)
    return folder
