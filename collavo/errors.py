"""The errors that are part of the interface: one for the user, one about a single input, two of a store.

Everything else that is raised is a fault of the program and keeps its traceback. `collavo.cli.run` turns a `UserError`
and what a store or a disk refuses into one line on the terminal; the build turns a `Rejected` into a line of
`rejects.jsonl`.
"""


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
