"""What an earlier build leaves for the next one: a data set to extend, or the pictures that a stopped one got to.

The pictures that a network had segmented lie in a folder of the staging folder, each with its map, beside a note of the
flags that the maps hang on. `pipelines.image_steps` finds them there by their content, so that the sources of the next
build may be others.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from posixpath import basename, join
from typing import Any

from rich.filesize import decimal

import collavo
from collavo.dataset import opened_parquet, stated_facts
from collavo.errors import StoreOutage, UserError, first_line
from collavo.storage import (
    FAULTS,
    MANIFEST,
    delete,
    is_local,
    list_files,
    open_read,
    open_write,
    size_of,
)
from pipelines.job import WORK, ModelConfig, Publication
from pipelines.options import InstructionFlags

MAP_FLAGS = (
    *("segmenter", "segmenter_checkpoint", "segmenter_config", "segmenter_preset", "segmenter_input_size"),
    *("categories", "category_map", "image_storage"),
)
"""Flags that decide what a network makes of a picture, and what is kept of it."""

EXTENSION_FLAGS = (*(field.name for field in fields(InstructionFlags)), "validation_ratio", "image_storage")
"""Flags that decide what a row says beside its map."""

IMAGES_BELOW = "images_below"
"""What the manifest calls a SHA-256 of the folder that paths to pictures count from, where rows hold no pictures."""

_NOTE, _RESTS_ON = "made_by.json", "maps_rest_on"


def prepare(
    publication: Publication, content: Sequence[str], resume: bool, discard: bool, model: ModelConfig | None
) -> None:
    """Make ready the folder for what the network will segment.

    Args:
        content: what lies in the folder of the publication, to its depths.
        model: the network, if there is one.

    Raises:
        UserError: if a stopped build has left something and nothing says what to do with it; or if this build is to go
            on with it, and there is nothing or the flags do not fit.
    """
    made_by = _made_by(publication.configuration, model)
    note, left = join(publication.segmented, _NOTE), _segmented(publication, content)
    unused = [uri for uri in content if uri.startswith(join(publication.folder, WORK))]
    if not resume:
        if (left or unused) and not discard:
            kept = f"{_size_of(left)} of finished pictures" + f" and {_size_of(unused)} more" * bool(unused)
            raise UserError(
                f"--output {publication.output}: a stopped build left {kept} there; --resume uses the pictures, "
                "--discard removes all"
            )
        if left or is_local(publication.segmented):
            delete([join(publication.segmented, "")])
    elif note not in content:
        raise UserError(f"--resume: no stopped build has left anything for --output {publication.output}")
    else:
        with open_read(note) as file:
            earlier = json.load(file)
        other = _difference(earlier, made_by, (*MAP_FLAGS, "collavo"))
        if not other and model and earlier.get(_RESTS_ON) != made_by[_RESTS_ON]:
            other = "other classes, another --category_map or other files at --segmenter_checkpoint"
        if other:
            raise UserError(f"--resume: the stopped build had {other}; --discard starts anew")
        if not left:
            print("--resume: the stopped build had not completed a file of finished pictures; all are segmented anew")
    delete(sorted({re.sub(rf"(/{WORK}[^/]*/).*", r"\1", uri) for uri in unused}))
    if model:
        with open_write(note) as file:
            file.write(json.dumps(made_by).encode())


def clear(publication: Publication, interrupted: bool = False, lost: bool = False) -> None:
    """Remove what nobody can use of a build that stopped, and say on standard error what the next one can.

    Where a store does not answer, all is left to the next build, which finds it.

    Args:
        interrupted: whether the user stopped it.
        lost: whether its job may go on, so that nothing is to be removed.
    """
    with suppress(*FAULTS, StoreOutage):
        content = list_files(join(publication.segmented, ""))
        if left := _segmented(publication, content):
            kept = f"{_size_of(left)} of finished pictures are kept in {publication.segmented}"
            if_over = "if the job is over, " * lost
            print(f"{kept}: {if_over}--resume uses them, --discard removes them", file=sys.stderr)
        elif content and interrupted:
            print("nothing is kept: no file of finished pictures was complete yet", file=sys.stderr)
        if lost:
            return
        if not left:
            delete([join(publication.segmented, "")])
        if not is_local(publication.output):  # there, the staging folder vanishes with all of it
            delete([join(publication.work, "")])


def check_extension(output: str, configuration: Mapping[str, Any], templates_sha256: str, by_model: bool) -> None:
    """Make sure that new rows will be made as those of a data set were.

    Args:
        configuration: of the build that extends it.
        by_model: whether a network will segment.

    Raises:
        UserError: naming the flags that differ.
    """
    uri = join(output, MANIFEST)
    with open_read(uri) as file:
        try:
            manifest = json.load(file)
        except ValueError as error:
            raise UserError(f"--extend: {uri} is damaged ({first_line(error)})") from error
    names = [*EXTENSION_FLAGS]
    if by_model and any("segmenter" in made_by for made_by in manifest["segmenters"]):
        names += [name for name in MAP_FLAGS if name not in ("categories", "category_map")]  # sets are compared as such
    difference = _difference(manifest["configuration"], configuration, names)
    uri = join(output, manifest["files"][0]["name"])
    with opened_parquet(uri) as parquet:
        facts = stated_facts(parquet.metadata.metadata, uri)  # which other tools leave out when they write a file again
    if not difference and facts.get("templates_sha256", templates_sha256) != templates_sha256:
        difference = "other --templates"
    if not difference and manifest["configuration"].get(IMAGES_BELOW) != configuration.get(IMAGES_BELOW):
        difference = "pictures below another folder, from which the paths of --image_storage reference count"
    if difference:
        raise UserError(f"--extend: {output} was built with {difference}; give the same, or merge with --from_crayon")


def _segmented(publication: Publication, content: Iterable[str]) -> list[str]:
    return [uri for uri in content if uri.startswith(join(publication.segmented, "")) and basename(uri) != _NOTE]


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """Say in which flags two builds differ; nothing where they do not."""
    now = json.loads(json.dumps(now))
    differing = [name for name in names if earlier.get(name) != now.get(name)]
    return ", ".join(f"--{name} {_shown(earlier.get(name))} (now {_shown(now.get(name))})" for name in differing)


def _made_by(configuration: Mapping[str, Any], model: ModelConfig | None) -> dict[str, Any]:
    flags = {name: configuration.get(name) for name in MAP_FLAGS}
    return {**flags, "collavo": collavo.__version__, _RESTS_ON: model.maps_rest_on if model else ""}


def _size_of(uris: Iterable[str]) -> str:
    return decimal(sum(map(size_of, uris)))


def _shown(value: Any) -> str:
    return "unset" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)
