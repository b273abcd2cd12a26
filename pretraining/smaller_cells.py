"""Give a base smaller cells, that is, more image tokens for the same picture.

    python -m pretraining.smaller_cells --start collavo/assets/tiny_base --output runs/cells

A base learns soonest to read on few cells, but boxes and small things need more. Here the picture gets larger and the
patches stay as they are; what tells the vision tower their places is interpolated. Words lie over more cells then, rows
are further apart in the sequence, and places come in finer steps, so the language model has to learn again where things
are. It knows how, so that takes an hour and a half on two cores: on the word grids of `word_grids`, all kinds of
questions in turn, and on scenes. Half of the charts show words of COCO's classes, half those of `class_words.txt`. The
vision tower and the projector stay as they are.

The output's folder `model` is a base for `collavo.train --preset`. Repeat the command to continue a stopped run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from collavo import cli
from collavo.cli import REQUIRED, flag, naming
from collavo.model import CollavoForConditionalGeneration
from collavo.model.processing import CollavoProcessor, build_processor
from collavo.runs import load_base
from pretraining.base import SupervisedBase, save_base, train_base
from pretraining.class_words import Rotation, WordExamples, known_and_new_words, some_words
from pretraining.loop import LoopOptions
from schemas.categories import COCO_PANOPTIC, Category

ROTATION: Rotation = ("all", "where", "tiles", "where", "all", "scene")
"""What the batches hold, in turn."""

_FIRST_CHART = 5_000_000
"""No other pre-training draws charts and scenes with these numbers."""


def with_cells(
    model: CollavoForConditionalGeneration, processor: CollavoProcessor, side: int
) -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Return a base that sees side x side patches, with the weights of another, and its processor.

    Args:
        model: whose vision tower has an embedding for each place, in a square. Its configuration becomes the new one's.
    """
    config, state = model.config, model.state_dict()
    (name,) = (name for name in state if name.endswith("vision_tower.embeddings.position_embedding.weight"))
    whole, places = state[name].split([1, len(state[name]) - 1])
    before = config.vision_config.image_size // config.vision_config.patch_size
    square = places.T.unflatten(1, (before, before))[None]
    square = functional.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)[0]
    state[name] = torch.cat([whole, square.flatten(1).T])
    config.vision_config.image_size = side * config.vision_config.patch_size
    config.image_seq_length = side**2
    changed = CollavoForConditionalGeneration(config)
    changed.load_state_dict(state)
    return changed, build_processor(config, processor.tokenizer)


@dataclass(frozen=True, slots=True)
class Flags:
    start: str = flag(REQUIRED, "base that gets smaller cells", metavar="DIR")
    output: str = flag(REQUIRED, "folder for checkpoints, metrics and the model", metavar="DIR")
    cells: int = flag(20, "cells along each side of a picture", least=2)
    steps: int = flag(1000, "updates", least=1)
    batch_size: int = flag(8, "charts or scenes per update", least=1)
    learning_rate: float = flag(1e-3, "peak of the learning rate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    return cli.run("pretraining.smaller_cells", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    flags = cli.parse(
        Flags,
        argv,
        prog="python -m pretraining.smaller_cells",
        usage="python -m pretraining.smaller_cells --start DIR --output DIR [options]",
        description="Give a base smaller cells.",
        epilog="Repeat the command to continue a stopped run.",
    )
    torch.manual_seed(0)
    with naming("start"):
        model, processor = with_cells(*load_base(flags.start, torch.float32), flags.cells)
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    categories = known_and_new_words()

    def words_of(index: int) -> Sequence[Category]:
        return some_words(categories.things, index) if index % 2 else COCO_PANOPTIC.things

    run = Path(flags.output)
    supervised = SupervisedBase(model, processor, bf16=True)
    examples = WordExamples(processor, flags.batch_size, ROTATION, _FIRST_CHART, words_of)
    options = LoopOptions(flags.steps, flags.batch_size, flags.learning_rate, warmup_steps=50, checkpoint_steps=100)
    train_base(run, model, processor, supervised, examples, options, categories)
    save_base(run, model, processor)


if __name__ == "__main__":
    raise SystemExit(main())
