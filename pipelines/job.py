"""A job, as its steps know it: everything is checked, and pickles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.write import InstructionOptions
from collavo.segmenters import Segmenter
from pipelines.sources import Sources
from schemas.categories import CategorySet


class Publication(NamedTuple):
    """Where a data set goes, and what its manifest says of the run."""

    output: str
    """As the user named it."""

    folder: str
    """Where the data set is written: the output itself, or what takes its place in the end."""

    stage_inside: bool
    """Whether a local `folder` has to lie in the output."""

    work: str
    """A folder in `folder` for everything that lives only as long as the run."""

    configuration: Mapping[str, Any]
    max_reject_ratio: float
    started: str


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A panoptic model and how its batches are bounded; see `SegmenterHandler`."""

    load: Callable[[], Segmenter]
    batch_size: int
    max_batch_pixels: int
    model_copies: int | None


@dataclass(frozen=True, slots=True)
class CrayonJob:
    """All that the graph depends on; made from the command line by `pipelines.plan`.

    With `use_annotations`, an image that a source annotates is segmented by its annotation. All other images go to
    `model`, or are rejected where it is None.
    """

    publication: Publication
    sources: Sources
    use_annotations: bool
    model: ModelConfig | None
    instructions: InstructionOptions
    phrasebook: Phrasebook
    facts: Mapping[str, Any]
    """About the build, for the metadata of every file."""

    categories: CategorySet
    """The set of the rows' classes."""

    mask_frame: str
    """Where EXIF turns an image, whether masks are `stored` or `upright`; `auto` where their size tells."""

    embed_images: bool
    validation_ratio: float
    max_pixels: int
    num_shards: int | None

    @property
    def work(self) -> str:
        """The folder for what lives only as long as the run."""
        return self.publication.work
