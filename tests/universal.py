"""Small checkpoints of every family of universal segmentation networks, of random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForUniversalSegmentation,
    DetrConfig,
    EomtConfig,
    EomtDinov3Config,
    Mask2FormerConfig,
    MaskFormerConfig,
    MaskFormerDetrConfig,
    OneFormerConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    SwinConfig,
)

from schemas.categories import COCO_PANOPTIC

COCO_NAMES = {category.label: category.name for category in COCO_PANOPTIC}
DETR_NAMES = {
    number: COCO_PANOPTIC.by_category_id[number].name
    if number in COCO_PANOPTIC.by_category_id
    else ("N/A" if number % 2 else f"LABEL_{number}")
    for number in range(250)
}
"""As DETR's panoptic checkpoints number their classes: COCO's ids, with gaps."""

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_PROCESSORS: dict[str, dict[str, Any]] = {
    "mask2former": {"size": {"shortest_edge": 64, "longest_edge": 100}, "size_divisor": 32},
    "maskformer": {"size": 64, "max_size": 100, "size_divisibility": 32},
    "oneformer": {"size": {"shortest_edge": 64, "longest_edge": 100}, "class_info_file": "coco_panoptic.json"},
    "detr": {"size": {"shortest_edge": 64, "longest_edge": 100}, "image_mean": [0.5, 0.4, 0.3]},
    "eomt": {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True, "do_split_image": False},
    "eomt_dinov3": {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True, "do_split_image": False},
}
FAMILIES = tuple(_PROCESSORS)


def save_checkpoint(family: str, folder: Path, names: Mapping[int, str] | None = None) -> Path:
    """Save a network that finds something in most pictures, with its processor's configuration as the hub has it."""
    names = names or (DETR_NAMES if family == "detr" else COCO_NAMES)
    torch.manual_seed(3)
    config = _config(family)
    config.id2label = dict(names)
    config.label2id = {name: label for label, name in names.items()}
    model = AutoModelForUniversalSegmentation.from_config(config)
    with torch.no_grad():  # as drawn, every query says nearly nothing of nearly everything
        for name, parameter in model.named_parameters():
            if name.endswith(("class_predictor.weight", "class_labels_classifier.weight", "class_embed.weight")):
                parameter.mul_(40)
            if name.endswith(("query.weight", "query_position_embeddings.weight", "queries_embedder.weight")):
                parameter.mul_(20)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family]))
    if family == "oneformer":
        words = {word: number for number, word in enumerate(["<pad>", "<unk>", "the", "task", "is", "panoptic"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
            folder
        )
    return folder


def _config(family: str) -> Any:
    swin = SwinConfig(
        embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4, image_size=64, out_features=_STAGES
    )
    resnet = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1] * 4, layer_type="basic", out_features=_STAGES
    )
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    vit = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_blocks": 2, "image_size": 64,
        "patch_size": 8, "num_queries": 12, "num_upscale_blocks": 1,
    }  # fmt: skip
    detr = {
        **layers, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 8,
        "decoder_attention_heads": 8, "num_queries": 12, "auxiliary_loss": True,
    }  # fmt: skip
    match family:
        case "mask2former":
            sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
            return Mask2FormerConfig(
                backbone_config=swin, **layers, **sizes, dim_feedforward=32, num_attention_heads=2, num_queries=12
            )
        case "maskformer":
            return MaskFormerConfig(
                backbone_config=swin,
                decoder_config=MaskFormerDetrConfig(**detr),
                fpn_feature_size=32,
                mask_feature_size=32,
            )
        case "oneformer":
            sizes = dict.fromkeys(("conv_dim", "mask_dim", "hidden_dim", "encoder_feedforward_dim"), 32)
            text = {"text_encoder_width": 32, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 50}
            return OneFormerConfig(
                backbone_config=swin, **sizes, **text, encoder_layers=1, decoder_layers=3, dim_feedforward=32,
                num_attention_heads=2, num_queries=12,
            )  # fmt: skip
        case "detr":
            return DetrConfig(backbone_config=resnet, **detr)
        case "eomt":
            return EomtConfig(**vit)
        case _:
            return EomtDinov3Config(**vit, intermediate_size=32)
