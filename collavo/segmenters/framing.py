"""How a picture becomes what a segmentation network sees: size, aspect, padding, colours.

A checkpoint says so in the configuration of its image processor. There are three ways:

- squeezed: all inputs have one size, whatever the picture's aspect (the embedded network, many fine-tuned ones);
- padded: the picture keeps its aspect and lies in the top left corner of an input of one size (EoMT);
- free: the picture keeps its aspect, and each input has a size of its own (MaskFormer, OneFormer, DETR, Mask2Former).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import get_size_with_aspect_ratio

from collavo.errors import UserError
from collavo.sources import object_in
from schemas.categories import name_key

SIZE_DIVISOR = 32
"""The coarsest stride of most networks; masks then have exactly a quarter of the input's sides."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PUBLISHED_EDGES = (800, 1333)
"""Shortest side and bound of the longest at which all families but EoMT were measured on COCO."""

_MASK2FORMERS_EDGES = {
    (133, "person"): _PUBLISHED_EDGES, (80, "person"): _PUBLISHED_EDGES,
    (150, "wall"): (640, 2560), (100, "bed"): (640, 2560),
    (19, "road"): (1024, 2048), (8, "person"): (1024, 2048),
    (65, "bird"): (2048, 2048),
}  # fmt: skip
"""The same of the published Mask2Formers of COCO, ADE20K and Cityscapes, each with all classes and with things only,
and of Mapillary Vistas, by the number of their classes and the first one, as their authors' configurations have it."""

_PLACEHOLDER = {"height": 384, "width": 384}
"""The size in the processors of the published Mask2Formers. They were neither trained nor measured at it. Others were:
it is what transformers' example of fine-tuning takes."""


