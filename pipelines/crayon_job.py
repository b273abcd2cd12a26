"""The build as a Beam graph: from sources to a finished data set.

    sources ──> mentions ──(by image)──> tasks ──> images ──┬─ annotation ─┬─> drafts on disk
                    │                      │                └─ model ──────┘         │
                    │                      └─ rejects ─────────────┐                 ├──> class statistics
                    └─ inputs, counted                             └──(by shard)─────┴──> shards ──> finish

Images are read, segmented and drafted in one fused stage; what crosses a shuffle is a few hundred bytes per image.
Instructions are written in the shards, because the choice of absent classes rests on all images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsList, AsSingleton, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from collavo.instructions.choose import ClassStatistics, stable_hash
from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.write import InstructionOptions
from collavo.segmenters import Segmenter
from pipelines.elements import (
    Draft,
    ImageTask,
    LoadedImage,
    Reject,
    Segmented,
    SegmentedImage,
    packed,
    unpacked,
)
from pipelines.finish import Publication, publish
from pipelines.image_steps import RejectError, draft_row, read_image, segment_by_annotation
from pipelines.merge import image_key, merge_mentions
from pipelines.progress import REJECTED, SEGMENTED, WRITTEN, Ticker, announce_total
from pipelines.sources import (
    REJECTS,
    ReadCoco,
    ReadCrayonRows,
    ReadImageList,
    ReadLlava,
    Rejected,
    Sources,
    rejected,
)
from pipelines.spill import SpilledDraft, SpillWriter
from pipelines.write_shard import WrittenShard, write_shard

IMAGES_PER_SHARD = 2000
"""Aim of the automatic number of shards: files of 200-400 MB where COCO's images are embedded."""

