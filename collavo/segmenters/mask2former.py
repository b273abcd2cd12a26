"""Mask2Former through transformers: the default segmenter.

An image's result does not depend on its batch, nor on the number of threads, to the last bit. That matters: the decoder
attends to its own last mask, so a different bit can grow, and a score just above a threshold has to stay above it for
any number of workers, any batch size and any order. Therefore

- images are squeezed to one fixed input size, without padding;
- on a GPU, the last batch is filled up to the size of all others, so that it runs on the same kernels;
- on a CPU, every image is a batch of its own, which is no slower;
- on a CPU, sums are not split among threads, see `_sums_unsplit`. With Intel's MKL the embedded network computes the
  same bits with one, two and four threads; toy networks with very narrow layers can differ in the last bit with four.

Exact ties go to the lower query, see `collavo.panoptic.postprocess`. Another kind of CPU or GPU may decide a near-tie
the other way.

Weights are read from safetensors only; no code of a checkpoint is run. Weights in half precision are widened to float32
when they are read, which changes none of their values.
"""

import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
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

from collavo.categories import categories_of_labels, joined, labels_by_id
from collavo.device import device_name, move_to_device, resolve_device
from collavo.embedded import SCENES, find_embedded
from collavo.errors import UserError
from collavo.hub import SAFETENSORS, find_checkpoint
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.postprocess import panoptic_from_logits
from collavo.panoptic.thresholds import THRESHOLD_PRESETS, MaskThresholds
from collavo.quiet import without_loading_report
from collavo.segmenters import DEFAULT_CHECKPOINT, unusable_checkpoint
from collavo.segmenters.familiarity import Familiarity, features_of
from schemas.categories import CategorySet

DEFAULT_INPUT_SIZE = 768
"""The published quality was measured at a short side of 800, though the processors on the hub shrink images to 384. 768
is the nearest size that Swin's windows of 12 divide at all strides; at 800 the backbone pads, and takes 25 % longer."""

_SIZE_DIVISOR = 32  # the coarsest stride; the masks then have exactly a quarter of the input's sides
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Mask2FormerSegmenter:
    """A panoptic Mask2Former checkpoint as a `collavo.segmenters.Segmenter`."""

    def __init__(
        self,
        checkpoint: str = DEFAULT_CHECKPOINT,
        *,
        input_size: int | tuple[int, int] | None = None,
        thresholds: MaskThresholds | None = None,
        device: str = "auto",
        batch_size: int = 8,
        categories: CategorySet | None = None,
        category_map: Mapping[str, str] | None = None,
    ) -> None:
        """Load the weights and move them to the device.

        Args:
            checkpoint: a Hugging Face model id, a folder with `config.json` and `model.safetensors`, or `scenes`, the
                embedded one.
            input_size: side of a square, or (height, width), in pixels; multiples of 32. None for the size that the
                checkpoint's configuration states as `input_size_hw`, else 768.
            thresholds: what makes a segment; None for the preset `scenes` with the embedded one, else `default`.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            batch_size: images per forward pass on a GPU, kept constant; a CPU always takes one.
            categories: the set that maps are made in; by default the checkpoint's own, or the built-in one where that
                has all classes of the checkpoint.
            category_map: names in that set of classes that the checkpoint calls otherwise; empty for those to leave
                out.

        Raises:
            UserError: for a checkpoint that is missing, incomplete, of another architecture, or with classes
                that the set lacks, and for an unusable input size.
            UserError: for a device that is missing or too small.
        """
        input_hw = None if input_size is None else _checked_size(input_size)
        self._thresholds = thresholds or THRESHOLD_PRESETS["scenes" if checkpoint == SCENES else "default"]
        self._device = resolve_device(device)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            # MKL reads this at its first use in the process, which may be to initialise weights before they are loaded.
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        self._batch_size = 1 if on_cpu else batch_size
        self._dtype = torch.float32 if on_cpu else torch.float16
        self._model, revision, folder = _load_model(checkpoint)
        self.categories, self._labels = _labels_in_set(checkpoint, self._model.config, categories, category_map)
        self._familiarity = Familiarity.load(folder)
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
            outputs = self.outputs(part)
            unfamiliar = self._unfamiliar(outputs)
            logits = zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
            for image, (classes, masks), foreign in zip(part, logits, unfamiliar, strict=False):
                found = panoptic_from_logits(
                    classes, masks, image.shape[:2], self._thresholds, self.categories, self._labels
                )
                maps.append(replace(found, unfamiliar=foreign))
        return maps

    @torch.inference_mode()
    def outputs(self, images: Sequence[np.ndarray]) -> Any:
        """Compute the network's outputs for at most a batch of images: class logits [batch, queries, classes + 1], mask
        logits [batch, queries, height / 4, width / 4], and its feature maps where they are looked at.

        The batch is filled up with black images, whose results come last.
        """
        pixels = np.zeros((self._batch_size, *self._input_hw, 3), dtype=np.uint8)
        for position, image in enumerate(images):
            pixels[position] = resize(image, self._input_hw)
        with self._arithmetic():
            return self._model(
                pixel_values=normalise(torch.from_numpy(pixels).to(self._device)), output_hidden_states=True
            )

    def _unfamiliar(self, outputs: Any) -> list[bool]:
        """Which pictures of a batch are unlike all that the checkpoint knows, where it says what it knows."""
        if self._familiarity is None:
            return [False] * self._batch_size
        distances = self._familiarity.distances(features_of(outputs))
        return [distance > 1 for distance in distances.tolist()]

    def _arithmetic(self) -> AbstractContextManager[None]:
        if self._device.type == "cpu":
            return _sums_unsplit()
        # As in the authors' training: weights in float32, products in float16. bfloat16 is eight times coarser, enough
        # to change masks and scores. Its range is not needed; `postprocess` refuses the result of an overflow.
        return torch.autocast(self._device.type, self._dtype)

    def _try_batch(self) -> None:
        """Run a batch of black images: if it fits, all later ones do, except for maps of very large images."""
        try:
            self.outputs([])
        except torch.OutOfMemoryError as error:
            height, width = self._input_hw
            raise UserError(
                f"device {self._device}: batches of {self._batch_size} at {height} x {width} pixels do not fit its "
                "memory; take smaller batches or a smaller input size"
            ) from error


