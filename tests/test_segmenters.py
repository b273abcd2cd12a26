"""The factory and the segmenter of transformers, on tiny random weights. `test_detectron2.py` has the other one."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig, SwinModel
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from collavo.errors import Rejected, UserError
from collavo.panoptic.maps import PanopticMap
from collavo.panoptic.thresholds import THRESHOLD_PRESETS
from collavo.segmenters import Segmenter, load_segmenter
from collavo.segmenters.framing import Framing, resize
from collavo.segmenters.universal import UniversalSegmenter
from pretraining.familiarity import fit
from pretraining.segmenter import segmenter_config
from schemas.categories import COCO_PANOPTIC

COCO_NAMES = {category.label: category.name for category in COCO_PANOPTIC}
INPUT_HW = (96, 128)
THRESHOLDS = replace(THRESHOLD_PRESETS["default"], min_class_score=0.02, overlap=0.1, min_area=0)


def tiny_model(id2label: dict[int, str] = COCO_NAMES, width: int = 16) -> Mask2FormerForUniversalSegmentation:
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=width,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    names = ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward")
    sizes = dict.fromkeys(names, 2 * width)
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=backbone,
            encoder_layers=1,
            decoder_layers=3,
            num_attention_heads=2,
            num_queries=20,
            id2label=id2label,
            label2id={name: label for label, name in id2label.items()},
            **sizes,
        )
    )
    with torch.no_grad():  # as drawn, every query says nearly nothing of nearly everything
        model.class_predictor.weight.mul_(20)
        for parameter in model.model.transformer_module.decoder.mask_predictor.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny_mask2former")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def segmenter(checkpoint) -> Segmenter:
    return load_segmenter(
        "transformers", checkpoint=checkpoint, input_size=INPUT_HW, thresholds=THRESHOLDS, device="cpu"
    )


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    sizes_hw = [(50, 60), (90, 40), (33, 77), (96, 128), (1, 9)]
    coarse = [random.integers(0, 256, (4, 5, 3), dtype=np.uint8) for _ in sizes_hw]
    return [resize(image, size_hw) for image, size_hw in zip(coarse, sizes_hw, strict=True)]


def assert_same(one: PanopticMap, other: PanopticMap) -> None:
    assert np.array_equal(one.index_map, other.index_map)
    assert one.segments == other.segments


def test_every_image_gets_a_map_of_its_own_size(segmenter, images):
    maps = segmenter.segment(images)
    assert [panoptic.index_map.shape for panoptic in maps] == [image.shape[:2] for image in images]
    assert max(len(panoptic.segments) for panoptic in maps) > 2


def test_batch_of_one_equals_batch_of_many_in_any_order(segmenter, images):
    together = segmenter.segment(images)
    backwards = segmenter.segment(images[::-1])[::-1]
    for image, one, other in zip(images, together, backwards, strict=True):
        assert_same(segmenter.segment([image])[0], one)
        assert_same(one, other)
    assert segmenter.segment([]) == []


def test_filled_up_batches_give_each_image_its_own_map(segmenter, images, monkeypatch):
    """A GPU's way through `segment`, here on the CPU."""
    one_by_one = segmenter.segment(images)
    monkeypatch.setattr(segmenter, "_batch_size", 2)  # 5 images: the third batch is half filled
    for one, other in zip(one_by_one, segmenter.segment(images), strict=True):
        assert [segment.label for segment in one.segments] == [segment.label for segment in other.segments]
        assert (one.index_map == other.index_map).mean() > 0.999


def test_pixels_are_those_of_transformers_at_the_same_size():
    random = np.random.default_rng(1)
    processor = Mask2FormerImageProcessorPil(size={"height": 96, "width": 128}, do_pad=False)
    for size_hw in [(480, 640), (31, 47), (96, 128)]:
        image = random.integers(0, 256, (*size_hw, 3), dtype=np.uint8)
        theirs = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
        framing = Framing(INPUT_HW, None)
        ours = framing.normalise(torch.from_numpy(framing.pixels([image], 1)))
        assert torch.equal(ours, theirs)


