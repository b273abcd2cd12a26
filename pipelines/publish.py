"""The end of a build: shards get their names, the rejects are gathered, and the manifest, written last, adds it all up.

Until here everything lies in the staging folder; a run that is killed leaves nothing that looks like a data set. Each
step can be repeated, because a runner may retry it.
"""

import glob
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from posixpath import join
from typing import Any, NamedTuple

import collavo
from collavo.errors import UserError
from collavo.storage import (
    MANIFEST,
    REJECTS,
    REPORT,
    delete,
    exists,
    is_local,
    list_files,
    open_read,
    open_write,
    rename,
)
from pipelines.accounts import Counts
from pipelines.report import write_report
from pipelines.shards import WrittenShard
from schemas.crayon_row import SCHEMA_VERSION

FAILED_REJECTS = "failed-rejects.jsonl"
"""Where the rejects of a build that fails for their number are left."""

_LIBRARIES = ("apache-beam", "numpy", "pillow", "pyarrow", "torch", "transformers")


class Publication(NamedTuple):
    """What `publish` is told about the run."""

    output: str
    staging: str
    configuration: Mapping[str, Any]
    max_reject_ratio: float
    started: str


def publish(publication: Publication, shards: Sequence[WrittenShard], inputs: Mapping[str, int]) -> None:
    """Turn staged shards into a data set.

    Args:
        shards: all of them, in any order.
        inputs: number of inputs by source, counted where the sources were read.

    Raises:
        UserError: if nothing can be published: no rows, more rejects than allowed, or accounts that do not add up.
    """
    ordered = sorted(shards, key=lambda shard: shard.shard)
    counts = Counts()
    for shard in ordered:
        counts.add(shard.counts)
    _check_accounts(counts, inputs)
    rejects_file = _gather_rejects(publication.staging, ordered)
    try:
        _check_rejects(publication, counts, inputs)
    except UserError:
        rename(rejects_file, join(publication.output, FAILED_REJECTS))
        raise
    _remove_published(publication.output, publication.staging)
    written = [shard for shard in ordered if shard.data_uri]
    files = []
    for position, shard in enumerate(written):
        name = f"crayon-{position:05d}-of-{len(written):05d}.parquet"
        rename(shard.data_uri, join(publication.output, name))
        files.append({"name": name, "rows": shard.counts.rows, "bytes": shard.bytes, "sha256": shard.sha256})
    rename(rejects_file, join(publication.output, REJECTS))
    segmenters = sorted({segmenter for shard in written for segmenter in shard.segmenters})
    manifest = _manifest(publication, counts, inputs, files, segmenters)
    write_report(publication.output, manifest)
    _write_manifest(publication, manifest)
    if not is_local(publication.staging):  # a local launcher still watches the progress in it, and removes it then
        remove_staging(publication.staging)


def published_files(output: str) -> list[str]:
    """What an earlier build left in an output folder."""
    names = (MANIFEST, REJECTS, REPORT, FAILED_REJECTS)
    present = [join(output, name) for name in names if exists(join(output, name))]
    folder = glob.escape(output) if is_local(output) else output
    return present + list_files(join(folder, "crayon-*.parquet"))


def remove_staging(staging: str) -> None:
    if is_local(staging):
        shutil.rmtree(staging, ignore_errors=True)
    else:
        delete(list_files(f"{staging}/"))  # an object store has files alone: to delete the folder would delete nothing


def _check_accounts(counts: Counts, inputs: Mapping[str, int]) -> None:
    accounted = counts.inputs_in_rows + counts.rejects_by_source
    if dict(accounted) != {source: count for source, count in inputs.items() if count}:
        raise RuntimeError(f"inputs do not add up: read {dict(inputs)}, accounted for {dict(accounted)}")


def _check_rejects(publication: Publication, counts: Counts, inputs: Mapping[str, int]) -> None:
    total, rejected = sum(inputs.values()), counts.rejects.total()
    tally = ", ".join(f"{count} {reason}" for reason, count in counts.rejects.most_common(5))
    where = f"see {join(publication.output, FAILED_REJECTS)}"
    if not counts.rows:
        raise UserError(f"no rows: all {total} inputs were rejected ({tally}); {where}")
    if rejected > publication.max_reject_ratio * total:
        share = f"{rejected} of {total} inputs were rejected ({tally})"
        raise UserError(f"{share}, more than --max_reject_ratio {publication.max_reject_ratio:g} allows; {where}")


def _gather_rejects(staging: str, ordered: Sequence[WrittenShard]) -> str:
    uri = join(staging, REJECTS)
    with open_write(uri) as gathered:
        for shard in ordered:
            if shard.rejects_uri:
                with open_read(shard.rejects_uri) as file:
                    shutil.copyfileobj(file, gathered)
    return uri


def _remove_published(output: str, staging: str) -> None:
    """Take away an earlier data set, once, its manifest first: without one, what is left does not pass for whole."""
    done = join(staging, "earlier-data-removed")
    if not exists(done):
        for uri in published_files(output):
            delete([uri])
        open_write(done).close()


def _manifest(
    publication: Publication,
    counts: Counts,
    inputs: Mapping[str, int],
    files: list[dict[str, Any]],
    segmenters: list[str],
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "started": publication.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": dict(sorted(inputs.items())),
        **counts.as_json(),
        "files": files,
        "segmenters": [json.loads(segmenter) for segmenter in segmenters],
        "configuration": publication.configuration,
        "versions": {
            "collavo": collavo.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
    }


def _write_manifest(publication: Publication, manifest: dict[str, Any]) -> None:
    staged = join(publication.staging, MANIFEST)
    with open_write(staged) as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    rename(staged, join(publication.output, MANIFEST))
