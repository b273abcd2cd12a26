"""Read the authors' CoLLaVO-7B release as a mode of this project's model.

Its language model is InternLM2 with low-rank branches beside the linear layers; `collavo.model.branches` says what they
do. The linear layers themselves are called `Plora_main` there. Its vision encoder is CLIP ViT-L/14 whose position
embeddings are interpolated already.

Source: github.com/ByungKwanLee/CoLLaVO, collavo/arch_collavo.py and collavo/arch/.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from collavo.hub import find_checkpoint
from collavo.import_base.assemble import Ingredients, build, language_model_weights, vision_tower_weights
from collavo.import_base.internlm import llama_config, llama_weights, split_wqkv
from collavo.import_base.published import one_line_errors, read_config, read_weights
from collavo.import_base.sentencepiece_tokenizers import internlm_tokenizer
from collavo.model.modeling import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor

_VISION_TOWER = "vit.vision_tower."
_CLIP_HEAD_DIM = 64
_BRANCH = re.compile(r"model\.layers\.(\d+)\.(?:attention|feed_forward)\.(\w+)\.Plora_(seg_)?([AB])\.weight")
_PROJECTIONS = {"wqkv": "qkv", "wo": "o", "w1": "gate", "w3": "up", "w2": "down"}
_MODULES = {
    "vision_proj.0": "model.multi_modal_projector.linear_1",
    "vision_proj.2": "model.multi_modal_projector.linear_2",
    "vision_proj_for_seg.0": "model.crayon_prompt.linear_1",
    "vision_proj_for_seg.2": "model.crayon_prompt.linear_2",
    "seg_prompt_embed": "model.crayon_prompt.semantic_queries",
    "seg_num_embed": "model.crayon_prompt.numbering_queries",
}


def load_release(release: str | Path, **options: Any) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Load CoLLaVO-7B, or another checkpoint of its layout; the crayon signal runs through low-rank branches.

    Args:
        release: folder or hub id.
        options: of `collavo.import_base.assemble.build`.

    Raises:
        UserError: if the checkpoint cannot be used.
    """
    with one_line_errors(f"release {release}"):
        folder = find_checkpoint(release)
        text_config = llama_config(read_config(folder))
        weights = read_weights(folder)
        ingredients = Ingredients(
            _vision_config(weights),
            text_config,
            _our_weights(weights, text_config),
            # The release's prompts hold the markers under their names in tokenizer.model.
            internlm_tokenizer(folder, chat_names=False),
            new=(),
            collavo_entries={
                "crayon_signal": "low_rank_branches",
                "branch_rank": _shape(weights, "model.layers.0.attention.wqkv.Plora_A.weight")[0],
                "crayon_width": _shape(weights, "seg_prompt_embed.weight")[1],
            },
        )
        return build(ingredients, **{**options, "chat_format": options.get("chat_format") or "collavo_release"})


def _our_weights(weights: Mapping[str, torch.Tensor], text_config: LlamaConfig) -> dict[str, torch.Tensor]:
    ours = vision_tower_weights(weights, _VISION_TOWER)
    base: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module in _MODULES:
            ours[f"{_MODULES[module]}.{kind}"] = tensor
        elif branch := _BRANCH.fullmatch(name):
            layer, linear, of_signal, factor = branch.groups()
            if of_signal and linear == "w2":
                continue  # the release saves it, and never uses it
            if linear == "wqkv" and factor == "B":
                tensor = torch.cat(split_wqkv(name, tensor, text_config))
            family = "crayon" if of_signal else "image"
            position = "AB".index(factor)
            ours[f"model.low_rank_branches.{layer}.{family}.{_PROJECTIONS[linear]}.{position}.weight"] = tensor
        elif not name.startswith(_VISION_TOWER):
            base[name.replace(".Plora_main.", ".")] = tensor
    return ours | language_model_weights(llama_weights(base, text_config))


def _vision_config(weights: Mapping[str, torch.Tensor]) -> CLIPVisionConfig:
    """Read the vision encoder's configuration off its tensors; the release holds it in its code only."""
    model = f"{_VISION_TOWER}vision_model."
    width, _, _, patch_size = _shape(weights, f"{model}embeddings.patch_embedding.weight")
    positions, _ = _shape(weights, f"{model}embeddings.position_embedding.weight")
    layers = {name.split(".")[5] for name in weights if name.startswith(f"{model}encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=_shape(weights, f"{model}encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // _CLIP_HEAD_DIM,
        patch_size=patch_size,
        image_size=math.isqrt(positions - 1) * patch_size,
    )


def _shape(weights: Mapping[str, torch.Tensor], name: str) -> torch.Size:
    if name not in weights:
        raise ValueError(f"not in the layout of CoLLaVO-7B, which has a tensor {name}")
    return weights[name].shape
