"""The command line of the build: flags, their help, and the checks that make a job of them.

Our flags come first; what is left belongs to Beam (`--runner`, `--direct_num_workers`, `--project`, ...). A flag that
neither knows is refused, and so is every contradiction, in one line, before anything is read.
"""

import argparse
import math
import re
import uuid
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

import collavo
from collavo.cli import Parser
from collavo.embedded import SCENES
from collavo.errors import UserError
from collavo.images import HARD_MAX_PIXELS, MAX_PIXELS
from collavo.instructions.phrasebook import DEFAULT_PHRASEBOOK, load_phrasebook
from collavo.instructions.write import InstructionOptions
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import SEGMENTERS, load_segmenter
from collavo.storage import exists, is_local, join, list_files
from pipelines.graph import CrayonJob, ModelConfig
from pipelines.publish import Publication, published_files
from pipelines.runners import check_file_systems, check_workers, parse_beam_options
from pipelines.sources import CocoSource, ImagesSource, LlavaSource, Sources
from schemas.crayon_row import TASKS

_DESCRIPTION = """\
Build crayon instruction data: images in, one Parquet row per image out, with
its panoptic segments, templated questions and answers about them, and the
dialogues that other data sets hold about it.

Without a source it draws sample scenes and builds from them, so that everything
can be tried without a download. They are segmented by a small network that is
part of this package; --segmenter annotations takes their exact masks instead.
"""

_EPILOG = """\
Any flag of Apache Beam's can follow: --runner DirectRunner, DataflowRunner,
FlinkRunner or SparkRunner, and the options of that runner. Local runs use one
process; where no GPU segments, all cores are put to work by
  --direct_running_mode multi_processing --direct_num_workers 0

examples:
  build_crayon.py --runner DirectRunner
  build_crayon.py --coco_panoptic annotations/panoptic_train2017.json \\
      --coco_images train2017 --output out
  build_crayon.py --llava_json llava_v1_5_mix665k.json \\
      --image_root playground/data --device cuda --output out
  build_crayon.py --images 'photos/**/*.jpg' --segmenter mask2former
  build_crayon.py --images 'drawn/*.jpg' --segmenter_checkpoint scenes
  build_crayon.py --from_crayon 'out/*.parquet' --templates mine.json \\
      --seed 1 --output out2
"""


_PATH_FLAGS = (
    "coco_panoptic",
    "coco_images",
    "coco_masks",
    "llava_json",
    "image_root",
    "images",
    "from_crayon",
    "output",
)
"""Flags whose values may lie on any file system that Beam knows."""

_MASK2FORMER_FLAGS = ("segmenter_preset", "segmenter_input_size")

_MODEL_FLAGS = ("segmenter_checkpoint", "segmenter_config", *_MASK2FORMER_FLAGS, "model_copies")
"""Flags that say nothing where no model runs; the device and the bounds of a batch may stand for all cases."""

_IMAGE_FLAGS = (
    "segmenter",
    *_MODEL_FLAGS,
    "device",
    "batch_size",
    "max_batch_pixels",
    "validation_ratio",
    "max_pixels",
)
"""Flags about what is settled in finished rows."""


@dataclass(frozen=True, slots=True)
class SceneRequest:
    """Sample scenes to draw before the job reads them."""

    folder: str
    count: int
    size_wh: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Command:
    """A checked command line."""

    job: CrayonJob
    beam_options: PipelineOptions
    scenes: SceneRequest | None


def parse_command(argv: Sequence[str]) -> Command:
    """Check a command line; on a usage error print one line and exit with status 2."""
    parser = build_parser()
    flags, rest = parser.parse_known_args(argv)
    try:
        beam_options = parse_beam_options(parser.prog, rest)
        _check_values(flags)
        given = {name for name, value in vars(flags).items() if value != parser.get_default(name)}
        _check_unused(flags, given)
        check_file_systems(beam_options, _paths(flags))
        _check_output(flags)
        scenes = _scene_request(flags)
        sources = _scene_sources(scenes) if scenes else _named_sources(flags)
        job = _job(flags, beam_options, sources)
        _check_model_flags(given, job)
        check_workers(beam_options, flags.device if job.model else None, flags.model_copies)
        return Command(job, beam_options, scenes)
    except UserError as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="build_crayon.py",
        usage="build_crayon.py [sources] [options] [Beam's options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    _add_source_flags(parser.add_argument_group("sources, in any combination"))
    _add_segmentation_flags(parser.add_argument_group("segmentation"))
    _add_instruction_flags(parser.add_argument_group("instructions"))
    _add_output_flags(parser.add_argument_group("output"))
    return parser