def test_paper_preset_repeats_what_transformers_makes_of_an_image(checkpoint, images):
    paper = replace(THRESHOLD_PRESETS["paper"], min_class_score=0.02, mask_probability=0.02, overlap=0.1)
    segmenter = UniversalSegmenter(checkpoint, input_size=INPUT_HW, thresholds=paper, device="cpu")
    processor = Mask2FormerImageProcessorPil(size={"height": 96, "width": 128}, do_pad=False)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint).eval()
    for image in images[:3]:
        with torch.inference_mode():
            outputs = model(**processor(Image.fromarray(image), return_tensors="pt"))
        (theirs,) = processor.post_process_panoptic_segmentation(
            outputs,
            threshold=0.02,
            mask_threshold=0.02,
            overlap_mask_area_threshold=0.1,
            label_ids_to_fuse=(),
            target_sizes=[image.shape[:2]],
        )
        (ours,) = segmenter.segment([image])
        assert sorted(segment.label for segment in ours.segments) == sorted(
            info["label_id"] for info in theirs["segments_info"]
        )
        ids = np.array([0, *(segment.id for segment in ours.segments)])[ours.index_map]
        # transformers runs on oneDNN here, whose last bits are others.
        assert (ids == theirs["segmentation"].numpy()).mean() > 0.999


def embedded_architecture() -> Mask2FormerForUniversalSegmentation:
    """The embedded segmenter, untrained."""
    torch.manual_seed(0)
    return Mask2FormerForUniversalSegmentation(segmenter_config())


@pytest.mark.slow
@pytest.mark.parametrize("model", [partial(tiny_model, width=96), embedded_architecture], ids=["Swin", "ResNet"])
def test_twice_the_threads_do_not_change_a_bit(tmp_path, model):
    """Wide enough for threads to split the sums of a layer; in a process of its own, where nothing used MKL before."""
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    model().save_pretrained(tmp_path)
    code = f"""
import numpy as np, torch
from collavo.segmenters.universal import UniversalSegmenter, queries_of
segmenter = UniversalSegmenter({str(tmp_path)!r}, input_size=128, device="cpu")
image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
results = []
for threads in (1, 2, 4):
    torch.set_num_threads(threads)
    results.append(queries_of(segmenter.outputs([image])))
assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
"""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Backbone" not in run.stderr and "Warning" not in run.stderr


def test_a_checkpoint_may_tell_the_size_it_was_trained_at_and_be_stored_in_half_precision(tmp_path, images):
    model = tiny_model().half()
    model.config.input_size_hw = INPUT_HW
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")  # the same numbers, stored wider
    half, whole = (
        UniversalSegmenter(str(tmp_path / name), thresholds=THRESHOLDS, device="cpu") for name in ("half", "whole")
    )
    assert half.facts["input_size_hw"] == list(INPUT_HW)
    assert UniversalSegmenter(str(tmp_path / "half"), input_size=64, device="cpu").facts["input_size_hw"] == [64, 64]
    for one, other in zip(half.segment(images), whole.segment(images), strict=True):
        assert_same(one, other)


def test_facts_say_what_is_needed_to_repeat_a_run(segmenter, checkpoint):
    facts = json.loads(json.dumps(segmenter.facts))
    assert facts["checkpoint"] == checkpoint
    assert facts["input_size_hw"] == [96, 128]
    assert facts["thresholds"]["min_class_score"] == 0.02
    assert (facts["device"], facts["dtype"], facts["batch_size"]) == ("cpu", "float32", 1)
    assert facts["versions"]["torch"] == torch.__version__


