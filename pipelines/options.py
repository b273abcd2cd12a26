"""The flags of the build, a dataclass for each group. Importing this loads neither Beam nor torch.

Whatever is not among them belongs to Beam (`--runner`, `--direct_num_workers`, `--project`, ...); `pipelines.plan`
reads that, and checks what the flags say together.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from collavo.cli import Parser, flag, size_wh
from collavo.images import HARD_MAX_PIXELS, MAX_PIXELS
from collavo.instructions.write import InstructionOptions
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import SEGMENTERS
from collavo.storage import local_path
from schemas.crayon_row import SPLITS, TASKS

PROGRAM = "build_crayon.py"

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
FlinkRunner or SparkRunner, and the options of that runner. Local runs use all
cores, or all GPUs; --direct_num_workers 2 makes it two processes.

Every path can be a URI: s3://, gs:// and abfs:// are built in, other schemes
need their package for fsspec. Credentials and endpoints come from the
environment variables of each store's SDK.

examples:
  build_crayon.py --runner DirectRunner
  build_crayon.py --coco_panoptic annotations/panoptic_train2017.json \\
      --coco_images train2017 --output out
  build_crayon.py --llava_json llava_v1_5_mix665k.json \\
      --image_root playground/data --device cuda --output out
  build_crayon.py --images 'photos/**/*.jpg' --segmenter transformers
  build_crayon.py --images 'drawn/*.jpg' --segmenter_checkpoint scenes
  build_crayon.py --from_crayon 'out/*.parquet' --templates mine.json \\
      --seed 1 --output out2
"""


def _paths(help_text: str, metavar: str, group: str | None = None) -> Any:
    return flag((), help_text, kind=local_path, metavar=metavar, many=True, group=group)


def _splits(help_text: str) -> Any:
    what = f"{help_text}, or one for all (default: by the pictures' content)"
    return flag((), what, choices=SPLITS, metavar="SPLIT", many=True)


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


@dataclass(frozen=True, slots=True)
class SourceFlags:
    coco_panoptic: tuple[str, ...] = _paths("COCO panoptic annotation files", "JSON", "sources, in any combination")
    coco_images: tuple[str, ...] = _paths("folder with the images of each COCO file, panoptic ones first", "DIR")
    coco_masks: tuple[str, ...] = _paths(
        "folder with the masks of each panoptic one (default: beside the JSON, by its name)", "DIR"
    )
    coco_instances: tuple[str, ...] = _paths(
        "COCO instance annotation files: things only, for counting and boxes", "JSON"
    )
    coco_split: tuple[str, ...] = _splits("the split of each COCO file's images, in the order of the files")
    llava_json: tuple[str, ...] = _paths(
        "dialogues: LLaVA's format, ShareGPT4V's, `messages`; JSON or JSON lines", "JSON"
    )
    llava_split: tuple[str, ...] = _splits("the split of each of these files' images")
    image_root: str | None = flag(
        None, "root of the image paths in --llava_json and in --images lists", kind=local_path, metavar="DIR"
    )
    images: tuple[str, ...] = _paths("folders, quoted globs, or .txt lists of paths or URIs", "PATTERN")
    images_split: tuple[str, ...] = _splits("the split of each of --images")
    dataset: tuple[str, ...] = _paths(
        "data sets that hold their images: Parquet files, tar shards, or folders of them", "PATH"
    )
    dataset_split: tuple[str, ...] = _splits("the split of each of --dataset")
    image_column: str | None = flag(None, "the column of images in --dataset (default: image, or the only one)")
    from_crayon: tuple[str, ...] = _paths(
        "finished rows, to get new instructions, or several data sets to merge", "PARQUET"
    )
    scenes: int = flag(600, "sample scenes to draw where no source is named", least=1)
    scene_size: tuple[int, int] = flag(
        (320, 240), "their size in pixels (default: 320x240)", kind=size_wh, metavar="WxH"
    )

    @property
    def named(self) -> bool:
        """Whether any source is named; otherwise sample scenes are drawn."""
        return bool(self.coco or self.llava_json or self.images or self.dataset or self.from_crayon)

    @property
    def coco(self) -> tuple[str, ...]:
        """All COCO files, panoptic ones first."""
        return self.coco_panoptic + self.coco_instances