def _add_source_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(_add_flag, group)
    add("coco_panoptic", "JSON", "COCO panoptic annotation files", many=True)
    add("coco_images", "DIR", "folder with the images of each of them", many=True)
    add("coco_masks", "DIR", "folder with the masks of each (default: beside the JSON, by its name)", many=True)
    add("llava_json", "JSON", "dialogues in LLaVA's format; ShareGPT4V shares it", many=True)
    add("image_root", "DIR", "root of the image paths in --llava_json and in --images lists")
    add("images", "PATTERN", "folders, quoted globs, or .txt lists of paths or URIs", many=True)
    add("from_crayon", "PARQUET", "finished rows, to get new instructions; no model is run", many=True)
    add("scenes", "N", "sample scenes to draw where no source is named", default=600)
    add("scene_size", "WxH", "their size in pixels", default="320x240")


def _add_segmentation_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(_add_flag, group)
    add(
        "segmenter",
        "NAME",
        "auto (annotations where a named source has them, else mask2former), annotations, mask2former or detectron2",
        default="auto",
        choices=("auto", "annotations", *SEGMENTERS),
    )
    add(
        "segmenter_checkpoint",
        "ID_OR_PATH",
        "hub id, folder, or scenes for the embedded network, which knows drawn scenes only; for detectron2 a weights "
        "file (default: scenes where they are drawn here, else the paper's)",
    )
    add("segmenter_config", "YAML", "detectron2's config, of the model zoo or a file")
    add(
        "segmenter_preset",
        "NAME",
        "thresholds: default, scenes for networks trained on drawn scenes, or paper for the authors' call (default: "
        "scenes for the embedded network, else default)",
        choices=tuple(THRESHOLD_PRESETS),
    )
    add(
        "segmenter_input_size",
        "PIXELS",
        "side of the square that mask2former sees (default: the checkpoint's own, 320x256 for scenes; else 768)",
        kind=int,
    )
    add("device", "NAME", "auto, cpu, cuda or cuda:N; a missing GPU is an error", default="auto")
    add("batch_size", "N", "images in a batch at most", default=8)
    add("max_batch_pixels", "N", "pixels in a batch at most", default=16_000_000)
    add("model_copies", "N", "model copies per machine, shared by its processes (default: one per process)", kind=int)


def _add_instruction_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(_add_flag, group)
    defaults = InstructionOptions()
    add("tasks", "TASK", f"of {', '.join(TASKS)} (default: all)", default=list(TASKS), many=True, choices=TASKS)
    add("templates", "JSON", "your own phrasings, in the format of collavo/instructions/phrasebook.json")
    add("seed", "N", "changes every choice of phrasing and of absent class", default=defaults.seed)
    add("max_instructions", "N", "instructions per image at most", default=defaults.max_instructions)
    add("negative_ratio", "R", "questions for absent classes per question for present ones", defaults.negative_ratio)
    add("max_listed_objects", "N", "images with more segments get no listing", default=defaults.max_listed_objects)


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    add = partial(_add_flag, group)
    add("output", "DIR", "where the data set goes", default="out")
    group.add_argument("--overwrite", action="store_true", help="replace the data set that is there")
    add(
        "image_storage",
        "HOW",
        "embed image bytes in the rows, or reference them by path",
        "embed",
        ("embed", "reference"),
    )
    add("num_shards", "N", "Parquet files (default: one per 2,000 images)", kind=int)
    add("validation_ratio", "R", "share of images in the validation split, by hash of their id", default=0.05)
    add("max_pixels", "N", "larger images are rejected before decoding", default=MAX_PIXELS)
    add("max_reject_ratio", "R", "the job fails if more of its inputs are rejected", default=1.0)


def _add_flag(
    group: argparse._ArgumentGroup,
    name: str,
    metavar: str,
    text: str,
    default: Any = None,
    choices: Sequence[str] | None = None,
    *,
    kind: Callable[[str], Any] | None = None,
    many: bool = False,
) -> None:
    """One flag; its type is that of its default, and the default is told in its help where it says something."""
    if many:
        group.add_argument(f"--{name}", metavar=metavar, help=text, nargs="+", default=default or [], choices=choices)
        return
    shown = f"{text} (default: {default})" if default is not None else text
    kind = kind or (type(default) if default is not None else str)
    group.add_argument(f"--{name}", metavar=metavar, help=shown, default=default, choices=choices, type=kind)


