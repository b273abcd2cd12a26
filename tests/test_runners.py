"""What Beam, its runners and their workers cannot do is refused when the command starts, not hours later."""

import importlib.util
import re
import time
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions, StandardOptions
from builds import planned, scene_sources, status_of, tiny_mask2former
from conftest import cores

from collavo.errors import UserError
from collavo.scenes import write_scenes
from pipelines import local_workers
from pipelines.options import build_parser
from pipelines.runners import check_file_systems, check_workers, parse_beam_options

CLOUD = ["--project=some-project", "--region=europe-west4", "--temp_location=gs://bucket/temp"]
DATAFLOW = ["--runner=DataflowRunner", *CLOUD, "--staging_location=gs://bucket/staging"]
IMAGE = "--sdk_container_image=registry/collavo:1"
MPS = "--dataflow_service_options=worker_accelerator=type:nvidia-l4;count:1;install-nvidia-driver;use_nvidia_mps"
ONE_PROCESS = "--experiments=no_use_multiple_sdk_containers"


def parsed(*arguments: str) -> PipelineOptions:
    return parse_beam_options(arguments, build_parser())


def refusal(check, *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_local_runner_is_meant_where_none_is_named():
    assert parsed().view_as(StandardOptions).runner == "DirectRunner"
    options = parsed("--direct_running_mode", "multi_processing", "--direct_num_workers", "3")
    assert options.view_as(DirectOptions).direct_num_workers == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nosuch"], "unknown flag --nosuch"),
        (["--runner", "Nosuch"], "--runner Nosuch: Unexpected pipeline runner"),
        (["--runner=DataflowRunner", *CLOUD[1:], "--staging_location=gs://b/s"], "Missing required option: project"),
        ([*DATAFLOW, "--num_workers=5", "--max_num_workers=2"], "num_workers (5) cannot exceed max_num_workers (2)"),
    ],
)
def test_options_that_beam_or_a_runner_refuses_are_refused_in_one_line(arguments, message):
    assert message in refusal(parse_beam_options, arguments, build_parser())


