"""The build as a Beam graph: from sources to a finished data set.

    sources ──> mentions ──(by image)──> tasks ──> images ──┬─ annotation ─┬─> drafts on disk
                    │                      │                └─ model ──────┘         │
                    │                      └─ rejects ─────────────┐                 ├──> class statistics
                    └─ inputs, counted                             └──(by shard)─────┴──> shards ──> publish

Images are read, segmented and drafted in one fused stage. What crosses a shuffle does so in packs, and takes some
hundred bytes per image: mentions meet by partitions of the images.
Instructions are written in the shards, because the choice of absent classes rests on all images.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from posixpath import join
from typing import Any, Final, Literal

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsList, AsSingleton, TaggedOutput
from apache_beam.transforms.combiners import Top
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

import collavo
from collavo.errors import UserError
from collavo.instructions.choose import ClassStatistics
from collavo.storage import is_local
from pipelines.image_steps import (
    decode_image,
    draft_dialogue,
    draft_known,
    draft_row,
    fetch_ahead,
    read_images,
    segment_by_annotation,
    split_of,
)
from pipelines.job import CrayonJob, ModelConfig
from pipelines.joins import JoinDrafts
from pipelines.merge import image_key, merge_mentions
from pipelines.progress import FOUND, REJECTED, SEGMENTED, tick
from pipelines.publish import publish
from pipelines.records import (
    Draft,
    ImageTask,
    LoadedImage,
    Mention,
    Packed,
    Reject,
    Segmented,
    SegmentedImage,
    packed,
    unpacked,
)
from pipelines.report import samples_of_shard
from pipelines.shards import Shard, WrittenShard, write_shard
from pipelines.sources import (
    REJECT_TAG,
    RejectOutput,
    divide_records,
    read_coco,
    read_crayon_rows,
    read_llava,
    read_records,
    reject_output,
)
from pipelines.sources import read_images as read_image_lists
from pipelines.spill import DRAFTS, SpilledDraft, SpillWriter, order_of, read_drafts, shard_of

ROWS_PER_SHARD = 2000
"""Aim of the automatic number of shards: files of 200-400 MB where COCO's images are embedded."""

_BYTES_PER_SHARD = 1 << 30
"""Most of a file, about, where pictures are large: S3 copies no object of more than 5 GiB to its final name."""

_SHARDS_AT_LEAST, _LEAST_ROWS = 8, 200
"""A smaller data set is divided further, so that several workers phrase and write it, and several ranks read it. What
validates it, if it is less than the second, is written along with the last shard of the rest: it lies beside that in
every file of drafts, and would cost a store a request for each."""

_PARTITIONS = 256
"""Parts of the images; the mentions of one part at a time are in memory."""

_MENTIONS_AT_ONCE = 4096
_LEAST_PER_PACK, _MOST_PER_PACK = 16, 512
_PACKS_AT_LEAST = 64
_PER_PACK_ON_DISK, _PACKS_ON_DISK = 4, 2048
"""Bounds of the packs in which images travel, see `_count_packs`."""

_COUNTS: Final = "counts"
Counted = TaggedOutput[Literal["counts"], Any]

_TO_MODEL: Final = "to_model"
ToModel = TaggedOutput[Literal["to_model"], LoadedImage]


