"""How well the place of an object can be told at all: on the lines between cells, and in two decimals.

A model that knows an object by the cells of its grid, and no more, cannot on average overlap better with its box than
the best box whose sides lie on lines between cells.
"""

from collections.abc import Iterable
from itertools import product
from math import ceil, floor

from collavo.evaluation.judge import box_iou
from collavo.instructions.text import Box


def overlap_on_cell_lines(box: Box, grid_hw: tuple[int, int]) -> float:
    """Compute the largest IoU with a box, in fractions of the picture, that a box made of whole cells can have."""
    rows, columns = grid_hw
    cells = (columns, rows, columns, rows)
    # The overlap grows until a side meets that of the box, and falls behind it: the best line is one of its neighbours.
    lines = [
        {line / count for line in (floor(side * count), ceil(side * count))}
        for side, count in zip(box, cells, strict=True)
    ]
    return max((_overlap(one, box) for one in product(*lines) if one[0] < one[2] and one[1] < one[3]), default=0.0)


def overlap_in_two_decimals(box: Box) -> float:
    """Compute the IoU of a box, in fractions of the picture, with what text says of it."""
    return _overlap((round(side, 2) for side in box), box)


def _overlap(sides: Iterable[float], box: Box) -> float:
    x_min, y_min, x_max, y_max = sides
    return box_iou((x_min, y_min, x_max, y_max), box)
