"""The Panoptic-FPN segmenter, on tiny random weights; skipped where the optional detectron2 is not installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from collavo.errors import UserError

pytest.importorskip("detectron2", reason="detectron2 is an optional extra, built from source")

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.structures import Instances

from collavo.segmenters import load_segmenter
from collavo.segmenters.detectron2 import DEFAULT_CONFIG, Detectron2Segmenter, as_panoptic_map, label_tables
from schemas.categories import COCO_PANOPTIC

LABEL = {category.name: category.label for category in COCO_PANOPTIC}


def tiny_config() -> CfgNode:
    """Panoptic-FPN with a thin ResNet-18 that keeps what it finds, however unsure it is."""
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file(DEFAULT_CONFIG))
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    cfg.TEST.DETECTIONS_PER_IMAGE = 10
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = 0.01
    cfg.MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT = 30
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """A config file and a checkpoint for it."""
    folder = tmp_path_factory.mktemp("tiny_panoptic_fpn")
    cfg = tiny_config()
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model.pth")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml"), str(folder / "model.pth")


@pytest.mark.parametrize("data_set", ["coco_2017_val_panoptic_separated", "coco_2017_val_panoptic"])
def test_labels_follow_detectron2s_own_metadata(data_set):
    cfg = get_cfg()
    cfg.DATASETS.TEST = (data_set,)
    metadata, tables = MetadataCatalog.get(data_set), label_tables(cfg)
    assert sorted([*tables[True].values(), *tables[False].values()]) == list(range(133))
    for is_thing, names in ((True, metadata.thing_classes), (False, metadata.stuff_classes)):
        for class_id, label in tables[is_thing].items():
            assert COCO_PANOPTIC[label].is_thing == is_thing
            ours = {COCO_PANOPTIC[label].name, COCO_PANOPTIC[label].name.replace("-other", "").replace("-merged", "")}
            assert names[class_id] in ours
    if data_set.endswith("_separated"):
        assert metadata.stuff_classes[0] == "things"
        assert 0 not in tables[False]


def test_other_data_sets_are_refused():
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("cityscapes_fine_panoptic_val",)
    with pytest.raises(UserError, match=r"cityscapes_fine_panoptic_val.*COCO panoptic's 133 classes"):
        label_tables(cfg)


def test_combined_things_and_stuff_get_their_labels():
    """Boxes and stuff go through detectron2's own merging: a cat before grass, a toothbrush, and too little sky."""
    instances = Instances((20, 20))
    masks = torch.zeros(3, 20, 20)
    masks[0, 10:15, 2:8] = 1  # cat
    masks[1, 10:15, 2:8] = 1  # the same place again, as a dog: lost
    masks[2, 16:18, 10:19] = 1  # toothbrush
    instances.scores, instances.pred_masks = torch.tensor([0.9, 0.8, 0.7]), masks
    instances.pred_classes = torch.tensor([LABEL["cat"], LABEL["dog"], LABEL["toothbrush"]])
    grass, sky = LABEL["grass-merged"] - 79, LABEL["sky-other-merged"] - 79  # 1 is the first of the stuff
    semantic = torch.full((20, 20), grass)
    semantic[0], semantic[1:3] = sky, 0
    ids, infos = combine_semantic_and_instance_outputs(instances, semantic, 0.5, 50, 0.5)
    found = as_panoptic_map(ids.numpy(), infos, label_tables(tiny_config()))
    assert [(segment.label, segment.area) for segment in found.segments] == [
        (LABEL["cat"], 30),
        (LABEL["toothbrush"], 18),
        (LABEL["grass-merged"], 17 * 20 - 30 - 18),
    ]
    assert [segment.score and round(segment.score, 3) for segment in found.segments] == [0.9, 0.7, None]
    assert not found.index_map[:3].any()


def test_void_empty_and_unlisted_are_unlabelled():
    ids = np.array([[-1, 0, 3], [7, 7, 3]], dtype=np.int32)
    infos = [{"id": 7, "isthing": True, "category_id": 0}, {"id": 9, "isthing": False, "category_id": 1}]
    found = as_panoptic_map(ids, infos, label_tables(tiny_config()))
    assert found.index_map.tolist() == [[0, 0, 0], [1, 1, 0]]
    assert [(segment.id, segment.label) for segment in found.segments] == [(7, 0)]
    assert as_panoptic_map(ids, [], label_tables(tiny_config())).segments == ()


def test_images_go_through_as_detectron2s_predictor_sends_them(files):
    config, checkpoint = files
    segmenter = load_segmenter("detectron2", config=config, checkpoint=checkpoint, device="cpu")
    cfg = tiny_config()
    cfg.MODEL.WEIGHTS = checkpoint
    predictor = DefaultPredictor(cfg)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (*size_hw, 3), dtype=np.uint8) for size_hw in [(60, 80), (90, 50), (40, 200)]]
    maps = segmenter.segment(images)
    for image, panoptic in zip(images, maps, strict=True):
        ids, infos = predictor(image[:, :, ::-1])["panoptic_seg"]
        expected = as_panoptic_map(ids.numpy(), infos, label_tables(cfg))
        assert len(expected.segments) > 1
        assert panoptic.index_map.shape == image.shape[:2]
        assert np.array_equal(panoptic.index_map, expected.index_map)
        assert panoptic.segments == expected.segments
        assert segmenter.segment([image])[0].segments == panoptic.segments
    assert segmenter.facts["thresholds"]["min_stuff_area"] == 30
    assert segmenter.facts["checkpoint"] == checkpoint


def refusal(**arguments) -> str:
    with pytest.raises(UserError) as caught:
        Detectron2Segmenter(**arguments, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_loaded_is_refused_in_one_line(files, tmp_path):
    config, checkpoint = files
    assert "nothing.yaml" in refusal(config="nothing.yaml")
    assert "a GeneralizedRCNN, but PanopticFPN is needed" in refusal(
        config="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    )
    assert f"{tmp_path}/absent.pkl" in refusal(config=config, checkpoint=f"{tmp_path}/absent.pkl")
    weights = torch.load(checkpoint)
    del weights["model"]["sem_seg_head.predictor.bias"]
    torch.save(weights, tmp_path / "incomplete.pth")
    message = refusal(config=config, checkpoint=f"{tmp_path}/incomplete.pth")
    assert "1 weights are missing or have another shape, first sem_seg_head.predictor.bias" in message
    unweighted = tiny_config()
    unweighted.MODEL.WEIGHTS = ""
    Path(tmp_path, "unweighted.yaml").write_text(unweighted.dump())
    assert "name a checkpoint" in refusal(config=f"{tmp_path}/unweighted.yaml")
