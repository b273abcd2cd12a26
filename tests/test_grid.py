import numpy as np
import pytest
from conftest import CAR, PERSON, SKY, panoptic_maps, segment
from hypothesis import assume, given
from hypothesis import strategies as st

from collavo.panoptic.grid import crayon_grid, segment_grid
from collavo.panoptic.maps import PanopticMap

SIDES = st.integers(1, 4)


def majority(index_map: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """What most pixels of each cell say, a cell at a time; of equals the first segment, unknown last."""
    height, width = index_map.shape
    grid = np.zeros((rows, columns), dtype=int)
    for row, column in np.ndindex(rows, columns):
        cell = [
            index_map[y, x]
            for y in range(height)
            for x in range(width)
            if (y * rows // height, x * columns // width) == (row, column)
        ]
        grid[row, column] = min(set(cell), key=lambda value: (-cell.count(value), value == 0, value))
    return grid


@given(panoptic_maps(max_side=9), SIDES, SIDES)
def test_cells_belong_to_the_majority_and_no_segment_vanishes(panoptic: PanopticMap, rows: int, columns: int):
    index_map, count = panoptic.index_map, len(panoptic.segments)
    assume(rows <= index_map.shape[0] and columns <= index_map.shape[1] and count <= rows * columns)
    grid, by_majority = segment_grid(index_map, count, (rows, columns)), majority(index_map, rows, columns)
    assert set(range(1, count + 1)) <= set(grid.ravel().tolist())
    if set(range(1, count + 1)) <= set(by_majority.ravel().tolist()):
        assert np.array_equal(grid, by_majority)
    for position in range(1, count + 1):
        if (by_majority == position).sum() == 0:
            assert (grid == position).sum() == 1  # no more than it takes to be seen
    changed = grid[grid != by_majority]
    assert len(changed) == len(set(changed.tolist()))  # cells change hands to show somebody, once each


@given(panoptic_maps(max_side=4), st.integers(1, 3), st.integers(1, 3))
def test_a_map_smaller_than_the_grid_is_magnified(panoptic: PanopticMap, times_y: int, times_x: int):
    height, width = panoptic.index_map.shape
    grid = segment_grid(panoptic.index_map, len(panoptic.segments), (height * times_y, width * times_x))
    assert np.array_equal(grid, np.kron(panoptic.index_map, np.ones((times_y, times_x), dtype=int)))


def test_many_one_pixel_segments_of_one_cell_are_all_seen():
    index_map = np.zeros((40, 40), dtype=np.uint8)
    index_map[:3, :3] = np.arange(1, 10).reshape(3, 3)  # nine people in the first of sixteen cells
    grid = segment_grid(index_map, 9, (4, 4))
    assert sorted(grid[grid > 0].tolist()) == list(range(1, 10))
    assert set(grid[:3, :3].ravel().tolist()) == set(range(1, 10))  # and none is sent far away


@pytest.mark.parametrize(
    ("index_map", "expected"),
    [
        # a small one takes, of two cells, the one it covers more of
        ([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 1], [1, 1, 1, 2, 1, 1]], [[1, 2]]),
        # two in one cell: the smaller first, the larger takes what is next
        ([[1, 1, 1, 1, 1, 1], [2, 2, 3, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], [[3, 2], [1, 1]]),
        # who loses the only cell to a smaller one is served next: 1 moves over to the unknown
        ([[1, 1, 0, 0], [1, 2, 0, 0]], [[2, 1]]),
        # unknown prevails where most is unknown, and yields to a segment of the same extent
        ([[0, 0, 0, 1], [0, 0, 1, 1]], [[0, 1]]),
        ([[1, 1, 0, 1], [1, 1, 0, 1]], [[1, 1]]),
    ],
)
def test_vanished_segments_take_the_cell_they_cover_most(index_map: list[list[int]], expected: list[list[int]]):
    count = max(map(max, index_map))
    grid = segment_grid(np.array(index_map), count, (len(expected), len(expected[0])))
    assert grid.tolist() == expected


def test_cells_carry_the_class_and_the_number_of_their_segment():
    segments = [segment(), segment(id=2, numbering=2), segment(id=3, label=CAR, numbering=0), segment(id=4, label=SKY)]
    semantic, numbering = crayon_grid(np.array([[0, 1, 2, 3, 4]]), segments, (1, 5))
    assert semantic.dtype == numbering.dtype == np.int64
    assert semantic.tolist() == [[0, PERSON + 1, PERSON + 1, CAR + 1, SKY + 1]]
    assert numbering.tolist() == [[0, 1, 2, 0, 1]]


def test_of_more_segments_than_cells_the_largest_are_kept():
    index_map = np.repeat(np.arange(1, 6), [4, 1, 3, 2, 6]).reshape(1, 16)
    assert sorted(segment_grid(index_map, 5, (2, 2)).ravel().tolist()) == [1, 3, 4, 5]
