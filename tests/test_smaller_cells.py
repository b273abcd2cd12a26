"""A base that is given more cells for the same picture."""

import torch
from conftest import needs_tiny_base

from collavo.embedded import TINY
from collavo.runs import load_base
from pretraining import smaller_cells
from pretraining.smaller_cells import with_cells

PLACES = "model.vision_tower.embeddings.position_embedding.weight"


@needs_tiny_base
def test_more_cells_lie_between_the_places_of_the_fewer_and_nothing_else_changes() -> None:
    model, processor = load_base(TINY, torch.float32)
    side = processor.grid_hw[0]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    finer, finer_processor = with_cells(model, processor, 2 * side)
    assert finer_processor.grid_hw == (2 * side, 2 * side)
    after = finer.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {PLACES}
    assert torch.equal(after[PLACES][0], before[PLACES][0])
    coarse = before[PLACES][1:].unflatten(0, (side, side))
    fine = after[PLACES][1:].unflatten(0, (2 * side, 2 * side))
    halved = fine.unflatten(0, (side, 2)).unflatten(2, (side, 2)).mean((1, 3))
    inner = slice(2, side - 2)
    assert (halved - coarse)[inner, inner].norm() < 0.2 * (coarse - coarse.mean((0, 1)))[inner, inner].norm()
    picture = torch.rand(1, 3, 32 * side, 32 * side)
    assert finer.model.vision_tower(picture).last_hidden_state.shape[1] == 4 * side**2 + 1


@needs_tiny_base
def test_the_language_model_learns_and_the_eyes_stay(tmp_path) -> None:
    flags = ["--start", TINY, "--cells", "6", "--steps", "2", "--batch_size", "1", "--output", str(tmp_path / "run")]
    assert smaller_cells.main(flags) == 0
    (before, _), (after, processor) = (load_base(base, torch.float32) for base in (TINY, str(tmp_path / "run/model")))
    assert processor.grid_hw == (6, 6) and after.config.image_seq_length == 36
    moved = {
        name.split(".")[1]
        for name, weight in after.state_dict().items()
        if name.startswith("model.") and name != PLACES and not torch.equal(weight, before.state_dict()[name])
    }
    assert moved == {"language_model"}


def test_a_base_that_is_not_there_is_one_line(capsys, tmp_path) -> None:
    assert smaller_cells.main(["--start", str(tmp_path / "none"), "--output", str(tmp_path / "run")]) == 2
    assert "--start" in capsys.readouterr().err
