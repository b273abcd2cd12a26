"""From a command line to a job: Beam's options, the checks of what the flags say together, and the job itself.

Every contradiction is refused in one line, before anything is read or written.
"""

import json
import posixpath
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from posixpath import basename, join
from typing import Any

import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

import collavo
from collavo.categories import categories_of_annotations, categories_of_file, common_set, joined, labels_by_id
from collavo.cli import naming
from collavo.dataset import category_set, opened_parquet, read_records, stated_facts
from collavo.dataset import notes as file_notes
from collavo.embedded import SCENES, find_embedded
from collavo.errors import Rejected, UserError
from collavo.folders import staging_of
from collavo.instructions.phrasebook import DEFAULT_PHRASEBOOK, Phrasebook, load_phrasebook
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import NoSegmenter, Segmenter, checkpoint_categories, load_segmenter
from collavo.sources import parsed_json
from collavo.sources.records import NoImageColumn, count_records, ignored_columns, is_record_file, is_tar
from collavo.storage import (
    MANIFEST,
    canonical,
    exists,
    fixed_part,
    is_local,
    read_bytes,
)
from pipelines.earlier import IMAGES_BELOW, check_extension
from pipelines.job import WORK, CrayonJob, ModelConfig, Publication
from pipelines.options import Flags, SegmentationFlags, SourceFlags, build_parser
from pipelines.publish import FAILED_REJECTS, content_of, published_files, strangers
from pipelines.runners import check_file_systems, check_workers, parse_beam_options
from pipelines.sources import (
    CocoSource,
    ImagesSource,
    LlavaSource,
    RecordSource,
    Sources,
    folder_of,
    is_absolute,
    is_list,
    listed_paths,
    open_records,
    opened_json,
    path_in,
    source_named,
    visible_files,
)
from schemas.categories import COCO_PANOPTIC, CategorySet, name_key

_PATH_FLAGS = (
    *("coco_panoptic", "coco_instances", "coco_images", "coco_masks", "llava_json", "image_root", "images"),
    *("dataset", "from_crayon", "output"),
)
"""Flags whose values may lie in any storage."""

_TRANSFORMERS_FLAGS = ("segmenter_preset", "segmenter_input_size")

_MODEL_FLAGS = ("segmenter_checkpoint", "segmenter_config", *_TRANSFORMERS_FLAGS, "model_copies", "accelerator")
"""Flags that are refused where no model runs. The device and the bounds of a batch are let pass: scripts always set
them."""

_IMAGE_FLAGS = (
    *("segmenter", *_MODEL_FLAGS, "device", "batch_size", "max_batch_pixels"),
    *("validation_ratio", "max_pixels", "mask_frame"),
)
"""Flags about what is settled in finished rows."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a checked command line asks for."""

    job: CrayonJob
    beam_options: PipelineOptions
    scenes: str | None
    """The folder that sample scenes are drawn into, before the job reads them."""

    output_content: list[str]
    """What lies in the output; see `content_of`."""

    notes: tuple[str, ...]
    """What the user should know before the job runs, a line each."""


def make_plan(flags: Flags, rest: Sequence[str], share_gpu: bool) -> Plan:
    """Check a command line and make a job of it.

    Args:
        rest: the words that are not the build's own flags, hence Beam's.
        share_gpu: whether several processes of a local run would be on one GPU, if a model runs on GPUs.

    Raises:
        UserError: for anything that cannot work, naming the flag.
    """
    beam_options = parse_beam_options(rest, build_parser())
    _check_unused(flags)
    paths = [(name, path) for name in _PATH_FLAGS for path in _as_tuple(flags.values[name])]
    check_file_systems(beam_options, paths)
    content = _check_output(flags, paths)
    runner = beam_options.view_as(StandardOptions).runner
    publication = _publication(flags, runner)
    scenes = None if flags.sources.named else _scene_folder(publication)
    if flags.output.extend:
        rows = [uri for uri in published_files(publication.output, content) if uri.endswith(".parquet")]
        flags = flags._replace(sources=replace(flags.sources, from_crayon=(*flags.sources.from_crayon, *rows)))
    notes: list[str] = []
    sets = _Sets(flags, notes)
    sources = _scene_sources(scenes, flags, sets) if scenes else _named_sources(flags.sources, sets, notes)
    if not flags.output.embed_images:  # by a hash, since the data are to hold no path of this machine
        below = sha256(sources.root.encode()).hexdigest()
        publication = publication._replace(configuration={**publication.configuration, IMAGES_BELOW: below})
    job = _job(flags, sources, sets, publication)
    sets.note_unused()
    if job.model is None and (unused := flags.given & set(_MODEL_FLAGS)):
        raise UserError(
            f"--{min(unused)}: no model runs, annotations are all there is; --segmenter transformers runs one"
        )
    if flags.output.extend:
        check_extension(publication.output, publication.configuration, job.phrasebook.sha256, job.model is not None)
    device = flags.segmentation.device if job.model else None
    check_workers(beam_options, share_gpu, device, flags.segmentation.model_copies, flags.segmentation.accelerator)
    return Plan(job, beam_options, scenes, content, tuple(notes))


