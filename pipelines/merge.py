"""Everything that the sources say about one image becomes one task.

Mentions belong together if their images lie in the same place, extensions left out: LLaVA's mix names files whose
extension differs from the one on disk. Where two such files exist, `pipelines.image_steps` takes them apart again. The
result does not depend on the order in which mentions arrive.
"""

import hashlib
from collections.abc import Iterable

from collavo.sources.image_paths import without_extension
from pipelines.records import SOURCES, ImageTask, Mention, Reject


def image_key(mention: Mention) -> bytes:
    """Return a key that all mentions of one image share, and no others. It is short: every mention is grouped by it."""
    return hashlib.blake2b((without_extension(mention.uri) or mention.image_path).encode(), digest_size=16).digest()


def merge_mentions(mentions: Iterable[Mention]) -> tuple[ImageTask, list[Reject]]:
    """Make one image's task; reject the inputs that repeat another: a second annotation, the same dialogue or file."""
    kept: dict[tuple[object, ...], Mention] = {}
    rejects = []
    for mention in sorted(mentions, key=_rank):
        content = _content(mention)
        if (first := kept.get(content)) is None:
            kept[content] = mention
        elif (first.annotation, first.instances) == (mention.annotation, mention.instances):
            detail = f"repeats what another entry says of {mention.uri}"
            rejects.append(mention.reject("merge", "duplicate_entry", detail))
        else:
            detail = f"entry {first.input.entry_id} annotates {mention.uri} otherwise, and was taken"
            detail += "; put all objects of an image into one entry of one file"
            rejects.append(mention.reject("merge", "other_annotation", detail))
    return ImageTask(tuple(kept.values())), rejects


def _content(mention: Mention) -> tuple[object, ...]:
    """Return what a mention adds to its image; of two that add the same, or two annotations, one is rejected."""
    if mention.annotation:
        return ("annotation", mention.uri)
    if mention.instances:
        return ("instances", mention.uri)
    if mention.dialogue:
        return ("dialogue", mention.dialogue)
    return ("file", mention.uri, mention.input.source)


def _rank(mention: Mention) -> tuple[object, ...]:
    """Order mentions: the first gives the row its id, and ties are broken so that nothing hangs on their arrival."""
    return (
        SOURCES.index(mention.input.source),
        mention.image_path,
        mention.annotation is None,
        mention.instances.endswith(",[]]"),  # what lists no object is taken where nothing lists one
        mention.input.entry_id,
        mention.annotation or (),
        mention.dialogue.turns if mention.dialogue else (),
        mention.uri,
        mention.mask_uri,
        mention.license_id is None,
        mention.license_id or 0,
        mention.instances,
        mention.split,
    )
