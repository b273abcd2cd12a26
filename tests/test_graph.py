"""The graph of the build: that its parts travel, and that a cloud runner can be handed it."""

import dataclasses
import subprocess
import sys
from collections import Counter, defaultdict

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import PipelineVisitor
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import DockerEnvironment
from builds import PICTURE, REPOSITORY, CocoFolder, planned
from conftest import state_and_timers

import collavo
from collavo.errors import UserError
from collavo.instructions.choose import ClassStatistics
from collavo.parquet_writer import CrayonFileWriter
from collavo.sources.coco_panoptic import Annotation
from pipelines.graph import CombineStatistics, _in_even_packs, _merge, build_graph, count_shards
from pipelines.job import CrayonJob
from pipelines.merge import image_key
from pipelines.records import ImageTask, Input, Mention, packed, unpacked
from schemas.categories import COCO_PANOPTIC

IMAGE = "registry/collavo:1"
DATAFLOW = PipelineOptions(
    [
        *("--runner=DataflowRunner", "--project=some-project", "--region=europe-west4"),
        *("--temp_location=gs://bucket/temp", "--staging_location=gs://bucket/staging"),
        f"--sdk_container_image={IMAGE}",
    ]
)


@pytest.fixture
def jobs(tmp_path) -> dict[str, CrayonJob]:
    """A job of every kind: from annotations and a model, from finished rows, and from all sources at once."""
    coco = CocoFolder(tmp_path / "coco")
    coco.add("a.jpg", PICTURE)
    (tmp_path / "l.json").write_text("[]")
    CrayonFileWriter((tmp_path / "rows.parquet").open("wb"), {}, COCO_PANOPTIC).close({})
    lines = {
        "scenes": [],
        "model": ["--images", tmp_path, "--device", "cuda", "--model_copies", "1"],
        "rows": ["--from_crayon", tmp_path / "rows.parquet"],
        "all": [*coco.flags(), "--llava_json", tmp_path / "l.json", "--image_root", tmp_path, "--images", tmp_path],
    }
    return {name: planned(*line, "--output", tmp_path / "out").job for name, line in lines.items()}


KINDS = ["scenes", "model", "rows", "all"]


