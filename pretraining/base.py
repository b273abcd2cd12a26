"""Pre-train the embedded base: a small LLaVA-shaped model with its tokenizer, from scratch, on drawn scenes.

    python -m pretraining.base --output runs/base --steps 10000

It learns what a large base would bring along: to see (colours, also those within a box; places, what stands where), to
speak (the dialogues that come with the scenes), to write numbers and plurals, and to find and count words among words
that it was given, in a list or laid over a picture's cells, where also what stands in a box (`pretraining.word_grids`,
`pretraining.box_loss`). No crayon task is among it: no object of a picture is counted, boxed, listed or
asked for, and no crayon map of a picture is shown. The folder `model` in the output is a base for
`collavo.train --preset`. A stopped run goes on when the command is repeated.
"""

import argparse
from collections.abc import Iterator, Sequence
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

from collavo.cli import Parser, whole_number
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
from pretraining.loop import TRAIN_SCENES_SEED, ScratchOptions, train_from_scratch
from pretraining.positions import show_positions
from pretraining.word_grids import CHART, Lesson, WordPrompt, chart_example, draw_chart
from pretraining.word_lists import color_dialogues, list_dialogues, short_list_dialogues, word_dialogue
from schemas.categories import CATEGORIES

VOCABULARY = 1408
TOKENIZER_SCENES = 2000
"""Scenes whose dialogues the tokenizer is made from."""

SHORT_LISTS_FIRST = 300
"""Steps with nothing but short lists: whether a word is among others is learned soonest by itself."""

SIMPLE_CHARTS_NEXT: tuple[tuple[Lesson, int], ...] = (("whether", 300), ("tiles", 500))
"""Lessons after those, with nothing but simple charts, and their steps, for the same reason."""

ROTATION: tuple[Lesson | Literal["scene", "list"], ...] = ("scene", "all", "all", "tiles", "list", "all")
"""What the batches after those are made of, in turn: scenes, lists, or charts of a lesson."""

PLACE_WEIGHT = 3.0
"""Of the loss on places beside that on answers."""

CHART_PICTURES = 64
"""Scenes that charts are laid over."""


