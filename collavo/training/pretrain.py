"""Pre-train the embedded base: a small LLaVA-shaped model with its tokenizer, from scratch, on drawn scenes.

    python -m collavo.training.pretrain --output runs/base --steps 10000

It learns what a large base would bring along: to see (colours, places, what stands where), to speak (the dialogues
that come with the scenes), to write numbers and plurals, and to find a word among words that it was given. No crayon
task is among it: nothing in a picture is counted, boxed, listed or asked for by class, and no crayon map is shown. The
folder `model` in the output is a base for `collavo.train --preset`. A stopped run goes on when the command is repeated.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from collavo.command_line import Parser, whole_number
from collavo.instructions.phrasebook import load_phrasebook
from collavo.model import CollavoConfig, CollavoForConditionalGeneration
from collavo.model.packing import SHARED
from collavo.model.processing_collavo import CollavoProcessor, build_processor
from collavo.model.prompt import IMAGE_TOKEN, Turns
from collavo.scenes import draw_scene, scene_seed
from collavo.training.batches import Example, MicroBatch, collate, pack_prompts
from collavo.training.scratch import TRAIN_SCENES_SEED, ScratchOptions, train_from_scratch
from schemas.categories import CATEGORIES, THINGS

VOCABULARY = 1024
TOKENIZER_SCENES = 2000
"""Scenes whose dialogues the tokenizer is made from."""

WORD_LISTS = 6
"""Lists of words in a conversation about them."""

_NUMBERS_SEED, _WORDS_SEED = 7_000_001, 7_000_003


class PretrainingExamples(Dataset[Example]):
    """Batches of scenes and of words in turn: all dialogues about one scene, and a little arithmetic of words, in one
    packed sequence; or a conversation about lists of words, without a picture."""

    _SIZES_WH = ((192, 144), (256, 192), (320, 240))

    def __init__(self, processor: CollavoProcessor, batch_size: int) -> None:
        self._processor = processor
        self._batch_size = batch_size

    def __getitem__(self, index: int) -> Example:
        return self._words(index) if index // self._batch_size % 2 else self._scene(index)

    def _scene(self, index: int) -> Example:
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), self._SIZES_WH[index % len(self._SIZES_WH)])
        prompts = [self._processor.render(turns) for turns in (*scene.dialogues, word_dialogue(index))]
        return self._example(index, *pack_prompts(prompts, self._processor.image_token_id), scene.image)

    def _words(self, index: int) -> Example:
        turns = [turn for number in range(WORD_LISTS) for turn in lookup_dialogue(WORD_LISTS * index + number)]
        prompt = self._processor.render(turns)
        text = torch.tensor(prompt.input_ids) != self._processor.image_token_id
        input_ids, labels = torch.tensor(prompt.input_ids)[text], torch.tensor(prompt.labels)[text]
        return self._example(index, input_ids, labels, torch.full_like(labels, SHARED), np.zeros((1, 1, 3), np.uint8))

    def _example(
        self, index: int, input_ids: torch.Tensor, labels: torch.Tensor, sequence_ids: torch.Tensor, image: np.ndarray
    ) -> Example:
        nothing = torch.zeros(self._processor.grid_hw, dtype=torch.long)
        return Example(
            kind="dialogue",
            image_id=str(index),
            input_ids=input_ids,
            labels=labels,
            sequence_ids=sequence_ids,
            pixel_values=self._processor.pixel_values(image),
            semantic_ids=nothing,
            numbering_ids=nothing,
        )


def word_dialogue(index: int) -> Turns:
    """A question about numbers or words that needs no picture: to copy, compare, continue, or put into the plural."""
    rng = np.random.Generator(np.random.Philox(key=[_NUMBERS_SEED, index]))
    kind = int(rng.integers(4))
    if kind == 0:
        numbers = ", ".join(f"{value:.2f}" for value in rng.random(int(rng.integers(1, 9))))
        return [("human", f"Write it again: [{numbers}]"), ("gpt", f"[{numbers}]")]
    if kind == 1:
        first, second = (round(float(value), 2) for value in rng.random(2))
        return [("human", f"Which is more, {first:.2f} or {second:.2f}?"), ("gpt", f"{max(first, second):.2f}")]
    if kind == 2:
        start = int(rng.integers(20))
        return [
            ("human", f"Go on: {', '.join(str(start + i) for i in range(4))}"),
            ("gpt", ", ".join(str(start + i) for i in range(4, 10))),
        ]
    thing = THINGS[int(rng.integers(len(THINGS)))]
    return [("human", f"What is the plural of {thing.singular}?"), ("gpt", thing.plural)]


def lookup_dialogue(index: int) -> Turns:
    """A list of words and a question that only the list answers: whether and how often a word is in it, what number a
    word goes with, which word goes with a number; or the list once more."""
    rng = np.random.Generator(np.random.Philox(key=[_WORDS_SEED, index]))
    kinds = [CATEGORIES[i].display_name for i in rng.permutation(len(CATEGORIES))[: rng.integers(2, 7)]]
    words = [kinds[i] for i in np.sort(rng.integers(1, len(kinds), size=rng.integers(2, 10)))]
    kind, word = int(rng.integers(5)), words[int(rng.integers(len(words)))]
    if kind == 0:
        asked = word if rng.random() < 0.5 else kinds[0]  # the first of the kinds is never in the list
        return [
            ("human", f"{', '.join(words)}. Is {asked} one of these?"),
            ("gpt", "No." if asked == kinds[0] else "Yes."),
        ]
    if kind == 1:
        asked = word if rng.random() < 0.8 else kinds[0]
        return [("human", f"{', '.join(words)}. How often does it say {asked}?"), ("gpt", f"{words.count(asked)}.")]
    if kind == 2:
        numbered = ", ".join(f"(#{words[:i].count(word) + 1} {word})" for i, word in enumerate(words))
        return [("human", f"Write it again: {numbered}"), ("gpt", numbered)]
    single = list(dict.fromkeys(words))
    values = dict(zip(single, (f"{i / 100:.2f}" for i in rng.choice(100, len(single), replace=False)), strict=True))
    pairs = ", ".join(f"{word} {value}" for word, value in values.items())
    if kind == 3:
        return [("human", f"{pairs}. Which goes with {values[word]}?"), ("gpt", f"{word}.")]
    return [("human", f"{pairs}. What goes with {word}?"), ("gpt", values[word])]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens that keeps digits apart, the same on every machine."""
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


