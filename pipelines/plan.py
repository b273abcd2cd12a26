"""From a command line to a job: Beam's options, the checks of what the flags say together, and the job itself.

Every contradiction is refused in one line, before anything is read or written.
"""

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from posixpath import join
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

import collavo
from collavo.cli import naming
from collavo.embedded import SCENES
from collavo.errors import UserError
from collavo.folders import staging_of
from collavo.instructions.phrasebook import DEFAULT_PHRASEBOOK, Phrasebook, load_phrasebook
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import load_segmenter
from collavo.storage import FAULTS, canonical, exists, is_local, list_files
from pipelines.job import CrayonJob, ModelConfig, Publication
from pipelines.options import Flags, SegmentationFlags, SourceFlags, build_parser
from pipelines.publish import SCENES_FOLDER, published_files, strangers
from pipelines.runners import check_file_systems, check_workers, parse_beam_options
from pipelines.sources import CocoSource, ImagesSource, LlavaSource, Sources

_PATH_FLAGS = (
    *("coco_panoptic", "coco_images", "coco_masks", "llava_json", "image_root", "images"),
    *("from_crayon", "output"),
)
"""Flags whose values may lie in any storage."""

_MASK2FORMER_FLAGS = ("segmenter_preset", "segmenter_input_size")

_MODEL_FLAGS = ("segmenter_checkpoint", "segmenter_config", *_MASK2FORMER_FLAGS, "model_copies")
"""Flags that are refused where no model runs. The device and the bounds of a batch are let pass: scripts always set
them."""

_IMAGE_FLAGS = (
    *("segmenter", *_MODEL_FLAGS, "device", "batch_size", "max_batch_pixels"),
    *("validation_ratio", "max_pixels"),
)
"""Flags about what is settled in finished rows."""


@dataclass(frozen=True, slots=True)
class SceneRequest:
    """Sample scenes to draw before the job reads them."""

    folder: str
    count: int
    size_wh: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a checked command line asks for."""

    job: CrayonJob
    beam_options: PipelineOptions
    scenes: SceneRequest | None


def make_plan(flags: Flags, rest: Sequence[str]) -> Plan:
    """Check a command line and make a job of it.

    Args:
        rest: the words that are not the build's own flags, hence Beam's.

    Raises:
        UserError: for anything that cannot work, naming the flag.
    """
    beam_options = parse_beam_options(rest, build_parser())
    _check_unused(flags)
    paths = [(name, path) for name in _PATH_FLAGS for path in _as_tuple(flags.values[name])]
    check_file_systems(beam_options, paths)
    _check_output(flags, paths)
    runner = beam_options.view_as(StandardOptions).runner
    publication = _publication(flags, runner)
    scenes = None if flags.sources.named else _scene_request(flags.sources, publication)
    sources = _scene_sources(scenes.folder) if scenes else _named_sources(flags.sources)
    job = _job(flags, sources, publication)
    if job.model is None and (unused := flags.given & set(_MODEL_FLAGS)):
        raise UserError(
            f"--{min(unused)}: no model runs, annotations are all there is; --segmenter mask2former runs one"
        )
    check_workers(beam_options, flags.segmentation.device if job.model else None, flags.segmentation.model_copies)
    return Plan(job, beam_options, scenes)


def _check_unused(flags: Flags) -> None:
    """Refuse flags that the others leave without effect: whoever sets one expects it to act."""
    sources, segmenter = flags.sources, flags.segmentation.segmenter
    rules = [
        *((name, sources.coco_panoptic, "with --coco_panoptic") for name in ("coco_images", "coco_masks")),
        ("image_root", sources.llava_json or sources.images, "with --llava_json or --images"),
        *((name, not sources.named, "where no source is named") for name in ("scenes", "scene_size")),
        ("segmenter_config", segmenter == "detectron2", "with --segmenter detectron2"),
        *((name, segmenter != "detectron2", "with mask2former") for name in _MASK2FORMER_FLAGS),
        *((name, not sources.from_crayon, "on images; --from_crayon reads finished rows") for name in _IMAGE_FLAGS),
    ]
    for name, acts, where in rules:
        if name in flags.given and not acts:
            raise UserError(f"--{name} acts only {where}")


def _check_output(flags: Flags, paths: Sequence[tuple[str, str]]) -> None:
    """Refuse an output that holds what must not be lost."""
    output = flags.output.output
    if is_local(output) and Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output {output}: is a file; name a folder")
    try:
        present = published_files(output)
    except FAULTS as error:
        raise UserError(f"--output {output}: {error}") from error
    if foreign := strangers(output):
        raise UserError(
            f"--output {output} holds {foreign[0]}, which is not part of a data set, and would be replaced as a whole; "
            "move that away or name another folder"
        )
    if present and not flags.output.overwrite:
        raise UserError(f"--output {output} holds a data set already ({present[0]}); --overwrite would replace it")
    for name, path in paths:  # finished rows are safe to replace: they are read before
        if name not in ("output", "from_crayon") and present and canonical(path).startswith(f"{canonical(output)}/"):
            raise UserError(f"--{name} {path}: lies in --output {output}, which is replaced; name another output")


def _publication(flags: Flags, runner: str) -> Publication:
    """Where the job writes, and what the manifest records of the flags."""
    output = flags.output.output
    folder = str(staging_of(Path(output))) if is_local(output) else output
    unused = ("scenes", "scene_size") if flags.sources.named else ()
    given = {k: v for k, v in sorted(flags.values.items()) if v not in (None, (), "") and k not in unused}
    return Publication(
        output=output,
        folder=folder,
        work=join(folder, f".work-{uuid.uuid4().hex[:12]}"),
        configuration={**given, "runner": runner},
        max_reject_ratio=flags.output.max_reject_ratio,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _scene_request(flags: SourceFlags, publication: Publication) -> SceneRequest:
    if not is_local(publication.output):
        raise UserError("no source is named, and sample scenes are drawn on local disks only; try --coco_panoptic")
    return SceneRequest(join(publication.folder, SCENES_FOLDER), flags.scenes, flags.scene_size)


def _scene_sources(folder: str) -> Sources:
    coco = CocoSource("scenes", join(folder, "panoptic.json"), join(folder, "images"), join(folder, "panoptic"))
    return Sources(coco=(coco,), llava=(LlavaSource("scenes", join(folder, "dialogues.json"), folder),))


def _named_sources(flags: SourceFlags) -> Sources:
    if flags.from_crayon and (flags.coco_panoptic or flags.llava_json or flags.images):
        raise UserError("--from_crayon starts from finished rows and goes with no other source")
    if len(flags.coco_images) != len(flags.coco_panoptic):
        raise UserError(
            f"--coco_images names {len(flags.coco_images)} folders for {len(flags.coco_panoptic)} --coco_panoptic "
            "files; each file needs the folder of its images"
        )
    masks = flags.coco_masks or tuple(uri.removesuffix(".json") for uri in flags.coco_panoptic)
    if len(masks) != len(flags.coco_panoptic):
        raise UserError(f"--coco_masks names {len(masks)} folders for {len(flags.coco_panoptic)} --coco_panoptic files")
    if flags.llava_json and not flags.image_root:
        raise UserError("--llava_json needs --image_root, the folder that its image paths start from")
    for name in ("coco_panoptic", "coco_images", "coco_masks", "llava_json", "image_root"):
        for uri in masks if name == "coco_masks" else _as_tuple(getattr(flags, name)):
            if is_local(uri) and not exists(uri):
                raise UserError(f"--{name} {uri}: there is no such file or folder")
    annotated = zip(flags.coco_panoptic, flags.coco_images, masks, strict=True)
    root = flags.image_root or ""
    return Sources(
        coco=tuple(CocoSource("coco", *uris) for uris in annotated),
        llava=tuple(LlavaSource("llava", uri, root) for uri in flags.llava_json),
        images=tuple(ImagesSource(pattern, root) for pattern in flags.images),
        crayon_files=tuple(uri for pattern in flags.from_crayon for uri in _crayon_files(pattern)),
    )


def _crayon_files(pattern: str) -> list[str]:
    try:
        found = [uri for uri in list_files(pattern) if uri.endswith(".parquet")]
    except FAULTS as error:
        raise UserError(f"--from_crayon {pattern}: {error}") from error
    if not found:
        raise UserError(f"--from_crayon {pattern}: names no .parquet file")
    return found


def _job(flags: Flags, sources: Sources, publication: Publication) -> CrayonJob:
    segmenter = flags.segmentation.segmenter
    if segmenter == "annotations" and not sources.coco and not sources.crayon_files:
        raise UserError("--segmenter annotations needs --coco_panoptic; auto, mask2former and detectron2 do not")
    phrasebook = _phrasebook(flags)
    options = flags.instructions.options
    return CrayonJob(
        publication=publication,
        sources=sources,
        use_annotations=segmenter == "annotations" or (segmenter == "auto" and not sources.scenes_only),
        model=_model(flags.segmentation, sources),
        instructions=options,
        phrasebook=phrasebook,
        facts={
            "code_version": collavo.__version__,
            "templates_sha256": phrasebook.sha256,
            "instructions": asdict(options),
        },
        embed_images=flags.output.image_storage == "embed",
        validation_ratio=flags.output.validation_ratio,
        max_pixels=flags.output.max_pixels,
        num_shards=flags.output.num_shards,
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


def _model(flags: SegmentationFlags, sources: Sources) -> ModelConfig | None:
    """The model for the images that no annotation segments; None where annotations or finished rows are all there is.

    Drawn scenes have annotations, but unless these are asked for a network looks at them, as it would at photographs.
    """
    annotated_only = not (sources.scenes_only or sources.llava or sources.images)
    if flags.segmenter == "annotations" or sources.crayon_files or (flags.segmenter == "auto" and annotated_only):
        return None
    name = "mask2former" if flags.segmenter == "auto" else flags.segmenter
    options: dict[str, Any] = {"checkpoint": flags.segmenter_checkpoint, "device": flags.device}
    if name == "mask2former":
        if sources.scenes_only and flags.segmenter_checkpoint is None:
            options["checkpoint"] = SCENES
        options |= {"input_size": flags.segmenter_input_size, "batch_size": flags.batch_size}
        options["thresholds"] = THRESHOLD_PRESETS[flags.segmenter_preset] if flags.segmenter_preset else None
    else:
        options["config"] = flags.segmenter_config
    options = {name: value for name, value in options.items() if value is not None}
    return ModelConfig(
        load=partial(load_segmenter, name, **options),
        batch_size=flags.batch_size,
        max_batch_pixels=flags.max_batch_pixels,
        model_copies=flags.model_copies,
    )


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,) if value else ()