_TO_MODEL: Final = "to_model"
ToModel = TaggedOutput[Literal["to_model"], LoadedImage]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A panoptic model and how its batches are bounded; see `SegmenterHandler`."""

    load: Callable[[], Segmenter]
    batch_size: int
    max_batch_pixels: int
    model_copies: int | None


@dataclass(frozen=True, slots=True)
class CrayonJob:
    """All that the graph depends on, checked; made from the command line by `pipelines.options`.

    Images that a source annotates are segmented by their annotation if `use_annotations`; all others by `model`, or
    rejected where it is None.
    """

    publication: Publication
    sources: Sources
    use_annotations: bool
    model: ModelConfig | None
    instructions: InstructionOptions
    phrasebook: Phrasebook
    facts: Mapping[str, Any]
    embed_images: bool
    validation_ratio: float
    max_pixels: int
    num_shards: int | None

    @property
    def staging(self) -> str:
        return self.publication.staging


def build_graph(pipeline: beam.Pipeline, job: CrayonJob) -> None:
    """Add the whole build to a pipeline."""
    if job.sources.crayon_files:
        spilled = (
            pipeline
            | "CrayonFiles" >> beam.Create(job.sources.crayon_files)
            | "SpreadFiles" >> beam.Reshuffle()
            | "ReadRows" >> beam.ParDo(ReadCrayonRows(job.embed_images))
            | "SpillDrafts" >> beam.ParDo(SpillDrafts(job))
        )
        inputs = spilled | "OneInputPerRow" >> beam.Map(lambda place: "crayon")
        rejects: list[Any] = []
        images = spilled
    else:
        mentions, sources, list_rejects = _read_sources(pipeline, job)
        inputs = (
            *sources,
            list_rejects | "SourceOfReject" >> beam.Map(lambda reject: reject.source),
        ) | "AllInputs" >> beam.Flatten()
        images, merge_rejects = (
            mentions
            | "GroupByImage" >> beam.GroupByKey()
            | "MergeMentions" >> beam.ParDo(MergeMentions()).with_outputs(REJECTS, main="tasks")
        )
        spilled, image_rejects = _segment(images | "SpreadImages" >> beam.Reshuffle(), job)
        rejects = [list_rejects, merge_rejects, *image_rejects]
    _write(pipeline, job, images, spilled, rejects, inputs)


def _read_sources(
    pipeline: beam.Pipeline, job: CrayonJob
) -> tuple[beam.PCollection, list[beam.PCollection], beam.PCollection]:
    """All mentions, packed and keyed by their image; the name of the source of each; and all rejects that come up."""
    mentions, sources_of_mentions, rejects = [], [], []
    readers: list[tuple[str, tuple[Any, ...], beam.DoFn]] = [
        ("Coco", job.sources.coco, ReadCoco()),
        ("Llava", job.sources.llava, ReadLlava()),
        ("ImageList", job.sources.images, ReadImageList()),
    ]
    for name, sources, reader in readers:
        if sources:
            outputs = (
                pipeline
                | f"{name}Sources" >> beam.Create(sources)
                | f"Spread{name}Sources" >> beam.Reshuffle()
                | f"Read{name}" >> beam.ParDo(reader).with_outputs(REJECTS, main="mentions")
            )
            keyed = outputs.mentions | f"KeyByImage{name}" >> beam.Map(lambda m: (image_key(m), packed(m)))
            mentions.append(keyed)
            named = outputs.mentions | f"SourceOfMention{name}" >> beam.Map(lambda mention: mention.input.source)
            sources_of_mentions.append(named)
            rejects.append(outputs[REJECTS])
    return mentions | "AllMentions" >> beam.Flatten(), sources_of_mentions, rejects | "ListRejects" >> beam.Flatten()


def _segment(tasks: beam.PCollection, job: CrayonJob) -> tuple[beam.PCollection, list[beam.PCollection]]:
    """Places of the drafts on disk, and the rejects of every step on the way."""
    loaded = tasks | "ReadImages" >> beam.ParDo(ReadImages(job)).with_outputs(REJECTS, _TO_MODEL, main="annotated")
    branches = [loaded.annotated | "SegmentByAnnotation" >> beam.ParDo(SegmentByAnnotation())]
    if job.model:
        branches.append(loaded[_TO_MODEL] | "SegmentByModel" >> _run_model(job.model))
    spilled, rejects = [], [loaded[REJECTS]]
    # Each branch spills for itself: merged before, their images would be buffered whole between two stages.
    for name, branch in zip(("Annotated", "ByModel"), branches, strict=False):
        outputs = branch | f"Draft{name}" >> beam.ParDo(SpillDrafts(job)).with_outputs(REJECTS, main="spilled")
        spilled.append(outputs.spilled)
        rejects.append(outputs[REJECTS])
    return spilled | "AllDrafts" >> beam.Flatten(), rejects


def _run_model(model: ModelConfig) -> beam.PTransform:
    # Imported here because Beam's inference package imports torch, which a build from annotations can do without.
    from apache_beam.ml.inference.base import RunInference

    from pipelines.model_segmentation import SegmenterHandler

    return RunInference(SegmenterHandler(model.load, model.batch_size, model.max_batch_pixels, model.model_copies))


def _write(
    pipeline: beam.Pipeline,
    job: CrayonJob,
    images: beam.PCollection,
    spilled: beam.PCollection,
    rejects: Iterable[beam.PCollection],
    inputs: beam.PCollection,
) -> None:
    shard_count = (
        images
        | "CountImages" >> beam.combiners.Count.Globally()
        | "CountShards" >> beam.ParDo(CountShards(job.staging, job.num_shards))
    )
    statistics = (
        spilled
        | "PresentClasses" >> beam.Map(lambda place: place.present_labels)
        | "ClassStatistics" >> beam.CombineGlobally(CombineStatistics())
    )
    by_shard = {
        "drafts": spilled | "ShardOfDraft" >> beam.Map(_with_shard, AsSingleton(shard_count)),
        "rejects": rejects
        | "AllRejects" >> beam.Flatten(pipeline=pipeline)
        | "ShardOfReject" >> beam.Map(_with_shard, AsSingleton(shard_count)),
    }
    shards = (
        by_shard
        | "GroupByShard" >> beam.CoGroupByKey()
        | "WriteShards" >> beam.ParDo(WriteShards(job), AsSingleton(statistics))
    )
    input_counts = inputs | "CountInputs" >> beam.combiners.Count.PerElement()
    _ = (
        pipeline
        | "Once" >> beam.Create([job.publication])
        | "Publish" >> beam.Map(publish, AsList(shards), AsDict(input_counts))
    )


def _with_shard(element: SpilledDraft | Reject, shard_count: int) -> tuple[int, bytes]:
    key = element.image_id if isinstance(element, SpilledDraft) else element.id
    return stable_hash("shard", key) % shard_count, packed(element)


class MergeMentions(beam.DoFn):
    """Mentions of one image, made into its task; packed both."""

    def process(self, element: tuple[bytes, Iterable[bytes]]) -> Iterator[bytes | Rejected]:
        task, rejects = merge_mentions(map(unpacked, element[1]))
        yield packed(task)
        yield from map(rejected, rejects)


class ReadImages(beam.DoFn):
    """Reads and checks images; those without a usable annotation go to the model, where there is one."""

    def __init__(self, job: CrayonJob) -> None:
        self._max_pixels = job.max_pixels
        self._use_annotations = job.use_annotations
        self._has_model = job.model is not None
        self._staging = job.staging

    def setup(self) -> None:
        self._segmented = Ticker(self._staging, SEGMENTED)
        self._rejected = Ticker(self._staging, REJECTED)

    def process(self, packed_task: bytes) -> Iterator[LoadedImage | Rejected | ToModel]:
        task: ImageTask = unpacked(packed_task)
        to_model = self._has_model and not (self._use_annotations and task.annotated)
        try:
            image, rejects = read_image(task, self._max_pixels, with_rgb=to_model)
        except RejectError as error:
            rejects = error.rejects
            self._segmented.tick()
            self._rejected.tick()
        else:
            for_model: ToModel = TaggedOutput(_TO_MODEL, image)
            yield for_model if to_model else image
        yield from map(rejected, rejects)

    def teardown(self) -> None:
        self._segmented.close()
        self._rejected.close()


class SegmentByAnnotation(beam.DoFn):
    """Panoptic maps out of COCO masks."""

    def process(self, image: LoadedImage) -> Iterator[Segmented]:
        try:
            yield segment_by_annotation(image)
        except RejectError as error:
            yield error.rejects


class SpillDrafts(beam.DoFn):
    """Drafts rows and appends them to a file per bundle; their places follow when the file is closed."""

    def __init__(self, job: CrayonJob) -> None:
        self._embed_images = job.embed_images
        self._validation_ratio = job.validation_ratio
        self._staging = job.staging

    def setup(self) -> None:
        self._segmented = Ticker(self._staging, SEGMENTED)
        self._rejected = Ticker(self._staging, REJECTED)

    def start_bundle(self) -> None:
        self._writer: SpillWriter | None = None

    def process(self, outcome: Segmented | Draft) -> Iterator[Rejected]:
        self._segmented.tick()
        if isinstance(outcome, list):
            self._rejected.tick()
            yield from map(rejected, outcome)
            return
        if isinstance(outcome, SegmentedImage):
            outcome = draft_row(outcome, self._embed_images, self._validation_ratio)
        self._writer = self._writer or SpillWriter(self._staging)
        self._writer.append(outcome)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writer:
            window = GlobalWindow()
            for place in self._writer.close():
                yield WindowedValue(place, window.max_timestamp(), (window,))

    def teardown(self) -> None:
        self._segmented.close()
        self._rejected.close()


class CombineStatistics(beam.CombineFn):
    """Sums class statistics over images."""

    def create_accumulator(self) -> ClassStatistics:
        return ClassStatistics()

    def add_input(self, statistics: ClassStatistics, present_labels: tuple[int, ...]) -> ClassStatistics:
        statistics.add_image(present_labels)
        return statistics

    def merge_accumulators(self, accumulators: Iterable[ClassStatistics]) -> ClassStatistics:
        merged = ClassStatistics()
        for statistics in accumulators:
            merged.add(statistics)
        return merged

    def extract_output(self, statistics: ClassStatistics) -> ClassStatistics:
        return statistics


class CountShards(beam.DoFn):
    """The number of shards, from the number of images, which the progress display learns here too."""

    def __init__(self, staging: str, num_shards: int | None) -> None:
        self._staging = staging
        self._num_shards = num_shards

    def process(self, images: int) -> Iterator[int]:
        announce_total(self._staging, images)
        yield self._num_shards or max(1, round(images / IMAGES_PER_SHARD))


class WriteShards(beam.DoFn):
    """Phrases and writes one shard per element."""

    def __init__(self, job: CrayonJob) -> None:
        self._job = job

    def setup(self) -> None:
        self._written = Ticker(self._job.staging, WRITTEN)

    def process(
        self, element: tuple[int, dict[str, Iterable[bytes]]], statistics: ClassStatistics
    ) -> Iterator[WrittenShard]:
        index, groups = element
        job = self._job
        yield write_shard(
            index,
            map(unpacked, groups["drafts"]),
            map(unpacked, groups["rejects"]),
            statistics,
            job.instructions,
            job.phrasebook,
            job.staging,
            dict(job.facts),
            self._written.tick,
        )

    def teardown(self) -> None:
        self._written.close()
