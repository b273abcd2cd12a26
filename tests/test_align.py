"""Alignment: which weights it moves, what it leaves behind, how a run goes on from it, and when training refuses."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import encoded
from PIL import Image
from safetensors.torch import load_file
from tiny_model import save_tiny_base, scene_rows, tiny_config, tiny_model, write_crayon_file

from collavo import export_model, train
from collavo.errors import UserError
from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.runs import load_base, load_run
from collavo.training.arguments import TrainArguments
from collavo.training.batches import Batch, ExampleDataset
from collavo.training.display import RunDisplay
from collavo.training.loop import learning_rate_at
from collavo.training.run import _check_shares
from pipelines.command import main as build_crayon

COMMON = (
    "--device cpu --precision fp32 --batch_size 2 --align_batch_size 2 --micro_batch_size 2 --lora_rank 4 "
    "--max_length 350 --max_steps 3 --workers 0"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a new projector, one with a trained projector, and data."""
    folder = tmp_path_factory.mktemp("world")
    for name, untrained in (("new", True), ("old", False)):
        save_tiny_base(folder / name)
        tiny_model(tiny_config(projector_untrained=untrained), open_prompt=False).save_pretrained(folder / name)
    write_crayon_file(folder / "rows.parquet", scene_rows(8))
    return folder


def run(world: Path, output: Path, *flags: str, base: str = "new") -> int:
    data = ["--data", str(world / "rows.parquet"), "--preset", str(world / base), "--output_dir", str(output)]
    return train.main([*data, *COMMON.split(), *flags])


def steps(output: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["phase"], line["loss"]) for line in lines if "loss" in line]


