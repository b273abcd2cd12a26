"""Tiny parts to train with: a tokenizer, a CoLLaVO base of 60,000 weights, and crayon data of a few drawn scenes."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import encoded
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from collavo.categories import read_categories
from collavo.instructions.choose import ClassStatistics
from collavo.instructions.phrasebook import load_phrasebook
from collavo.instructions.write import InstructionOptions, present_things, write_instructions
from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor, build_processor
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.parquet_writer import CrayonFileWriter
from collavo.scenes import draw_scene
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CrayonRow, Dialogue

GRID = 6
"""Rows and columns of the crayon map: 84 pixels in patches of 14."""

OWN_CLASSES = read_categories(
    [
        {"id": 10, "name": "sky", "isthing": 0},
        {"id": 30, "name": "lane marking", "isthing": 0},
        {"id": 1, "name": "traffic cone", "isthing": 1},
        {"id": 7, "name": "car", "isthing": 1},
        {"id": 2, "name": "e-scooter", "isthing": 1, "display_name": "E_Scooter"},
    ],
    "five of our own",
)
"""A set that shares two names with COCO's, under other numbers and in another order."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@cache
def _trained_tokenizer() -> str:
    """A tokenizer as JSON, trained once in a process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{p.question} {p.present}" for ps in load_phrasebook().phrasings.values() for p in ps]
    special = ["<s>", "</s>", "<pad>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def tiny_config(text: dict[str, Any] | None = None, **changes: Any) -> CollavoConfig:
    """A two-layer language model of width 64, and a two-layer vision tower; changes go on top."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 14 * GRID,
        "patch_size": 14,
    }
    language = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **(text or {}),
    }
    plain: dict[str, Any] = {"image_token_index": 3, "image_seq_length": GRID * GRID, "crayon_width": 16}
    return CollavoConfig(vision_config=vision, text_config=language, **{**plain, **changes})


def tiny_model(config: CollavoConfig | None = None, *, open_prompt: bool = True) -> CollavoForConditionalGeneration:
    """A model of random weights, the same every time; with `open_prompt`, its Crayon Prompt has an effect."""
    torch.manual_seed(0)
    model = CollavoForConditionalGeneration(config or tiny_config()).eval()
    if open_prompt and model.config.has_crayon_prompt:
        torch.nn.init.normal_(model.model.crayon_prompt.linear_2.weight, std=0.3)
    return model


def tiny_processor(config: CollavoConfig | None = None) -> CollavoProcessor:
    return build_processor(config or tiny_config(), tiny_tokenizer())


def save_tiny_base(folder: Path) -> Path:
    """A base for `collavo.train --preset`."""
    tiny_model(open_prompt=False).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def save_world(folder: Path, count: int) -> Path:
    """A base in `base` and rows of so many scenes in `rows.parquet`, of which a training is made."""
    save_tiny_base(folder / "base")
    write_crayon_file(folder / "rows.parquet", scene_rows(count))
    return folder


def scene_rows(count: int, first_seed: int = 0, embed: bool = True) -> list[CrayonRow]:
    """Rows of drawn scenes with instructions and dialogues; every fourth is in the validation split."""
    rows = [_scene_row(seed) for seed in range(first_seed, first_seed + count)]
    return rows if embed else [replace(row, image_bytes=None) for row in rows]


@cache
def _scene_row(seed: int) -> CrayonRow:
    """The row of one scene, which is drawn once in a process."""
    scene = draw_scene(seed, (96, 72))
    infos = [SegmentInfo(s.id, COCO_PANOPTIC.by_category_id[s.category_id].label, s.is_crowd) for s in scene.segments]
    panoptic = build_panoptic_map(scene.ids, infos)
    statistics = ClassStatistics.of(len(COCO_PANOPTIC.things))
    statistics.add_image(present_things(panoptic.segments, COCO_PANOPTIC))
    name = f"scene-{seed:03d}"
    dialogues = tuple(Dialogue(f"{name}-{i}", tuple(t)) for i, t in enumerate(scene.dialogues))
    image = encoded(Image.fromarray(scene.image), "JPEG")
    row = _row(seed, f"{name}.jpg", image, "scenes", panoptic, statistics)
    return replace(row, conversations=dialogues)


def _row(
    number: int, path: str, image: bytes, source: str, panoptic: PanopticMap, statistics: ClassStatistics
) -> CrayonRow:
    """The row of a picture of 96 x 72, without dialogues; every fourth is in the validation split."""
    name = path.partition(".")[0]
    options = InstructionOptions(max_instructions=12)
    return CrayonRow(
        image_id=name,
        image_sha256=hashlib.sha256(image).hexdigest(),
        image_bytes=image,
        image_path=path,
        width=96,
        height=72,
        sources=(source,),
        license_id=None,
        split="validation" if number % 4 == 3 else "train",
        panoptic_png=encode_index_map(panoptic),
        segments=panoptic.segments,
        instructions=write_instructions(
            name, (96, 72), panoptic.segments, panoptic.categories, load_phrasebook(), statistics, options
        ),
    )


def own_rows(count: int) -> list[CrayonRow]:
    """Rows of coloured squares, of the classes of `OWN_CLASSES`; every fourth is in the validation split."""
    statistics = ClassStatistics.of(len(OWN_CLASSES.things))
    statistics.add_image([0, 1, 2])
    rows = []
    for number in range(count):
        ids = np.zeros((72, 96), dtype=np.int32)
        ids[:24], ids[24:] = 1, 2
        squares = [2 + number % 2, 3, 4][: 1 + number % 3]  # labels
        for place, _ in enumerate(squares):
            ids[30:60, 10 + 28 * place : 32 + 28 * place] = 3 + place
        infos = [SegmentInfo(id_, label) for id_, label in enumerate([0, 1, *squares], start=1)]
        panoptic = build_panoptic_map(ids, infos, OWN_CLASSES)
        colors = np.array([(0, 0, 0), *(OWN_CLASSES[s.label].color_rgb for s in panoptic.segments)], dtype=np.uint8)
        image, name = encoded(Image.fromarray(colors[panoptic.index_map])), f"square-{number:03d}"
        row = _row(number, f"{name}.png", image, "coco", panoptic, statistics)
        # Some are alike, but each stands for a picture of its own.
        rows.append(replace(row, image_sha256=hashlib.sha256(image + name.encode()).hexdigest()))
    return rows


def write_crayon_file(path: Path, rows: list[CrayonRow], categories: CategorySet = COCO_PANOPTIC) -> Path:
    writer = CrayonFileWriter(path.open("wb"), {}, categories)
    for row in rows:
        writer.write(row)
    writer.close({})
    return path
