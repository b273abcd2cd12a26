"""The processor: it turns images, their panoptic maps and conversations into the model's inputs."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, ProcessorMixin

from collavo.instructions.text import format_objects_with_boxes
from collavo.model.configuration import CollavoConfig
from collavo.model.prompt import CHAT_FORMATS, IMAGE_TOKEN, RenderedPrompt, Turns, render_conversation
from collavo.panoptic.grid import crayon_grid
from collavo.panoptic.maps import PanopticMap
from schemas.categories import COCO_PANOPTIC, CategorySet


class CollavoProcessor(ProcessorMixin):
    """Image processor and tokenizer with the prompt protocol.

    Images are squeezed to a square, neither cropped nor padded. So the patches of the vision encoder cover the whole
    picture, and the cell of a crayon map is the same part of it as the patch at the same place.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        chat_format: str = "paper",
        category_records: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.chat_format = chat_format
        self.category_records = category_records
        super().__init__(image_processor, tokenizer, **kwargs)

    @cached_property
    def categories(self) -> CategorySet:
        """The set of classes that the model has queries for."""
        return CategorySet.from_records("the model", self.category_records) if self.category_records else COCO_PANOPTIC

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the crayon map."""
        size = self.image_processor.size
        return size["height"] // self.patch_size, size["width"] // self.patch_size

    def __call__(
        self,
        images: Sequence[np.ndarray],
        panoptic: Sequence[PanopticMap],
        conversations: Sequence[Turns],
        object_list: bool = True,
    ) -> BatchFeature:
        """Make a left-padded batch to generate from.

        Args:
            images: uint8 RGB arrays [height, width, 3].
            panoptic: the map of each image.
            conversations: turns about each image, the last one by `human`.
            object_list: whether the recognised objects precede the first question.
        """
        prompts = []
        for image, found, turns in zip(images, panoptic, conversations, strict=True):
            size_wh = (image.shape[1], image.shape[0])
            prompts.append(
                self.render(turns, format_objects_with_boxes(found.segments, size_wh) if object_list else None)
            )
        batch = self.tokenizer.pad(
            {"input_ids": [prompt.input_ids for prompt in prompts]}, padding_side="left", return_tensors="pt"
        )
        return BatchFeature({**batch, **self.picture_inputs(images, panoptic)})

    def _semantic_indices(self, categories: CategorySet) -> np.ndarray:
        """int64 [classes + 1]: the model's semantic index of each one of a map; 0, unknown, where it has no query.

        Classes are told by their names. A map in the model's own set is passed through.
        """
        if categories is not self.categories and categories != self.categories:
            own = self.categories.by_key
            known = (own.get(key) for key in categories.by_key)
            return np.array([0, *(category.label + 1 if category else 0 for category in known)])
        return np.arange(len(categories) + 1)

    def render(self, turns: Turns, objects: str | None = None, has_image: bool = True) -> RenderedPrompt:
        """Render a conversation in this model's chat format; see `collavo.model.prompt.render_conversation`."""
        rows, columns = self.grid_hw
        return render_conversation(
            self.tokenizer, CHAT_FORMATS[self.chat_format], turns, rows * columns * has_image, objects
        )

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def pixel_values(self, image: np.ndarray) -> torch.Tensor:
        """float32 [3, side, side] of an image, uint8 RGB [height, width, 3]."""
        return self.image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0]

    def picture_inputs(self, images: Sequence[np.ndarray], panoptic: Sequence[PanopticMap]) -> dict[str, torch.Tensor]:
        """Turn pictures into the model's inputs; the one place where pixels and crayon maps become tensors.

        Args:
            images: uint8 RGB arrays [height, width, 3].
            panoptic: the map of each image, of the same height and width.

        Returns:
            `pixel_values`, float32 [images, 3, side, side], and `semantic_ids` and `numbering_ids`, int64 [images,
            rows, columns].
        """
        grids = [crayon_grid(found.index_map, found.segments, self.grid_hw) for found in panoptic]
        tables = [torch.from_numpy(self._semantic_indices(found.categories)) for found in panoptic]
        return {
            "pixel_values": torch.stack([self.pixel_values(image) for image in images]),
            "semantic_ids": torch.stack([table[semantic] for table, (semantic, _) in zip(tables, grids, strict=True)]),
            "numbering_ids": torch.stack([torch.from_numpy(numbering) for _, numbering in grids]),
        }


def build_processor(
    config: CollavoConfig, tokenizer: Any, image_mean: Any = None, image_std: Any = None
) -> CollavoProcessor:
    """Build the processor that fits a model's image size, grid and chat format.

    Args:
        tokenizer: of the language model; `<image>` is added to it where it is missing.
        image_mean, image_std: of the vision encoder; CLIP's by default.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    side = config.vision_config.image_size
    normalisation = {k: v for k, v in (("image_mean", image_mean), ("image_std", image_std)) if v is not None}
    image_processor = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, default_to_square=True, **normalisation
    )
    return CollavoProcessor(
        image_processor, tokenizer, config.vision_config.patch_size, config.chat_format, config.categories
    )


AutoProcessor.register(CollavoConfig, CollavoProcessor)
