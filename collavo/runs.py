"""The run directory: what training leaves behind, and how it is loaded again.

    RUN/config.json          the model's configuration
    RUN/train_args.json      every argument, the base, checksums of an embedded base and of the data, library versions
    RUN/metrics.jsonl        a line per step
    RUN/projector.safetensors  the projector, where alignment trained it
    RUN/crayon.safetensors   queries and crayon connector; a run of alignment alone has none
    RUN/adapters/NAME/       each adapter in peft's own format
    RUN/README.md            the model card

The base itself is not copied. It is loaded from the place it came from, and every saved weight has to fit it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoProcessor
from transformers.utils import is_flash_attn_2_available

from collavo.device import memory_named, move_to_device
from collavo.embedded import SCENES, TINY, find_embedded
from collavo.errors import UserError, first_line
from collavo.folders import let_others_read, writing
from collavo.hub import find_checkpoint
from collavo.import_base.assemble import NEW, assemble_from_llava
from collavo.import_base.published import one_line_errors
from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import WITH_MEMORY, quantize_language_model, round_to_nf4, without_peft_warnings
from collavo.model.configuration import CollavoConfig
from collavo.model.processing import CollavoProcessor
from collavo.model.query_init import adopt_categories
from collavo.quiet import without_loading_report
from schemas.categories import CategorySet

CONFIG, TRAIN_ARGS, METRICS = "config.json", "train_args.json", "metrics.jsonl"
PROJECTOR, CRAYON, ADAPTERS, CARD = "projector.safetensors", "crayon.safetensors", "adapters", "README.md"

WRITTEN = (
    CONFIG, METRICS, PROJECTOR, CRAYON, ADAPTERS, CARD, "checkpoints", "evaluation", "processor_config.json",
    "tokenizer*", "chat_template.jinja", ".unfinished*", "collavo/**/*tfevents*", TRAIN_ARGS,
)  # fmt: skip
"""What training and evaluation write into a run directory, names and patterns; last the file that makes it a run."""

EXPORT = "export.json"
"""What `collavo.export_model` writes beside the weights of a merged model: its base, and how it was trained."""


def save_run(run: Path, model: PeftModel, adapters: Sequence[str], processor: CollavoProcessor) -> None:
    """Write what was trained, with the model's configuration and the processor, beside `train_args.json`.

    The processor is told whether prompts list the objects, as in training, and which segmenter chat would take.

    Raises:
        UserError: if the disk refuses; what an earlier training left is kept whole.
    """
    args = read_train_args(run)
    processor.object_list = args["object_list"] != "none"
    processor.segmenter = SCENES if args["base"] == TINY else "auto"
    with writing(run), TemporaryDirectory(dir=run, prefix=".unfinished") as folder_name:
        staging = Path(folder_name)
        for name in _parts(args):
            weights = (_projector(model) if name == PROJECTOR else _crayon_prompt(model)).state_dict()
            save_file({key: tensor.cpu().contiguous() for key, tensor in weights.items()}, staging / name)
        if adapters:
            for config in model.peft_config.values():
                config.base_model_name_or_path = args["base"]  # peft would name the folder that it came from
            folder = staging / ADAPTERS
            model.save_pretrained(str(folder), selected_adapters=list(adapters), save_embedding_layers=False)
            (folder / CARD).unlink(missing_ok=True)  # peft's own card; the run's says more
        model.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        let_others_read(staging)
        for entry in staging.iterdir():
            if entry.is_dir():
                shutil.rmtree(run / entry.name, ignore_errors=True)
            entry.replace(run / entry.name)


def _parts(args: Mapping[str, Any]) -> list[str]:
    """Name the files of weights, adapters aside, that a run with these arguments holds."""
    return [PROJECTOR] * bool(args.get("projector_trained")) + [CRAYON] * (args.get("phase") != "align")


def load_run(
    run: Path, device: torch.device, dtype: torch.dtype, quantize: bool | Literal["dequantized"] | None = None
) -> tuple[PeftModel | CollavoForConditionalGeneration, CollavoProcessor]:
    """Load a trained model with all its adapters active.

    Args:
        dtype: of what is not quantised, and of the computation.
        quantize: whether the language model is NF4; None for as it was trained; "dequantized" for ordinary weights with
            the values that NF4 gave them.

    Raises:
        UserError: if the folder is not a finished run, the weights do not fit the base, or the model not the device.
    """
    args = read_train_args(run)
    check_embedded_base(run, args)
    parts = [CONFIG, *_parts(args), *(f"{ADAPTERS}/{name}" for name in args["adapter_names"])]
    if missing := [part for part in parts if not (run / part).exists()]:
        raise UserError(
            f"{run}: its training has not ended, for there is no {missing[0]}; collavo.train --resume goes on with it"
        )
    # A CPU has no flash attention, and another GPU's machine perhaps not its package. SDPA computes the same.
    attention: str = args["attention"]
    if device.type != "cuda" or (attention == "flash_attention_2" and not is_flash_attn_2_available()):
        attention = "sdpa"
    config = CollavoConfig.from_pretrained(run)
    words = config.class_tokens is not None
    try:
        model, _ = load_base(base_source(run), dtype, args["queries"], attention, config.category_set, words)
    except UserError as error:
        raise UserError(f"{run}: its base, {error}") from error
    for name in _parts(args):
        load = load_projector if name == PROJECTOR else load_crayon_prompt
        load(run / name, model)
    if quantize == "dequantized":
        round_to_nf4(model, device)
    elif args["quantize"] if quantize is None else quantize:
        quantize_language_model(model, dtype, device)
    loaded: PeftModel | CollavoForConditionalGeneration = model
    if args["adapter_names"]:
        loaded = load_adapters(model, {name: run / ADAPTERS / name for name in args["adapter_names"]})
    move_to_device(loaded, device)
    return loaded.eval(), AutoProcessor.from_pretrained(run)


def check_embedded_base(run: Path, args: Mapping[str, Any]) -> None:
    """Refuse a run that was trained from the embedded base of another version of this package: its weights fit that.

    Raises:
        UserError: naming the run.
    """
    embedded = find_embedded(args["base"])
    if embedded and args.get("base_sha256") != embedded.sha256:
        raise UserError(
            f"{run}: trained from the small base of another version of this package, and that of this one differs; "
            "use that version, or train again"
        )


_OF_WHOLE_MODELS = ("quantization_config", "load_in_4bit", "load_in_8bit", "attn_implementation", "max_memory")


def load_run_in_place(
    run: Path, dtype: torch.dtype | str | None = None, device_map: Any = None, quantize: bool | None = None, **more: Any
) -> CollavoForConditionalGeneration:
    """Load a run as `from_pretrained` has to: one model of its own class, with the adapters inside its layers.

    Args:
        dtype: None or "auto" for that of the training.
        device_map: a device, or a dictionary that names one alone; "auto" and its like for the first GPU, or the CPU
            where there is none.
        quantize: as in `load_run`.
        more: what transformers hands on, such as the configuration, of which a run needs nothing.

    Raises:
        UserError: as `load_run`, and for a keyword that would change the model.
    """
    whole = "collavo.export_model --as merged makes a whole model of it, which takes"
    if refused := [name for name in _OF_WHOLE_MODELS if more.get(name)]:
        raise UserError(f"{run}: a run is loaded as it was trained, without {refused[0]}; {whole} one")
    device = device_map
    if isinstance(device_map, dict):
        devices = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()}
        if len(devices) > 1:
            raise UserError(f"{run}: a run goes onto one device, not {', '.join(sorted(devices))}; {whole} several")
        device = next(iter(devices), None)
    if device is None:
        device = "cpu"
    if device in ("auto", "balanced", "balanced_low_0", "sequential"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = more.get("torch_dtype") if dtype is None else dtype  # its name until transformers 5
    if dtype is None or dtype == "auto":
        dtype = AutoConfig.from_pretrained(run).dtype or torch.float32
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    loaded, _processor = load_run(run, device, getattr(torch, dtype) if isinstance(dtype, str) else dtype, quantize)
    if not isinstance(loaded, PeftModel):
        return loaded
    model: Any = loaded.get_base_model()
    model.peft_config, model._hf_peft_config_loaded = loaded.peft_config, True  # as if transformers had loaded them
    return model


def base_config(base: str) -> Any:
    """Read a base's configuration, without its weights.

    Args:
        base: as in `load_base`.

    Raises:
        UserError: if it cannot be reached or read.
    """
    embedded = find_embedded(base)
    with one_line_errors(base):
        return AutoConfig.from_pretrained(embedded.folder if embedded else find_checkpoint(base))


def load_base(
    base: str,
    dtype: torch.dtype,
    queries: str = "both",
    attention: str = "sdpa",
    categories: CategorySet | None = None,
    words: bool | None = None,
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Load the model that training starts from, of CoLLaVO's or LLaVA's architecture.

    Args:
        base: a folder, a hub id, or `tiny`, the embedded one.
        queries: `both`, `semantic`, `numbering` or `none`; the model has no weights for the others.
        attention: transformers' attention implementation.
        categories: the set of classes that the model is to have queries for; None for the base's own. Classes that the
            base knows by name keep their queries.
        words: whether the semantic queries are computed from the names of the classes; None for as in the base.

    Raises:
        UserError: if it cannot be reached, is incomplete or damaged, or has another architecture.
    """
    embedded = find_embedded(base)
    switches: dict[str, Any] = {f"{kind}_queries": queries in ("both", kind) for kind in ("semantic", "numbering")}
    if words is not None:
        switches["class_tokens"] = [] if words else None  # filled below, when the tokenizer is there
    with one_line_errors(base):
        folder = embedded.folder if embedded else find_checkpoint(base)
        architecture = AutoConfig.from_pretrained(folder).model_type
        if architecture == "llava":
            model, processor = assemble_from_llava(folder, dtype=dtype, attention=attention, **switches)
        elif architecture == "collavo":
            model, processor = _load_whole(folder, dtype=dtype, attn_implementation=attention, **switches)
        else:
            raise ValueError(f"a {architecture} model; python -m collavo.import_base makes a base out of one")
        own = model.config.category_set
        if words or (categories is not None and categories.as_records() != own.as_records()):
            adopt_categories(model, processor, categories or own)
        model.name_or_path = base  # which adapters record; the folder may be one of this machine only
        return model, processor


def _load_whole(folder: Path, **options: Any) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    with without_loading_report():
        loaded: Any = CollavoForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
    model, found = loaded
    # The queries asked for may differ from those that the base was saved with. Otherwise transformers must not have
    # initialised a weight at random, nor ignored one.
    wrong = [key for key in (*found["missing_keys"], *found["unexpected_keys"]) if not key.startswith(NEW)]
    if wrong:
        raise ValueError(f"{len(wrong)} weights are missing or unknown, such as {min(wrong)}")
    return model, AutoProcessor.from_pretrained(folder)


def load_crayon_prompt(file: Path, model: CollavoForConditionalGeneration | PeftModel) -> None:
    """Put saved queries and connector into a model, in place; a model without queries takes none.

    Raises:
        UserError: if the file is missing, damaged, or holds other weights.
    """
    prompt = _crayon_prompt(model)
    if not prompt.state_dict():
        return
    _load_weights(file, prompt, "Crayon Prompt Tuning (cpt)")


def load_projector(file: Path, model: CollavoForConditionalGeneration | PeftModel) -> None:
    """Put a trained projector into a model, in place, which is untrained no longer.

    Raises:
        UserError: if the file is missing, damaged, or holds other weights.
    """
    _load_weights(file, _projector(model), "alignment (align)")
    model.config.projector_untrained = False


def _load_weights(file: Path, module: nn.Module, written_by: str) -> None:
    if not file.exists():
        raise UserError(f"{file}: there is no such file; {written_by} writes it")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged weights ({first_line(error)})") from error
    if differing := set(weights) ^ set(module.state_dict()):
        raise UserError(f"{file}: {len(differing)} weights do not match the model's, such as {min(differing)}")
    for name, own in module.state_dict().items():
        if weights[name].shape != own.shape:
            found, expected = (" x ".join(map(str, tensor.shape)) for tensor in (weights[name], own))
            raise UserError(f"{file}: {name} is {found}, but {expected} in a model of these classes and this base")
    module.load_state_dict(weights)


@memory_named(WITH_MEMORY)
def load_adapters(model: CollavoForConditionalGeneration, folders: dict[str, Path]) -> PeftModel:
    """Put saved adapters on a model, in the order of `folders`, all of them active and none of them trainable.

    Raises:
        UserError: if a file lacks weights that the model needs, has some that the model does not know, or they do not
            fit the device.
    """
    (first, folder), *_ = folders.items()
    with without_peft_warnings():
        adapted = PeftModel(model, LoraConfig.from_pretrained(str(folder)), adapter_name=first)
    for name, folder in folders.items():
        result = adapted.load_adapter(str(folder), name, torch_device="cpu")
        if wrong := [*result.missing_keys, *result.unexpected_keys]:
            raise UserError(
                f"{folder}: {len(result.missing_keys)} weights missing and {len(result.unexpected_keys)} unknown, such "
                f"as {wrong[0]}; the adapter was trained on another base or under another version of transformers"
            )
    tuner: Any = adapted.base_model
    tuner.set_adapter(list(folders))
    adapted.requires_grad_(False)
    return adapted


def read_train_args(run: Path) -> dict[str, Any]:
    """Read what a run was trained with.

    Raises:
        UserError: if the folder is not a run.
    """
    file = run / TRAIN_ARGS
    if not file.exists():
        raise UserError(f"{run}: not a run directory, for it has no {TRAIN_ARGS}; train one with collavo.train")
    return json.loads(file.read_text())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics, oldest first; a full disk may have cut the last one."""
    file = run / METRICS
    lines: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def steps_taken(run: Path) -> dict[str, int]:
    """Read how far each phase of a run has got, by its metrics; nothing of a folder that is no run."""
    return {line["phase"]: line["step"] for line in read_metrics(run)}


def base_source(run: Path) -> str:
    """Name the base of a run: a folder, a hub id, or the name of an embedded model."""
    base: str = read_train_args(run)["base"]
    # An export names a base in a folder by the way that leads there from the export.
    return str(run / base) if (run / base).is_dir() else base


def base_from(run: Path, folder: Path) -> str:
    """Name the base of a run as an export in `folder` names it: no path of this machine, if there is a way without."""
    base = base_source(run)
    return os.path.relpath(base, folder) if find_embedded(base) is None and Path(base).is_dir() else base


def base_of(model: str) -> str | None:
    """Name the base that a run or a merged model was trained from; the model itself if its folder names no base."""
    if (Path(model) / TRAIN_ARGS).exists():
        base: str | None = read_train_args(Path(model)).get("base")
        return base
    return export_facts(model).get("base", model)


def export_facts(model: str) -> dict[str, Any]:
    """Read what an export says of its training; nothing of a model that is none.

    Args:
        model: a folder, a hub id, or the name of an embedded model.
    """
    if find_embedded(model):
        return {}
    try:
        file = (Path(model) if Path(model).is_dir() else find_checkpoint(model, weights=())) / EXPORT
        return json.loads(file.read_text()) if file.is_file() else {}
    except OSError:
        return {}


def _crayon_prompt(model: CollavoForConditionalGeneration | PeftModel) -> nn.Module:
    return getattr(_without_adapters(model).model, "crayon_prompt", nn.Module())


def _projector(model: CollavoForConditionalGeneration | PeftModel) -> nn.Module:
    return _without_adapters(model).model.multi_modal_projector


def _without_adapters(model: CollavoForConditionalGeneration | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
