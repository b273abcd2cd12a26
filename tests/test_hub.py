"""Checkpoints of the hub: those in the cache are found without it, and one that is missing is refused soon."""

import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from builds import tiny_mask2former
from tiny_model import save_tiny_base

from collavo import hub
from collavo.categories import joined
from collavo.hub import SAFETENSORS, find_checkpoint
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
    assert joined(checkpoint_categories("transformers", "org/segmenter")) == segmenter.categories
    assert "Retrying" not in caplog.text


def test_a_base_in_the_cache_needs_no_hub_and_keeps_its_name(unreachable):
    save_tiny_base(snapshot(unreachable, "org/base"))
    model, _ = load_base("org/base", torch.float32)
    assert model.name_or_path == "org/base"


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
