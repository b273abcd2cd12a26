"""Handle image paths of data files: relative, below a root, perhaps with a wrong extension."""

import posixpath
from collections.abc import Iterator

from collavo.errors import Rejected

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")

IMAGE_EXTENSIONS = (*_EXTENSIONS, ".JPG", ".JPEG", ".PNG")
"""Extensions to try, in this order, if an image is missing; LLaVA's mix names some files by a wrong one."""


def checked_relative(path: str) -> str:
    """Normalise a relative path, and make sure that it stays inside its root.

    Raises:
        Rejected: `path_escapes_root` for an absolute path, a URL, or a path that leaves its root by `..`; `bad_path`
        for
            a path that names no file or is not UTF-8.
    """
    if "://" in path:
        raise Rejected("path_escapes_root", f"{path!r} is a URL, where a path below its root is expected")
    normalised = posixpath.normpath(path.replace("\\", "/"))
    if normalised.startswith(("/", "../")) or normalised == ".." or normalised[1:2] == ":":
        raise Rejected("path_escapes_root", f"{path!r} does not stay inside its root")
    if normalised == "." or "\0" in path or not is_utf8(path):
        raise Rejected("bad_path", f"{path!r} names no file")
    return normalised


def image_names(entry_id: str, file_name: str) -> Iterator[str]:
    """Yield the names that an image's file may have: the one stated, then those without the words that follow the id.

    Cityscapes' panoptic files call `aachen_000000_000019_leftImg8bit.png`, whose id is `aachen_000000_000019`,
    `aachen_000000_000019_gtFine_leftImg8bit.png`.
    """
    yield file_name
    words = file_name.removeprefix(f"{entry_id}_").split("_") if file_name.startswith(f"{entry_id}_") else ()
    for first in range(1, len(words)):
        yield "_".join((entry_id, *words[first:]))


def is_image_name(name: str) -> bool:
    """Tell whether a file name has the extension of an image."""
    return posixpath.splitext(name)[1].lower() in _EXTENSIONS


def is_hidden(path: str) -> bool:
    """Tell whether a file, or a folder that it lies in, begins with a dot, as `.ipynb_checkpoints` does."""
    return any(part.startswith(".") for part in path.split("/") if part not in ("", ".", ".."))


def is_utf8(text: str) -> bool:
    """Tell whether a text is a proper one; names in file systems and escapes in JSON need not be."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_extension(path: str) -> str:
    """Remove a path's image extension, to make an image id.

    Other extensions stay: `cat.json` is not the image `cat.png`, and `frame.0001` is one of many frames.
    """
    stem, extension = posixpath.splitext(path)
    return stem if extension.lower() in _EXTENSIONS else path


def other_extensions(path: str) -> list[str]:
    """List the path with every other known image extension."""
    stem = without_extension(path)
    return [other for extension in IMAGE_EXTENSIONS if (other := stem + extension) != path]