def build_graph(pipeline: beam.Pipeline, job: CrayonJob) -> None:
    """Add the whole build to a pipeline."""
    inputs: list[beam.PCollection] = []
    listed: beam.PCollection | None = None
    rejects: list[beam.PCollection] = []
    spilled: list[beam.PCollection] = []
    if job.sources.crayon_files:
        read_rows = beam.FlatMap(read_crayon_rows, job.categories, job.output.embed_images)
        rows = (
            pipeline
            | "CrayonFiles" >> beam.Create(job.sources.crayon_files)
            | "ReadRows" >> read_rows.with_outputs(REJECT_TAG, main="drafts")
        )
        inputs.append(rows[REJECT_TAG] | "OneInputPerDamagedRow" >> beam.Map(lambda reject: (reject.source, 1)))
        rejects.append(rows[REJECT_TAG])
        finished = rows.drafts | "SpillFinished" >> beam.ParDo(SpillDrafts(job))
        inputs.append(finished | "OneInputPerRow" >> beam.Map(lambda pack: ("crayon", pack[0])))
        spilled.append(finished)
        _announce("Rows", finished, job)
    if job.sources.records:
        read = (
            pipeline
            | "RecordFiles" >> beam.Create(job.record_parts)
            | "DivideRecords" >> beam.FlatMap(divide_records)
            | "SpreadRecords" >> beam.Reshuffle()
            | "ReadRecords" >> beam.FlatMap(read_records).with_outputs(REJECT_TAG, main="records")
        )
        segmented = read.records | "SegmentRecords" >> _on_accelerator(ReadAndSegment(_load_record, job), job)
        inputs.append(read.records | "OneInputPerRecord" >> beam.Map(lambda record: ("dataset", 1)))
        inputs.append(read[REJECT_TAG] | "OneInputPerReject" >> beam.Map(lambda reject: (reject.source, 1)))
        rejects += [read[REJECT_TAG], segmented["rejects"]]
        spilled.append(segmented["spilled"])
    if job.sources.coco or job.sources.llava or job.sources.images:
        mentions, mention_counts, list_rejects = _read_sources(pipeline, job)
        tasks, merge_rejects = (
            mentions
            | "GroupByPartition" >> beam.GroupByKey()
            | "MergeMentions" >> beam.FlatMapTuple(_merge).with_outputs(REJECT_TAG, main="tasks")
        )
        if job.output.max_images:
            listed = tasks | "ImagesListed" >> beam.MapTuple(lambda _, pack: pack[0])
            listed = listed | "SumListed" >> beam.CombineGlobally(sum)
            tasks = _first_by_hash(tasks, job.output.max_images)
            mention_counts = [
                tasks | "OneInputPerMention" >> beam.FlatMapTuple(_mentions_by_source),
                merge_rejects | "OneInputPerRepeat" >> beam.Map(lambda reject: (reject.source, 1)),
            ]
        _announce("Images", tasks | "PacksOfImages" >> beam.Values(), job)
        counts = AsDict(tasks | "ImagesOfPartition" >> beam.MapTuple(lambda partition, pack: (partition, pack[0])))
        packs = (
            tasks
            | "InEvenPacks" >> beam.FlatMap(_in_even_packs, counts, is_local(job.work))
            | "SpreadImages" >> beam.GroupByKey()
            | "PiecesOfPack"
            >> beam.MapTuple(lambda _, pieces: packed([task for piece in pieces for task in unpacked(piece)]))
        )
        if job.model and job.model.accelerator:
            split = packs | "SplitByNeed" >> beam.FlatMap(_by_need, job).with_outputs(_TO_MODEL, main="annotated")
            annotated = split.annotated | "SegmentAnnotated" >> ReadAndSegment(_read, job, by_model=False)
            spilled.append(annotated["spilled"])
            rejects.append(annotated["rejects"])
            packs = split[_TO_MODEL]
        segmented = packs | "SegmentImages" >> _on_accelerator(ReadAndSegment(_read, job), job)
        inputs += [*mention_counts, list_rejects | "SourceOfReject" >> beam.Map(lambda reject: (reject.source, 1))]
        rejects += [list_rejects, merge_rejects, segmented["rejects"]]
        spilled.append(segmented["spilled"])
    _write(pipeline, job, spilled, rejects, inputs, listed)


def _first_by_hash(tasks: beam.PCollection, number: int) -> beam.PCollection:
    """Take some images, the same ones in every run, from all over the sources."""
    return (
        tasks
        | "OneByOne" >> beam.FlatMapTuple(lambda _, pack: unpacked(pack))
        | "FirstByHash" >> Top.Of(number, key=lambda task: image_key(task.mentions[0]), reverse=True)
        | "OnePartition" >> beam.Map(lambda tasks: (0, packed(tasks)))
    )