class PretrainingExamples(Dataset[Example]):
    """Short lists of words first, then simple charts, then batches of scenes, charts and lists in turn.

    A packed sequence is a list, or several short ones, with the questions about it, without a picture; a chart with its
    questions, over a picture that has nothing to do with it; or a scene with all its dialogues, questions about its
    colours, and one about words or numbers by themselves.

    Args:
        first_step: where in this order to begin.
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
                return self._chart(index, lesson)
            step -= steps
        match ROTATION[step % len(ROTATION)]:
            case "scene":
                return self._scene(index)
            case "list":
                return self._words(index, list_dialogues(index))
            case lesson:
                return self._chart(index, lesson)

    def _scene(self, index: int) -> Example:
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), self._SIZES_WH[index % len(self._SIZES_WH)])
        dialogues = (*scene.dialogues, *color_dialogues(scene.image, index), word_dialogue(index))
        prompts = [self._processor.render(turns) for turns in dialogues]
        return self._example(index, pack_prompts(prompts, self._processor.image_token_id), scene.image)

    def _chart(self, index: int, lesson: Lesson) -> Example:
        chart = draw_chart(index, self._processor.grid_hw, lesson)
        return chart_example(chart, _chart_picture(index % CHART_PICTURES), self._processor)

    def _words(self, index: int, dialogues: Sequence[Turns]) -> Example:
        """What the conversations begin with in common, then each by itself, as a picture and the questions about it are
        packed."""
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
    """A base with what is asked of it in training: the answers, and on charts the places of boxes."""

    def __init__(self, model: CollavoForConditionalGeneration, processor: CollavoProcessor, bf16: bool) -> None:
        super().__init__()
        self.model = model
        self.place_head = PlaceHead(model.lm_head.in_features, processor.grid_hw)
        self._processor = processor
        self._bf16 = bf16

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """The loss of a batch."""
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
    """A byte-level BPE tokenizer of at most `VOCABULARY` tokens that keeps digits apart, the same on every machine."""
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
    """A base that has learned nothing yet."""
    config = base_config()
    model = CollavoForConditionalGeneration(config)
    match_like_with_like(model)
    processor = build_processor(config, build_tokenizer())
    show_positions(model, _chart_pictures(processor))
    return model, processor


def base_config() -> CollavoConfig:
    """A model of 6.2 million weights: pictures of 192 px in 12 x 12 patches, a Llama of four layers."""
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
    """Let every head of the language model begin with keys that are its queries, so that a token attends to its like.

    Without it no head found a word among others within 126,000 questions; with it, within 80,000 (benchmarks/LOG.md,
    2026-11-26). The idea is that of mimetic initialisation, arXiv 2305.09828; here it is exact, without noise.
    """
    model.model.language_model.embed_tokens.weight.normal_(std=0.06)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.normal_(std=0.044)  # a logit of about 4 for the same token, 0 for others
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _chart_pictures(processor: CollavoProcessor) -> torch.Tensor:
    return torch.stack([processor.pixel_values(_chart_picture(number)) for number in range(CHART_PICTURES)])


@cache
def _chart_picture(number: int) -> np.ndarray:
    return draw_scene(scene_seed(TRAIN_SCENES_SEED, number), (192, 144)).image


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.show_positions and not arguments.start:
        parser.error("--show_positions is for a base of --start; a new one is shown its positions anyway")
    run = Path(arguments.output)
    torch.manual_seed(arguments.seed)
    try:
        model, processor = load_base(arguments.start, torch.float32) if arguments.start else new_base()
    except UserError as error:
        parser.error(f"--start {str(error).removeprefix('--preset ')}")
    if arguments.show_positions:
        show_positions(model, _chart_pictures(processor))
    if arguments.freeze_vision:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    # The Crayon Prompt is no part of the base: it waits, closed, for Crayon Prompt Tuning.
    crayon_prompt = model.model.crayon_prompt
    model.model.crayon_prompt = WordPrompt(model, processor.tokenizer)

    options = ScratchOptions(
        steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate
    )
    pad = partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    examples = PretrainingExamples(processor, options.batch_size, arguments.first_step)
    supervised = SupervisedBase(model, processor, arguments.bf16)
    train_from_scratch(run, supervised, examples, pad, supervised, options, Console())
    model.model.crayon_prompt = crayon_prompt
    model.bfloat16().save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    return 0


def _tokenizer_texts() -> Iterator[str]:
    """Every word that the model is to read or write, in the places where it stands, so that each becomes a token."""
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
    yield from (f"{c.display_name} {c.display_name} {c.singular} {c.plural}" for c in CATEGORIES)
    yield "User: \n Assistant:"


def _parser() -> Parser:
    parser = Parser(
        prog="python -m pretraining.base",
        usage="python -m pretraining.base --output DIR [options]",
        description="Pre-train the embedded base on drawn scenes.",
        epilog="A stopped run goes on when the command is repeated.",
    )
    add, count = parser.add_argument, whole_number(1)
    add("--output", required=True, metavar="DIR", help="checkpoints, metrics and the model")
    add("--start", metavar="DIR", help="a base to go on from (default: weights at random)")
    add("--first_step", type=whole_number(0), default=0, metavar="N", help="of the course to begin with (default: 0)")
    add(
        "--show_positions",
        action="store_true",
        help="give the base of --start a code of places that its image tokens carry; a new one has it",
    )
    add("--steps", type=count, default=10000, metavar="N", help="updates (default: 10000)")
    add(
        "--batch_size",
        type=count,
        default=16,
        metavar="N",
        help="scenes, charts, or sequences of lists of words, per update (default: 16)",
    )
    add("--learning_rate", type=float, default=1e-3, metavar="X", help="its peak (default: 1e-3)")
    add("--freeze_vision", action="store_true", help="leave vision tower and projector as they are")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products (default: on)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the initial weights (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