def graph_of(job: CrayonJob) -> beam_runner_api_pb2.Pipeline:
    """The graph as Dataflow is sent it, serialised and read back."""
    pipeline = beam.Pipeline(options=DATAFLOW)
    build_graph(pipeline, job)
    proto = pipeline.to_runner_api(default_environment=DockerEnvironment.from_container_image(IMAGE))
    return beam_runner_api_pb2.Pipeline.FromString(proto.SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
def test_dataflow_can_be_sent_the_graph(jobs, kind):
    graph = graph_of(jobs[kind])
    assert graph.ByteSize() < 1 << 20  # Dataflow takes up to 10 MB
    images = {
        beam_runner_api_pb2.DockerPayload.FromString(environment.payload).container_image
        for environment in graph.components.environments.values()
        if environment.urn == common_urns.environments.DOCKER.urn
    }
    assert images == {IMAGE}
    names = {transform.unique_name for transform in graph.components.transforms.values()}
    assert len(names) == len(graph.components.transforms)
    assert {"WriteShards", "Publish", "ClassStatistics"} <= names
    assert any("RunInference" in name for name in names) == (jobs[kind].model is not None)


def test_only_the_steps_of_the_model_hold_its_accelerator_and_no_picture_is_shuffled_to_them(jobs):
    job = jobs["all"]
    model = dataclasses.replace(job.model, accelerator="type:nvidia-l4;count:1;install-nvidia-driver")
    graph = graph_of(dataclasses.replace(job, model=model)).components
    hinted = {name for name, environment in graph.environments.items() if environment.resource_hints}
    (name,) = hinted
    hints = graph.environments[name].resource_hints
    assert hints == {"beam:resources:accelerator:v1": model.accelerator.encode()}
    steps = [step for step in graph.transforms.values() if not step.subtransforms]
    made_by = {made: step for step in steps for made in step.outputs.values()}
    on_gpu = [step for step in steps if step.environment_id in hinted]
    assert all(step.unique_name.startswith("SegmentImages/") for step in on_gpu)
    assert any("RunInference" in step.unique_name for step in on_gpu)
    enters = {made_by[used].unique_name for step in on_gpu for used in step.inputs.values() if used in made_by}
    assert {name.partition("/")[0] for name in enters if not name.startswith("SegmentImages/")} == {"SplitByNeed"}


@pytest.mark.slow  # a process that imports everything
def test_a_worker_needs_nothing_of_the_launchers_main_module(jobs, tmp_path):
    (tmp_path / "graph").write_bytes(graph_of(jobs["all"]).SerializeToString())
    code = """
import sys
from apache_beam.internal import pickler
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2 as api

graph = api.Pipeline.FromString(open(sys.argv[1], "rb").read())
loaded = 0
for transform in graph.components.transforms.values():
    if transform.spec.urn == common_urns.primitives.PAR_DO.urn:
        function = api.ParDoPayload.FromString(transform.spec.payload).do_fn
        if function.urn == "beam:dofn:pickled_python_info:v1":
            pickler.loads(function.payload)
            loaded += 1
print(loaded)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "graph")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) > 20
    assert b"__main__" not in (tmp_path / "graph").read_bytes()


def test_what_is_shuffled_per_image_is_small():
    annotation = Annotation("000000142238.png", tuple((i * 1000, 1, 0) for i in range(40)))
    mention = Mention(Input("coco", "142238"), "a/b.jpg", "/data/a/b.jpg", 3, annotation, "/data/m/b.png")
    tasks = [ImageTask((mention._replace(image_path=f"a/{i}.jpg"),)) for i in range(16)]
    count, data = batch = packed(tasks)
    assert count == 16 and len(data) < 16 * 100
    assert unpacked(batch) == tasks


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("images", "packs", "packs_on_disk"), [(5, 1, 2), (400, 25, 100), (70_000, 137, 2048)])
def test_packs_hold_all_images_and_the_same_number(images, packs, packs_on_disk, disk):
    partitions = defaultdict(list)
    for i in range(images):
        mention = Mention(Input("folder", ""), "", f"/{i}.jpg")
        partitions[image_key(mention)[0]].append(mention)
    tasks = [task for p, some in partitions.items() for task in _merge(p, [packed(some[::2]), packed(some[1::2])])]
    counts = {partition: pack[0] for partition, pack in tasks}
    sizes: Counter[int] = Counter()
    uris = set()
    for partition in tasks:
        for number, pack in _in_even_packs(partition, counts, disk):
            sizes[number] += pack[0]
            uris |= {task.mentions[0].uri for task in unpacked(pack)}
    assert len(uris) == sizes.total() == images
    assert len(sizes) == (packs_on_disk if disk else packs)
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_class_statistics_are_the_same_for_any_grouping():
    images = [(0, 2), (2,), (), (0, 2, 79), (5,)]
    combine = CombineStatistics(80)

    def accumulated(part: list[tuple[int, ...]]) -> ClassStatistics:
        accumulator = combine.create_accumulator()
        for labels in part:
            accumulator = combine.add_input(accumulator, labels)
        return accumulator

    whole = combine.extract_output(accumulated(images))
    for cut in range(len(images) + 1):
        parts = [accumulated(images[cut:]), accumulated([]), accumulated(images[:cut])]
        assert np.array_equal(combine.extract_output(combine.merge_accumulators(parts)).together, whole.together)
    assert whole.together[2, 2] == 3 and whole.together[0, 2] == 2 and whole.together[5].sum() == 1


def test_the_number_of_shards_follows_the_rows_unless_it_is_given():
    rows = (0, 399, 400, 2999, 17_001, 118_287)
    assert [count_shards(count, 150_000 * count, None) for count in rows] == [1, 1, 2, 8, 9, 59]
    assert count_shards(17_001, 4_000_000 * 17_001, None) == 64  # of a GiB, where 2,000 rows are 8
    assert count_shards(10, 10, 64) == 64


class _Steps(PipelineVisitor):
    def __init__(self) -> None:
        self.functions: list[beam.DoFn] = []

    def visit_transform(self, node) -> None:
        if isinstance(node.transform, beam.ParDo):
            self.functions.append(node.transform.fn)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_keeps_state_or_timers(jobs, kind):
    """A bundle may then run anywhere and twice; and conftest leaves out Beam's search for them."""
    pipeline, steps = beam.Pipeline(options=DATAFLOW), _Steps()
    build_graph(pipeline, jobs[kind])
    pipeline.visit(steps)
    assert len(steps.functions) > 10
    assert [function for function in steps.functions if state_and_timers(function) != (set(), set())] == []


def test_a_worker_of_another_version_ends_the_job_since_it_may_write_other_rows(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    job = planned("--images", tmp_path, "--segmenter", "none", "--output", tmp_path / "out").job
    other = dataclasses.replace(job, facts={**job.facts, "code_version": "0.0.9"})
    pipeline = beam.Pipeline(runner=FnApiRunner())
    build_graph(pipeline, other)
    with pytest.raises(UserError, match=f"the launcher has collavo 0.0.9, a worker {collavo.__version__}, which"):
        pipeline.run()


def test_a_launcher_makes_the_graph_of_a_build_with_a_network_without_torch(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    code = """
import sys
import apache_beam
from pipelines import launch
from pipelines.graph import build_graph
from pipelines.options import parse_flags
from pipelines.plan import make_plan
plan = make_plan(*parse_flags(sys.argv[1:]), share_gpu=False)
with launch._without_torch():
    build_graph(apache_beam.Pipeline(), plan.job)
assert plan.job.model and not {"torch", "scipy", "transformers"} & sys.modules.keys()
from apache_beam.ml.inference import base, model_manager
assert base.resource
"""
    flags = ["--images", tmp_path, "--segmenter_checkpoint", "scenes", "--output", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", code, *map(str, flags)], cwd=REPOSITORY, check=True)
