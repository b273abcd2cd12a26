"""Crayon rows for other people's trainers: `transformers.Trainer`, TRL's `SFTTrainer`, or a loop of one's own.

    rows = load_dataset("out", split="train")
    Trainer(model, TrainingArguments(..., remove_unused_columns=False), CrayonCollator(processor), rows).train()

`collavo.train` does more: two adapters, batches of one kind, an order of its own. This is for those who have a trainer.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from collavo.images import decode_rgb, rgb_pixels
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Kind
from collavo.panoptic.maps import PanopticMap
from collavo.training.batches import Example, collate, example_of, prompts_of
from collavo.training.lengths import NO_LIST
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import Segment


@dataclass(eq=False)
class CrayonCollator:
    """Make a batch of crayon rows, as `datasets.load_dataset` gives them: one sequence each.

    It is about some of the row's instructions, packed, or about one of its dialogues, drawn anew every time.

    Args:
        processor: of the model.
        categories: the set of the rows' classes, see `collavo.dataset.category_set`.
        instructions: how many are packed into one sequence at most; 1 for an attention that cannot do it.
    """

    processor: CollavoProcessor
    categories: CategorySet = COCO_PANOPTIC
    instructions: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return what the model's forward takes, labels included, padded on the right."""
        return collate([self._example(row) for row in rows], self.processor.tokenizer.pad_token_id).inputs

    def _example(self, row: Mapping[str, Any]) -> Example:
        asked, dialogues = row["instructions"] or [], row["conversations"] or []
        choices: list[tuple[Kind, int]] = [("crayon", 0)] if asked else []
        choices += [("dialogue", number) for number in range(len(dialogues))]
        if not choices:
            raise ValueError(f"row {row['image_id']} has neither instructions nor dialogues; leave it out by a filter")
        kind, number = choices[int(torch.randint(len(choices), ()))]
        some = torch.randperm(len(asked))[: self.instructions].tolist() if kind == "crayon" else [number]
        has_image = row["image"] is not None
        listed = len(row["segments"]) if has_image and kind == "dialogue" and self.processor.object_list else NO_LIST
        prompts = prompts_of(self.processor, row, kind, some, [listed] * len(some), has_image)
        if not has_image:
            return example_of(self.processor, kind, row["image_id"], prompts)
        segments = tuple(map(Segment.from_record, row["segments"] or []))
        panoptic = PanopticMap(np.asarray(_opened(row["panoptic_map"])), segments, self.categories)
        return example_of(self.processor, kind, row["image_id"], prompts, _pixels(row["image"]), panoptic)


def _pixels(image: Any) -> np.ndarray:
    return rgb_pixels(image) if isinstance(image, Image.Image) else decode_rgb(image["bytes"])


def _opened(image: Any) -> Image.Image:
    """Open an image as `datasets` decodes it, or, with `decode=False`, as its bytes."""
    return image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image["bytes"]))
