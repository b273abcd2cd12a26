"""Plug CoLLaVO into lmms-eval, the usual benchmark harness: `lmms-eval --model collavo --tasks mme,pope ...`.

Needs lmms-eval, which `pip install 'collavo[lmms-eval]'` brings. lmms-eval finds `MANIFEST` by the entry point in
pyproject.toml. Images are segmented here. A prompt shows one image; if a task has several, the first is shown, with a
warning.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from rich.progress import track

from collavo.device import join_ranks
from collavo.errors import UserError
from collavo.images import rgb_pixels
from collavo.inference import Picture, Request, load_answerer
from collavo.runs import base_of
from collavo.segmenters import open_segmenter

MANIFEST = ModelManifest("collavo", simple_class_path="collavo.evaluation.harness.CollavoHarness")

_MAX_NEW_TOKENS = 256  # for tasks that name no limit


class CollavoHarness(lmms):
    """A model for lmms-eval; its arguments are those of `--model_args`.

    Args:
        pretrained: a run directory or a whole model, as `--model` of the commands.
        segmenter, segmenter_checkpoint, segmenter_config, segmenter_preset, segmenter_input_size, device, beams,
            quantize: as the flags of `python -m collavo.chat`.
        object_list: `trained`, `with` or `none`: whether prompts begin with the recognised objects.
        batch_size: prompts answered together.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        segmenter: str = "auto",
        segmenter_checkpoint: str | None = None,
        segmenter_config: str | None = None,
        segmenter_preset: str | None = None,
        segmenter_input_size: int | None = None,
        object_list: str = "trained",
        beams: int = 1,
        quantize: bool | None = None,
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        # lmms-eval asks for these three where several processes share a task.
        self.device, self._rank, self._world_size = join_ranks(device)
        self._answerer = load_answerer(pretrained, self.device, quantize, beams)
        self._segmenter = open_segmenter(
            segmenter,
            str(self.device),
            checkpoint=segmenter_checkpoint,
            config=segmenter_config,
            preset=segmenter_preset,
            input_size=segmenter_input_size,
            base=base_of(pretrained),
        )
        self._listed = self._answerer.lists_objects("dialogue", object_list)
        if line := self._answerer.untrained({"dialogues": "dialogue"}, object_list):
            warnings.warn(f"object_list={object_list}: {line}", stacklevel=2)
        self._batch_size = int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer each request, up to the first of its stop texts."""
        answers: list[str] = []
        for start in track(range(0, len(requests), self._batch_size), "Answering"):
            part = [instance.args for instance in requests[start : start + self._batch_size]]
            pictures, numbers = self._pictures([self._image(*args[2:6]) for args in part])
            asked: dict[int, Request] = {}
            for place, ((context, options, *_), number) in enumerate(zip(part, numbers, strict=True)):
                turns, limit = [("human", context)], int(options.get("max_new_tokens") or _MAX_NEW_TOKENS)
                try:
                    asked[place] = self._answerer.request(number, pictures[number], turns, self._listed, limit)
                except UserError as error:
                    warnings.warn(f"answered with nothing: {error}", stacklevel=2)
            texts = self._answerer.answer(pictures, list(asked.values()), self._batch_size) if asked else []
            said = dict(zip(asked, texts, strict=True))
            answers += [_until(said.get(place, ""), args[1].get("until")) for place, args in enumerate(part)]
        return answers

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError("collavo answers in words; choose the generate_until variant of this task")

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError("collavo answers one prompt about one image; this task has several rounds")

    def _image(self, doc_to_visual: Any, doc_id: int, task: str, split: str) -> np.ndarray:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id])
        if not visuals or not hasattr(visuals[0], "convert"):
            raise ValueError(f"task {task}, document {doc_id}: has no image, and collavo answers about images only")
        if len(visuals) > 1:
            warnings.warn(f"task {task}: collavo sees the first image only where a prompt has several", stacklevel=2)
        return rgb_pixels(visuals[0])

    def _pictures(self, images: Sequence[np.ndarray]) -> tuple[list[Picture], list[int]]:
        """Segment the distinct images; and for each image the number of its picture."""
        keys = [(image.shape, image.tobytes()) for image in images]
        distinct = dict(zip(keys, images, strict=True))
        numbers = {key: number for number, key in enumerate(distinct)}
        pictures = [Picture(image, self._segmenter.segment([image])[0]) for image in distinct.values()]
        return pictures, [numbers[key] for key in keys]


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Cut an answer at the first of its stop texts. An empty line is none: lmms-eval puts it where a task names no stop
    text, for prompts with examples, and its own models pass over it."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop not in ("", "\n\n") else text
    return text.strip()