def _check_unused(flags: Flags) -> None:
    """Refuse flags that the others leave without effect: whoever sets one expects it to act."""
    sources, segmenter = flags.sources, flags.segmentation.segmenter
    output = flags.output
    for one, other in (("extend", "overwrite"), ("resume", "discard")):
        if getattr(output, one) and getattr(output, other):
            raise UserError(f"--{one} and --{other} contradict each other")
    if sources.dataset and not output.embed_images:
        raise UserError("--image_storage reference: what --dataset names holds its pictures, and no path leads to one")
    only_rows = sources.from_crayon and not (sources.coco or sources.llava_json or sources.images or sources.dataset)
    rules = [
        *((name, sources.coco, "with COCO files") for name in ("coco_images", "coco_split")),
        ("coco_masks", sources.coco_panoptic, "with --coco_panoptic"),
        ("llava_split", sources.llava_json, "with --llava_json"),
        ("images_split", sources.images, "with --images"),
        *((name, sources.dataset, "with --dataset") for name in ("dataset_split", "image_column")),
        ("image_root", sources.llava_json or sources.images, "with --llava_json or --images"),
        *((name, not sources.named, "where no source is named") for name in ("scenes", "scene_size")),
        ("segmenter_config", segmenter == "detectron2", "with --segmenter detectron2"),
        *(
            (name, segmenter not in ("detectron2", "none"), "with --segmenter transformers")
            for name in _TRANSFORMERS_FLAGS
        ),
        ("segmenter_checkpoint", segmenter != "none", "with a segmenter"),
        ("extend", sources.named, "with sources to add"),
        ("max_images", not sources.from_crayon and not output.extend, "on images that no finished row holds"),
        *((name, not only_rows, "on images; --from_crayon reads finished rows") for name in _IMAGE_FLAGS),
    ]
    for name, acts, where in rules:
        if name in flags.given and not acts:
            raise UserError(f"--{name} acts only {where}")


def _check_output(flags: Flags, paths: Sequence[tuple[str, str]]) -> list[str]:
    """Refuse an output that holds what must not be lost; return what it holds."""
    output = flags.output.output
    if is_local(output) and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    with source_named("output", output):
        content = content_of(output)
    present = [uri for uri in published_files(output, content) if basename(uri) != FAILED_REJECTS]
    if foreign := strangers(output, content):
        raise UserError(
            f"--output {output} holds {foreign[0]}, which is not part of a data set, and would be replaced as a whole; "
            "move that away or name another folder"
        )
    if flags.output.extend and not (present and basename(present[0]) == MANIFEST):
        raise UserError(f"--extend: --output {output} holds no data set")
    if present and not (flags.output.overwrite or flags.output.extend):
        raise UserError(
            f"--output {output} holds a data set already ({present[0]}); --overwrite would replace it, --extend would "
            "add to it"
        )
    for name, path in paths:  # finished rows are safe to replace: they are read before
        if name not in ("output", "from_crayon") and present and canonical(path).startswith(f"{canonical(output)}/"):
            raise UserError(f"--{name} {path}: lies in --output {output}, which is replaced; name another output")
    return content


