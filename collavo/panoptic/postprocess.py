"""Mask-classification logits to panoptic maps, on the device that holds them.

A model of the Mask2Former kind gives every query class logits and a low-resolution mask. Queries that are sure of a
class compete for each pixel with class score times mask probability; what a query wins is a segment, if enough of its
mask is left. One image at a time, only the surviving queries are upsampled, and what crosses to the host is the map of
winners and a few numbers per query: three waits per image, none per query.

Where two queries have exactly equal values at a pixel, the lower query index wins it. Nothing else depends on the order
of the queries.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from collavo.panoptic.maps import PanopticError, PanopticMap, SegmentInfo, build_panoptic_map
from collavo.panoptic.thresholds import MaskThresholds
from schemas.categories import CATEGORIES

_GPU_CHUNK_BYTES = 1 << 28

_TRANSFORMERS_HW = (384, 384)


@torch.inference_mode()
def panoptic_from_logits(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds
) -> PanopticMap:
    """Turn the queries of one image into its panoptic map.

    Args:
        class_logits: float [queries, classes + 1]; classes are labels 0..132, the last column is "no object".
        mask_logits: float [queries, height, width] on the same device, at any resolution.
        size_hw: size of the map, that of the upright image.
        thresholds: see `MaskThresholds`.

    Returns:
        the map; without segments where no query qualifies. A fused segment carries the best score of its parts.

    Raises:
        PanopticError: `non_finite_logits` where logits are NaN or infinite, as after an overflow in half precision.
    """
    queries, labels, scores = _confident_queries(class_logits, thresholds.min_class_score)
    if not len(queries):
        return build_panoptic_map(np.zeros(size_hw, dtype=np.uint8), [])
    kept = mask_logits[torch.from_numpy(queries).to(mask_logits.device)].float()
    if not kept.isfinite().all():
        raise PanopticError("non_finite_logits", "the segmenter's mask logits are not finite numbers")
    winners, own_areas = _compete(kept, torch.from_numpy(scores).to(kept.device), size_hw, thresholds)
    areas = np.bincount(winners.ravel(), minlength=len(queries) + 1)[1:]
    # float32, as transformers divides: 4 / 5 is above 0.8 in it, and not in float64.
    left = areas.astype(np.float32) / np.maximum(own_areas, 1).astype(np.float32)
    survivors = np.flatnonzero((areas > 0) & (own_areas > 0) & (left.astype(np.float64) > thresholds.overlap))
    segment_ids, infos = _segments(survivors, labels, scores, areas, thresholds)
    return build_panoptic_map(segment_ids[winners], infos)


def _confident_queries(class_logits: torch.Tensor, min_class_score: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index, label and score of the queries that name a class with enough certainty; arrays of equal length."""
    scores_on_device, labels_on_device = class_logits.float().softmax(-1).max(-1)
    scores, labels = torch.stack((scores_on_device, labels_on_device.float())).cpu().numpy()
    if not np.isfinite(scores).all():
        raise PanopticError("non_finite_logits", "the segmenter's class logits are not finite numbers")
    queries = np.flatnonzero((labels < class_logits.shape[-1] - 1) & (scores > min_class_score))
    return queries, labels[queries].astype(np.int64), scores[queries]


def _compete(
    mask_logits: torch.Tensor, scores: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds
) -> tuple[np.ndarray, np.ndarray]:
    """Who wins each pixel: int16 [height, width], position + 1 or 0 for nobody; and each query's own mask area."""
    step = _queries_at_once(scores.device, size_hw)
    # No bid is below 0: from -1 every pixel finds a winner, from 0 only where a mask reaches.
    best = torch.full(size_hw, -1.0 if thresholds.like_transformers else 0.0, device=scores.device)
    winners, is_better = torch.zeros_like(best), torch.empty_like(best)
    own_areas = []
    for chunk, (bids, own) in enumerate(_bids(mask_logits, scores[:, None, None], size_hw, thresholds, step)):
        own_areas.append(own.sum(2).sum(1, dtype=torch.float64))
        top, position = bids.max(0) if step > 1 else (bids[0], 0)
        torch.gt(top, best, out=is_better)
        torch.maximum(winners, is_better.mul_(position + (chunk * step + 1)), out=winners)
        torch.maximum(best, top, out=best)
    return winners.to(torch.int16).cpu().numpy(), torch.cat(own_areas).cpu().numpy()


def _queries_at_once(device: torch.device, size_hw: tuple[int, int]) -> int:
    """On a GPU as many as memory allows. On a CPU one: its mask stays in the cache, and each query meets the same vector
    and tail instructions at a pixel, so that equal logits make equal bits."""
    return 1 if device.type == "cpu" else max(1, _GPU_CHUNK_BYTES // (4 * math.prod(size_hw)))


def _bids(
    mask_logits: torch.Tensor, scores: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds, step: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What queries bid for each pixel, class score times mask probability, and where their own masks are (0 or 1).

    Yields both, float [step, height, width], until all queries had their turn. Booleans are floats here because torch
    computes and sums them several times faster.
    """
    if thresholds.like_transformers:
        # torch rounds 3 channels on one thread in another way than 100, and in small targets each channel by its place.
        # So first every query alone, as if among the 100 that transformers resizes; then all together, as it does next.
        at_384 = functional.interpolate(mask_logits[:, None], size=_TRANSFORMERS_HW, mode="bilinear").sigmoid_()
        probabilities = functional.interpolate(at_384[None, :, 0], size=size_hw, mode="bilinear")[0]
        for part, part_scores in zip(probabilities.split(step), scores.split(step), strict=True):
            bids = part.mul_(part_scores)
            yield bids, torch.ge(bids, thresholds.mask_probability, out=torch.empty_like(bids))
        return
    least = torch.tensor(thresholds.mask_probability).logit().item()
    for part, part_scores in zip(mask_logits.split(step), scores.split(step), strict=True):
        logits = functional.interpolate(part[:, None], size=size_hw, mode="bilinear")[:, 0]
        own = torch.gt(logits, least, out=torch.empty_like(logits))
        yield functional.threshold(logits, least, -math.inf, inplace=True).sigmoid_().mul_(part_scores), own


def _segments(
    survivors: np.ndarray, labels: np.ndarray, scores: np.ndarray, areas: np.ndarray, thresholds: MaskThresholds
) -> tuple[np.ndarray, list[SegmentInfo]]:
    """Segment id by winner number, 0 for what is dropped, and the segments, numbered in order of their first query."""
    members_of: dict[tuple[int, int], list[int]] = {}
    for query in survivors.tolist():
        label = int(labels[query])
        fused = thresholds.fuse_stuff and not CATEGORIES[label].is_thing
        members_of.setdefault((label, -1 if fused else query), []).append(query)
    segment_ids = np.zeros(len(labels) + 1, dtype=np.int16)
    infos: list[SegmentInfo] = []
    for (label, _), members in members_of.items():
        if areas[members].sum() >= thresholds.min_area:
            infos.append(SegmentInfo(len(infos) + 1, label, score=float(scores[members].max())))
            segment_ids[np.add(members, 1)] = len(infos)
    return segment_ids, infos
