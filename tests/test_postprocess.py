from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from collavo.errors import Rejected
from collavo.panoptic import postprocess
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.postprocess import panoptic_from_logits
from collavo.panoptic.thresholds import THRESHOLD_PRESETS, MaskThresholds
from schemas.categories import COCO_PANOPTIC

DEFAULT, PAPER = THRESHOLD_PRESETS["default"], THRESHOLD_PRESETS["paper"]
LENIENT = replace(DEFAULT, min_class_score=0.5, min_area=0)
PERSON, SKY, GRASS = 0, 119, 125


def logits_of(*queries: tuple[int, float, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with which each (label, class score, mask probabilities) comes out of softmax and sigmoid."""
    class_logits = torch.full((len(queries), 134), -40.0)
    for query, (label, score, _) in enumerate(queries):
        class_logits[query, label], class_logits[query, 133] = np.log(score), np.log1p(-score)
    masks = np.stack([mask for *_, mask in queries])
    return class_logits, torch.from_numpy(masks).float().logit(eps=1e-6)


def box(y: int, x: int, height: int, width: int, probability: float = 0.999) -> np.ndarray:
    mask = np.full((8, 8), 0.001)
    mask[y : y + height, x : x + width] = probability
    return mask


def random_logits(seed: int, sure: int, queries: int, mask_hw: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blobs with soft, noisy edges; the first `sure` queries name a class, with any certainty from 0.3 to 1."""
    random = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(queries, 134, generator=random)
    class_logits[:, 133] += 12
    for query in range(sure):
        label = torch.randint(0, 133, (1,), generator=random)
        class_logits[query, 133] -= 12
        class_logits[query, label] += 5 + 8 * torch.rand(1, generator=random)
    blobs = 12 * torch.randn(queries, 1, 4, 4, generator=random) - 12
    masks = functional.interpolate(blobs, size=mask_hw, mode="bicubic")[:, 0]
    return class_logits, masks + 0.3 * torch.randn(queries, *mask_hw, generator=random)


def by_transformers(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size_hw: tuple[int, int], **arguments: object
) -> tuple[np.ndarray, list[dict]]:
    outputs = SimpleNamespace(class_queries_logits=class_logits[None], masks_queries_logits=mask_logits[None])
    arguments = {"threshold": 0.5, "mask_threshold": 0.95, "label_ids_to_fuse": (), **arguments}
    (result,) = Mask2FormerImageProcessorPil().post_process_panoptic_segmentation(
        outputs, target_sizes=[size_hw], **arguments
    )
    return result["segmentation"].numpy(), result["segments_info"]


def segment_ids(panoptic: PanopticMap) -> np.ndarray:
    return np.array([0, *(segment.id for segment in panoptic.segments)])[panoptic.index_map]


def labelled_areas(panoptic: PanopticMap) -> list[tuple[int, int]]:
    return [(segment.label, segment.area) for segment in panoptic.segments]


def assert_as_transformers(class_logits: torch.Tensor, mask_logits: torch.Tensor, size_hw: tuple[int, int]) -> int:
    ids, infos = by_transformers(class_logits, mask_logits, size_hw)
    ours = panoptic_from_logits(class_logits, mask_logits, size_hw, PAPER)
    assert np.array_equal(segment_ids(ours), np.maximum(ids, 0))  # transformers marks an empty result with -1
    found = sorted((segment.id, segment.label, round(segment.score or 0, 6)) for segment in ours.segments)
    assert found == [(info["id"], info["label_id"], info["score"]) for info in infos]
    return len(found)


@pytest.mark.parametrize("size_hw", [(35, 35), (120, 161), (384, 384), (7, 200)])
@pytest.mark.parametrize("mask_hw", [(24, 24), (25, 37)])
def test_paper_preset_equals_transformers_bit_for_bit(size_hw, mask_hw):
    segments = 0
    for seed in range(12):
        # 3 queries on one thread, and targets of at most 128 rows and columns, run on other kernels of torch.
        class_logits, mask_logits = random_logits(seed, sure=seed, queries=seed + 3, mask_hw=mask_hw)
        segments += assert_as_transformers(class_logits, mask_logits, size_hw)
    assert segments > 10


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_paper_preset_settles_exact_ties_as_transformers_does(data):
    queries = data.draw(st.integers(1, 6))
    coarse = st.integers(-3, 3)  # so few values that queries tie
    class_logits = torch.full((queries, 134), -20.0)
    for query in range(queries):
        class_logits[query, data.draw(st.sampled_from([PERSON, SKY, 133]))] = 4 * data.draw(coarse)
    masks = data.draw(st.lists(coarse, min_size=queries * 9, max_size=queries * 9))
    mask_logits = 3.0 * torch.tensor(masks).reshape(queries, 3, 3)
    assert_as_transformers(class_logits, mask_logits, data.draw(st.sampled_from([(1, 1), (10, 14), (90, 60)])))


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("sure, size_hw", [(20, (35, 35)), (3, (200, 300))])
def test_paper_preset_settles_rounding_ties_as_transformers_does(sure, size_hw, one_thread):
    """Masks that differ in their last bits show which of torch's kernels were at work, and what each ran on."""
    random = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(1, 25, 37, generator=random)
    mask_logits = base * (1 + 1e-7 * torch.randn(20, 25, 37, generator=random))
    class_logits = torch.full((20, 134), -20.0)
    class_logits[:sure, PERSON], class_logits[sure:, 133] = 20.0, 20.0
    ids, _ = by_transformers(class_logits, mask_logits, size_hw, overlap_mask_area_threshold=0.0)
    ours = panoptic_from_logits(class_logits, mask_logits, size_hw, replace(PAPER, overlap=0.0))
    assert len(ours.segments) == sure
    assert np.array_equal(segment_ids(ours), ids)


def test_the_default_thresholds_are_those_that_docs_and_peers_state():
    assert MaskThresholds(min_class_score=0.8, mask_probability=0.5, overlap=0.8, min_area=16) == DEFAULT


def test_paper_preset_makes_large_maps_in_bands(monkeypatch):
    """Where all masks at the picture's size are gigabytes, in parts; a probability may differ in its last bit there."""
    class_logits, mask_logits = random_logits(3, sure=12, queries=15, mask_hw=(25, 37))
    at_once = panoptic_from_logits(class_logits, mask_logits, (240, 321), PAPER)
    monkeypatch.setattr(postprocess, "_MOST_ELEMENTS_AT_ONCE", 0)
    in_bands = panoptic_from_logits(class_logits, mask_logits, (240, 321), PAPER)
    assert [s.label for s in in_bands.segments] == [s.label for s in at_once.segments]
    assert len(at_once.segments) > 1
    assert (segment_ids(in_bands) != segment_ids(at_once)).mean() < 1e-4


def test_paper_preset_compares_at_the_thresholds_as_transformers_does():
    class_logits, mask_logits = torch.full((1, 134), -1e4), torch.full((1, 8, 8), 100.0)
    class_logits[0, [PERSON, 133]] = 0.0  # the lower class wins
    thresholds = replace(PAPER, min_class_score=0.4)
    for mask_threshold in (0.5, np.nextafter(np.float32(0.5), np.float32(1)).item()):  # the bid is 0.5 exactly
        _, infos = by_transformers(class_logits, mask_logits, (8, 8), threshold=0.4, mask_threshold=mask_threshold)
        ours = panoptic_from_logits(
            class_logits, mask_logits, (8, 8), replace(thresholds, mask_probability=mask_threshold)
        )
        assert len(ours.segments) == len(infos) == (mask_threshold == 0.5)


def test_paper_preset_keeps_four_fifths_of_a_mask_and_fills_what_underflows_as_transformers_does():
    rest = 0.999 - box(0, 0, 1, 5) + 0.001
    mostly_kept = (PERSON, 0.97, box(0, 0, 1, 5, 0.9999))
    assert assert_as_transformers(*logits_of(mostly_kept, (GRASS, 0.99, box(0, 0, 1, 1)), (SKY, 0.99, rest)), (8, 8))
    class_logits, mask_logits = logits_of((PERSON, 0.99, box(0, 0, 8, 4)))
    mask_logits[:, :, 4:] = -300.0  # sigmoid gives 0
    assert assert_as_transformers(class_logits, mask_logits, (8, 8)) == 1


def literal_reading(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds
) -> list[tuple[int, np.ndarray]]:
    """The documented rules, one after the other, for one query after the other: (label, mask) of every segment."""
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = [q for q in range(len(labels)) if labels[q] < 133 and scores[q] > thresholds.min_class_score]
    probabilities = {
        q: functional.interpolate(mask_logits[q][None, None], size=size_hw, mode="bilinear")[0, 0].sigmoid().numpy()
        for q in kept
    }
    own = {q: probabilities[q] > thresholds.mask_probability for q in kept}
    bids = {q: np.where(own[q], probabilities[q] * scores[q].numpy(), 0) for q in kept}
    segments: dict[object, tuple[int, np.ndarray]] = {}
    for q in kept:
        won = own[q].copy()
        for rival in kept:
            won &= (bids[q] > bids[rival]) | ((bids[q] == bids[rival]) & (q <= rival))
        if won.any() and won.sum() / own[q].sum() > thresholds.overlap:
            label = int(labels[q])
            key = q if COCO_PANOPTIC[label].is_thing or not thresholds.fuse_stuff else f"stuff {label}"
            before = segments.get(key, (label, np.zeros(size_hw, dtype=bool)))[1]
            segments[key] = (label, before | won)
    return [(label, mask) for label, mask in segments.values() if mask.sum() >= thresholds.min_area]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sure=st.integers(0, 9),
    size_hw=st.sampled_from([(16, 16), (64, 32), (32, 128), (8, 4)]),
    min_class_score=st.sampled_from([0.4, 0.8]),
    mask_probability=st.sampled_from([0.0, 0.5, 0.9]),
    overlap=st.sampled_from([0.0, 0.5, 0.8]),
    min_area=st.sampled_from([0, 16, 400]),
    fuse_stuff=st.booleans(),
)
def test_result_is_what_the_documented_rules_say(seed, sure, size_hw, **knobs):
    thresholds = MaskThresholds(**knobs)
    class_logits, mask_logits = random_logits(seed, sure=sure, queries=sure + 2, mask_hw=(16, 16))
    mask_logits = (mask_logits * 32).round() / 32  # at these sizes every interpolated value is exact in float32
    ours = panoptic_from_logits(class_logits, mask_logits, size_hw, thresholds)
    expected = literal_reading(class_logits, mask_logits, size_hw, thresholds)
    assert len(ours.segments) == len(expected)
    labels = np.array([-1, *(segment.label for segment in ours.segments)])
    for label, mask in expected:
        assert (labels[ours.index_map[mask]] == label).all()
        assert len(np.unique(ours.index_map[mask])) == 1
    assert (ours.index_map > 0).sum() == sum(mask.sum() for _, mask in expected)


@pytest.mark.parametrize("size_hw", [(35, 35), (333, 501), (97, 12), (1, 1)])
def test_masks_are_sampled_where_torch_samples_them(size_hw):
    class_logits, mask_logits = random_logits(3, sure=1, queries=1, mask_hw=(48, 57))
    class_logits[0, PERSON] = 40.0
    ours = panoptic_from_logits(class_logits, mask_logits + 6, size_hw, LENIENT)
    expected = functional.interpolate(mask_logits[None] + 6, size=size_hw, mode="bilinear")[0, 0] > 0
    assert ((ours.index_map > 0) == expected.numpy()).mean() > 0.9999  # all but what rounding moves across 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), band_elements=st.sampled_from([1, 5000, 1 << 24]))
def test_order_of_queries_and_height_of_bands_change_nothing(seed, band_elements):
    class_logits, mask_logits = random_logits(seed, sure=9, queries=12, mask_hw=(16, 16))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    one = panoptic_from_logits(class_logits, mask_logits, (61, 83), LENIENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(postprocess._BAND_ELEMENTS, "cpu", band_elements)
        other = panoptic_from_logits(class_logits[order], mask_logits[order], (61, 83), LENIENT)
    assert np.array_equal(one.index_map, other.index_map)
    assert [replace(s, id=0) for s in one.segments] == [replace(s, id=0) for s in other.segments]


def test_persons_are_not_merged_when_stuff_between_them_is_fused():
    """transformers' counter falls back to the fused segment's id, and the next person gets an id that is taken."""
    queries = logits_of(
        (SKY, 0.9, box(0, 0, 2, 4)),
        (PERSON, 0.9, box(2, 0, 6, 2)),
        (PERSON, 0.9, box(2, 2, 6, 2)),
        (SKY, 0.9, box(0, 4, 2, 4)),
        (PERSON, 0.9, box(2, 4, 6, 4)),
    )
    _, infos = by_transformers(*queries, (8, 8), mask_threshold=0.5, label_ids_to_fuse={SKY})
    assert [info["id"] for info in infos] == [1, 2, 3, 1, 2]
    ours = panoptic_from_logits(*queries, (8, 8), LENIENT)
    assert labelled_areas(ours) == [(PERSON, 24), (PERSON, 12), (PERSON, 12), (SKY, 16)]


@pytest.mark.parametrize("preset", THRESHOLD_PRESETS)
@pytest.mark.parametrize(
    "query",
    [
        (PERSON, 0.4, box(0, 0, 8, 8)),  # no query is sure of a class
        (PERSON, 0.9, box(0, 0, 0, 0)),  # its mask is nowhere probable
    ],
)
def test_nothing_found_is_a_map_of_zeros_without_segments(preset, query):
    ours = panoptic_from_logits(*logits_of(query), (10, 12), THRESHOLD_PRESETS[preset])
    assert ours.segments == ()
    assert ours.index_map.dtype == np.uint8
    assert ours.index_map.shape == (10, 12)
    assert not ours.index_map.any()


@pytest.mark.parametrize("broken", ["class", "mask"])
def test_overflowed_logits_are_an_error_and_not_an_empty_map(broken):
    class_logits, mask_logits = logits_of((PERSON, 0.9, box(0, 0, 8, 8)))
    (class_logits if broken == "class" else mask_logits)[0, 0] = float("nan")
    with pytest.raises(Rejected, match=f"{broken} logits"):
        panoptic_from_logits(class_logits, mask_logits, (8, 8), DEFAULT)


@pytest.mark.parametrize("knob, value", [("min_class_score", 50), ("mask_probability", -0.1), ("min_area", -1)])
def test_impossible_thresholds_are_refused_by_name(knob, value):
    with pytest.raises(ValueError, match=f"{knob} is {value}"):
        replace(DEFAULT, **{knob: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", THRESHOLD_PRESETS)
def test_gpu_and_cpu_draw_the_same_map(preset):
    logits = random_logits(1, sure=40, queries=100, mask_hw=(96, 96))
    on_cpu = panoptic_from_logits(*logits, (480, 640), THRESHOLD_PRESETS[preset])
    on_gpu = panoptic_from_logits(*(tensor.cuda() for tensor in logits), (480, 640), THRESHOLD_PRESETS[preset])
    assert [s.label for s in on_gpu.segments] == [s.label for s in on_cpu.segments]
    assert (on_gpu.index_map == on_cpu.index_map).mean() > 0.9999


def test_stuff_that_several_queries_find_is_one_segment_with_the_best_of_their_scores() -> None:
    logits = logits_of((SKY, 0.7, box(0, 0, 4, 8)), (PERSON, 0.8, box(6, 0, 2, 8)), (SKY, 0.9, box(4, 0, 2, 8)))
    sky, person = sorted(panoptic_from_logits(*logits, (8, 8), LENIENT).segments, key=lambda s: -s.label)
    assert (sky.label, sky.area, person.area) == (SKY, 48, 16)
    assert (sky.score, person.score) == (pytest.approx(0.9, abs=1e-3), pytest.approx(0.8, abs=1e-3))