def base_config() -> CollavoConfig:
    """A model of 7.7 million weights: pictures of 192 px in 12 x 12 patches, a Llama of six layers."""
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
            "num_hidden_layers": 6,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    arguments = _parser().parse_args(argv)
    run = Path(arguments.output)
    torch.manual_seed(arguments.seed)
    config = base_config()
    model = CollavoForConditionalGeneration(config)
    # On a CPU with a packed mask a quarter faster than SDPA, with the same losses.
    model.set_attn_implementation("eager")
    processor = build_processor(config, build_tokenizer())
    # The Crayon Prompt is no part of the base: it waits, closed, for Crayon Prompt Tuning.
    model.model.crayon_prompt.requires_grad_(False)

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        inputs = batch.inputs
        if not (inputs["input_ids"] == config.image_token_index).any():
            inputs = {name: inputs[name] for name in ("input_ids", "labels", "attention_mask")}
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss: torch.Tensor = model(**inputs, supervised_only=True, use_cache=False).loss
        return loss

    options = ScratchOptions(
        steps=arguments.steps, batch_size=arguments.batch_size, learning_rate=arguments.learning_rate
    )
    pad = partial(collate, pad_token_id=processor.tokenizer.pad_token_id)
    train_from_scratch(run, model, PretrainingExamples(processor, options.batch_size), pad, loss_of, options, Console())
    model.bfloat16().save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    return 0


def _tokenizer_texts() -> Iterator[str]:
    for index in range(TOKENIZER_SCENES):
        scene = draw_scene(scene_seed(TRAIN_SCENES_SEED, index), (64, 64))
        yield from (value for turns in (*scene.dialogues, word_dialogue(index)) for _, value in turns)
    for phrasings in load_phrasebook().phrasings.values():
        yield from (f"{phrasing.question} {phrasing.present}" for phrasing in phrasings)
    yield from (category.display_name for category in CATEGORIES)
    yield from (f"User: {thing.singular} Assistant: {thing.plural}" for thing in THINGS)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m collavo.training.pretrain",
        usage="python -m collavo.training.pretrain --output DIR [options]",
        description="Pre-train the embedded base on drawn scenes.",
        epilog="A stopped run goes on when the command is repeated.",
    )
    add, count = parser.add_argument, whole_number(1)
    add("--output", required=True, metavar="DIR", help="checkpoints, metrics and the model")
    add("--steps", type=count, default=10000, metavar="N", help="updates (default: 10000)")
    add(
        "--batch_size",
        type=count,
        default=16,
        metavar="N",
        help="scenes, or conversations about words, per update (default: 16)",
    )
    add("--learning_rate", type=float, default=1e-3, metavar="X", help="its peak (default: 1e-3)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 products (default: on)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the initial weights (default: 0)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
