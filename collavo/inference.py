"""Ask a trained model about pictures: load it, and answer many questions about an image for one pass over the image.

All prompts about an image begin alike: system text, image, often the object list. `Answerer` runs that beginning
through the model once, repeats its keys and values for every question, and lets `generate` go on from there. The
answers are those that each whole prompt would get alone.
"""

import copy
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from posixpath import commonprefix
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TextStreamer

from collavo.dataset import image_and_map
from collavo.device import move_to_device
from collavo.errors import UserError
from collavo.instructions.text import format_objects_with_boxes, largest
from collavo.model.adapters import quantize_language_model
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import LISTED, Kind, Turns
from collavo.model.query_init import adopt_categories
from collavo.panoptic.maps import PanopticMap
from collavo.runs import TRAIN_ARGS, export_facts, load_base, load_run, read_train_args
from collavo.sources.image_paths import is_utf8
from schemas.categories import COCO_PANOPTIC, CategorySet
from schemas.crayon_row import CrayonRow

ShowText = Callable[[str], object]
"""Receives the pieces of an answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image, uint8 RGB [height, width, 3], and its panoptic map."""

    image: np.ndarray
    panoptic: PanopticMap

    @property
    def objects(self) -> str:
        """The object list with boxes, as prompts hold it."""
        return self.largest_objects(len(self.panoptic.segments))

    def largest_objects(self, most: int) -> str:
        """The object list, cut down to so many objects."""
        height, width = self.image.shape[:2]
        return format_objects_with_boxes(largest(self.panoptic.segments, most), (width, height))


def picture_of_row(row: CrayonRow, image_root: Path | None, categories: CategorySet = COCO_PANOPTIC) -> Picture:
    """Read the picture of a row; arguments and errors are those of `collavo.dataset.image_and_map`."""
    return Picture(*image_and_map(row, image_root, categories))


@dataclass(frozen=True, slots=True)
class Request:
    """A question about one of several pictures.

    Args:
        picture: the position of its picture.
        turns: the conversation so far; its last turn is the question.
        objects: the object list that stands before the first question; an empty one becomes the phrase that nothing was
            recognised, None leaves out both.
        max_new_tokens: the length of the answer at most.
    """

    picture: int
    turns: Turns
    objects: str | None
    max_new_tokens: int


