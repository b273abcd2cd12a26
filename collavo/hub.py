"""Find the files of a checkpoint: in a folder, or in the cache of the Hugging Face hub, which is filled from there.

All loaders come through here, so that a hub out of reach costs seconds and one line. Left to themselves, its clients
try again for half a minute, or wait for an answer that a firewall swallowed.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

from huggingface_hub import constants, get_session, is_offline_mode, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from collavo.errors import first_line

SAFETENSORS, PICKLED = "model*.safetensors", "pytorch_model*.bin"

_DESCRIPTIONS = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "README.md")
_OTHERS = {
    "*.gguf": "it is in GGUF; name the checkpoint in safetensors of which that was made",
    "adapter_config.json": "it is an adapter; merge it into its base with peft, and name the result",
    "snapshots/*/config.json": "it is a model's place in the hub's cache; name the folder below its snapshots",
}
"""What people have in place of a checkpoint, by files in it, and what helps."""

_POINTER = b"version https://git-lfs"
_STEP_SECONDS, _WHOLE_SECONDS = 2.0, 5.0
"""How long the hub may take to connect or to answer, and for all that, names to look up included."""


def find_checkpoint(source: str | Path, weights: Sequence[str] = (SAFETENSORS, PICKLED)) -> Path:
    """Find the folder of a checkpoint, and download what is not on this machine yet.

    Args:
        source: a folder, or a model id of the hub.
        weights: patterns of weight files, of which the first that the hub has is downloaded; none for descriptions
            only.

    Raises:
        OSError: in one line, if it is neither, cannot be had from here, has no config.json, or was cloned without its
            large files.
    """
    folder = Path(source)
    if folder.is_file():
        raise NotADirectoryError("a file; name the folder of a checkpoint in transformers' layout")
    if not folder.is_dir():
        folder = _download(str(source), weights)
    if not (folder / "config.json").is_file():
        hint = hint_of_others(folder) or "a checkpoint in transformers' layout has one"
        raise FileNotFoundError(f"no config.json there; {hint}")
    if weights:
        read = next(filter(None, ([*folder.glob(pattern)] for pattern in weights)), [])
        for file in filter(Path.is_file, (*read, folder / "tokenizer.json")):
            refuse_pointer(file)
    return folder


def hint_of_others(folder: Path) -> str:
    """Say what a folder without the files of a checkpoint seems to be, and what helps; empty where it is unknown."""
    return next((hint for pattern, hint in _OTHERS.items() if any(folder.glob(pattern))), "")


def refuse_pointer(file: Path) -> None:
    """Raise an OSError for what a clone has in place of a large file that Git LFS did not fetch."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise OSError(f"{file.name} is not there, only Git LFS's pointer to it; git lfs pull fetches it")


def _download(model_id: str, weights: Sequence[str]) -> Path:
    try:
        validate_repo_id(model_id)
    except HFValidationError as error:  # as for any path with two slashes
        raise FileNotFoundError("there is no such folder") from error
    silence = _silence_of(constants.ENDPOINT)
    try:
        for pattern in weights or ("config.json",):
            wanted = [*_DESCRIPTIONS, pattern]
            folder = Path(snapshot_download(model_id, allow_patterns=wanted, local_files_only=silence is not None))
            if any(folder.glob(pattern)):
                return folder
        raise FileNotFoundError(f"the hub has no {' or '.join(weights) or 'config.json'} of it")
    except GatedRepoError as error:
        raise OSError(
            f"gated; accept its terms at {constants.ENDPOINT}/{model_id}, then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError("neither a folder nor a model of the hub that this account can see") from error
    except Exception as error:  # the network, proxies and the hub's client raise a dozen types
        why = f"{constants.ENDPOINT} cannot be reached ({silence})" if silence else first_line(error)
        raise OSError(f"neither a folder nor a whole model in the cache, and {why}") from error


@lru_cache
def _silence_of(endpoint: str) -> str | None:
    """Find out why the hub cannot be asked; None where it answers, whatever that is. Asked once per process."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    outcome: Queue[str | None] = Queue()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_STEP_SECONDS, follow_redirects=False)
            outcome.put(None)
        except Exception as error:  # as above
            outcome.put(first_line(error))

    # In a thread, because no timeout ends the search for an address.
    Thread(target=ask, daemon=True).start()
    try:
        return outcome.get(timeout=_WHOLE_SECONDS)
    except Empty:
        return f"no answer within {_WHOLE_SECONDS:.0f} seconds"