def _publication(flags: Flags, runner: str) -> Publication:
    """Decide where the job writes, and what the manifest records of the flags."""
    output = flags.output.output
    # Workers in containers may see no more of the disk than the output itself.
    stage_inside = runner != "DirectRunner"
    folder = str(staging_of(Path(output), stage_inside)) if is_local(output) else output
    unused = ("scenes", "scene_size") if flags.sources.named else ()
    given = {k: v for k, v in sorted(flags.values.items()) if v not in (None, (), "") and k not in unused}
    if not flags.sources.named and flags.segmentation.segmenter in ("auto", "transformers"):
        given.setdefault("segmenter_checkpoint", SCENES)
    return Publication(
        output=output,
        folder=folder,
        stage_inside=stage_inside,
        work=join(folder, f"{WORK}{uuid.uuid4().hex[:12]}"),
        configuration={**given, "runner": runner},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _scene_folder(publication: Publication) -> str:
    if not is_local(publication.output):
        raise UserError("no source is named, and sample scenes are drawn on local disks only; try --coco_panoptic")
    return f"{publication.output.rstrip('/')}_scenes"


def _scene_sources(folder: str, flags: Flags, sets: "_Sets") -> Sources:
    target = sets.target if flags.segmentation.segmenter == "annotations" else COCO_PANOPTIC
    labels = labels_by_id(COCO_PANOPTIC, target, sets.renamed)
    root = canonical(join(folder, "x")).removesuffix("/x")
    json_uri, images, masks = (join(root, name) for name in ("panoptic.json", "images", "panoptic"))
    return Sources(
        root=root,
        coco=(CocoSource("scenes", json_uri, images, masks, labels),),
        llava=(LlavaSource("scenes", join(root, "dialogues.json"), root, "dialogues.json"),),
    )


class _Sets:
    """The sets of classes of a command line's sources, which have to become one."""

    def __init__(self, flags: Flags, notes: list[str]) -> None:
        self.notes = notes
        self._found: list[CategorySet] = []
        self._looked_for: list[CategorySet] = []
        self._finished: CategorySet | None = None
        self.stated = self.renamed = None
        if path := flags.segmentation.categories:
            with naming("categories"):
                self.stated = categories_of_file(path, _bytes_of(path))
        if path := flags.segmentation.category_map:
            with naming("category_map"):
                self.renamed = _read_map(path)

    def of_annotations(self, flag: str, uri: str) -> CategorySet:
        """Read the set of an annotation file; COCO panoptic's where the file states none."""
        with opened_json(flag, uri) as file:
            found = categories_of_annotations(file, uri, are_things=flag == "coco_instances")
        if found is None:
            self.notes.append(f"{uri} has no 'categories'; its numbers are taken for {COCO_PANOPTIC.name}'s")
        self.add(found or COCO_PANOPTIC)
        return found or COCO_PANOPTIC

    def add(self, found: CategorySet) -> None:
        """Take note of a set that the rows are to have."""
        self._found.append(found)
        self._looked_for.append(found)

    def would_take(self, found: CategorySet) -> bool:
        """Tell whether a set agrees with those known so far, or something says which class is which."""
        if self.stated or self.renamed or not self._found:
            return True
        try:
            common_set(self._joined([*self._found, found]))
        except UserError:
            return False
        return True

    def note_unused(self) -> None:
        """Tell of names in the map that no source has: a slip in one leaves a class as it is."""
        known = {key for found in self._looked_for for key in found.by_key}
        if unused := [name for name in self.renamed or () if name_key(name) not in known]:
            self.notes.append(f"--category_map: no source has {', '.join(map(repr, unused))}")

    def add_finished(self, found: CategorySet, files: Sequence[str]) -> None:
        """Take note of the set of finished rows, which have to keep it: they name classes by their place in it.

        Rows that another tool has rewritten no longer state what was looked for; what a folder of them shows was.
        """
        self._finished = found
        self._found.insert(0, found)
        shown: dict[str, set[int]] = {}
        for uri in files:
            with opened_parquet(uri) as parquet:
                facts = stated_facts(parquet.metadata.metadata, uri)
                if not facts:
                    shown.setdefault(posixpath.dirname(uri), set()).update(_labels_shown(parquet))
            names = facts.get("askable")
            if isinstance(names, list):
                self._looked_for.append(CategorySet(found.name, tuple(c for c in found if c.name in names)))
        for folder, labels in shown.items():
            self._looked_for.append(CategorySet(found.name, tuple(c for c in found if c.label in labels)))
            self.notes.append(
                f"{folder or '.'}: another tool has rewritten rows, and dropped which classes were looked for; only "
                "those that their segments show are asked for where they are absent"
            )

    def askable(self) -> frozenset[int] | None:
        """Return the things, as positions among those of the target, that every source looks for; None for all.

        A file with three of COCO's classes joins COCO's set, and says nothing about the others.
        """
        position_of, askable = self.target.thing_positions, frozenset(range(len(self.target.things)))
        for found in self._looked_for:
            labels = labels_by_id(found, self.target, self.renamed).values()
            askable &= {position_of[label] for label in labels if label in position_of}
        return askable if len(askable) < len(position_of) else None

    def _joined(self, sets: Sequence[CategorySet]) -> list[CategorySet]:
        """Let sets join the built-in one, unless finished rows say which set it is."""
        return [*sets] if self._finished else [joined(found) for found in sets]

    @property
    def target(self) -> CategorySet:
        """The set that the rows have.

        Raises:
            UserError: if sources have different sets, and nothing says which class is which.
        """
        if self.stated:
            target = self.stated
        elif self.renamed and self._found:
            target = self._joined(self._found)[0]
        else:
            target = common_set(self._joined(self._found)) if self._found else COCO_PANOPTIC
        if self._finished and [(c.name, c.is_thing) for c in self._finished] != [(c.name, c.is_thing) for c in target]:
            raise UserError(
                f"the finished rows have the classes of {self._finished.name}, which are not those of {target.name}; "
                "build the others apart, or say with --category_map which of the first is which"
            )
        return target


def _labels_shown(parquet: pq.ParquetFile) -> set[int]:
    """Read which classes the segments of a file show."""
    records = read_records(parquet, columns=["segments"])
    return {s["label"] for record in records if isinstance(record, dict) for s in record["segments"] or () if s}


def _read_map(path: str) -> dict[str, str]:
    data = _bytes_of(path)
    try:
        renamed = parsed_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise UserError(f'{path}: expected an object of names, such as {{"pedestrian": "person"}}')
    return renamed


def _bytes_of(path: str) -> bytes:
    try:
        return read_bytes(path)
    except Rejected as error:
        said = {"missing_file": "there is no such file", "not_a_file": "this is not a file"}
        raise UserError(f"{path}: {said[error.reason]}" if error.reason in said else str(error)) from error


def _named_sources(flags: SourceFlags, sets: _Sets, notes: list[str]) -> Sources:
    if len(flags.coco_images) != len(flags.coco):
        raise UserError(
            f"--coco_images names {len(flags.coco_images)} folders for {len(flags.coco)} COCO files; each file "
            "needs the folder of its images"
        )
    masks = flags.coco_masks or tuple(uri.removesuffix(".gz").removesuffix(".json") for uri in flags.coco_panoptic)
    if len(masks) != len(flags.coco_panoptic):
        raise UserError(f"--coco_masks names {len(masks)} folders for {len(flags.coco_panoptic)} --coco_panoptic files")
    if flags.llava_json and not flags.image_root:
        raise UserError("--llava_json needs --image_root, the folder that its image paths start from")
    for name in ("coco_panoptic", "coco_instances", "coco_images", "coco_masks", "llava_json", "image_root", "dataset"):
        for uri in masks if name == "coco_masks" else _as_tuple(getattr(flags, name)):
            if is_local(uri) and not exists(uri) and not (name == "dataset" and fixed_part(uri) != uri):
                if name == "coco_masks" and not flags.coco_masks:
                    raise UserError(
                        f"--coco_panoptic {flags.coco_panoptic[masks.index(uri)]}: its masks are looked for in {uri}, "
                        "which is not there; --coco_masks names their folder, and --coco_instances reads instance files"
                    )
                raise UserError(f"--{name} {uri}: there is no such file or folder")
    own = [sets.of_annotations("coco_panoptic", uri) for uri in flags.coco_panoptic]
    own += [sets.of_annotations("coco_instances", uri) for uri in flags.coco_instances]
    crayon_files = tuple(
        uri
        for pattern in flags.from_crayon
        for uri in _files_named("from_crayon", pattern, lambda name: name.endswith(".parquet"), ".parquet")
    )
    if crayon_files:
        with naming("from_crayon"):
            sets.add_finished(category_set(crayon_files), crayon_files)
            notes.extend(file_notes(crayon_files))
    tables = [labels_by_id(source, sets.target, sets.renamed) for source in own]
    splits = _parallel("coco_split", flags.coco_split, flags.coco, notes)
    names = ("coco",) * len(flags.coco_panoptic) + ("coco_instances",) * len(flags.coco_instances)
    masks += ("",) * len(flags.coco_instances)
    columns = zip(names, flags.coco, flags.coco_images, masks, tables, splits, strict=True)
    coco = tuple(CocoSource(*of_file) for of_file in columns)
    root = flags.image_root or ""
    llava_splits = _parallel("llava_split", flags.llava_split, flags.llava_json, notes)
    llava = tuple(
        LlavaSource("llava", uri, root, short, split)
        for uri, short, split in zip(flags.llava_json, _short_paths(flags.llava_json), llava_splits, strict=True)
    )
    image_splits = _parallel("images_split", flags.images_split, flags.images, notes)
    images = tuple(ImagesSource(pattern, root, s) for pattern, s in zip(flags.images, image_splits, strict=True))
    shards = [_record_files(path, notes) for path in flags.dataset]
    dataset_splits = _parallel("dataset_split", flags.dataset_split, flags.dataset, notes, shards)
    for path, uris in zip(flags.dataset, shards, strict=True):
        notes += _columns_note(path, uris[0], flags.image_column)
    return Sources(
        root=_common_root([*(source.images_root for source in coco), *([root] if llava else [])], images, notes),
        coco=coco,
        llava=llava,
        images=images,
        records=tuple(
            RecordSource(uri, flags.image_column, split)
            for uris, split in zip(shards, dataset_splits, strict=True)
            for uri in uris
        ),
        crayon_files=crayon_files,
    )


def _parallel(
    flag: str, given: tuple[str, ...], sources: Sequence[str], notes: list[str], files: Sequence[Sequence[str]] = ()
) -> tuple[str, ...]:
    """Choose a split for each source; an empty one stands for a choice by content.

    Args:
        files: of each source, where it has several.
    """
    if not given:
        names = {uri: basename(uri.rstrip("/")) for uri in sources}
        for source, uris in zip(sources, files, strict=False):
            names |= {uri: uri.removeprefix(f"{source.rstrip('/')}/") for uri in uris if uri.startswith(source)}
        for uri, name in names.items():
            if match := re.search(r"(?<![a-z])(train|val|validation|test)(?![a-z])", name.lower()):
                notes.append(
                    f"{uri} says {match[1]!r} in its name, but pictures are split by their content; --{flag} keeps a "
                    "source's own split"
                )
                break
        return ("",) * len(sources)
    if len(given) == 1:
        return given * len(sources)
    if len(given) != len(sources):
        raise UserError(f"--{flag} names {len(given)} splits for {len(sources)} sources; name one, or one for each")
    return given


def _short_paths(uris: Sequence[str]) -> list[str]:
    """Name files by their paths below the folder that all of them lie in."""
    paths = [canonical(uri) for uri in uris]
    root = _shared_folder([posixpath.dirname(path) for path in paths])
    return [path.removeprefix(root).lstrip("/") for path in paths]


def _common_root(roots: Sequence[str], images: Sequence[ImagesSource], notes: list[str]) -> str:
    """Return the folder that all images lie in, from which their ids count: the same however the command was typed."""
    folders = [canonical(join(root, "x")).removesuffix("/x") for root in roots]
    for source in images:
        folders += {posixpath.dirname(path) for path in _list_for_root(source, notes)}
    return _shared_folder(folders)


def _shared_folder(folders: Sequence[str]) -> str:
    # By parts, not by characters; `s3:` is one of them, and two kinds of storage share none.
    shared = posixpath.commonprefix([folder.split("/") for folder in folders])
    return "/".join(shared) or ("/" if shared else "".join(folders[:1]))


def _list_for_root(source: ImagesSource, notes: list[str]) -> list[str]:
    with source_named("images", source.pattern):
        paths, hidden = listed_paths(source.pattern)
    if hidden:
        files = "hidden file is" if hidden == 1 else "hidden files are"
        notes.append(f"{source.pattern}: {hidden:,} {files} left out")
    if not is_list(source.pattern):
        below = folder_of(source.pattern)
        return [path_in(below, path) for path in paths]
    named = {path if is_absolute(path) else join(source.image_root, "x") for path in paths}
    return [canonical(path) for path in named]


def _files_named(flag: str, pattern: str, is_wanted: Callable[[str], bool], kind: str) -> list[str]:
    """List the files of a kind that a glob or folder names."""
    with source_named(flag, pattern):
        found = [uri for uri in visible_files(pattern)[0] if is_wanted(uri)]
    if not found:
        raise UserError(f"--{flag} {pattern}: names no {kind} file")
    return found


def _record_files(path: str, notes: list[str]) -> list[str]:
    """List the files of a data set, without the Parquet files that img2dataset puts beside its tars: their rows say
    where each picture came from."""
    found = _files_named("dataset", path, is_record_file, ".parquet or .tar")
    tars = {re.sub(r"\.(tar|tar\.gz|tgz)$", "", uri, flags=re.IGNORECASE) for uri in found if is_tar(uri)}
    kept = [uri for uri in found if is_tar(uri) or posixpath.splitext(uri)[0] not in tars]
    if beside := len(found) - len(kept):
        files = "a .parquet file is" if beside == 1 else f"{beside:,} .parquet files are"
        notes.append(f"{path}: {files} left out, as a tar of the same name holds the pictures")
    return kept


def _columns_note(path: str, uri: str, image_column: str | None) -> list[str]:
    """Name the columns of a data set that nothing is taken from; its first file stands for all."""
    with source_named("dataset", uri), open_records(uri) as file:
        try:
            unused = ignored_columns(file, uri, image_column)
        except NoImageColumn as error:
            raise UserError(f"{error}; --image_column names the one with the images") from error
    return [f"{path}: nothing is taken from the columns {', '.join(unused)}"] if unused else []


def _count_records(sources: Sequence[RecordSource]) -> int:
    total = 0
    for source in sources:
        with source_named("dataset", source.uri), open_records(source.uri) as file:
            total += count_records(file, source.uri)
    return total


def _job(flags: Flags, sources: Sources, sets: _Sets, publication: Publication) -> CrayonJob:
    segmenter = flags.segmentation.segmenter
    if segmenter == "annotations" and not sources.coco and not sources.crayon_files:
        raise UserError(
            "--segmenter annotations needs --coco_panoptic or --coco_instances; auto, transformers, detectron2 do not"
        )
    phrasebook = _phrasebook(flags)
    options = flags.instructions.options
    model = _model(flags.segmentation, sources, sets)
    if model and publication.configuration["runner"] != "DirectRunner":
        for name in ("segmenter_checkpoint", "segmenter_config"):
            path = flags.values[name]
            if path and not find_embedded(path) and Path(path).exists():
                sets.notes.append(
                    f"--{name} {path}: every worker reads this from its own disk, at the same path; docs/runners.md "
                    "says how to put it into their image"
                )
    with naming("segmenter"):
        askable = sets.askable()
    return CrayonJob(
        publication=publication,
        sources=sources,
        use_annotations=segmenter == "annotations" or (segmenter == "auto" and not sources.scenes_only),
        model=model,
        instructions=options,
        phrasebook=phrasebook,
        facts={
            "code_version": collavo.__version__,
            "templates_sha256": phrasebook.sha256,
            "instructions": asdict(options),
            **({} if askable is None else {"askable": [sets.target.things[place].name for place in sorted(askable)]}),
        },
        categories=sets.target,
        askable=askable,
        mask_frame=flags.segmentation.mask_frame,
        output=flags.output,
        record_count=_count_records(sources.records) if flags.output.max_images else 0,
    )


def _phrasebook(flags: Flags) -> Phrasebook:
    path = Path(flags.instructions.templates or DEFAULT_PHRASEBOOK)
    with naming("templates"):
        phrasebook = load_phrasebook(path)
    tasks = flags.instructions.tasks
    if not set(tasks) & set(phrasebook.phrasings):
        known = ", ".join(phrasebook.phrasings)
        raise UserError(f"--tasks {' '.join(tasks)}: {path} has phrasings for {known} only")
    return phrasebook


def _model(flags: SegmentationFlags, sources: Sources, sets: _Sets) -> ModelConfig | None:
    """Choose the model for the images that no annotation segments; None where annotations or finished rows are all
    there is.

    Drawn scenes have annotations, but unless these are asked for a network looks at them, as it would at photographs.
    """
    unannotated = sources.scenes_only or sources.llava or sources.images or sources.records
    if flags.segmenter == "annotations" or not (unannotated or sources.coco):
        return None
    if flags.segmenter == "auto" and not unannotated:
        return None
    if flags.segmenter == "none":
        return ModelConfig(NoSegmenter, flags.batch_size, flags.max_batch_pixels, flags.model_copies)
    name = "transformers" if flags.segmenter == "auto" else flags.segmenter
    options: dict[str, Any] = {"checkpoint": flags.segmenter_checkpoint, "device": flags.device}
    if name == "transformers":
        if sources.scenes_only and flags.segmenter_checkpoint is None:
            options["checkpoint"] = SCENES
        options |= {"input_size": flags.segmenter_input_size, "batch_size": flags.batch_size}
        options["thresholds"] = THRESHOLD_PRESETS[flags.segmenter_preset] if flags.segmenter_preset else None
    else:
        options["config"] = flags.segmenter_config
    options = {name: value for name, value in options.items() if value is not None}
    with naming("segmenter_checkpoint"):
        if name == "transformers" and "://" in options.get("checkpoint", ""):
            raise UserError(
                f"{options['checkpoint']}: a network is read from a disk or the hub; copy it to a folder that every "
                "worker has"
            )
        found = checkpoint_categories(name, options.get("checkpoint"), sets.stated)
        # Dialogues are mostly about pictures that are annotated. A network that nobody named, and that has other
        # classes, is no reason to refuse them.
        unasked = flags.segmenter == "auto" and flags.segmenter_checkpoint is None
        if unasked and sources.coco and not (sources.images or sources.records) and not sets.would_take(found):
            sets.notes.append(
                "no network with these classes is named: a picture that only dialogues name becomes a reject; "
                "--segmenter_checkpoint names one"
            )
            return None
        sets.add(found)
        if not found.things:
            sets.notes.append(
                f"{options.get('checkpoint')}: all of its {len(found)} classes are stuff, as of a network for semantic "
                "segmentation, which gives one mask a class; nothing is counted"
            )
    options |= {"categories": sets.target, "category_map": sets.renamed}
    return ModelConfig(
        load=partial(_load_segmenter, name, **options),
        batch_size=flags.batch_size,
        max_batch_pixels=flags.max_batch_pixels,
        model_copies=flags.model_copies,
        accelerator=flags.accelerator,
        maps_rest_on=_digest_of(sets, options.get("checkpoint")),
    )


def _digest_of(sets: _Sets, checkpoint: str | None) -> str:
    """Compute `ModelConfig.maps_rest_on`. Files are those of a folder, or one of weights, on this machine's disk."""
    digest = sha256(json.dumps([sets.target.as_records(), sets.renamed], sort_keys=True).encode())
    embedded = find_embedded(checkpoint) if checkpoint else None  # which goes before a folder of its name
    place = embedded.folder if embedded else Path(checkpoint or "")
    files = [place] if place.is_file() else sorted(place.iterdir()) if checkpoint and place.is_dir() else []
    for path in files:
        if path.suffix in (".json", ".safetensors", ".bin", ".pkl", ".pth"):
            with path.open("rb") as file:
                digest.update(file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _load_segmenter(name: str, **options: Any) -> Segmenter:
    """Load the network in a worker, where an error about it is still one about a flag."""
    from collavo.device import resolve_device  # torch, which a launcher can do without

    with naming("device"):
        resolve_device(options["device"])
    with naming("segmenter"):
        return load_segmenter(name, **options)


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,) if value else ()
