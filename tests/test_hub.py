"""Checkpoints of the hub: those in the cache are found without it, and one that is missing is refused soon."""

import json
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from builds import tiny_mask2former
from tiny_model import save_tiny_base
from transformers import CLIPVisionConfig, CLIPVisionModel

from collavo import hub
from collavo.categories import joined
from collavo.errors import UserError
from collavo.hub import SAFETENSORS, find_checkpoint
from collavo.import_base.assemble import assemble_from_llava, assemble_from_parts
from collavo.runs import load_base
from collavo.segmenters import checkpoint_categories, load_segmenter

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def unreachable(monkeypatch, tmp_path) -> Path:
    """A hub at a port where nothing listens, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(cache: Path, model_id: str) -> Path:
    """The folder of a model in the hub's cache, empty."""
    model = cache / f"models--{model_id.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    (model / "snapshots" / REVISION).mkdir(parents=True)
    return model / "snapshots" / REVISION


def test_a_segmenter_in_the_cache_needs_no_hub(unreachable, caplog):
    tiny_mask2former(snapshot(unreachable, "org/segmenter"))
    segmenter = load_segmenter("transformers", checkpoint="org/segmenter", device="cpu")
    assert segmenter.facts["checkpoint"] == "org/segmenter" and segmenter.facts["revision"] == REVISION
    assert joined(checkpoint_categories("transformers", "org/segmenter")[0]) == segmenter.categories
    assert "Retrying" not in caplog.text


def test_a_base_in_the_cache_needs_no_hub_and_keeps_its_name(unreachable):
    save_tiny_base(snapshot(unreachable, "org/base"))
    model, _ = load_base("org/base", torch.float32)
    assert model.name_or_path == "org/base"


@pytest.mark.parametrize(
    "entries, problem",
    [
        ({"model_type": "gemma2"}, "architecture 'gemma2' is not supported"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "its weights are quantised"),
    ],
)
def test_weights_that_cannot_be_used_are_not_downloaded(unreachable, entries, problem, tmp_path):
    (snapshot(unreachable, "org/language") / "config.json").write_text(json.dumps(entries))
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    CLIPVisionModel(vision).save_pretrained(tmp_path / "vision")
    with pytest.raises(UserError, match=f"^language org/language: {problem}"):
        assemble_from_parts(tmp_path / "vision", "org/language")
    (snapshot(unreachable, "org/vision") / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(UserError, match=r"^vision org/vision: architecture 'dinov2' is not supported"):
        assemble_from_parts("org/vision", "org/language")
    (snapshot(unreachable, "org/llava") / "config.json").write_text(json.dumps({"model_type": "llava_next"}))
    with pytest.raises(UserError, match=r"^llava org/llava: architecture 'llava_next' is not supported"):
        assemble_from_llava("org/llava")


def test_a_checkpoint_out_of_reach_is_refused_at_once_in_one_line(unreachable, caplog):
    start = time.perf_counter()
    with pytest.raises(OSError, match=r"^neither .* cache, and http://127.0.0.1:1 cannot be reached \(.*refused\)$"):
        find_checkpoint("org/absent")
    assert time.perf_counter() - start < 10  # retries would take longer
    assert "Retrying" not in caplog.text


def test_a_checkpoint_without_its_weights_is_not_whole(unreachable):
    (snapshot(unreachable, "org/half") / "config.json").write_text("{}")
    assert find_checkpoint("org/half", weights=()).name == REVISION
    with pytest.raises(OSError, match="neither a folder nor a whole model in the cache"):
        find_checkpoint("org/half", [SAFETENSORS])


def test_a_hub_that_keeps_silent_is_not_waited_for(unreachable, monkeypatch):
    monkeypatch.setattr(hub, "_STEP_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(OSError, match=r"cannot be reached \(.*time"):
            find_checkpoint("org/absent")


@pytest.mark.parametrize("path", ["runs/of/mine", "./mine", "/nowhere", "~/mine"])
def test_a_path_is_not_looked_up_on_the_hub(unreachable, path):
    with pytest.raises(FileNotFoundError, match=r"^there is no such folder$"):
        find_checkpoint(path)


@pytest.mark.parametrize(
    "file, hint",
    [
        ("model-Q4_K_M.gguf", "in GGUF; name the checkpoint in safetensors"),
        ("adapter_config.json", "an adapter; merge it into its base"),
        ("snapshots/abc/config.json", "name the folder below its snapshots"),
        ("notes.txt", "a checkpoint in transformers' layout has one"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused_with_what_would_be_one(file, hint, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(OSError, match=f"^no config.json there; .*{hint}"):
        find_checkpoint(tmp_path)
    with pytest.raises(OSError, match=r"^a file; name the folder of a checkpoint"):
        find_checkpoint(tmp_path / file)


def test_a_clone_without_its_large_files_is_refused_by_name(tmp_path):
    """As of a Git without Git LFS, or of one that was told to skip them."""
    save_tiny_base(tmp_path)
    whole = {name: (tmp_path / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")}
    for name, content in whole.items():
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f": {name} is not there, .*git lfs pull fetches it$"):
            load_base(str(tmp_path), torch.float32)
        (tmp_path / name).write_bytes(content)
    for name in ("pytorch_model.bin", "tf_model.h5"):  # which are not read beside safetensors
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert find_checkpoint(tmp_path) == tmp_path