def _mentions_by_source(_: Any, tasks: Packed) -> list[tuple[str, int]]:
    return list(Counter(mention.input.source for task in unpacked(tasks) for mention in task.mentions).items())


def _announce(name: str, packs: beam.PCollection, job: CrayonJob) -> None:
    """Tell the progress display how many images are in some packs."""
    _ = packs | f"Announce{name}" >> beam.Map(lambda pack: tick(job.work, FOUND, pack[0]))


def _read_sources(
    pipeline: beam.Pipeline, job: CrayonJob
) -> tuple[beam.PCollection, list[beam.PCollection], beam.PCollection]:
    """Read all sources that name images.

    Returns:
        the mentions, in packs by partition of the images; their numbers by source; and the rejects.
    """
    mentions, counts, rejects = [], [], []
    readers: list[tuple[str, tuple[Any, ...], Any]] = [
        ("Coco", job.sources.coco, read_coco),
        ("Llava", job.sources.llava, read_llava),
        ("ImageList", job.sources.images, read_image_lists),
    ]
    for name, sources, reader in readers:
        if sources:
            read = (
                pipeline
                | f"{name}Sources" >> beam.Create(sources)
                | f"Read{name}" >> beam.FlatMap(reader, job.sources.root).with_outputs(REJECT_TAG, main="mentions")
            )
            pack = beam.ParDo(PackMentions()).with_outputs(_COUNTS, main="packs")
            packs = read.mentions | f"Pack{name}" >> pack
            mentions.append(packs.packs)
            counts.append(packs[_COUNTS])
            rejects.append(read[REJECT_TAG])
    return mentions | "AllMentions" >> beam.Flatten(), counts, rejects | "ListRejects" >> beam.Flatten()


class ReadAndSegment(beam.PTransform):
    """Reads, segments and drafts images, in one stage: what lies between, pixels among it, crosses no shuffle.

    Its outputs are `spilled`, where the drafts lie, in packs, and `rejects`.

    Args:
        read: makes of an element loaded images, those for the model tagged, and rejects.
        by_model: whether there are images for the model.
    """

    def __init__(self, read: Callable[..., Iterator[Any]], job: CrayonJob, by_model: bool = True) -> None:
        super().__init__()
        self._read = read
        self._job = job
        self._by_model = by_model

    def expand(self, elements: beam.PCollection) -> Any:  # Beam would take a dict for the type of the elements
        job = self._job
        loaded = elements | "Read" >> beam.FlatMap(self._read, job).with_outputs(
            REJECT_TAG, _TO_MODEL, main="annotated"
        )
        branches = {"Annotated": loaded.annotated | "SegmentByAnnotation" >> beam.Map(_segment_annotated, job)}
        if job.model and self._by_model:
            branches["ByModel"] = loaded[_TO_MODEL] | "SegmentByModel" >> _run_model(job.model)
        spilled, rejects = [], [loaded[REJECT_TAG]]
        # Each branch spills for itself: merged before, their images would be buffered whole between two stages.
        for kind, branch in branches.items():
            spill = beam.ParDo(SpillDrafts(job, by_model=kind == "ByModel")).with_outputs(REJECT_TAG, main="spilled")
            outputs = branch | f"Draft{kind}" >> spill
            spilled.append(outputs.spilled)
            rejects.append(outputs[REJECT_TAG])
        return {"spilled": spilled | "Spilled" >> beam.Flatten(), "rejects": rejects | "Rejects" >> beam.Flatten()}


def _on_accelerator(step: beam.PTransform, job: CrayonJob) -> beam.PTransform:
    """Have a step run where the model's accelerator is, if the runner is to provide one for it."""
    if job.model and job.model.accelerator:
        return step.with_resource_hints(accelerator=job.model.accelerator)
    return step


