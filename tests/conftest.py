"""What the tests share: a hypothesis profile, the real photograph, and builders of tiny images, maps and rows."""

import gc
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from apache_beam.transforms import userstate
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from collavo.embedded import ASSETS
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from pipelines import local_workers
from schemas.categories import COCO_PANOPTIC
from schemas.crayon_row import CrayonRow, Segment

# Tensors here are tiny: threads that wait for one another cost more than they compute. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without it, the last bit of a product may depend on where in memory a matrix lies. A segmenter asks for it before it
# uses MKL, but here other tests have used MKL by then.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that names a model of the hub wants the refusal, without five attempts

# A build in the tests' own process stays in it, where it does not ask for workers: they would import all once more.
cores, local_workers.cores = local_workers.cores, lambda: 1
# Beam looks for state and timers in the signatures of all methods of every step, several times, which takes a third of
# a small build. No step has any, which test_graph checks. Builds in processes of their own do look.
state_and_timers, userstate.get_dofn_specs = userstate.get_dofn_specs, lambda dofn: (set(), set())

settings.register_profile("collavo", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("collavo")

REAL = Path(__file__).parents[2] / "shared" / "real"
"""One COCO photograph with its annotation and four LLaVA entries; absent from a plain checkout."""

needs_scenes_model = pytest.mark.skipif(
    not (ASSETS / "segmenter" / "model.safetensors").exists(), reason="the embedded segmenter has no weights here"
)
needs_tiny_base = pytest.mark.skipif(
    not (ASSETS / "tiny_base" / "model.safetensors").exists(), reason="the embedded base has no weights here"
)

PERSON, CAR, SCISSORS, SKY, GRASS = 0, 2, 76, 119, 125
"""Labels: two things with ordinary plurals, one counted in pairs, two stuff classes."""


def pytest_collection_finish() -> None:
    """Spare the garbage collector what torch, transformers and Beam made on import; it would walk it in every build."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def real() -> Path:
    if not REAL.is_dir():
        pytest.skip(f"needs the real photograph in {REAL}")
    return REAL


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """An image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def coco_png(ids: np.ndarray) -> bytes:
    """Segment ids as COCO's PNG, written channel by channel."""
    return encoded(Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)))


def segment(**changes: Any) -> Segment:
    """The only person in a picture, or whatever the changes make of it."""
    plain = {"id": 1, "label": PERSON, "box_xyxy": (0, 0, 10, 20), "area": 150, "numbering": 1, **changes}
    return Segment.of(COCO_PANOPTIC[plain.pop("label")], **plain)


def crayon_row(**changes: Any) -> CrayonRow:
    """A row without an image file worth the name."""
    plain: dict[str, Any] = {
        "image_id": "a.jpg",
        "image_sha256": "0" * 64,
        "image_bytes": b"jpeg",
        "image_path": "a.jpg",
        "width": 10,
        "height": 20,
        "sources": ("folder",),
        "license_id": None,
        "split": "train",
        "panoptic_png": b"png",
        "segments": (),
    }
    return CrayonRow(**{**plain, **changes})


@st.composite
def panoptic_maps(draw: st.DrawFn, max_side: int = 7, labels: tuple[int, ...] = tuple(range(133))) -> PanopticMap:
    """Segmented images of a few pixels; ids that spill into each channel of a COCO PNG, and crowds, are among them."""
    ids = draw(id_maps(max_side))
    infos = [
        SegmentInfo(int(id_), draw(st.sampled_from(labels)), is_crowd=draw(st.integers(0, 9)) == 9)
        for id_ in np.unique(ids[ids > 0])
    ]
    return build_panoptic_map(ids, infos)


def id_maps(max_side: int = 7) -> st.SearchStrategy[np.ndarray]:
    """uint32 id maps, down to one pixel high or wide."""
    sides = st.integers(1, max_side)
    some_ids = st.sampled_from([0, 1, 2, 3, 255, 256, 257, 65536, 0xFFFFFF])
    return arrays(np.uint32, st.tuples(sides, sides), elements=some_ids)