def test_a_bad_value_of_beams_is_refused_in_one_line(capsys):
    assert status_of(*["--direct_num_workers", "two"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "build_crayon.py: error: argument --direct_num_workers: invalid int value: 'two'"


@pytest.mark.parametrize(
    "words, device, memory_gb, workers",
    [
        ("", None, 1, 3),
        ("", "cpu", 100, 3),
        ("", "cpu", 9, 2),
        ("", "cpu", 1, 1),
        ("", "auto", 100, 2),
        ("", "cuda", 1, 2),
        ("", "cuda:1", 100, 1),
        ("--direct_num_workers 0", "cpu", 1, 3),
        ("--direct_num_workers=1", None, 100, 1),
        ("--direct_num_workers 1", "auto", 100, 1),
        ("--direct_num_workers 5", "cpu", 100, 5),
        ("--direct_running_mode multi_processing", "cpu", 100, 3),
        ("--direct_running_mode multi_processing", "auto", 100, 2),
        ("--direct_running_mode in_memory", None, 100, 1),
        ("--direct_running_mode=multi_threading --direct_num_workers 4", None, 100, 1),
        ("--runner DataflowRunner --direct_num_workers 4", None, 100, 1),
        ("--direct_num_workers two", None, 100, 1),  # for Beam to refuse
    ],
)
def test_workers_are_a_core_each_or_with_a_model_a_gpu_unless_told_otherwise(
    monkeypatch, words, device, memory_gb, workers
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(local_workers, "cores", lambda: 3)
    monkeypatch.setattr(local_workers, "_free_memory", lambda: memory_gb << 30)
    assert local_workers.count_workers(words.split(), device) == workers


def test_the_embedded_network_needs_less_memory(monkeypatch):
    monkeypatch.setattr(local_workers, "cores", lambda: 3)
    monkeypatch.setattr(local_workers, "_free_memory", lambda: 2 << 30)
    assert [local_workers.count_workers([], "cpu", embedded) for embedded in (False, True)] == [1, 2]


def test_memory_that_a_container_has_a_share_of(monkeypatch, tmp_path):
    monkeypatch.setattr(local_workers, "_CONTROL_GROUP", tmp_path)
    without = local_workers._free_memory()
    assert without > 1 << 20
    (tmp_path / "memory.max").write_text("3000")
    (tmp_path / "memory.current").write_text("1000")
    (tmp_path / "memory.stat").write_text("active_file 900\ninactive_file 500\n")
    assert local_workers._free_memory() == 2500
    (tmp_path / "memory.stat").write_text("active_file 900\n")
    assert local_workers._free_memory() > 1 << 20
    (tmp_path / "memory.max").write_text("max")
    assert local_workers._free_memory() > 1 << 20


@pytest.mark.parametrize("text, expected", [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 3), (None, 3)])
def test_a_container_has_the_cores_of_its_share(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(local_workers.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(local_workers, "_CONTROL_GROUP", tmp_path)
    if text:
        (tmp_path / "cpu.max").write_text(text)
    assert cores() == expected


def test_gpus_are_those_that_cuda_is_to_see(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, MIG-5")
    assert local_workers.gpus_for("cuda") == local_workers.gpus_for("auto") == ["2", "MIG-5"]
    assert local_workers.gpus_for("cuda:1") == ["cuda:1"]
    assert local_workers.gpus_for("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert local_workers.gpus_for("auto") == []
    assert local_workers.gpus_for("cuda") == ["cuda"]  # for torch to refuse


@pytest.mark.parametrize(
    "files, gpus",
    [("nvidia1 nvidia0 nvidiactl", "0 1"), ("nvidia4 nvidia5 nvidiactl", "0 1"), ("dxg", "dxg"), ("", "")],
)
def test_gpus_are_found_by_their_files(monkeypatch, tmp_path, files, gpus):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local_workers, "_DEVICES", tmp_path)
    for name in files.split():
        (tmp_path / name).touch()
    assert local_workers.gpus_for("auto") == gpus.split()


def test_each_worker_sees_a_gpu_of_its_own(monkeypatch, tmp_path):
    """The workers' Beam is stood in for by a line that writes down what they see."""
    script, seen = tmp_path / "workers.py", tmp_path / "seen"
    seen.mkdir()
    says = f"Path({str(seen)!r}, str(os.getpid())).write_text(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['ID'])"
    text = Path(local_workers.__file__).read_text().replace("        main([])", f"        {says}")
    script.write_text(text.replace("    _import_all(with_torch)", "    pass"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,7")
    monkeypatch.setattr(local_workers, "__file__", str(script))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with local_workers.LocalWorkers(4, "cuda") as workers:
        assert workers._nursery.args[5] == "0"  # it must not import torch, which may count the GPUs
        for number in range(4):
            workers.pipe.send({"ID": f":{number}"})
        deadline = time.monotonic() + 240
        while len(found := [file.read_text() for file in seen.iterdir()]) < 4 or "" in found:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert sorted(found) == ["2:0", "2:2", "7:1", "7:3"]


def test_workers_in_one_process_are_refused():
    words = ["--direct_num_workers=4", "--direct_running_mode", "in_memory"]
    assert "--direct_num_workers 4 has no effect" in refusal(local_workers.count_workers, words, None)


def test_a_gpu_is_not_given_a_model_by_every_process():
    assert "--model_copies 1" in refusal(check_workers, parsed(), True, "cuda", None)
    assert "--model_copies 1" in refusal(check_workers, parsed(), True, "cuda:1", None)
    check_workers(parsed(), True, "cuda", 1)
    check_workers(parsed(), True, "cpu", None)
    check_workers(parsed(), True, None, None)  # no model runs
    check_workers(parsed(), False, "cuda", None)


def test_dataflow_needs_an_image_that_holds_this_package():
    assert "--sdk_container_image" in refusal(check_workers, parsed(*DATAFLOW), False, "cuda", None)
    check_workers(parsed(*DATAFLOW, IMAGE), False, "cuda", None)


@pytest.mark.parametrize(
    "words",
    [
        "--runner PortableRunner --job_endpoint host:8073",
        "--runner FlinkRunner --flink_master host:8081 --sdk_container_image registry/collavo:1",
        "--runner SparkRunner --spark_master_url spark://host:7077 --environment_type DOCKER",
    ],
)
def test_other_runners_need_it_too_and_do_not_take_dataflows_flag(words):
    assert "--environment_config IMAGE" in refusal(check_workers, parsed(*words.split()), False, "cuda", None)
    named = parsed(*words.split(), "--environment_type", "DOCKER", "--environment_config", "registry/collavo:1")
    check_workers(named, False, "cuda", None)
    pool = parsed(*words.split(), "--environment_type", "EXTERNAL", "--environment_config", "host:50000")
    check_workers(pool, False, "cuda", None)


def test_a_local_flink_starts_workers_from_this_installation():
    check_workers(parsed("--runner", "FlinkRunner"), False, "cuda", None)


def test_an_environment_that_beam_does_not_know_or_cannot_read_is_said_in_one_line():
    words = ["--runner", "PortableRunner", "--job_endpoint", "host:8073", "--environment_type"]
    message = refusal(check_workers, parsed(*words, "NOSUCH"), False, "cuda", None)
    assert message == "--environment_type NOSUCH: Unknown environment type: NOSUCH"
    process = parsed(*words, "PROCESS", "--environment_config", "/opt/boot")
    assert "--environment_type PROCESS --environment_config /opt/boot: " in refusal(
        check_workers, process, False, "cuda", None
    )


def test_dataflow_either_shares_a_gpu_or_has_one_process():
    check_workers(parsed(*DATAFLOW, IMAGE, MPS), False, "cuda", None)
    check_workers(parsed(*DATAFLOW, IMAGE, ONE_PROCESS), False, "cuda", None)
    message = refusal(check_workers, parsed(*DATAFLOW, IMAGE, MPS, ONE_PROCESS), False, "cuda", None)
    assert "use_nvidia_mps" in message and "no_use_multiple_sdk_containers" in message
    hint = MPS.partition("worker_accelerator=")[2]
    assert message == refusal(check_workers, parsed(*DATAFLOW, IMAGE, ONE_PROCESS), False, "cuda", None, hint)


def test_an_accelerator_is_for_all_steps_of_dataflow_or_for_those_of_the_network():
    check_workers(parsed(*DATAFLOW, IMAGE), False, "cuda", None, "type:nvidia-l4;count:1")
    assert "take either" in refusal(check_workers, parsed(*DATAFLOW, IMAGE, MPS), False, "cuda", None, "type:a;count:1")
    assert "--accelerator acts only" in refusal(check_workers, parsed(), False, "cuda", None, "type:a;count:1")


def test_dataflow_reads_no_local_disk():
    message = refusal(check_file_systems, parsed(*DATAFLOW, IMAGE), [("images", "pictures")])
    assert "--images pictures: Dataflow's workers see no local disk" in message
    check_file_systems(parsed(), [("images", "pictures")])


def test_sample_scenes_are_not_drawn_for_dataflow(capsys):
    assert status_of(*[*DATAFLOW, IMAGE]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--output out: Dataflow's workers see no local disk" in line


def test_the_image_of_the_workers_imports_what_is_there():
    dockerfile = (Path(__file__).parents[1] / "docker" / "Dockerfile").read_text()
    modules = re.findall(r"\b(?:pipelines|collavo)\.[\w.]+", dockerfile)
    assert modules and all(importlib.util.find_spec(module) for module in modules)


def test_the_image_of_the_workers_has_one_torch():
    """torchvision alone would bring the latest, with which detectron2 would be compiled."""
    dockerfile = (Path(__file__).parents[1] / "docker" / "Dockerfile").read_text()
    installs = [command for command in re.findall(r"pip install .*", dockerfile) if "torch" in command]
    assert len(installs) == 3 and all('"torch==${TORCH_VERSION}"' in command for command in installs)


def test_a_runner_that_is_not_there_is_said_in_one_line(tmp_path, capfd):
    write_scenes(tmp_path / "scenes", 1, (96, 72))
    runner = ["--runner", "PortableRunner", "--job_endpoint", "localhost:1", "--job_server_timeout", "1"]
    runner += ["--environment_type", "LOOPBACK"]
    assert status_of(*scene_sources(tmp_path / "scenes"), "--output", tmp_path / "out", *runner) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "error: --runner PortableRunner: the runner cannot be reached; its log: " in line


def test_a_network_of_ones_own_has_to_be_in_the_workers_image(tmp_path):
    network = tiny_mask2former(tmp_path / "net")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").touch()
    flags = ["--images", tmp_path / "p", "--output", tmp_path / "out", "--device", "cpu"]
    cluster = ["--runner", "PortableRunner", "--job_endpoint", "embed", "--environment_type", "LOOPBACK"]
    (note,) = planned(*flags, "--segmenter_checkpoint", network, *cluster).notes
    assert note.startswith(f"--segmenter_checkpoint {network}: every worker reads this from its own disk")
    assert planned(*flags, "--segmenter_checkpoint", network).notes == ()
    assert planned(*flags, "--segmenter_checkpoint", "scenes", *cluster).notes == ()
