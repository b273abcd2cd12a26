"""CoLLaVO: crayon maps, crayon instructions, the model, its training and its evaluation; the paper is arXiv 2402.11248.

What a program needs is importable from here:

    from pathlib import Path

    import torch
    from collavo import CollavoForConditionalGeneration, find_files, load_answerer, load_run, read_rows

    for row in read_rows(find_files(["out"]), split="validation"):     # the rows of a data set
        print(row.image_id, [instruction.question for instruction in row.instructions])

    answerer = load_answerer("runs/collavo", torch.device("cpu"))       # a model, to be asked about pictures
    model, processor = load_run(Path("runs/collavo"), torch.device("cuda"), torch.bfloat16)    # to work with
    model = CollavoForConditionalGeneration.from_pretrained("models/merged")                   # after an export

Importing the package loads neither torch nor transformers. A name is imported from its module when it is first used.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collavo.dataset import find_files as find_files
    from collavo.dataset import read_rows as read_rows
    from collavo.errors import Rejected as Rejected
    from collavo.errors import UserError as UserError
    from collavo.images import decode_rgb as decode_rgb
    from collavo.inference import load_answerer as load_answerer
    from collavo.instructions.write import write_instructions as write_instructions
    from collavo.model import CollavoConfig as CollavoConfig
    from collavo.model import CollavoForConditionalGeneration as CollavoForConditionalGeneration
    from collavo.model.processing import CollavoProcessor as CollavoProcessor
    from collavo.panoptic.maps import PanopticMap as PanopticMap
    from collavo.panoptic.maps import build_panoptic_map as build_panoptic_map
    from collavo.runs import load_run as load_run
    from collavo.segmenters import load_segmenter as load_segmenter

__version__ = "0.1.0"

_MODULES = {
    "dataset": ("find_files", "read_rows"),
    "errors": ("Rejected", "UserError"),
    "images": ("decode_rgb",),
    "inference": ("load_answerer",),
    "instructions.write": ("write_instructions",),
    "model": ("CollavoConfig", "CollavoForConditionalGeneration"),
    "model.processing": ("CollavoProcessor",),
    "panoptic.maps": ("PanopticMap", "build_panoptic_map"),
    "runs": ("load_run",),
    "segmenters": ("load_segmenter",),
}

__all__ = sorted(name for names in _MODULES.values() for name in names)

# On some CPUs, importing bitsandbytes logs the advice to install kernels that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"collavo.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
