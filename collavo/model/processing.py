"""The processor: it turns images, their panoptic maps and conversations into the model's inputs."""

import os
import warnings
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature, CLIPImageProcessorPil, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import get_image_size, make_flat_list_of_images, to_numpy_array
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END

from collavo.errors import Rejected
from collavo.images import HARD_MAX_PIXELS, decode_rgb, rgb_pixels
from collavo.instructions.text import format_objects_with_boxes
from collavo.model.configuration import CollavoConfig
from collavo.model.prompt import ChatFormat, RenderedPrompt, Turns, objects_sentence, render_conversation
from collavo.model.prompt import chat_template as jinja_template
from collavo.panoptic.grid import crayon_grid
from collavo.panoptic.maps import PanopticMap, build_panoptic_map
from collavo.segmenters import UNFAMILIAR, Segmenter, open_segmenter
from collavo.web import fetch, is_url
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import IMAGE_TOKEN

Crayon = Sequence[PanopticMap] | Literal["segment", "none"]
"""Where crayon maps come from: maps of the images, the processor's segmenter, or nowhere."""


class CollavoProcessor(ProcessorMixin):
    """Image processor and tokenizer with the prompt protocol.

    It is called as transformers' processors are. Images are squeezed to a square, neither cropped nor padded. So the
    patches of the vision encoder cover the whole picture, and the cell of a crayon map is the same part of it as the
    patch at the same place.

    Args:
        patch_size: of the vision encoder.
        chat_format: one of `collavo.model.prompt.CHAT_FORMATS`, or the fields of a `ChatFormat`.
        category_records: the set of classes that the model has queries for; None for COCO panoptic's.
        segmenter: what makes the maps of pictures that come without: a checkpoint of transformers for universal
            segmentation, `scenes` for the embedded one, `auto` for the paper's; None for nothing. Training leaves
            `scenes` where the embedded base was trained, else `auto`.
        object_list: whether a chat begins with the recognised objects, as in the training of the model.
        chat_template: that of the chat format by default.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        chat_format: str | dict[str, str] = "paper",
        category_records: list[dict[str, Any]] | None = None,
        segmenter: str | None = None,
        object_list: bool = True,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        self.patch_size = patch_size
        self.chat_format = chat_format
        self.category_records = category_records
        self.segmenter = segmenter
        self.object_list = object_list
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        # A prompt is continued at its right end, so a batch of them is padded on the left, whatever the base says.
        tokenizer.padding_side = "left"
        tokenizer.chat_control_tokens = list(tokenizer.get_added_vocab())  # text in messages, see `apply_chat_template`
        template = chat_template or jinja_template(tokenizer, ChatFormat.of(chat_format))
        super().__init__(image_processor, tokenizer, chat_template=template, **kwargs)

    @cached_property
    def categories(self) -> CategorySet:
        """The set of classes that the model has queries for."""
        return CategorySet.from_records("the model", self.category_records) if self.category_records else COCO_PANOPTIC

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the crayon map."""
        size = self.image_processor.size
        return size["height"] // self.patch_size, size["width"] // self.patch_size

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "semantic_ids", "numbering_ids"]

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def __call__(
        self, images: Any = None, text: Any = None, crayon: Crayon | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Turn images and texts with `<image>` into the model's inputs.

        Args:
            images: PIL images, paths or URLs, which are opened as in training, or arrays of RGB; one, a list, or a
                list of lists.
            text: one text or several, complete prompts such as `apply_chat_template` makes.
            crayon: the maps of the images in their order, of their heights and widths; "segment" to have them made
                here; "none", the default, for maps in which nothing is known.
            kwargs: of image processor and tokenizer, such as `return_tensors` and `padding`.

        Returns:
            `input_ids` and `attention_mask`, with images also `pixel_values`, `semantic_ids` and `numbering_ids`. Its
            attribute `crayon` is "given", "segment" or "none", and `panoptic` holds the maps. Warnings say that the
            segmenter knows no pictures like these, and which classes the model has no query for.

        Raises:
            ValueError: if images, maps and image tokens do not match, there is no segmenter, or an image is damaged.
        """
        if images is not None:
            images = self._fetched(images)
        texts = [text] if isinstance(text, str) else text or []
        bos, nested = self.tokenizer.bos_token, kwargs.get("text_kwargs") or {}
        if texts and bos and "add_special_tokens" not in nested and all(each.startswith(bos) for each in texts):
            # A rendered chat has the token that some tokenizers put in front of every text; one is enough.
            kwargs.setdefault("add_special_tokens", False)
        if kwargs.get("sanitize_control_tokens"):
            # transformers cuts what is marked as text out before it counts images; a second mark keeps what stood on
            # either side, as in `<im</s>age>`, from joining.
            text = [each.replace(_CONTROL_TOKEN_END, 2 * _CONTROL_TOKEN_END) for each in texts]
        batch: Any = super().__call__(images=images, text=text, **kwargs)
        batch.crayon, batch.panoptic = crayon if isinstance(crayon, str) else "given" if crayon else "none", []
        if images is not None:
            flat: Any = make_flat_list_of_images(images)
            batch.panoptic = self._maps(flat, crayon)
            for caution in self._cautions(batch.panoptic):
                warnings.warn(caution, stacklevel=2)
            ids = self._crayon_ids(batch.panoptic, self._grid_of(batch))
            is_torch = isinstance(batch["pixel_values"], torch.Tensor)
            batch.update({name: torch.from_numpy(array) if is_torch else array for name, array in ids.items()})
        return batch

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """Render chats as transformers' processors do, and with `tokenize=True` make the model's inputs of them.

        Maps of the images are made by the processor's segmenter if it has one, unless `processor_kwargs` has `crayon`;
        see `__call__`. Models trained with the object list get it before the first question. Control tokens in messages
        are tokenized as text, such as `</s>`, or left out, `<image>`.

        Raises:
            ValueError: as `__call__`, and for control tokens in messages with `return_assistant_tokens_mask`.
        """
        options = kwargs["processor_kwargs"] = dict(kwargs.get("processor_kwargs") or {})
        crayon: Any = (
            kwargs.pop("crayon", None) or options.pop("crayon", None) or ("segment" if self.segmenter else "none")
        )
        chats, several = self._normalize_conversations(conversation)
        self._keep_text(chats, kwargs)
        given = options.get("images")
        sources = given if given and several else [given] if given else [_image_sources(chat) for chat in chats]
        if not kwargs.get("tokenize") or not any(sources):
            return super().apply_chat_template(chats if several else chats[0], *args, **kwargs)
        images = self._fetched(sources)
        maps = self._maps([image for group in images for image in group], crayon)
        remaining = iter(maps)
        for chat, group in zip(chats, images, strict=True):
            found = [next(remaining) for _ in group]
            if found and self.object_list:
                height, width = found[0].index_map.shape
                objects = objects_sentence(format_objects_with_boxes(found[0].segments, (width, height)))
                chat[0]["content"] = [*_blocks(chat[0]), {"type": "objects", "text": objects}]
        options |= {"images": images if several else images[0], "crayon": maps}
        batch: Any = super().apply_chat_template(chats if several else chats[0], *args, **kwargs)
        if kwargs.get("return_dict"):
            batch.crayon = crayon if isinstance(crayon, str) else "given"
        return batch

    def _keep_text(self, chats: Sequence[Sequence[dict[str, Any]]], options: dict[str, Any]) -> None:
        """Leave image tokens out of messages, and have transformers tokenize other control tokens in them as text,
        which it cannot where it makes a mask."""
        tokenizes, texts = options.get("tokenize"), []
        for message in (message for chat in chats for message in chat):
            content = [dict(block) for block in _blocks(message)]
            for block in (block for block in content if "text" in block):
                block["text"] = block["text"].replace(self.image_token, "")
                # Another may be left, of `<im<image>age>`. Nothing could tell it from an image's in a finished prompt.
                while not tokenizes and self.image_token in block["text"]:
                    block["text"] = block["text"].replace(self.image_token, "")
                texts.append(block["text"])
            message["content"] = content[0]["text"] if isinstance(message.get("content"), str) else content
        if not tokenizes:
            return
        options["image_tokens_removed"] = True  # for our template: what is left is text
        if not options.get("return_assistant_tokens_mask"):
            options.setdefault("sanitize_control_tokens", True)
        elif found := [token for token in self.tokenizer.get_added_vocab() if any(token in text for text in texts)]:
            raise ValueError(f"a message holds {found[0]}, which would not stay text beside an assistant mask")

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return one image token per cell; transformers puts them in the place of an image's own."""
        rows, columns = self._grid_of(image_inputs)
        return self.image_token * rows * columns

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Count the tokens of images by their sizes, which do not matter; servers such as vLLM ask for it."""
        rows, columns = self.grid_hw
        count = len(image_sizes or ())
        return MultiModalData(num_image_tokens=[rows * columns] * count, num_image_patches=[1] * count)

    def _grid_of(self, image_inputs: Any) -> tuple[int, int]:
        """Count rows and columns of images as processed, whose size a caller may have changed."""
        height, width = image_inputs["pixel_values"][0].shape[-2:]
        return height // self.patch_size, width // self.patch_size

    def _fetched(self, images: Any) -> Any:
        """Open images, in lists or alone, and give those of Pillow the pixels that training sees."""
        if isinstance(images, list | tuple):
            return [self._fetched(image) for image in images]
        if isinstance(images, str) and (is_url(images) or os.path.isfile(images)):
            try:
                data = fetch(images) if is_url(images) else Path(images).read_bytes()
                return Image.fromarray(decode_rgb(data, HARD_MAX_PIXELS))
            except Rejected as error:
                raise ValueError(f"{images}: {error}") from error
        fetched: Any = self.image_processor.fetch_images(images)
        return Image.fromarray(rgb_pixels(fetched)) if isinstance(fetched, Image.Image) else fetched

    def _maps(self, images: Sequence[Any], crayon: Crayon | None) -> list[PanopticMap]:
        """Get the map of each image from where the caller says."""
        if crayon == "segment":
            if self.segmenter is None:
                raise ValueError("this processor has no segmenter; give crayon maps, or set its attribute `segmenter`")
            pixels = [np.asarray(to_pil_image(image).convert("RGB")) for image in images]
            return _segmenter(self.segmenter).segment(pixels)
        sizes = [get_image_size(to_numpy_array(image)) for image in images]
        if crayon is None or crayon == "none":
            return [build_panoptic_map(np.zeros(size, np.int32), ()) for size in sizes]
        maps = list(crayon)
        shapes = [found.index_map.shape for found in maps]
        if shapes != sizes:
            raise ValueError(f"images of heights and widths {sizes} need crayon maps of the same; found {shapes}")
        return maps

    def _cautions(self, panoptic: Sequence[PanopticMap]) -> list[str]:
        """Say, a sentence each, why maps are to be trusted less."""
        unknown = set[str]()
        for found in panoptic:
            indices = self._semantic_indices(found.categories)
            labels = {segment.label for segment in found.segments if not indices[segment.label + 1]}
            unknown |= {found.categories[label].display_name for label in labels}
        said = [UNFAMILIAR] if any(found.unfamiliar for found in panoptic) else []
        return said + [f"The model has no query for: {', '.join(sorted(unknown))}."] * bool(unknown)

    def _crayon_ids(self, panoptic: Sequence[PanopticMap], grid_hw: tuple[int, int]) -> dict[str, np.ndarray]:
        """`semantic_ids` and `numbering_ids` of maps, int64 [images, rows, columns]."""
        grids = [crayon_grid(found.index_map, found.segments, grid_hw) for found in panoptic]
        semantic = [
            self._semantic_indices(found.categories)[ids] for found, (ids, _) in zip(panoptic, grids, strict=True)
        ]
        return {"semantic_ids": np.stack(semantic), "numbering_ids": np.stack([numbering for _, numbering in grids])}

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
            self.tokenizer, ChatFormat.of(self.chat_format), turns, rows * columns * has_image, objects
        )

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
        pixel_values = torch.stack([self.pixel_values(image) for image in images])
        ids = self._crayon_ids(panoptic, self.grid_hw)
        return {"pixel_values": pixel_values, **{name: torch.from_numpy(array) for name, array in ids.items()}}


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the content of a chat's message as typed blocks."""
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _image_sources(chat: Sequence[dict[str, Any]]) -> list[Any]:
    """Find the images of a chat, as it gives them; a block may also hold none, and then it comes by another way."""
    blocks = (block for message in chat for block in _blocks(message) if block.get("type") == "image")
    return [block[key] for block in blocks for key in ("image", "url", "path", "base64") if key in block]


@lru_cache(maxsize=2)
def _segmenter(checkpoint: str) -> Segmenter:
    """Load a segmenter on the fastest device; kept, as it takes seconds to load."""
    return open_segmenter("auto", "auto", checkpoint=None if checkpoint == "auto" else checkpoint)


def build_processor(
    config: CollavoConfig, tokenizer: Any, image_mean: Any = None, image_std: Any = None, resample: int | None = None
) -> CollavoProcessor:
    """Build the processor that fits a model's image size, grid and chat format.

    Args:
        tokenizer: of the language model; `<image>` is added to it where it is missing.
        image_mean, image_std, resample: of the vision encoder's image processor; CLIP's by default.
    """
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    side = config.vision_config.image_size
    options = {"image_mean": image_mean, "image_std": image_std, "resample": resample}
    image_processor = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        default_to_square=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    return CollavoProcessor(
        image_processor, tokenizer, config.vision_config.patch_size, config.chat_format, config.categories
    )


AutoProcessor.register(CollavoConfig, CollavoProcessor)
