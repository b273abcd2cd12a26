"""Numbering: the ordinal of each segment among those of its class in its image.

The largest instance of a class is number 1; equal areas are told apart by where they are, top to bottom, then left to
right. Size and place are properties of the picture, so the numbers are the same for any batch, runner or order of
arrival.
"""

import numpy as np

from schemas.categories import MAX_NUMBERING


def numbered_order(labels: np.ndarray, is_crowd: np.ndarray, areas: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
    """The order in which segments are listed: by class, crowds last, then largest first, then by place.

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
    """Ordinals 1..20 for segments already in `numbered_order`; 0 for crowds and for what comes after the 20th.

    Args:
        ordered_labels: int [N], ascending.
        ordered_is_crowd: bool [N].

    Returns:
        int [N].
    """
    first_of_class = np.searchsorted(ordered_labels, ordered_labels, side="left")
    ordinals = np.arange(len(ordered_labels)) - first_of_class + 1
    return np.where(ordered_is_crowd | (ordinals > MAX_NUMBERING), 0, ordinals)
