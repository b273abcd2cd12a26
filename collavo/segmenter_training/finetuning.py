"""Teach a segmentation network the classes of crayon rows: examples out of rows, losses, steps.

The losses are the network's own, as transformers has them: queries are matched with true segments, and each learns its
segment's class and mask. All other queries learn that they are nothing.

Unknown pixels (0 in a row's map, crowds, padding) teach nothing. For the networks' losses such a pixel would be one
that no mask covers, so a mask that reaches into an unlabelled car would be punished for it. Therefore all mask logits
there are set to "outside" before the loss sees them, which agrees with the targets and has no gradient; and a query
whose mask lies mostly on unknown pixels does not learn that it is nothing, for it may be right.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import AutoModelForUniversalSegmentation

from collavo.dataset import checked_row, image_and_map, opened_parquet, read_records
from collavo.errors import LeftOut, Rejected, UserError
from collavo.panoptic.maps import PanopticMap
from collavo.segmenters.framing import SIZE_DIVISOR, Framing
from collavo.segmenters.universal import without_backbone_warnings
from collavo.training import checkpoint
from collavo.training.loop import learning_rate_at, signals_noted
from schemas.categories import CategorySet, name_key

_GROUPS_TOGETHER = 8
"""Row groups whose rows are shuffled together, and are in memory at a time."""

_OUTSIDE = -20.0
"""A mask logit that says so surely that no loss moves it."""

_HALF_SIZE_SHARE = 0.9
"""Of the steps, see `framing_at`."""

_SMALLEST_PART = 0.5
"""Of a picture's sides, that an example may be cut down to."""


_HEADS = ("class_predictor", "class_labels_classifier", "class_embed")
"""Layers that tell the class of a query, by the end of their name."""


class Example(NamedTuple):
    """A picture as the network sees it, with its targets."""

    pixels: np.ndarray
    """uint8 [height, width, 3]"""

    masks: torch.Tensor
    """float32 [segments, height, width], 0 or 1"""

    labels: torch.Tensor
    """int64 [segments]"""

    unknown: torch.Tensor
    """bool [height, width]: pixels that teach nothing."""


class Place(NamedTuple):
    """Where a row lies."""

    file: str
    group: int
    row: int


