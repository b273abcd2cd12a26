"""Answers: a trained model, and many questions about each image at the price of one pass over the image.

The prompts of an image begin alike: system text, image, often the object list. That beginning is computed once; its
keys and values are repeated for every question, and `generate` goes on from there. Prompts of different lengths are
padded on the left, once before the beginning and once before the rest; positions skip the padding, so that an answer is
the one that the whole prompt would have had, alone.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaModel

from collavo.device import move_to_device
from collavo.errors import UserError
from collavo.model.adapters import quantize_language_model
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Turns
from collavo.pictures import Picture
from collavo.runs import EXPORT, TRAIN_ARGS, load_base, load_run, read_train_args
from collavo.training.row_index import KINDS, Kind

# What transformers calls the keys and values of earlier tokens; it is past_key_values before version 5.24.
_CACHE = "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"

_LISTED: dict[str, tuple[Kind, ...]] = {"all": KINDS, "dialogues": ("dialogue",), "none": ()}


@dataclass(frozen=True, slots=True)
class Request:
    """A question about one of some pictures.

    `turns` end with the question; `objects` is the object list before the first one, empty for the phrase that says
    there is none, None for neither.
    """

    picture: int
    turns: Turns
    objects: str | None
    max_new_tokens: int


class Answerer:
    """A model that answers questions about pictures, the same way every time.

    Args:
        model: a CoLLaVO model, with or without adapters, in evaluation mode.
        listed: the kinds of questions that it was trained to see the object list with.
        beams: 1 for greedy decoding, 3 for the paper's beam search.
    """

    def __init__(self, model: Any, processor: CollavoProcessor, listed: Sequence[Kind], beams: int = 1) -> None:
        self.model = model
        self.processor = processor
        self.listed = tuple(listed)
        self.beams = beams

    def lists_objects(self, kind: Kind, object_list: str) -> bool:
        """Whether prompts of a kind begin with the object list, if that is to be `with`, `none`, or as in training:
        `trained`."""
        return object_list == "with" or (object_list == "trained" and kind in self.listed)

    @torch.inference_mode()
    def answer(
        self, pictures: Sequence[Picture], requests: Sequence[Request], batch_size: int = 16, streamer: Any = None
    ) -> list[str]:
        """Answer some requests, in their order.

        Args:
            pictures: they go through the model together, once; each has at least one request.
            batch_size: requests that are answered together.
            streamer: of transformers, for a single request without beams: shows the answer as it grows.
        """
        prompts = [self.processor.render(request.turns, request.objects).input_ids for request in requests]
        of_picture = [
            [prompt for prompt, request in zip(prompts, requests, strict=True) if request.picture == number]
            for number in range(len(pictures))
        ]
        lengths = [_common_length(same) for same in of_picture]
        beginnings = self._padded([same[0][:length] for same, length in zip(of_picture, lengths, strict=True)])
        cache = self._read(pictures, beginnings)
        answers = [""] * len(requests)
        for limit, part in _batches([request.max_new_tokens for request in requests], batch_size):
            rows = torch.tensor([requests[i].picture for i in part])
            rests = self._padded([prompts[i][lengths[requests[i].picture] :] for i in part])
            prompt = {name: torch.cat([beginnings[name][rows], rests[name]], dim=1) for name in rests}
            generated = self._go_on(cache, rows, prompt, limit, streamer)
            texts = self.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
            for i, text in zip(part, texts, strict=True):
                answers[i] = text.strip()
        return answers

    def _read(self, pictures: Sequence[Picture], beginnings: dict[str, torch.Tensor]) -> Any:
        """A cache of the keys and values of the beginnings of prompts, one per picture."""
        inputs = {
            **beginnings,
            "position_ids": _positions(beginnings["attention_mask"]),
            **self.processor.picture_inputs([p.image for p in pictures], [p.panoptic for p in pictures]),
        }
        device = self.model.device
        outputs = self.model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=True, logits_to_keep=1)
        return outputs[_CACHE]

    def _go_on(
        self,
        cache: Any,
        rows: torch.Tensor,
        prompt: dict[str, torch.Tensor],
        max_new_tokens: int,
        streamer: Any,
    ) -> torch.Tensor:
        """The tokens that follow prompts whose beginnings are rows of the cache, which stays as it is."""
        device = self.model.device
        cache = copy.deepcopy(cache)  # for `generate` adds to it
        cache.batch_select_indices(rows.repeat_interleave(self.beams).to(device))
        generated: torch.Tensor = self.model.generate(
            **{name: tensor.to(device) for name, tensor in prompt.items()},
            **{_CACHE: cache},
            # Told, for `generate` leaves no room for padding in the middle.
            position_ids=_positions(prompt["attention_mask"]).to(device),
            max_new_tokens=max_new_tokens,
            num_beams=self.beams,
            do_sample=False,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            streamer=streamer,
        )
        return generated[:, prompt["input_ids"].shape[1] :].cpu()

    def _padded(self, sequences: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, int64 [sequences, tokens], padded on the left."""
        padded = self.processor.tokenizer.pad({"input_ids": sequences}, padding_side="left", return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}


def load_answerer(source: str, device: torch.device, quantize: bool | None = None, beams: int = 1) -> Answerer:
    """Load a trained model: bfloat16 on a GPU, float32 on a CPU, beside what is quantised.

    Args:
        source: a run directory, or a whole model: folder or hub id.
        quantize: whether the language model is NF4; None for as it was trained, a whole model being as it is.

    Raises:
        UserError: if it is neither, or incomplete.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = Path(source)
    if (folder / TRAIN_ARGS).exists():
        model, processor = load_run(folder, device, dtype, quantize)
        return Answerer(model, processor, _LISTED[read_train_args(folder)["object_list"]], beams)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"--model {source}: holds neither a run's {TRAIN_ARGS} nor a model's config.json")
    try:
        whole, processor = load_base(source, dtype)
    except UserError as error:
        raise UserError(f"--model {str(error).removeprefix('--preset ')}") from error
    if quantize:
        quantize_language_model(whole, dtype, device)
    move_to_device(whole, device)
    export = folder / EXPORT
    trained = json.loads(export.read_text())["object_list"] if export.exists() else "dialogues"
    return Answerer(whole.eval(), processor, _LISTED[trained], beams)


def _batches(limits: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Requests that are answered together, by their numbers, all with one limit: among different limits a beam search
    would depend on the company."""
    for limit in sorted(set(limits)):
        numbers = [i for i, other in enumerate(limits) if other == limit]
        for start in range(0, len(numbers), size):
            yield limit, numbers[start : start + size]


def _common_length(prompts: Sequence[list[int]]) -> int:
    """How many tokens prompts have in common at their beginning, one being left at least to go on with."""
    shortest, *others = sorted(prompts, key=len)
    last = len(shortest) - 1
    return next((i for i in range(last) if any(other[i] != shortest[i] for other in others)), last)


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids that pass over padding, wherever it stands."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
