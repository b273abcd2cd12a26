"""The end of a build: shards get their names, the rejects are gathered, and the manifest, written last, adds it all up.

All of it is written in one folder. For a local output this is a staging folder, which the launcher then swaps into the
place of the output (`collavo.folders`). An object store has no such swap: there it is the output itself, whose old
manifest is deleted first, so that whatever has no manifest is not whole. Every step can be repeated, since a runner may
retry it.
"""

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from posixpath import basename, join
from typing import Any

import collavo
from collavo.data_card import CARD
from collavo.errors import UserError
from collavo.folders import INTERNAL
from collavo.storage import (
    MANIFEST,
    REJECTS,
    REPORT,
    delete_files,
    is_local,
    list_files,
    open_read,
    open_write,
    put_in_place,
)
from pipelines.accounts import Counts
from pipelines.card import dataset_card
from pipelines.job import Publication
from pipelines.report import write_report
from pipelines.shards import WrittenShard
from schemas.categories import CategorySet
from schemas.crayon_row import SCHEMA_VERSION

FAILED_REJECTS = "failed-rejects.jsonl"
"""Where the rejects are left when a build fails because of their number."""

_PART_BYTES = 1 << 20
_COPIES_AT_ONCE = 8
_SHARD = re.compile(r"(crayon|train|validation)-\d{5}-of-\d{5}\.parquet")
_SOURCES = ("coco_panoptic", "coco_instances", "llava_json", "images", "dataset", "from_crayon")
_LIBRARIES = ("apache-beam", "numpy", "pillow", "pyarrow", "torch", "transformers")


def publish(
    publication: Publication,
    shards: Sequence[WrittenShard],
    inputs: Mapping[str, int],
    categories: CategorySet,
    listed_count: int,
    record_count: int,
) -> None:
    """Make a data set of written shards.

    Args:
        shards: all of them, in any order.
        inputs: number of inputs by source, counted where the sources were read.
        listed_count, record_count: how many images all sources list and all data sets hold, where this is a trial with
            some of them; else 0.

    Raises:
        UserError: if there are no rows, or more rejects than allowed; RuntimeError if the accounts do not add up.
    """
    folder, manifest_uri = publication.folder, join(publication.folder, MANIFEST)
    found = list_files(join(folder, ""))
    if manifest_uri in found and _is_of(publication, shards, manifest_uri):
        _remove_used(publication, found)
        return  # retried after it had done all but perhaps that
    ordered = sorted(shards, key=lambda shard: shard.shard)
    counts = Counts()
    for shard in ordered:
        counts.add(shard.counts)
    _check_accounts(counts, inputs)
    try:
        _check_rejects(publication, counts, inputs)
    except UserError as error:
        head = _gather_rejects(join(publication.output, FAILED_REJECTS), ordered)
        first = f"; the first: {json.loads(head.splitlines()[0])['detail']}" if head else ""
        raise UserError(f"{error}{first}", error.exit_status) from error
    old = [uri for uri in found if _is_ours(folder, uri)]
    delete_files([uri for uri in old if uri == manifest_uri])
    written = [shard for shard in ordered if shard.data_uri]
    names = _names(written)
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:  # S3 takes seconds for each, and a million rows are 500 files
        list(pool.map(put_in_place, [shard.data_uri for shard in written], [join(folder, name) for name in names]))
    # After the new ones are there: a store that fails until then leaves what it had, but for what has the same name.
    delete_files([uri for uri in old if uri != manifest_uri and basename(uri) not in names])
    rejects = _gather_rejects(join(folder, REJECTS), ordered)
    manifest = _manifest(publication, counts, inputs, categories, dict(zip(names, written, strict=True)))
    if most := publication.configuration.get("max_images"):
        manifest["trial"] = {
            "images": min(listed_count, most) + inputs.get("dataset", 0),
            "of": listed_count + max(record_count, inputs.get("dataset", 0)),  # of a tar, it is estimated
        }
    samples = [
        sample._replace(place=f"{name}, row {sample.place}")
        for shard, name in zip(written, names, strict=True)
        for sample in shard.samples
    ]
    write_report(folder, manifest, samples, rejects)
    with open_write(join(folder, CARD)) as file:
        name = basename(publication.output.rstrip("/")) or "crayon"
        file.write(dataset_card(manifest, name).encode())
    with open_write(manifest_uri) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    _remove_used(publication, found)


def _is_of(publication: Publication, shards: Sequence[WrittenShard], manifest_uri: str) -> bool:
    """Tell whether a manifest is the one of this very build; an earlier one of the output may be damaged.

    A template of Dataflow that is launched again differs in its files alone.
    """
    with open_read(manifest_uri) as file, suppress(ValueError, AttributeError, KeyError, TypeError):
        manifest = json.load(file)
        now = json.loads(json.dumps(publication.configuration))
        same = (manifest.get("started"), manifest.get("configuration")) == (publication.started, now)
        written = {shard.sha256 for shard in shards if shard.data_uri}
        return same and {file["sha256"] for file in manifest["files"]} == written
    return False


