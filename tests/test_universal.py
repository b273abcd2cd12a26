"""Every family of networks through the one segmenter: its input, its outputs, and what transformers makes of them."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image
from torch.nn import functional
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil
from transformers.models.oneformer.image_processing_pil_oneformer import OneFormerImageProcessorPil
from universal import FAMILIES, save_checkpoint

from collavo.categories import joined
from collavo.errors import UserError
from collavo.images import decode_rgb
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.scenes import draw_scene
from collavo.segmenters import checkpoint_categories
from collavo.segmenters.framing import Framing, framing_of, resize
from collavo.segmenters.universal import UniversalSegmenter, queries_of
from schemas.categories import COCO_PANOPTIC, name_key

PROCESSORS = {
    "mask2former": Mask2FormerImageProcessorPil,
    "maskformer": MaskFormerImageProcessorPil,
    "oneformer": OneFormerImageProcessorPil,
    "detr": DetrImageProcessorPil,
    "eomt": EomtImageProcessorPil,
    "eomt_dinov3": EomtImageProcessorPil,
}
OURS = replace(THRESHOLD_PRESETS["default"], min_class_score=0.3, overlap=0.1, min_area=0)
PAPER = replace(THRESHOLD_PRESETS["paper"], min_class_score=0.3, mask_probability=0.3, overlap=0.1)
SIZES_HW = [(60, 80), (150, 90), (64, 64), (33, 177)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {family: save_checkpoint(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    scene = draw_scene(7, (320, 240)).image
    photographs = [decode_rgb(file.read_bytes()) for file in REAL.glob("coco/images/*.jpg")]  # none in a plain checkout
    return [*(resize(scene, size_hw) for size_hw in SIZES_HW), *photographs]


def processor_of(family: str, folder: Path) -> Any:
    # A OneFormer's would download a list of classes, which only its training needs.
    without_list = {"class_info_file": None} if family == "oneformer" else {}
    return PROCESSORS[family].from_pretrained(folder, **without_list)


def decisive(outputs: Any, seed: int, names: dict[int, str]) -> Any:
    """Outputs of the same kind and shapes, of queries that are sure of a class and of a region with soft edges.

    No query is of a class without a name: for transformers that is a class like others, for us it is none.
    """
    random = torch.Generator().manual_seed(seed)
    classes, masks = queries_of(outputs)
    classes.copy_(6 * torch.randn(classes.shape, generator=random))
    classes[..., [label for label, name in names.items() if name_key(name) not in COCO_PANOPTIC.by_key]] = -20
    coarse = 9 * torch.randn((*masks.shape[:2], 4, 4), generator=random)
    masks.copy_(functional.interpolate(coarse, size=masks.shape[2:], mode="bilinear"))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_sees_what_its_own_processor_makes_of_a_picture(family, checkpoints, images, monkeypatch):
    segmenter = UniversalSegmenter(str(checkpoints[family]), device="cpu")
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(segmenter, "_model", lambda pixel_values, **_: seen.append(pixel_values))
    task = {"task_inputs": ["panoptic"]} if family == "oneformer" else {}
    processor = processor_of(family, checkpoints[family])
    for image in images:
        segmenter.outputs([image])
        theirs = processor(Image.fromarray(image), return_tensors="pt", **task)["pixel_values"]
        torch.testing.assert_close(seen.pop(), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_those_of_the_processor_of_the_family(family, checkpoints, images, monkeypatch):
    padded = family.startswith("eomt")
    thresholds = OURS if padded else PAPER
    segmenter = UniversalSegmenter(str(checkpoints[family]), thresholds=thresholds, device="cpu")
    plain = segmenter.outputs
    # A OneFormer's function is a MaskFormer's, but needs torchvision.
    processor = processor_of("maskformer" if family == "oneformer" else family, checkpoints[family])
    limits = {
        "threshold": thresholds.min_class_score,
        "mask_threshold": thresholds.mask_probability,
        "overlap_mask_area_threshold": thresholds.overlap,
    }
    fused = [category.label for category in COCO_PANOPTIC if not category.is_thing]
    fusing = {"stuff_classes": fused} if padded else {"label_ids_to_fuse": ()}
    names = segmenter._model.config.id2label
    found = 0
    for seed, image in enumerate(images):
        with torch.inference_mode():
            outputs = decisive(plain([image]), seed, names)
        monkeypatch.setattr(segmenter, "outputs", lambda *_, outputs=outputs, **__: outputs)
        (ours,) = segmenter.segment([image])
        (theirs,) = processor.post_process_panoptic_segmentation(
            outputs, target_sizes=[image.shape[:2]], **limits, **fusing
        )
        found += len(ours.segments)
        assert sorted(segment.category for segment in ours.segments) == sorted(
            COCO_PANOPTIC.by_key[name_key(names[info["label_id"]])].display_name for info in theirs["segments_info"]
        )
        assert _agreement(ours, theirs["segmentation"].numpy(), theirs["segments_info"], names) > (
            0.97 if padded else 0.999
        )
    assert found > 2 * len(images)


def _agreement(ours: PanopticMap, theirs: np.ndarray, infos: list[dict[str, Any]], names: dict[int, str]) -> float:
    """The share of pixels that carry the same class, or none, in both."""
    labels = np.full(int(theirs.max()) + 2, -1)
    for info in infos:
        labels[info["id"]] = COCO_PANOPTIC.by_key[name_key(names[info["label_id"]])].label
    labels[-1] = -1  # EoMT's number of no segment
    own = np.array([-1, *(segment.label for segment in ours.segments)])[ours.index_map]
    return float((own == labels[theirs]).mean())


def test_company_changes_nothing_where_each_picture_has_a_size_of_its_own(checkpoints, images):
    segmenter = UniversalSegmenter(str(checkpoints["detr"]), thresholds=OURS, device="cpu", batch_size=4)
    together = segmenter.segment(images)
    for image, one in zip(images, together, strict=True):
        (alone,) = segmenter.segment([image])
        assert one.index_map.shape == image.shape[:2] and np.array_equal(one.index_map, alone.index_map)


def test_a_oneformer_that_was_saved_in_training_asks_for_no_texts(checkpoints, images, tmp_path):
    folder = shutil.copytree(checkpoints["oneformer"], tmp_path / "oneformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_training": True}))
    found, expected = (
        UniversalSegmenter(str(each), thresholds=OURS, device="cpu").segment(images[:1])[0]
        for each in (folder, checkpoints["oneformer"])
    )
    assert np.array_equal(found.index_map, expected.index_map)


def test_padding_is_no_part_of_a_map(checkpoints, images, monkeypatch):
    """A query that claims the lower right corner of the input finds nothing there but padding."""
    segmenter = UniversalSegmenter(str(checkpoints["eomt"]), thresholds=OURS, device="cpu")
    wide = images[3]
    with torch.inference_mode():
        outputs = segmenter.outputs([wide])
        classes, masks = queries_of(outputs)
        classes.fill_(-9)[0, :2, :2] = 9 * torch.eye(2)
        masks.fill_(-9)[0, 0, -4:, -4:] = 9
        masks[0, 1, :, : masks.shape[3] // 2] = 9
    monkeypatch.setattr(segmenter, "outputs", lambda *_, **__: outputs)
    ((half,),) = (panoptic.segments for panoptic in segmenter.segment([wide]))
    assert half.category == COCO_PANOPTIC[1].display_name
    assert half.box_xyxy == pytest.approx((0, 0, wide.shape[1] / 2, wide.shape[0]), abs=1)


def mask2former(classes: int, first: str) -> dict[str, Any]:
    return {"model_type": "mask2former", "num_labels": classes, "id2label": {0: first}}


@pytest.mark.parametrize(
    ("model", "processor", "framing"),
    [
        (mask2former(133, "person"), None, Framing(None, (800, 1333), 32)),
        (mask2former(133, "person"), {"size": {"height": 384, "width": 384}}, Framing(None, (800, 1333), 32)),
        (mask2former(150, "wall"), {"size": {"height": 384, "width": 384}}, Framing(None, (640, 2560), 32)),
        (mask2former(19, "road"), None, Framing(None, (1024, 2048), 32)),
        (mask2former(65, "Bird"), {"size": {"height": 384, "width": 384}}, Framing(None, (2048, 2048), 32)),
        # What transformers' example of fine-tuning writes for classes of one's own.
        (mask2former(2, "cat"), {"size": {"height": 384, "width": 384}}, Framing((384, 384), None, 32)),
        (mask2former(8, "weed"), {"size": {"height": 384, "width": 384}}, Framing((384, 384), None, 32)),
        (mask2former(2, "cat"), None, Framing(None, (800, 1333), 32)),
        (mask2former(19, "road"), {"size": {"height": 512, "width": 512}}, Framing((512, 512), None, 32)),
        (mask2former(133, "person"), {"size": {"height": 512, "width": 512}}, Framing((512, 512), None, 32)),
        (mask2former(133, "person"), {"size": {"height": 500, "width": 500}}, Framing((512, 512), None, 32)),
        ({"model_type": "detr"}, {"size": {"height": 500, "width": 500}}, Framing((500, 500), None, 1)),
        ({"model_type": "detr", "input_size_hw": [500, 500]}, None, Framing((500, 500), None, 1)),
        ({"model_type": "detr"}, {"size": {"max_height": 480, "max_width": 480}}, Framing(None, (480, 480), 1)),
        ({"model_type": "detr", "input_size_hw": [64, 96]}, {"do_resize": False}, Framing((64, 96), None, 1)),
        ({"model_type": "maskformer"}, {"image_mean": [0.5] * 3}, Framing(None, (800, 1333), 32, (0.5,) * 3)),
        ({"model_type": "mask2former", "input_size_hw": [64, 96]}, None, Framing((64, 96), None, 32)),
        ({"model_type": "maskformer"}, {"size": 640, "max_size": 2560, "size_divisibility": 32},
            Framing(None, (640, 2560), 32)),
        ({"model_type": "oneformer"}, {"size": 800, "image_processor": {"size": {"shortest_edge": 640}}},
            Framing(None, (640, None), 1)),
        ({"model_type": "detr"}, {"size": [500, 600], "image_mean": 0.5, "image_std": 0.5, "rescale_factor": 2 / 255},
            Framing((500, 600), None, 1, (0.25,) * 3, (0.25,) * 3)),
        ({"model_type": "detr"}, {"size": {"shortest_edge": 800, "longest_edge": 1333}, "do_normalize": False},
            Framing(None, (800, 1333), 1, (0.0,) * 3, (1.0,) * 3)),
        ({"model_type": "eomt", "image_size": 640}, {"size": {"shortest_edge": 512}}, Framing((640, 640), (640, 640))),
    ],
)  # fmt: skip
def test_the_way_of_a_checkpoint(model, processor, framing, tmp_path):
    if processor:  # what OneFormerProcessor saves goes before a file that an older transformers left there
        whole = {"image_processor": processor.get("image_processor")}
        (tmp_path / "processor_config.json").write_text(json.dumps(whole))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8-sig")
    assert framing_of(SimpleNamespace(**model), tmp_path) == framing


@pytest.mark.parametrize(
    ("processor", "line"),
    [
        ({"size": {"longest_edge": 800}}, r"size is {'longest_edge': 800}, which says no shape; use height and width"),
        ({"size": {"max_height": 480, "max_width": 640}}, r"which says no shape"),
        ({"size": {"shortest_edge": 800}, "do_resize": False}, r"says do_resize false, so pictures were prepared"),
        ({"do_resize": False, "do_rescale": False, "do_normalize": False}, r"; say how in preprocessor_config\.json"),
        ({"size": {"height": 64, "width": 64}, "do_rescale": False}, r"says do_rescale false"),
    ],
)
def test_a_processor_that_does_not_say_what_a_network_sees_is_refused(processor, line, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(UserError, match=line):
        framing_of(SimpleNamespace(model_type="detr"), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_description_that_was_damaged_by_hand_is_refused_in_one_line(name, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["detr"], tmp_path / "detr")
    (folder / name).write_text('{"id2label": {"0": "cat",}}')
    with pytest.raises(UserError, match=rf"{name}\W+(not JSON|[^\n]*not a valid JSON)"):
        UniversalSegmenter(str(folder), device="cpu")
    with pytest.raises(UserError, match=rf"{name}: not JSON") if name == "config.json" else nullcontext():
        checkpoint_categories("transformers", str(folder))


@pytest.mark.parametrize("family", ["detr", "eomt"])
def test_a_picture_thinner_than_a_pixel_at_the_networks_size_has_a_map(family, checkpoints):
    segmenter = UniversalSegmenter(str(checkpoints[family]), thresholds=OURS, device="cpu")
    for size_hw in ((1, 900), (900, 1)):
        (found,) = segmenter.segment([np.full((*size_hw, 3), 90, np.uint8)])
        assert found.index_map.shape == size_hw


def test_a_network_of_fixed_positions_refuses_other_sizes(checkpoints):
    with pytest.raises(UserError, match="input size 32 x 32: this network sees 64 x 64 pixels and no other size"):
        UniversalSegmenter(str(checkpoints["eomt"]), input_size=32, device="cpu")
    assert UniversalSegmenter(str(checkpoints["detr"]), input_size=32, device="cpu").facts["input_size_hw"] == [32, 32]


def test_a_network_whose_numbers_have_gaps_has_the_classes_that_it_names(checkpoints, tmp_path):
    assert joined(checkpoint_categories("transformers", str(checkpoints["detr"]))[0]) is COCO_PANOPTIC
    save_checkpoint("detr", tmp_path, {0: "N/A", 1: "car", 2: "LABEL_2", 3: "sky-other-merged", 4: "unicorn"})
    with pytest.raises(UserError, match="names 3 classes"):
        checkpoint_categories("transformers", str(tmp_path))


def test_a_oneformer_without_words_for_its_task_is_refused(checkpoints, tmp_path):
    for file in checkpoints["oneformer"].iterdir():
        if "token" not in file.name:
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(UserError, match="its tokenizer is missing"):
        UniversalSegmenter(str(tmp_path), device="cpu")


def test_a_detr_that_needs_timm_says_so(checkpoints, tmp_path):
    config = json.loads((checkpoints["detr"] / "config.json").read_text())
    config["backbone_config"] = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [1, 2, 3, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(checkpoints["detr"] / "model.safetensors")
    with pytest.raises(UserError, match="timm"):
        UniversalSegmenter(str(tmp_path), device="cpu")
