import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_model import scene_rows
from tiny_run import ADAPTERS, save_tiny_run

from collavo.export_model import main
from collavo.inference import Request, load_answerer, picture_of_row
from collavo.merge_adapters import TOLERANCES
from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import LINEAR_LAYERS
from collavo.runs import steps_taken

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny_run(tmp_path_factory.mktemp("export") / "run", object_list="none")


def export(run, output, *flags: str) -> dict:
    assert main(["--model", str(run), "--output", str(output), *flags]) == 0
    return json.loads((output / "export.json").read_text())


def answers(model, **options) -> list[str]:
    row = scene_rows(1)[0]
    requests = [Request(0, [("human", i.question)], None, 8) for i in row.instructions[:4]]
    return load_answerer(str(model), CPU, **options).answer([picture_of_row(row, None)], requests)


@pytest.mark.parametrize("dtype, rounding", [("float32", 2**-22), ("bfloat16", 2**-8)])
def test_merged_weights_are_base_and_both_adapters_rounded_once_and_nothing_else_changes(
    run, tmp_path, dtype, rounding
):
    facts = export(run, tmp_path / "m", "--as", "merged", "--dtype", dtype)
    base = load_file(json.loads((run / "train_args.json").read_text())["base"] + "/model.safetensors")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    adapters = [load_file(run / "adapters" / name / "adapter_model.safetensors") for name in ADAPTERS]
    assert merged.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        weight = weight.to(getattr(torch, dtype))
        layer = name.removesuffix(".weight")
        if not LINEAR_LAYERS.fullmatch(layer):
            assert torch.equal(merged[name], weight), name
            continue
        factors = [[adapter[f"base_model.model.{layer}.lora_{side}.weight"] for side in "BA"] for adapter in adapters]
        delta = sum(b.double() @ a.double() * (8 / 4) for b, a in factors)  # alpha over rank
        torch.testing.assert_close(merged[name].double(), weight.double() + delta, rtol=1.01 * rounding, atol=1e-6)
        changed += not torch.equal(merged[name], weight)
    assert changed == 2 * 7
    (difference,) = facts["logits"].values()
    assert difference["largest"] < TOLERANCES[getattr(torch, dtype)] * difference["of"]


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "m"
    export(run, folder, "--as", "merged", "--dtype", "float32")
    return folder


def test_a_merged_model_answers_as_the_run(run, merged):
    assert answers(merged) == answers(run)
    assert load_answerer(str(merged), CPU).listed == ()  # prompts go without objects, as in training


@pytest.mark.slow  # a process that imports everything
def test_a_merged_model_needs_no_peft(merged):
    script = (
        "import sys; sys.modules['peft'] = None; from collavo.model import CollavoForConditionalGeneration;"
        f"print(CollavoForConditionalGeneration.from_pretrained({str(merged)!r}).num_parameters())"
    )
    assert int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout) > 0


@pytest.mark.parametrize("quantize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_adapter_equals_the_two_and_plain_peft_loads_it(tmp_path, quantize):
    run = save_tiny_run(tmp_path / "run", quantize=quantize)
    facts = export(run, tmp_path / "a", "--as", "adapter")
    (difference,) = facts["logits"].values()
    assert difference["largest"] < 1e-4 * difference["of"]
    assert answers(tmp_path / "a", quantize=False) == answers(run, quantize=False)
    base = CollavoForConditionalGeneration.from_pretrained(tmp_path / "run-base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "a" / "adapters" / "cit")
    assert loaded.peft_config["default"].r == 4 + 4
    assert (tmp_path / "a" / "crayon.safetensors").read_bytes() == (run / "crayon.safetensors").read_bytes()


def test_merged_into_the_dequantised_weights_a_run_on_nf4_is_what_it_was_trained_as(tmp_path, capsys):
    run = save_tiny_run(tmp_path / "run", quantize=True)
    plain, nearer = (
        export(run, tmp_path / name, "--as", "merged", "--dtype", "float32", *flags)["logits"].values()
        for name, flags in (("plain", []), ("nearer", ["--dequantize"]))
    )
    assert "NF4" in capsys.readouterr().out
    assert [each["largest"] < 1e-4 * each["of"] for each in nearer] == [True, True]
    assert [each["largest"] < 1e-4 * each["of"] for each in plain] == [True, False]
    assert answers(tmp_path / "nearer") == answers(run)


def test_a_run_without_adapters_is_merged_as_it_is(tmp_path):
    run = save_tiny_run(tmp_path / "run", adapters=())
    export(run, tmp_path / "m", "--as", "merged", "--dtype", "float32")
    assert answers(tmp_path / "m") == answers(run)


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    """What could go wrong between memory and disk: here a weight changes in between."""
    save = CollavoForConditionalGeneration.save_pretrained

    def save_damaged(self, folder, **options):
        save(self, folder, **options)
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"][5] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(CollavoForConditionalGeneration, "save_pretrained", save_damaged)
    assert main(["--model", str(run), "--output", str(tmp_path / "m"), "--as", "merged"]) == 1
    assert (
        "collavo.export_model: error: refused: the logits of the export differ from the run's by"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--model", "nowhere"], "nowhere: not a run directory"),
        (["--output", "full"], "--output full is there already; name a new or empty folder"),
        (["--as", "adapter", "--dtype", "float32"], "--dtype concerns merged weights"),
        (["--dequantize", ""], "--dequantize concerns --as merged of a run that was trained on NF4"),
        (["--as", "adapter", "--model", "bare"], "--as adapter: bare has no adapters; use --as merged"),
        (["--output", "full/file/export"], "full/file is a file; name a folder"),
        (["--device", "tpu"], "--device: tpu: not a device"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(run, tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    shutil.copytree(run, tmp_path / "bare")
    args = json.loads((run / "train_args.json").read_text())
    (tmp_path / "bare" / "train_args.json").write_text(json.dumps({**args, "adapter_names": []}))
    given = {"--model": str(run), "--output": "new", "--as": "merged"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    assert main([part for flag in given.items() for part in flag if part]) == 2
    (error,) = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("collavo.export_model: error: ")
    ]
    assert complaint in error
    assert not (tmp_path / "new").exists()


def test_the_card_has_what_was_found_of_prompts_as_in_training_and_of_which_data(run, tmp_path):
    tried = shutil.copytree(run, tmp_path / "run")
    (tried / "evaluation").mkdir()
    results = {name: {"counting": {"questions": 7, "correct": right}} for name, right in (("none", 0.1), ("with", 0.9))}
    arguments = {"data": ["street/a.parquet"], "split": "validation", "max_images": None, "beams": 1}
    trained = {**results, "trained": {"counting": {"questions": 7, "correct": 0.5}}}
    report = {"arguments": arguments, "steps": steps_taken(tried), "results": trained}
    few = {"arguments": {**arguments, "max_images": 1000, "beams": 3}}
    for number, (change, expected) in enumerate((
        ({}, "| counting, right of 7 about street | 50.0% |"),
        (few, "| counting, right of 7 about street, the first 1,000 images, 3 beams | 50.0% |"),
        ({"results": results}, None),
        ({"arguments": {**arguments, "split": "train"}}, None),
        ({"steps": {"cit": 10**6}}, None),  # of other weights: the run went on since
    )):  # fmt: skip
        (tried / "evaluation" / "evaluation.json").write_text(json.dumps(report | change))
        export(tried, tmp_path / f"{number}", "--as", "adapter")
        card = (tmp_path / f"{number}" / "README.md").read_text()
        assert expected in card if expected else "right of" not in card
        assert "10.0%" not in card and "90.0%" not in card
