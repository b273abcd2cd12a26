"""The models that come with the package. Each has a name, which can be given instead of a folder or hub id.

    scenes   collavo/assets/segmenter   a segmenter that knows drawn scenes: `--segmenter_checkpoint scenes`
    tiny     collavo/assets/tiny_base   a small base to train from: `--preset tiny`

A folder of the same name is reached as `./scenes`. `collavo/assets/SHA256SUMS` holds the checksums of the weights, in
the format of `sha256sum --check`. Weights that are not listed there, or differ, are not opened.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from collavo.errors import UserError

ASSETS = Path(__file__).with_name("assets")
CHECKSUMS = "SHA256SUMS"

SCENES, TINY = "scenes", "tiny"
_FOLDERS = {SCENES: "segmenter", TINY: "tiny_base"}


class EmbeddedModel(NamedTuple):
    """An embedded model whose checksum is right."""

    folder: Path
    sha256: str
    """Of its weights."""


def find_embedded(source: str) -> EmbeddedModel | None:
    """Find the embedded model of that name and check its weights.

    Returns:
        None if `source` is a folder, a hub id, or anything else.

    Raises:
        UserError: if the weights are missing or damaged.
    """
    if source not in _FOLDERS:
        return None
    name = f"{_FOLDERS[source]}/model.safetensors"
    weights = ASSETS / name
    try:
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        expected = _checksums().get(name)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; {_remedy(source)}") from error
    if found != expected:
        raise UserError(f"{weights}: damaged, for its SHA-256 is not that of {CHECKSUMS}; {_remedy(source)}")
    return EmbeddedModel(weights.parent, found)


def _checksums() -> dict[str, str]:
    """SHA-256 in hexadecimal digits by path below the assets."""
    lines = (ASSETS / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    return {path.lstrip("*"): digest for digest, path in (line.split(maxsplit=1) for line in lines if line.strip())}


def _remedy(source: str) -> str:
    return f"reinstall the package, which brings the embedded model {source!r}"
