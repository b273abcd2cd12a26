import posixpath

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from collavo.errors import Rejected
from collavo.sources.image_paths import (
    IMAGE_EXTENSIONS,
    checked_relative,
    image_names,
    other_extensions,
    without_extension,
)


@pytest.mark.parametrize(
    ("path", "normalised"),
    [
        ("a.jpg", "a.jpg"),
        ("coco/train2017/a.jpg", "coco/train2017/a.jpg"),
        ("./coco//a.jpg", "coco/a.jpg"),
        ("coco/../vg/a.jpg", "vg/a.jpg"),  # climbs, but not out
        ("coco\\train\\a.jpg", "coco/train/a.jpg"),  # written on Windows
        ("..a/b...jpg", "..a/b...jpg"),  # dots that do not climb
        ("a b/\u00e9 \u4e2d.jpg", "a b/\u00e9 \u4e2d.jpg"),
    ],
)
def test_a_path_below_the_root_is_normalised(path: str, normalised: str):
    assert checked_relative(path) == normalised


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("..", "path_escapes_root"),
        ("../a.jpg", "path_escapes_root"),
        ("coco/../../a.jpg", "path_escapes_root"),
        ("..\\a.jpg", "path_escapes_root"),
        ("coco\\..\\..\\a.jpg", "path_escapes_root"),
        ("/etc/passwd", "path_escapes_root"),
        ("//server/share/a.jpg", "path_escapes_root"),
        ("\\\\server\\share\\a.jpg", "path_escapes_root"),
        ("C:\\images\\a.jpg", "path_escapes_root"),
        ("c:a.jpg", "path_escapes_root"),
        ("http://example.org/a.jpg", "path_escapes_root"),
        ("gs://bucket/a.jpg", "path_escapes_root"),
        ("file:///etc/passwd", "path_escapes_root"),
        ("", "bad_path"),
        (".", "bad_path"),
        ("coco/..", "bad_path"),
        ("a\0.jpg", "bad_path"),
        ("a\udcff.jpg", "bad_path"),  # a file name that is not UTF-8
    ],
)
def test_a_path_that_leaves_the_root_or_names_nothing_is_refused(path: str, reason: str):
    with pytest.raises(Rejected) as refusal:
        checked_relative(path)
    assert refusal.value.reason == reason
    assert repr(path) in str(refusal.value)


@given(
    st.lists(st.sampled_from(["..", ".", "a", "", "\\", "c:", "b.jpg", "..."]), min_size=1, max_size=6),
    st.sampled_from("/\\"),
)
def test_what_is_accepted_stays_below_any_root(parts: list[str], separator: str):
    try:
        accepted = checked_relative(separator.join(parts))
    except Rejected:
        assume(False)
    joined = posixpath.normpath(posixpath.join("/some/root", accepted))
    assert joined.startswith("/some/root/") and joined == f"/some/root/{accepted}"


@pytest.mark.parametrize(
    ("path", "image_id"),
    [
        ("a.jpg", "a"),
        ("b.c/a.1.JPEG", "b.c/a.1"),  # dots in folders and in names stay
        ("b.png/a", "b.png/a"),
        ("a", "a"),
        ("frame.0001", "frame.0001"),  # a number, not an extension
        ("a.json", "a.json"),  # a sidecar of a.jpg is another file
        (".jpg", ".jpg"),
    ],
)
def test_an_image_id_is_a_path_without_its_image_extension(path: str, image_id: str):
    assert without_extension(path) == image_id


@pytest.mark.parametrize(("path", "stem"), [("b.c/a.gif", "b.c/a"), ("b.c/a", "b.c/a"), ("a.0001", "a.0001")])
def test_every_other_extension_is_tried_for_a_missing_file(path: str, stem: str):
    others = other_extensions(path)
    assert path not in others and {*others, path} == {*(stem + extension for extension in IMAGE_EXTENSIONS), path}
    assert others[0] == f"{stem}.jpg"


def test_a_file_may_lack_the_words_that_follow_its_id():
    assert list(image_names("aachen_000000_000019", "aachen_000000_000019_gtFine_leftImg8bit.png")) == [
        "aachen_000000_000019_gtFine_leftImg8bit.png",
        "aachen_000000_000019_leftImg8bit.png",
    ]
    assert list(image_names("1", "1_left.png")) == ["1_left.png"]  # the last word may not go: 1.png is another picture
    assert list(image_names("1", "12_a_b.png")) == ["12_a_b.png"]  # begins with the id by chance
