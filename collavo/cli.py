"""How all commands read their flags and how they fail: one line on standard error, never a traceback.

A command declares its flags as a dataclass, one field a flag, and parses them before it imports anything heavy:

    @dataclass(frozen=True, slots=True)
    class Flags:
        output: str = flag("out", "where the data set goes", metavar="DIR")
        workers: int = flag(1, "processes that read and decode", least=0)
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from collavo.errors import StoreFault, UserError
from collavo.folders import disk_fault, whole_folder

Flags = TypeVar("Flags")

REQUIRED: Any = dataclasses.MISSING
"""The default of a flag that has to be given."""

_METAVARS = {int: "N", float: "X", str: "NAME"}


def flag(
    default: Any,
    help_text: str,
    *,
    kind: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    choices: Iterable[Any] | None = None,
    many: bool = False,
    least: float | None = None,
    most: float | None = None,
    group: str | None = None,
) -> Any:
    """Declare a dataclass field that is a flag of a command; the flag of a field `as_` is `--as`.

    Args:
        default: the value where the flag is not given; `REQUIRED` for none. Its type is the flag's; a bool makes a
            pair `--name`, `--no-name`.
        kind: the type where the default does not tell it; bool for such a pair whose default is None.
        many: the flag takes one value or more, and the field holds a tuple.
        least, most: bounds of a number, themselves allowed.
        group: heading of the help above this flag and those after it.
    """
    metadata = {
        "help": help_text,
        "kind": kind,
        "metavar": metavar,
        "choices": tuple(choices) if choices else None,
        "many": many,
        "least": least,
        "most": most,
        "group": group,
    }
    return dataclasses.field(default=default, metadata=metadata)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated flags and without the usage above an error; an unknown flag is answered with the
    nearest known one. Descriptions keep their lines, which have to fit a terminal of 80 columns."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def add_flags(self, flags: type[Any]) -> None:
        """Add the flags that a dataclass declares with `flag`."""
        group: Any = self
        for field in dataclasses.fields(flags):
            heading = field.metadata["group"]
            group = self.add_argument_group(heading) if heading else group
            group.add_argument(f"--{field.name.rstrip('_')}", dest=field.name, default=None, **_options(field))

    def flags_of(self, flags: type[Flags], parsed: argparse.Namespace, defaults: dict[str, Any] | None = None) -> Flags:
        """Return the dataclass, filled in from a parsed command line, then from `defaults`, then from its own.

        Raises:
            UserError: for a number out of its bounds, or a required flag that is missing.
        """
        values = dict(defaults or {})
        for field in dataclasses.fields(flags):  # type: ignore[arg-type]
            given = getattr(parsed, field.name)
            if given is not None:
                _check_bounds(field, given)
                values[field.name] = tuple(given) if field.metadata["many"] else given
            elif field.default is REQUIRED and field.name not in values:
                raise UserError(f"--{field.name.rstrip('_')} is missing; {field.metadata['help']}")
        return flags(**values)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but refuse a flag of nothing, as from a variable of the shell that is not set: a
        folder without a name would be the current one."""
        flag_name = ""
        for word in sys.argv[1:] if args is None else args:
            name, assigned, value = word.partition("=")
            flag_name = name if word.startswith("--") else flag_name
            is_empty = bool(assigned and not value) if word.startswith("--") else not word
            if is_empty and flag_name in self._option_string_actions:
                self.error(f"{flag_name} is empty; name something, or leave it out")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but answer an unknown flag with the nearest known one."""
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(unknown_flag(rest[0], self._option_string_actions))
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{program(self.prog)}: error: {message}\n")


def parse(flags: type[Flags], argv: Sequence[str] | None, **options: Any) -> Flags:
    """Parse a command line into a dataclass of flags.

    Args:
        options: of `Parser`.

    Raises:
        UserError: as `Parser.flags_of`; SystemExit for what argparse refuses and after `--help`.
    """
    parser = Parser(**options)
    parser.add_flags(flags)
    return parser.flags_of(flags, parser.parse_args(argv))


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """Say that a word is no flag of a command, and which flag may have been meant."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"{word!r} belongs to no flag; --help lists them"
    by_shape = {k.replace("-", "_"): k for k in known}
    nearest = difflib.get_close_matches(name.replace("-", "_"), by_shape, 1)
    hint = f"did you mean {by_shape[nearest[0]]}?" if nearest else "--help lists those there are"
    return f"unknown flag {name}; {hint}"