@dataclass(frozen=True, slots=True)
class SegmentationFlags:
    segmenter: str = flag(
        "auto",
        "auto (annotations where a named source has them, else transformers), annotations, transformers (Mask2Former, "
        "EoMT, OneFormer, MaskFormer, DETR), detectron2, or none, for captions to align a projector with",
        choices=("auto", "annotations", *SEGMENTERS, "none"),
        metavar="NAME",
        group="segmentation",
    )
    segmenter_checkpoint: str | None = flag(
        None,
        "hub id, folder, or scenes for the embedded network, which knows drawn scenes only; for detectron2 a weights "
        "file (default: scenes where they are drawn here, else the paper's)",
        metavar="ID_OR_PATH",
    )
    segmenter_config: str | None = flag(None, "detectron2's config, of the model zoo or a file", metavar="YAML")
    segmenter_preset: str | None = flag(
        None,
        "thresholds: default, scenes for networks trained on drawn scenes, or paper for the authors' call (default: "
        "scenes for the embedded network, else default)",
        choices=THRESHOLD_PRESETS,
        metavar="NAME",
    )
    segmenter_input_size: int | None = flag(
        None,
        "side of a square that transformers' network sees, into which images are squeezed (default: the checkpoint's "
        "own way)",
        kind=int,
        metavar="PIXELS",
        least=1,
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; a missing GPU is an error", kind=_device, metavar="NAME")
    batch_size: int = flag(8, "images in a batch at most", least=1)
    max_batch_pixels: int = flag(16_000_000, "pixels in a batch at most", least=1)
    mask_frame: str = flag(
        "auto",
        "masks of images that EXIF turns are stored, as the file is, or upright; auto goes by their size",
        choices=("auto", "stored", "upright"),
    )
    categories: str | None = flag(
        None, "JSON file with the classes: a list like COCO's `categories` (default: the sources' own)", metavar="JSON"
    )
    category_map: str | None = flag(
        None,
        "JSON object that names, by a source's class, the class of --categories or of the first source; an empty name "
        "leaves a class out",
        metavar="JSON",
    )
    model_copies: int | None = flag(
        None, "model copies per machine, shared by its processes (default: one per process)", kind=int, least=1
    )
    accelerator: str | None = flag(
        None,
        "GPU that a cluster is to give the network's steps alone, as type:nvidia-l4;count:1 (Dataflow)",
        metavar="HINT",
    )


_INSTRUCTIONS = InstructionOptions()


@dataclass(frozen=True, slots=True)
class InstructionFlags:
    tasks: tuple[str, ...] = flag(
        TASKS, f"of {', '.join(TASKS)} (default: all)", many=True, choices=TASKS, metavar="TASK", group="instructions"
    )
    templates: str | None = flag(
        None, "your own phrasings, in the format of collavo/instructions/phrasebook.json", metavar="JSON"
    )
    seed: int = flag(_INSTRUCTIONS.seed, "changes every choice of phrasing and of absent class")
    max_instructions: int = flag(_INSTRUCTIONS.max_instructions, "instructions per image at most", least=1)
    negative_ratio: float = flag(
        _INSTRUCTIONS.negative_ratio, "questions for absent classes per question for present ones", least=0, metavar="R"
    )
    max_listed_objects: int = flag(
        _INSTRUCTIONS.max_listed_objects, "images with more segments get no listing", least=0
    )

    @property
    def options(self) -> InstructionOptions:
        """The options that `collavo.instructions` takes, which have the names of these flags."""
        return InstructionOptions(**{field.name: getattr(self, field.name) for field in fields(InstructionOptions)})


@dataclass(frozen=True, slots=True)
class OutputFlags:
    output: str = flag("out", "where the data set goes", kind=local_path, metavar="DIR", group="output")
    overwrite: bool = flag(False, "replace the data set that is there")
    extend: bool = flag(False, "add to the data set that is there; pictures that it has are not segmented again")
    resume: bool = flag(False, "go on with a build that was stopped: what its network has segmented is used")
    discard: bool = flag(False, "remove what a stopped build has left, and start anew")
    max_images: int | None = flag(
        None, "build a trial from so many images, and say what all would take", kind=int, least=1
    )
    image_storage: str = flag(
        "embed",
        "embed image bytes in the rows, or reference them by path",
        choices=("embed", "reference"),
        metavar="HOW",
    )
    num_shards: int | None = flag(
        None,
        "Parquet files of each split (default: one per 2,000 rows; where rows are few, up to 8, of at least 200 each)",
        kind=int,
        least=1,
    )
    validation_ratio: float = flag(
        0.05, "share of pictures in the validation split, by hash of their content", least=0, most=1, metavar="R"
    )
    max_pixels: int = flag(MAX_PIXELS, "larger images are rejected before decoding", least=1, most=HARD_MAX_PIXELS)
    max_reject_ratio: float = flag(
        1.0, "the job fails if more of its inputs are rejected", least=0, most=1, metavar="R"
    )

    @property
    def embed_images(self) -> bool:
        """Whether rows hold the bytes of their images."""
        return self.image_storage == "embed"


class Flags(NamedTuple):
    """All flags of the build, in their groups."""

    sources: SourceFlags
    segmentation: SegmentationFlags
    instructions: InstructionFlags
    output: OutputFlags

    @property
    def values(self) -> dict[str, Any]:
        """The values by flag."""
        return {name: value for group in self for name, value in asdict(group).items()}

    @property
    def given(self) -> set[str]:
        """The flags whose value is not their default."""
        return set(dict(self.values.items() - Flags._make(group() for group in _GROUPS).values.items()))

    @property
    def without_model(self) -> bool:
        """Whether it is certain that no network will be asked."""
        sources, segmenter = self.sources, self.segmentation.segmenter
        open_to_model = sources.llava_json or sources.images or sources.dataset or not sources.named
        return segmenter == "annotations" or (segmenter == "auto" and not open_to_model)

    @property
    def needs_network(self) -> bool:
        """Whether it is certain that a network will be asked: else all pictures may be annotated, or known already."""
        sources, output = self.sources, self.output
        known = sources.coco or sources.from_crayon or output.extend or output.resume
        return bool(sources.images) and self.segmentation.segmenter not in ("annotations", "none") and not known


_GROUPS = (SourceFlags, SegmentationFlags, InstructionFlags, OutputFlags)


def build_parser() -> Parser:
    """Make the parser of the build's own flags."""
    parser = Parser(
        prog=PROGRAM, usage=f"{PROGRAM} [sources] [options] [Beam's options]", description=_DESCRIPTION, epilog=_EPILOG
    )
    for group in _GROUPS:
        parser.add_flags(group)
    return parser


def parse_flags(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """Parse a command line, and return the flags with the words that are left for Beam.

    Raises:
        UserError: for a number out of its bounds; SystemExit for what argparse refuses and after `--help`.
    """
    parser = build_parser()
    parsed, rest = parser.parse_known_args(argv)
    return Flags._make(parser.flags_of(group, parsed) for group in _GROUPS), rest
