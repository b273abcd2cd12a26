"""Thresholds that a query of a mask-classification model must reach to become a segment."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class MaskThresholds:
    """The settings of `collavo.panoptic.postprocess`."""

    min_class_score: float
    """A query is kept if its best class is not "no object" and has a softmax score above this."""

    mask_probability: float
    """A pixel belongs to a query's own mask if its mask probability is above this; all other pixels are cut off."""

    overlap: float
    """A segment is kept if its query won more than this fraction of its own mask."""

    min_area: int
    """Smallest segment in pixels of the target size, counted after fusing."""

    fuse_stuff: bool = True
    """All queries of one stuff class make one segment. Things are never fused."""

    like_transformers: bool = False
    """Compute as `post_process_panoptic_segmentation` of transformers does, bit for bit with a Mask2Former: its mask
    logits are first resized to 384 x 384, `mask_probability` is compared with probability times class score, and masks
    are not cut off: a pixel goes to the best query, however improbable."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not 0 <= value <= 1:
                raise ValueError(f"{field.name} is {value}, but must be within 0 and 1")
        if self.min_area < 0:
            raise ValueError(f"min_area is {self.min_area} pixels, but must not be negative")


THRESHOLD_PRESETS = {
    # With these scores and overlap, Mask2Former's authors measured its published quality on COCO. 16 pixels are two
    # cells of the mask logits (stride 4 of 768) in a 640 x 480 image.
    "default": MaskThresholds(min_class_score=0.8, mask_probability=0.5, overlap=0.8, min_area=16),
    # For the embedded segmenter and others like it: a small network has lower scores where it is right. Chosen on
    # scenes of seed 5000011, on which nothing is trained or reported. An overlap of 0.5 has a better quality by a tenth
    # of a point; 0.4 finds more objects behind others, and questions of counts and boxes need those.
    "scenes": MaskThresholds(min_class_score=0.3, mask_probability=0.4, overlap=0.4, min_area=16),
    # The call in CoLLaVO's release: threshold=0.5, mask_threshold=0.95, overlap left at 0.8, nothing fused.
    "paper": MaskThresholds(
        min_class_score=0.5, mask_probability=0.95, overlap=0.8, min_area=0, fuse_stuff=False, like_transformers=True
    ),
}
"""Named settings. `default` and `scenes` are ours; `paper` repeats the call of the authors' code in all respects."""
