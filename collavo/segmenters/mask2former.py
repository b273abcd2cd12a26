"""Mask2Former through transformers: the default segmenter.

Images are squeezed to one fixed input size, without padding, so that an image's result cannot depend on what else is in
its batch. On a GPU every batch is filled up to the same size: the last one runs on the same kernels as the first. On a
CPU every image is a batch of its own, which is no slower, and with Intel's MKL sums are not split among threads: in the
embedded network, one, two and four of them compute the same bits. (Very narrow layers, as toy networks have, were seen
to differ in the last bit with four.) Bits would show, for the decoder attends to where its last mask was.

So near-ties are settled by the same bits wherever the same machine and versions run: a score just above a threshold is
above it for any number of workers, any batch size and any order. Exact ties go to the lower query, see
`collavo.panoptic.postprocess`. On another kind of CPU or GPU a near-tie may fall the other way.

Weights are read from safetensors only, and no code comes with them. Stored in half precision, they are widened to
float32 when they are read, which changes none of them.
"""

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, Mask2FormerForUniversalSegmentation

from collavo.device import device_name, move_to_device, resolve_device
from collavo.embedded import SCENES, find_embedded
from collavo.errors import UserError
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.postprocess import panoptic_from_logits
from collavo.panoptic.thresholds import PRESETS, MaskThresholds
from collavo.quiet import without_loading_report
from schemas.categories import CATEGORIES

DEFAULT_CHECKPOINT = "facebook/mask2former-swin-large-coco-panoptic"

DEFAULT_INPUT_SIZE = 768
"""The published PQ was measured at a short side of 800; the processors on the hub shrink to 384 without saying so. 768
is the nearest size that Swin's windows of 12 divide at all strides; 800 makes the backbone pad, and costs 25 % more."""