def _run_model(model: ModelConfig) -> beam.PTransform:
    # Imported here because Beam's inference package imports torch, which a build from annotations can do without.
    from apache_beam.ml.inference.base import RunInference

    from pipelines.model_segmentation import SegmenterHandler

    return RunInference(SegmenterHandler(model.load, model.batch_size, model.max_batch_pixels, model.model_copies))


def _write(
    pipeline: beam.Pipeline,
    job: CrayonJob,
    spilled: Iterable[beam.PCollection],
    rejects: Iterable[beam.PCollection],
    inputs: Iterable[beam.PCollection],
    listed: beam.PCollection | None,
) -> None:
    """Phrase and write the shards, and publish them."""
    drafts = spilled | "AllDrafts" >> beam.Flatten(pipeline=pipeline)
    sizes = (
        drafts
        | "SizesOfSplits" >> beam.FlatMap(_rows_and_bytes)
        | "SumSizes" >> beam.CombinePerKey(lambda sizes: tuple(map(sum, zip(*sizes, strict=True))))
    )
    shard_counts = AsDict(
        sizes
        | "CountShards"
        >> beam.MapTuple(lambda split, size: (split, count_shards(size[0], size[1], job.output.num_shards)))
    )
    small = AsDict(sizes | "SmallSplits" >> beam.Filter(lambda split_size: split_size[1][0] < _LEAST_ROWS))
    stated_splits = AsDict(
        drafts
        | "StatedSplits" >> beam.FlatMap(_stated_splits, job.output.validation_ratio)
        | "OneSplitPerPicture" >> beam.CombinePerKey(max)  # where sources disagree, what one holds out is held out
    )
    present = drafts | "PresentClasses" >> beam.FlatMap(lambda pack: [(p.key, p.present) for p in unpacked(pack)])
    if job.sources.crayon_files:  # whose pictures may come again from other sources; elsewhere few do
        present = present | "OncePerPicture" >> beam.CombinePerKey(max)
    statistics = (
        present
        | "WithoutKey" >> beam.Values()
        | "ClassStatistics" >> beam.CombineGlobally(CombineStatistics(len(job.categories.things)))
    )
    joined = drafts if is_local(job.work) else drafts | "JoinDrafts" >> JoinDrafts(job.work, shard_counts)
    by_shard = {
        "drafts": joined | "ShardOfDraft" >> beam.FlatMap(_drafts_by_shard, shard_counts, stated_splits, small),
        "rejects": rejects
        | "AllRejects" >> beam.Flatten(pipeline=pipeline)
        | "ShardOfReject" >> beam.Map(_reject_by_shard, shard_counts),
    }
    shards = (
        by_shard
        | "GroupByShard" >> beam.CoGroupByKey()
        | "WriteShards"
        >> beam.FlatMap(_write_shards, job, AsSingleton(statistics), _id_owners(drafts, job), shard_counts)
    )
    input_counts = inputs | "AllInputs" >> beam.Flatten(pipeline=pipeline) | "CountInputs" >> beam.CombinePerKey(sum)
    _ = (
        pipeline
        | "Once" >> beam.Create([job.publication])
        | "Publish"
        >> beam.Map(
            publish,
            AsList(shards),
            AsDict(input_counts),
            job.categories,
            AsSingleton(listed) if listed else 0,
            job.record_count,
        )
    )


def _id_owners(drafts: beam.PCollection, job: CrayonJob) -> AsDict | dict[str, str]:
    """Find the ids that several pictures have, with the key of the one that keeps it, of a finished row if any has it.

    A path below one root is unique; data sets that were made apart, and files within them, may use the same names.
    """
    if not (job.sources.crayon_files or job.sources.records):
        return {}
    return AsDict(
        drafts
        | "IdsOfDrafts" >> beam.FlatMap(lambda pack: [(p.image_id, (not p.finished, p.key, 0)) for p in unpacked(pack)])
        | "OwnersOfIds" >> beam.CombinePerKey(_owner)
        | "SharedIds" >> beam.Filter(lambda owned: owned[1][2])
        | "KeysOfOwners" >> beam.MapTuple(lambda image_id, owner: (image_id, owner[1]))
    )


