"""The model as training needs it: a base, its language model in NF4, with adapters, and precise where it learns."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from collavo.cli import naming
from collavo.errors import UserError
from collavo.model.adapters import add_adapters, quantize_language_model
from collavo.model.configuration import CollavoConfig
from collavo.model.processing import CollavoProcessor
from collavo.model.query_init import begin_with_names
from collavo.runs import CONFIG, load_base, load_crayon_prompt, load_projector
from collavo.training.arguments import TrainArguments
from collavo.training.stages import CRAYON_PROMPT, PROJECTOR, StagedModel
from schemas.categories import CategorySet


def load_trainable(
    arguments: TrainArguments,
    adapters: Sequence[str],
    categories: CategorySet,
    crayon_file: Path,
    projector_file: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[StagedModel, CollavoProcessor]:
    """Load the base and make it ready to learn.

    Args:
        adapters: names of the adapters to add.
        categories: the set of the data's classes.
        crayon_file: queries and connector of a finished cpt, which `--phase cit` begins with.
        projector_file: a trained projector; None for the base's own.
        dtype: of the computation.

    Raises:
        UserError: if base or files cannot be used, or do not fit the arguments.
    """
    # What is not quantised takes half the memory in bfloat16, which matters on a GPU only.
    base_dtype = dtype if device.type == "cuda" else torch.float32
    with naming("preset"):
        model, processor = load_base(
            arguments.base, base_dtype, arguments.queries, arguments.attention, categories, arguments.by_words
        )
    # In bfloat16, with 8 bits of mantissa, a weight would not notice an update of less than 1/256 of itself. What an
    # earlier phase has learned keeps its precision too.
    for name, parameter in model.named_parameters():
        if f".{PROJECTOR}." in name or f".{CRAYON_PROMPT}." in name:
            parameter.data = parameter.data.float()
    if projector_file:
        with naming("projector"):
            load_projector(projector_file, model)
    elif model.config.projector_untrained and arguments.phase in ("cpt", "cit"):
        raise UserError(
            f"--phase {arguments.phase}: the projector of {arguments.base} is new; --phase align trains it in the same "
            "--output_dir, --phase all begins with that, and --projector names one that is trained"
        )
    if arguments.phase == "cit":
        if arguments.queries != "none":  # else what lies there is of a run that this one replaces
            with naming("phase"):
                _check_classes(crayon_file, categories, arguments)
                load_crayon_prompt(crayon_file, model)
    elif arguments.query_start == "names" and arguments.phase != "align":
        with naming("query_start"):
            begin_with_names(model, processor.tokenizer)
    if arguments.quantize:
        quantize_language_model(model, dtype, device)
    if arguments.gradient_checkpointing:
        model.activation_checkpointing_enable()
    adapted = add_adapters(model, adapters, arguments.lora_rank, arguments.lora_alpha)
    staged = StagedModel(adapted.to(device).train(), adapters)
    for parameter in staged.parameters_of(adapters).values():
        parameter.data = parameter.data.float()
    return staged, processor


def _check_classes(crayon_file: Path, categories: CategorySet, arguments: TrainArguments) -> None:
    """Refuse queries that stand for other classes than the data's; equal numbers of them would fit in silence."""
    if not (crayon_file.parent / CONFIG).exists():
        return
    config = CollavoConfig.from_pretrained(crayon_file.parent)
    tuned, kind = config.category_set, "table" if config.class_tokens is None else "words"
    if kind != arguments.semantic_queries:
        raise UserError(f"{crayon_file}: tuned with --semantic_queries {kind}, which --phase cit has to go on with")
    if kind == "table" and list(tuned.by_key) != list(categories.by_key):
        raise UserError(
            f"{crayon_file}: its queries stand for {len(tuned)} classes, but the data have {len(categories)} "
            f"({categories.name}) or call them otherwise; begin with cpt on these data"
        )


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Turn `--precision` into the type that the model computes in."""
    if precision == "auto":
        # A CPU without bfloat16 instructions can compute in it too, but slower than in float32.
        in_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        in_bf16 = precision == "bf16"
    return torch.bfloat16 if in_bf16 else torch.float32


def count_weights(model: torch.nn.Module) -> Counter[str]:
    """Count weights by how they are stored: `NF4`, `bfloat16`, `float32`."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        if quantization := getattr(parameter, "quant_state", None):
            counts["NF4"] += quantization.shape.numel()  # two weights share a byte, so numel() would be half of it
        else:
            counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts
