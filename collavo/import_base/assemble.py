"""Make a CoLLaVO model of published checkpoints: of a LLaVA, or of a vision encoder and a language model.

Tensors are renamed, not copied; only a changed tensor takes memory of its own. The Crayon Prompt, and the projector
between separate parts, are in no checkpoint and are initialised.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from collavo.errors import UserError
from collavo.hub import find_checkpoint
from collavo.import_base.chat_templates import read_chat_format
from collavo.import_base.internlm import llama_config, llama_weights
from collavo.import_base.published import one_line_errors, read_chat_template, read_config, read_tokenizer, read_weights
from collavo.import_base.sentencepiece_tokenizers import internlm_tokenizer
from collavo.model.configuration import CollavoConfig
from collavo.model.modeling import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor, build_processor
from collavo.model.prompt import CHAT_FORMATS, ChatFormat, chat_format_of
from collavo.quiet import without_loading_report
from schemas.crayon_row import IMAGE_TOKEN

NATIVE_LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "qwen3", "internlm3")
INTERNLM = ("internlm", "internlm2")
CLIP, SIGLIP = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")
VISION_ENCODERS = (*CLIP, *SIGLIP)
NEW = ("model.crayon_prompt.", "model.low_rank_branches.")
"""Beginnings of the names of tensors that other people's models lack."""

_ORIGINAL_LLAVA = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_patch_merge_type": "flat",  # LLaVA-1.6's is another
}
"""What the configuration of LLaVA-1.5 says, in its authors' layout, of what is built in."""

_POSITIONS = "model.vision_tower.embeddings.position_embedding.weight"
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_VISION_NAME = re.compile(r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)")


@dataclass(slots=True)
class Ingredients:
    """Tensors under this project's names, with their configurations and tokenizer."""

    vision_config: CLIPVisionConfig | SiglipVisionConfig
    text_config: Any
    weights: dict[str, torch.Tensor]
    tokenizer: Any
    new: tuple[str, ...] = NEW
    """Beginnings of the names of tensors that are initialised where they are missing."""

    collavo_entries: dict[str, Any] = field(default_factory=dict)
    """Entries of CollavoConfig that the weights need."""

    image_options: dict[str, Any] = field(default_factory=dict)
    """`image_mean`, `image_std` and `resample` of the image processor; CLIP's where they are missing."""

    chat_format: str | dict[str, str] = "paper"
    """The checkpoint's own."""


def assemble_from_llava(
    llava: str | Path, vision: str | Path | None = None, **options: Any
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Make CoLLaVO of a LLaVA checkpoint; its projector stays, on the same layer of the vision encoder.

    Args:
        llava: folder or hub id, in transformers' layout or in that of LLaVA's authors, which has no vision encoder.
        vision: folder or hub id of that vision encoder; None for the one that the checkpoint names.
        options: of `build`.

    Raises:
        UserError: if the checkpoint cannot be used.
    """
    with one_line_errors(f"llava {llava}"):
        folder = find_checkpoint(llava, weights=())  # these are large, and fetched when all else is right
        entries = read_config(folder)
        _check_type(entries.get("model_type"), ("llava", "llava_llama"))
        if "text_config" not in entries:
            return build(_read_original_llava(llava, folder, entries, vision), **options)
        if vision is not None:
            raise ValueError("it has a vision encoder of its own")
        config: Any = LlavaConfig.from_pretrained(folder)
        _check_type(config.vision_config.model_type, VISION_ENCODERS)
        has_class_token = config.vision_config.model_type in CLIP
        if has_class_token and config.vision_feature_select_strategy != "default":
            raise ValueError("its image tokens include the class token, for which a crayon map has no cell")
        if not has_class_token and config.vision_feature_select_strategy != "full":
            raise ValueError("its image tokens lack the first patch, in place of a class token that SigLIP has not")
        _check_type(config.text_config.model_type, NATIVE_LANGUAGE_MODELS)
        kept = (
            "projector_hidden_act",
            "multimodal_projector_bias",
            "vision_feature_layer",
            "vision_feature_select_strategy",
        )
        weights, tokenizer = read_weights(find_checkpoint(llava)), read_tokenizer(folder)
        ingredients = Ingredients(
            config.vision_config,
            config.text_config,
            {_llava_name(name): tensor for name, tensor in weights.items()},
            tokenizer,
            collavo_entries={name: getattr(config, name) for name in kept},
            image_options=_image_options(folder),
            chat_format=_known_format(tokenizer, read_chat_template(folder)),
        )
        return build(ingredients, **options)


def assemble_from_parts(
    vision: str | Path, language: str | Path, **options: Any
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Make CoLLaVO of a vision encoder and a language model, with a new projector.

    The image's features are CLIP's last layer, as the paper's, or SigLIP's last but one, as LLaVA-OneVision's: SigLIP's
    last one serves its pooling head.

    Args:
        vision, language: folders or hub ids.
        options: of `build`.

    Raises:
        UserError: if one of the checkpoints cannot be used.
    """
    with one_line_errors(f"vision {vision}"):
        vision_config, vision_weights, entries, image_options = _read_vision_encoder(vision)
    with one_line_errors(f"language {language}"):
        text_config, text_weights, tokenizer, chat_format = _read_language_model(language)
        ingredients = Ingredients(
            vision_config,
            text_config,
            vision_weights | text_weights,
            tokenizer,
            new=(*NEW, "model.multi_modal_projector."),
            collavo_entries={"projector_untrained": True, **entries},
            image_options=image_options,
            chat_format=chat_format,
        )
        return build(ingredients, **options)


def build(
    ingredients: Ingredients,
    image_size: int | None = None,
    chat_format: str | dict[str, str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "sdpa",
    **entries: Any,
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Make the model and its processor.

    Args:
        image_size: in pixels; position embeddings are interpolated to its grid. None for 490, the paper's, with CLIP,
            and for the vision encoder's own with SigLIP, less what is no whole patch.
        chat_format: a key of `collavo.model.prompt.CHAT_FORMATS`; None for the checkpoint's own, or `paper` if it has
            none.
        attention: transformers' attention implementation.
        entries: further entries of CollavoConfig, such as `crayon_width`.

    Raises:
        UserError: if an argument is wrong.
        ValueError: if tensors are missing or do not fit.
    """
    weights = dict(ingredients.weights)
    chat_format = chat_format or ingredients.chat_format
    config = CollavoConfig(
        vision_config=ingredients.vision_config,
        text_config=ingredients.text_config,
        chat_format=chat_format,
        **ingredients.collavo_entries | entries,
    )
    patch = config.vision_config.patch_size
    if image_size is None:
        own = 490 if config.vision_config.model_type in CLIP else config.vision_config.image_size
        image_size = own // patch * patch
    if image_size < patch or image_size % patch:
        raise UserError(f"image_size {image_size}: no multiple of the patch size, {patch}")
    config.vision_config.image_size = image_size
    config.image_seq_length = math.prod(config.grid_hw)
    if _POSITIONS in weights:
        weights[_POSITIONS] = resize_positions(weights[_POSITIONS], config.grid_hw)

    tokenizer = ingredients.tokenizer
    generation_config = _generation_config(tokenizer, chat_format)
    processor = build_processor(config, tokenizer, **ingredients.image_options)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if config.tie_word_embeddings:
        weights.pop(_HEAD, None)
    _grow_vocabulary(weights, len(tokenizer))
    if _EMBEDDING in weights:
        config.text_config.vocab_size = len(weights[_EMBEDDING])

    new = (*ingredients.new, _HEAD) if config.tie_word_embeddings else ingredients.new
    check_weights(CollavoForConditionalGeneration, config, weights, may_lack=new)
    with without_loading_report():
        model = CollavoForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attention
        )
    model.generation_config = generation_config
    model.never_generate_images()
    return model, processor


def check_weights(
    model_class: type[PreTrainedModel],
    config: Any,
    weights: Mapping[str, torch.Tensor],
    prefix: str = "",
    may_lack: tuple[str, ...] = (),
) -> None:
    """Compare tensors with those of a model, by name and shape.

    Args:
        prefix: stands before the model's own names in `weights`.
        may_lack: beginnings of the names of tensors that may be missing.

    Raises:
        ValueError: if tensors are missing, unknown, or of another shape; it names some of them.
    """
    with torch.device("meta"):
        expected = {prefix + name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    missing = [name for name in expected if name not in weights and not name.startswith(may_lack)]
    unknown = [name for name in weights if name not in expected]
    unfit = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    for problem, names in (("missing", missing), ("of unknown name", unknown), ("of another shape", unfit)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"tensors {problem}: {', '.join(names[:3])}{more}")


def resize_positions(positions: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """Interpolate position embeddings [1 + cells, width], CLIP's, or [cells, width], SigLIP's, to another grid; the
    class token keeps its own."""
    side = math.isqrt(len(positions))
    first = len(positions) - side**2  # 1 with a class token, as no two squares of one cell and more are neighbours
    if (side, side) == grid_hw:
        return positions
    cells = positions[first:].float().T.unflatten(1, (side, side)).unsqueeze(0)
    resized = nn.functional.interpolate(cells, size=grid_hw, mode="bicubic", align_corners=False)
    return torch.cat([positions[:first], resized[0].flatten(1).T.to(positions.dtype)])


def vision_tower_weights(weights: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Rename the tensors of a vision encoder, whose names begin with `prefix`, and leave out all others."""
    matches = [(_VISION_NAME.fullmatch(name.removeprefix(prefix)), name) for name in weights if name.startswith(prefix)]
    return {f"model.vision_tower.{match[1]}": weights[name] for match, name in matches if match}


def language_model_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a causal language model to our names."""
    return {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in weights.items()}


def _read_vision_encoder(source: str | Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Read a vision encoder: its configuration, its tensors, the entries of CollavoConfig that it needs, and the
    options of its image processor."""
    folder = find_checkpoint(source, weights=())
    model_type = read_config(folder).get("model_type")
    if model_type in ("siglip2", "siglip2_vision_model"):
        raise ValueError("SigLIP 2 of any resolution (NaFlex) has no fixed grid; a SigLIP 2 of one resolution has")
    _check_type(model_type, VISION_ENCODERS)
    weights = vision_tower_weights(read_weights(find_checkpoint(source)))
    if model_type in CLIP:
        config: Any = CLIPVisionConfig.from_pretrained(folder)
        check_weights(CLIPVisionModel, config, weights, "model.vision_tower.")
        return config, weights, {}, _image_options(folder)
    config = SiglipVisionConfig.from_pretrained(folder)
    config.vision_use_head = False  # it pools all patches into one vector, for which nobody asks
    check_weights(SiglipVisionModel, config, weights, "model.vision_tower.")
    entries = {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}
    return config, weights, entries, _image_options(folder)


def _read_original_llava(
    llava: str | Path, folder: Path, entries: dict[str, Any], vision: str | Path | None
) -> Ingredients:
    """Read a LLaVA-1.5 as its authors publish it: a Llama with a projector, and the name of its vision encoder."""
    for name, known in _ORIGINAL_LLAVA.items():
        if (found := entries.get(name, known)) != known:
            raise ValueError(f"{name} {found!r} in config.json is not supported; {known!r}, of LLaVA-1.5, is")
    weights = read_weights(find_checkpoint(llava))
    source = vision or entries["mm_vision_tower"]
    with one_line_errors(f"vision {source}"):
        vision_config, vision_weights, _, image_options = _read_vision_encoder(source)
        _check_type(vision_config.model_type, CLIP)
    tuned = "model.vision_tower.vision_tower."  # where the vision encoder was trained, too
    vision_weights |= vision_tower_weights(weights, tuned)
    ours = {_original_llava_name(name): tensor for name, tensor in weights.items() if not name.startswith(tuned)}
    tokenizer = read_tokenizer(folder)
    known = LlamaConfig().to_dict().keys() | {"rope_theta", "rope_scaling"}
    of_llama = {name: value for name, value in entries.items() if name in known}
    return Ingredients(
        vision_config,
        LlamaConfig.from_dict(of_llama | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        vision_weights | ours,
        tokenizer,
        collavo_entries={"vision_feature_layer": entries["mm_vision_select_layer"]},
        image_options=image_options,
        # It has no template, and was trained in Vicuna's format.
        chat_format=_known_format(tokenizer, read_chat_template(folder) or "ASSISTANT:"),
    )


def _read_language_model(source: str | Path) -> tuple[Any, dict[str, torch.Tensor], Any, str | dict[str, str]]:
    """Read a language model: its configuration, its tensors, its tokenizer and its chat format."""
    folder = find_checkpoint(source, weights=())
    entries = read_config(folder)
    _check_type(entries.get("model_type"), (*NATIVE_LANGUAGE_MODELS, *INTERNLM))
    weights = read_weights(find_checkpoint(source))
    if entries["model_type"] in INTERNLM:
        config: Any = llama_config(entries)
        weights, tokenizer = llama_weights(weights, config), internlm_tokenizer(folder)
    else:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = read_tokenizer(folder)
    chat_format = _own_format(tokenizer, read_chat_template(folder))
    return config, language_model_weights(weights), tokenizer, chat_format


def _llava_name(name: str) -> str:
    for pattern, ours in (
        (r"^(model\.language_model|language_model\.model)\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
        (r"^(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    ):
        name = re.sub(pattern, ours, name)
    return name


def _original_llava_name(name: str) -> str:
    match = re.fullmatch(r"model\.mm_projector\.([02])\.(weight|bias)", name)
    if match:
        return f"model.multi_modal_projector.linear_{1 + int(match[1]) // 2}.{match[2]}"
    return re.sub(r"^model\.", "model.language_model.", name)


def _check_type(model_type: str | None, supported: tuple[str, ...]) -> None:
    if model_type not in supported:
        raise ValueError(f"architecture {model_type!r} is not supported; supported are {', '.join(supported)}")


def _image_options(folder: Path) -> dict[str, Any]:
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            entries = json.loads((folder / name).read_text(encoding="utf-8"))
            entries = entries.get("image_processor", entries)
            if found := {key: entries[key] for key in ("image_mean", "image_std", "resample") if key in entries}:
                return found  # a processor's file of transformers 4 says nothing of images
    return {}


def _own_format(tokenizer: Any, template: str) -> str | dict[str, str]:
    """Read the chat format of a language model's template: its name if it is known here, else its fields."""
    found = read_chat_format(tokenizer, template)
    if found is None:
        return _known_format(tokenizer, template)
    return next((name for name, known in CHAT_FORMATS.items() if known == found), asdict(found))


def _known_format(tokenizer: Any, template: str) -> str:
    """Choose the chat format by a template's markers, as for a LLaVA, whose template lacks the system text of its
    training; `paper` if the tokenizer lacks the token that ends a turn."""
    name = chat_format_of(template)
    stop_ids = tokenizer(CHAT_FORMATS[name].stop, add_special_tokens=False).input_ids
    return name if len(stop_ids) <= 1 else "paper"


def _generation_config(tokenizer: Any, chat_format: str | dict[str, str]) -> GenerationConfig:
    """Let answers end at the end-of-text token, or at the token that ends a turn in this chat format."""
    if isinstance(chat_format, str) and chat_format not in CHAT_FORMATS:
        raise UserError(f"chat_format {chat_format}: unknown; known are {', '.join(CHAT_FORMATS)}")
    if tokenizer.eos_token_id is None:
        raise ValueError("its tokenizer has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ends = [tokenizer.eos_token_id]
    if stop := ChatFormat.of(chat_format).stop.strip():  # Llama 2's has a space before the token
        stop_ids = tokenizer(stop, add_special_tokens=False).input_ids
        if len(stop_ids) != 1:
            raise UserError(f"chat_format {chat_format}: the tokenizer has no token {stop}, which ends its turns")
        ends = [*dict.fromkeys([*stop_ids, *ends])]
    return GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def _grow_vocabulary(weights: dict[str, torch.Tensor], tokens: int) -> None:
    """Add rows for new tokens, up to a multiple of 64. A new row is the mean of the others, so that its logit is never
    the largest and the model does not say the token."""
    tables = {name: weights[name] for name in (_EMBEDDING, _HEAD) if name in weights}
    rows = max((len(table) for table in tables.values()), default=0)
    if tokens > rows:
        rows = math.ceil(tokens / 64) * 64
    for name, table in tables.items():
        if len(table) < rows:
            mean = table.mean(0, dtype=torch.float32).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(rows - len(table), -1)])
