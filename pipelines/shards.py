"""One shard: its drafts get their instructions and are written to Parquet, in the order of a hash, with its rejects."""

import dataclasses
import json
import posixpath
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from posixpath import join
from typing import NamedTuple

from collavo.instructions.choose import ClassStatistics
from collavo.instructions.write import write_instructions
from collavo.parquet_writer import CrayonFileWriter
from collavo.storage import open_write
from pipelines.accounts import Counts
from pipelines.image_steps import merge_drafts
from pipelines.job import CrayonJob
from pipelines.progress import WRITTEN, tick
from pipelines.records import SOURCES, UNSEEN, Draft, Reject
from pipelines.report import evenly
from pipelines.report_sample import Sample, make_sample

Shard = tuple[str, int]
"""A split, and the number of the shard in it."""


class WrittenShard(NamedTuple):
    """A shard in the work folder. `data_uri` is empty if it has no row, `rejects_uri` if it has no reject."""

    shard: Shard
    data_uri: str
    rejects_uri: str
    bytes: int
    sha256: str
    counts: Counts
    segmenters: tuple[str, ...]
    """What segmented its images, each as the JSON text of `Segmenter.facts`."""

    samples: tuple[Sample, ...]
    """Rows for the report, each with its number in the file as its place."""


def write_shard(
    shard: Shard,
    keys: Sequence[str],
    drafts: Iterator[Draft],
    rejects: Sequence[Reject],
    statistics: ClassStatistics,
    owners: Mapping[str, str],
    sample_count: int,
    shard_count: int,
    job: CrayonJob,
) -> WrittenShard:
    """Write the rows of one shard of a split, shuffled by a hash of their pictures, and its rejects in order.

    Drafts of the same picture meet here, whatever their paths and sources, and become one row.

    Args:
        keys: of its drafts, in the order of `pipelines.spill.order_of`.
        drafts: begins with the drafts of these keys; whatever follows them is left in it.
        owners: for every id that several pictures would have, the key of the one that keeps it.
        sample_count: how many rows to prepare for the report.
        shard_count: of its split, all of about the same size.
    """
    statistics = dataclasses.replace(statistics, askable=job.askable)
    counts = Counts()
    samples = []
    all_rejects = [*rejects]
    attempt = f"shards/{shard[0]}-{shard[1]:05d}-{uuid.uuid4().hex}"  # a retried bundle must not write into this one's
    data_uri = join(job.work, f"{attempt}.parquet") if keys else ""
    size, sha256 = 0, ""
    segmenters: set[str] = set()
    unfamiliar = []
    if keys:
        chosen = evenly(len(keys), sample_count)
        expected_rows = len(keys) * shard_count
        writer = CrayonFileWriter(open_write(data_uri), job.facts, job.categories, expected_rows)
        keyed = zip(keys, drafts, strict=False)  # a strict one would take a draft more, of the next shard
        for key, same in groupby(keyed, key=lambda pair: pair[0]):
            start = time.perf_counter()
            of_picture = [draft for _, draft in same]
            draft = _one_draft(of_picture, all_rejects)
            if draft is None:
                continue
            row = dataclasses.replace(draft.row, split=shard[0], image_id=_unique_id(draft.row.image_id, key, owners))
            if row.has_image and UNSEEN not in draft.segmenters:
                instructions = write_instructions(
                    row.image_sha256 or row.image_id,
                    row.size_wh,
                    row.segments,
                    job.categories,
                    job.phrasebook,
                    statistics,
                    job.instructions,
                )
                row = dataclasses.replace(row, instructions=instructions)
            phrased = time.perf_counter()
            writer.write(row)
            if counts.rows in chosen:
                samples.append(make_sample(f"{counts.rows}", row, job.categories))
            draft.seconds["phrase"] = phrased - start
            draft.seconds["write"] = time.perf_counter() - phrased
            segmenters.update(draft.segmenters)
            if draft.unfamiliar:
                unfamiliar.append(row.image_id)
            counts.add_row(row, draft, merged=len(of_picture) - 1)
            tick(job.work, WRITTEN)
        start = time.perf_counter()
        size, sha256 = writer.close(
            {"segmenters": sorted(segmenters)} | ({"unfamiliar": unfamiliar} if unfamiliar else {})
        )
        counts.add_seconds({"write": time.perf_counter() - start})
    rejects_uri = _write_rejects(join(job.work, f"{attempt}.rejects.jsonl"), all_rejects, counts)
    return WrittenShard(shard, data_uri, rejects_uri, size, sha256, counts, tuple(sorted(segmenters)), tuple(samples))


def _one_draft(drafts: list[Draft], rejects: list[Reject]) -> Draft | None:
    """Make one draft of all those of a picture, in an order that does not depend on which was read first.

    Where a finished row was to bring the map, but is damaged and was rejected, nothing is left to make a row of.
    """
    first, *others = sorted(drafts, key=_rank)
    if first.row.image_sha256 and not first.row.has_image:
        detail = "the finished row of this picture is damaged; a build of the picture alone would segment it again"
        rejects += [Reject(e.entry_id, e.source, "write", "damaged_row", detail) for d in drafts for e in d.inputs]
        return None
    for other in others:
        first, refused = merge_drafts(first, other)
        rejects += refused
    return first


def _unique_id(image_id: str, key: str, owners: Mapping[str, str]) -> str:
    """Tell pictures of several data sets apart that have the same id: all but one get the beginning of their key."""
    if owners.get(image_id, key) == key:
        return image_id
    stem, extension = posixpath.splitext(image_id)
    return f"{stem}-{key[:8]}{extension}"


def _rank(draft: Draft) -> tuple[object, ...]:
    """Order drafts: pictures with a map first that something has seen, and annotated ones before the others, since
    their maps are exact; then by kind of source and by path."""
    source = min(SOURCES.index(entry.source) for entry in draft.inputs)
    unseen = UNSEEN in draft.segmenters
    return draft.row.panoptic_png is None, unseen, draft.is_scored, source, draft.row.image_path or "", draft.inputs


def _write_rejects(uri: str, rejects: list[Reject], counts: Counts) -> str:
    if not rejects:
        return ""
    with open_write(uri) as file:
        for reject in sorted(rejects):
            counts.add_reject(reject)
            file.write(json.dumps(reject._asdict()).encode() + b"\n")
    return uri
