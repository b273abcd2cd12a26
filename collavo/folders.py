"""One way to publish a local folder whole: written beside its place, moved there when everything is in it.

A reader finds the old folder or the new one, never a mix. Where a command is killed between the two renames of the
swap, the next `recover` puts things right. Object stores have no renames; `pipelines.publish` says what is done there.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from collavo.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of `folder` if the block ends well and vanishes if it does not.

    What lies in `folder` then is gone; the caller has made sure that it may be.

    Raises:
        UserError: where nothing can be written there.
    """
    recover(folder)
    staging = staging_of(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; name a folder that can be written to") from error
    try:
        yield staging
        swap(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staging_of(folder: Path) -> Path:
    """Where the next content of a folder is written, on the same file system."""
    return folder.with_name(f".{folder.name}.unfinished")


def swap(staging: Path, folder: Path) -> None:
    """Put a written folder into the place of another, which is removed."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a swap that was interrupted: the old folder goes back where no new one arrived."""
    old = _old(folder)
    if old.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