def _remove_used(publication: Publication, found: Sequence[str]) -> None:
    """Remove what only this build needed; a local launcher still watches the progress in it, and removes it then."""
    if not is_local(publication.work):
        used = join(publication.work, ""), join(publication.segmented, "")
        delete_files([uri for uri in found if uri.startswith(used)])


def content_of(output: str) -> list[str]:
    """List what lies in an output folder: by name on a disk, to its depths in a store, which is one request."""
    if is_local(output):
        return [join(output, name) for name in sorted(os.listdir(output))] if os.path.isdir(output) else []
    return list_files(join(output, ""))


def published_files(output: str, content: Sequence[str]) -> list[str]:
    """Return those files of an output folder that an earlier build left, the manifest first."""
    return sorted((uri for uri in content if _is_ours(output, uri)), key=lambda uri: basename(uri) != MANIFEST)


def _is_ours(output: str, uri: str) -> bool:
    """Tell whether a build would write a file of this name into an output folder."""
    name = uri.removeprefix(join(output, ""))
    return name in (MANIFEST, CARD, REJECTS, REPORT, FAILED_REJECTS) or _SHARD.fullmatch(name) is not None


def strangers(output: str, content: Sequence[str]) -> list[str]:
    """Return the names in a local output folder that no build wrote."""
    if not is_local(output):
        return []
    ours = {*published_files(output, content), *(join(output, name) for name in INTERNAL)}
    return sorted(basename(uri) for uri in content if uri not in ours)


def _names(written: Sequence[WrittenShard]) -> list[str]:
    """Number the files of each split, as `datasets` expects them."""
    of_split = Counter(shard.shard[0] for shard in written)
    return [
        f"{split}-{number:05d}-of-{count:05d}.parquet" for split, count in of_split.items() for number in range(count)
    ]


def _check_accounts(counts: Counts, inputs: Mapping[str, int]) -> None:
    accounted = counts.inputs_in_rows + counts.rejects_by_source
    if dict(accounted) != {source: count for source, count in inputs.items() if count}:
        raise RuntimeError(f"inputs do not add up: read {dict(inputs)}, accounted for {dict(accounted)}")


def _check_rejects(publication: Publication, counts: Counts, inputs: Mapping[str, int]) -> None:
    total, rejected = sum(inputs.values()), counts.rejects.total()
    given = publication.configuration
    tally = ", ".join(f"{count} {reason}" for reason, count in counts.rejects.most_common(5))
    where = f"see {join(publication.output, FAILED_REJECTS)}"
    for source, count in inputs.items():
        if count and not counts.inputs_in_rows[source] and counts.rows:
            raise UserError(
                f"nothing is left of source {source}: all its {count} inputs were rejected ({tally}); {where}"
            )
    if not total:
        sources = " and ".join(f"--{flag} {' '.join(paths)}" for flag in _SOURCES if (paths := given.get(flag)))
        raise UserError(f"no rows: no image and no dialogue in {sources or 'the sources'}", exit_status=1)
    if not counts.rows:
        raise UserError(f"no rows: all {total} inputs were rejected ({tally}); {where}")
    if rejected > (most := given["max_reject_ratio"]) * total:
        share = f"{rejected} of {total} inputs were rejected ({tally})"
        raise UserError(f"{share}, more than --max_reject_ratio {most:g} allows; {where}")


def _gather_rejects(uri: str, ordered: Sequence[WrittenShard]) -> bytes:
    """Write the rejects of all shards to one file; return its first part."""
    head = b""
    with open_write(uri) as gathered:
        for shard in ordered:
            if shard.rejects_uri:
                with open_read(shard.rejects_uri) as file:
                    while part := file.read(_PART_BYTES):
                        gathered.write(part)
                        head = head or part
    return head


def _manifest(
    publication: Publication,
    counts: Counts,
    inputs: Mapping[str, int],
    categories: CategorySet,
    files: Mapping[str, WrittenShard],
) -> dict[str, Any]:
    segmenters = sorted({segmenter for shard in files.values() for segmenter in shard.segmenters})
    return {
        "schema_version": SCHEMA_VERSION,
        "started": publication.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": dict(sorted(inputs.items())),
        **counts.as_json(),
        "files": [
            {"name": name, "rows": shard.counts.rows, "bytes": shard.bytes, "sha256": shard.sha256}
            for name, shard in files.items()
        ],
        "categories": {"name": categories.name, "categories": categories.as_records()},
        "segmenters": [json.loads(segmenter) for segmenter in segmenters],
        "configuration": publication.configuration,
        "versions": {
            "collavo": collavo.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }
