"""The build as a Beam graph: from sources to a finished data set.

    sources ──> mentions ──(by image)──> tasks ──> images ──┬─ annotation ─┬─> drafts on disk
                    │                      │                └─ model ──────┘         │
                    │                      └─ rejects ─────────────┐                 ├──> class statistics
                    └─ inputs, counted                             └──(by shard)─────┴──> shards ──> publish

Images are read, segmented and drafted in one fused stage. What crosses a shuffle does so in packs, and takes some
hundred bytes per image: mentions wait on disk too, and meet by partitions of the images.
Instructions are written in the shards, because the choice of absent classes rests on all images.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Final, Literal

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsList, AsSingleton, TaggedOutput
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from collavo.instructions.choose import ClassStatistics, stable_hash
from pipelines.image_steps import draft_row, read_image, segment_by_annotation
from pipelines.job import CrayonJob, ModelConfig
from pipelines.merge import merge_mentions
from pipelines.progress import REJECTED, SEGMENTED, announce_total, tick
from pipelines.publish import publish
from pipelines.records import Draft, LoadedImage, Mention, Packed, Reject, Segmented, SegmentedImage, packed, unpacked
from pipelines.shards import WrittenShard, write_shard
from pipelines.sources import (
    REJECT_TAG,
    RejectOutput,
    read_coco,
    read_crayon_rows,
    read_images,
    read_llava,
    reject_output,
)
from pipelines.spill import Block, MentionSpillWriter, SpilledDraft, SpillWriter, read_mentions

IMAGES_PER_SHARD = 2000
"""Aim of the automatic number of shards: files of 200-400 MB where COCO's images are embedded."""

_IMAGES_PER_PACK = 16
"""Tasks that travel together: few enough that a small data set keeps several workers busy."""

_COUNTS: Final = "counts"
Counted = TaggedOutput[Literal["counts"], Any]

_TO_MODEL: Final = "to_model"
ToModel = TaggedOutput[Literal["to_model"], LoadedImage]


def build_graph(pipeline: beam.Pipeline, job: CrayonJob) -> None:
    """Add the whole build to a pipeline."""
    if job.sources.crayon_files:
        spilled = (
            pipeline
            | "CrayonFiles" >> beam.Create(job.sources.crayon_files)
            | "SpreadFiles" >> beam.Reshuffle()
            | "ReadRows" >> beam.FlatMap(read_crayon_rows, job.embed_images)
            | "SpillDrafts" >> beam.ParDo(SpillDrafts(job))
        )
        inputs = spilled | "OneInputPerRow" >> beam.Map(lambda pack: ("crayon", pack[0]))
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
            | "MergeMentions" >> beam.FlatMap(_merge).with_outputs(REJECT_TAG, main="tasks")
        )
        spilled, image_rejects = _segment(images | "SpreadImages" >> beam.Reshuffle(), job)
        rejects = [list_rejects, merge_rejects, *image_rejects]
    _write(pipeline, job, images, spilled, rejects, inputs)


def _read_sources(
    pipeline: beam.Pipeline, job: CrayonJob
) -> tuple[beam.PCollection, list[beam.PCollection], beam.PCollection]:
    """Read all sources.

    Returns:
        where the mentions lie, by partition of the images; their numbers by source; and the rejects.
    """
    blocks, counts, rejects = [], [], []
    readers: list[tuple[str, tuple[Any, ...], Any]] = [
        ("Coco", job.sources.coco, read_coco),
        ("Llava", job.sources.llava, read_llava),
        ("ImageList", job.sources.images, read_images),
    ]
    for name, sources, reader in readers:
        if sources:
            read = (
                pipeline
                | f"{name}Sources" >> beam.Create(sources)
                | f"Spread{name}Sources" >> beam.Reshuffle()
                | f"Read{name}" >> beam.FlatMap(reader).with_outputs(REJECT_TAG, main="mentions")
            )
            spill = beam.ParDo(SpillMentions(job.work)).with_outputs(_COUNTS, main="blocks")
            spilled = read.mentions | f"Spill{name}" >> spill
            blocks.append(spilled.blocks)
            counts.append(spilled[_COUNTS])
            rejects.append(read[REJECT_TAG])
    return blocks | "AllMentions" >> beam.Flatten(), counts, rejects | "ListRejects" >> beam.Flatten()


def _segment(tasks: beam.PCollection, job: CrayonJob) -> tuple[beam.PCollection, list[beam.PCollection]]:
    """Read, segment and draft the images; return where the drafts lie, in packs, and the rejects of every step."""
    loaded = tasks | "ReadImages" >> beam.FlatMap(_read, job).with_outputs(REJECT_TAG, _TO_MODEL, main="annotated")
    branches = [loaded.annotated | "SegmentByAnnotation" >> beam.Map(segment_by_annotation)]
    if job.model:
        branches.append(loaded[_TO_MODEL] | "SegmentByModel" >> _run_model(job.model))
    spilled, rejects = [], [loaded[REJECT_TAG]]
    # Each branch spills for itself: merged before, their images would be buffered whole between two stages.
    for name, branch in zip(("Annotated", "ByModel"), branches, strict=False):
        outputs = branch | f"Draft{name}" >> beam.ParDo(SpillDrafts(job)).with_outputs(REJECT_TAG, main="spilled")
        spilled.append(outputs.spilled)
        rejects.append(outputs[REJECT_TAG])
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
    """Phrase and write the shards, and publish them."""
    shard_count = (
        images
        | "ImagesInPack" >> beam.Map(lambda pack: pack[0])
        | "CountImages" >> beam.CombineGlobally(sum)
        | "CountShards" >> beam.Map(count_shards, job.work, job.num_shards)
    )
    statistics = (
        spilled
        | "PresentClasses" >> beam.FlatMap(lambda pack: [place.present_labels for place in unpacked(pack)])
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
        | "WriteShards" >> beam.Map(_write_shard, job, AsSingleton(statistics))
    )
    input_counts = inputs | "CountInputs" >> beam.CombinePerKey(sum)
    _ = (
        pipeline
        | "Once" >> beam.Create([job.publication])
        | "Publish" >> beam.Map(publish, AsList(shards), AsDict(input_counts))
    )


def _merge(partition: tuple[int, Iterable[Block]]) -> Iterator[Packed | RejectOutput]:
    """Make the mentions of a partition into one task per image."""
    tasks = []
    for mentions in read_mentions(partition[1]):
        task, rejects = merge_mentions(mentions)
        yield from map(reject_output, rejects)
        tasks.append(task)
    for first in range(0, len(tasks), _IMAGES_PER_PACK):
        yield packed(tasks[first : first + _IMAGES_PER_PACK])


def _read(tasks: Packed, job: CrayonJob) -> Iterator[LoadedImage | RejectOutput | ToModel]:
    """Read and check images; those without a usable annotation go to the model, where there is one."""
    for task in unpacked(tasks):
        to_model = job.model is not None and not (job.use_annotations and task.annotated)
        image, rejects = read_image(task, job.max_pixels, with_rgb=to_model)
        if image:
            for_model: ToModel = TaggedOutput(_TO_MODEL, image)
            yield for_model if to_model else image
        else:
            tick(job.work, SEGMENTED)
            tick(job.work, REJECTED)
        yield from map(reject_output, rejects)


def count_shards(images: int, work: str, num_shards: int | None) -> int:
    """Choose the number of shards, and tell the progress display the number of images."""
    announce_total(work, images)
    return num_shards or max(1, round(images / IMAGES_PER_SHARD))


def _drafts_by_shard(pack: Packed, shard_count: int) -> Iterator[tuple[int, Packed]]:
    by_shard: dict[int, list[SpilledDraft]] = defaultdict(list)
    for place in unpacked(pack):
        by_shard[stable_hash("shard", place.image_id) % shard_count].append(place)
    for shard, places in by_shard.items():
        yield shard, packed(places)


def _reject_by_shard(reject: Reject, shard_count: int) -> tuple[int, Packed]:
    return stable_hash("shard", reject.id) % shard_count, packed([reject])


def _write_shard(
    element: tuple[int, dict[str, Iterable[Packed]]], job: CrayonJob, statistics: ClassStatistics
) -> WrittenShard:
    index, groups = element
    drafts, rejects = (chain.from_iterable(map(unpacked, groups[name])) for name in ("drafts", "rejects"))
    return write_shard(index, drafts, rejects, statistics, job)


def _late(value: Any) -> WindowedValue:
    """Wrap what a DoFn emits when its bundle is finished."""
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


class SpillDrafts(beam.DoFn):
    """Drafts rows and appends them to a file per bundle; their places follow when the file is closed."""

    def __init__(self, job: CrayonJob) -> None:
        self._job = job

    def start_bundle(self) -> None:
        self._writer: SpillWriter | None = None

    def process(self, outcome: Segmented | Draft) -> Iterator[RejectOutput]:
        tick(self._job.work, SEGMENTED)
        if isinstance(outcome, list):
            tick(self._job.work, REJECTED)
            yield from map(reject_output, outcome)
            return
        if isinstance(outcome, SegmentedImage):
            outcome = draft_row(outcome, self._job.embed_images, self._job.validation_ratio)
        self._writer = self._writer or SpillWriter(self._job.work)
        self._writer.append(outcome)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writer:
            yield from map(_late, self._writer.close())


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
