"""Number the instances of each class in an image.

The largest instance of a class is number 1; equal areas are ordered by place, top to bottom, then left to right. Size
and place belong to the picture, so the numbers do not depend on batches, runners or the order of arrival.
"""

import numpy as np

from schemas.categories import MAX_NUMBERING


def numbered_order(labels: np.ndarray, is_crowd: np.ndarray, areas: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """Order segments by class, crowds last, then largest first, then by place.

    Args:
        labels: int [N], 0..132.
        is_crowd: bool [N].
        areas: int [N], pixels.
        boxes_xyxy: int [N, 4], pixels.

    Returns:
        int [N], indices into the segments.
    """
    x_min, y_min, x_max, y_max = boxes_xyxy.T
    return np.lexsort((x_max, y_max, x_min, y_min, -areas, is_crowd, labels))


def number_instances(ordered_labels: np.ndarray, ordered_is_crowd: np.ndarray) -> np.ndarray:
    """Number segments that are in `numbered_order`: 1..20, and 0 for crowds and for instances after the 20th.

    Args:
        ordered_labels: int [N], ascending.
        ordered_is_crowd: bool [N].

    Returns:
        int [N].
    """
    first_of_class = np.searchsorted(ordered_labels, ordered_labels, side="left")
    ordinals = np.arange(len(ordered_labels)) - first_of_class + 1
    return np.where(ordered_is_crowd | (ordinals > MAX_NUMBERING), 0, ordinals)
