"""Universal segmentation networks through transformers; the default segmenter is one, a Mask2Former.

Whatever `AutoModelForUniversalSegmentation` loads will do: Mask2Former, MaskFormer, OneFormer, DETR with its mask head,
EoMT and EoMT-DINOv3. All of them give every query class logits and a mask, so one post-processing serves them all, ours
(`collavo.panoptic.postprocess`). How pictures go in is the checkpoint's own affair (`collavo.segmenters.framing`).

An image's result does not depend on its batch, nor on the number of threads, to the last bit. That matters: the decoder
attends to its own last mask, so a different bit can grow, and a score just above a threshold has to stay above it for
any number of workers, any batch size and any order. Therefore

- an input's size does not depend on other images: no batch is padded to its largest;
- on a GPU, the last batch is filled up to the size of all others, so that it runs on the same kernels;
- on a CPU, and where each image has an input size of its own, every image is a batch of its own;
- on a CPU, sums are not split among threads, see `_sums_unsplit`. With Intel's MKL the embedded network computes the
  same bits with one, two and four threads; toy networks with very narrow layers can differ in the last bit with four.

Exact ties go to the lower query, see `collavo.panoptic.postprocess`. Another kind of CPU or GPU may decide a near-tie
the other way.

Weights are read from safetensors only; no code of a checkpoint is run. Weights in half precision are widened to float32
when they are read, which changes none of their values.
"""

import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForUniversalSegmentation, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES

from collavo.categories import categories_of_checkpoint, joined, labels_by_id
from collavo.device import device_name, move_to_device, resolve_device
from collavo.embedded import SCENES, find_embedded
from collavo.errors import UserError, first_line
from collavo.hub import SAFETENSORS, find_checkpoint
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.postprocess import panoptic_from_logits
from collavo.panoptic.thresholds import THRESHOLD_PRESETS, MaskThresholds
from collavo.quiet import without_loading_report
from collavo.segmenters import DEFAULT_CHECKPOINT, unusable_checkpoint
from collavo.segmenters.familiarity import Familiarity, features_of
from collavo.segmenters.framing import Framing, framing_of
from schemas.categories import LEFT_OUT, CategorySet

_FAMILIES = tuple(sorted(MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES.keys() - {"videomt"}))
"""Model types that this module runs; VidEoMT takes videos."""


class UniversalSegmenter:
    """A checkpoint for universal segmentation as a `collavo.segmenters.Segmenter`."""

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
            input_size: side of a square, or (height, width), in pixels, into which images are squeezed; multiples of
                32. None for the checkpoint's own way, see `collavo.segmenters.framing`.
            thresholds: what makes a segment; None for the preset that the checkpoint's configuration states as
                `segmenter_preset`, else `scenes` with the embedded one and `default` with all others.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            batch_size: images per forward pass on a GPU, kept constant; one on a CPU, and where each image has an
                input size of its own.
            categories: the set that maps are made in; by default the checkpoint's own, or the built-in one where that
                has all classes of the checkpoint.
            category_map: names in that set of classes that the checkpoint calls otherwise; empty for those to leave
                out.

        Raises:
            UserError: for a checkpoint that is missing, incomplete, of another architecture, or with classes
                that the set lacks, and for an unusable input size.
            UserError: for a device that is missing or too small.
        """
        self._device = resolve_device(device)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            # MKL reads this at its first use in the process, which may be to initialise weights before they are loaded.
            os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        self._dtype = torch.float32 if on_cpu else torch.float16
        network = open_network(checkpoint, input_size, categories)
        self._model, self._framing, self._task = network.model, network.framing, network.task
        config = self._model.config
        preset = getattr(config, "segmenter_preset", "scenes" if checkpoint == SCENES else "default")
        self.thresholds = thresholds or THRESHOLD_PRESETS[preset]
        self._batch_size = 1 if on_cpu or self._framing.size_hw is None else batch_size
        self.categories, self._labels = _labels_in_set(network, categories, category_map)
        self._familiarity = Familiarity.load(network.folder)
        if on_cpu:
            _keep_group_norms_unsplit(self._model)
        move_to_device(self._model, self._device)
        self.facts: dict[str, Any] = {
            "segmenter": config.model_type,
            "checkpoint": checkpoint,
            "revision": network.revision,
            "input_size_hw": self._framing.size_hw and list(self._framing.size_hw),
            "input_edges": self._framing.edges and list(self._framing.edges),
            "thresholds": asdict(self.thresholds),
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
            outputs = self.outputs(part, with_features=self._familiarity is not None)
            unfamiliar = self._unfamiliar(outputs)
            logits = zip(*queries_of(outputs), strict=True)
            for image, (classes, masks), foreign in zip(part, logits, unfamiliar, strict=False):
                scaled_hw, input_hw = self._framing.sizes(image.shape[:2])
                found = panoptic_from_logits(
                    classes,
                    masks,
                    image.shape[:2],
                    self.thresholds,
                    self.categories,
                    self._labels,
                    padded_hw=None if scaled_hw == input_hw else (input_hw, scaled_hw),
                    transformers_hw=(384, 384) if self._model.config.model_type == "mask2former" else None,
                )
                maps.append(replace(found, unfamiliar=foreign))
        return maps

    @torch.inference_mode()
    def outputs(self, images: Sequence[np.ndarray], with_features: bool = False) -> Any:
        """Compute the network's outputs for at most a batch of images, filled up with black ones, which come last.

        Args:
            with_features: whether the outputs hold the feature maps that `collavo.segmenters.familiarity` looks at.
        """
        pixels = self._framing.pixels(images, self._batch_size)
        inputs: dict[str, Any] = {
            name: tensor.expand(len(pixels), -1).to(self._device) for name, tensor in self._task.items()
        }
        if with_features:
            inputs["output_hidden_states"] = True
        with self._arithmetic():
            return self._model(
                pixel_values=self._framing.normalise(torch.from_numpy(pixels).to(self._device)), **inputs
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
            height, width = self._framing.pixels([], 1).shape[1:3]
            raise UserError(
                f"device {self._device}: batches of {self._batch_size} at {height} x {width} pixels do not fit its "
                "memory; take smaller batches or a smaller input size"
            ) from error


def queries_of(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a network's class logits [batch, queries, classes + 1] and mask logits [batch, queries, height, width]."""
    if "pred_masks" in outputs:  # DETR's own names
        return outputs.logits, outputs.pred_masks
    return outputs.class_queries_logits, outputs.masks_queries_logits


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


