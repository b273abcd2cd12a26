"""The plan of an epoch: everything once, one kind a batch, the same for everyone."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collavo.errors import LeftOut
from collavo.model.prompt import KINDS, Kind
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch, PlanOptions, Sample, evaluation_samples, plan_epoch, rows_in_use
from collavo.training.batches import RowReader, micro_batches
from collavo.training.lengths import NO_LIST
from collavo.training.phases import plan_phases
from collavo.training.record import learned_from
from collavo.training.row_index import RowGroup, RowIndex, Texts


def index(instructions: list[int], dialogues: list[int], group_rows: int = 3, group_bytes: int = 0) -> RowIndex:
    """Rows with so many instructions and dialogues each, every text ten tokens long."""
    groups = [
        RowGroup(Path("a.parquet"), i, first, min(group_rows, len(instructions) - first), group_bytes)
        for i, first in enumerate(range(0, len(instructions), group_rows))
    ]
    texts = {}
    for kind, counts in zip(KINDS, (instructions, dialogues), strict=True):
        numbers = [n for count in counts for n in range(count)]
        offsets = np.concatenate(([0], np.cumsum(counts)))
        tens = np.full(len(numbers), 10, np.int32)
        texts[kind] = Texts(offsets, np.array(numbers, np.int32), tens, np.full(len(numbers), NO_LIST, np.int32))
    return RowIndex(tuple(groups), texts, LeftOut(), 100, False)


def options(**changes: object) -> PlanOptions:
    plain = {"batch_size": 1, "seed": 0, "instructions_per_sequence": 4, "max_tokens": 100}
    return PlanOptions(**{**plain, **changes})  # type: ignore[arg-type]


def texts_in(batches: list[Batch]) -> Counter[tuple[Kind, int, int]]:
    return Counter((s.kind, s.row, number) for batch in batches for s in batch.samples for number in s.numbers)


COUNTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12)


@given(COUNTS, st.integers(0, 3))
def test_an_epoch_holds_every_text_once(counts: list[tuple[int, int]], seed: int) -> None:
    rows = index([c for c, _ in counts], [d for _, d in counts])
    found = texts_in(plan_epoch(rows, KINDS, options(seed=seed), epoch=0))
    expected = {
        (kind, row, number)
        for row, pair in enumerate(counts)
        for kind, count in zip(KINDS, pair, strict=True)
        for number in range(count)
    }
    assert set(found) == expected
    assert not found or set(found.values()) == {1}


@given(COUNTS, st.integers(1, 4))
def test_a_batch_is_full_and_of_one_kind_and_only_a_remainder_is_left_out(
    counts: list[tuple[int, int]], batch_size: int
) -> None:
    rows = index([c for c, _ in counts], [d for _, d in counts])
    whole = plan_epoch(rows, KINDS, options(), epoch=0)
    batches = plan_epoch(rows, KINDS, options(batch_size=batch_size), epoch=0)
    for batch in batches:
        assert {sample.kind for sample in batch.samples} == {batch.kind}
        assert len(batch.samples) == batch_size
    for kind in KINDS:
        sequences = sum(batch.kind == kind for batch in whole)
        assert sum(batch.kind == kind for batch in batches) == sequences // batch_size


def test_packs_are_bounded_by_number_and_by_tokens() -> None:
    for bounds, largest in (({}, 4), ({"max_tokens": 25}, 2), ({"instructions_per_sequence": 1}, 1)):
        batches = plan_epoch(index([20], [3]), ("crayon",), options(**bounds), 0)
        assert {batch.kind for batch in batches} == {"crayon"}  # the dialogues are not asked for
        assert max(len(pack.numbers) for batch in batches for pack in batch.samples) == largest


def test_the_plan_follows_from_the_seed_and_differs_between_epochs() -> None:
    rows = index([8] * 12, [2] * 12)
    plans = [plan_epoch(rows, KINDS, options(seed=seed), epoch) for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]
    assert plans[0] != plans[3]


def test_kinds_are_mixed_as_asked_and_the_scarce_kind_is_kept_whole() -> None:
    rows = index([40] * 60, [1] * 60)  # 600 packs, 60 dialogues
    batches = plan_epoch(rows, KINDS, options(crayon_share=0.5), epoch=0)
    kinds = Counter(batch.kind for batch in batches)
    assert kinds["dialogue"] == 60
    assert 40 <= kinds["crayon"] <= 80


def test_ranks_share_every_batch_and_see_the_same_kind_at_the_same_step() -> None:
    for batch in plan_epoch(index([8] * 12, [4] * 12), KINDS, options(batch_size=4), epoch=0):
        shares = [[s for piece in micro_batches(batch, 1, rank, 2) for s in piece] for rank in range(2)]
        assert sorted(shares[0] + shares[1]) == sorted(batch.samples)
        assert len(shares[0]) == len(shares[1]) == 2


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize(("group_rows", "groups", "group_bytes"), [(60, 200, 0), (1000, 16, 0), (7, 400, 32 << 20)])
def test_ranks_together_read_each_row_group_once_but_for_a_few_in_the_end(
    monkeypatch: pytest.MonkeyPatch, ranks: int, group_rows: int, groups: int, group_bytes: int
) -> None:
    class File:
        metadata = None

        def read_row_group(self, group: int, columns: list[str]) -> pa.Table:
            reads.append(group)
            return pa.table({"row": range(rows.row_groups[group].rows)})

    varied, count = np.random.default_rng(0), groups * group_rows
    rows = index(varied.integers(0, 9, count).tolist(), varied.integers(0, 3, count).tolist(), group_rows, group_bytes)
    kept = rows_in_use(rows.row_groups, ranks)
    assert kept * group_bytes / group_rows <= (3 << 30) / ranks + 2 * group_bytes  # of memory, of each rank
    reads: list[int] = []
    monkeypatch.setattr("collavo.training.batches.opened_parquet", lambda _, footer: nullcontext(File()))
    monkeypatch.setattr("collavo.training.batches._is_indexed", lambda *_: True)
    plan = plan_epoch(rows, KINDS, options(batch_size=32), epoch=0)
    for rank in range(ranks):
        reader, last = RowReader(rows.row_groups, kept), -1
        for batch in plan:
            for sample in (sample for piece in micro_batches(batch, 4, rank, ranks) for sample in piece):
                if sample.row // group_rows != last:  # a row of the group read last costs nothing
                    reader.read(sample.row)
                last = sample.row // group_rows
    assert len(reads) <= groups + (2 * ranks if ranks > 1 else 0)


def test_a_loss_is_measured_all_over_the_rows() -> None:
    """Not on the rows of one data set, which stand side by side."""
    rows = index([3] * 400, [1, 0] * 200, group_rows=20)
    for seed in range(3):
        chosen = evaluation_samples(rows, KINDS, options(seed=seed), 40)
        for kind in KINDS:
            in_groups = Counter(sample.row // 20 for sample in chosen if sample.kind == kind)
            assert in_groups == dict.fromkeys(range(20), 2)
    assert len(evaluation_samples(rows, KINDS, options(), 10**6)) == 400 + 200


def test_micro_batches_of_a_rank_hold_its_samples_by_length() -> None:
    batch = Batch(
        "dialogue", tuple(Sample("dialogue", row, (0,), tokens) for row, tokens in enumerate([7, 1, 9, 3, 5, 4]))
    )
    found = [[[s.tokens for s in piece] for piece in micro_batches(batch, 2, rank, ranks)] for rank, ranks in
             ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    assert found == [[[1, 3], [4, 5], [7, 9]], [[1, 7], [9]], [[3, 4], [5]]]


def test_lanes_have_equal_shares_of_all_batches_but_the_last() -> None:
    varied = np.random.default_rng(0)
    rows = index(varied.integers(0, 20, 8000).tolist(), varied.integers(0, 3, 8000).tolist(), group_rows=100)
    plan = plan_epoch(rows, KINDS, options(batch_size=16), epoch=0)
    groups: dict[Kind, list[set[int]]] = {kind: [set() for _ in range(8)] for kind in KINDS}
    for batch in plan[: len(plan) * 8 // 10]:
        for place, sample in enumerate(batch.samples):
            groups[batch.kind][place // 2].add(sample.row // 100)
    for of_lanes in groups.values():
        assert sum(map(len, of_lanes)) == len(set.union(*of_lanes))


def test_no_more_epochs_are_planned_than_steps_are_allowed() -> None:
    arguments = TrainArguments(data=("x",), epochs=10**9, max_steps=25)
    phases = plan_phases(arguments, index([4] * 9, [1] * 9), options(), aligns=False, steps_before=0)
    assert [(phase.name, len(phase.batches)) for phase in phases] == [("cpt", 25), ("cit", 25)]


def test_a_resumed_run_may_change_nothing_that_it_learns_from() -> None:
    assert set(learned_from(TrainArguments(data=("a.parquet",)), [])["arguments"]) == {
        "preset", "phase", "projector", "adapters", "queries", "semantic_queries", "query_start", "tasks",
        "object_list", "seed", "batch_size", "align_batch_size", "crayon_share", "instructions_per_sequence",
        "max_length", "lora_rank",
        "lora_alpha", "quantize", "precision", "align_learning_rate", "cpt_learning_rate", "cit_learning_rate",
        "final_learning_rate", "max_grad_norm",
    }  # fmt: skip