@dataclass(frozen=True, slots=True)
class Framing:
    """The way of one checkpoint."""

    size_hw: tuple[int, int] | None
    """Of every input; None where each picture has a size of its own."""

    edges: tuple[int, int | None] | None
    """Shortest side and bound of the longest, where pictures keep their aspect; None where they are squeezed."""

    divisor: int = 1
    """Free sizes are rounded up to multiples of this."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def sizes(self, image_hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (height, width) of a picture once it is scaled, and of the input that holds it."""
        if self.edges is None:
            assert self.size_hw is not None
            return self.size_hw, self.size_hw
        height, width = (max(side, 1) for side in get_size_with_aspect_ratio(image_hw, *self.edges))
        if self.size_hw is not None:
            return (height, width), self.size_hw
        scaled = (-(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor)
        return scaled, scaled

    def pixels(self, images: Sequence[np.ndarray], count: int) -> np.ndarray:
        """Scale pictures into a batch, filled up with black ones.

        Args:
            images: uint8 RGB arrays [height, width, 3]; at most one where sizes are free.
            count: inputs of the batch.

        Returns:
            uint8 [count, height, width, 3].
        """
        # Without a picture, the size of a common one: 4 to 3.
        _, input_hw = self.sizes(images[0].shape[:2] if images else (480, 640))
        batch = np.zeros((count, *input_hw, 3), dtype=np.uint8)
        for position, image in enumerate(images):
            height, width = self.sizes(image.shape[:2])[0]
            batch[position, :height, :width] = resize(image, (height, width))
        return batch

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 [batch, height, width, 3] into float32 [batch, 3, height, width] of the network's scale.

        Pixels are scaled in float64 and go on in float32, as in transformers, for the same bits.
        """
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.permute(0, 3, 1, 2).double().mul_(1 / 255).float().sub_(mean).div_(std)


def resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Squeeze a uint8 RGB image to `size_hw` with Pillow's antialiased bilinear filter."""
    height, width = size_hw
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def framing_of(config: Any, folder: Path, input_size: int | tuple[int, int] | None = None) -> Framing:
    """Find out how a checkpoint wants its pictures.

    Args:
        config: the network's.
        folder: of the checkpoint; its processor's configuration is read where it is there.
        input_size: the user's: side of a square, or (height, width), to squeeze pictures into.

    Raises:
        UserError: for an input size that the network cannot take, and for a processor that does not say how pictures
            are prepared.
    """
    processor = _processor_config(folder)
    given = _pair(input_size)
    size_hw = given or _pair(getattr(config, "input_size_hw", None))
    no_size = size_hw is None and not config.model_type.startswith("eomt") and processor.get("do_resize") is False
    if no_size or processor.get("do_rescale") is False:
        raise UserError(
            f"{folder}: the image processor says {'do_resize' if no_size else 'do_rescale'} false, so pictures were "
            "prepared elsewhere in training; say how in preprocessor_config.json, with do_resize and size, do_rescale, "
            "do_normalize, image_mean and image_std"
        )
    mean, std = _colours_of_processor(processor)
    if config.model_type.startswith("eomt"):  # the number of its cells is fixed, and pictures are padded to fill it
        own = _pair(config.image_size)
        assert own is not None
        if given not in (None, own):
            raise UserError(f"input size {_text(given)}: this network sees {_text(own)} pixels and no other size")
        return Framing(own, (min(own), max(own)), mean=mean, std=std)
    divisor = processor.get("size_divisor", processor.get("size_divisibility"))
    if divisor is None:
        divisor = SIZE_DIVISOR if config.model_type in ("mask2former", "maskformer") else 1
    divisor, edges = divisor or 1, None
    unit = SIZE_DIVISOR if given else divisor  # a network takes the size that it was trained at
    if size_hw is None and (trained_at := getattr(config, "input_edges", None)):
        edges = (trained_at[0], trained_at[1])
    elif size_hw is None:
        try:
            size_hw, edges = _sizes_of_processor(processor, config)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: the image processor's size is {processor['size']}, which says no shape; use height and "
                "width, or shortest_edge and longest_edge"
            ) from error
        if size_hw is not None:  # as transformers' processor does
            size_hw = (-(-size_hw[0] // divisor) * divisor, -(-size_hw[1] // divisor) * divisor)
    elif min(size_hw) < unit or any(side % unit for side in size_hw):
        raise UserError(f"input size {_text(size_hw)}: both sides must be multiples of {unit}, such as 768")
    return Framing(size_hw, edges, divisor, mean, std)


def _colours_of_processor(processor: dict[str, Any]) -> tuple[tuple[float, ...], ...]:
    """Return the `mean` and the `std` of a framing, which are of pixels from 0 to 1."""
    scale = round(255 * float(processor.get("rescale_factor") or 1 / 255), 6)
    stated = [processor.get("image_mean") or IMAGENET_MEAN, processor.get("image_std") or IMAGENET_STD]
    if not processor.get("do_normalize", True):
        stated = [0.0, 1.0]
    channels = [[value] * 3 if isinstance(value, int | float) else value for value in stated]
    return tuple(tuple(float(value) / scale for value in three) for three in channels)


def _sizes_of_processor(
    processor: dict[str, Any], config: Any
) -> tuple[tuple[int, int] | None, tuple[int, int | None] | None]:
    """Return the `size_hw` and the `edges` of a framing, as the processor's `size` says them."""
    size = processor.get("size")
    if isinstance(size, int):  # as in files of transformers before 4.27
        return None, (size, processor.get("max_size", _PUBLISHED_EDGES[1]))
    published = None
    if config.model_type == "mask2former":
        published = _MASK2FORMERS_EDGES.get((config.num_labels, name_key(str(config.id2label.get(0)))))
    if not size or (published and size == _PLACEHOLDER):
        return None, published or _PUBLISHED_EDGES
    if isinstance(size, list):
        return (size[0], size[1]), None
    if "height" in size:
        return (size["height"], size["width"]), None
    if "max_height" in size and size["max_height"] == size.get("max_width"):  # whatever the shortest side becomes
        return None, (size["max_height"], size["max_height"])
    return None, (size["shortest_edge"], size.get("longest_edge"))


def _processor_config(folder: Path) -> dict[str, Any]:
    """Read the image processor's configuration where transformers looks for it; empty where there is none."""
    whole = object_in(folder / "processor_config.json").get("image_processor")
    return whole if isinstance(whole, dict) else object_in(folder / "preprocessor_config.json")


def _pair(size: Any) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])


def _text(size_hw: tuple[int, int] | None) -> str:
    return " x ".join(map(str, size_hw or ()))
