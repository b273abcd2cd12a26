"""Pre-train the embedded base, a small LLaVA-shaped model with its tokenizer, from scratch on drawn scenes.

    python -m pretraining.base --output runs/base --steps 10000

The base learns what a large one would bring along: to see colours, places and what stands where; to hold the dialogues
that come with the scenes; to write numbers and plurals; to find and count words in a list or in a word grid, which lays
words over the cells of a picture; and to read which word of a grid stands in a box (`word_grids`, `box_loss`). No
crayon task is part of it: no question counts, boxes or lists objects of a picture, and the model sees no crayon map.

The output's folder `model` is a base for `collavo.train --preset`. Repeat the command to continue a stopped run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from collavo import cli
from collavo.cli import REQUIRED, flag, naming
from collavo.errors import UserError
from collavo.instructions.phrasebook import load_phrasebook
from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.model.packing import SHARED
from collavo.model.processing import CollavoProcessor, build_processor
from collavo.model.prompt import IMAGE_TOKEN, Turns
from collavo.runs import load_base
from collavo.scenes import draw_scene, scene_seed
from collavo.training.batches import IGNORED, Example, MicroBatch, collate, pack_prompts
from pretraining.box_loss import PlaceHead
from pretraining.loop import TRAIN_SCENES_SEED, LoopOptions, train_from_scratch
from pretraining.positions import show_positions
from pretraining.word_grids import CHART, Lesson, WordPrompt, chart_example, draw_chart
from pretraining.word_lists import color_dialogues, list_dialogues, short_list_dialogues, word_dialogue
from schemas.categories import COCO_PANOPTIC, CategorySet

VOCABULARY = 1408
TOKENIZER_SCENES = 2000
"""Number of scenes whose dialogues train the tokenizer."""

SHORT_LISTS_FIRST = 300
"""Steps at the start with short lists only: a model learns soonest alone whether a word is among others."""

SIMPLE_CHARTS_NEXT: tuple[tuple[Lesson, int], ...] = (("whether", 300), ("tiles", 500))
"""Lessons after that with simple charts only, for the same reason, and the steps of each."""

ROTATION: tuple[Lesson | Literal["scene", "list"], ...] = ("scene", "all", "all", "tiles", "list", "all")
"""What the batches after that hold, in turn: scenes, lists, or charts of a lesson."""

PLACE_WEIGHT = 3.0
"""Weight of the loss on boxes; the loss on answers has weight 1."""

CHART_PICTURES = 64
"""Number of scenes that charts are laid over."""


class PretrainingExamples(Dataset[Example]):
    """First short lists of words, then simple charts, then batches of scenes, charts and lists in turn.

    Each example is one packed sequence. It holds one list, or several short ones, with questions and without a picture;
    or a chart with its questions, over an unrelated picture; or a scene with all its dialogues, questions about its
    colours, and one question about words or numbers alone.

    Args:
        first_step: the step of this course to begin with.
    """

    _SIZES_WH = ((192, 144), (256, 192), (320, 240))

    def __init__(self, processor: CollavoProcessor, batch_size: int, first_step: int = 0) -> None:
        self._processor = processor
        self._batch_size = batch_size
        self._first_step = first_step

    def __getitem__(self, index: int) -> Example:
        step = index // self._batch_size + self._first_step
        if step < SHORT_LISTS_FIRST:
            return self._words(index, short_list_dialogues(index))
        step -= SHORT_LISTS_FIRST
        for lesson, steps in SIMPLE_CHARTS_NEXT:
            if step < steps:
                return self.chart(index, lesson)
            step -= steps
        match ROTATION[step % len(ROTATION)]:
            case "scene":
                return self.scene(index)
            case "list":
                return self._words(index, list_dialogues(index))
            case lesson:
                return self.chart(index, lesson)

    def scene(self, index: int) -> Example:
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), self._SIZES_WH[index % len(self._SIZES_WH)])
        dialogues = (*scene.dialogues, *color_dialogues(scene.image, index), word_dialogue(index))
        prompts = [self._processor.render(turns) for turns in dialogues]
        return self._example(index, pack_prompts(prompts, self._processor.image_token_id), scene.image)

    def chart(self, index: int, lesson: Lesson) -> Example:
        chart = draw_chart(index, self._processor.grid_hw, lesson)
        return chart_example(chart, chart_picture(index % CHART_PICTURES), self._processor)

    def _words(self, index: int, dialogues: Sequence[Turns]) -> Example:
        """Pack conversations as if they were about one picture: their common beginning once, then the rest of each."""
        image_token = self._processor.image_token_id
        prompts = [self._processor.render(turns) for turns in dialogues]
        texts = [[i for i in prompt.input_ids if i != image_token] for prompt in prompts]
        shared = next(i for i, tokens in enumerate(zip(*texts, strict=False)) if len(set(tokens)) > 1)
        input_ids, labels, sequence_ids = texts[0][:shared], [IGNORED] * shared, [SHARED] * shared
        for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True), start=1):
            input_ids += text[shared:]
            labels += prompt.labels[len(prompt.labels) - len(text) + shared :]
            sequence_ids += [number] * (len(text) - shared)
        no_picture = np.zeros((1, 1, 3), np.uint8)
        packed = (torch.tensor(input_ids), torch.tensor(labels), torch.tensor(sequence_ids))
        return self._example(index, packed, no_picture)

    def _example(
        self, index: int, packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor], image: np.ndarray
    ) -> Example:
        nothing = torch.zeros(self._processor.grid_hw, dtype=torch.long)
        return Example("dialogue", str(index), *packed, self._processor.pixel_values(image), nothing, nothing)


class SupervisedBase(nn.Module):
    """A base with its training losses: on answers and, for charts, on the cells of boxes."""

    def __init__(self, model: CollavoForConditionalGeneration, processor: CollavoProcessor, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.place_head = PlaceHead(model.lm_head.in_features, processor.grid_hw)
        self._processor = processor
        self._bf16 = bf16

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Return the loss of a batch."""
        inputs, charts = batch.inputs, CHART in batch.image_ids
        if not (inputs["input_ids"] == self._processor.image_token_id).any():
            inputs = {
                name: inputs[name] for name in inputs if name not in ("pixel_values", "semantic_ids", "numbering_ids")
            }
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            outputs = self.model(**inputs, supervised_only=True, use_cache=False, output_hidden_states=charts)
            loss: torch.Tensor = outputs.loss
            if charts:
                loss = loss + PLACE_WEIGHT * self.place_head(outputs.hidden_states, batch, self._processor.tokenizer)
        return loss


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of up to `VOCABULARY` tokens, one token a digit, the same on any machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>", IMAGE_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )


def new_base() -> tuple[CollavoForConditionalGeneration, CollavoProcessor]:
    """Return a base with initial weights, and its processor."""
    config = base_config()
    model = CollavoForConditionalGeneration(config)
    match_like_with_like(model)
    processor = build_processor(config, build_tokenizer())
    show_positions(model, chart_pictures(processor))
    return model, processor


def base_config() -> CollavoConfig:
    """Describe a model of 6.2 million weights: pictures of 192 px in 12 x 12 patches, a Llama of four layers."""
    return CollavoConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 192,
            "intermediate_size": 576,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": 192,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        },
        image_token_index=3,
        image_seq_length=144,
        crayon_width=128,
        chat_format="paper",
    )


@torch.no_grad()
def match_like_with_like(model: CollavoForConditionalGeneration) -> None:
    """Initialise the keys of every head of the language model with its queries, so that a token attends to its like.

    Without this, no head had found a word among others after 126,000 questions; with it, 80,000 were enough
    (benchmarks/LOG.md, 2026-11-26). The idea is mimetic initialisation (arXiv 2305.09828), here without noise.
    """
    model.model.language_model.embed_tokens.weight.normal_(std=0.06)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.normal_(std=0.044)  # a logit of about 4 for the same token, 0 for others
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def chart_pictures(processor: CollavoProcessor) -> torch.Tensor:
    return torch.stack([processor.pixel_values(chart_picture(number)) for number in range(CHART_PICTURES)])