def _owner(candidates: Iterable[tuple[bool, str, int]]) -> tuple[bool, str, int]:
    """Choose the first of some (not finished, key, whether there are other keys)."""
    known = sorted(candidates)
    unfinished, key, _ = known[0]
    return unfinished, key, int(any(shared or other != key for _, other, shared in known))


def _merge(partition: int, packs: Iterable[Packed]) -> Iterator[tuple[int, Packed] | RejectOutput]:
    """Make the mentions of a partition into one task per image."""
    by_image: dict[bytes, list[Mention]] = defaultdict(list)
    for mention in chain.from_iterable(map(unpacked, packs)):
        by_image[image_key(mention)].append(mention)
    tasks = []
    for mentions in by_image.values():
        task, rejects = merge_mentions(mentions)
        yield from map(reject_output, rejects)
        tasks.append(task)
    yield partition, packed(tasks)


def _in_even_packs(
    of_partition: tuple[int, Packed], counts: dict[int, int], disk: bool
) -> Iterator[tuple[int, Packed]]:
    """Divide the tasks of a partition among the packs of all, which hold the same number of images, give or take one.

    Args:
        of_partition: its number and its tasks.
        counts: the numbers of images by partition, which say where in the line of all images this one begins.
        disk: whether drafts go to a disk.
    """
    partition, tasks = of_partition
    images = sum(counts.values())
    before = sum(count for other, count in counts.items() if other < partition)
    packs = _count_packs(images, disk)
    in_line = enumerate(unpacked(tasks), before)
    for pack, placed in groupby(in_line, key=lambda numbered: numbered[0] * packs // images):
        yield pack, packed([task for _, task in placed])


def _count_packs(images: int, disk: bool) -> int:
    """Choose the number of packs in which images travel to what segments them.

    A local runner divides the packs among its workers once, so there are many. Other runners may make a bundle of
    each, and so a file of drafts, which on a store is to be large: there packs are small where images are few, so that
    several workers are busy, and soon as large as is good for such a file.
    """
    if disk:
        return min(-(-images // _PER_PACK_ON_DISK), _PACKS_ON_DISK)
    return max(min(-(-images // _LEAST_PER_PACK), _PACKS_AT_LEAST), -(-images // _MOST_PER_PACK))


def _read(tasks: Packed, job: CrayonJob) -> Iterator[LoadedImage | Draft | RejectOutput | ToModel]:
    """Read and check images; those without a usable annotation go to the model, where there is one."""
    of_images = []
    for task in unpacked(tasks):
        if task.mentions[0].uri:
            of_images.append((task, not _needs_model(task, job)))
        else:
            yield draft_dialogue(task, job)
    for (_, with_mask), fetched in zip(of_images, fetch_ahead(of_images), strict=True):
        to_model = not with_mask
        images, rejects = read_images(fetched, job.output.max_pixels, with_rgb=to_model)
        for image in images:
            yield _for_model(image, job) if to_model else image
        if not images:
            tick(job.work, SEGMENTED)
            tick(job.work, REJECTED)
        yield from map(reject_output, rejects)


def _needs_model(task: ImageTask, job: CrayonJob) -> bool:
    return job.model is not None and bool(task.mentions[0].uri) and not (job.use_annotations and task.annotated)


def _by_need(tasks: Packed, job: CrayonJob) -> Iterator[Packed | TaggedOutput[Literal["to_model"], Packed]]:
    """Divide a pack into the tasks for the model and the others."""
    divided: dict[bool, list[ImageTask]] = {False: [], True: []}
    for task in unpacked(tasks):
        divided[_needs_model(task, job)].append(task)
    if divided[False]:
        yield packed(divided[False])
    if divided[True]:
        yield TaggedOutput(_TO_MODEL, packed(divided[True]))


def _for_model(image: LoadedImage, job: CrayonJob) -> Draft | ToModel:
    return draft_known(image, job) or TaggedOutput(_TO_MODEL, image)


def _load_record(
    record: tuple[Mention, bytes], job: CrayonJob
) -> Iterator[LoadedImage | list[Reject] | Draft | RejectOutput | ToModel]:
    """Decode an image of a data set that holds its images, for the model where there is one."""
    mention, image_bytes = record
    if not mention.uri:
        yield draft_dialogue(ImageTask((mention,)), job)
        return
    outcome = decode_image(ImageTask((mention,)), mention.image_path, image_bytes, job.output.max_pixels, True, {})
    yield _for_model(outcome, job) if isinstance(outcome, LoadedImage) and job.model else outcome


def _segment_annotated(image: LoadedImage | list[Reject] | Draft, job: CrayonJob) -> Segmented | Draft:
    """Segment an image by its annotation; rejects, and a draft of a known picture or of a dialogue about none, pass."""
    return segment_by_annotation(image, job) if isinstance(image, LoadedImage) else image


def _rows_and_bytes(pack: Packed) -> list[tuple[str, tuple[int, int]]]:
    """Count what a pack holds of each split: rows, and the bytes of their drafts."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for place in unpacked(pack):
        lengths[place.split].append(place.block.length)
    return [(split, (len(some), sum(some))) for split, some in lengths.items()]


def count_shards(rows: int, size: int, num_shards: int | None) -> int:
    """Choose the number of files of a split.

    Args:
        size: of its rows, in bytes.
    """
    by_size = max(round(rows / ROWS_PER_SHARD), -(-size // _BYTES_PER_SHARD))
    return num_shards or max(1, by_size, min(_SHARDS_AT_LEAST, rows // _LEAST_ROWS))


def _stated_splits(pack: Packed, validation_ratio: float) -> Iterator[tuple[str, str]]:
    """Emit the pictures that a source puts in a split, where another draft of the same picture may be in another."""
    for place in unpacked(pack):
        if place.split_stated and "validation" in (place.split, split_of(place.key, validation_ratio)):
            yield place.key, place.split


def _drafts_by_shard(
    pack: Packed, shard_counts: dict[str, int], stated_splits: dict[str, str], small: dict[str, int]
) -> Iterator[tuple[Shard, tuple[Shard, Packed]]]:
    """Divide drafts by shard, and say with which shard each is written.

    Args:
        small: the splits with few rows.
    """
    by_shard: dict[Shard, list[SpilledDraft]] = defaultdict(list)
    for place in unpacked(pack):
        split = stated_splits.get(place.key, place.split)
        by_shard[split, shard_of(place.key, shard_counts[split])].append(place)
    for shard, places in by_shard.items():
        along = shard[0] == "validation" and "validation" in small and "train" in shard_counts
        yield ("train", shard_counts["train"] - 1) if along else shard, (shard, packed(places))


def _reject_by_shard(reject: Reject, shard_counts: dict[str, int]) -> tuple[Shard, Packed]:
    return ("train", shard_of(reject.id, shard_counts.get("train", 1))), packed([reject])


def _write_shards(
    element: tuple[Shard, dict[str, Iterable[Any]]],
    job: CrayonJob,
    statistics: ClassStatistics,
    owners: dict[str, str],
    shard_counts: dict[str, int],
) -> Iterator[WrittenShard]:
    """Write a shard, and others along with it, from one reading of the drafts of all."""
    first, groups = element
    rejects = list(chain.from_iterable(map(unpacked, groups["rejects"])))
    places: dict[Shard, list[SpilledDraft]] = {first: []}
    for shard, pack in groups["drafts"]:
        places.setdefault(shard, []).extend(unpacked(pack))
    for of_shard in places.values():
        of_shard.sort(key=lambda place: (order_of(place.key), place.block))
    drafts = read_drafts([place.block for of_shard in places.values() for place in of_shard])
    for shard, of_shard in places.items():
        of_splits_before = sum(count for split, count in shard_counts.items() if split < shard[0])
        yield write_shard(
            shard,
            [place.key for place in of_shard],
            drafts,
            rejects if shard == first else [],
            statistics,
            owners,
            samples_of_shard(of_splits_before + shard[1], max(1, sum(shard_counts.values()))),
            shard_counts.get(shard[0], 1),
            job,
        )


def _late(value: Any) -> WindowedValue:
    """Wrap what a DoFn emits when its bundle is finished."""
    window = GlobalWindow()
    return WindowedValue(value, window.max_timestamp(), (window,))


class PackMentions(beam.DoFn):
    """Packs mentions, those of a partition together; their numbers by source follow when the bundle is finished."""

    def start_bundle(self) -> None:
        self._waiting: dict[int, list[Mention]] = defaultdict(list)
        self._waiting_count = 0
        self._counts: Counter[str] = Counter()

    def process(self, mention: Mention) -> Iterator[tuple[int, Packed]]:
        self._waiting[image_key(mention)[0] % _PARTITIONS].append(mention)
        self._waiting_count += 1
        self._counts[mention.input.source] += 1
        if self._waiting_count == _MENTIONS_AT_ONCE:
            yield from self._packs()

    def finish_bundle(self) -> Iterator[WindowedValue | Counted]:
        yield from map(_late, self._packs())
        for count in self._counts.items():
            yield TaggedOutput(_COUNTS, _late(count))

    def _packs(self) -> list[tuple[int, Packed]]:
        packs = [(partition, packed(mentions)) for partition, mentions in self._waiting.items()]
        self._waiting.clear()
        self._waiting_count = 0
        return packs


class SpillDrafts(beam.DoFn):
    """Drafts rows and writes them to files of its own; their places follow when the bundle is finished.

    What a network has segmented goes to a folder that outlives a build that is stopped.
    """

    def __init__(self, job: CrayonJob, by_model: bool = False) -> None:
        self._job = job
        self._folder = job.publication.segmented if by_model else join(job.work, DRAFTS)

    def setup(self) -> None:
        launched = self._job.facts["code_version"]
        if launched != collavo.__version__:
            raise UserError(
                f"the launcher has collavo {launched}, a worker {collavo.__version__}, which may write other rows; "
                "install the same on both, as by a new image of the workers"
            )

    def start_bundle(self) -> None:
        self._writer: SpillWriter | None = None

    def process(self, outcome: Segmented | Draft) -> Iterator[RejectOutput]:
        tick(self._job.work, SEGMENTED)
        if isinstance(outcome, list):
            tick(self._job.work, REJECTED)
            yield from map(reject_output, outcome)
            return
        if isinstance(outcome, SegmentedImage):
            outcome = draft_row(outcome, self._job)
        self._writer = self._writer or SpillWriter(self._folder, self._job.categories)
        self._writer.append(outcome)

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self._writer:
            yield from map(_late, self._writer.close())


class CombineStatistics(beam.CombineFn):
    """Sums class statistics over images."""

    def __init__(self, things: int) -> None:
        self._things = things

    def create_accumulator(self) -> ClassStatistics:
        return ClassStatistics.of(self._things)

    def add_input(self, statistics: ClassStatistics, present: tuple[int, ...]) -> ClassStatistics:
        statistics.add_image(present)
        return statistics

    def merge_accumulators(self, accumulators: Iterable[ClassStatistics]) -> ClassStatistics:
        merged = ClassStatistics.of(self._things)
        for statistics in accumulators:
            merged.add(statistics)
        return merged

    def extract_output(self, statistics: ClassStatistics) -> ClassStatistics:
        return statistics