def refusal(checkpoint: str | Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        UniversalSegmenter(str(checkpoint), device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_names_of_a_checkpoint_say_what_its_numbers_mean(checkpoint, tmp_path, images):
    tiny_model({**COCO_NAMES, 3: "airplane", 4: "motorcycle"}).save_pretrained(tmp_path / "swapped")
    plain, swapped = (
        UniversalSegmenter(str(path), input_size=INPUT_HW, thresholds=THRESHOLDS, device="cpu")
        for path in (checkpoint, tmp_path / "swapped")
    )
    assert swapped.categories is COCO_PANOPTIC
    renamed = {3: 4, 4: 3}
    for one, other in zip(plain.segment(images), swapped.segment(images), strict=True):
        expected = sorted(renamed.get(segment.label, segment.label) for segment in one.segments)
        assert sorted(segment.label for segment in other.segments) == expected


def test_classes_that_are_counted_from_one_are_refused_and_not_shifted(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"] = {int(label) + 1: name for label, name in config["id2label"].items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "'rug-merged' has number 133, but the network numbers its 133 classes from 0" in refusal(tmp_path)


def test_classes_of_which_nobody_knows_the_things_are_refused(tmp_path):
    tiny_model({0: "cat", 1: "unicorn"}).save_pretrained(tmp_path)
    assert "does not say which of them are things; --categories" in refusal(tmp_path)


def test_other_architectures_are_refused(tmp_path):
    SwinModel(SwinConfig(embed_dim=16, depths=[1], num_heads=[1])).save_pretrained(tmp_path)
    assert "a swin model, but one of detr, eomt, " in refusal(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("num_queries", "100"), ("backbone_config", {"model_type": "nope"})])
def test_a_configuration_that_makes_no_model_is_refused(checkpoint, tmp_path, field, value):
    config = json.loads(Path(checkpoint, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    (tmp_path / "model.safetensors").symlink_to(Path(checkpoint, "model.safetensors").resolve())
    assert re.search(r"config.json makes no model: \w+: .*(num_queries|nope)", refusal(tmp_path))


@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_missing_weights_are_refused_and_not_drawn_at_random(checkpoint, tmp_path, fault):
    weights = load_file(f"{checkpoint}/model.safetensors")
    bias = weights.pop("class_predictor.bias")
    if fault == "of another shape":
        weights["class_predictor.bias"] = bias[:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes(Path(checkpoint, "config.json").read_bytes())
    assert "1 weights are missing or have another shape, first class_predictor.bias" in refusal(tmp_path)


def test_pickled_weights_are_not_read(checkpoint, tmp_path):
    torch.save(load_file(f"{checkpoint}/model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes(Path(checkpoint, "config.json").read_bytes())
    assert "model.safetensors" in refusal(tmp_path)


def test_damaged_weights_are_refused(checkpoint, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(Path(checkpoint, "model.safetensors").read_bytes()[:1000])
    (tmp_path / "config.json").write_bytes(Path(checkpoint, "config.json").read_bytes())
    assert str(tmp_path) in refusal(tmp_path)


def test_missing_checkpoint_names_the_flag_and_what_would_work(tmp_path, monkeypatch):
    assert "there is no such folder" in refusal(tmp_path / "absent")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal("facebook/mask2former-swin-large-coco-panoptic")
    assert message.startswith("facebook/mask2former-swin-large-coco-panoptic: ")
    assert "a folder that holds config.json and model.safetensors" in message
    assert "scenes, the embedded one, knows drawn scenes only" in message


@pytest.mark.parametrize("input_size", [100, (96, 100), 0, (-32, 32)])
def test_input_sizes_off_the_grid_are_refused(checkpoint, input_size):
    assert "input size" in refusal(checkpoint, input_size=input_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA has nothing to refuse")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda_is_an_error_and_not_a_slow_run(checkpoint, device):
    with pytest.raises(UserError, match=rf"{device}: .* finds 0 CUDA devices"):
        UniversalSegmenter(checkpoint, device=device)


def test_overflow_is_an_error_and_not_an_image_without_objects(checkpoint, images):
    segmenter = UniversalSegmenter(checkpoint, input_size=INPUT_HW, device="cpu")
    with torch.no_grad():
        segmenter._model.class_predictor.weight.fill_(float("inf"))
    with pytest.raises(Rejected, match="class logits are not finite"):
        segmenter.segment(images[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_are_filled_up_so_that_company_changes_nothing(checkpoint, images):
    segmenter = UniversalSegmenter(checkpoint, input_size=INPUT_HW, thresholds=THRESHOLDS, device="cuda", batch_size=4)
    together = segmenter.segment(images)
    for image, panoptic in zip(images, together, strict=True):
        assert_same(segmenter.segment([image])[0], panoptic)


def test_a_picture_odd_in_one_feature_is_familiar_and_one_odd_in_many_is_not():
    torch.manual_seed(0)
    known = torch.randn(400, 200) @ torch.randn(200, 200).div(10)
    familiarity = fit(known[:200], known[200:], share=0.01)
    assert int((familiarity.distances(known[200:]) > 1).sum()) == 2
    spread = known.std(0)
    odd_in_one, odd_in_many = known[:1].clone(), known[:1] + 3 * spread * torch.tensor([1.0, -1.0]).repeat(100)
    odd_in_one[0, 7] += 100 * spread[7]
    assert (familiarity.distances(torch.cat([odd_in_one, odd_in_many])) > 1).tolist() == [False, True]
