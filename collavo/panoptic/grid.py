"""Reduce a panoptic map to the model's patch grid: the crayon map, one semantic and one numbering index per cell.

A cell belongs to the segment that covers most of it. A segment that wins no cell by this rule still gets one, since a
question may be about it: it takes the cell that it covers most, and the smallest segment chooses first. Only if there
are more segments than cells do the smallest get none.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from schemas.crayon_row import Segment


def crayon_grid(
    index_map: np.ndarray, segments: Sequence[Segment], grid_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the semantic and numbering index of every cell.

    Args:
        index_map: integer [height, width], pixel = position in `segments` + 1, 0 = unknown.
        segments: in the order that the map refers to.
        grid_hw: rows and columns of the grid, (35, 35) for a 490 px encoder with patches of 14.

    Returns:
        two int64 arrays of shape `grid_hw`: 0 for unknown, else label + 1 and 0..20 (0 not numbered).
    """
    positions = segment_grid(index_map, len(segments), grid_hw)
    semantic = np.array([0, *(segment.label + 1 for segment in segments)])
    numbering = np.array([0, *(segment.numbering for segment in segments)])
    return semantic[positions], numbering[positions]


def segment_grid(index_map: np.ndarray, segment_count: int, grid_hw: tuple[int, int]) -> np.ndarray:
    """Assign each cell to a segment: int64 of shape `grid_hw`, position in the segments + 1, 0 = unknown."""
    rows, columns = grid_hw
    covered = _covered_pixels(index_map, segment_count, rows, columns)
    _forget_smallest(covered, segment_count - rows * columns)
    best = covered[:, 1:].argmax(axis=1) + 1 if segment_count else np.zeros(len(covered), dtype=np.int64)
    # A segment beats unknown in a tie; of two segments, the earlier wins.
    owner = np.where(covered[np.arange(len(covered)), best] >= covered[:, 0], best, 0)
    _rescue_vanished(owner, covered, columns)
    return owner.reshape(rows, columns)


def _covered_pixels(index_map: np.ndarray, segment_count: int, rows: int, columns: int) -> np.ndarray:
    """Count the pixels of each segment in each cell: int64 [cells, segments + 1], unknown first."""
    height, width = index_map.shape
    # Enlarge a map that is smaller than the grid, so that every cell has pixels.
    index_map = index_map.repeat(-(-rows // height), axis=0).repeat(-(-columns // width), axis=1)
    height, width = index_map.shape
    row_cells = np.arange(height) * rows // height * columns
    column_cells = np.arange(width) * columns // width
    # Each pixel falls into the bin (cell, segment); one count over the bins gives all numbers at once.
    bins = (row_cells[:, None] + column_cells) * (segment_count + 1) + index_map
    counts = np.bincount(bins.ravel(), minlength=rows * columns * (segment_count + 1))
    return counts.reshape(rows * columns, segment_count + 1)


def _forget_smallest(covered: np.ndarray, count: int) -> None:
    """Make the `count` smallest segments unknown, in place: as many as find no cell."""
    if count > 0:
        smallest = 1 + np.argsort(covered[:, 1:].sum(axis=0), kind="stable")[:count]
        covered[:, 0] += covered[:, smallest].sum(axis=1)
        covered[:, smallest] = 0


def _rescue_vanished(owner: np.ndarray, covered: np.ndarray, columns: int) -> None:
    """Give a cell to each segment that has pixels but no cell, in place.

    Segments wait in a heap, the smallest first. A segment may take the last cell of another, which then waits itself. A
    cell that was given is not taken again, so each step fills a free cell, and the loop ends; it never runs out of free
    cells, since there are no more segments than cells (`_forget_smallest`).
    """
    areas = covered.sum(axis=0)
    cells_won = np.bincount(owner, minlength=covered.shape[1])
    vanished = [(int(areas[s]), s) for s in range(1, covered.shape[1]) if areas[s] and not cells_won[s]]
    heapq.heapify(vanished)
    free = np.ones(len(owner), dtype=bool)
    while vanished:
        _, segment = heapq.heappop(vanished)
        cell = _best_free_cell(covered[:, segment], free, columns)
        loser = int(owner[cell])
        owner[cell], free[cell] = segment, False
        cells_won[loser] -= 1
        if loser and not cells_won[loser]:
            heapq.heappush(vanished, (int(areas[loser]), loser))


def _best_free_cell(covered: np.ndarray, free: np.ndarray, columns: int) -> int:
    """Find the free cell that a segment covers most, or the nearest free cell if all of its cells were given away."""
    candidates = np.where(free, covered, 0)
    if candidates.any():
        return int(candidates.argmax())
    y, x = np.divmod(np.arange(len(covered)), columns)
    home = int(covered.argmax())
    distance = (y - y[home]) ** 2 + (x - x[home]) ** 2
    return int(np.where(free, distance, distance.max() + 1).argmin())
