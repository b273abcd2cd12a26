"""Panoptic-FPN through detectron2, an alternative to the networks of transformers.

Optional: detectron2 is on no package index and has to be built from source, see `INSTALL`.

The weights of its model zoo are Python pickles, and loading a pickle can run code: use zoo weights or your own files
only. Configs are read as plain YAML; detectron2 itself would run code in them.

Images run one by one, resized as by detectron2's own predictor, so that no image is padded to the size of another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collavo.device import device_name, move_to_device, resolve_device
from collavo.errors import UserError
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from schemas.categories import COCO_PANOPTIC, CategorySet

INSTALL = (
    'pip install torchvision "setuptools<81" && pip install --no-build-isolation "detectron2 @ '
    'git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833"'
)

try:
    import detectron2
    from detectron2 import model_zoo
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import MetadataCatalog
    from detectron2.data.transforms import ResizeShortestEdge
    from detectron2.modeling import build_model
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
    raise UserError(f"detectron2 cannot be imported ({error}); install it with: {INSTALL}") from error

DEFAULT_CONFIG = "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml"


class Detectron2Segmenter:
    """A COCO Panoptic-FPN as a `collavo.segmenters.Segmenter`; stuff has no scores."""

    categories = COCO_PANOPTIC

    def __init__(
        self,
        config: str = DEFAULT_CONFIG,
        *,
        checkpoint: str | None = None,
        device: str = "auto",
        categories: CategorySet | None = None,
        category_map: Mapping[str, str] | None = None,
    ) -> None:
        """Load the weights and move them to the device.

        Args:
            config: a name in detectron2's model zoo, or a YAML file.
            checkpoint: file or URL of the weights; None for the zoo's, or those that the YAML file names.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            categories, category_map: the set that maps are made in, which has to be COCO panoptic's.

        Raises:
            UserError: if config or checkpoint is missing, incomplete, no Panoptic-FPN or not of COCO, or the device is
                missing or too small.
        """
        if categories is not None and not COCO_PANOPTIC.is_subset_of(categories):
            raise UserError(
                f"detectron2's Panoptic-FPN knows {COCO_PANOPTIC.name}'s classes, not those of {categories.name}"
            )
        self._device = resolve_device(device)
        cfg = _load_config(config, checkpoint)
        self._label_of = label_tables(cfg)
        self._model = _load_model(cfg)
        move_to_device(self._model, self._device)
        self._is_bgr = cfg.INPUT.FORMAT == "BGR"
        self._resizing = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        self.facts: dict[str, Any] = {
            "segmenter": "detectron2",
            "config": config,
            "checkpoint": cfg.MODEL.WEIGHTS,
            "short_side": cfg.INPUT.MIN_SIZE_TEST,
            "max_long_side": cfg.INPUT.MAX_SIZE_TEST,
            "thresholds": {
                "min_instance_score": combine.INSTANCES_CONFIDENCE_THRESH,
                "max_overlap": combine.OVERLAP_THRESH,
                "min_stuff_area": combine.STUFF_AREA_LIMIT,
            },
            "device": device_name(self._device),
            "dtype": "float32",
            "batch_size": 1,
            "versions": {"torch": torch.__version__, "detectron2": detectron2.__version__},
        }

    def segment(self, images: Sequence[np.ndarray]) -> list[PanopticMap]:
        """Segment uint8 RGB arrays [height, width, 3] of any sizes; see `Segmenter.segment`."""
        return [self._segment_one(image) for image in images]

    @torch.inference_mode()
    def _segment_one(self, image: np.ndarray) -> PanopticMap:
        height, width = image.shape[:2]
        oriented = image[:, :, ::-1] if self._is_bgr else image
        resized = self._resizing.get_transform(oriented).apply_image(oriented)
        pixels = torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1))
        (result,) = self._model([{"image": pixels, "height": height, "width": width}])
        ids, segments_info = result["panoptic_seg"]
        return as_panoptic_map(ids.cpu().numpy(), segments_info, self._label_of)


def as_panoptic_map(
    ids: np.ndarray, segments_info: Sequence[dict[str, Any]], label_of: dict[bool, dict[int, int]]
) -> PanopticMap:
    """Make a map of detectron2's result: segments that are listed and have pixels; all other pixels are unlabelled.

    Args:
        ids: integer [height, width], the first half of detectron2's `panoptic_seg`.
        segments_info: the second half.
        label_of: see `label_tables`.
    """
    present = set(np.unique(ids).tolist())
    infos = [
        SegmentInfo(info["id"], label_of[info["isthing"]][info["category_id"]], score=info.get("score"))
        for info in segments_info
        if info["id"] in present
    ]
    return build_panoptic_map(np.where(np.isin(ids, [info.id for info in infos]), ids, 0), infos)


def _load_config(config: str, checkpoint: str | None) -> CfgNode:
    cfg = get_cfg()
    is_file = Path(config).is_file()
    try:
        cfg.merge_from_file(config if is_file else model_zoo.get_config_file(config), allow_unsafe=False)
        zoo_weights = None if is_file or checkpoint else model_zoo.get_checkpoint_url(config)
    except Exception as error:  # RuntimeError, KeyError, YAML's own
        reason = " ".join(str(error).split())
        raise UserError(f"{config}: {reason}; use a YAML file or a model zoo name such as {DEFAULT_CONFIG}") from error
    cfg.MODEL.WEIGHTS = checkpoint or zoo_weights or cfg.MODEL.WEIGHTS
    cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        raise UserError(
            f"{config}: a {cfg.MODEL.META_ARCHITECTURE}, but PanopticFPN is needed, such as {DEFAULT_CONFIG}"
        )
    if not cfg.MODEL.WEIGHTS:
        raise UserError(f"{config}: names no weights; give them with --segmenter_checkpoint")
    return cfg


def label_tables(cfg: CfgNode) -> dict[bool, dict[int, int]]:
    """Map detectron2's own class ids to labels, for things (True) and for stuff (False).

    detectron2 counts things and stuff apart: things are 0..79. In the "separated" data sets that Panoptic-FPN is
    trained on, stuff is 1..53, because stuff class 0 means all things together; in other data sets it is 80..132. The
    data set's metadata holds a table from COCO's category ids to the class ids.

    Raises:
        UserError: if the classes are not COCO panoptic's.
    """
    data_set = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    metadata = MetadataCatalog.get(data_set)
    tables = {}
    for is_thing, kind in ((True, "thing"), (False, "stuff")):
        listed: dict[int, int] = getattr(metadata, f"{kind}_dataset_id_to_contiguous_id", {})
        class_ids = {category_id: class_id for category_id, class_id in listed.items() if category_id != 0}
        if class_ids.keys() != {category.category_id for category in COCO_PANOPTIC if category.is_thing == is_thing}:
            raise UserError(
                f"its DATASETS.TEST is {data_set!r}, but COCO panoptic's 133 classes are "
                "needed, as in coco_2017_val_panoptic_separated"
            )
        tables[is_thing] = {
            class_id: COCO_PANOPTIC.by_category_id[category_id].label for category_id, class_id in class_ids.items()
        }
    return tables


class _Checkpointer(DetectionCheckpointer):
    """Record which weights a checkpoint did not set; detectron2 only logs them."""

    absent: Sequence[str] = ()

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        self.absent = [*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)]
        return incompatible


def _load_model(cfg: CfgNode) -> torch.nn.Module:
    model = build_model(cfg)
    checkpointer = _Checkpointer(model)
    try:
        checkpointer.load(cfg.MODEL.WEIGHTS)
    except Exception as error:  # network, file system and pickle raise a dozen types
        reason = " ".join(str(error).split())
        raise UserError(
            f"{cfg.MODEL.WEIGHTS}: {type(error).__name__}: {reason}; use a .pkl or .pth file "
            "with weights for this config, or a URL that can be reached from here"
        ) from error
    if checkpointer.absent:
        raise UserError(
            f"{cfg.MODEL.WEIGHTS}: {len(checkpointer.absent)} weights are missing or have "
            f"another shape, first {checkpointer.absent[0]}; use weights trained with this config"
        )
    return model.eval()