def _keep_group_norms_unsplit(model: nn.Module) -> None:
    """Store the input of group norms channel by channel; if it is stored pixel by pixel, torch splits the sums."""

    def by_channels(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.contiguous() for tensor in inputs)

    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(by_channels)


@contextmanager
def without_backbone_warnings() -> Iterator[None]:
    """Silence a warning of transformers about networks unlike the authors': that heads of 24 channels are slow in their
    CUDA code, which is not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"You'd better set embed_dim \(d_model\)", UserWarning)
        yield


class Network(NamedTuple):
    """A checkpoint as it was opened, on the CPU."""

    model: Any
    folder: Path
    revision: str | None
    """What tells its weights from others of the same name."""

    framing: Framing
    categories: CategorySet
    """Its own; ids are the numbers of its classes."""

    task: dict[str, torch.Tensor]
    """Inputs beside the pixels, [1, values] each."""


def open_network(
    checkpoint: str, input_size: int | tuple[int, int] | None = None, known_set: CategorySet | None = None
) -> Network:
    """Load a checkpoint with all that it says of itself; see `UniversalSegmenter` for arguments and errors.

    Args:
        known_set: as of `categories_of_checkpoint`.
    """
    model, revision, folder = _load_model(checkpoint)
    framing = framing_of(model.config, folder, input_size)
    own = categories_of_checkpoint(folder, checkpoint, known_set)
    count = model.config.num_labels
    if odd := [each for each in own if not 0 <= each.category_id < count]:
        raise UserError(
            f"{checkpoint}: class {odd[0].name!r} has number {odd[0].category_id}, but the network numbers its {count} "
            "classes from 0; correct 'id2label' in config.json, or the ids in categories.json"
        )
    return Network(model, folder, revision, framing, own, _task_inputs(checkpoint, folder, model.config))


def _load_model(checkpoint: str) -> tuple[Any, str | None, Path]:
    """Load a model; return it, what tells its weights from others of the same name, and its folder."""
    try:
        embedded = find_embedded(checkpoint)
        folder = embedded.folder if embedded else find_checkpoint(checkpoint, [SAFETENSORS])
        with without_backbone_warnings(), without_loading_report():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if config.model_type not in _FAMILIES:
                raise UserError(f"a {config.model_type} model, but one of {', '.join(_FAMILIES)} is needed")
            if config.model_type == "oneformer":  # in training, it asks for texts beside pictures
                config.is_training = False
            model, info = AutoModelForUniversalSegmentation.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are listed in `info`, and refused below
                output_loading_info=True,
            )
    except (UserError, ImportError) as error:  # a DETR may need timm
        raise UserError(f"{checkpoint}: {first_line(error)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise unusable_checkpoint(checkpoint, error) from error
    except Exception as error:  # for a config.json that was edited by hand, transformers raises a dozen types
        said = f"config.json makes no model: {type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise unusable_checkpoint(checkpoint, ValueError(said)) from error
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise UserError(
            f"{checkpoint}: {len(absent)} weights are missing or have another shape, "
            f"first {absent[0]}; use a complete checkpoint for universal segmentation"
        )
    in_cache = folder.parent.name == "snapshots"  # the hub's, where a folder is called by its commit
    revision = f"sha256:{embedded.sha256}" if embedded else folder.name if in_cache else None
    return model.eval(), revision, folder


def _task_inputs(checkpoint: str, folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Tokenize what a OneFormer has to be told, the task; other networks have but one."""
    if config.model_type != "oneformer":
        return {}
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # transformers would make do
        raise UserError(
            f"{checkpoint}: a OneFormer is told its task in words, and its tokenizer is missing; put its "
            "vocab.json and merges.txt beside the weights"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens = tokenizer(
        "the task is panoptic",
        padding="max_length",
        max_length=config.task_seq_len,
        truncation=True,
        return_tensors="pt",
    )
    return {"task_inputs": tokens["input_ids"] * tokens["attention_mask"]}


def _labels_in_set(
    network: Network, categories: CategorySet | None, renamed: Mapping[str, str] | None
) -> tuple[CategorySet, np.ndarray | None]:
    """Return the set that maps are made in, and the label in it of each class of the model; None where these are the
    same."""
    target = categories or joined(network.categories)
    labels = labels_by_id(network.categories, target, renamed)
    # A class without a name, as DETR's numbers have between COCO's, is none.
    table = np.array([labels.get(number, LEFT_OUT) for number in range(network.model.config.num_labels)])
    return target, None if np.array_equal(table, np.arange(len(target))) else table
