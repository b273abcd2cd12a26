"""The build as a Beam graph: from sources to a finished data set.

    sources ──> mentions ──(by image)──> tasks ──> images ──┬─ annotation ─┬─> drafts on disk
                    │                      │                └─ model ──────┘         │
                    │                      └─ rejects ─────────────┐                 ├──> class statistics
                    └─ inputs, counted                             └──(by shard)─────┴──> shards ──> finish

Images are read, segmented and drafted in one fused stage. What crosses a shuffle does so in batches, and takes some
hundred bytes per image: mentions wait on disk too, and meet by partitions of the images.
Instructions are written in the shards, because the choice of absent classes rests on all images.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, Literal

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsList, AsSingleton, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from collavo.instructions.choose import ClassStatistics, stable_hash
from collavo.instructions.phrasebook import Phrasebook
from collavo.instructions.write import InstructionOptions
from collavo.segmenters import Segmenter
from pipelines.image_steps import RejectError, draft_row, read_image, segment_by_annotation
from pipelines.merge import merge_mentions
from pipelines.progress import REJECTED, SEGMENTED, WRITTEN, Ticker, announce_total
from pipelines.publish import Publication, publish
from pipelines.records import (
    Batch,
    Draft,
    ImageTask,
    LoadedImage,
    Mention,
    Reject,
    Segmented,
    SegmentedImage,
    packed,
    unpacked,
)
from pipelines.shards import WrittenShard, write_shard
from pipelines.sources import (
    REJECTS,
    ReadCoco,
    ReadCrayonRows,
    ReadImageList,
    ReadLlava,
    RejectOutput,
    Sources,
    reject_output,
)
from pipelines.spill import Block, MentionSpillWriter, SpilledDraft, SpillWriter, read_mentions

IMAGES_PER_SHARD = 2000
"""Aim of the automatic number of shards: files of 200-400 MB where COCO's images are embedded."""

_IMAGES_PER_BATCH = 16
"""Tasks that travel together: few enough that a small data set keeps several workers busy."""

