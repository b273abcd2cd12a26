"""Training through its command: what a run leaves, and how it is interrupted, shared out, loaded and refused."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_packing import QUESTIONS, example
from tiny_model import OWN_CLASSES, own_rows, save_world, scene_rows, write_crayon_file

from collavo import evaluate, train
from collavo.errors import UserError
from collavo.folders import locked
from collavo.model.query_init import adopt_categories
from collavo.model_card import write_model_card
from collavo.runs import load_base, load_run, save_run
from collavo.training import checkpoint, trainable
from collavo.training import run as run_module
from collavo.training.arguments import parse_arguments
from collavo.training.batches import MicroBatch, collate
from collavo.training.display import RunDisplay
from collavo.training.loop import Trainer, learning_rate_at, signals_noted
from schemas.categories import COCO_PANOPTIC, Category, CategorySet
from schemas.crayon_row import CRAYON_SCHEMA, CrayonRow, Dialogue

COMMON = (
    "--device cpu --precision fp32 --batch_size 4 --micro_batch_size 2 --lora_rank 4 --max_length 350 --max_steps 3 "
    "--workers 0 --crayon_share 0.5 --seed 1"
)
RATES = "--cpt_learning_rate 2e-3 --cit_learning_rate 1e-2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and data for all tests of this file."""
    return save_world(tmp_path_factory.mktemp("world"), 8)


