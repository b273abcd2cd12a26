"""The phases of a run: alignment where the base needs it, Crayon Prompt Tuning, instruction tuning.

Each has its batches, its stages and its learning rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from collavo.errors import UserError
from collavo.model.adapters import DIALOGUE_ADAPTER, IMAGE_ADAPTER
from collavo.model.prompt import Kind
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch, PlanOptions, plan_epoch
from collavo.training.checkpoint import Position
from collavo.training.row_index import RowIndex
from collavo.training.stages import ALIGN, CPT, Stage, cit_stage

ADAPTER_OF: dict[str, dict[Kind, str]] = {
    "dual": {"crayon": IMAGE_ADAPTER, "dialogue": DIALOGUE_ADAPTER},
    "single": {"crayon": "cit", "dialogue": "cit"},
    "vl_only": {"dialogue": DIALOGUE_ADAPTER},
}
"""The adapter that each kind of batch trains in instruction tuning, by `--adapters`."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Alignment (`align`), Crayon Prompt Tuning (`cpt`) or instruction tuning (`cit`), with an optimizer of its own."""

    name: str
    stages: dict[Kind, Stage]
    """The stage for each kind of batch that takes part."""

    batches: Sequence[Batch]
    learning_rate: float
    steps_before: int
    """Steps of earlier phases, so that steps are counted over the whole run."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises to its height."""

    @property
    def last_step(self) -> int:
        return self.steps_before + len(self.batches)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of weights that learn in any of its stages, see `collavo.training.stages`."""
        return tuple(dict.fromkeys(group for stage in self.stages.values() for group in stage.learning))


ALIGN_WARMUP = 0.03
"""Share of the steps of an alignment in which the learning rate rises, as in LLaVA's pre-training."""


def plan_phases(
    arguments: TrainArguments, index: RowIndex, options: PlanOptions, aligns: bool, steps_before: int
) -> list[Phase]:
    """Plan the phases that `--phase` asks for.

    Args:
        aligns: whether the projector is trained first, or alone.
        steps_before: those of the finished phases that this run continues.

    Raises:
        UserError: if a kind has too few samples for a single batch.
    """
    phases: list[Phase] = []

    def add(name: str, stages: dict[Kind, Stage], learning_rate: float, options: PlanOptions = options) -> None:
        batches = _plan(arguments, index, tuple(stages), options, arguments.most_steps(name))
        before = phases[-1].last_step if phases else steps_before
        warmup = math.ceil(ALIGN_WARMUP * len(batches)) if name == "align" else 0
        phases.append(Phase(name, stages, batches, learning_rate, before, warmup))

    if aligns:
        of_align = replace(options, batch_size=arguments.align_batch_size)
        add("align", {"caption": ALIGN}, arguments.align_learning_rate, of_align)
    if arguments.phase == "align":
        return phases
    tunes = arguments.phase == "cpt" or (arguments.phase == "all" and len(index.texts["crayon"]))
    if tunes and arguments.queries != "none":
        add("cpt", {"crayon": CPT}, arguments.cpt_learning_rate)
    if arguments.phase != "cpt":
        adapter_of = {
            kind: adapter for kind, adapter in ADAPTER_OF[arguments.adapters].items() if len(index.texts[kind])
        }
        if not adapter_of:
            why = f"left out: {'; '.join(index.left_out.lines())}" if index.left_out.counts else ""
            raise UserError(
                "--data: no row of the split 'train' has anything that --adapters could learn from; "
                f"{why or 'are files of that split among those named?'}"
            )
        active = tuple(dict.fromkeys(adapter_of.values()))
        stages = {kind: cit_stage(adapter, active, not arguments.by_words) for kind, adapter in adapter_of.items()}
        add("cit", stages, arguments.cit_learning_rate)
    return phases


def phases_left(phases: Sequence[Phase], done: Position) -> list[Phase]:
    """Return the phases from the one on in which a run stands; a longer run goes on with that phase.

    Raises:
        UserError: if that phase has taken more steps than it is to have.
    """
    names = [phase.name for phase in phases]
    if done.phase not in names:
        return list(phases)
    left: list[Phase] = []
    for phase in phases[names.index(done.phase) :]:
        before = left[-1].last_step if left else done.total_steps - done.phase_steps
        left.append(replace(phase, steps_before=before))
    if left[0].last_step < done.total_steps:
        raise UserError(
            f"--resume: {done.phase_steps} steps of {done.phase} are done, and --epochs, --max_steps and "
            f"--cpt_max_steps allow {len(left[0].batches)}"
        )
    return left


def _plan(
    arguments: TrainArguments, index: RowIndex, kinds: tuple[Kind, ...], options: PlanOptions, most: int | None
) -> list[Batch]:
    batches: list[Batch] = []
    for epoch in range(arguments.epochs):
        batches += plan_epoch(index, kinds, options, epoch)
        if most is not None and len(batches) >= most:  # hundreds of epochs may be allowed, and each takes memory
            break
    for kind in set(kinds) - {batch.kind for batch in batches}:
        texts = {"crayon": "instructions", "dialogue": "dialogues", "caption": "dialogues about images"}[kind]
        size = "align_batch_size" if kind == "caption" else "batch_size"
        packed = f" of up to {arguments.instructions_per_sequence} instructions each" if kind == "crayon" else ""
        raise UserError(
            f"--data: {len(index.texts[kind])} {texts} of the split 'train' make no batch of {options.batch_size} "
            f"sequences{packed}; lower --{size}, or build more data"
        )
    return batches[:most]