def _check_values(flags: argparse.Namespace) -> None:
    at_least_one = ("scenes", "segmenter_input_size", "batch_size", "max_batch_pixels", "model_copies")
    for name in (*at_least_one, "max_instructions", "num_shards", "max_pixels"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but must be at least 1")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", flags.device):
        raise UserError(f"--device is {flags.device}, but must be auto, cpu, cuda or cuda:N")
    if flags.max_listed_objects < 0:
        raise UserError(f"--max_listed_objects is {flags.max_listed_objects}, but must be 0 or more")
    for name in ("validation_ratio", "max_reject_ratio"):
        if not 0 <= getattr(flags, name) <= 1:
            raise UserError(f"--{name} is {getattr(flags, name)}, but must be within 0 and 1")
    if not 0 <= flags.negative_ratio < math.inf:
        raise UserError(f"--negative_ratio is {flags.negative_ratio}, but must be 0 or more")
    if flags.max_pixels > HARD_MAX_PIXELS:
        raise UserError(f"--max_pixels is {flags.max_pixels}, but Pillow decodes no more than {HARD_MAX_PIXELS}")


def _check_unused(flags: argparse.Namespace, given: Set[str]) -> None:
    """Refuse flags that the others leave without effect: whoever sets one expects it to act."""
    sources = flags.coco_panoptic or flags.llava_json or flags.images or flags.from_crayon
    rules = [
        *((name, flags.coco_panoptic, "with --coco_panoptic") for name in ("coco_images", "coco_masks")),
        ("image_root", flags.llava_json or flags.images, "with --llava_json or --images"),
        *((name, not sources, "where no source is named") for name in ("scenes", "scene_size")),
        ("segmenter_config", flags.segmenter == "detectron2", "with --segmenter detectron2"),
        *((name, flags.segmenter != "detectron2", "with mask2former") for name in _MASK2FORMER_FLAGS),
        *((name, not flags.from_crayon, "on images; --from_crayon reads finished rows") for name in _IMAGE_FLAGS),
    ]
    for name, acts, where in rules:
        if name in given and not acts:
            raise UserError(f"--{name} acts only {where}")


def _check_model_flags(given: Set[str], job: CrayonJob) -> None:
    for name in _MODEL_FLAGS:
        if name in given and job.model is None:
            raise UserError(f"--{name}: no model runs, annotations are all there is; --segmenter mask2former runs one")


def _paths(flags: argparse.Namespace) -> list[tuple[str, str]]:
    """Flag and path of every path given."""
    values = {name: getattr(flags, name) or [] for name in _PATH_FLAGS}
    return [(name, path) for name, value in values.items() for path in ([value] if isinstance(value, str) else value)]


def _check_output(flags: argparse.Namespace) -> None:
    if is_local(flags.output) and Path(flags.output).exists() and not Path(flags.output).is_dir():
        raise UserError(f"--output {flags.output}: is a file; name a folder")
    present = published_files(flags.output)
    if present and not flags.overwrite:
        raise UserError(
            f"--output {flags.output} holds a data set already ({present[0]}); --overwrite would replace it"
        )


def _scene_request(flags: argparse.Namespace) -> SceneRequest | None:
    """The sample scenes, if no source is named."""
    if flags.coco_panoptic or flags.llava_json or flags.images or flags.from_crayon:
        return None
    if not is_local(flags.output):
        raise UserError("no source is named, and sample scenes are drawn on local disks only; try --coco_panoptic")
    width, _, height = flags.scene_size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 64 <= int(width) <= 4096 and 64 <= int(height) <= 4096):
        raise UserError(f"--scene_size is {flags.scene_size!r}, but must be like 320x240, each side from 64 to 4096")
    return SceneRequest(join(flags.output, "scenes"), flags.scenes, (int(width), int(height)))


def _scene_sources(scenes: SceneRequest) -> Sources:
    folder = scenes.folder
    coco = CocoSource("scenes", join(folder, "panoptic.json"), join(folder, "images"), join(folder, "panoptic"))
    return Sources(coco=(coco,), llava=(LlavaSource("scenes", join(folder, "dialogues.json"), folder),))


