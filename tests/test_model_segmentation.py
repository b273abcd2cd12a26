"""Models under RunInference: how batches are bounded, and what becomes of those that fail."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import apache_beam as beam
import numpy as np
import pytest
import torch
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from collavo.errors import UserError
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from pipelines.model_segmentation import BatchSegmenter, SegmenterHandler
from pipelines.records import ImageTask, Input, LoadedImage, Mention, SegmentedImage

BAD = 13


class Painter:
    """A segmenter that calls every picture one person, cannot hold many pixels, and fails on some of them.

    What happens in this process is written down on the class, for a runner works on copies.
    """

    loads = 0
    batches: ClassVar[list[list[int]]] = []
    """Pixels per image of every batch seen."""

    def __init__(self, capacity: int = 1 << 40) -> None:
        type(self).loads += 1
        self._capacity = capacity
        self.facts = {"segmenter": "painter", "capacity": capacity}

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        pixels = [image.shape[0] * image.shape[1] for image in images]
        self.batches.append(pixels)
        if sum(pixels) > self._capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if any((image == BAD).all() for image in images):
            raise ValueError("non-finite logits")
        return [build_panoptic_map(np.ones(i.shape[:2], np.uint8), [SegmentInfo(1, 0, score=0.5)]) for i in images]


@pytest.fixture(autouse=True)
def _forget() -> None:
    Painter.loads = 0
    Painter.batches = []


def loaded(name: str, size_wh: tuple[int, int] = (4, 2), value: int = 0) -> LoadedImage:
    mentions = tuple(Mention(Input(source, name), f"{name}.jpg", f"/d/{name}.jpg") for source in ("llava", "folder"))
    rgb = np.full((size_wh[1], size_wh[0], 3), value, dtype=np.uint8)
    return LoadedImage(ImageTask(mentions), f"/d/{name}.jpg", b"", size_wh, 1, rgb, {})


def run(handler: SegmenterHandler, images: Sequence[LoadedImage]) -> list:
    return list(handler.run_inference(images, handler.load_model()))


def test_every_image_of_a_batch_gets_its_map_and_the_segmenters_facts():
    outcomes = run(SegmenterHandler(Painter, 8, 1 << 40), [loaded("a", (4, 2)), loaded("b", (3, 5))])
    assert [outcome.image.path for outcome in outcomes] == ["/d/a.jpg", "/d/b.jpg"]
    assert [outcome.panoptic.index_map.shape for outcome in outcomes] == [(2, 4), (5, 3)]
    assert all(json.loads(outcome.segmenter) == Painter().facts for outcome in outcomes)
    assert all(outcome.image.seconds["segment"] > 0 for outcome in outcomes)


def test_a_gpu_without_memory_for_any_image_ends_the_job_and_costs_no_picture():
    """As where each batch is filled up to one size, so that one image needs what eight do."""
    with pytest.raises(UserError, match=r"^the GPU has no memory left \(CUDA out of memory\); --resume with a smaller"):
        run(SegmenterHandler(partial(Painter, capacity=0), 8, 1 << 40), [loaded(str(i)) for i in range(8)])
    assert [len(batch) for batch in Painter.batches] == [8, 1, 1]


def test_threads_that_bring_batches_at_once_need_the_memory_of_one_and_cost_no_picture():
    """As on Dataflow, where a process works on several bundles."""

    class Gpu(Painter):
        held = 0

        def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
            type(self).held += len(images)
            try:
                time.sleep(0.01)
                if self.held > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().segment(images)
            finally:
                type(self).held -= len(images)

    model = BatchSegmenter(Gpu)
    batches = [[np.zeros((2, 2, 3), np.uint8)] * 2] * 12
    with ThreadPoolExecutor(12) as threads:
        outcomes = [outcome for some, _ in threads.map(model.segment_each, batches) for outcome in some]
    assert len(outcomes) == 24 and all(isinstance(outcome, PanopticMap) for outcome in outcomes)


def test_an_image_too_large_by_itself_is_rejected_alone():
    images = [loaded("a"), loaded("large", (100, 100)), loaded("b")]
    a, large, b = run(SegmenterHandler(partial(Painter, capacity=100), 8, 1 << 40), images)
    assert isinstance(a, SegmentedImage) and isinstance(b, SegmentedImage)
    assert {(r.id, r.source, r.stage, r.reason, r.detail) for r in large} == {
        ("large", source, "segment", "segmenter_failed", "/d/large.jpg: OutOfMemoryError: CUDA out of memory")
        for source in ("llava", "folder")
    }


@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_bad_image_is_rejected_alone(place):
    images = [loaded(str(i), value=BAD if i == place else 0) for i in range(7)]
    outcomes = run(SegmenterHandler(Painter, 8, 1 << 40), images)
    assert [isinstance(outcome, list) for outcome in outcomes] == [i == place for i in range(7)]
    assert {reject.detail for reject in outcomes[place]} == {f"/d/{place}.jpg: ValueError: non-finite logits"}


def test_a_bad_image_in_a_batch_that_exhausts_the_memory_is_rejected_alone():
    images = [loaded(str(i), value=BAD if i == 5 else 0) for i in range(9)]
    outcomes = run(SegmenterHandler(partial(Painter, capacity=8 * 4), 16, 1 << 40), images)
    assert [isinstance(outcome, list) for outcome in outcomes] == [i == 5 for i in range(9)]


def test_an_interruption_is_not_taken_for_a_bad_image():
    class Interrupted(Painter):
        def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BatchSegmenter(Interrupted).segment_each([np.zeros((2, 2, 3), np.uint8)])


def test_a_gpu_that_is_lost_ends_the_job_and_costs_no_picture():
    class Lost(Painter):
        def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")

    with pytest.raises(UserError, match=r"^CUDA error: an illegal memory access was encountered: the GPU can no"):
        BatchSegmenter(Lost).segment_each([np.zeros((2, 2, 3), np.uint8)] * 2)


def run_pipeline(handler: SegmenterHandler, images: Sequence[LoadedImage], *options: str) -> None:
    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([*options])) as pipeline:
        from apache_beam.ml.inference.base import RunInference

        _ = pipeline | beam.Create(images) | beam.Reshuffle() | RunInference(handler)


def test_batches_are_bounded_by_count_and_by_pixels():
    sizes_wh = [(10, 10)] * 20 + [(40, 10)] * 6 + [(100, 30), (1, 1), (2000, 1)]
    images = [loaded(str(i), size_wh) for i, size_wh in enumerate(sizes_wh)]
    run_pipeline(SegmenterHandler(Painter, batch_size=5, max_batch_pixels=1000), images)
    assert sorted(pixels for batch in Painter.batches for pixels in batch) == sorted(w * h for w, h in sizes_wh)
    for batch in Painter.batches:
        assert len(batch) <= 5
        assert sum(batch) <= 1000 or len(batch) == 1  # a larger image runs by itself
    assert max(map(len, Painter.batches)) == 5
    assert [3000] in Painter.batches and [2000] in Painter.batches


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_a_process_loads_the_model_once(mode):
    options = [f"--direct_running_mode={mode}", f"--direct_num_workers={1 if mode == 'in_memory' else 3}"]
    run_pipeline(SegmenterHandler(Painter, 2, 1 << 40), [loaded(str(i)) for i in range(12)], *options)
    assert Painter.loads == 1
    assert sum(map(len, Painter.batches)) == 12