def projector(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "projector.safetensors")


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run of all phases."""
    assert run(world, world / "whole") == 0
    return world / "whole"


def test_all_phases_begin_with_alignment_where_the_base_needs_it(world: Path, whole: Path) -> None:
    assert [phase for _, phase, _ in steps(whole)] == ["align"] * 3 + ["cpt"] * 3 + ["cit"] * 3
    base = load_base(str(world / "new"), torch.float32)[0].model.multi_modal_projector.state_dict()
    assert all(not torch.equal(tensor, base[name]) for name, tensor in projector(whole).items())
    assert not CollavoConfig.from_pretrained(whole).projector_untrained
    model, _ = load_run(whole, torch.device("cpu"), torch.float32)
    loaded = model.get_base_model().model.multi_modal_projector.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in projector(whole).items())
    assert "trained on captions" in (whole / "README.md").read_text()

    assert run(world, world / "without", "--max_steps", "1", base="old") == 0
    assert not (world / "without" / "projector.safetensors").exists()
    assert {phase for _, phase, _ in steps(world / "without")} == {"cpt", "cit"}


def test_phases_one_by_one_give_what_all_give_and_none_but_align_moves_the_projector(world: Path, whole: Path) -> None:
    output = world / "one_by_one"
    for phase, last, file in (("align", 3, None), ("cpt", 6, "crayon.safetensors"), ("cit", 9, "adapters")):
        assert file is None or not (output / file).exists()
        assert run(world, output, "--phase", phase) == 0
        assert steps(output)[-1][:2] == (last, phase)
        assert all(torch.equal(tensor, projector(output)[name]) for name, tensor in projector(whole).items())
    assert steps(output) == steps(whole)


def test_an_interrupted_alignment_resumes_bit_for_bit(
    world: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(display: RunDisplay, result: Any, phase: Any) -> None:
        step(display, result, phase)
        if result.step == stop:
            raise KeyboardInterrupt

    step, stop = RunDisplay.step, 3
    with monkeypatch.context() as patched:
        patched.setattr(RunDisplay, "step", interrupt)
        assert run(world, world / "resumed", "--checkpoint_steps", "2") == 130  # in alignment
        stop = 6
        assert run(world, world / "resumed", "--checkpoint_steps", "2", "--resume") == 130  # behind it
    assert run(world, world / "resumed", "--checkpoint_steps", "2", "--resume") == 0
    assert steps(world / "resumed") == steps(whole)
    assert all(torch.equal(tensor, projector(whole)[name]) for name, tensor in projector(world / "resumed").items())


def test_a_run_of_alignment_alone_is_exported_as_a_base(world: Path) -> None:
    assert run(world, world / "aligned", "--phase", "align") == 0
    export = [
        "--model",
        str(world / "aligned"),
        "--output",
        str(world / "base"),
        "--as",
        "merged",
        "--dtype",
        "float32",
    ]
    assert export_model.main([*export, "--device", "cpu"]) == 0
    exported = CollavoForConditionalGeneration.from_pretrained(world / "base")
    state = exported.model.multi_modal_projector.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in projector(world / "aligned").items())
    assert run(world, world / "from_export", "--phase", "cpt", "--preset", str(world / "base"), "--max_steps", "1") == 0


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_exports_hold_the_projector_of_their_run(whole: Path, tmp_path: Path, form: str) -> None:
    flags = ["--model", str(whole), "--output", str(tmp_path / "out"), "--as", form, "--device", "cpu"]
    assert export_model.main([*flags, *(["--dtype", "float32"] if form == "merged" else [])]) == 0
    exported = CollavoForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = exported.model.multi_modal_projector.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in projector(whole).items())
    assert not exported.config.projector_untrained


@pytest.mark.parametrize("phase", ["cpt", "cit"])
def test_a_new_projector_is_refused_until_it_is_trained(
    world: Path, tmp_path: Path, phase: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, tmp_path / "run", "--phase", phase) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--phase {phase}: the projector of {world / 'new'} is new; --phase align trains it" in error
    assert "--projector names one" in error


def test_a_projector_of_another_run_is_taken(world: Path, whole: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path / "run", "--projector", str(whole), "--max_steps", "1") == 0
    assert {phase for _, phase, _ in steps(tmp_path / "run")} == {"cpt", "cit"}
    assert all(torch.equal(tensor, projector(whole)[name]) for name, tensor in projector(tmp_path / "run").items())


def test_a_wrong_projector_is_one_line(
    world: Path, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(world, tmp_path / "run", "--projector", str(world / "old")) == 2
    assert "--projector: " in (error := capsys.readouterr().err) and "alignment (align) writes it" in error
    assert run(world, tmp_path / "run", "--projector", str(whole / "crayon.safetensors")) == 2
    assert "weights do not match the model's" in capsys.readouterr().err


def test_captions_are_the_first_answers_and_need_neither_map_nor_list(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def noted(dataset: ExampleDataset, batch: Batch) -> Any:
        for sample in batch.samples:
            example = dataset.example(sample)
            text = dataset._processor.tokenizer.decode(example.input_ids)
            assert example.semantic_ids is not None
            seen.append((text, bool(example.semantic_ids.any())))
        return shown(dataset, batch)

    shown = ExampleDataset.prompt_of
    monkeypatch.setattr(ExampleDataset, "prompt_of", noted)
    assert run(world, tmp_path / "run", "--phase", "align", "--object_list", "all") == 0
    assert len(seen) == 2
    for text, knows_something in seen:
        assert text.count("User:") == text.count("Assistant:") == 1 and not knows_something
        assert "The image includes" not in text


def test_captions_that_no_segmenter_has_seen_align_a_projector(world: Path, tmp_path: Path) -> None:
    entries = []
    for number in range(6):
        file = tmp_path / f"{number}.jpg"
        file.write_bytes(encoded(Image.new("RGB", (50, 40), (number * 30, 0, 99)), "JPEG"))
        turns = [("human", "Describe the image concisely.\n<image>"), ("gpt", f"a field of colour {number}")]
        said = [{"from": speaker, "value": value} for speaker, value in turns]
        entries.append({"id": str(number), "image": file.name, "conversations": said})
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    flags = ["--llava_json", str(tmp_path / "captions.json"), "--image_root", str(tmp_path), "--segmenter", "none"]
    build_crayon([*flags, "--output", str(tmp_path / "out")])
    rows = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 6 and not any(row["segments"] or row["instructions"] for row in rows)
    # Written again, they are still pictures of which nobody knows what is not in them; until something looks.
    build_crayon(["--from_crayon", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    looked = ["--images", str(tmp_path / "*.jpg"), "--segmenter_checkpoint", "scenes"]
    build_crayon(["--from_crayon", str(tmp_path / "out"), *looked, "--output", str(tmp_path / "seen")])
    for name, asked in (("again", False), ("seen", True)):
        rows = [row for file in (tmp_path / name).glob("*.parquet") for row in pq.read_table(file).to_pylist()]
        assert len(rows) == 6 and all(bool(row["instructions"]) == asked and row["conversations"] for row in rows)
    assert run(world, tmp_path / "run", "--phase", "align", "--data", str(tmp_path / "out")) == 0
    assert {phase for _, phase, _ in steps(tmp_path / "run")} == {"align"}


def test_the_learning_rate_warms_up() -> None:
    rates = [learning_rate_at(step, 14, 1.0, 0.0, warmup=3) for step in range(14)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[-1] == pytest.approx(0.0) and rates[3:] == sorted(rates[3:], reverse=True)


def test_the_preset_on_internlm2_says_what_makes_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "x", "--preset", "collavo-internlm2-7b"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "starts from the folder models/internlm2; make it once: python -m collavo.import_base --vision" in error
    (tmp_path / "models" / "internlm2").mkdir(parents=True)
    arguments = train.parse_arguments(["--data", "x", "--preset", "collavo-internlm2-7b"])
    assert (arguments.lora_rank, arguments.lora_alpha, arguments.batch_size, arguments.epochs) == (64, 64, 32, 1)
    rates = (arguments.cpt_learning_rate, arguments.cit_learning_rate, arguments.final_learning_rate)
    assert rates == (1e-4, 1e-5, 1e-6) and arguments.quantize


def test_alignment_has_llavas_figures() -> None:
    arguments = train.parse_arguments(["--data", "x", "--preset", "some/where"])
    assert (arguments.align_learning_rate, arguments.align_batch_size, arguments.epochs) == (1e-3, 256, 1)


def test_ranks_have_to_share_batches_evenly_those_of_alignment_too():
    arguments = TrainArguments(data=("x",), batch_size=24, align_batch_size=256)
    _check_shares(arguments, 3, aligns=False)
    _check_shares(arguments, 8, aligns=True)
    with pytest.raises(UserError, match="--align_batch_size 256 cannot be shared evenly by 3 processes"):
        _check_shares(arguments, 3, aligns=True)
