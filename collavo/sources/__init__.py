"""Where images come from: COCO panoptic files, LLaVA files, and the paths they name."""


class EntryError(ValueError):
    """An entry of a source that makes no row. `reason` is one word for tallies, `entry_id` what the source calls it."""

    def __init__(self, entry_id: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.entry_id = entry_id
        self.reason = reason