def command(world: Path, output: Path, *flags: str) -> list[str]:
    data = ["--data", str(world / "rows.parquet"), "--preset", str(world / "base"), "--output_dir", str(output)]
    return [*data, *COMMON.split(), *RATES.split(), *flags]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["stage"], line["loss"]) for line in metrics(run) if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = [run / "crayon.safetensors", *sorted(run.glob("adapters/*/adapter_model.safetensors"))]
    return {f"{file.relative_to(run)}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """An uninterrupted run."""
    run = world / "finished"
    (world / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")  # of the data
    assert train.main(command(world, run)) == 0
    (world / "README.md").unlink()
    return run


def test_a_run_leaves_what_its_directory_promises(finished: Path) -> None:
    for name in ("config.json", "train_args.json", "metrics.jsonl", "README.md", "crayon.safetensors"):
        assert (finished / name).stat().st_size
    for adapter in ("image_cit", "vl_cit"):
        assert (finished / "adapters" / adapter / "adapter_model.safetensors").exists()
    assert [phase for step, phase, _ in losses(finished) if step <= 3] == ["cpt"] * 3
    assert {stage for step, stage, _ in losses(finished) if step > 3} == {"image_cit", "vl_cit"}
    assert [line["step"] for line in metrics(finished) if "validation_crayon_loss" in line] == [3, 6]


def test_cards_state_the_licence_of_the_data_where_these_are_out_of_reach(finished: Path, tmp_path: Path) -> None:
    write_model_card(tmp_path, finished, "merged", "base")
    for folder in (finished, tmp_path):
        assert "| data | world, licence cc-by-4.0 |" in (folder / "README.md").read_text().replace(
            finished.parent.name, "world"
        )


def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world / "interrupted"
    flags = command(world, run, "--checkpoint_steps", "2")

    def interrupt(display: RunDisplay, result: Any, phase: Any) -> None:
        step(display, result, phase)
        if result.step == 5:  # between two checkpoints, and logged already
            raise KeyboardInterrupt

    step = RunDisplay.step
    with monkeypatch.context() as patched:
        patched.setattr(RunDisplay, "step", interrupt)
        assert train.main(flags) == 130
    assert "--resume continues from the last checkpoint" in capsys.readouterr().err
    assert not (run / "crayon.safetensors").exists()
    (moved := world / "moved").mkdir()
    shutil.copy(world / "rows.parquet", moved)
    assert train.main([*flags, "--resume", "--data", str(moved), "--gradient_checkpointing"]) == 0
    assert losses(run) == losses(finished)
    expected = weights(finished)
    assert weights(run).keys() == expected.keys()
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name


def test_data_that_moved_are_resumed_in_the_order_of_the_first_start_however_their_names_sort_now(
    world: Path, tmp_path: Path
) -> None:
    rows, places = scene_rows(8), {name: tmp_path / name for name in ("a/mine", "b/coco", "coco", "mine")}
    for name, folder in places.items():
        folder.mkdir(parents=True)
        write_crayon_file(folder / "rows.parquet", rows[:4] if name.endswith("mine") else rows[4:])

    def trained(run: str, steps: int, *data: str) -> list[tuple[int, str, float]]:
        flags = ("--phase", "cpt", "--cpt_learning_rate", "0", "--final_learning_rate", "0", "--max_steps", str(steps))
        where = ("--data", *(str(places[name]) for name in data))
        assert train.main(command(world, tmp_path / run, *flags, *where, "--resume")) == 0
        return losses(tmp_path / run)

    whole = trained("whole", 3, "a/mine", "b/coco")
    trained("moved", 1, "a/mine", "b/coco")
    trained("moved", 2, "coco", "mine")
    assert trained("moved", 3, "mine", "coco") == whole


def test_signals_save_a_checkpoint_from_which_the_run_goes_on_bit_for_bit(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(trainer: Trainer, number: int, *more: Any) -> Any:
        if number == at_step:
            os.kill(os.getpid(), sent)
        return step(trainer, number, *more)

    step, run = Trainer._step, tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", kill)
        sent_at = ((signal.SIGTERM, 1), (signal.SIGHUP, 2), (signal.SIGINT, 4), (signal.SIGUSR1, 5))  # in cpt, in cit
        for sent, at_step in sent_at:
            assert train.main([*command(world, run), "--resume"]) == 128 + sent
            said = f"stopped by {sent.name} after step {at_step}, with a checkpoint; --resume goes on from it"
            assert said in capsys.readouterr().err
    assert train.main([*command(world, run), "--resume"]) == 0
    assert losses(run) == losses(finished)
    for name, tensor in weights(finished).items():
        assert torch.equal(tensor, weights(run)[name]), name


def test_a_terminal_that_is_closed_stops_nothing_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not noted
    finally:
        signal.signal(signal.SIGHUP, before)


def torchrun(processes: int, *flags: str) -> subprocess.Popen[bytes]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "collavo.train"]
    return subprocess.Popen([sys.executable, *launch, *flags], start_new_session=True, stderr=subprocess.DEVNULL)


def assert_alike(run: Path, finished: Path, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-2, "atol": 1e-4}
    for (step, stage, loss), (_, of_stage, expected) in zip(losses(run), losses(finished), strict=True):
        assert stage == of_stage
        # The first steps differ by the order of sums; later ones also by what AdamW makes of gradients near zero.
        assert loss == pytest.approx(expected, rel=0 if exactly else 1e-5 if step <= 4 else 1e-4, abs=0), step
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(finished)[name], **tolerance, msg=name)  # type: ignore[arg-type]


def killed(processes: int, run: Path, *flags: str) -> None:
    """Train until a checkpoint in the second phase is there, and kill all processes."""
    running = torchrun(processes, *flags)
    while len(list(run.glob("checkpoints/step-00000[45]"))) == 0 and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (run / "crayon.safetensors").exists()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_also_after_they_were_killed(world: Path, finished: Path) -> None:
    whole, run = world / "two", world / "killed"
    whole.mkdir()
    (whole / "train_args.json").write_text("{}")
    assert torchrun(2, *command(world, whole, "--overwrite")).wait() == 0  # one of them replaces the old run
    assert_alike(whole, finished)
    flags = command(world, run, "--checkpoint_steps", "2")
    killed(2, run, *flags)
    shutil.copytree(run, world / "killed_again")
    assert torchrun(2, *flags, "--resume").wait() == 0
    assert_alike(run, whole, exactly=True)
    assert train.main([*command(world, world / "killed_again"), "--resume"]) == 0
    assert_alike(world / "killed_again", finished)


def test_ranks_that_find_different_checkpoints_refuse_to_begin(world: Path, finished: Path, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    shutil.copytree(finished, tmp_path / "0" / "run")
    flags = " ".join([*command(world, Path("run")), "--max_steps", "4", "--epochs", "3", "--resume"])
    own_folder = f'cd "{tmp_path}/$RANK" && exec "{sys.executable}" -m collavo.train {flags}'
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", "sh", "-c", own_folder]
    root = {"PYTHONPATH": os.pathsep.join([str(Path(train.__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-m", *launch], env=os.environ | root, capture_output=True, text=True)
    assert done.returncode
    said = "--output_dir run: rank 0 finds step-000006 of cit there, and rank 1 no checkpoint; name a folder that all"
    assert said in done.stderr


@pytest.mark.slow
def test_two_processes_leave_queries_alone_where_no_batch_of_dialogues_has_a_picture(
    world: Path, tmp_path: Path
) -> None:
    said = (("human", "Who are you?"), ("gpt", "A model."))
    alone = CrayonRow("", None, None, None, None, None, ("llava",), None, "train", None)
    talks = [replace(alone, image_id=f"{n}", conversations=(Dialogue(f"{n}", said),)) for n in range(16)]
    rows = [*(replace(row, conversations=()) for row in scene_rows(8)), *talks]
    data = write_crayon_file(tmp_path / "rows.parquet", rows)
    flags = ("--data", str(data), "--phase", "all", "--max_steps", "6")
    assert torchrun(2, *command(world, tmp_path / "two", *flags)).wait() == 0
    assert train.main(command(world, tmp_path / "one", *flags)) == 0
    assert [stage for _, stage, _ in losses(tmp_path / "one")].count("vl_cit") > 1
    assert_alike(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one_also_where_two_go_on_after_they_were_killed(
    world: Path, finished: Path
) -> None:
    assert torchrun(4, *command(world, world / "four")).wait() == 0
    assert_alike(world / "four", finished)
    flags = command(world, world / "fewer", "--checkpoint_steps", "2")
    killed(4, world / "fewer", *flags)
    assert torchrun(2, *flags, "--resume").wait() == 0
    assert_alike(world / "fewer", finished)


def test_queries_can_begin_as_names_of_which_the_first_step_is_already_told(world: Path, finished: Path) -> None:
    flags = ("--phase", "cpt", "--query_start", "names", "--max_steps", "1")
    assert train.main(command(world, world / "names", *flags)) == 0
    found, others = losses(world / "names"), losses(finished)
    assert found[0][2] != others[0][2]  # queries that begin at random have no effect yet
    queries = load_file(world / "names" / "crayon.safetensors")["semantic_queries.weight"]
    assert queries[0].norm() < 0.2 * queries[1:].norm(dim=1).mean()  # an unknown class has no name


def test_memory_and_time_can_be_saved_without_another_result(world: Path, finished: Path) -> None:
    flags = ("--micro_batch_size", "4", "--gradient_checkpointing", "--workers", "2")
    assert train.main(command(world, world / "saving", *flags)) == 0
    for (_, _, loss), (_, _, expected) in zip(losses(world / "saving"), losses(finished), strict=True):
        assert loss == pytest.approx(expected, rel=1e-4)


def test_threads_of_a_cpu_take_sequences_each_and_come_to_the_same_sums_whenever_they_end(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_late(trainer: Trainer, piece: MicroBatch, tokens: int) -> torch.Tensor:
        at_work.add(threading.get_ident())
        time.sleep(0.1 if next(pieces) % 2 == 0 else 0)
        return loss(trainer, piece, tokens)

    loss, threads, pieces, at_work = Trainer._loss, torch.get_num_threads(), itertools.count(), set[int]()
    flags = ("--micro_batch_size", "4", "--gradient_checkpointing")
    torch.set_num_threads(2)
    try:
        assert train.main(command(world, world / "threads", *flags)) == 0
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_loss", first_late)
            assert train.main(command(world, world / "late", *flags)) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(at_work) > 1
    assert_alike(world / "threads", finished)
    assert_alike(world / "late", world / "threads", exactly=True)


@pytest.mark.parametrize(
    ("flags", "stages", "adapters"),
    [
        (("--adapters", "single"), {"cpt", "cit"}, ["cit"]),  # one adapter for both kinds
        (("--adapters", "vl_only"), {"cpt", "vl_cit"}, ["vl_cit"]),  # no crayon batches after cpt
        (("--queries", "none"), {"image_cit", "vl_cit"}, ["image_cit", "vl_cit"]),  # nothing to tune in cpt
        pytest.param(
            ("--queries", "semantic"), {"cpt", "image_cit", "vl_cit"}, ["image_cit", "vl_cit"], marks=pytest.mark.slow
        ),
    ],
)
def test_ablations_train_what_they_name(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    stages: set[str],
    adapters: list[str],
) -> None:
    run = tmp_path / "run"
    assert train.main(command(world, run, "--max_steps", "2", *flags)) == 0
    assert "UNEXPECTED" not in capsys.readouterr().err
    assert {stage for _, stage, _ in losses(run)} == stages
    assert sorted(path.name for path in (run / "adapters").iterdir()) == adapters
    names = set(load_file(run / "crayon.safetensors"))
    for kind in ("semantic", "numbering"):
        assert (f"{kind}_queries.weight" in names) == ("--queries" not in flags or kind in flags)


def test_the_phases_can_be_run_one_after_the_other(world: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main(command(world, run, "--phase", "cpt", "--max_steps", "1")) == 0
    assert not (run / "adapters").exists()
    assert train.main(command(world, run, "--phase", "cit", "--max_steps", "1")) == 0
    assert sorted(path.name for path in (run / "adapters").iterdir()) == ["image_cit", "vl_cit"]
    assert losses(run)[0] == losses(finished)[0]
    assert [step for step, _, _ in losses(run)] == [1, 2]


def test_what_cpt_has_learned_is_no_less_precise_in_cit_where_the_base_is_in_bfloat16(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(base: str, dtype: torch.dtype, *more: Any) -> Any:
        return load_base(base, torch.bfloat16, *more)

    monkeypatch.setattr(trainable, "load_base", on_a_gpu)
    arguments, cpu = parse_arguments(command(world, finished, "--phase", "cit")), torch.device("cpu")
    tuned = finished / "crayon.safetensors"
    staged, _ = trainable.load_trainable(arguments, ["vl_cit"], COCO_PANOPTIC, tuned, None, cpu, torch.bfloat16)
    learning = staged.parameters_of(["crayon_prompt", "vl_cit"])
    assert {parameter.dtype for parameter in learning.values()} == {torch.float32}
    for name, tensor in load_file(tuned).items():
        assert torch.equal(next(p for full, p in learning.items() if full.endswith(f"crayon_prompt.{name}")), tensor)


def test_steps_are_counted_on_over_phases_however_seldom_they_are_logged(world: Path, tmp_path: Path) -> None:
    rows, run = tmp_path / "rows.parquet", tmp_path / "run"
    write_crayon_file(rows, [replace(row, split="train") for row in scene_rows(8)])  # no evaluation logs a step either
    for phase, steps in (("cpt", "3"), ("cit", "1")):
        flags = ("--data", str(rows), "--phase", phase, "--max_steps", steps, "--log_steps", "100")
        assert train.main(command(world, run, *flags)) == 0
    assert [step for step, _, _ in losses(run)] == [3, 4]
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["step-000003", "step-000004"]


def test_a_phase_whose_command_says_resume_from_the_first_goes_on_from_the_one_before(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, more in ((tmp_path / "plain", ()), (tmp_path / "resumed", ("--resume",))):
        for phase, steps in (("cpt", "1"), ("cit", "2")):
            flags = ("--phase", phase, "--max_steps", steps, "--checkpoint_steps", "1", *more)
            assert train.main(command(world, run, *flags)) == 0
    assert "resumed holds no checkpoint of cit; training begins anew" in " ".join(capsys.readouterr().out.split())
    assert [step for step, _, _ in losses(tmp_path / "resumed")] == [1, 2, 3]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "plain")
    assert train.main(command(world, tmp_path / "resumed", "--phase", "cpt", "--resume")) == 2  # a step back
    assert "--phase was cit, is cpt" in capsys.readouterr().err


def test_a_phase_that_was_stopped_is_begun_anew_only_when_asked_and_then_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(trainer: Trainer, number: int, *more: Any) -> Any:
        if number == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, number, *more)

    step, run = Trainer._step, tmp_path / "run"
    tune, instruct = (command(world, run, "--phase", phase) for phase in ("cpt", "cit"))
    assert train.main([*tune, "--max_steps", "1"]) == 0
    tuned = load_file(run / "crayon.safetensors")
    instruct += ["--checkpoint_steps", "1", "--keep_checkpoints", "1"]
    other_rate = [*instruct, "--cit_learning_rate", "2e-3"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", kill)
        at_step = 3
        assert train.main(instruct) == 143
        assert train.main(other_rate) == 2
        assert "holds an unfinished cit; --resume continues it, --overwrite begins it anew" in capsys.readouterr().err
        at_step = 2
        assert train.main([*other_rate, "--overwrite"]) == 143
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in load_file(run / "crayon.safetensors").items())
    assert train.main([*other_rate, "--resume"]) == 0
    assert [step for step, _, _ in losses(run)] == [1, 2, 3, 4]


def test_a_gradient_that_is_no_number_ends_the_run_before_a_weight_takes_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoilt(trainer: Trainer, learning: Any) -> None:
        summed(trainer, learning)
        learning[0].grad[0] = float("inf")

    summed = Trainer._sum_gradients
    monkeypatch.setattr(Trainer, "_sum_gradients", spoilt)
    for attention, way in (("sdpa", "; --resume with --attention eager computes it otherwise\n"), ("eager", "\n")):
        flags = ("--checkpoint_steps", "1", "--attention", attention, "--overwrite")
        assert train.main(command(world, tmp_path / "run", *flags)) == 1
        said = capsys.readouterr().err
        assert "error: step 1: the norm of the gradient is inf; images scene-" in said
        assert said.endswith(way) and ("--resume" in said) == (attention == "sdpa")
        assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_last_checkpoint_is_that_of_the_most_steps_also_beyond_a_million(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight])
    for steps in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoint.save_checkpoint(tmp_path, checkpoint.Position("cit", steps, steps), {}, optimizer, {}, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


def test_a_checkpoint_is_on_the_disk_before_it_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(handle: int) -> None:
        synced.add(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    fsync, synced = os.fsync, set[Path]()
    monkeypatch.setattr(os, "fsync", noted)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    checkpoint.save_checkpoint(tmp_path, checkpoint.Position("cit", 1, 1), {}, optimizer, {}, keep=1)
    (whole,) = checkpoint.list_checkpoints(tmp_path)
    assert {path.name for path in synced} == {path.name for path in whole.iterdir()}
    assert {path.parent.name for path in synced} == {f".{whole.name}.unfinished"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
def test_a_checkpoint_that_was_loaded_is_not_held_open(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(9))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(9)
    optimizer.step()
    checkpoint.save_checkpoint(tmp_path, checkpoint.Position("cpt", 1, 1), {"w": weight}, optimizer, {}, 1)
    checkpoint.load_optimizer(tmp_path / "checkpoints" / "step-000001", {"w": weight}, optimizer)
    assert optimizer.state[weight]["step"] == 1 and optimizer.state[weight]["exp_avg"].any()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("limits", [{"max_position_embeddings": 250}, {"model_type": "mistral", "sliding_window": 250}])
def test_no_sequence_is_longer_than_the_base_takes(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limits: dict[str, Any]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"].update(limits)
    (base / "config.json").write_text(json.dumps(config))
    flags = command(world, tmp_path / "run", "--preset", str(base), "--max_steps", "1")
    assert train.main(flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--max_length 350: the base takes 250 tokens, so no sequence is longer" in out


@pytest.mark.parametrize(("most", "phases"), [("1", ["cpt", "cit", "cit"]), ("9", ["cpt", "cpt", "cit", "cit"])])
def test_crayon_prompt_tuning_can_be_shorter_but_no_longer_than_every_phase(
    world: Path, tmp_path: Path, most: str, phases: list[str]
) -> None:
    assert train.main(command(world, tmp_path / "run", "--max_steps", "2", "--cpt_max_steps", most)) == 0
    assert [line["phase"] for line in metrics(tmp_path / "run") if "loss" in line] == phases


def test_a_run_from_another_version_of_the_embedded_base_is_neither_loaded_nor_resumed(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    args = json.loads((run / "train_args.json").read_text())
    assert args["base_sha256"] is None  # for its base is a folder
    (run / "train_args.json").write_text(json.dumps(args | {"base": "tiny", "base_sha256": "0" * 64}))
    said = "trained from the small base of another version of this package"
    with pytest.raises(UserError, match=said):
        load_run(run, torch.device("cpu"), torch.float32)
    assert train.main(command(world, run, "--resume")) == 2
    assert said in capsys.readouterr().err


def test_a_run_loads_with_both_adapters_active_and_each_of_them_in_plain_peft(finished: Path) -> None:
    model, processor = load_run(finished, torch.device("cpu"), torch.float32, quantize=False)
    assert isinstance(model, PeftModel)
    assert processor.grid_hw == (6, 6)
    assert tuple(model.base_model.active_adapters) == ("image_cit", "vl_cit")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = collate([example(QUESTIONS)], 2).inputs
    with torch.no_grad():
        both = model(**inputs).logits
    for adapter in ("image_cit", "vl_cit"):
        base, _ = load_base(json.loads((finished / "train_args.json").read_text())["base"], torch.float32)
        base.model.crayon_prompt.load_state_dict(load_file(finished / "crayon.safetensors"))
        plain = PeftModel.from_pretrained(base, str(finished / "adapters" / adapter)).eval()
        model.base_model.set_adapter(adapter)
        with torch.no_grad():
            alone = model(**inputs).logits
            torch.testing.assert_close(plain(**inputs).logits, alone)
        assert not torch.allclose(both, alone)


def test_an_adapter_that_lacks_weights_is_an_error(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "adapters" / "vl_cit" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name}, file)
    with pytest.raises(UserError, match="2 weights missing"):
        load_run(run, torch.device("cpu"), torch.float32, quantize=False)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "multi_modal_projector.linear_1.bias" in name)
    tensors[name][:] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert train.main(command(world, tmp_path / "run", "--preset", str(base))) == 1
    assert "step 1: the loss is nan; images scene-" in capsys.readouterr().err


def test_the_gpu_that_is_asked_for_is_the_current_one_when_devices_are_chosen(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Recorded(Nobody):
        def __init__(self, cpu: bool, **_: Any) -> None:
            calls.append(cpu)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(run_module, "Accelerator", Recorded)
    arguments = parse_arguments([*command(world, world / "gpu"), "--device", "cuda:1"])
    run_module._accelerator(arguments)
    assert calls == [torch.device("cuda:1"), False]
    for processes, said in (("2", "cuda:1 is one GPU, and each of 2 processes"), ("3", "3 processes, but 2 GPUs")):
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        with pytest.raises(UserError, match=said):
            run_module._accelerator(arguments)
    with pytest.raises(UserError, match=r"cuda:2: .*finds 2 CUDA devices"):
        run_module._accelerator(replace(arguments, device="cuda:2"))


class Nobody:
    """An accelerator of one process on a CPU."""

    device, process_index, num_processes = torch.device("cpu"), 0, 1

    def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
        return tensor


def test_a_weight_without_a_gradient_on_any_rank_is_not_moved_by_its_momentum() -> None:
    class Alike(Nobody):
        """One of two ranks that have computed the same."""

        num_processes = 2

        def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
            return 2 * tensor

    adapter, queries = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    optimizer = torch.optim.AdamW([adapter, queries], lr=0.1)
    trainer = Trainer(None, Alike(), None, torch.float32)  # type: ignore[arg-type]
    for with_picture in (True, False):
        before = queries.detach().clone()
        (adapter.sum() + (queries.sum() if with_picture else 0)).backward()
        trainer._sum_gradients([adapter, queries])
        assert adapter.grad is not None and (adapter.grad == 2).all()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(queries, before) != with_picture


def test_a_batch_without_a_supervised_token_stops_the_run_in_one_line() -> None:
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    trainer = Trainer(None, Nobody(), None, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^step 3: no token of the batch is supervised; images odd$"):
        trainer._step(3, [MicroBatch("crayon", ["odd"], inputs)], None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "where"),
    [("torch.optim.AdamW.step", "step 1"), ("collavo.training.loop.Trainer.evaluate", "after step 3")],
)
def test_a_gpu_without_memory_is_one_line_wherever_in_a_step_it_shows(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    where: str,
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it.")

    monkeypatch.setattr(place, full)
    assert train.main(command(world, tmp_path / "run", "--phase", "cpt")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        f"{where}: the GPU has no memory left (CUDA out of memory. Tried to allocate 2.00 GiB.); what helps: " in error
    )
    assert "--micro_batch_size" in error and "--gradient_checkpointing" in error


def test_the_memory_of_a_gpu_is_reckoned_and_tried_before_the_first_step(
    world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gpu_of(size: int) -> None:
        monkeypatch.setattr("collavo.training.run.memory_of", lambda device: size)

    gpu_of(10**10)
    assert train.main(command(world, world / "reckoned")) == 0
    said = capsys.readouterr().out
    assert re.search(r"GPU memory, reckoned +cpt +cit\ntokens of the longest batch +2 x \d+ +2 x \d+\nweights ", said)
    assert re.search(r"\nof 10.0 GB free on the GPU +\d+ % +\d+ %\n", said)
    assert losses(world / "reckoned") == losses(finished)  # trying changes nothing
    gpu_of(10**9)
    assert train.main(command(world, world / "refused")) == 2
    assert "--micro_batch_size 2: the longest batch of cit, 2 x 36 tokens, needs about" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--cit_learning_rate", "-1"], "--cit_learning_rate is -1.0, but must be at least 0"),
        (["--preset", "tinny"], "--preset tinny: neither one of tiny, "),
        (["--phase", "cpt", "--queries", "none"], "--queries none"),
        (["--attention", "flash_attention_2"], "--instructions_per_sequence 1"),
        (["--attention", "flex_attention"], "--instructions_per_sequence 1"),
        (["--seed", str(2**64)], f"--seed is {2**64}, but must lie within 0 and {2**63 - 1}"),
        (["--device", "cuda:9"], "--device: cuda:9"),
        (["--output_dir", "/proc/x"], "--output_dir: /proc/x: "),
        (["--output_dir", __file__], f"--output_dir: {__file__}: this is a file"),
        (["--data", "missing.parquet"], "--data: missing.parquet"),
        (["--preset", "no/such-model"], "--preset: no/such-model"),
        (["--batch_size", "4000"], "lower --batch_size"),
        (["--max_length", "20"], "--max_length 20 leaves no room"),
        (["--phase", "cit"], "Crayon Prompt Tuning"),
        (["--crayon_share", "1.5"], "--crayon_share is 1.5"),
        (["--resume", "--overwrite"], "choose one"),
        (["--report_to", "wandb"], "pip install wandb"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)  # no tracker is installed
    assert train.main(command(world, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("collavo.train: error: ")
    assert said in error


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file, tensors: save_file(tensors, file, {"format": "pt"}), "1 weights are missing or unknown, such as"),
        (lambda file, tensors: file.write_bytes(file.read_bytes()[:5000]), "damaged or unsafe weights"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, said: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world / "base", base)
    tensors = load_file(base / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    spoil(base / "model.safetensors", tensors)
    assert train.main(command(world, tmp_path / "run", "--preset", str(base))) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"collavo.train: error: --preset: {base}: {said}")


def test_a_run_is_not_mixed_with_another(world: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(command(world, finished)) == 2
    assert "--resume continues it, --overwrite replaces it" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", [["--batch_size", "4000"], ["--max_length", "20"], ["--phase", "cit"]])
def test_a_mistake_does_not_cost_the_run_that_was_to_be_replaced(
    world: Path, finished: Path, tmp_path: Path, mistake: list[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert train.main(command(world, tmp_path / "run", "--overwrite", *mistake)) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_two_trainings_do_not_write_to_one_folder(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / "run"):
        assert train.main(command(world, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f"--output_dir: {tmp_path}/run: another command is writing there" in said
    assert not list((tmp_path / "run").iterdir())


def test_a_replaced_run_is_gone_whole_and_nothing_else(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    assert train.main(command(world, run, "--seed", "7", "--max_steps", "2")) == 0
    assert train.main(command(world, run / "other", "--phase", "cpt", "--max_steps", "1")) == 0
    (run / "job.log").write_text("of a scheduler, which writes on")
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_run", interrupted)
        assert train.main(command(world, run, "--phase", "cpt", "--max_steps", "1", "--overwrite")) == 130
    assert [step for step, _, _ in losses(run)] == [1]
    assert {path.name for path in run.iterdir()} == {
        "job.log", "other", "train_args.json", "metrics.jsonl", "checkpoints"
    }  # fmt: skip
    assert (run / "other" / "README.md").exists()


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_run_is_not_written_over_the_base_that_it_starts_from(
    world: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "base", base := tmp_path / "base")
    before = {path: path.read_bytes() for path in base.iterdir()}
    assert train.main(command(world, base, "--preset", str(base), *flags)) == 2
    assert f"--output_dir {base} holds a config.json that is of no run; name another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_a_refused_resume_names_the_arguments_and_the_files_that_differ(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = write_crayon_file(tmp_path / "others.parquet", scene_rows(4, first_seed=50))
    flags = ("--resume", "--seed", "7", "--tasks", "counting", "box_to_class", "--workers", "1")
    assert train.main([*command(world, finished, *flags), "--data", str(others)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("collavo.train: error: --resume: ") and "workers" not in error
    assert "--seed was 1, is 7; --tasks was " in error and "is counting box_to_class; " in error
    assert f"{world / 'rows.parquet'} was among the data; {others} was not among the data; go on with" in error


def test_a_run_is_resumed_on_its_base_wherever_that_lies_now_and_on_no_other(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, moved = (shutil.copytree(world / "base", tmp_path / name) for name in ("base", "moved"))
    flags = command(world, tmp_path / "run", "--phase", "cpt", "--preset", str(base))
    assert train.main([*flags, "--max_steps", "1"]) == 0
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    assert train.main([*flags, "--resume"]) == 2
    assert "the model of --preset has changed; go on with what the run began with" in capsys.readouterr().err
    assert train.main([*flags, "--resume", "--preset", str(base.rename(tmp_path / "other"))]) == 2
    assert f"--preset was {base}, is {tmp_path / 'other'}" in capsys.readouterr().err
    assert train.main([*flags, "--resume", "--preset", str(moved)]) == 0
    assert [step for step, _, _ in losses(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "train_args.json").read_text())["base"] == str(moved)


@pytest.mark.parametrize("file", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_one_line_that_says_what_to_do(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damaged = max(run.glob("checkpoints/*"))
    (damaged / file).write_bytes((damaged / file).read_bytes()[:99])
    assert train.main(command(world, run, "--resume", "--max_steps", "4", "--epochs", "3")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--resume: {damaged}: damaged, or written by another version (" in error and "delete it" in error


def test_a_finished_run_says_so_and_is_extended(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert train.main(command(world, run, "--resume")) == 0
    assert "has taken all of its 6 steps; with --resume, a higher --epochs or" in capsys.readouterr().out
    assert losses(run) == losses(finished)
    assert train.main(command(world, run, "--resume", "--max_steps", "2")) == 2
    assert "3 steps of cit are done, and --epochs, --max_steps and --cpt_max_steps allow 2" in capsys.readouterr().err
    assert train.main(command(world, run, "--resume", "--max_steps", "5", "--epochs", "3")) == 0
    assert losses(run)[:6] == losses(finished)
    rates = [(line["step"], line["phase"], line["learning_rate"]) for line in metrics(run) if "loss" in line]
    expected = [round(learning_rate_at(step, 5, 1e-2, 1e-6), 8) for step in (3, 4)]
    assert rates[6:] == [(7, "cit", expected[0]), (8, "cit", expected[1])]
    queries = "crayon.safetensors/numbering_queries.weight"
    assert not torch.equal(weights(run)[queries], weights(finished)[queries])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_only_what_is_whole(
    world: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error() -> str:
        return capsys.readouterr().err.strip().splitlines()[-1]

    run = tmp_path / "run"
    flags = [*command(world, run, "--resume"), "--checkpoint_steps", "2"]
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "phase": "x" * 4900}) + "\n")
    with files_of_at_most(5000):
        assert train.main(command(world, run)) == 1
    assert error() == f"collavo.train: error: {run / 'metrics.jsonl'}: File too large"
    shutil.copytree(finished, run, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    before = sorted(run.glob("checkpoints/*"))
    with files_of_at_most(20_000):
        assert train.main(flags) == 1
    assert f"error: {run}/checkpoints/step-000005: " in (said := error()) and "File too large" in said
    assert sorted(run.glob("checkpoints/*")) == before and not list(run.glob("checkpoints/.*"))
    assert train.main(flags) == 0
    assert losses(run) == losses(finished)
    (run / "README.md").unlink()  # as if it had been killed before it saved its weights
    kept = {file: file.read_bytes() for file in run.rglob("*.safetensors")}
    with files_of_at_most(20_000):
        assert train.main(flags) == 1
    assert f"error: {run}: " in (said := error()) and "File too large" in said
    assert {file: file.read_bytes() for file in run.rglob("*.safetensors")} == kept
    assert train.main(flags) == 0 and (run / "README.md").exists()


def test_a_run_that_has_not_ended_is_not_loaded(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "adapters" / "vl_cit")
    with pytest.raises(UserError, match=r"its training has not ended, for there is no adapters/vl_cit; .*--resume"):
        load_run(run, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("of_data", "with_config", "said"),
    [
        (OWN_CLASSES[:3], True, "stand for 5 classes, but the data have 3"),
        (OWN_CLASSES[::-1], True, "stand for 5 classes, but the data have 5 (others) or call them otherwise"),
        (OWN_CLASSES[:3], False, "semantic_queries.weight is 6 x 16, but 4 x 16 in a model of these classes"),
    ],
)
def test_queries_tuned_for_other_classes_are_refused(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    of_data: tuple[Category, ...],
    with_config: bool,
    said: str,
) -> None:
    run = tmp_path / "run"
    model, processor = load_base(str(world / "base"), torch.float32, categories=OWN_CLASSES)
    run.mkdir()
    (run / "train_args.json").write_text(json.dumps({"base": str(world / "base"), "object_list": "none"}))
    save_run(run, model, [], processor)
    others = CategorySet("others", tuple(replace(c, label=label) for label, c in enumerate(of_data)))
    data = write_crayon_file(tmp_path / "rows.parquet", [replace(own_rows(1)[0], segments=())], others)
    if not with_config:
        (run / "config.json").unlink()
    assert train.main([*command(world, run, "--phase", "cit"), "--data", str(data)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"collavo.train: error: --phase: {run / 'crayon.safetensors'}: ") and said in error


def test_data_without_the_wanted_kind_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(row, instructions=()) for row in scene_rows(6)]
    data = write_crayon_file(tmp_path / "rows.parquet", rows)
    assert train.main([*command(world, tmp_path / "run"), "--data", str(data), "--phase", "cpt"]) == 2
    error = capsys.readouterr().err.strip()
    assert "0 instructions of the split 'train' make no batch" in error
    assert error.endswith("; lower --batch_size, or build more data")


def test_data_of_which_no_row_can_be_used_are_refused_with_the_reason(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.Table.from_pylist([{**row.as_record(), "conversations": None} for row in scene_rows(4)], CRAYON_SCHEMA)
    data = tmp_path / "rows.parquet"
    for rows, said in (
        (table, "left out: 4 missing_value (row 1 of rows"),
        (table[:0], "are files of that split among"),
    ):
        pq.write_table(rows, data)
        assert train.main([*command(world, tmp_path / "run"), "--data", str(data)]) == 2
        assert said in capsys.readouterr().err.strip()


def test_dialogues_alone_and_no_validation_rows_train(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [replace(row, instructions=(), split="train") for row in scene_rows(4)]
    data = write_crayon_file(tmp_path / "rows.parquet", rows)
    assert train.main([*command(world, tmp_path / "run"), "--data", str(data), "--max_steps", "1"]) == 0
    assert [stage for _, stage, _ in losses(tmp_path / "run")] == ["vl_cit"]
    printed = capsys.readouterr().out
    assert "so only vl_cit learns" in printed and "none: no row is in that split" in printed


def test_other_classes_are_trained_on_a_base_that_knows_some_of_them_and_judged_by_name(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_crayon_file(tmp_path / "own.parquet", own_rows(12), OWN_CLASSES), tmp_path / "run"
    flags = ("--data", str(data), "--max_steps", "1", "--batch_size", "2")
    assert train.main(command(world, run, *flags)) == 0  # crayon data alone
    printed = capsys.readouterr().out
    assert "5, five of our own" in printed and "so only image_cit learns" in printed
    model, processor = load_run(run, torch.device("cpu"), torch.float32, quantize=False)
    assert processor.categories.as_records() == OWN_CLASSES.as_records()
    base, _ = load_base(str(world / "base"), torch.float32)
    queries = model.base_model.model.model.crayon_prompt.semantic_queries.weight
    before = base.model.crayon_prompt.semantic_queries.weight
    assert queries.shape[0] == 6
    for name in ("sky", "car"):  # kept, but for the one step that was trained
        old = COCO_PANOPTIC.by_display_name[name].label + 1
        new = OWN_CLASSES.by_display_name[name].label + 1
        assert torch.cosine_similarity(queries[new], before[old], dim=0) > 0.9
    assert (
        evaluate.main(
            [
                "--model",
                str(run),
                "--data",
                str(data),
                "--device",
                "cpu",
                "--max_images",
                "1",
                "--tasks",
                "class_to_binary",
            ]
        )
        == 0
    )
    results = json.loads((run / "evaluation" / "evaluation.json").read_text())["results"]["trained"]
    assert set(results["class_to_binary"]["classes"]) <= {c.display_name for c in OWN_CLASSES.things}


def test_queries_computed_from_words_serve_classes_that_no_training_has_seen(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--semantic_queries", "words", "--query_start", "names", "--max_steps", "1", "--batch_size", "2")
    assert train.main(command(world, run, *flags)) == 0
    own = write_crayon_file(tmp_path / "own.parquet", own_rows(4), OWN_CLASSES)
    capsys.readouterr()
    asked = ["--model", str(run), "--data", str(own), "--device", "cpu", "--max_images", "1"]
    assert evaluate.main([*asked, "--tasks", "class_to_binary"]) == 0
    assert "no query" not in capsys.readouterr().out

    model, processor = load_run(run, torch.device("cpu"), torch.float32, quantize=False)
    collavo: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    signals = []
    for categories in (COCO_PANOPTIC, OWN_CLASSES):
        adopt_categories(model, processor, categories)
        labels = [categories.by_display_name[name].label for name in ("sky", "car")]
        ids = torch.tensor([[[0, *(label + 1 for label in labels)]]])
        pixels = processor.pixel_values(np.zeros((9, 9, 3), np.uint8))[None]
        features = collavo.model.get_image_features(pixels, semantic_ids=ids, numbering_ids=torch.zeros_like(ids))
        signals.append(features.deepstack_features[0])
    assert torch.equal(*signals) and signals[0][0].unique(dim=0).shape[0] == 3

    tuned = tmp_path / "tuned"
    assert train.main(command(world, tuned, *flags, "--phase", "cpt")) == 0
    assert train.main(command(world, tuned, "--phase", "cit")) == 2
    assert "tuned with --semantic_queries words" in capsys.readouterr().err
    # In instruction tuning the adapters alone learn, or names that are not there would lose what they mean.
    before = load_file(tuned / "crayon.safetensors")
    assert train.main(command(world, tuned, *flags, "--phase", "cit")) == 0
    after = load_file(tuned / "crayon.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert before["linear_2.weight"].any()
    before = load_file(run / "crayon.safetensors")
    assert train.main(command(world, run, *flags, "--max_steps", "2", "--resume")) == 0
    after = load_file(run / "crayon.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_samples_that_fail_are_skipped_and_named_up_to_a_ratio_and_again_after_a_resume(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = scene_rows(8), tmp_path / "run"
    for row in rows[1:]:
        (tmp_path / str(row.image_path)).write_bytes(row.image_bytes or b"")
    data = write_crayon_file(tmp_path / "rows.parquet", [replace(row, image_bytes=None) for row in rows])
    flags = command(world, run, "--data", str(data), "--image_root", str(tmp_path), "--checkpoint_steps", "1")
    assert train.main(flags) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--max_skipped_ratio allows 0: 1 missing_file (scene-000: " in said
    assert train.main([*flags, "--resume"]) == 1  # the same again
    assert train.main([*flags, "--resume", "--max_skipped_ratio", "0.5"]) == 0
    skipped = json.loads((max(run.glob("checkpoints/*")) / "state.json").read_text())["skipped"]["counts"]
    assert skipped["missing_file"] >= 2
    assert f"left out: {skipped['missing_file']} missing_file (scene-000: " in capsys.readouterr().out
    assert f"{skipped['missing_file']} missing_file" in (run / "README.md").read_text()


def test_a_step_none_of_whose_pictures_is_there_ends_the_run_before_a_checkpoint_passes_over_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = [replace(row, image_path=f"unmounted/{row.image_path}") for row in scene_rows(8, embed=False)], "run"
    data = write_crayon_file(tmp_path / "rows.parquet", rows)
    flags = command(world, tmp_path / run, "--data", str(data), "--image_root", str(tmp_path), "--phase", "cpt")
    flags += ["--batch_size", "20", "--checkpoint_steps", "1", "--instructions_per_sequence", "1"]
    assert train.main([*flags, "--max_steps", "2", "--max_skipped_ratio", "0.5"]) == 1  # which one step is
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: step 1: none of its pictures can be read, {tmp_path}/unmounted/scene-" in said
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_the_learning_rate_is_a_cosine_between_its_ends() -> None:
    rates = [learning_rate_at(step, 11, 1e-4, 1e-6) for step in range(11)]
    assert rates[0] == 1e-4
    assert rates[-1] == pytest.approx(1e-6)
    assert rates[5] == pytest.approx((1e-4 + 1e-6) / 2)
    assert rates == sorted(rates, reverse=True)
