"""A folder appears whole or not at all, wherever it lies and whenever the command that writes it is killed."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from collavo import folders
from collavo.errors import UserError
from collavo.folders import make_folder, recover, whole_folder


@pytest.fixture(params=["beside", "inside"])
def old(request, tmp_path, monkeypatch) -> Path:
    """A folder of two files; staging lies inside it where it is the current folder, as where it is a mount point."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text("old")
    if request.param == "inside":
        monkeypatch.chdir(folder)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


OLD, NEW = {"a": "old", "b": "old"}, {"b": "new", "sub/c": "new"}


def write_new(staging: Path) -> None:
    (staging / "sub").mkdir()
    for name in NEW:
        (staging / name).write_text("new")


def test_weights_are_readable_by_all_whom_other_new_files_are(old):
    with whole_folder(old) as staging:
        (staging / "sub").mkdir()
        save_file({"weight": torch.zeros(2)}, staging / "sub" / "model.safetensors")
        (staging / "config.json").write_text("{}")
    modes = {path.name: path.stat().st_mode for path in old.rglob("*.*") if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_the_new_content_takes_the_place_of_the_old_when_all_is_written(old):
    with whole_folder(old) as staging:
        write_new(staging)
        assert {name: text for name, text in content(old).items() if "unfinished" not in name} == OLD
    assert content(old) == NEW
    assert {path.name for path in old.parent.iterdir()} == {"out"}


def test_a_failure_leaves_the_old_content_and_nothing_else(old):
    with pytest.raises(RuntimeError), whole_folder(old) as staging:
        write_new(staging)
        raise RuntimeError
    assert content(old) == OLD and {path.name for path in old.parent.iterdir()} == {"out"}


@pytest.mark.parametrize("step", range(6))
def test_a_swap_that_is_cut_off_anywhere_is_finished_or_undone(old, monkeypatch, step):
    """The process is killed at its nth rename or removal of a file."""
    left = step
    rename, unlink = Path.rename, Path.unlink

    def counting(function):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise SystemExit
            return function(*arguments)

        return call

    staging = folders.staging_of(old)
    staging.mkdir()
    write_new(staging)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counting(rename))
        patch.setattr(Path, "unlink", counting(unlink))
        try:
            folders.swap(staging, old)
        except SystemExit:
            assert left < 0
    recover(old)
    found = {name: text for name, text in content(old).items() if "unfinished" not in name}
    assert found in (OLD, NEW)
    with whole_folder(old) as staging:
        assert list(staging.iterdir()) == []
        write_new(staging)
    assert content(old) == NEW


def test_two_commands_do_not_write_to_one_folder(old):
    with whole_folder(old) as staging:
        with pytest.raises(UserError, match="another command is writing there"), whole_folder(old):
            pass
        write_new(staging)
    assert content(old) == NEW


@pytest.mark.parametrize("fault", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_written_to(old, monkeypatch, fault):
    def refuse(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    with whole_folder(old) as staging:
        write_new(staging)
    assert content(old) == NEW and {path.name for path in old.parent.iterdir()} == {"out"}


def test_a_link_stays_a_link_and_the_folder_keeps_its_mode(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o750)
    (tmp_path / "out").symlink_to("disk")
    with whole_folder(tmp_path / "out") as staging:
        write_new(staging)
    assert (tmp_path / "out").is_symlink() and content(tmp_path / "disk") == NEW
    assert os.stat(tmp_path / "disk").st_mode & 0o777 == 0o750


@pytest.mark.parametrize("open_folder", [whole_folder, lambda folder: nullcontext(make_folder(folder))])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "file: this is a file; name a folder"),
        ("file/out", "file/out: .*/file is a file; name a folder"),
        ("/proc/x/out", "^/proc/x/out: No such file or directory; name a folder that can be written to$"),
    ],
)
def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path, open_folder, output, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message), open_folder(tmp_path / output):
        pass