def resize(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """Squeeze a uint8 RGB image to `size_hw` with Pillow's antialiased bilinear filter."""
    height, width = size_hw
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 [batch, height, width, 3] into float32 [batch, 3, height, width] with ImageNet's mean and deviation.

    Every published Mask2Former was trained with these. Pixels are scaled in float64 and go on in float32, as in
    transformers, for the same bits.
    """
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD)
    )
    return pixels.permute(0, 3, 1, 2).double().mul_(1 / 255).float().sub_(mean).div_(std)


_onednn_switch = threading.Lock()


@contextmanager
def _sums_unsplit() -> Iterator[None]:
    """Run convolutions without oneDNN, whose bits depend on the number of threads; MKL's, in strict mode, do not."""
    with _onednn_switch:  # it switches the whole process, in which threads may share a model
        was_enabled = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)[0]
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(_enabled=was_enabled, _fp32_precision=None)


def _checked_size(input_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if min(height, width) < _SIZE_DIVISOR or height % _SIZE_DIVISOR or width % _SIZE_DIVISOR:
        raise UserError(f"input size {height} x {width}: both sides must be multiples of {_SIZE_DIVISOR}, such as 768")
    return height, width


def _keep_group_norms_unsplit(model: nn.Module) -> None:
    """Store the input of group norms channel by channel; if it is stored pixel by pixel, torch splits the sums."""

    def by_channels(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.contiguous() for tensor in inputs)

    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(by_channels)


def _own_size_hw(config: Any) -> tuple[int, int]:
    """Read the size that a checkpoint was trained at; published ones do not state it."""
    height, width = getattr(config, "input_size_hw", (DEFAULT_INPUT_SIZE, DEFAULT_INPUT_SIZE))
    return _checked_size((height, width))


@contextmanager
def without_backbone_warnings() -> Iterator[None]:
    """Silence two warnings of transformers about Mask2Formers unlike the authors': that the backbone is no Swin, and
    that heads of 24 channels are slow in the authors' CUDA code, which is not used."""

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


def _load_model(checkpoint: str) -> tuple[Mask2FormerForUniversalSegmentation, str | None, Path]:
    """Load a model; return it, what tells its weights from others of the same name, and its folder."""
    try:
        embedded = find_embedded(checkpoint)
        folder = embedded.folder if embedded else find_checkpoint(checkpoint, [SAFETENSORS])
        with without_backbone_warnings(), without_loading_report():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            _check_architecture(checkpoint, config)
            loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are listed in `info`, and refused below
                output_loading_info=True,
            )
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise unusable_checkpoint(checkpoint, error) from error
    model, info = loaded
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise UserError(
            f"{checkpoint}: {len(absent)} weights are missing or have another shape, "
            f"first {absent[0]}; use a complete Mask2Former checkpoint"
        )
    in_cache = folder.parent.name == "snapshots"  # the hub's, where a folder is called by its commit
    revision = f"sha256:{embedded.sha256}" if embedded else folder.name if in_cache else None
    return model.eval(), revision, folder


def _check_architecture(checkpoint: str, config: transformers.PreTrainedConfig) -> None:
    if config.model_type != "mask2former":
        raise UserError(
            f"{checkpoint}: a {config.model_type} model, but mask2former is needed, such as {DEFAULT_CHECKPOINT}"
        )


def _labels_in_set(
    checkpoint: str, config: Any, categories: CategorySet | None, renamed: Mapping[str, str] | None
) -> tuple[CategorySet, np.ndarray | None]:
    """Return the set that maps are made in, and the label in it of each class of the model; None where these are the
    same."""
    id2label = {int(label): name for label, name in dict(config.id2label or {}).items()}
    own = categories_of_labels(id2label, checkpoint, categories)
    target = categories or joined(own)
    labels = labels_by_id(own, target, renamed)
    table = np.array([labels[category.category_id] for category in own])
    return target, None if np.array_equal(table, np.arange(len(target))) else table
