"""All that the sources said about one image, made into one task.

Mentions meet by where their image lies, its extension left out: LLaVA's mix names files whose extension differs from
the one on disk. What comes out does not depend on the order in which mentions arrive.
"""

import hashlib
from collections.abc import Iterable

from collavo.sources.image_paths import without_extension
from pipelines.records import SOURCES, ImageTask, Mention, Reject


def image_key(mention: Mention) -> bytes:
    """What mentions of the same image, and no others, have in common; short, for every mention is grouped by it."""
    return hashlib.blake2b(without_extension(mention.uri).encode(), digest_size=16).digest()


def merge_mentions(mentions: Iterable[Mention]) -> tuple[ImageTask, list[Reject]]:
    """One image's task, and the inputs that only repeat another: a second annotation, the same dialogue or file."""
    kept: list[Mention] = []
    rejects = []
    seen = set()
    for mention in sorted(mentions, key=_rank):
        content = _content(mention)
        if content in seen:
            rejects.append(
                mention.reject("merge", "duplicate_entry", f"says again what another entry says of {mention.uri}")
            )
        else:
            seen.add(content)
            kept.append(mention)
    return ImageTask(tuple(kept)), rejects


def _content(mention: Mention) -> tuple[object, ...]:
    """What a mention adds to its image; two that add the same are one too many."""
    if mention.annotation:
        return ("annotation",)
    if mention.dialogue:
        return ("dialogue", mention.dialogue)
    return ("file", mention.uri, mention.input.source)


def _rank(mention: Mention) -> tuple[object, ...]:
    return (
        SOURCES.index(mention.input.source),
        mention.image_path,
        mention.annotation is None,
        mention.input.entry_id,
        mention.annotation or (),
        mention.dialogue.turns if mention.dialogue else (),
        mention.uri,
        mention.mask_uri,
        mention.license_id is None,
        mention.license_id or 0,
    )
