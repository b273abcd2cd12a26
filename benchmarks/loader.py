"""How fast one worker feeds the trainer at 490 px, shuffled, and how often it reads each byte.

    python benchmarks/loader.py --data out/*.parquet [--base BASE] [--image_size 490]
    python benchmarks/loader.py --data out/*.parquet --ranks 1 2 4 8     # what so many ranks read together in an epoch

A 7B model trains on fewer than 20 samples a second on the fastest card, so one worker has to deliver at least 20. The
worker reads whole row groups in the order of the plan, after the index has read the text columns, so no byte should be
read much more than once. Only a data set of more than 3,000 rows, as many as a worker keeps, can show that. With
`--ranks`, the rows of steps of 32 are read as each rank's worker reads them, and nothing is decoded. The last line is
JSON.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoProcessor

import collavo.model  # noqa: F401  # registers the architecture
from collavo.dataset import find_files
from collavo.embedded import find_embedded
from collavo.model.processing import build_processor
from collavo.model.prompt import KINDS
from collavo.training.arguments import PRESETS
from collavo.training.batch_plan import Batch, PlanOptions, plan_epoch, rows_in_use
from collavo.training.batches import ExampleDataset, RowReader, build_loader, micro_batches
from collavo.training.lengths import LengthLimit
from collavo.training.row_index import RowIndex, build_row_indexes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--base", default=PRESETS["tiny"].base, help="whose tokenizer is used")
    parser.add_argument("--image_size", type=int, default=490)
    parser.add_argument("--instructions_per_sequence", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", help="count their reads, and leave the rest")
    arguments = parser.parse_args(argv)

    embedded = find_embedded(arguments.base)
    base = embedded.folder if embedded else arguments.base
    config = AutoConfig.from_pretrained(base)
    config.vision_config.image_size, config.vision_config.patch_size = arguments.image_size, 14
    processor = build_processor(config, AutoProcessor.from_pretrained(base).tokenizer)
    files = find_files(arguments.data)
    read_before = psutil.Process().io_counters().read_chars
    limit = LengthLimit(processor, 4096, "dialogues", arguments.instructions_per_sequence)
    index = build_row_indexes(files, limit)["train"]
    indexed = psutil.Process().io_counters().read_chars - read_before
    stored = sum(Path(file).stat().st_size for file in files)
    options = PlanOptions(32 if arguments.ranks else 1, 0, arguments.instructions_per_sequence, limit.room)
    plan = plan_epoch(index, KINDS, options, epoch=0)
    if arguments.ranks:
        times = {ranks: round(read_by_ranks(index, plan, ranks) / stored, 3) for ranks in arguments.ranks}
        of_index, groups = round(indexed / stored, 3), len(index.row_groups)
        print(f"{groups} row groups, {stored / 1e6:,.0f} MB; reads of a stored byte in an epoch, by ranks: {times}")
        print(json.dumps({"row_groups": groups, "bytes": stored, "index": of_index, "ranks": times}))
        return
    dataset = ExampleDataset(index, processor)
    samples = [list(batch.samples) for batch in plan]

    loader = build_loader(dataset, samples, workers=1, pin_memory=False)
    next(loader)  # the worker's start
    (worker,) = (child for child in multiprocessing.active_children())
    start, read = time.perf_counter(), 0
    for _ in loader:
        if worker.is_alive():
            read = psutil.Process(worker.pid).io_counters().read_chars
    seconds = time.perf_counter() - start
    found = {
        "samples": len(samples),
        "samples_per_s": round((len(samples) - 1) / seconds, 1),
        "bytes_read_per_byte_stored": round((read + indexed) / stored, 3),
        "of_which_for_the_index": round(indexed / stored, 3),
        "torch_threads": torch.get_num_threads(),
    }
    print(
        f"{found['samples']} samples at {arguments.image_size} px: {found['samples_per_s']} a second from one worker,"
    )
    print(f"every stored byte read {found['bytes_read_per_byte_stored']} times")
    print(json.dumps(found))


def read_by_ranks(index: RowIndex, plan: Sequence[Batch], ranks: int) -> int:
    """Bytes that ranks with a worker each read together for the batches of a plan."""
    before = psutil.Process().io_counters().read_chars
    for rank in range(ranks):
        reader = RowReader(index.row_groups, rows_in_use(index.row_groups))
        for batch in plan:
            for sample in (sample for piece in micro_batches(batch, 2, rank, ranks) for sample in piece):
                reader.read(sample.row)
    return psutil.Process().io_counters().read_chars - before


if __name__ == "__main__":
    main()
