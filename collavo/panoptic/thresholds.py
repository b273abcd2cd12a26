"""What a query of a mask-classification model must reach to become a segment: plain numbers, no torch."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class MaskThresholds:
    """The knobs of `collavo.panoptic.postprocess`; each has one meaning and none acts as another."""

    min_class_score: float
    """A query is kept where the softmax score of its best class is above this, and that class is not "no object"."""

    mask_probability: float
    """A pixel is in a query's own mask where the mask probability is above this; the rest is cut off."""

    overlap: float
    """A segment is kept where more than this fraction of its query's own mask was not lost to better queries."""

    min_area: int
    """Smallest segment in pixels of the target size, counted after fusing."""

    fuse_stuff: bool = True
    """All queries of one stuff class make one segment. Things are never fused."""

    like_transformers: bool = False
    """Compute as `post_process_panoptic_segmentation` of transformers 5.23 does, bit for bit: mask logits pass through
    384 x 384, `mask_probability` is compared with probability times class score, and regions are not cut: a pixel goes
    to the best query, however improbable."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}, but must be within 0 and 1")
        if self.min_area < 0:
            raise ValueError(f"min_area is {self.min_area} pixels, but must not be negative")


THRESHOLD_PRESETS = {
    # Scores and overlap with which Mask2Former's authors measured its published PQ on COCO. 16 pixels are two cells of
    # the mask logits (stride 4 of 768) in a 640 x 480 image.
    "default": MaskThresholds(min_class_score=0.8, mask_probability=0.5, overlap=0.8, min_area=16),
    # For the embedded segmenter and what is trained like it: a small network is less sure of what it is right about.
    # Tried on scenes of seed 5000011, which are neither trained nor reported on. An overlap of 0.5 has the best quality
    # by a tenth of a point; 0.4 finds more of what stands behind something, which counts and boxes are asked about.
    "scenes": MaskThresholds(min_class_score=0.3, mask_probability=0.4, overlap=0.4, min_area=16),
    # The call in CoLLaVO's release: threshold=0.5, mask_threshold=0.95, overlap left at 0.8, nothing fused.
    "paper": MaskThresholds(
        min_class_score=0.5, mask_probability=0.95, overlap=0.8, min_area=0, fuse_stuff=False, like_transformers=True
    ),
}
"""Named settings. `default` and `scenes` are ours; `paper` repeats the reference call, its spill and its score test
included."""