_COUNTS: Final = "counts"
Counted = TaggedOutput[Literal["counts"], Any]

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
    """All that the graph depends on, checked; made from the command line by `pipelines.plan`.

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
    def work(self) -> str:
        """The folder for what lives only as long as the run."""
        return self.publication.work


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
        inputs = spilled | "OneInputPerRow" >> beam.Map(lambda batch: ("crayon", batch[0]))
        rejects: list[Any] = []
        images = spilled
    else:
        mentions, mention_counts, list_rejects = _read_sources(pipeline, job)
        inputs = (
            *mention_counts,
            list_rejects | "SourceOfReject" >> beam.Map(lambda reject: (reject.source, 1)),
        ) | "AllInputs" >> beam.Flatten()
        images, merge_rejects = (
            mentions
            | "GroupByPartition" >> beam.GroupByKey()
            | "MergeMentions" >> beam.ParDo(MergeMentions()).with_outputs(REJECTS, main="tasks")
        )
        spilled, image_rejects = _segment(images | "SpreadImages" >> beam.Reshuffle(), job)
        rejects = [list_rejects, merge_rejects, *image_rejects]
    _write(pipeline, job, images, spilled, rejects, inputs)


def _read_sources(
    pipeline: beam.Pipeline, job: CrayonJob
) -> tuple[beam.PCollection, list[beam.PCollection], beam.PCollection]:
    """Where all mentions lie, by partition of the images; their numbers by source; and all rejects that come up."""
    blocks, counts, rejects = [], [], []
    readers: list[tuple[str, tuple[Any, ...], beam.DoFn]] = [
        ("Coco", job.sources.coco, ReadCoco()),
        ("Llava", job.sources.llava, ReadLlava()),
        ("ImageList", job.sources.images, ReadImageList()),
    ]
    for name, sources, reader in readers:
        if sources:
            read = (
                pipeline
                | f"{name}Sources" >> beam.Create(sources)
                | f"Spread{name}Sources" >> beam.Reshuffle()
                | f"Read{name}" >> beam.ParDo(reader).with_outputs(REJECTS, main="mentions")
            )
            spill = beam.ParDo(SpillMentions(job.work)).with_outputs(_COUNTS, main="blocks")
            spilled = read.mentions | f"Spill{name}" >> spill
            blocks.append(spilled.blocks)
            counts.append(spilled[_COUNTS])
            rejects.append(read[REJECTS])
    return blocks | "AllMentions" >> beam.Flatten(), counts, rejects | "ListRejects" >> beam.Flatten()


def _segment(tasks: beam.PCollection, job: CrayonJob) -> tuple[beam.PCollection, list[beam.PCollection]]:
    """Places of the drafts on disk, in batches, and the rejects of every step on the way."""
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
        | "ImagesInBatch" >> beam.Map(lambda batch: batch[0])
        | "CountImages" >> beam.CombineGlobally(sum)
        | "CountShards" >> beam.ParDo(CountShards(job.work, job.num_shards))
    )
    statistics = (
        spilled
        | "PresentClasses" >> beam.FlatMap(lambda batch: [place.present_labels for place in unpacked(batch)])
        | "ClassStatistics" >> beam.CombineGlobally(CombineStatistics())
    )
    by_shard = {
        "drafts": spilled | "ShardOfDraft" >> beam.FlatMap(_drafts_by_shard, AsSingleton(shard_count)),
        "rejects": rejects
        | "AllRejects" >> beam.Flatten(pipeline=pipeline)
        | "ShardOfReject" >> beam.Map(_reject_by_shard, AsSingleton(shard_count)),
    }
    shards = (
        by_shard
        | "GroupByShard" >> beam.CoGroupByKey()
        | "WriteShards" >> beam.ParDo(WriteShards(job), AsSingleton(statistics))
    )
    input_counts = inputs | "CountInputs" >> beam.CombinePerKey(sum)
    _ = (
        pipeline
        | "Once" >> beam.Create([job.publication])
        | "Publish" >> beam.Map(publish, AsList(shards), AsDict(input_counts))
    )


def _drafts_by_shard(batch: Batch, shard_count: int) -> Iterator[tuple[int, Batch]]:
    by_shard: dict[int, list[SpilledDraft]] = defaultdict(list)
    for place in unpacked(batch):
        by_shard[stable_hash("shard", place.image_id) % shard_count].append(place)
    for shard, places in by_shard.items():
        yield shard, packed(places)


def _reject_by_shard(reject: Reject, shard_count: int) -> tuple[int, Batch]:
    return stable_hash("shard", reject.id) % shard_count, packed([reject])


def _late(value: Any) -> WindowedValue:
    """What a DoFn emits when its bundle is finished."""
    window = GlobalWindow()
    return WindowedValue(value, window.max_timestamp(), (window,))


class SpillMentions(beam.DoFn):
    """Appends mentions to a file per bundle; their places, and their numbers by source, follow when it is closed."""

    def __init__(self, work: str) -> None:
        self._work = work

    def start_bundle(self) -> None:
        self._writer: MentionSpillWriter | None = None
        self._counts: Counter[str] = Counter()

    def process(self, mention: Mention) -> None:
        self._writer = self._writer or MentionSpillWriter(self._work)
        self._writer.append(mention)
        self._counts[mention.input.source] += 1

    def finish_bundle(self) -> Iterator[WindowedValue | Counted]:
        if self._writer:
            yield from map(_late, self._writer.close())
            for count in self._counts.items():
                yield TaggedOutput(_COUNTS, _late(count))


class MergeMentions(beam.DoFn):
    """The mentions of a partition, made into one task per image."""

    def process(self, element: tuple[int, Iterable[Block]]) -> Iterator[Batch | RejectOutput]:
        tasks = []
        for mentions in read_mentions(element[1]):
            task, rejects = merge_mentions(mentions)
            yield from map(reject_output, rejects)
            tasks.append(task)
        for first in range(0, len(tasks), _IMAGES_PER_BATCH):
            yield packed(tasks[first : first + _IMAGES_PER_BATCH])


class ReadImages(beam.DoFn):
    """Reads and checks images; those without a usable annotation go to the model, where there is one."""

    def __init__(self, job: CrayonJob) -> None:
        self._max_pixels = job.max_pixels
        self._use_annotations = job.use_annotations
        self._has_model = job.model is not None
        self._work = job.work

    def setup(self) -> None:
        self._segmented = Ticker(self._work, SEGMENTED)
        self._rejected = Ticker(self._work, REJECTED)

    def process(self, tasks: Batch) -> Iterator[LoadedImage | RejectOutput | ToModel]:
        for task in unpacked(tasks):
            yield from self._read(task)

    def _read(self, task: ImageTask) -> Iterator[LoadedImage | RejectOutput | ToModel]:
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
        yield from map(reject_output, rejects)

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
        self._work = job.work

    def setup(self) -> None:
        self._segmented = Ticker(self._work, SEGMENTED)
        self._rejected = Ticker(self._work, REJECTED)

    def start_bundle(self) -> None:
        self._writer: SpillWriter | None = None

    def process(self, outcome: Segmented | Draft) -> Iterator[RejectOutput]:
        self._segmented.tick()
        if isinstance(outcome, list):
            self._rejected.tick()
            yield from map(reject_output, outcome)
            return
        if isinstance(outcome, SegmentedImage):
            outcome = draft_row(outcome, self._embed_images, self._validation_ratio)
        self._writer = self._writer or SpillWriter(self._work)
        self._writer.append(outcome)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writer:
            yield from map(_late, self._writer.close())

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

    def __init__(self, work: str, num_shards: int | None) -> None:
        self._work = work
        self._num_shards = num_shards

    def process(self, images: int) -> Iterator[int]:
        announce_total(self._work, images)
        yield self._num_shards or max(1, round(images / IMAGES_PER_SHARD))


class WriteShards(beam.DoFn):
    """Phrases and writes one shard per element."""

    def __init__(self, job: CrayonJob) -> None:
        self._job = job

    def setup(self) -> None:
        self._written = Ticker(self._job.work, WRITTEN)

    def process(
        self, element: tuple[int, dict[str, Iterable[Batch]]], statistics: ClassStatistics
    ) -> Iterator[WrittenShard]:
        index, groups = element
        job = self._job
        yield write_shard(
            index,
            chain.from_iterable(map(unpacked, groups["drafts"])),
            chain.from_iterable(map(unpacked, groups["rejects"])),
            statistics,
            job.instructions,
            job.phrasebook,
            job.work,
            dict(job.facts),
            self._written.tick,
        )

    def teardown(self) -> None:
        self._written.close()
