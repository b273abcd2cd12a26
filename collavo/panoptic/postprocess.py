"""Turn mask-classification logits into panoptic maps, on the device that holds them.

A network for universal segmentation gives every query class logits and a low-resolution mask. It works in three steps:

1. Keep the queries whose best class has a high enough score (`_confident_queries`).
2. Let them bid for each pixel with class score times mask probability; the highest bid wins it (`_compete`).
3. Make a segment of what a query won, if enough of its own mask is left (`_segments`). Parts of one stuff class fuse.

For speed, only the queries of step 1 are upsampled, and the host gets only the map of winners and a few numbers per
query: it waits for the device three times per image, never per query.

Of exactly equal bids for a pixel, that of the lower query index wins. Nothing else depends on the order of queries.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from collavo.errors import Rejected
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.panoptic.thresholds import MaskThresholds
from schemas.categories import COCO_PANOPTIC, CategorySet

# Queries compete in bands of rows, of at most so many elements in all. On a CPU it is one below the size from which
# torch splits an operation among threads: the steps are hundreds of small operations, and threads that wait for each
# other on busy cores make them take seconds. Such a band also fits the cache. On a GPU it is the size up to which
# float32 counts pixels exactly.
_BAND_ELEMENTS = {"cpu": (1 << 15) - 1, "cuda": 1 << 24}

# transformers resizes all kept queries to the image at once, 200 MB each at 50 megapixels. Where its bits are asked
# for, so do we, up to so many elements (1 GB); beyond, in bands, whose probabilities may differ in their last bits.
_MOST_ELEMENTS_AT_ONCE = 1 << 28

_SMALLEST_BID = torch.finfo(torch.float32).tiny


@torch.inference_mode()
def panoptic_from_logits(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    size_hw: tuple[int, int],
    thresholds: MaskThresholds,
    categories: CategorySet = COCO_PANOPTIC,
    labels_in_set: np.ndarray | None = None,
    *,
    padded_hw: tuple[tuple[int, int], tuple[int, int]] | None = None,
    transformers_hw: tuple[int, int] | None = (384, 384),
) -> PanopticMap:
    """Turn the queries of one image into its panoptic map.

    Args:
        class_logits: float [queries, classes + 1]; the last column is "no object".
        mask_logits: float [queries, height, width] on the same device, at any resolution.
        size_hw: size of the map, that of the upright image.
        thresholds: see `MaskThresholds`.
        categories: the set that the map is made in.
        labels_in_set: int [classes], the label in that set of each class of the model, -1 for none; None where the
            model has the classes of the set in its order.
        padded_hw: where the masks cover a padded input, its size and that of the image in its top left corner.
        transformers_hw: the size to which transformers resizes this network's masks first; a matter of
            `MaskThresholds.like_transformers` alone.

    Returns:
        the map, without segments if no query qualifies. A fused segment has the best score of its parts.

    Raises:
        Rejected: `non_finite_logits` if logits are NaN or infinite, as after an overflow in half precision.
    """
    queries, labels, scores = _confident_queries(class_logits, thresholds.min_class_score)
    if labels_in_set is not None:
        known = labels_in_set[labels] >= 0
        queries, labels, scores = queries[known], labels_in_set[labels[known]], scores[known]
    if not len(queries):
        return build_panoptic_map(np.zeros(size_hw, dtype=np.uint8), [], categories)
    kept = mask_logits[torch.from_numpy(queries).to(mask_logits.device)].float()
    if not kept.isfinite().all():
        raise Rejected("non_finite_logits", "the segmenter's mask logits are not finite numbers")
    if padded_hw:
        input_hw, (height, width) = padded_hw
        kept = functional.interpolate(kept[None], size=input_hw, mode="bilinear")[0, :, :height, :width]
    elif thresholds.like_transformers and transformers_hw:
        # For transformers' bits, resize as it does. It resizes all 100 queries; torch rounds another number of channels
        # differently, but a single channel like one of 100, so here each query is resized alone.
        kept = functional.interpolate(kept[:, None], size=transformers_hw, mode="bilinear")[:, 0]
    winners, own_areas = _compete(kept, torch.from_numpy(scores).to(kept.device), size_hw, thresholds)
    winners = winners.astype(np.intp)
    areas = np.bincount(winners.ravel(), minlength=len(queries) + 1)[:-1]
    # Divide in float32, as transformers does: there, 4 / 5 is above 0.8; in float64 it is not.
    left = areas.astype(np.float32) / np.maximum(own_areas, 1).astype(np.float32)
    survivors = np.flatnonzero((areas > 0) & (own_areas > 0) & (left.astype(np.float64) > thresholds.overlap))
    segment_ids, infos = _segments(survivors, labels, scores, areas, thresholds, categories)
    return build_panoptic_map(segment_ids.take(winners), infos, categories)


def _confident_queries(class_logits: torch.Tensor, min_class_score: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Select the queries that name a class with a high enough score: their index, label and score."""
    scores_on_device, labels_on_device = class_logits.float().softmax(-1).max(-1)
    scores, labels = torch.stack((scores_on_device, labels_on_device.float())).cpu().numpy()
    if not np.isfinite(scores).all():
        raise Rejected("non_finite_logits", "the segmenter's class logits are not finite numbers")
    queries = np.flatnonzero((labels < class_logits.shape[-1] - 1) & (scores > min_class_score))
    return queries, labels[queries].astype(np.int64), scores[queries]