class Sampling(NamedTuple):
    """Tokens drawn at random among the likeliest that sum up to `top_p`, by torch's own generator."""

    temperature: float
    """Above 0; 1 draws as likely as the model says, less prefers the likely ones."""

    top_p: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The same as arguments of `generate`, which else would draw among the 50 likeliest tokens at most."""
        return {"do_sample": True, **self._asdict(), "top_k": 0}


@dataclass(eq=False)
class Answerer:
    """A model that answers questions about pictures, the same way every time unless it samples.

    Args:
        model: a CoLLaVO model in evaluation mode, with or without adapters.
        listed: the kinds of questions that it saw with the object list in training.
        beams: of the search; 1 for greedy decoding, 3 for the paper's.
        sampling: None for the likeliest token each time.
    """

    model: Any
    processor: CollavoProcessor
    listed: Sequence[Kind]
    beams: int = 1
    sampling: Sampling | None = None

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return int(self.model.config.context)

    def room_for_answer(self, turns: Turns, objects: str | None, most: int) -> int:
        """Tokens that the answer to a prompt may have, at most `most`.

        Raises:
            UserError: if the prompt alone is as long as the context.
        """
        tokens = len(self.processor.render(turns, objects).input_ids)
        if tokens >= self.context:
            raise UserError(f"the question has {tokens} tokens with its image, and the model takes {self.context}")
        return min(most, self.context - tokens)

    def request(self, number: int, picture: Picture, turns: Turns, listed: bool, most: int) -> Request:
        """Make a request that fits into the context.

        Where it does not with the whole object list, the list keeps the largest objects, or is left out, as in
        training. The answer gets a quarter of the context then, if it may be as long.

        Args:
            number: the position of the picture.
            listed: whether the object list stands before the first question.
            most: tokens that the answer may have.

        Raises:
            UserError: if the turns alone are as long as the context, or the question is no text.
        """
        if not is_utf8(turns[-1][1]):  # what Python makes of other bytes of a terminal or a command line
            raise UserError("the question holds bytes that are not UTF-8")
        objects = None
        if listed:
            room, count = self.context - min(most, self.context // 4), len(picture.panoptic.segments)
            tokens = lambda kept: len(self.processor.render(turns, picture.largest_objects(kept)).input_ids)  # noqa: E731
            kept = count if tokens(count) <= room else bisect_right(range(1, count + 1), room, key=tokens)
            objects = picture.largest_objects(kept) if kept or not count else None
        return Request(number, turns, objects, self.room_for_answer(turns, objects, most))

    def lists_objects(self, kind: Kind, object_list: str) -> bool:
        """Tell whether prompts of a kind begin with the object list.

        Args:
            object_list: `with`, `none`, or `trained` for what the model saw in training.
        """
        return object_list == "with" or (object_list == "trained" and kind in self.listed)

    def untrained(self, kinds: Mapping[str, Kind], object_list: str) -> str | None:
        """Say which kinds of questions, by their names, an object list asks in another way than training did."""
        unusual = [
            name for name, kind in kinds.items() if self.lists_objects(kind, object_list) != (kind in self.listed)
        ]
        if not unusual:
            return None
        trained, asked = ("without", "with") if object_list == "with" else ("with", "without")
        return (
            f"the model was trained {trained} the object list for {', '.join(unusual)}; answers {asked} it may be "
            "unreadable"
        )

    def without_query(self, categories: CategorySet) -> list[str]:
        """Return the names of the classes of a set that the model has no query for; to it, they are unknown."""
        config, known = self.model.config, self.processor.categories.by_key
        if not config.semantic_queries or config.class_tokens is not None:
            return []
        return [category.display_name for key, category in categories.by_key.items() if key not in known]

    @torch.inference_mode()
    def answer(
        self,
        pictures: Sequence[Picture],
        requests: Sequence[Request],
        batch_size: int = 16,
        show: ShowText | None = None,
    ) -> list[str]:
        """Answer requests, in their order.

        Args:
            pictures: they go through the model together, once for each system text that requests about them have.
                Their maps are of one set of classes.
            batch_size: requests that are answered together.
            show: receives the answer to a single request while it grows; a beam search has nothing to show before its
                end.
        """
        prompts = [self.processor.render(request.turns, request.objects).input_ids for request in requests]
        # Prompts share a beginning that has their picture in it. A system text stands before the picture.
        kinds = [(request.picture, _system_text(request.turns)) for request in requests]
        beginning_of = {kind: number for number, kind in enumerate(sorted(set(kinds)))}
        sharing: list[list[list[int]]] = [[] for _ in beginning_of]
        for prompt, kind in zip(prompts, kinds, strict=True):
            sharing[beginning_of[kind]].append(prompt)
        self.adopt(pictures[0].panoptic.categories)
        # A prompt is padded in two places, before its beginning and before its rest, so that all beginnings, and all
        # rests of a batch, are of one length. The mask hides the padding; `_positions` gives the other tokens the
        # positions that they have without it.
        lengths = [_common_length(same) for same in sharing]
        beginnings = self._padded([same[0][:length] for same, length in zip(sharing, lengths, strict=True)])
        cache = self._read([pictures[picture] for picture, _ in beginning_of], beginnings)
        answers = [""] * len(requests)
        streamer = _Pieces(self.processor.tokenizer, show) if show and self.beams == 1 else None
        for limit, part in _batches([request.max_new_tokens for request in requests], batch_size):
            rows = torch.tensor([beginning_of[kinds[i]] for i in part])
            rests = self._padded([prompts[i][lengths[beginning_of[kinds[i]]] :] for i in part])
            prompt_batch = {name: torch.cat([beginnings[name][rows], rests[name]], dim=1) for name in rests}
            generated = self._go_on(cache, rows, prompt_batch, limit, streamer)
            texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                answers[i] = text.strip()
        if show and streamer is None:
            show(answers[0])
        return answers

    def adopt(self, categories: CategorySet) -> None:
        """Take over the classes of some maps, where queries are computed from names, and any class will do."""
        if self.model.config.class_tokens is not None and categories != self.processor.categories:
            adopt_categories(self.model, self.processor, categories)

    def _read(self, pictures: Sequence[Picture], beginnings: dict[str, torch.Tensor]) -> Any:
        """Run the beginnings of prompts, one per picture, through the model; a cache of their keys and values."""
        inputs = {
            **beginnings,
            "position_ids": _positions(beginnings["attention_mask"]),
            **self.processor.picture_inputs([p.image for p in pictures], [p.panoptic for p in pictures]),
        }
        outputs = self.model(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()}, use_cache=True, logits_to_keep=1
        )
        return outputs.cache

    def _go_on(
        self, cache: Any, rows: torch.Tensor, prompt: dict[str, torch.Tensor], max_new_tokens: int, streamer: Any
    ) -> torch.Tensor:
        """Generate the tokens that follow prompts whose beginnings are rows of the cache."""
        device = self.model.device
        cache = copy.deepcopy(cache)  # `generate` adds to it, and other batches need it as it is
        cache.batch_select_indices(rows.repeat_interleave(self.beams).to(device))
        generated: torch.Tensor = self.model.generate(
            **{name: tensor.to(device) for name, tensor in prompt.items()},
            cache=cache,
            # `generate` would count the padding between beginning and rest as tokens.
            position_ids=_positions(prompt["attention_mask"]).to(device),
            max_new_tokens=max_new_tokens,
            num_beams=self.beams,
            **(self.sampling.options if self.sampling else {"do_sample": False}),
            pad_token_id=self.processor.tokenizer.pad_token_id,
            streamer=streamer,
        )
        return generated[:, prompt["input_ids"].shape[1] :].cpu()

    def _padded(self, sequences: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Pad on the left: `input_ids` and `attention_mask`, int64 [sequences, tokens]."""
        padded = self.processor.tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


