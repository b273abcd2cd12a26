"""Steps: forward, backward, update, and what goes with them - metrics, evaluation, checkpoints.

A step takes one batch of one kind. Its loss is the mean over all supervised tokens of the batch, wherever they are
computed, so that micro-batches and ranks change nothing but the time. Gradients are summed over ranks here, by hand:
the weights that learn differ from step to step, which a wrapper that fixes them once cannot follow.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from collavo.errors import UserError
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch
from collavo.training.batches import ExampleDataset, MicroBatch, build_loader, micro_batches
from collavo.training.checkpoint import Progress
from collavo.training.row_index import Kind
from collavo.training.stages import Stage, StagedModel


@dataclass(frozen=True, slots=True)
class Phase:
    """A pass of the optimizer: Crayon Prompt Tuning (`cpt`) or instruction tuning (`cit`)."""

    name: str
    stages: dict[Kind, Stage]
    batches: Sequence[Batch]
    learning_rate: float
    steps_before: int
    """Steps of earlier phases, so that steps are counted over the whole run."""


@dataclass(slots=True)
class StepResult:
    """What is logged of a step; `peak_memory_gb` is the GPU's so far in its phase, None on a CPU."""

    step: int
    phase: str
    stage: str
    loss: float
    learning_rate: float
    gradient_norm: float
    samples_per_s: float
    tokens_per_s: float
    peak_memory_gb: float | None


def learning_rate_at(step: int, steps: int, first: float, last: float) -> float:
    """A cosine from `first`, at step 0, to `last`, at the final step."""
    progress = step / max(steps - 1, 1)
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


class Trainer:
    """Runs the steps of a phase."""

    def __init__(
        self, staged: StagedModel, accelerator: Accelerator, arguments: TrainArguments, dtype: torch.dtype
    ) -> None:
        self._staged = staged
        self._accelerator = accelerator
        self._arguments = arguments
        self._dtype = dtype
        self._checked: set[str] = set()

    def run(
        self,
        phase: Phase,
        dataset: ExampleDataset,
        pad_token_id: int,
        optimizer: torch.optim.Optimizer,
        first_step: int,
        after_step: Callable[[StepResult, Progress], None],
    ) -> None:
        """Take the steps of a phase from `first_step` on.

        Raises:
            UserError: for a loss that is not finite, a batch without a supervised token, or a GPU without memory.
            UserError: where an image is missing or damaged.
        """
        arguments, device = self._arguments, self._accelerator.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        pieces = [
            micro_batches(
                batch, arguments.micro_batch_size, self._accelerator.process_index, self._accelerator.num_processes
            )
            for batch in phase.batches[first_step:]
        ]
        loader = build_loader(
            dataset,
            [piece for step_pieces in pieces for piece in step_pieces],
            pad_token_id,
            arguments.workers,
            device.type == "cuda",
        )
        steps = len(phase.batches)
        for step, step_pieces in enumerate(pieces, start=first_step):
            rate = learning_rate_at(step, steps, phase.learning_rate, arguments.final_learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            self._staged.enter(phase.stages[phase.batches[step].kind])
            start = time.perf_counter()
            number = phase.steps_before + step + 1
            loss, norm, tokens = self._step(number, [next(loader) for _ in step_pieces], optimizer)
            seconds = time.perf_counter() - start
            result = StepResult(
                step=number,
                phase=phase.name,
                stage=phase.stages[phase.batches[step].kind].name,
                loss=loss,
                learning_rate=rate,
                gradient_norm=norm,
                samples_per_s=len(phase.batches[step].samples) / seconds,
                tokens_per_s=tokens / seconds,
                peak_memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
            )
            after_step(result, Progress(phase.name, step + 1, number))

    def _step(
        self, step: int, pieces: Sequence[MicroBatch], optimizer: torch.optim.Optimizer
    ) -> tuple[float, float, int]:
        """One update; the loss, the gradient's norm before clipping, and the tokens processed."""
        counts = torch.tensor(
            [
                sum(piece.supervised_tokens for piece in pieces),
                sum(piece.inputs["input_ids"].numel() for piece in pieces),
            ],
            device=self._accelerator.device,
        )
        supervised, tokens = self._accelerator.reduce(counts, "sum").tolist()
        if not supervised:
            raise UserError(f"step {step}: no token of the batch is supervised; {_images_of(pieces)}", 1)
        loss = torch.zeros((), device=self._accelerator.device)
        try:
            for piece in pieces:
                piece_loss = self._loss(piece, supervised)
                piece_loss.backward()
                loss += piece_loss.detach()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {step}: the GPU has no memory left ({str(error).splitlines()[0]}); go on with --resume and a "
                "lower --micro_batch_size, or --gradient_checkpointing",
                1,
            ) from error
        loss = self._accelerator.reduce(loss, "sum")
        if not torch.isfinite(loss):
            raise UserError(f"step {step}: the loss is {loss.item()}; {_images_of(pieces)}", 1)
        learning = list(self._staged.learning.values())
        self._sum_gradients(learning)
        self._check_once()
        norm = nn.utils.clip_grad_norm_(learning, self._arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss), float(norm), tokens

    def evaluate(self, batches: Sequence[Batch], dataset: ExampleDataset, pad_token_id: int) -> dict[Kind, float]:
        """Mean loss per supervised token of each kind, over some batches, in the present stage."""
        samples = [list(batch.samples) for batch in batches]
        sums: dict[Kind, float] = {}
        tokens: dict[Kind, int] = {}
        # The model stays in training mode, where it has no dropout: bitsandbytes repacks 4-bit weights for a CPU the
        # first time they are used in evaluation mode, and through repacked weights no gradient flows any more.
        with torch.no_grad():
            for piece in build_loader(dataset, samples, pad_token_id, 0, False):
                sums[piece.kind] = sums.get(piece.kind, 0.0) + float(self._loss(piece, 1))
                tokens[piece.kind] = tokens.get(piece.kind, 0) + piece.supervised_tokens
        return {kind: sums[kind] / max(tokens[kind], 1) for kind in sums}

    def _loss(self, piece: MicroBatch, supervised_tokens: int) -> torch.Tensor:
        """The sum of the losses of a micro-batch's tokens, over the supervised tokens of its whole batch."""
        device = self._accelerator.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in piece.inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            outputs = self._staged.model(
                **inputs, supervised_only=True, num_items_in_batch=supervised_tokens, use_cache=False
            )
        loss: torch.Tensor = outputs.loss
        return loss

    def _sum_gradients(self, learning: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in one piece."""
        if self._accelerator.num_processes == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in learning if parameter.grad is not None])
        flat = self._accelerator.reduce(flat, "sum")
        offset = 0
        for parameter in learning:
            if parameter.grad is not None:
                parameter.grad.copy_(flat[offset : offset + parameter.numel()].view_as(parameter))
                offset += parameter.numel()

    def _check_once(self) -> None:
        """After the first backward pass of each stage, make sure that the right weights, and all of them, got
        gradients."""
        assert self._staged.stage is not None
        if self._staged.stage.name not in self._checked:
            self._staged.check_gradients()
            self._checked.add(self._staged.stage.name)


def _images_of(pieces: Sequence[MicroBatch]) -> str:
    return "images " + ", ".join(image_id for piece in pieces for image_id in piece.image_ids)
