"""Panoptic models under Beam's RunInference.

The handler loads one segmenter per worker process (or `model_copies` per machine, shared) when the first image needs
it, and batches by count and by pixels at once. A batch that fails is taken apart, so that a bad image is rejected
alone. Where the GPU has no memory for any image, none is at fault, and the job stops.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from apache_beam.ml.inference.base import ModelHandler

from collavo.errors import Rejected, UserError, first_line
from collavo.panoptic.maps import PanopticMap
from collavo.segmenters import Segmenter
from pipelines.records import LoadedImage, Segmented, SegmentedImage

# A batch is full at this weight; an image weighs its share of the batch size or of the pixel bound, whichever is more.
_FULL_BATCH = 1_000_000


class BatchSegmenter:
    """A segmenter that gives every image of a batch its own outcome.

    It is loaded by the first batch: where annotations serve all images, it need not even be there. It sees one batch at
    a time. Its method takes and returns plain values, so that Beam can share it between the processes of a machine.

    Args:
        load: makes the segmenter.
    """

    def __init__(self, load: Callable[[], Segmenter]) -> None:
        self._load = load
        self._segmenter: Segmenter | None = None
        self._lock = threading.Lock()

    def segment_each(self, images: Sequence[np.ndarray]) -> tuple[list[PanopticMap | Rejected], str]:
        """Return a map for each image, or why there is none, and the segmenter's facts as JSON."""
        with self._lock:  # a worker of Dataflow has a dozen threads that bring batches, and a GPU memory for one batch
            self._segmenter = self._segmenter or self._load()
            return self._outcomes(self._segmenter, images), json.dumps(self._segmenter.facts, sort_keys=True)

    def _outcomes(self, segmenter: Segmenter, images: Sequence[np.ndarray]) -> list[PanopticMap | Rejected]:
        try:
            return list(segmenter.segment(images))
        except Exception as error:
            if _kind(error) == "AcceleratorError" or "CUDA error" in str(error):
                # From then on, CUDA refuses this process everything. No picture is at fault, so none is left out.
                line = f"{first_line(error)}: the GPU can no longer be used; --resume goes on with what was segmented"
                raise UserError(line, exit_status=1) from error
            kind, said = _kind(error), str(error)
            failure = error.with_traceback(None) if isinstance(error, Rejected) else None
        # Outside the handler, whose traceback keeps the failed attempt's tensors alive.
        if len(images) > 1:
            return [outcome for image in images for outcome in self._outcomes(segmenter, [image])]
        if kind == "OutOfMemoryError":  # by name, for this module loads no torch
            self._check_memory(segmenter)
        return [failure or Rejected("segmenter_failed", f"{kind}: {said}")]

    def _check_memory(self, segmenter: Segmenter) -> None:
        """Make sure that a tiny image fits where another one did not.

        Raises:
            UserError: with exit status 1, if it does not: a network's input has one size, whatever the image's.
        """
        try:
            segmenter.segment([np.zeros((8, 8, 3), dtype=np.uint8)])
        except Exception as error:
            if _kind(error) == "OutOfMemoryError":
                line = (
                    f"the GPU has no memory left ({first_line(error)}); --resume with a smaller --batch_size, or once "
                    "nothing else runs on it, goes on with what was segmented"
                )
                raise UserError(line, exit_status=1) from error


class SegmenterHandler(ModelHandler[LoadedImage, Segmented, BatchSegmenter]):
    """Runs a panoptic segmenter on batches of loaded images.

    Args:
        load: makes the segmenter; called once per worker process at most, it must pickle.
        batch_size: images in a batch at most.
        max_batch_pixels: pixels in a batch at most; a single larger image makes a batch of its own.
        model_copies: copies per machine, shared by its processes; None for one per process.
    """

    def __init__(
        self, load: Callable[[], Segmenter], batch_size: int, max_batch_pixels: int, model_copies: int | None = None
    ) -> None:
        super().__init__(
            min_batch_size=_FULL_BATCH,
            max_batch_size=_FULL_BATCH,
            element_size_fn=partial(_batch_weight, batch_size, max_batch_pixels),
            model_copies=model_copies,
        )
        self._load = load

    def load_model(self) -> BatchSegmenter:
        """Make what loads the segmenter, once per process or copy."""
        return BatchSegmenter(self._load)

    def run_inference(
        self, batch: Sequence[LoadedImage], model: BatchSegmenter, inference_args: dict[str, Any] | None = None
    ) -> Iterable[Segmented]:
        """Segment a batch; each image gets its map or its rejects."""
        start = time.perf_counter()
        outcomes, facts = model.segment_each([_rgb(image) for image in batch])
        for image in batch:
            image.seconds["segment"] = (time.perf_counter() - start) / len(batch)
        return [
            image.task.rejects("segment", outcome)
            if isinstance(outcome, Rejected)
            else SegmentedImage(image, outcome, facts)
            for image, outcome in zip(batch, outcomes, strict=True)
        ]

    def get_num_bytes(self, batch: Sequence[LoadedImage]) -> int:
        """Count the bytes of the pixels, for Beam's metrics."""
        return sum(_rgb(image).nbytes for image in batch)


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _batch_weight(batch_size: int, max_batch_pixels: int, image: LoadedImage) -> int:
    """Weigh an image as its share of a full batch."""
    pixels = image.size_wh[0] * image.size_wh[1]
    return max(_FULL_BATCH // batch_size, min(_FULL_BATCH * pixels // max_batch_pixels, _FULL_BATCH))


def _rgb(image: LoadedImage) -> np.ndarray:
    assert image.rgb is not None  # images that go to a model are read with their pixels
    return image.rgb