_SIZE_DIVISOR = 32  # the coarsest stride; masks then lie on exactly a quarter of the input
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Mask2FormerSegmenter:
    """A COCO panoptic Mask2Former checkpoint as a `collavo.segmenters.Segmenter`."""

    def __init__(
        self,
        checkpoint: str = DEFAULT_CHECKPOINT,
        *,
        input_size: int | tuple[int, int] | None = None,
        thresholds: MaskThresholds | None = None,
        device: str = "auto",
        batch_size: int = 8,
    ) -> None:
        """Load the weights and move them to the device.

        Args:
            checkpoint: a Hugging Face model id, a folder with `config.json` and `model.safetensors`, or `scenes`, the
                embedded one.
            input_size: side of a square, or (height, width), in pixels; multiples of 32. By default that which the
                checkpoint was trained at, where its configuration tells one as `input_size_hw`, else 768.
            thresholds: what makes a segment; by default the preset `scenes` for the embedded one, else `default`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            batch_size: images per forward pass on a GPU, kept constant; a CPU always takes one.

        Raises:
            UserError: for a checkpoint that is missing, incomplete, of another architecture or with other classes,
                and for an unusable input size.
            UserError: for a device that is missing or too small.
        """
        input_hw = None if input_size is None else _checked_size(input_size)
        self._thresholds = thresholds or PRESETS["scenes" if checkpoint == SCENES else "default"]
        self._device = resolve_device(device)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            # MKL reads this when the process first uses it, which may be to draw weights that are then overwritten.
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        self._batch_size = 1 if on_cpu else batch_size
        self._dtype = torch.float32 if on_cpu else torch.float16
        self._model, revision = _load_model(checkpoint)
        if on_cpu:
            _keep_group_norms_unsplit(self._model)
        self._input_hw = input_hw or _own_size_hw(self._model.config)
        move_to_device(self._model, self._device)
        self.facts: dict[str, Any] = {
            "segmenter": "mask2former",
            "checkpoint": checkpoint,
            "revision": revision,
            "input_size_hw": list(self._input_hw),
            "thresholds": asdict(self._thresholds),
            "device": device_name(self._device),
            "dtype": str(self._dtype).removeprefix("torch."),
            "batch_size": self._batch_size,
            "versions": {module.__name__: module.__version__ for module in (torch, transformers, PIL)},
        }
        if not on_cpu:
            self._try_batch()

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        """Segment uint8 RGB arrays [height, width, 3] of any sizes; see `Segmenter.segment`."""
        maps = []
        for first in range(0, len(images), self._batch_size):
            part = images[first : first + self._batch_size]
            class_logits, mask_logits = self._logits(part)
            for image, classes, masks in zip(part, class_logits, mask_logits, strict=False):
                maps.append(panoptic_from_logits(classes, masks, image.shape[:2], self._thresholds))
        return maps

    @torch.inference_mode()
    def _logits(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits [batch, queries, 134] and mask logits [batch, queries, height / 4, width / 4].

        The batch is filled up with black images, whose results come last.
        """
        pixels = np.zeros((self._batch_size, *self._input_hw, 3), dtype=np.uint8)
        for position, image in enumerate(images):
            pixels[position] = resize(image, self._input_hw)
        with self._arithmetic():
            outputs = self._model(pixel_values=normalise(torch.from_numpy(pixels).to(self._device)))
        return outputs.class_queries_logits, outputs.masks_queries_logits

    def _arithmetic(self) -> AbstractContextManager[None]:
        if self._device.type == "cpu":
            return _sums_unsplit()
        # As the authors trained: weights in float32, products in float16. bfloat16 is eight times coarser, which masks
        # and scores would show; its range is not needed, and an overflow would be an error, see `postprocess`.
        return torch.autocast(self._device.type, self._dtype)

    def _try_batch(self) -> None:
        """Every batch has this shape: what fits now fits later, the maps of very large images apart."""
        try:
            self._logits([])
        except torch.OutOfMemoryError as error:
            height, width = self._input_hw
            raise UserError(
                f"--device {self._device}: batches of {self._batch_size} at {height} x {width} pixels do not fit the "
                "GPU's memory; lower --batch_size or --segmenter_input_size"
            ) from error


def resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Squeeze a uint8 RGB image to `size_hw` with Pillow's antialiased bilinear filter."""
    height, width = size_hw
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [batch, height, width, 3] to float32 [batch, 3, height, width] with ImageNet's mean and deviation.

    Every published Mask2Former has these. Scaled in float64, then float32, as transformers does: the same bits.
    """
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD)
    )
    return pixels.permute(0, 3, 1, 2).double().mul_(1 / 255).float().sub_(mean).div_(std)


_onednn_switch = threading.Lock()


@contextmanager
def _sums_unsplit() -> Iterator[None]:
    """Keep convolutions from oneDNN, whose bits depend on the number of threads; MKL's do not in its strict mode."""
    with _onednn_switch:  # the switch is the process's, and threads may share a model
        was_enabled = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(_enabled=was_enabled, _fp32_precision=None)


def _checked_size(input_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(height, width) < _SIZE_DIVISOR or height % _SIZE_DIVISOR or width % _SIZE_DIVISOR:
        raise UserError(
            f"--segmenter_input_size {height} x {width}: both sides must be multiples of {_SIZE_DIVISOR}, such as 768"
        )
    return height, width


def _keep_group_norms_unsplit(model: nn.Module) -> None:
    """Hand group norms their input channel by channel; by pixels, torch splits its sums among threads."""

    def by_channels(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.contiguous() for tensor in inputs)

    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(by_channels)


def _own_size_hw(config: Any) -> tuple[int, int]:
    """The size that a checkpoint was trained at; published ones tell none."""
    height, width = getattr(config, "input_size_hw", (DEFAULT_INPUT_SIZE, DEFAULT_INPUT_SIZE))
    return _checked_size((height, width))


@contextmanager
def without_backbone_warnings() -> Iterator[None]:
    """Keep off the terminal what transformers says of every Mask2Former that is not built as its authors' were: that
    the backbone is no Swin, and that heads of 24 channels are slower in the authors' CUDA code, which nothing runs."""

    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Backbone resnet is not a supported model")

    log = logging.getLogger("transformers.models.mask2former.configuration_mask2former")
    log.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"You'd better set embed_dim \(d_model\)", UserWarning)
            yield
    finally:
        log.removeFilter(is_news)


def _load_model(checkpoint: str) -> tuple[Mask2FormerForUniversalSegmentation, str | None]:
    """The model, and what tells its weights from others of the same name."""
    try:
        embedded = find_embedded(checkpoint)
        source = str(embedded.folder) if embedded else checkpoint
        with without_backbone_warnings(), without_loading_report():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            _check_config(checkpoint, config)
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are listed, and refused below
                output_loading_info=True,
            )
    except UserError as error:
        raise UserError(f"--segmenter_checkpoint {checkpoint}: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        is_absent_folder = checkpoint.startswith(("/", ".", "~")) and not Path(checkpoint).is_dir()
        reason = "there is no such folder." if is_absent_folder else str(error).strip().splitlines()[0]
        raise UserError(
            f"--segmenter_checkpoint {checkpoint}: {reason} Use a folder that holds config.json and model.safetensors, "
            f"or a Hugging Face model id that can be downloaded from here, such as {DEFAULT_CHECKPOINT}; {SCENES}, the "
            "embedded one, knows drawn scenes only"
        ) from error
    model, info = loaded
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise UserError(
            f"--segmenter_checkpoint {checkpoint}: {len(absent)} weights are missing or have another shape, "
            f"first {absent[0]}; use a complete Mask2Former checkpoint"
        )
    return model.eval(), f"sha256:{embedded.sha256}" if embedded else getattr(model.config, "_commit_hash", None)


def _check_config(checkpoint: str, config: transformers.PreTrainedConfig) -> None:
    if config.model_type != "mask2former":
        raise UserError(
            f"--segmenter_checkpoint {checkpoint}: a {config.model_type} model, but mask2former is needed, "
            f"such as {DEFAULT_CHECKPOINT}"
        )
    names: dict[Any, str] = dict(config.id2label or {})
    expected = {category.label: category.name for category in CATEGORIES}
    if names != expected:
        label = next((label for label in expected if names.get(label) != expected[label]), len(expected))
        raise UserError(
            f"--segmenter_checkpoint {checkpoint}: class {label} of {len(names)} is {names.get(label)!r}, but in COCO "
            f"panoptic's 133 classes it is {expected.get(label)!r}; use a coco-panoptic checkpoint such as "
            f"{DEFAULT_CHECKPOINT}"
        )
