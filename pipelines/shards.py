"""One shard: its drafts in order of their hash, phrased, written to Parquet beside its share of the rejects."""

import dataclasses
import json
import time
import uuid
from collections.abc import Iterable
from posixpath import join
from typing import NamedTuple

from collavo.dataset import CrayonFileWriter
from collavo.instructions.choose import ClassStatistics, stable_hash
from collavo.instructions.write import write_instructions
from collavo.storage import open_write
from pipelines.accounts import Counts
from pipelines.job import CrayonJob
from pipelines.progress import WRITTEN, tick
from pipelines.records import Reject
from pipelines.spill import SpilledDraft, read_drafts


class WrittenShard(NamedTuple):
    """A finished shard, in the work folder; the uris are empty where there is no row, or no reject."""

    shard: int
    data_uri: str
    rejects_uri: str
    bytes: int
    sha256: str
    counts: Counts
    segmenters: tuple[str, ...]
    """What segmented its images, each as the JSON text of `Segmenter.facts`."""


def write_shard(
    shard: int,
    spilled: Iterable[SpilledDraft],
    rejects: Iterable[Reject],
    statistics: ClassStatistics,
    job: CrayonJob,
) -> WrittenShard:
    """Write the rows of one shard, shuffled by the hash of their image id, and its rejects in order.

    Two images of the same id meet here, whatever their sources: the first by path is written, the others are rejected.
    """
    counts = Counts()
    all_rejects = list(rejects)
    ordered = sorted(spilled, key=lambda place: (stable_hash("order", place.image_id), place.image_id, place.image_uri))
    attempt = f"shards/{shard:05d}-{uuid.uuid4().hex}"  # a retried bundle must not write into this one's file
    data_uri = join(job.work, f"{attempt}.parquet") if ordered else ""
    size, sha256 = 0, ""
    segmenters: set[str] = set()
    if ordered:
        writer = CrayonFileWriter(open_write(data_uri), job.facts)
        previous_id = None
        for draft in read_drafts(ordered):
            start = time.perf_counter()
            row = draft.row
            if row.image_id == previous_id:
                detail = f"another image has the id {row.image_id}; give the folders' images distinct paths"
                all_rejects += [Reject(e.entry_id, e.source, "write", "duplicate_id", detail) for e in draft.inputs]
                continue
            previous_id = row.image_id
            size_wh = (row.width, row.height)
            instructions = write_instructions(
                row.image_id, size_wh, row.segments, job.phrasebook, statistics, job.instructions
            )
            row = dataclasses.replace(row, instructions=instructions)
            phrased = time.perf_counter()
            writer.write(row)
            draft.seconds["phrase"] = phrased - start
            draft.seconds["write"] = time.perf_counter() - phrased
            segmenters.update(draft.segmenters)
            counts.add_row(row, draft)
            tick(job.work, WRITTEN)
        start = time.perf_counter()
        size, sha256 = writer.close({"segmenters": sorted(segmenters)})
        counts.add_seconds({"write": time.perf_counter() - start})
    rejects_uri = _write_rejects(join(job.work, f"{attempt}.rejects.jsonl"), all_rejects, counts)
    return WrittenShard(shard, data_uri, rejects_uri, size, sha256, counts, tuple(sorted(segmenters)))


def _write_rejects(uri: str, rejects: list[Reject], counts: Counts) -> str:
    if not rejects:
        return ""
    with open_write(uri) as file:
        for reject in sorted(rejects):
            counts.add_reject(reject)
            file.write(json.dumps(reject._asdict()).encode() + b"\n")
    return uri
