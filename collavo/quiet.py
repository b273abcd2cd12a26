"""Weights loaded in silence, where what transformers would say of them is checked beside."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def without_loading_report() -> Iterator[None]:
    """While weights are loaded whose names are checked beside: transformers reports what is initialised or left out,
    and shows a bar of its own. Downloads keep theirs."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()