@contextmanager
def naming(flag_name: str) -> Iterator[None]:
    """Put the flag in front of an error about its value, which the library below does not know by that name.

    An error that names its flag already keeps it: what opens an image may load the segmenter first.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith("--"):
            raise
        raise UserError(f"--{flag_name}: {error}", error.exit_status) from error


@contextmanager
def output_folder(folder: Path, flag_name: str = "output", inside: bool = False, kept: str = "") -> Iterator[Path]:
    """Write the folder that a flag names whole, as `whole_folder` does; an error about the folder names the flag."""
    with ExitStack() as stack:
        with naming(flag_name):
            staging = stack.enter_context(whole_folder(folder, inside, kept))
        yield staging


def run(name: str, command: Callable[[], int | None]) -> int:
    """Run a command; whatever its user, the disk or a store did becomes one line on standard error.

    Args:
        name: the command as its errors call it, such as `collavo.train`.
        command: returns an exit status, None for 0.

    Returns:
        the exit status: that of a `UserError`, 1 for a disk or a store that refuses, 130 where the user
        interrupted it.
    """
    # Before torch is imported. A thread that waits for another spins, and so keeps the core from it as soon as another
    # process needs one too: six times slower. Spinning for a moment costs nothing then, nor on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line, status = user_line(error)
        if line is None:
            raise
        print(f"{name}: error: {line}", file=sys.stderr)
        return status


def user_line(error: BaseException | None) -> tuple[str | None, int]:
    """Find the line for the user in an exception or in those that it was raised from, and the exit status;
    None for a fault of the program."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error), error.exit_status
        if line := str(error) if isinstance(error, StoreFault) else disk_fault(error):
            return line, 1
        error = error.__cause__ or error.__context__
    return None, 1


def program(prog: str) -> str:
    """Return a command as its errors call it: `collavo.train` for `python -m collavo.train`."""
    return prog.removeprefix("python -m ")


def size_wh(text: str) -> tuple[int, int]:
    """Return the type of a flag that takes a size in pixels, such as `640x480`."""
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not (64 <= width <= 4096 and 64 <= height <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 640x480, each side from 64 to 4096")
    return width, height


def on_disk(text: str) -> str:
    """Return the type of a flag that takes a path on a disk.

    Raises:
        argparse.ArgumentTypeError: for a URI, which `Path` would take for a folder of that name.
    """
    if "://" in text:
        where = "is a URI; name the path alone" if text.startswith("file://") else "lies in a store"
        raise argparse.ArgumentTypeError(f"{text} {where}; this has to be on a disk")
    return text


def _path_on_disk(text: str) -> Path:
    return Path(on_disk(text))


def _options(field: Any) -> dict[str, Any]:
    """Make argparse's options of a flag; its help names the default unless it says so itself."""
    meta, default = field.metadata, field.default
    shown = meta["help"].replace("%", "%%")  # argparse formats it
    if not (default is REQUIRED or default is None or meta["many"] or "default" in shown):
        shown += f" (default: {('off', 'on')[default] if isinstance(default, bool) else default})"
    if isinstance(default, bool) or meta["kind"] is bool:
        return {"help": shown, "action": argparse.BooleanOptionalAction}
    kind: Any = _path_on_disk if meta["kind"] is Path else meta["kind"]
    kind = kind or (type(default) if default not in (REQUIRED, None) and not meta["many"] else str)
    metavar = meta["metavar"] or (None if meta["choices"] else _METAVARS.get(kind, "VALUE"))
    options = {"help": shown, "type": kind, "choices": meta["choices"], "metavar": metavar}
    return {**options, "nargs": "+"} if meta["many"] else options


def _check_bounds(field: Any, value: Any) -> None:
    least, most = field.metadata["least"], field.metadata["most"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"--{field.name} is {value}, but must be a number")
    if (least is None or value >= least) and (most is None or value <= most):
        return
    if least is not None and most is not None:
        raise UserError(f"--{field.name} is {value}, but must lie within {least} and {most}")
    raise UserError(
        f"--{field.name} is {value}, but must be " + (f"at least {least}" if least is not None else f"at most {most}")
    )
