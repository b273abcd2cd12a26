"""A segmenter for one's own classes: what it learns from, that it goes on after a stop, how it is judged and used."""

import json
import os
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import hotcoco.panoptic
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builds import build, tiny_mask2former
from conftest import CAR, GRASS, PERSON, SKY, crayon_row, encoded, needs_scenes_model
from PIL import Image
from safetensors.torch import load_file
from tiny_model import write_crayon_file
from universal import FAMILIES, save_checkpoint

import collavo.train_segmenter
from collavo.categories import joined
from collavo.dataset import category_set, find_files, read_rows
from collavo.errors import UserError
from collavo.panoptic.index_png import encode_index_map
from collavo.panoptic.maps import PanopticMap, SegmentInfo, build_panoptic_map
from collavo.panoptic.quality import PanopticQuality
from collavo.segmenter_training import finetuning
from collavo.segmenter_training.finetuning import (
    Learner,
    SegmentedRows,
    Steps,
    example_of,
    framing_at,
    network_for,
    take_steps,
)
from collavo.segmenter_training.judging import open_for
from collavo.segmenter_training.saving import save_network
from collavo.segmenters import checkpoint_categories, load_segmenter
from collavo.segmenters.framing import Framing
from collavo.segmenters.universal import UniversalSegmenter, open_network
from schemas.categories import COCO_PANOPTIC, LEFT_OUT, CategorySet

OWN = CategorySet.from_records(
    "own",
    [{**COCO_PANOPTIC.as_records()[label], "id": 7 * place} for place, label in enumerate((SKY, CAR, GRASS))],
)
"""Three classes of COCO's in another order, with other ids."""


def command(*words: object) -> int:
    return collavo.train_segmenter.main([*map(str, words)])


def rows_of(categories: CategorySet, shown: tuple[int, ...] = (0, 1, 2)) -> SegmentedRows:
    return SegmentedRows((), categories, None, shown=frozenset(shown))


def blocks_map(random: np.random.Generator, labels: tuple[int, ...], with_crowd: bool = True) -> PanopticMap:
    """A map of 40 x 60 pixels out of blocks, some of them unknown, one of them a crowd."""
    ids = np.kron(random.integers(0, 6, (4, 6)), np.ones((10, 10), int))
    present = [int(i) for i in np.unique(ids) if i]
    return build_panoptic_map(
        ids, [SegmentInfo(i, int(random.choice(labels)), is_crowd=with_crowd and i == present[0]) for i in present]
    )


