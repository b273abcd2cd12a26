"""Where images come from: COCO panoptic files, LLaVA files, and the paths they name."""


def fault_in_json(error: Exception) -> str:
    """What ijson, or the reading of a record, stumbled over, in one line; ijson draws the place below its message."""
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