class Conversation:
    """Turns about one picture, as many of the last ones as the model's context has room for.

    Args:
        with_objects: whether the object list stands before the first question.
        max_new_tokens: the length of an answer at most.
    """

    def __init__(self, answerer: Answerer, picture: Picture, with_objects: bool, max_new_tokens: int) -> None:
        self.picture = picture
        self._answerer = answerer
        self._with_objects = with_objects
        self._max_new_tokens = max_new_tokens
        self._turns: list[tuple[str, str]] = []
        self.forgotten = 0
        """Questions, with their answers, that no longer fit into the context: the first ones."""

    def ask(self, question: str, show: ShowText | None = None) -> str:
        """Answer in view of the earlier turns; `show` as in `Answerer.answer`.

        Raises:
            UserError: if the question alone is longer than the context; nothing is forgotten then.
        """
        answerer = self._answerer
        # An answer gets a quarter of the context where it may be as long, whatever was said before.
        wanted = min(self._max_new_tokens, answerer.context // 4)
        request = answerer.request(0, self.picture, [("human", question)], self._with_objects, self._max_new_tokens)
        turns = [*self._turns, ("human", question)]
        forgotten = 0
        while len(turns) > 1:
            with suppress(UserError):
                if answerer.room_for_answer(turns, request.objects, wanted) == wanted:
                    break
            turns, forgotten = turns[2:], forgotten + 1
        limit = answerer.room_for_answer(turns, request.objects, self._max_new_tokens)
        request = replace(request, turns=turns, max_new_tokens=limit)
        answer = answerer.answer([self.picture], [request], show=show)[0]
        self._turns, self.forgotten = [*turns, ("gpt", answer)], self.forgotten + forgotten
        return answer


class _Pieces(TextStreamer):
    """Pass on an answer piece by piece, without the space that it begins with."""

    def __init__(self, tokenizer: Any, show: ShowText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        self._show(text)


def load_answerer(
    source: str, device: torch.device, quantize: bool | None = None, beams: int = 1, sampling: Sampling | None = None
) -> Answerer:
    """Load a trained model, in bfloat16 on a GPU and in float32 on a CPU, save for what is quantised.

    Args:
        source: a run directory, or a whole model: folder or hub id.
        quantize: whether the language model is NF4; None leaves a run as it was trained, and a whole model as it is.

    Raises:
        UserError: if it is neither, or incomplete.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = Path(source)
    if (folder / TRAIN_ARGS).exists():
        model, processor = load_run(folder, device, dtype, quantize)
        return Answerer(model, processor, LISTED[read_train_args(folder)["object_list"]], beams, sampling)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{source}: holds neither a run's {TRAIN_ARGS} nor a model's config.json")
    whole, processor = load_base(source, dtype)
    if quantize:
        quantize_language_model(whole, dtype, device)
    move_to_device(whole, device)
    trained = export_facts(source).get("object_list", "dialogues")
    return Answerer(whole.eval(), processor, LISTED[trained], beams, sampling)


def _batches(limits: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Group requests, by number, into batches of one limit each: with mixed limits, a beam search would give answers
    that depend on the other requests of the batch."""
    for limit in sorted(set(limits)):
        numbers = [i for i, other in enumerate(limits) if other == limit]
        for start in range(0, len(numbers), size):
            yield limit, numbers[start : start + size]


def _system_text(turns: Turns) -> str:
    return turns[0][1] if turns[0][0] == "system" else ""


def _common_length(prompts: Sequence[list[int]]) -> int:
    """Count the first tokens that all prompts share, at most all but one: `generate` needs a token to go on from."""
    return min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids that skip padding, wherever it stands; int64 of the mask's shape."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