@dataclass(frozen=True)
class SegmentedRows:
    """The rows of one split that have segments, read when they are needed; to train on, not only crowds.

    Args:
        places: of the rows, in the order of the files.
        damaged: rows that turn out to be of no use, and why; each once, however often it is read.
        shown: labels that the rows have segments of, crowds aside.
    """

    places: Sequence[Place]
    categories: CategorySet
    image_root: Path | None
    damaged: dict[Place, Rejected] = field(default_factory=dict)
    shown: frozenset[int] = frozenset()

    @property
    def left_out(self) -> LeftOut:
        """Count the damaged rows by reason."""
        left_out = LeftOut()
        for place, error in self.damaged.items():
            left_out.add(error.reason, f"row {place.row} of {place.file}", str(error))
        return left_out

    @classmethod
    def of_split(
        cls, files: Sequence[str], split: str, categories: CategorySet, image_root: Path | None
    ) -> "SegmentedRows":
        """Find the rows of a split.

        Raises:
            UserError: for a damaged file.
        """
        places: list[Place] = []
        shown: set[int] = set()
        for file in files:
            with opened_parquet(file) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    for number, record in enumerate(read_records(parquet, ["split", "segments"], group)):
                        if isinstance(record, Rejected) or record["split"] != split or not record["segments"]:
                            continue
                        whole = [each for each in record["segments"] if not (each and each["is_crowd"])]
                        if whole or split != "train":  # crowds teach nothing
                            places.append(Place(file, group, number))
                            shown.update(each["label"] for each in whole if each)
        return cls(places, categories, image_root, shown=frozenset(shown))

    def read(self, places: Sequence[Place]) -> Iterator[tuple[Place, np.ndarray, PanopticMap]]:
        """Yield place, picture and map of some rows, those of a row group one after another, but no damaged ones."""
        at_hand: dict[tuple[str, int], list[dict[str, Any] | Rejected]] = {}
        for place in places:
            group = place.file, place.group
            if group not in at_hand:
                if len(at_hand) == _GROUPS_TOGETHER:
                    at_hand.pop(next(iter(at_hand)))
                with opened_parquet(place.file) as parquet:
                    at_hand[group] = list(read_records(parquet, group=place.group))
            try:
                row = checked_row(at_hand[group][place.row], self.categories, with_instructions=False)
                yield place, *image_and_map(row, self.image_root, self.categories)
            except Rejected as error:
                self.damaged[place] = error

    def shuffled(self, seed: int, epoch: int) -> list[Place]:
        """Return the places of an epoch: row groups in random order, the rows of a few of them mixed."""
        rng = np.random.default_rng((seed, epoch))
        groups: dict[tuple[str, int], list[Place]] = {}
        for place in self.places:
            groups.setdefault((place.file, place.group), []).append(place)
        order = [list(groups.values())[number] for number in rng.permutation(len(groups))]
        mixed: list[Place] = []
        for first in range(0, len(order), _GROUPS_TOGETHER):
            together = [place for group in order[first : first + _GROUPS_TOGETHER] for place in group]
            mixed += [together[number] for number in rng.permutation(len(together))]
        return mixed

    def batches(
        self, batch_size: int, seed: int, framing_at: Callable[[int], Framing], first_step: int
    ) -> Iterator[list[Example]]:
        """Yield batches without end, from a step on: the same for a step whenever it is asked for.

        A batch may be empty, where all of its segments are too small to be seen at the network's size.
        """
        per_epoch = max(len(self.places) // batch_size, 1)
        epoch, skipped = divmod(first_step, per_epoch)
        while True:
            order = self.shuffled(seed, epoch)[skipped * batch_size : per_epoch * batch_size]
            rows = self.read(order)
            for step in range(skipped, per_epoch):
                rng = np.random.default_rng((seed, epoch, step))
                framing = framing_at(epoch * per_epoch + step)
                chosen = [row for _, row in zip(range(batch_size), rows, strict=False)]
                examples = [example_of(image, panoptic, framing, rng) for _, image, panoptic in chosen]
                if examples:  # where rows are damaged, an epoch may end early
                    yield [example for example in examples if example.labels.numel()]
            if len(self.damaged) == len(self.places):
                raise UserError(f"no row can be used: {'; '.join(self.left_out.lines())}")
            epoch, skipped = epoch + 1, 0


def example_of(image: np.ndarray, panoptic: PanopticMap, framing: Framing, rng: np.random.Generator) -> Example:
    """Make an example of a picture and its map: mirrored half of the time, and half of the time a part of it."""
    index_map = panoptic.index_map
    if rng.random() < 0.5:
        image, index_map = image[:, ::-1], index_map[:, ::-1]
    if rng.random() < 0.5:
        share = rng.uniform(_SMALLEST_PART, 1)
        height, width = (max(round(share * side), 1) for side in index_map.shape)
        top, left = (rng.integers(side - part + 1) for side, part in zip(index_map.shape, (height, width), strict=True))
        part = np.s_[top : top + height, left : left + width]
        image, index_map = image[part], index_map[part]
    (height, width), input_hw = framing.sizes(index_map.shape)
    positions = np.zeros(input_hw, np.int32)
    ids = Image.fromarray(np.ascontiguousarray(index_map).astype(np.int32))
    positions[:height, :width] = np.asarray(ids.resize((width, height), Image.Resampling.NEAREST))
    wanted = [
        position for position in np.unique(positions) if position and not panoptic.segments[position - 1].is_crowd
    ]
    masks = positions == np.array(wanted, np.int32)[:, None, None]
    return Example(
        framing.pixels([np.ascontiguousarray(image)], 1)[0],
        torch.from_numpy(masks).float(),
        torch.tensor([panoptic.segments[position - 1].label for position in wanted], dtype=torch.int64),
        torch.from_numpy(~masks.any(0)),
    )


def network_for(base: Any, base_set: CategorySet, categories: CategorySet) -> Any:
    """Make a network of other classes out of a base; a class that has its name in both keeps what the base knows of it.

    Args:
        base: the network to start from.
        base_set: its classes, whose ids are the base's numbers.
        categories: the classes that the new network has, in this order.
    """
    config = copy.deepcopy(base.config)
    config.id2label = {category.label: category.name for category in categories}
    config.label2id = {name: label for label, name in config.id2label.items()}
    old, new = base.config.num_labels, len(categories)
    with without_backbone_warnings():
        model = AutoModelForUniversalSegmentation.from_config(config)
    number_of = {name_key(category.name): category.category_id for category in base_set}
    kept = {category.label: number_of.get(name_key(category.name)) for category in categories} | {new: old}
    known = base.state_dict()
    state = model.state_dict()
    for name, tensor in state.items():
        if name.rpartition(".")[0].endswith(_HEADS):  # a row for each class, then one for "nothing"
            for row, from_row in kept.items():
                if from_row is not None:
                    tensor[row] = known[name][from_row]
        elif known[name].shape == tensor.shape:  # all but the weights of the classes in the loss
            tensor.copy_(known[name])
    model.load_state_dict(state)
    return model


def framing_at(step: int, steps: int, framing: Framing) -> Framing:
    """Return how a step sees its pictures: where all inputs have one size, most steps see half of it.

    These take a third of the time, and the last ones suffice to learn the rest. A padded input's size is fixed.
    """
    sides = framing.size_hw
    if sides is None or framing.edges is not None or any(side % (2 * SIZE_DIVISOR) for side in sides):
        return framing
    return replace(framing, size_hw=(sides[0] // 2, sides[1] // 2)) if step < _HALF_SIZE_SHARE * steps else framing


class Learner(nn.Module):
    """A network with its own losses, in which unknown pixels have no say.

    Args:
        task: further inputs of the network, [1, values] each.
    """

    def __init__(self, model: Any, framing: Framing, task: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self._framing = framing
        self._task = dict(task)
        self._unknown = torch.empty(0)
        if model.config.model_type == "detr":
            plain: Callable[..., Any] = model.loss_function

            def loss_of_known(logits: Any, labels: Any, device: Any, boxes: Any, masks: Any, *rest: Any) -> Any:
                masks, logits = self._known_only(masks, logits)
                return plain(logits, labels, device, boxes, masks, *rest)

            model.loss_function = loss_of_known
        else:
            model.criterion.register_forward_pre_hook(self._known_only_in, with_kwargs=True)

    def forward(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the loss of examples of one size."""
        device = self.model.device
        self._unknown = torch.stack([example.unknown for example in examples]).to(device)
        pixels = torch.from_numpy(np.stack([example.pixels for example in examples])).to(device)
        inputs = {name: tensor.expand(len(pixels), -1).to(device) for name, tensor in self._task.items()}
        masks = [example.masks.to(device) for example in examples]
        labels = [example.labels.to(device) for example in examples]
        targets: dict[str, Any] = {"mask_labels": masks, "class_labels": labels}
        if self.model.config.model_type == "detr":
            targets = {
                "labels": [
                    {"class_labels": of_one, "boxes": _boxes(mask), "masks": mask}
                    for of_one, mask in zip(labels, masks, strict=True)
                ]
            }
        loss: torch.Tensor = self.model(pixel_values=self._framing.normalise(pixels), **inputs, **targets).loss
        return loss

    def _known_only_in(self, criterion: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        """Change the logits that a criterion is called with."""
        given = inspect.signature(criterion.forward).bind(*args, **kwargs).arguments
        names = ("masks_queries_logits", "class_queries_logits")
        given |= dict(zip(names, self._known_only(*(given[name] for name in names)), strict=True))
        for name in ("auxiliary_predictions", "auxiliary_logits"):
            if given.get(name):
                given[name] = [
                    dict(zip(names, self._known_only(*(layer[each] for each in names)), strict=True))
                    for layer in given[name]
                ]
        return (), dict(given)

    def _known_only(self, masks: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask logits [batch, queries, height, width] and class logits without what rests on unknown pixels."""
        unknown = functional.interpolate(self._unknown[:, None].float(), size=masks.shape[-2:], mode="area") > 0.5
        claimed = masks.detach() > 0
        mostly = (claimed & unknown).sum((2, 3)) > claimed.sum((2, 3)) / 2
        nothing = torch.zeros_like(classes[0, 0])
        nothing[-1] = 10
        return masks.masked_fill(unknown, _OUTSIDE), torch.where(mostly[..., None], nothing, classes)


def _boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return the boxes of masks, float32 [segments, 4]: centre, width and height, as shares of the input."""
    height, width = masks.shape[1:]
    edges = []
    for mask in masks.bool():
        (rows,), (columns,) = (mask.any(axis).nonzero(as_tuple=True) for axis in (1, 0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        edges.append(torch.stack([(left + right) / 2 / width, (top + bottom) / 2 / height,
                                  (right - left) / width, (bottom - top) / height]))  # fmt: skip
    return torch.stack(edges)


@dataclass(frozen=True, slots=True)
class Steps:
    """Length and speed of a training."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    checkpoint_steps: int


def take_steps(
    learner: Learner,
    rows: SegmentedRows,
    framing: Framing,
    options: Steps,
    run: Path,
    learned_from: dict[str, Any],
    report: Callable[[int, float], None],
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """Train all weights, from the last checkpoint below `run` where it holds one.

    Args:
        learned_from: as of `collavo.training.checkpoint.save_checkpoint`.
        report: is told of each step and its loss.
        reading: makes the context in which rows are read, for what an error there should say.

    Returns:
        how many steps are done: all of them, or fewer after a signal, when a checkpoint is written.

    Raises:
        UserError: for a checkpoint of other data or arguments, and for losses that are no numbers.
    """
    parameters = dict(learner.model.named_parameters())
    state = {**parameters, **dict(learner.model.named_buffers())}
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=options.learning_rate
    )
    done = 0
    if checkpoints := checkpoint.list_checkpoints(run):
        done = checkpoint.read_position(checkpoints[-1], learned_from).total_steps
        files = [file for file, _ in learned_from["data"]]  # moved, their names may sort otherwise
        rows = replace(rows, places=sorted(rows.places, key=lambda place: files.index(place.file)))
        checkpoint.load_weights(checkpoints[-1], state)
        checkpoint.load_optimizer(checkpoints[-1], state, optimizer)
    learner.train()
    batches = rows.batches(
        options.batch_size, options.seed, lambda step: framing_at(step, options.steps, framing), done
    )
    with signals_noted() as signals:
        while done < options.steps and not signals:
            rate = learning_rate_at(
                done, options.steps, options.learning_rate, 0.01 * options.learning_rate, min(100, options.steps // 10)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            # The same step draws the same points for its losses, whether or not the run was stopped before it.
            torch.manual_seed(options.seed * 1_000_003 + done)
            with reading():
                examples = next(batches)
            loss = _gradients(learner, examples, framing) if examples else 0.0
            norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            if not torch.isfinite(norm):
                raise UserError(f"step {done}: the loss is {loss:g}; a lower learning rate may help", 1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            report(done, loss)
            if done % options.checkpoint_steps == 0 or done == options.steps or signals:
                position = checkpoint.Position("segmenter", done, done, rows.left_out)
                checkpoint.save_checkpoint(run, position, state, optimizer, learned_from, keep=1)
    return done


def _gradients(learner: Learner, examples: Sequence[Example], framing: Framing) -> float:
    """Add up the gradients of a batch and return its loss; where inputs have sizes of their own, one by one."""
    parts = [examples] if framing.size_hw is not None else [[example] for example in examples]
    total = 0.0
    for part in parts:
        loss = learner(part) * (len(part) / len(examples))
        loss.backward()
        total += float(loss.detach())
    return total
