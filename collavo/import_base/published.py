"""Read the configuration, tensors and tokenizer of published checkpoints.

No code of a checkpoint is run: configurations are JSON, tensors come from safetensors or, if there are none, from
`pytorch_model*.bin` through `torch.load(weights_only=True)`. Tensors are mapped from disk, so they take memory only if
they are changed.
"""

import json
import logging
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collavo.errors import UserError, first_line
from collavo.hub import hint_of_others
from collavo.import_base.sentencepiece_tokenizers import llama_tokenizer

_LOG = logging.getLogger(__name__)
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")


@contextmanager
def one_line_errors(named: str) -> Iterator[None]:
    """Turn errors about a checkpoint into a UserError that begins with what names it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        problem = f"no entry {error} in config.json" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{named}: {problem}") from error
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{named}: damaged or unsafe weights: {first_line(error)}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json.

    Raises:
        ValueError: if it is no JSON, or the weights are quantised.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json is no JSON: {error}") from error
    if config.get("quantization_config"):
        raise ValueError("its weights are quantised; name the unquantised checkpoint")
    return config


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a checkpoint by its name, without the buffers that older checkpoints hold."""
    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                weights.update((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
        elif not zipfile.is_zipfile(file):
            raise ValueError(f"{file.name} is damaged, or in torch's format from before version 1.6")
        else:
            weights.update(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    return {name: tensor for name, tensor in weights.items() if not name.endswith(_BUFFERS)}


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer of a checkpoint.

    Raises:
        ValueError: if transformers cannot make a fast tokenizer of its files.
    """
    try:
        # The file says which texts get a space put before them: of Vicuna, hence LLaVA, each part between control
        # tokens, of others the beginning or none. A class that the checkpoint names would have rules of its own, and
        # Mistral's own package, where it is installed, would be asked instead.
        if (folder / "tokenizer.json").is_file():
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        elif (folder / "tokenizer.model").is_file():
            tokenizer = llama_tokenizer(folder)  # transformers needs a sentencepiece that fits protobuf for it
            tokenizer.init_kwargs["legacy"] = True  # so that it is saved
        elif not (folder / "vocab.json").is_file():
            raise FileNotFoundError("neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt there")
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(f"no tokenizer that transformers can read: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ValueError("no fast tokenizer; a tokenizer.json is one")
    return tokenizer


def read_chat_template(folder: Path) -> str:
    """Read the chat template of a checkpoint, its default one of several; empty if it has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            entries = json.loads((folder / name).read_text(encoding="utf-8"))
            if template := entries.get("chat_template"):
                if isinstance(template, str):
                    return template
                named: dict[str, str] = {each["name"]: each["template"] for each in template}
                return named.get("default") or next(iter(named.values()))
    return ""


def _weight_files(folder: Path) -> list[Path]:
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if not whole.is_file() and not index.is_file():
            continue
        names = [whole.name]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / Path(name).name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{len(missing)} of {len(files)} weight files are missing, {missing[0]} first")
        if suffix == "bin":
            _LOG.warning("%s has no safetensors; its pickled weights are read with weights_only=True", folder)
        return files
    hint = hint_of_others(folder) or "neither model.safetensors nor pytorch_model.bin, nor an index of shards"
    raise FileNotFoundError(f"no weights: {hint}")
