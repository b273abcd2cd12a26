"""A job, as its steps know it: everything is checked, and pickles."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from posixpath import join
from typing import Any, NamedTuple

from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.write import InstructionOptions
from collavo.segmenters import Segmenter
from pipelines.options import OutputFlags
from pipelines.sources import RecordPart, Sources
from schemas.categories import CategorySet

SEGMENTED, WORK = ".segmented", ".work-"
"""Names in a folder where a data set is written: of a folder, and how that of a run's work folder begins."""


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
    started: str

    @property
    def segmented(self) -> str:
        """A folder in `folder` for what a network has segmented. It outlives a build that stops, for `--resume`."""
        return join(self.folder, SEGMENTED)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A panoptic model and how its batches are bounded; see `SegmenterHandler`."""

    load: Callable[[], Segmenter]
    batch_size: int
    max_batch_pixels: int
    model_copies: int | None
    accelerator: str | None = None
    """What the runner is to provide for the steps of the model, in the words of Beam's resource hint."""

    maps_rest_on: str = ""
    """SHA-256 of what decides its maps beside the flags: classes, what is renamed, and the files of a checkpoint."""


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

    askable: frozenset[int] | None
    """The things that all sources look for, see `ClassStatistics`; None for all of the set."""

    mask_frame: str
    """Where EXIF turns an image, whether masks are `stored` or `upright`; `auto` where their size tells."""

    output: OutputFlags
    """What the user says of the rows and their files; `max_images` bounds the images that sources list, and those that
    data sets hold."""

    record_count: int = 0
    """Images that the data sets hold, where a trial needs to know."""

    @property
    def record_parts(self) -> list[RecordPart]:
        """All files of data sets, or, for a trial, those whose first records make up its number."""
        files, most = self.sources.records, self.output.max_images
        if not most:
            return [RecordPart(file) for file in files]
        each, more = divmod(most, max(1, len(files)))
        return [RecordPart(file, most=each + (place < more)) for place, file in enumerate(files[:most])]

    @property
    def work(self) -> str:
        """The folder for what lives only as long as the run."""
        return self.publication.work