def _named_sources(flags: argparse.Namespace) -> Sources:
    if flags.from_crayon and (flags.coco_panoptic or flags.llava_json or flags.images):
        raise UserError("--from_crayon starts from finished rows and goes with no other source")
    if len(flags.coco_images) != len(flags.coco_panoptic):
        raise UserError(
            f"--coco_images names {len(flags.coco_images)} folders for {len(flags.coco_panoptic)} --coco_panoptic "
            "files; each file needs the folder of its images"
        )
    masks = flags.coco_masks or [uri.removesuffix(".json") for uri in flags.coco_panoptic]
    if len(masks) != len(flags.coco_panoptic):
        raise UserError(f"--coco_masks names {len(masks)} folders for {len(flags.coco_panoptic)} --coco_panoptic files")
    if flags.llava_json and not flags.image_root:
        raise UserError("--llava_json needs --image_root, the folder that its image paths start from")
    _check_exist("coco_panoptic", flags.coco_panoptic)
    _check_exist("coco_images", flags.coco_images)
    _check_exist("coco_masks", masks)
    _check_exist("llava_json", flags.llava_json)
    _check_exist("image_root", [flags.image_root] if flags.image_root else [])
    annotated = zip(flags.coco_panoptic, flags.coco_images, masks, strict=True)
    return Sources(
        coco=tuple(CocoSource("coco", *uris) for uris in annotated),
        llava=tuple(LlavaSource("llava", uri, flags.image_root) for uri in flags.llava_json),
        images=tuple(ImagesSource(pattern, flags.image_root) for pattern in flags.images),
        crayon_files=tuple(_crayon_files(flags.from_crayon)),
    )


def _check_exist(flag: str, uris: Sequence[str]) -> None:
    for uri in uris:
        if is_local(uri) and not exists(uri):
            raise UserError(f"--{flag} {uri}: there is no such file or folder")


def _crayon_files(patterns: Sequence[str]) -> list[str]:
    files = []
    for pattern in patterns:
        found = [uri for uri in list_files(pattern) if uri.endswith(".parquet")]
        if not found:
            raise UserError(f"--from_crayon {pattern}: names no .parquet file")
        files += found
    return files


def _job(flags: argparse.Namespace, beam_options: PipelineOptions, sources: Sources) -> CrayonJob:
    if flags.segmenter == "annotations" and not sources.coco and not sources.crayon_files:
        raise UserError("--segmenter annotations needs --coco_panoptic; auto, mask2former and detectron2 do not")
    templates = Path(flags.templates) if flags.templates else DEFAULT_PHRASEBOOK
    names = [field.name for field in fields(InstructionOptions)]
    options = InstructionOptions(**{name: _tupled(getattr(flags, name)) for name in names})
    try:
        phrasebook = load_phrasebook(templates)
    except UserError as error:
        raise UserError(f"--templates {error}") from error
    if not set(options.tasks) & set(phrasebook.phrasings):
        known = ", ".join(phrasebook.phrasings)
        raise UserError(f"--tasks {' '.join(options.tasks)}: {templates} has phrasings for {known} only")
    unused = () if sources.scenes_only else ("scenes", "scene_size")
    configuration = {k: v for k, v in sorted(vars(flags).items()) if v not in (None, [], "") and k not in unused}
    runner = beam_options.view_as(StandardOptions).runner
    staging = join(flags.output, f".staging-{uuid.uuid4().hex[:12]}")
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return CrayonJob(
        publication=Publication(
            flags.output, staging, {**configuration, "runner": runner}, flags.max_reject_ratio, started
        ),
        sources=sources,
        use_annotations=flags.segmenter == "annotations" or (flags.segmenter == "auto" and not sources.scenes_only),
        model=_model(flags, sources),
        instructions=options,
        phrasebook=phrasebook,
        facts={
            "code_version": collavo.__version__,
            "templates_sha256": phrasebook.sha256,
            "instructions": {name: getattr(options, name) for name in names},
        },
        embed_images=flags.image_storage == "embed",
        validation_ratio=flags.validation_ratio,
        max_pixels=flags.max_pixels,
        num_shards=flags.num_shards,
    )


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _model(flags: argparse.Namespace, sources: Sources) -> ModelConfig | None:
    """The model for what no annotation segments; None where annotations, or finished rows, are all there is.

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
