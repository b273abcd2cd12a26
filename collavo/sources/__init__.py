"""Where images come from: COCO panoptic files, LLaVA files, and the paths they name."""


def fault_in_json(error: Exception) -> str:
    """What ijson, or the reading of a record, stumbled over, in one line; ijson draws the place below its message."""
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


class EntryError(ValueError):
    """An entry of a source that makes no row. `reason` is one word for tallies, `entry_id` what the source calls it."""

    def __init__(self, entry_id: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.entry_id = entry_id
        self.reason = reason
