"""Teach a base to write boxes, with three more layers behind its own.

    python -m pretraining.box_writing --start runs/base/model --output runs/boxes

A base that reads which word of a word grid stands in a box cannot write the box of a word, and no loss on answers alone
taught it (benchmarks/LOG.md, 2026-11-29). Here its own layers stay as they are, and with them all that it can do. Each
of three new ones is told where to look, on charts that ask where a word is:

    edges    the word of an answer attends to its cells at the four edges of its box, one head an edge
    next     it attends to the cells of the same word with the next number, or to the first token if there are none, so
             that the answer can end
    fetch    the four numbers of a box attend to the word, one head a number

What the base knows of a word and of a cell is in its last states already, and linear regressions find it there: the
heads of the first two layers begin as these. Then the first layer and the last are trained where they matter most, at
words and in boxes, and at a sample of all other tokens, which they have to leave as they are. At last all three learn
to write whole answers, and to answer other charts and scenes of `pretraining.base` as the base does. Its states never
change, so each sequence passes it once.

The output's folder `model` is a base for `collavo.train --preset`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from collavo import cli
from collavo.cli import REQUIRED, flag, naming
from collavo.errors import UserError
from collavo.evaluation.judge import box_iou
from collavo.instructions.text import Box, find_boxes, parse_objects
from collavo.model import CollavoForConditionalGeneration
from collavo.model.branches import CRAYON_SIGNAL
from collavo.model.packing import PADDING, SHARED, packing_mask
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import Turns
from collavo.model.query_init import ClassWords
from collavo.progress import Progress
from collavo.runs import load_base
from collavo.training.batches import IGNORED, Example, collate, packed_positions
from pretraining.base import PretrainingExamples, save_base
from pretraining.loop import log_line
from pretraining.word_grids import Chart, WordPrompt, chart_example
from schemas.categories import COCO_PANOPTIC, MAX_NUMBERING

EDGES = 4
"""Left, top, right and bottom; as many as the base has heads, and as a box has numbers."""

_BINS = 48
"""Parts of the picture's width or height that a linear probe has to tell apart behind the first layer. It helps
little: 0.4 points more of the tokens of boxes are right (benchmarks/LOG.md, 2026-11-30)."""

_STEADY = 3e-3
"""Heads begin to match words by those turns of the rotary embedding that are slower than this, in radians a token: a
word may stand hundreds of tokens behind its cells."""

_SLOPE = 2.0
"""By how much the score of a cell begins to fall from one cell to the next, as its head looks for an edge."""

_WORDS_LEARNING_RATE = 4e-3
"""Peak of the learning rate while layers are trained where they matter most."""

_BOXES_AT_ONCE, _OTHERS_AT_ONCE = 0.3, 0.12
"""Shares of boxes and of all other tokens that a step of this sees."""

_FIRST_SEED, _OTHER_SEED = 20_000, 900_000
"""Numbers of the first chart that asks where words are, and of the first other chart and scene."""

Kind = Literal["where", "all", "tiles", "scene"]

_KEPT: tuple[Kind, ...] = ("all", "scene", "all", "tiles")
"""What every second step holds, in turn: what the new layers must not disturb."""


class Written(NamedTuple):
    """A box in an answer: where it stands, as positions in its sequence, and what it means."""

    word: int
    """The last token of the name."""

    opens: int
    closes: int
    """The brackets."""

    box_xyxy: Box
    """Fractions of the picture."""

    edges: torch.Tensor
    """bool [4, cells]: the cells of the object that lie at each edge of them all."""

    following: torch.Tensor
    """bool [cells]: the cells of the object of the same name with the next number."""


@dataclass(frozen=True, slots=True)
class Known:
    """A sequence as the base knows it: the states behind its last layer."""

    kind: Kind
    states: torch.Tensor
    """bfloat16 [tokens, hidden]"""

    input_ids: torch.Tensor
    labels: torch.Tensor
    sequence_ids: torch.Tensor
    semantic_ids: torch.Tensor
    numbering_ids: torch.Tensor
    written: tuple[Written, ...]


class Batch:
    """Sequences padded to one length, with what a layer is given besides the states.

    Args:
        words: vectors of classes and of numbers, and the scale of a signal; see `ClassWords.vectors`.
    """

    def __init__(self, known: Sequence[Known], words: tuple[torch.Tensor, ...], image_token: int, comma: int) -> None:
        self.known = known
        self._comma = comma
        names, numbers, scale = words
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        self.states = pad([k.states.float() for k in known])
        self.input_ids = pad([k.input_ids for k in known])
        self.labels = pad([k.labels for k in known], padding_value=IGNORED)
        self.sequence_ids = pad([k.sequence_ids for k in known], padding_value=PADDING)
        signals = [((names[k.semantic_ids] + numbers[k.numbering_ids]) * scale).flatten(0, 1) for k in known]
        self.cells = self.input_ids == image_token
        self.signal = torch.zeros_like(self.states).masked_scatter(self.cells[..., None], torch.cat(signals))
        self.first_cell = self.cells.int().argmax(1).tolist()
        self.positions = packed_positions(self.sequence_ids)
        self.objects = [(row, written) for row, k in enumerate(known) for written in k.written]

    def on_cells(self, row: int, cells: torch.Tensor) -> torch.Tensor:
        """Spread a mask of cells, [..., cells], over the tokens of the sequence: [..., tokens]."""
        first = self.first_cell[row]
        return functional.pad(cells, (first, self.states.shape[1] - first - cells.shape[-1]))

    @cached_property
    def words(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and positions of the words of all objects."""
        return tuple(torch.tensor(each) for each in zip(*((r, w.word) for r, w in self.objects), strict=True))  # type: ignore[return-value]

    @property
    def edges(self) -> torch.Tensor:
        """bool [objects, 4, tokens]"""
        return torch.stack([self.on_cells(row, written.edges) for row, written in self.objects])

    @cached_property
    def numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each token of a box but its last: the object, the token, and which of the four numbers it belongs to."""
        comma = self.input_ids == self._comma
        found = []
        for place, (row, written) in enumerate(self.objects):
            number = 0
            for token in range(written.opens, written.closes):
                found.append((place, token, number))
                number += int(comma[row, token + 1])
        return tuple(map(torch.tensor, zip(*found, strict=True)))  # type: ignore[return-value]

    @property
    def boxes(self) -> torch.Tensor:
        """float [objects, 4], fractions of the picture."""
        return torch.tensor([written.box_xyxy for _, written in self.objects])


class Writer(nn.Module):
    """The new layers of a grown base, with the probe that helps to train them."""

    def __init__(self, model: CollavoForConditionalGeneration, processor: CollavoProcessor) -> None:
        super().__init__()
        language_model: Any = model.model.language_model
        self.layers = language_model.layers[-3:]
        self.probe = nn.Linear(language_model.embed_tokens.embedding_dim, EDGES * _BINS)
        self.requires_grad_(True)
        self._model = [model]  # in a list, so that only the new layers are this module's
        self._image_token = processor.image_token_id
        self._comma, self._closes = processor.tokenizer.convert_tokens_to_ids([",", "]"])
        self._words = tuple(v.detach() for v in ClassWords(processor.tokenizer, COCO_PANOPTIC).vectors(model))
        self._attention: dict[int, torch.Tensor] = {}
        self._at_edges = torch.empty(0)
        for place, layer in enumerate(self.layers):
            layer.self_attn.register_forward_hook(partial(self._keep_attention, place))
        self.layers[0].register_forward_hook(self._keep_states)

    def batch(self, known: Sequence[Known]) -> Batch:
        return Batch(known, self._words, self._image_token, self._comma)

    @torch.no_grad()
    def begin(self, known: Sequence[Known]) -> None:
        """Let the heads of the first two layers begin as linear regressions on what the base knows.

        The queries of a word are regressed to the signal that its cells have, or would have with the next number, and
        the keys of a cell to its own signal, so that both meet; the values of a cell to its column and row. What falls
        from cell to cell lets the heads of the first layer look at one side of an object.
        """
        names, numbers, scale = self._words
        edge, following, fetch = self.layers
        rows, columns = known[0].semantic_ids.shape
        y, x = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
        places = torch.cat(
            [functional.one_hot(x, columns), functional.one_hot(y, rows), torch.stack([x, y], 1)], 1
        ).float()
        at_words, own, later, at_cells, signals = [], [], [], [], []
        for sequence in known:
            batch = self.batch([sequence])
            seen = edge.input_layernorm(batch.states[0]) + batch.signal[0]
            cells = slice(batch.first_cell[0], batch.first_cell[0] + rows * columns)
            at_cells.append(seen[cells])
            signals.append(batch.signal[0, cells])
            for _, written in batch.objects:
                cell = int(written.edges[0].int().argmax())
                label, number = sequence.semantic_ids.flatten()[cell], sequence.numbering_ids.flatten()[cell]
                at_words.append(seen[written.word])
                own.append((names[label] + numbers[number]) * scale)
                later.append((names[label] + numbers[min(number + 1, MAX_NUMBERING)]) * scale)
        word, cell, signal = torch.stack(at_words), torch.cat(at_cells), torch.cat(signals)
        key, value = _regression(cell, signal), _regression(cell, places.repeat(len(known), 1), 0.01)
        *_, column, row = value
        always = _regression(word, torch.ones(len(word), 1), 0.001, centred=False)[0]
        steady = _steady_projection(edge.self_attn.head_dim, names[1:] * scale, numbers[1:] * scale)
        for layer, targets, heads in ((edge, own, EDGES), (following, later, 1)):
            attention, size = layer.self_attn, layer.self_attn.head_dim
            query = _regression(word, torch.stack(targets))
            for head in range(heads):
                chosen = slice(head * size, (head + 1) * size)
                attention.q_proj.weight[chosen] = steady @ query
                attention.k_proj.weight[chosen] = steady @ key
        for head, (away, sign) in enumerate(((column, -1), (row, -1), (column, 1), (row, 1))):
            slowest = head * edge.self_attn.head_dim + edge.self_attn.head_dim // 2 - 1
            edge.self_attn.q_proj.weight[slowest] = sign * (_SLOPE / edge.self_attn.scaling) * always
            edge.self_attn.k_proj.weight[slowest] = away
        # What the new layers write has to be heard beside states whose norm is in the hundreds.
        edge.self_attn.v_proj.weight.normal_(std=0.02)
        for head in range(EDGES):
            edge.self_attn.v_proj.weight[head * edge.self_attn.head_dim :][: len(value)] = value
        edge.self_attn.o_proj.weight.normal_(std=4.0)
        edge.mlp.down_proj.weight.normal_(std=0.1)
        for layer in (following, fetch):
            layer.self_attn.v_proj.weight.normal_(std=0.05)
            layer.self_attn.o_proj.weight.normal_(std=0.5)
            layer.mlp.down_proj.weight.normal_(std=0.3)

    def loss_at_words(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of the first layer and the last one, where these matter most, without the one between them.

        The first layer is computed at the words, at some of the boxes' tokens, and at a sample of all others, which it
        has to leave as they are. Head k of the last layer gets the word's states where number k is written, and
        all others get the first token's. That is a fifth of the work of all layers at all tokens.
        """
        rows, words = batch.words
        objects, boxes, numbers = batch.numbers
        chosen = (torch.rand(len(rows)) < _BOXES_AT_ONCE)[objects]
        objects, boxes, numbers = objects[chosen], boxes[chosen], numbers[chosen]
        plain = (batch.sequence_ids != PADDING) & (torch.rand(batch.input_ids.shape) < _OTHERS_AT_ONCE)
        plain[rows, words] = False
        plain[rows[batch.numbers[0]], batch.numbers[1]] = False
        other_rows, others = plain.nonzero(as_tuple=True)
        weights, states = self._first_layer(
            batch, torch.cat([rows, rows[objects], other_rows]), torch.cat([words, boxes, others])
        )
        word, written, left = states.split([len(words), len(boxes), len(others)])
        on, unlike = _attended(weights[: len(words)], batch.edges)
        told = self._told(word, batch)
        layer = self.layers[-1]
        of_first, of_word = (
            layer.self_attn.v_proj(layer.input_layernorm(each)).unflatten(1, (EDGES, -1))
            for each in (batch.states[:, 0], word)
        )
        heard = functional.one_hot(numbers, EDGES).bool()[..., None]
        read = torch.cat([torch.where(heard, of_word[objects], of_first[rows[objects]]), of_first[other_rows]])
        ends = torch.cat([written, left]) + layer.self_attn.o_proj(read.flatten(1))
        ends = ends + layer.mlp(layer.post_attention_layernorm(ends))
        logits, now = self._logits(ends).split([len(boxes), len(others)])
        following = batch.input_ids[rows[objects], boxes + 1]
        answers = functional.cross_entropy(logits, following)
        before = self._logits(batch.states[other_rows, others])
        changed = functional.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
        return unlike + told + 3 * answers + 3 * changed, {
            "edges": on,
            "probe": told.item(),
            "numbers": answers.item(),
            "numbers_right": (logits.argmax(-1) == following).float().mean().item(),
            "others": changed.item(),
        }

    def _first_layer(self, batch: Batch, rows: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first layer's attention, [queries, 4, tokens], and states, [queries, hidden], at some tokens."""
        layer = self.layers[0]
        attention, size = layer.self_attn, layer.self_attn.head_dim
        seen = layer.input_layernorm(batch.states) + batch.signal
        cos, sin = self._model[0].model.language_model.rotary_emb(seen, batch.positions)
        key, value = (
            projection(seen).unflatten(2, (EDGES, size)).transpose(1, 2)
            for projection in (attention.k_proj, attention.v_proj)
        )
        key = apply_rotary_pos_emb(key, key, cos, sin)[1]
        query = attention.q_proj(seen[rows, tokens]).unflatten(1, (EDGES, 1, size))
        query = apply_rotary_pos_emb(query, query, cos[rows, tokens][:, None], sin[rows, tokens][:, None])[0][:, :, 0]
        order = rows.argsort(stable=True)
        weights, read = [], []
        for row, of_row in enumerate(order.split(rows.bincount(minlength=len(batch.known)).tolist())):
            sequence_ids = batch.sequence_ids[row]
            own = sequence_ids == sequence_ids[tokens[of_row], None]
            allowed = (torch.arange(seen.shape[1]) <= tokens[of_row, None]) & (own | (sequence_ids == SHARED))
            scores = torch.einsum("nhd,htd->nht", query[of_row], key[row]) * attention.scaling
            weights.append(scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1))
            read.append(torch.einsum("nht,htd->nhd", weights[-1], value[row]))
        back = order.argsort()
        states = batch.states[rows, tokens] + attention.o_proj(torch.cat(read)[back].flatten(1))
        return torch.cat(weights)[back], states + layer.mlp(layer.post_attention_layernorm(states))

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of all layers: on answers and, where these write boxes, on where each layer looks."""
        language_model: Any = self._model[0].model.language_model
        states = batch.states
        for layer in self.layers:
            states = layer(
                states,
                attention_mask=packing_mask(batch.sequence_ids, "eager", states.dtype),
                position_ids=batch.positions,
                position_embeddings=language_model.rotary_emb(states, batch.positions),
                **{CRAYON_SIGNAL: batch.signal},
            )
        following = functional.pad(batch.labels, (0, 1), value=IGNORED)[:, 1:]
        supervised = following != IGNORED
        logits = self._logits(states[supervised])
        right = (logits.argmax(-1) == following[supervised]).float()
        kind = batch.known[0].kind
        if not batch.objects:
            text = (batch.sequence_ids != PADDING) & ~batch.cells
            before, now = (self._logits(each[text]).log_softmax(-1) for each in (batch.states, states))
            unlike = functional.kl_div(now, before, log_target=True, reduction="batchmean")
            return 3 * unlike, {kind: unlike.item(), f"{kind}_right": right.mean().item()}
        answers = functional.cross_entropy(logits, following[supervised])
        figures = {kind: answers.item(), f"{kind}_right": right.mean().item()}
        figures["ends_right"] = right[batch.input_ids[supervised] == self._closes].mean().item()
        rows, words = batch.words
        on_edges, edges = _attended(self._attention[0][rows, :, words], batch.edges)
        on_next, later = _attended(self._attention[1][rows, 0, words], self._next(batch))
        told = self._told(self._at_edges[rows, words], batch)
        on_word, fetched = self._fetched(batch)
        figures |= {"edges": on_edges, "next": on_next, "fetch": on_word, "probe": told.item()}
        return 3 * answers + 0.5 * edges + 0.3 * later + 0.5 * told + 0.5 * fetched, figures

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        language_model: Any = self._model[0].model.language_model
        return language_model.norm(states) @ language_model.embed_tokens.weight.T

    def _next(self, batch: Batch) -> torch.Tensor:
        """Return where the second layer is to look: bool [objects, tokens]."""
        masks = torch.stack([batch.on_cells(row, written.following) for row, written in batch.objects])
        masks[~masks.any(1), 0] = True
        return masks

    def _fetched(self, batch: Batch) -> tuple[float, torch.Tensor]:
        """Return how much the tokens of number k attend to the word by head k, and to the first token by others."""
        objects, tokens, numbers = batch.numbers
        rows, words = batch.words
        targets = functional.one_hot(numbers, EDGES) * words[objects, None]
        weights = self._attention[2][rows[objects], :, tokens].gather(2, targets[..., None]).squeeze(2)
        return weights.mean().item(), -weights.clamp_min(1e-7).log().mean()

    def _told(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the loss of the probe on states of words: float [objects, hidden]."""
        told = self.probe(functional.rms_norm(states, states.shape[-1:])).unflatten(1, (EDGES, _BINS))
        return functional.cross_entropy(told.flatten(0, 1), (batch.boxes * _BINS).long().clamp_max(_BINS - 1).flatten())

    def _keep_attention(self, place: int, _: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._attention[place] = output[1]

    def _keep_states(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        self._at_edges = output


def cut(model: CollavoForConditionalGeneration, layers: int) -> None:
    """Take away all layers of a language model but the first ones."""
    language_model: Any = model.model.language_model
    del language_model.layers[layers:]
    model.config.text_config.num_hidden_layers = len(language_model.layers)


def grow(model: CollavoForConditionalGeneration, layers: int = 3) -> CollavoForConditionalGeneration:
    """Return a model with more layers behind those of another; the new ones write nothing yet."""
    config = model.config
    config.text_config.num_hidden_layers += layers
    grown = CollavoForConditionalGeneration(config)
    grown.load_state_dict(model.state_dict(), strict=False)
    grown.tie_weights()
    with torch.no_grad():
        for layer in grown.model.language_model.layers[-layers:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return grown


def box_overlaps(
    model: CollavoForConditionalGeneration,
    processor: CollavoProcessor,
    chart: Chart,
    turns: Turns,
    picture: np.ndarray,
) -> list[float]:
    """Let a base answer a question about a chart, and return the IoU of each box in its answer with the true one.

    They are compared in order, that of the numbers; a box too few or too many counts as 0.

    Args:
        model: with a `WordPrompt`.
        turns: one of the chart's conversations.
        picture: uint8 [height, width, 3].
    """
    example = chart_example(chart._replace(dialogues=[turns]), picture, processor)
    asked = example.input_ids[example.labels == IGNORED]
    answer = model.generate(
        input_ids=asked[None],
        pixel_values=example.pixel_values[None],
        semantic_ids=example.semantic_ids[None],
        numbering_ids=example.numbering_ids[None],
        max_new_tokens=160,  # five boxes with their names
        do_sample=False,
    )
    said = find_boxes(processor.tokenizer.decode(answer[0, len(asked) :], skip_special_tokens=True))
    true = find_boxes(turns[1][1])
    return [*map(box_iou, true, said), *[0.0] * abs(len(true) - len(said))]


def _regression(
    inputs: torch.Tensor, targets: torch.Tensor, ridge: float = 0.02, *, centred: bool = True
) -> torch.Tensor:
    """Return the weights of a ridge regression without an intercept: float [targets, inputs]."""
    x, y = inputs.double(), targets.double()
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ y).T.float()


def _steady_projection(size: int, names: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return a projection that tells names and numbers apart, onto those dimensions of a head that hardly turn.

    They are few, so names and numbers get their own principal components there, each of the same weight. The slowest
    dimension is left free.
    """
    turns = 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    (steady,) = (turns < _STEADY).repeat(2).nonzero(as_tuple=True)
    steady = steady[steady != size // 2 - 1]
    for_numbers = len(steady) // 3
    chosen = []
    for vectors, count, weight in ((names, len(steady) - for_numbers, 3), (numbers, for_numbers, 4.5)):
        _, spread, components = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        chosen.append(weight * len(vectors) ** 0.5 * components[:count] / spread[:count, None])
    projection = torch.zeros(size, names.shape[1])
    projection[steady] = torch.cat(chosen)
    return projection


def _attended(weights: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the mean share of attention on some tokens, and its loss."""
    shares = (weights * targets).sum(-1)
    return shares.mean().item(), -shares.clamp_min(1e-7).log().mean()


@torch.no_grad()
def known_sequences(
    model: CollavoForConditionalGeneration, processor: CollavoProcessor, kind: Kind, examples: Iterator[Example]
) -> Iterator[Known]:
    """Yield what a base knows of examples."""
    states: list[torch.Tensor] = []
    handle = model.model.language_model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for example in examples:
        inputs = collate([example], processor.tokenizer.pad_token_id).inputs
        with torch.autocast("cpu", torch.bfloat16):
            model.model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
        maps = example.semantic_ids, example.numbering_ids
        written = tuple(_written(example, processor)) if kind == "where" else ()
        (of_example,) = states.pop()
        yield Known(
            kind, of_example.bfloat16(), example.input_ids, example.labels, example.sequence_ids, *maps, written
        )
    handle.remove()


def _written(example: Example, processor: CollavoProcessor) -> Iterator[Written]:
    """Find the boxes in the answers about a chart; those of objects that no cell shows are left out."""
    tokenizer, ids = processor.tokenizer, example.input_ids.tolist()
    begins, opens, closes = tokenizer.convert_tokens_to_ids(["Ġ(#", "Ġ[", "]"])
    for place, token in enumerate(ids):
        if token != opens or example.labels[place] == IGNORED:
            continue
        first = max(i for i in range(place) if ids[i] == begins)
        last = ids.index(closes, place)
        text = tokenizer.decode(ids[first : last + 1]).strip()
        (mention,) = parse_objects(text, {category.display_name for category in COCO_PANOPTIC})
        label = next(c.label for c in COCO_PANOPTIC if c.display_name == mention.name)
        same = example.semantic_ids == label + 1
        cells = (same & (example.numbering_ids == mention.numbering)).nonzero()
        if len(cells):
            following = (same & (example.numbering_ids == mention.numbering + 1)).flatten()
            (box,) = find_boxes(text)
            yield Written(place - 2, place, last, box, _edges(cells, processor.grid_hw), following)


def _edges(cells_yx: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    y, x = cells_yx.T
    masks = torch.zeros(EDGES, grid_hw[0] * grid_hw[1], dtype=torch.bool)
    for edge, chosen in enumerate((x == x.min(), y == y.min(), x == x.max(), y == y.max())):
        masks[edge, (y * grid_hw[1] + x)[chosen]] = True
    return masks


@dataclass(frozen=True, slots=True)
class Flags:
    start: str = flag(REQUIRED, "base to grow", metavar="DIR")
    output: str = flag(REQUIRED, "folder for metrics and the model", metavar="DIR")
    keep_layers: int = flag(4, "layers of the base that stay; new ones take the place of others", least=1)
    charts: int = flag(4000, "charts that ask where words are", least=8)
    others: int = flag(480, "charts of all other questions; half as many of tiles, and of scenes", least=8)
    word_epochs: int = flag(4, "passes over these charts in which layers are trained where they matter most", least=1)
    steps: int = flag(1000, "updates of all three layers", least=1)
    learning_rate: float = flag(1e-3, "peak of the learning rate")
    seed: int = flag(0, "of the initial weights and the order", least=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the module's docstring describes it."""
    return cli.run("pretraining.box_writing", lambda: _train(argv))


def _train(argv: Sequence[str] | None) -> None:
    flags = cli.parse(
        Flags,
        argv,
        prog="python -m pretraining.box_writing",
        usage="python -m pretraining.box_writing --start DIR --output DIR [options]",
        description="Teach a base to write boxes, with three more layers.",
    )
    torch.manual_seed(flags.seed)
    rng = np.random.default_rng(flags.seed)
    with naming("start"):
        base, processor = load_base(flags.start, torch.float32)
        if base.config.text_config.num_attention_heads != EDGES:
            raise UserError(f"{flags.start} has not {EDGES} heads, one for each edge of a box")
        cut(base, flags.keep_layers)
    run, console = Path(flags.output), Console()
    run.mkdir(parents=True, exist_ok=True)
    crayon_prompt, base.model.crayon_prompt = base.model.crayon_prompt, WordPrompt(base, processor.tokenizer)
    with Progress(console) as progress:
        known: dict[Kind, list[Known]] = {"where": [], "all": [], "tiles": [], "scene": []}
        total = flags.charts + flags.others * 2
        bar = progress.add("states", total)
        for kind, examples in _examples(processor, flags).items():
            for each in known_sequences(base, processor, kind, examples):
                known[kind].append(each)
                progress.update(bar, sum(map(len, known.values())))
        base.model.crayon_prompt = crayon_prompt
        model = grow(base)
        model.requires_grad_(False)
        model.set_attn_implementation("eager")
        writer = Writer(model, processor)
        charts = [each for each in known["where"] if each.written]
        writer.begin(charts[:500])
        learn = partial(_learn, writer, run, progress)
        kept = known["all"] + known["tiles"] + known["scene"]
        batches = [
            [charts[i] for i in order[first : first + 6]] + [kept[i] for i in rng.choice(len(kept), 2)]
            for order in (rng.permutation(len(charts)) for _ in range(flags.word_epochs))
            for first in range(0, len(charts), 6)
        ]
        learn("words", batches, writer.loss_at_words, _WORDS_LEARNING_RATE)
        batches = []
        for step in range(flags.steps):
            pool, size = (known[_KEPT[step // 2 % len(_KEPT)]], 4) if step % 2 else (charts, 6)
            batches.append([pool[i] for i in rng.choice(len(pool), min(size, len(pool)), replace=False)])
        learn("boxes", batches, writer.loss, flags.learning_rate)
    model.set_attn_implementation("sdpa")
    save_base(run, model, processor)


def _examples(processor: CollavoProcessor, flags: Flags) -> dict[Kind, Iterator[Example]]:
    drawn = PretrainingExamples(processor, 1)
    return {
        "where": (drawn.chart(_FIRST_SEED + number, "where") for number in range(flags.charts)),
        "all": (drawn.chart(_OTHER_SEED + number, "all") for number in range(flags.others)),
        "tiles": (drawn.chart(2 * _OTHER_SEED + number, "tiles") for number in range(flags.others // 2)),
        "scene": (drawn.scene(_OTHER_SEED + number) for number in range(flags.others // 2)),
    }


def _learn(
    writer: Writer,
    run: Path,
    progress: Progress,
    name: str,
    batches: list[list[Known]],
    loss_of: Callable[[Batch], tuple[torch.Tensor, dict[str, float]]],
    learning_rate: float,
) -> None:
    """Train on some batches, with a rate that rises for 30 steps and falls along a cosine, and log the figures."""
    parameters = [*writer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    bar = progress.add(name, len(batches))
    sums: dict[str, list[float]] = {}
    began = time.monotonic()
    for step, known in enumerate(batches):
        for group in optimizer.param_groups:
            fallen = 0.02 + 0.98 * (1 + math.cos(math.pi * step / len(batches))) / 2
            group["lr"] = learning_rate * min(1, (step + 1) / 30) * fallen
        loss, figures = loss_of(writer.batch(known))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 2.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{name}, step {step}: loss {loss.item()}, gradient norm {norm.item()}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.update(bar, step + 1, note=f"loss {loss.item():.3f}")
        for figure, value in figures.items():
            sums.setdefault(figure, []).append(value)
        if (step + 1) % 50 == 0 or step + 1 == len(batches):
            line = {"part": name, "step": step + 1, "seconds": time.monotonic() - began}
            line |= {figure: float(np.nanmean(values)) for figure, values in sums.items()}
            log_line(run, line)
            sums.clear()


if __name__ == "__main__":
    raise SystemExit(main())