def test_quality_is_that_of_panopticapi(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ours = PanopticQuality(COCO_PANOPTIC)
    annotations: dict[str, list[dict]] = {"truth": [], "found": []}
    for number in range(30):
        truth = blocks_map(random, (PERSON, CAR, SKY))
        found = truth if number % 3 == 0 else blocks_map(random, (PERSON, CAR, SKY), with_crowd=False)
        found = build_panoptic_map(
            np.roll(found.index_map, 2, axis=0).astype(int),
            [SegmentInfo(place, segment.label) for place, segment in enumerate(found.segments, start=1)],
        )
        ours.add(truth, found)
        for name, panoptic in (("truth", truth), ("found", found)):
            (tmp_path / name).mkdir(exist_ok=True)
            pixels = np.zeros((*panoptic.index_map.shape, 3), np.uint8)
            pixels[..., 0] = panoptic.index_map
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
            infos = [
                {"id": place, "category_id": s.category_id, "area": s.area, "iscrowd": int(s.is_crowd)}
                for place, s in enumerate(panoptic.segments, start=1)
            ]
            annotations[name].append({"image_id": number, "file_name": f"{number}.png", "segments_info": infos})
    images = [{"id": number, "height": 40, "width": 60} for number in range(30)]
    categories = COCO_PANOPTIC.as_records()
    theirs = hotcoco.panoptic.PanopticEval(
        *({"images": images, "annotations": annotations[n], "categories": categories} for n in ("truth", "found")),
        gt_folder=str(tmp_path / "truth"), pred_folder=str(tmp_path / "found"),
    )  # fmt: skip
    theirs.evaluate()
    results = theirs.results()
    assert ours.mean() == pytest.approx(results["All"]["pq"], abs=1e-6) and 0.2 < ours.mean() < 0.9
    per_class = {int(category_id): figures for category_id, figures in results["per_class"].items()}
    for label in (PERSON, CAR, SKY):
        own, other = ours.by_class()[COCO_PANOPTIC[label].display_name], per_class[COCO_PANOPTIC[label].category_id]
        assert (own.found, own.truth, own.wrong) == (other["tp"], other["tp"] + other["fn"], other["fp"])


def test_an_example_holds_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.zeros((40, 60), int)
    ids[:, :20], ids[:20, 20:30], ids[20:, 40:] = 1, 2, 3
    infos = [SegmentInfo(1, SKY), SegmentInfo(2, CAR), SegmentInfo(3, PERSON, is_crowd=True)]
    panoptic = build_panoptic_map(ids, infos)
    image = np.repeat((ids == 2)[..., None] * np.uint8(255), 3, axis=2)
    padded = Framing((64, 64), (64, 64))
    for seed in range(12):
        example = example_of(image, panoptic, padded, np.random.default_rng(seed))
        assert set(example.labels.tolist()) <= {CAR, SKY}
        assert torch.equal(example.unknown, ~example.masks.bool().any(0))
        assert example.unknown[-10:].all()  # padding: 60 x 40 in a square
        if CAR in example.labels:  # the picture is mirrored and cut as its map is
            car = example.masks[example.labels == CAR][0].numpy()
            assert ((example.pixels[..., 0] > 127) == (car > 0)).mean() > 0.98


def test_unknown_pixels_and_queries_on_them_teach_nothing(tmp_path: Path) -> None:
    learner = Learner(open_network(str(save_checkpoint("eomt", tmp_path))).model, Framing((64, 64), None), {})
    learner._unknown = torch.zeros(1, 64, 64, dtype=torch.bool)
    learner._unknown[:, :, 32:] = True
    masks = torch.full((1, 2, 16, 16), -1.0)
    masks[0, 0, :, :6], masks[0, 1, :, 6:] = 1, 1  # one query on known pixels, one mostly on unknown ones
    masks.requires_grad_()
    classes = torch.randn(1, 2, 5, requires_grad=True)
    seen, told = learner._known_only(masks, classes)
    (seen.square().sum() + told.square().sum()).backward()
    assert masks.grad is not None and classes.grad is not None
    assert masks.grad[..., :8].all() and not masks.grad[..., 8:].any() and (seen[..., 8:] < -10).all()
    assert classes.grad[0, 0].all() and not classes.grad[0, 1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_by_its_own_losses(family: str, tmp_path: Path) -> None:
    base = open_network(str(save_checkpoint(family, tmp_path)))
    model = network_for(base.model, base.categories, OWN)
    learner = Learner(model, base.framing, base.task)
    ids = np.zeros((48, 64), int)
    ids[:30, :40], ids[30:], ids[:30, 40:] = 1, 2, 3
    infos = [SegmentInfo(number, number - 1) for number in (1, 2, 3)]
    panoptic = build_panoptic_map(ids, infos, OWN)
    example = example_of(np.full((48, 64, 3), 90, np.uint8), panoptic, base.framing, np.random.default_rng(5))
    learner([example]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(name.rpartition(".")[0].endswith(finetuning._HEADS) for name in reached)
    assert (
        len(reached) > 0.8 * sum(p.requires_grad for p in model.parameters()) - 40
    )  # a OneFormer's text encoder rests


@pytest.mark.parametrize(
    "size",
    [{"height": 100, "width": 100}, {"height": 384, "width": 384}, {"shortest_edge": 60, "longest_edge": 100}],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_network_is_shown_pictures_as_in_its_training(
    family: str, size: dict[str, int], tmp_path: Path
) -> None:
    ade = {label: f"class {label}" for label in range(150)} | {0: "wall"}  # of such, larger pictures are shown
    folder = save_checkpoint(family, tmp_path / "base", ade)
    (folder / "categories.json").write_text(
        json.dumps([{"id": label, "name": name, "isthing": 1} for label, name in ade.items()])
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size, "image_mean": [0.5, 0.4, 0.3]}))
    base = open_network(str(folder))
    save_network(tmp_path / "trained", network_for(base.model, base.categories, OWN), base, rows_of(OWN))
    assert open_network(str(tmp_path / "trained")).framing == base.framing


def test_a_class_that_both_know_keeps_what_the_base_knows_of_it(tmp_path: Path) -> None:
    base = open_network(str(save_checkpoint("mask2former", tmp_path)))
    state, known = network_for(base.model, base.categories, OWN).state_dict(), base.model.state_dict()
    for own, label in enumerate((SKY, CAR, GRASS, len(COCO_PANOPTIC))):  # and "nothing"
        assert torch.equal(state["class_predictor.weight"][own], known["class_predictor.weight"][label])
    assert state["criterion.empty_weight"].shape == (4,)
    backbone = next(name for name in state if "patch_embed" in name or "embeddings" in name)
    assert torch.equal(state[backbone], known[backbone])


def test_most_steps_of_a_squeezed_input_are_small() -> None:
    squeezed, padded = Framing((256, 320), None), Framing((640, 640), (640, 640))
    assert [framing_at(step, 10, squeezed).size_hw for step in (0, 8, 9)] == [(128, 160)] * 2 + [(256, 320)]
    assert framing_at(0, 10, padded) is padded and framing_at(0, 10, Framing((96, 96), None)).size_hw == (96, 96)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of drawn scenes, two of them to judge on."""
    folder = tmp_path_factory.mktemp("rows")
    data = build(folder / "out", "--scenes", 8, "--scene_size", "96x64", "--segmenter", "annotations",
                 "--validation_ratio", 0.25)  # fmt: skip
    splits = [row.split for row in read_rows(data.files)]
    assert 0 < splits.count("validation") < 8
    return data.folder


def test_a_damaged_row_is_counted_once_and_does_not_end_a_training(
    rows: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(find_files([str(rows)])[0])
    damaged = [{**image, "bytes": image["bytes"][:40]} for image in table["image"].to_pylist()]
    few = table.slice(0, 3)
    for number, bad in enumerate((1, 3)):
        column = pa.array([*damaged[:bad], *few["image"].to_pylist()[bad:]], table.schema.field("image").type)
        place = table.schema.get_field_index("image")
        pq.write_table(few.set_column(place, "image", column), tmp_path / f"{number}.parquet")
    one_bad, all_bad = (
        SegmentedRows.of_split([str(tmp_path / f"{number}.parquet")], "train", COCO_PANOPTIC, None) for number in (0, 1)
    )
    batches = one_bad.batches(1, 0, lambda step: Framing((64, 64), None), 0)
    assert len([next(batches) for _ in range(20)]) == 20  # ten epochs
    assert one_bad.left_out.counts.total() == 1 and len(one_bad.left_out.lines()) == 1
    with pytest.raises(UserError, match=r"^no row can be used: 3 "):
        next(all_bad.batches(1, 0, lambda step: Framing((64, 64), None), 0))

    words = ["--data", tmp_path / "1.parquet", *rows.glob("validation-*"), "--segmenter_checkpoint", base]
    assert command(*words, "--device", "cpu", "--output_dir", tmp_path / "trained") == 2
    assert ": error: --data: no row can be used: 3 " in capsys.readouterr().err


def test_rows_without_anything_to_learn_do_not_hang_a_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(name: str, split: str, ids: np.ndarray, is_crowd: bool) -> Path:
        panoptic = build_panoptic_map(ids, [SegmentInfo(1, CAR, is_crowd=is_crowd)])
        side, picture = len(ids), encoded(Image.new("RGB", ids.shape, (len(name), 0, 0)))
        row = crayon_row(
            width=side, height=side, image_bytes=picture, image_id=name, image_path=name, split=split,
            image_sha256=sha256(picture).hexdigest(), segments=panoptic.segments,
            panoptic_png=encode_index_map(panoptic),
        )  # fmt: skip
        write_crayon_file(tmp_path / name, [row])
        return tmp_path / name

    speck = np.zeros((640, 640), int)
    speck[301, 301] = 1  # between the places that the network's 64 x 64 pixels take
    validation = save("validation.parquet", "validation", np.ones((64, 64), int), False)
    words = ["--segmenter_checkpoint", base, "--steps", 3, "--batch_size", 1, "--device", "cpu"]
    crowds = save("crowds.parquet", "train", np.ones((64, 64), int), True)
    assert command("--data", crowds, validation, *words, "--output_dir", tmp_path / "none") == 2
    assert "no train row has segments other than crowds" in capsys.readouterr().err
    specks = save("specks.parquet", "train", speck, False)
    assert command("--data", specks, validation, *words, "--output_dir", tmp_path / "few") == 0
    batches = SegmentedRows.of_split([str(specks)], "train", COCO_PANOPTIC, None).batches(
        1, 0, lambda _: Framing((64, 64), None), 0
    )
    assert [len(next(batches)) for _ in range(5)] == [0] * 5  # each is a step, at which a signal can stop the run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_mask2former(tmp_path_factory.mktemp("base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "input_size_hw": [64, 64], "train_num_points": 64}))
    return folder


def test_a_training_learns_with_all_weights(
    rows: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = open_network(str(base))
    model = network_for(network.model, network.categories, COCO_PANOPTIC)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    training = SegmentedRows.of_split(find_files([str(rows)]), "train", COCO_PANOPTIC, None)
    losses: list[float] = []
    options = Steps(steps=30, batch_size=2, learning_rate=1e-3, seed=0, checkpoint_steps=100)
    learner = Learner(model, network.framing, network.task)
    learned_from: dict[str, Any] = {"arguments": {}, "data": []}
    take_steps(learner, training, network.framing, options, tmp_path, learned_from, lambda _, loss: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert len(still) < 0.1 * len(before)


def test_a_stopped_training_goes_on_and_its_folder_is_a_checkpoint(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = list(read_rows(find_files([str(rows)])))
    for name, part in (("a", scenes[:4]), ("b", scenes[4:])):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_crayon_file(tmp_path / "data" / name / "rows.parquet", part)
    words = ["--data", tmp_path / "data" / "*" / "*.parquet", "--segmenter_checkpoint", base, "--device", "cpu"]
    words += ["--steps", 2, "--batch_size", 2, "--checkpoint_steps", 1]
    assert command(*words, "--output_dir", tmp_path / "whole") == 0
    out = capsys.readouterr().out
    assert "| class | PQ | true | found | wrong | blind guess |" in out and "mean of" in out

    plain, taken = finetuning._gradients, []

    def interrupted(*arguments: object) -> float:
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(1)
        return plain(*arguments)

    monkeypatch.setattr(finetuning, "_gradients", interrupted)
    assert command(*words, "--output_dir", tmp_path / "parts") == 130
    assert not (tmp_path / "parts").exists()
    monkeypatch.setattr(finetuning, "_gradients", plain)
    assert command(*words, "--seed", 1, "--output_dir", tmp_path / "parts") == 2
    assert "--seed was 0, is 1" in capsys.readouterr().err
    (tmp_path / "data" / "a").rename(tmp_path / "data" / "z")  # its rows keep their place
    assert command(*words, "--output_dir", tmp_path / "parts") == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".")]

    assert command(*words, "--output_dir", tmp_path / "parts") == 2
    assert "is there already; name another, or --overwrite it" in capsys.readouterr().err
    trained = tmp_path / "parts"
    assert joined(checkpoint_categories("transformers", str(trained))[0]) == category_set(find_files([str(rows)]))
    segmenter = load_segmenter("transformers", checkpoint=str(trained), device="cpu")
    assert segmenter.facts["input_size_hw"] == [64, 64]
    card = (trained / "README.md").read_text()
    assert "license:" in card and "!!python" not in card and "mean of" in card and str(tmp_path) not in card
    assert json.loads((trained / "figures.json").read_text())["training"]["steps"] == 2
    assert command("--data", rows, "--segmenter_checkpoint", trained, "--evaluate_only", "--max_images", 1) == 0
    assert "mean of 1 pictures" in capsys.readouterr().out


def test_a_stopped_training_that_replaces_a_folder_goes_on(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", rows, "--segmenter_checkpoint", base, "--steps", 2, "--batch_size", 2, "--checkpoint_steps", 1]
    words += ["--device", "cpu", "--output_dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("of an earlier training")
    plain, taken = finetuning._gradients, []

    def stopped(*arguments: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        taken.append(1)
        return plain(*arguments)

    monkeypatch.setattr(finetuning, "_gradients", stopped)
    assert command(*words, "--overwrite") == 130
    said = "stopped after 1 of 2 steps; the same command without --overwrite goes on from there"
    assert capsys.readouterr().err == f"collavo train-segmenter: error: {said}\n"
    assert command(*words) == 0 and len(taken) == 2  # the signal of the last step comes too late to stop anything
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "old.txt").exists()


def test_a_picture_that_cannot_be_segmented_costs_its_own_quality_only(
    rows: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_network(str(base)).model
    model.class_predictor.bias.data.fill_(float("inf"))
    model.save_pretrained(tmp_path / "broken")
    words = ["--data", rows, "--segmenter_checkpoint", tmp_path / "broken", "--evaluate_only", "--device", "cpu"]
    assert command(*words, "--max_images", 1) == 0
    out = capsys.readouterr().out
    assert "| mean of 1 pictures | 0.0 |" in out and "left out: 1 non_finite_logits (row " in out

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(UniversalSegmenter, "segment", full)
    assert command(*words) == 1
    assert "--data" not in (err := capsys.readouterr().err) and "judging: the GPU has no memory left" in err


def test_the_classes_of_a_folder_are_those_of_its_rows(base: Path, tmp_path: Path) -> None:
    network = open_network(str(base))
    trained = tmp_path / "trained"
    save_network(trained, network_for(network.model, network.categories, OWN), network, rows_of(OWN))
    assert [c.name for c in checkpoint_categories("transformers", str(trained))[0]] == [c.name for c in OWN]
    segmenter = load_segmenter("transformers", checkpoint=str(trained), device="cpu", categories=OWN)
    assert segmenter.categories is OWN

    (tmp_path / "own.json").write_text(json.dumps(OWN.as_records()))
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    words = ["--segmenter", "transformers", "--segmenter_checkpoint", trained]
    built = build(tmp_path / "out", "--images", tmp_path / "0.png", "--categories", tmp_path / "own.json", *words)
    assert category_set(built.files) == CategorySet(category_set(built.files).name, OWN.categories)
    extended = build(tmp_path / "out", "--images", tmp_path / "1.png", *words, "--extend")
    assert len(extended.rows) == 2 and category_set(extended.files) == category_set(built.files)


def test_a_class_that_no_row_showed_is_never_called_absent(base: Path, tmp_path: Path) -> None:
    network = open_network(str(base))
    people = CategorySet.from_records("people", [COCO_PANOPTIC.as_records()[label] for label in (PERSON, CAR)])
    model = network_for(network.model, network.categories, people)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    for shown in ((0, 1), (1,)):
        trained = tmp_path / f"trained {len(shown)}"
        save_network(trained, model, network, rows_of(people, shown))
        words = ["--segmenter", "transformers", "--segmenter_checkpoint", trained, "--negative_ratio", 9]
        (row,) = build(tmp_path / f"out {len(shown)}", "--images", tmp_path / "0.png", *words).rows.values()
        asked = " ".join(each.question for each in row.instructions)
        assert not row.segments and "car" in asked
        assert ("person" in asked or "people" in asked) is (0 in shown)


def test_any_network_can_be_judged_and_trained_whatever_its_kinds(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "person|rider|car|truck|bus|train|motorcycle|bicycle"  # Cityscapes' for instances, of no known set
    network = tiny_mask2former(tmp_path / "network", dict(enumerate(names.split("|"))))
    config = json.loads((network / "config.json").read_text())
    (network / "config.json").write_text(json.dumps({**config, "input_size_hw": [64, 64], "train_num_points": 64}))
    words = ["--data", rows, "--segmenter_checkpoint", network, "--device", "cpu", "--max_images", 1]
    assert command(*words, "--evaluate_only") == 0
    words += ["--steps", 1, "--batch_size", 2, "--output_dir", tmp_path / "trained"]
    assert command(*words) == 0
    assert open_for(str(network), COCO_PANOPTIC, "cpu")._labels[[0, 2]].tolist() == [PERSON, CAR]
    kinds = [{"id": 10 * n, "name": name, "isthing": int(name != "car")} for n, name in enumerate(names.split("|"))]
    (network / "categories.json").write_text(json.dumps(kinds))
    labels = open_for(str(network), COCO_PANOPTIC, "cpu")._labels
    assert labels[[0, 1, 2]].tolist() == [PERSON, LEFT_OUT, LEFT_OUT]  # its car is stuff, so all cars would be one


@needs_scenes_model
def test_a_set_whose_names_are_all_cocos_is_judged_as_it_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "reversed.json").write_text(json.dumps(COCO_PANOPTIC.as_records()[::-1]))
    rows = build(tmp_path / "rows", "--scenes", 8, "--segmenter", "annotations", "--validation_ratio", 0.25,
                 "--categories", tmp_path / "reversed.json").folder  # fmt: skip
    words = ["--data", rows, "--output_dir", tmp_path / "trained", "--steps", 1, "--batch_size", 1, "--device", "cpu"]
    assert command(*words, "--learning_rate", 1e-7) == 0  # so that it stays as good as it is
    assert json.loads((tmp_path / "trained" / "figures.json").read_text())["panoptic_quality"] > 0.3


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--segmenter_checkpoint", "{foreign}", "--evaluate_only"), "none of its 2 classes (unicorn, dragon, ...) is"),
        (("--segmenter_checkpoint", "{tmp}/nowhere"), "--segmenter_checkpoint: "),
        (("--data", "{bare}"), "--data: no validation row has segments"),
        (("--output_dir", "{rows}"), "is there already; name another, or --overwrite it"),
        (("--device", "cuda:99"), "--device: "),
    ],
)
def test_what_cannot_work_is_one_line(
    words: tuple[str, ...], line: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"rows": rows, "tmp": tmp_path, "foreign": tmp_path / "foreign", "bare": tmp_path / "bare"}
    if "{foreign}" in words:
        names = {0: "unicorn", 1: "dragon"}
        tiny_mask2former(tmp_path / "foreign", names)
        records = [{**OWN.as_records()[0], "id": n, "name": name, "display_name": name} for n, name in names.items()]
        (tmp_path / "foreign" / "categories.json").write_text(json.dumps({"name": "foreign", "categories": records}))
    if "{bare}" in words:
        Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
        build(tmp_path / "bare", "--images", tmp_path / "one.png", "--segmenter", "none")
    capsys.readouterr()
    given = [word.format(**places) for word in words]
    start = [] if "--data" in given else ["--data", rows]
    assert command(*start, "--steps", 1, *given) == 2
    err = capsys.readouterr().err
    assert err.startswith("collavo train-segmenter: error: ") and line in err and err.count("\n") == 1
