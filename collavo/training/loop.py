"""Steps: forward, backward, update, and the losses of an evaluation.

A step takes one batch of one kind. Its loss is the mean over all supervised tokens of the batch, wherever they are
computed, so that micro-batches and ranks change the time of a step, not its result.

Gradients are summed over ranks here, by hand. DistributedDataParallel fixes the set of learning weights when it wraps a
model, but here the set differs from step to step: crayon batches train one adapter, dialogue batches the other.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from collavo.device import memory_named
from collavo.errors import LeftOut, UserError
from collavo.model.prompt import Kind
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch, Sample
from collavo.training.batches import STOPPING, ExampleDataset, MicroBatch, Skipped, build_loader, micro_batches
from collavo.training.phases import Phase
from collavo.training.stages import StagedModel

_NO_CHANCE = 1e-6
"""Less likely than this, that all files of a step are missing is no matter of single files."""


@dataclass(slots=True)
class StepResult:
    """What is logged of a step."""

    step: int
    """Counted over the whole run, from 1 on."""

    phase: str
    stage: str
    loss: float | None
    """None, as the norm is, where all samples of the step had to be skipped."""

    learning_rate: float
    gradient_norm: float | None
    """Before clipping."""

    samples_per_s: float
    tokens_per_s: float
    peak_memory_gb: float | None
    """The GPU's so far in this phase; None on a CPU."""


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Note the signals of `STOPPING` while the block runs, so that it can end in order; a second Ctrl-C interrupts it.

    SIGHUP stays ignored where it is, as under nohup.
    """
    noted: list[int] = []

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield noted
        return
    heeded = set(STOPPING) - ({signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set())
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate_at(step: int, steps: int, first: float, last: float, warmup: int = 0) -> float:
    """Return a cosine from `first` to `last`, at the final step; in the steps of a warm-up, a line that rises to it."""
    if step < warmup:
        return first * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """Takes the steps of a phase.

    Args:
        dtype: of the computation.
    """

    def __init__(
        self, staged: StagedModel, accelerator: Accelerator, arguments: TrainArguments, dtype: torch.dtype
    ) -> None:
        self._staged = staged
        self._accelerator = accelerator
        self._arguments = arguments
        self._dtype = dtype
        self._checked: set[str] = set()
        self._side_by_side = 1
        """Pieces of a micro-batch that are computed side by side."""

        self.signals: Sequence[int] = ()
        """Signals that came so far, see `signals_noted`."""

        self.stopped_by = 0
        """The signal that asks to stop after the present step, on whichever rank it came; 0 for none."""

        self.skipped = LeftOut()
        """Samples that could not be prepared, of all ranks."""

    def run(
        self,
        phase: Phase,
        dataset: ExampleDataset,
        optimizer: torch.optim.Optimizer,
        first_step: int,
        most_skipped: int,
        after_step: Callable[[StepResult], None],
    ) -> None:
        """Take the steps of a phase from `first_step` on.

        Args:
            most_skipped: samples that the whole run may skip.

        Raises:
            UserError: for a loss that is not finite, a batch without a supervised token, a GPU without memory, more
                skipped samples than allowed, or files that cannot be read any more.
        """
        arguments, accelerator, device = self._arguments, self._accelerator, self._accelerator.device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        self._side_by_side = _pieces_at_once(self._staged, device, arguments.micro_batch_size)
        size = arguments.micro_batch_size // self._side_by_side
        micro = [
            micro_batches(batch, size, accelerator.process_index, accelerator.num_processes)
            for batch in phase.batches[first_step:]
        ]
        samples = [*chain.from_iterable(micro)]
        # Pinned batches leave the shared memory at once. Others would lie there, and a container may have little of it.
        ahead = max(map(len, micro)) if on_gpu else self._side_by_side
        loader = build_loader(dataset, samples, arguments.workers, pin_memory=on_gpu, ahead=ahead)
        helpful = (
            "--resume with a lower --micro_batch_size, or --gradient_checkpointing; in a new run also a lower "
            "--max_length or fewer --instructions_per_sequence"
        )
        for step, of_step in enumerate(micro, start=first_step):
            batch = phase.batches[step]
            steps, final = len(phase.batches), arguments.final_learning_rate
            rate = learning_rate_at(step, steps, phase.learning_rate, final, phase.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            stage = phase.stages[batch.kind]
            self._staged.enter(stage)
            start = time.perf_counter()
            number = phase.steps_before + step + 1
            pieces = [next(loader) for _ in of_step]
            skipped = [sample for piece in pieces for sample in piece.skipped]
            with memory_named(helpful, f"step {number}"):
                loss, norm, tokens = self._step(number, [piece for piece in pieces if piece.inputs], optimizer)
            # All ranks have to stop after the same step, so they agree on it; one of them may have got the signal.
            # Behind the step, since what sent the signal waits half a minute or so: no time for one more.
            said = torch.tensor([[self.signals[-1] if self.signals else 0, len(skipped)]], device=device)
            self.stopped_by, most = accelerator.gather(said).max(0).values.tolist()
            if most:
                self._count_skipped(number, len(batch.samples), skipped, most_skipped)
            seconds = time.perf_counter() - start
            result = StepResult(
                step=number,
                phase=phase.name,
                stage=stage.name,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                samples_per_s=len(batch.samples) / seconds,
                tokens_per_s=tokens / seconds,
                peak_memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if on_gpu else None,
            )
            with memory_named(helpful, f"after step {number}"):  # it may evaluate
                after_step(result)

    def rehearse(self, phase: Phase, sample: Sample, sequences: int, dataset: ExampleDataset) -> None:
        """Take the longest sequence of a phase forward and back, as many times at once as its batches do, and change
        nothing.

        Raises:
            UserError: if the GPU's memory does not suffice, which so shows before the first step.
        """
        self._staged.enter(phase.stages[sample.kind])
        helpful = "a lower --micro_batch_size, --gradient_checkpointing, a lower --max_length"
        learning = self._staged.parameters_of(phase.groups).values()
        with memory_named(helpful, f"{phase.name}, its longest batch"):
            # As much as the moments of AdamW, which come with the first step, will take.
            moments = [torch.empty_like(parameter) for parameter in (*learning, *learning)]
            for piece in build_loader(dataset, [[sample] * sequences], 0, pin_memory=False):
                if piece.supervised_tokens:
                    self._loss(piece, piece.supervised_tokens).backward()
            del moments
        for parameter in self._staged.learning.values():
            parameter.grad = None

    def _count_skipped(self, step: int, size: int, skipped: list[Skipped], most: int) -> None:
        """Count the samples of a step that could not be prepared on this rank, and all others'; they come to the same
        sum.

        Args:
            size: of the step, in samples over all ranks.

        Raises:
            UserError: if there are more of them than `most`, or no picture of the step could be read.
        """
        if self._accelerator.num_processes > 1:
            skipped = gather_object(skipped)
        # So many files in a row are no chance: their folder is gone, or the permission to read it. A resumed run would
        # not come back to samples that are passed over here.
        unread = [sample for sample in skipped if sample.reason in ("missing_file", "unreadable_file")]
        if len(unread) == size and self._arguments.max_skipped_ratio**size < _NO_CHANCE:
            raise UserError(
                f"step {step}: none of its pictures can be read, {unread[0].detail} first; is their disk mounted? "
                "--resume goes on from the last checkpoint",
                1,
            )
        for sample in skipped:
            self.skipped.add(sample.reason, sample.image_id, sample.detail)
        if (count := self.skipped.counts.total()) > most:
            raise UserError(
                f"{count} samples could not be prepared, and --max_skipped_ratio allows {most}: "
                + ", ".join(self.skipped.lines()),
                1,
            )

    def _step(
        self, step: int, pieces: Sequence[MicroBatch], optimizer: torch.optim.Optimizer
    ) -> tuple[float | None, float | None, int]:
        """Take one step; the loss, the gradient's norm before clipping, and the tokens processed. Without a sample on
        any rank, nothing is learned, and there is no loss."""
        # The divisor of the loss is counted before the first forward pass, over the micro-batches of all ranks. A mean
        # of the micro-batches' means would give a token more weight the fewer others are supervised beside it.
        counted = [(piece.supervised_tokens, piece.inputs["input_ids"].numel()) for piece in pieces]
        counts = torch.tensor(counted, device=self._accelerator.device, dtype=torch.int64).reshape(-1, 2).sum(0)
        supervised, tokens = self._accelerator.reduce(counts, "sum").tolist()
        images = "images " + ", ".join(image_id for piece in pieces for image_id in piece.image_ids)
        if not tokens:
            return None, None, 0
        if not supervised:
            raise UserError(f"step {step}: no token of the batch is supervised; {images}", 1)
        loss = self._accelerator.reduce(self._backward(pieces, supervised), "sum")
        if not torch.isfinite(loss):
            raise self._not_finite(f"step {step}: the loss is {loss.item()}; {images}")
        learning = list(self._staged.learning.values())
        self._sum_gradients(learning)
        assert self._staged.stage is not None
        # Once for each stage, for it looks at every weight; and not where no picture brought a signal to the queries.
        has_images = any("pixel_values" in piece.inputs for piece in pieces)
        if has_images and self._staged.stage.name not in self._checked:
            self._staged.check_gradients()
            self._checked.add(self._staged.stage.name)
        norm = nn.utils.clip_grad_norm_(learning, self._arguments.max_grad_norm or math.inf)
        if not torch.isfinite(norm):  # clipped, a single infinity would make its weight and its moments no numbers
            raise self._not_finite(f"step {step}: the norm of the gradient is {norm.item()}; {images}")
        optimizer.step()
        # None, not zero: AdamW passes over weights without a gradient. With a zero, its momentum would go on moving
        # the adapter whose turn it is not.
        optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm), tokens

    def _not_finite(self, fault: str) -> UserError:
        """Say how a run gets past a number that is none: another attention of the GPU may not compute it."""
        way = "" if self._arguments.attention == "eager" else "; --resume with --attention eager computes it otherwise"
        return UserError(fault + way, 1)

    def _backward(self, pieces: Sequence[MicroBatch], supervised_tokens: int) -> torch.Tensor:
        """Compute the gradients of all micro-batches of this rank, and the sum of their losses.

        One by one, as on a GPU, they add up in place, so that its memory holds no second set of gradients.
        """
        loss = torch.zeros((), device=self._accelerator.device)
        if self._side_by_side == 1:
            for piece in pieces:
                piece_loss = self._loss(piece, supervised_tokens)
                piece_loss.backward()
                loss += piece_loss.detach()
            return loss
        learning = list(self._staged.learning.values())

        def of_piece(piece: MicroBatch) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
            piece_loss = self._loss(piece, supervised_tokens)
            return piece_loss.detach(), torch.autograd.grad(piece_loss, learning, allow_unused=True)

        threads = torch.get_num_threads()
        # Threads that are started now take over this number.
        torch.set_num_threads(threads // self._side_by_side)
        try:
            with ThreadPoolExecutor(self._side_by_side) as pool:
                # In the order of the pieces, not in that in which they are done, so that the sums are always the same.
                for piece_loss, gradients in pool.map(of_piece, pieces):
                    loss += piece_loss
                    for parameter, gradient in zip(learning, gradients, strict=True):
                        if gradient is not None:
                            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        finally:
            torch.set_num_threads(threads)
        return loss

    def evaluate(self, samples: Sequence[Sample], dataset: ExampleDataset) -> dict[Kind, float]:
        """Mean loss per supervised token of each kind, over some samples, in the present stage."""
        rank, ranks, size = self._accelerator.process_index, self._accelerator.num_processes, len(samples)
        # In the order of their rows, the samples of a rank lie in few row groups, most of which no other rank reads.
        share = sorted(samples, key=lambda sample: sample.row)[size * rank // ranks : size * (rank + 1) // ranks]
        sums = {sample.kind: torch.zeros(2, device=self._accelerator.device) for sample in samples}
        batches = [Batch(kind, tuple(sample for sample in share if sample.kind == kind)) for kind in sums]
        pieces = [piece for batch in batches for piece in micro_batches(batch, self._arguments.micro_batch_size)]
        # The model stays in training mode, which changes no result, since there is no dropout. In evaluation mode,
        # bitsandbytes would repack the 4-bit weights for the CPU, and no gradient flows through repacked weights.
        with torch.no_grad():
            for piece in build_loader(dataset, pieces, 0, pin_memory=False):
                if piece.inputs:
                    sums[piece.kind][0] += self._loss(piece, 1)
                    sums[piece.kind][1] += piece.supervised_tokens
        found = {kind: self._accelerator.reduce(pair, "sum").tolist() for kind, pair in sums.items()}
        return {kind: loss / tokens for kind, (loss, tokens) in found.items() if tokens}

    def _loss(self, piece: MicroBatch, supervised_tokens: int) -> torch.Tensor:
        """Compute the sum of the losses of a micro-batch's tokens, divided by the supervised tokens of the whole
        batch."""
        device = self._accelerator.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in piece.inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            # `num_items_in_batch` is what transformers' Trainer passes to its models, for the same purpose.
            return self._staged.model(
                **inputs, supervised_only=True, num_items_in_batch=supervised_tokens, use_cache=False
            ).loss

    def _sum_gradients(self, learning: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks.

        The sum is right as it is, without a division by the number of ranks, because each rank has divided its losses
        by the tokens of all. All gradients travel in one tensor, with a count of the ranks that have each of them: one
        message instead of hundreds. A weight without a gradient on any rank keeps none, as on one GPU.
        """
        if self._accelerator.num_processes == 1:
            return
        found = torch.tensor([parameter.grad is not None for parameter in learning], device=learning[0].device)
        for parameter in learning:
            if parameter.grad is None:  # this rank saw no picture, another one may have
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in learning if parameter.grad is not None]
        together = torch.cat([*(gradient.flatten() for gradient in gradients), found.to(gradients[0].dtype)])
        summed = self._accelerator.reduce(together, "sum")
        *parts, ranks = summed.split([*(gradient.numel() for gradient in gradients), len(learning)])
        for parameter, gradient, part, has in zip(learning, gradients, parts, ranks.tolist(), strict=True):
            gradient.copy_(part.view_as(gradient))
            parameter.grad = gradient if has else None


def _pieces_at_once(staged: StagedModel, device: torch.device, micro_batch_size: int) -> int:
    """Return how many pieces of a micro-batch are computed side by side: one for each thread of a CPU.

    A thread with sequences of its own need not wait for others, as the threads that share an operation do at the end of
    each. On idle cores that changes nothing; where other work takes one of two, a step takes 0.4 times as long.
    """
    config: Any = staged.model.get_base_model().config
    if device.type != "cpu" or config.crayon_signal == "low_rank_branches":  # which know one forward pass at a time
        return 1
    return min(torch.get_num_threads(), micro_batch_size)
