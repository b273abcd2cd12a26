"""Read the sources of images: COCO panoptic files, LLaVA files, and the paths that they name."""


def fault_in_json(error: Exception) -> str:
    """Say in one line what ijson or a reader of records could not read; ijson draws the place below its message."""
    message = error.args[0] if error.args else ""
    text = message.decode(errors="replace") if isinstance(message, bytes) else str(message)
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"
