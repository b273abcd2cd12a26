"""The errors that are part of the interface: one for the user, one about a single input, two of a store; and the tally
of what was left out for the second.

Everything else that is raised is a fault of the program and keeps its traceback. `collavo.cli.run` turns a `UserError`
and what a store or a disk refuses into one line on the terminal; the build turns a `Rejected` into a line of
`rejects.jsonl`.
"""

from collections import Counter
from dataclasses import dataclass, field


class UserError(ValueError):
    """Something that the user gave, or the machine has, does not work.

    Args:
        message: one line that names the file or value, what was found and what would work.
        exit_status: 2 for what a command was given, 1 for a job that had to stop.
    """

    def __init__(self, message: str, exit_status: int = 2) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Rejected(ValueError):
    """One image, mask, path or entry cannot be used; the others go on.

    Args:
        reason: one word, by which rejects are counted.
        detail: what was found.
        entry_id: what its source calls it, where the raiser knows that.
    """

    def __init__(self, reason: str, detail: str, entry_id: str = "") -> None:
        super().__init__(reason, detail, entry_id)  # all of them, so that it pickles
        self.reason = reason
        self.entry_id = entry_id

    def __str__(self) -> str:
        return str(self.args[1])


_NAMED_PER_REASON = 3


@dataclass(slots=True)
class LeftOut:
    """What could not be used of some data: counted by reason, the first of each reason named."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Count one, and name it if it is among the first."""
        self.counts[reason] += 1
        if len(known := self.named.setdefault(reason, [])) < _NAMED_PER_REASON:
            known.append(f"{name}: {detail}" if detail else name)

    def merge(self, other: "LeftOut") -> None:
        """Count what another one has counted, after what this one has."""
        self.counts.update(other.counts)
        for reason, named in other.named.items():
            self.named[reason] = [*self.named.get(reason, ()), *named][:_NAMED_PER_REASON]

    def lines(self) -> list[str]:
        """Say how much was left out, a line for each reason."""
        return [
            f"{count:,} {reason} ({'; '.join(self.named[reason])}{'; ...' * (count > _NAMED_PER_REASON)})"
            for reason, count in sorted(self.counts.items())
        ]


class StoreFault(OSError):
    """A store refuses something; the message is a line that names the file or folder."""


class StoreOutage(UserError):
    """A store does not answer, which tells nothing of the file: no input is left out for it, the job has to stop.

    Args:
        message: a line that names the file or folder.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_status=1)


def first_line(error: BaseException) -> str:
    """Take the first line of another library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
