"""From a command line to a job: Beam's options, the checks of what the flags say together, and the job itself.

Every contradiction is refused in one line, before anything is read or written.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import file_digest, sha256
from pathlib import Path
from posixpath import basename, join
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

import collavo
from collavo.categories import labels_by_id
from collavo.cli import naming
from collavo.embedded import SCENES, find_embedded
from collavo.errors import UserError
from collavo.folders import staging_of
from collavo.instructions.phrasebook import DEFAULT_PHRASEBOOK, Phrasebook, load_phrasebook
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import NoSegmenter, Segmenter, checkpoint_categories, load_segmenter
from collavo.sources.records import count_records
from collavo.storage import MANIFEST, canonical, is_local
from pipelines.earlier import IMAGES_BELOW, check_extension
from pipelines.job import WORK, CrayonJob, ModelConfig, Publication
from pipelines.named_sources import as_tuple, named_sources
from pipelines.options import Flags, SegmentationFlags, build_parser
from pipelines.publish import FAILED_REJECTS, content_of, published_files, strangers
from pipelines.runners import check_file_systems, check_workers, parse_beam_options
from pipelines.source_categories import SourceCategories
from pipelines.sources import CocoSource, LlavaSource, RecordSource, Sources, open_records, source_named
from schemas.categories import COCO_PANOPTIC

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
    paths = [(name, path) for name in _PATH_FLAGS for path in as_tuple(flags.values[name])]
    check_file_systems(beam_options, paths)
    content = _check_output(flags, paths)
    runner = beam_options.view_as(StandardOptions).runner
    publication = _publication(flags, runner)
    scenes = None if flags.sources.named else _scene_folder(publication)
    if flags.output.extend:
        rows = [uri for uri in published_files(publication.output, content) if uri.endswith(".parquet")]
        flags = flags._replace(sources=replace(flags.sources, from_crayon=(*flags.sources.from_crayon, *rows)))
    notes: list[str] = []
    sets = SourceCategories(flags, notes)
    sources = _scene_sources(scenes, flags, sets) if scenes else named_sources(flags.sources, sets, notes)
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


def _scene_sources(folder: str, flags: Flags, sets: SourceCategories) -> Sources:
    target = sets.target if flags.segmentation.segmenter == "annotations" else COCO_PANOPTIC
    labels = labels_by_id(COCO_PANOPTIC, target, sets.renamed)
    root = canonical(join(folder, "x")).removesuffix("/x")
    json_uri, images, masks = (join(root, name) for name in ("panoptic.json", "images", "panoptic"))
    return Sources(
        root=root,
        coco=(CocoSource("scenes", json_uri, images, masks, labels),),
        llava=(LlavaSource("scenes", join(root, "dialogues.json"), root, "dialogues.json"),),
    )


def _count_records(sources: Sequence[RecordSource]) -> int:
    total = 0
    for source in sources:
        with source_named("dataset", source.uri), open_records(source.uri) as file:
            total += count_records(file, source.uri)
    return total


def _job(flags: Flags, sources: Sources, sets: SourceCategories, publication: Publication) -> CrayonJob:
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


def _model(flags: SegmentationFlags, sources: Sources, sets: SourceCategories) -> ModelConfig | None:
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
        found, unseen = checkpoint_categories(name, options.get("checkpoint"), sets.stated)
        # Dialogues are mostly about pictures that are annotated. A network that nobody named, and that has other
        # classes, is no reason to refuse them.
        unasked = flags.segmenter == "auto" and flags.segmenter_checkpoint is None
        if unasked and sources.coco and not (sources.images or sources.records) and not sets.would_take(found):
            sets.notes.append(
                "no network with these classes is named: a picture that only dialogues name becomes a reject; "
                "--segmenter_checkpoint names one"
            )
            return None
        sets.add(found, never_absent=unseen)
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


def _digest_of(sets: SourceCategories, checkpoint: str | None) -> str:
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
