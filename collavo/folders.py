"""One way to publish a local folder whole: everything is written in a staging folder, which takes its place in the end.

A reader finds the old folder or the new one, never a mix. Staging lies beside the folder, and two renames swap them.
Where the folder itself cannot be renamed (it is a mount point, its parent cannot be written to, or the command was
started in it), staging lies inside and its files move up one by one. A command that is killed in between leaves what
`recover` finishes or undoes; the next `whole_folder` calls it.

Object stores have no renames; `pipelines.publish` says what is done there.
"""

import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from collavo.errors import UserError, first_line

DISK_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR,
}  # fmt: skip
"""What the disk or its permissions refuse; no command can do anything about them."""

LOST_AND_FOUND = "lost+found"
"""At the root of a mounted disk; it belongs to the file system."""

_STAGING, _COMPLETE, _ARRIVING = ".unfinished", ".complete", ".arriving"
"""Staging inside a folder: being written; written, while old files go; old files gone, while the new ones move up."""

INTERNAL = (_STAGING, _COMPLETE, _ARRIVING, LOST_AND_FOUND)
"""Names inside a folder that are not part of what it holds."""


@contextmanager
def whole_folder(folder: Path, inside: bool = False, kept: str = "") -> Iterator[Path]:
    """Make a staging folder to write in, which takes the place of `folder` if the block ends well, or else vanishes.

    What lies in `folder` then is gone; the caller makes sure that it may be. Two commands cannot write to one folder
    at the same time: the staging folder is locked, where the file system has locks.

    Args:
        inside: whether staging has to lie in `folder`, as where others who write in it see nothing else.
        kept: a name in the staging folder that outlives a block that fails, and is there again for the next one. The
            block removes it in the end.

    Raises:
        UserError: if nothing can be written there, or another command is writing there.
    """
    folder = folder.resolve()
    _refuse_files(folder)
    staging = staging_of(folder, inside)
    lock = _lock_for(folder, staging)
    try:
        recover(folder)
        remove([entry for entry in staging.iterdir() if entry.name != kept])
        if folder.exists():
            shutil.copymode(folder, staging)
        yield staging
        let_others_read(staging)
        swap(staging, folder)
    finally:
        with suppress(OSError):  # the disk may be what failed; and what is kept stays
            remove([entry for entry in staging.iterdir() if entry.name != kept])
            staging.rmdir()
        os.close(lock)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands from writing in a folder that is made where it is missing, where the file system has locks.

    Raises:
        UserError: as `whole_folder`.
    """
    lock = _lock_for(folder, folder)
    try:
        yield
    finally:
        os.close(lock)


def _lock_for(folder: Path, place: Path) -> int:
    """Lock a place for what is written to a folder, and return the handle that holds the lock.

    Raises:
        UserError: naming the folder.
    """
    try:
        return _make_and_lock(place)
    except BlockingIOError as error:
        raise UserError(f"{folder}: another command is writing there; let it end, or name another folder") from error
    except OSError as error:
        raise _unwritable(folder, error) from error


def let_others_read(folder: Path) -> None:
    """Give weights below a folder the mode of any new file; safetensors makes them their owner's alone, whatever the
    umask."""
    if weights := list(folder.rglob("*.safetensors")):
        with TemporaryDirectory(dir=folder) as scratch:
            (plain := Path(scratch) / "plain").touch()
            mode = stat.S_IMODE(plain.stat().st_mode)
        for file in weights:
            file.chmod(mode)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the path where the disk refuses what the block writes.

    Raises:
        UserError: for a full disk, a missing permission and the like.
    """
    try:
        yield
    except Exception as error:
        if fault := disk_fault(error):
            named = isinstance(error, OSError) and error.filename
            raise UserError(fault if named else f"{path}: {fault}", 1) from error
        raise


def disk_fault(error: BaseException) -> str | None:
    """Return what the disk or its permissions refused, and the file where the error names one; None for other
    errors."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    # safetensors and torch tell of the operating system's refusal in their message only.
    if re.search(r"No space left on device|StorageFull|Disk quota exceeded|File too large", str(error)):
        return first_line(error)
    return None


def write_whole(file: Path, text: str) -> None:
    """Write a file, which a reader finds whole: the old one or the new.

    Raises:
        UserError: if the disk refuses.
    """
    beside = file.with_name(f".{file.name}.unfinished")
    with writing(file):
        try:
            beside.write_text(text)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder to write in, where it is not there yet.

    Raises:
        UserError: if nothing can be written there.
    """
    _refuse_files(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(folder, error) from error


def staging_of(folder: Path, inside: bool = False) -> Path:
    """Return the folder where the next content of a folder is written, on the same file system."""
    folder = folder.resolve()
    return folder / _STAGING if inside or _is_fixed(folder) else folder.with_name(f".{folder.name}.unfinished")


def swap(staging: Path, folder: Path) -> None:
    """Put a written folder into the place of another, whose content is removed."""
    if staging.parent == folder:
        staging.rename(folder / _COMPLETE)
        recover(folder)
        return
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    staging.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a swap that was interrupted."""
    old, complete, arriving = _old(folder), folder / _COMPLETE, folder / _ARRIVING
    if old.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    # Youngest first and last: what was written last, as a manifest is, says that the rest is there.
    if complete.exists():
        remove([entry for entry in reversed(_by_age(folder)) if entry.name not in INTERNAL])
        complete.rename(arriving)
    if arriving.exists():
        for entry in _by_age(arriving):
            entry.rename(folder / entry.name)
        arriving.rmdir()


def _refuse_files(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if os.path.exists(path) and not os.path.isdir(path):
            raise UserError(f"{folder}: {'this' if path == folder else path} is a file; name a folder")


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: {error.strerror}; name a folder that can be written to")


def _is_fixed(folder: Path) -> bool:
    """Tell whether a folder is there and has to stay where it is."""
    return folder.is_dir() and (
        os.path.ismount(folder) or not os.access(folder.parent, os.W_OK) or Path.cwd().is_relative_to(folder)
    )


def _make_and_lock(staging: Path) -> int:
    """Lock a folder, which is made where it is missing, and return the handle that holds the lock. Where the file
    system has no locks, nothing keeps another command out.

    Raises:
        BlockingIOError: if another process holds it.
    """
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        handle = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:  # as of Lustre where it is mounted without `flock`, or NFS without a lock daemon
            pass
        # Its last holder may have renamed or removed it between the two calls; then this is no longer that folder.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(staging)):
                return handle
        os.close(handle)


def _by_age(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda entry: entry.lstat().st_mtime_ns)


def remove(entries: list[Path]) -> None:
    """Remove files, and folders with all that is in them; of a link, the link alone."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