def _compete(
    mask_logits: torch.Tensor, scores: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds
) -> tuple[np.ndarray, np.ndarray]:
    """Find the winner of each pixel, and the area of each query's own mask.

    Returns:
        int16 [height, width]: the position of the winning query, or the number of queries where none bids; and
        float64 [queries]: pixels of each query's own mask.
    """
    count = len(scores)
    # Where several queries bid the same, the maximum of their numbers picks one: the first, which has the highest
    # number.
    numbers = torch.arange(count, 0, -1, device=scores.device)[:, None, None].float()
    # The least bid of a pixel inside a query's own mask. By our rules a bid outside is 0, by transformers' it is not.
    least_own = thresholds.mask_probability if thresholds.like_transformers else _SMALLEST_BID
    own_areas, winners = [], []
    flags = torch.empty(0, device=scores.device)  # comparisons as 0.0 and 1.0, which torch sums faster than booleans
    for bids in _bids_by_rows(mask_logits, scores[:, None, None], size_hw, thresholds):
        flags = flags if flags.shape == bids.shape else torch.empty_like(bids)
        own_areas.append(torch.ge(bids, least_own, out=flags).sum((1, 2)))
        best = bids.amax(0)
        if not thresholds.like_transformers:
            best.clamp_(min=_SMALLEST_BID)  # above all bids where no mask reaches, so that nobody wins
        winners.append(torch.eq(bids, best, out=flags).mul_(numbers).amax(0))
    positions = (count - torch.cat(winners)).to(torch.int16)
    return positions.cpu().numpy(), torch.stack(own_areas).sum(0, dtype=torch.float64).cpu().numpy()


def _bids_by_rows(
    mask_logits: torch.Tensor, scores: torch.Tensor, size_hw: tuple[int, int], thresholds: MaskThresholds
) -> Iterator[torch.Tensor]:
    """Yield bands of bids, class score times mask probability: float [queries, rows, width]."""
    height, width = size_hw
    rows = max(1, _BAND_ELEMENTS[scores.device.type] // (len(scores) * width))
    if thresholds.like_transformers:
        probabilities = mask_logits.sigmoid()
        if len(scores) * height * width > _MOST_ELEMENTS_AT_ONCE:
            bands = _resized_by_rows(probabilities, size_hw, rows)
        else:
            resized = functional.interpolate(probabilities[None], size=size_hw, mode="bilinear")[0]
            bands = iter(resized.split(rows, dim=1))
        for band in bands:
            yield band * scores
        return
    # Logits are compared with the logit of the threshold before the sigmoid, and cut off where they are below it.
    least = torch.tensor(thresholds.mask_probability).logit().item()
    for logits in _resized_by_rows(mask_logits, size_hw, rows):
        yield functional.threshold(logits, least, -math.inf, inplace=True).sigmoid_().mul_(scores)


def _resized_by_rows(masks: torch.Tensor, size_hw: tuple[int, int], rows: int) -> Iterator[torch.Tensor]:
    """Yield bands of float [queries, rows, width] of what torch's bilinear resizing makes of masks.

    Columns are resized first and then rows, so that rows can be made band by band.
    """
    height, width = size_hw
    widened = functional.interpolate(masks[:, None], size=(masks.shape[1], width), mode="bilinear")[:, 0]
    above, below, weight = _vertical_taps(masks.shape[1], height, masks.device)
    for first in range(0, height, rows):
        band = slice(first, first + rows)
        yield torch.lerp(widened.index_select(1, above[band]), widened.index_select(1, below[band]), weight[band, None])


def _vertical_taps(
    from_rows: int, to_rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the two source rows of each target row and the weight of the second, sampling at pixel centres."""
    centres = ((torch.arange(to_rows, device=device) + 0.5).double() * (from_rows / to_rows) - 0.5).clamp_(min=0)
    above = centres.long()
    return above, (above + 1).clamp_(max=from_rows - 1), (centres - above).float()


def _segments(
    survivors: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    areas: np.ndarray,
    thresholds: MaskThresholds,
    categories: CategorySet,
) -> tuple[np.ndarray, list[SegmentInfo]]:
    """Make segments of the surviving queries, in the order of their first query.

    Returns:
        int16 [queries + 1]: the segment id of each query, 0 for a dropped one and for "no query", which is last; and
        the segments.
    """
    members_of: dict[tuple[int, int], list[int]] = {}
    for query in survivors.tolist():
        label = int(labels[query])
        fused = thresholds.fuse_stuff and not categories[label].is_thing
        members_of.setdefault((label, -1 if fused else query), []).append(query)
    segment_ids = np.zeros(len(labels) + 1, dtype=np.int16)
    infos: list[SegmentInfo] = []
    for (label, _), members in members_of.items():
        if areas[members].sum() >= thresholds.min_area:
            infos.append(SegmentInfo(len(infos) + 1, label, score=float(scores[members].max())))
            segment_ids[members] = len(infos)
    return segment_ids, infos