@cache
def chart_picture(number: int) -> np.ndarray:
    return draw_scene(scene_seed(TRAIN_SCENES_SEED, number), (192, 144)).image


@dataclass(frozen=True, slots=True)
class Flags:
    output: str = flag(REQUIRED, "folder for checkpoints, metrics and the model", metavar="DIR")
    start: str | None = flag(None, "base to continue from (default: random weights)", metavar="DIR")
    first_step: int = flag(0, "step of the course to begin with", least=0)
    show_positions: bool = flag(False, "teach the image tokens of --start their places; a new base knows them")
    steps: int = flag(10000, "updates", least=1)
    batch_size: int = flag(16, "scenes, charts or sequences of lists per update", least=1)
    learning_rate: float = flag(1e-3, "peak of the learning rate")
    freeze_vision: bool = flag(False, "train neither vision tower nor projector")
    bf16: bool = flag(True, "multiply in bfloat16")
    seed: int = flag(0, "of the initial weights", least=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    return cli.run("pretraining.base", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    flags = cli.parse(
        Flags,
        argv,
        prog="python -m pretraining.base",
        usage="python -m pretraining.base --output DIR [options]",
        description="Pre-train the embedded base on drawn scenes.",
        epilog="Repeat the command to continue a stopped run.",
    )
    if flags.show_positions and not flags.start:
        raise UserError("--show_positions needs --start; a new base knows the places of its image tokens anyway")
    torch.manual_seed(flags.seed)
    with naming("start"):
        model, processor = load_base(flags.start, torch.float32) if flags.start else new_base()
    if flags.show_positions:
        show_positions(model, chart_pictures(processor))
    if flags.freeze_vision:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    run = Path(flags.output)
    examples = PretrainingExamples(processor, flags.batch_size, flags.first_step)
    supervised = SupervisedBase(model, processor, flags.bf16)
    options = LoopOptions(flags.steps, flags.batch_size, flags.learning_rate)
    train_base(run, model, processor, supervised, examples, options)
    save_base(run, model, processor)


def train_base(
    run: Path,
    model: CollavoForConditionalGeneration,
    processor: CollavoProcessor,
    learner: nn.Module,
    examples: Dataset[Example],
    options: LoopOptions,
    categories: CategorySet = COCO_PANOPTIC,
) -> None:
    """Train a base on charts and other examples, as `train_from_scratch` does.

    Args:
        learner: holds the weights that learn, and returns the loss of a batch.
        categories: whose labels the words of the charts have.
    """
    # The Crayon Prompt is no part of pre-training. Its weights wait, closed, for Crayon Prompt Tuning.
    crayon_prompt = model.model.crayon_prompt
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer, categories)
    pad = partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    train_from_scratch(run, learner, examples, pad, learner, options, Console())
    model.model.crayon_prompt = crayon_prompt


def save_base(run: Path, model: CollavoForConditionalGeneration, processor: CollavoProcessor) -> None:
    """Write a base for `collavo.train --preset` into a run's folder `model`."""
    model.bfloat16().save_pretrained(run / "model")
    processor.save_pretrained(run / "model")


def _tokenizer_texts() -> Iterator[str]:
    """Yield every word that the model will read or write, in its usual context, so that each becomes a token."""
    for index in range(TOKENIZER_SCENES):
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), (64, 64))
        dialogues = (
            *scene.dialogues,
            *color_dialogues(scene.image, index),
            word_dialogue(index),
            *list_dialogues(index),
        )
        for turns in dialogues:
            yield from (f" {value}" if speaker == "gpt" else value for speaker, value in turns)
    for phrasings in load_phrasebook().phrasings.values():
        yield from (f"{phrasing.question} {phrasing.present} {phrasing.absent or ''}" for phrasing in phrasings)
    yield from (f"{c.display_name} {c.display_name} {c.singular} {c.plural}" for c in COCO_PANOPTIC)
    yield "User: \n Assistant:"


if __name__ == "__main__":
    raise SystemExit(main())
