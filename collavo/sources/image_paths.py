"""Paths as data files write them: relative, under a root, perhaps with the wrong extension."""

import posixpath

from collavo.errors import Rejected

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")

IMAGE_EXTENSIONS = (*_EXTENSIONS, ".JPG", ".JPEG", ".PNG")
"""Extensions tried, in this order, where a named image is missing; LLaVA's mix names files that carry another one."""


def checked_relative(path: str) -> str:
    """The normalised form of a relative path that stays inside its root.

    Raises:
        Rejected: `path_escapes_root` for an absolute path, a URL, or one that climbs out by `..`; `bad_path` for one
            that names no file or cannot be written as UTF-8.
    """
    normalised = posixpath.normpath(path.replace("\\", "/"))
    if normalised.startswith(("/", "../")) or normalised == ".." or "://" in path or normalised[1:2] == ":":
        raise Rejected("path_escapes_root", f"{path!r} does not stay inside its root")
    if normalised == "." or "\0" in path or not is_utf8(path):
        raise Rejected("bad_path", f"{path!r} names no file")
    return normalised


def is_utf8(path: str) -> bool:
    """Whether a path is proper text; file systems can hold names that are not."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_extension(path: str) -> str:
    """A path without its image extension, directories kept: what an image id is made of.

    Any other extension stays: `cat.json` beside `cat.png` is not the same image, and `frame.0001` is one of many.
    """
    stem, extension = posixpath.splitext(path)
    return stem if extension.lower() in _EXTENSIONS else path


def other_extensions(path: str) -> list[str]:
    """The same path with every other known image extension."""
    stem = without_extension(path)
    return [other for extension in IMAGE_EXTENSIONS if (other := stem + extension) != path]
