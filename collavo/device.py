"""Which device a model runs on: asked for by name, never chosen silently."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn

from collavo.errors import UserError, first_line


def resolve_device(name: str) -> torch.device:
    """Turn a device's name into a device that is there.

    Args:
        name: `auto` (CUDA where there is any, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: for CUDA where torch finds none, for a device number that does not exist, for any other name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, colon, number = name.partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise UserError(f"{name}: not a device; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        built_for = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"{name}: torch {torch.__version__} ({built_for}) finds {count} CUDA devices; use cpu, or install a torch "
            "build that matches the driver"
        )
    return torch.device("cuda", int(number or 0))


def device_of_ranks(name: str) -> tuple[torch.device, int]:
    """Resolve a device for the processes that torchrun started, and count them. On GPUs each will have its own.

    Raises:
        UserError: as `resolve_device`, and where there is no GPU for each.
    """
    device = resolve_device(name)
    ranks, of_machine = (int(os.environ.get(variable, 1)) for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if device.type == "cuda" and of_machine > (count := torch.cuda.device_count()):
        raise UserError(f"{name}: {of_machine} processes, but {count} GPUs; start one for each GPU")
    if name.startswith("cuda:") and ranks > 1:
        raise UserError(f"{name} is one GPU, and each of {ranks} processes needs its own; use cuda")
    return device, ranks


def join_ranks(name: str) -> tuple[torch.device, int, int]:
    """Join the processes that torchrun started; this one's device, its rank, and how many they are.

    Raises:
        UserError: as `device_of_ranks`.
    """
    device, ranks = device_of_ranks(name)
    if ranks == 1:
        return device, 0, 1
    from accelerate import PartialState

    # A rank may have to wait hours for the one with the longest answers.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=1))
    return state.device, state.process_index, ranks


def limit_threads(model: nn.Module) -> None:
    """Let this process compute on one thread of the CPU from now on, if the model has less than 50 million weights.

    Its operations on a few tokens are so short that two threads bring little (1.15 times as many answers of the small
    base on idle cores), and wait for each other where other work takes a core (a third as many).
    """
    if sum(parameter.numel() for parameter in model.parameters()) < 50_000_000:
        torch.set_num_threads(1)


def move_to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model's weights, in place.

    Raises:
        UserError: where they do not fit; the model is not run on the CPU instead.
    """
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        raise UserError(
            f"{device}: {needed / 1e9:.1f} GB of weights do not fit, {free / 1e9:.1f} of {total / 1e9:.1f} GB "
            "are free; stop what else runs on the GPU, or use cpu"
        ) from error


@contextmanager
def memory_named(helpful: str, doing: str = "") -> Iterator[None]:
    """Turn a GPU's lack of memory in the block into one line.

    Args:
        helpful: what takes less of it.
        doing: what the block does.

    Raises:
        UserError: with exit status 1.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        line = f"the GPU has no memory left ({first_line(error)}); what helps: {helpful}"
        raise UserError(f"{doing}: {line}" if doing else line, 1) from error


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model name: what a manifest records."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
