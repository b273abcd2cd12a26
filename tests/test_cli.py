"""Flags as dataclasses, errors as one line, progress where there is no terminal."""

import errno
import io
from dataclasses import dataclass

import pytest
from rich.console import Console

from collavo import progress
from collavo.cli import REQUIRED, flag, naming, parse, run
from collavo.errors import UserError
from collavo.progress import Progress


@dataclass(frozen=True, slots=True)
class Flags:
    model: str = flag(REQUIRED, "a run directory")
    workers: int = flag(1, "processes", least=0, most=64)
    ratio: float = flag(0.5, "a share", least=0, most=1)
    tasks: tuple[str, ...] = flag(("a",), "what is asked", many=True, choices=("a", "b"))
    quantize: bool = flag(True, "NF4")
    limit: int | None = flag(None, "at most", kind=int, least=1)


def parsed(*argv: str) -> Flags:
    return parse(Flags, list(argv), prog="python -m collavo.x")


def test_flags_fill_a_dataclass() -> None:
    assert parsed("--model", "m") == Flags("m", 1, 0.5, ("a",), True, None)
    given = ("--model", "m", "--workers", "0", "--tasks", "b", "a", "--no-quantize", "--limit", "3")
    assert parsed(*given) == Flags("m", 0, 0.5, ("b", "a"), False, 3)


@pytest.mark.parametrize(
    "argv, complaint",
    [
        ((), "--model is missing; a run directory"),
        (("--model", "m", "--workers", "65"), "--workers is 65, but must lie within 0 and 64"),
        (("--model", "m", "--limit", "0"), "--limit is 0, but must be at least 1"),
        (("--model", "m", "--ratio", "nan"), "--ratio is nan, but must be a number"),
    ],
)
def test_values_that_cannot_work_are_told(argv: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(*argv)
    assert str(refused.value) == complaint


@pytest.mark.parametrize(
    "word, hint",
    [
        ("--wokers", "unknown flag --wokers; did you mean --workers?"),
        ("--no_quantize", "unknown flag --no_quantize; did you mean --no-quantize?"),
        ("--work", "unknown flag --work; did you mean --workers?"),  # no abbreviations
        ("--zzz=3", "unknown flag --zzz; --help lists those there are"),
        ("stray", "'stray' belongs to no flag; --help lists them"),
    ],
)
def test_the_nearest_flag_is_named(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed("--model", "m", word)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"collavo.x: error: {hint}\n"


def test_help_names_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "processes (default: 1)" in shown and "NF4 (default: on)" in shown and "at most\n" in shown


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error, status, line",
    [
        (UserError("x.json: broken"), 2, "error: x.json: broken"),
        (UserError("step 3: no memory", 1), 1, "error: step 3: no memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), 1, "error: out/a: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/proc/x"), 1, "error: /proc/x: Permission denied"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_user_or_the_disk_did_is_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("collavo.x", lambda: raising(error)) == status
    told = capsys.readouterr().err
    assert told.startswith("collavo.x: ") and line in told and told.count("\n") == 1


def test_a_cause_deep_below_is_found_and_a_fault_of_ours_is_not_hidden() -> None:
    def wrapped() -> None:
        try:
            raise UserError("x.json: broken")
        except UserError as error:
            raise RuntimeError("of a runner") from error

    assert run("collavo.x", wrapped) == 2
    with pytest.raises(ZeroDivisionError):
        run("collavo.x", lambda: 1 // 0)


def test_a_flag_is_named_before_its_value() -> None:
    with pytest.raises(UserError, match=r"^--data: x\.parquet: broken$"), naming("data"):
        raise UserError("x.parquet: broken")


@pytest.mark.parametrize(
    ("each", "first"),
    [
        (100, "Segmenting: 300 of 6,000 (5 %), 10.0/s, 9:30 left, 3 rejected"),
        (0.25, "Segmenting: 1 of 6,000 (0 %), 40.0 s each, 66:39:30 left, 3 rejected"),
    ],
)
def test_without_a_terminal_progress_is_plain_lines(monkeypatch: pytest.MonkeyPatch, each: float, first: str) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = io.StringIO()
    with Progress(Console(file=shown)) as bars:
        bar = bars.add("Segmenting", 6000)
        for tens in range(13):
            bars.update(bar, each * tens, note="3 rejected")
            now[0] += 10
    assert shown.getvalue().splitlines()[0] == first
    assert len(shown.getvalue().splitlines()) == 4  # one every half minute


@pytest.mark.parametrize("words", [["--output", ""], ["--output="], ["--images", "photos", "", "--output", "out"]])
def test_a_flag_of_nothing_is_refused_and_the_current_folder_stays(words, tmp_path, monkeypatch, capsys):
    from pipelines import command

    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command.main(["--segmenter", "none", *words])
    assert end.value.code == 2 and " is empty; name something, or leave it out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "rows", "--output_dir", "s3://bucket/run"],
        ["export-data", "--data", "rows", "--to", "jsonl", "--output", "gs://bucket/export"],
        ["scenes", "--output", "s3://bucket/scenes"],
    ],
)
def test_what_is_written_on_a_disk_only_takes_no_path_in_a_store(words, tmp_path, monkeypatch, capsys):
    from pipelines.console import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and "lies in a store; this has to be on a disk" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
