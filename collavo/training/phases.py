"""The phases of a run: Crayon Prompt Tuning, then instruction tuning, each with its batches and its learning rate."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from collavo.errors import UserError
from collavo.model.adapters import DIALOGUE_ADAPTER, IMAGE_ADAPTER
from collavo.model.prompt import Kind
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch, PlanOptions, plan_epoch
from collavo.training.checkpoint import Position
from collavo.training.row_index import RowIndex
from collavo.training.stages import CPT, Stage

ADAPTER_OF: dict[str, dict[Kind, str]] = {
    "dual": {"crayon": IMAGE_ADAPTER, "dialogue": DIALOGUE_ADAPTER},
    "single": {"crayon": "cit", "dialogue": "cit"},
    "vl_only": {"dialogue": DIALOGUE_ADAPTER},
}
"""The adapter that each kind of batch trains in instruction tuning, by `--adapters`."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Crayon Prompt Tuning (`cpt`) or instruction tuning (`cit`). Each has an optimizer of its own."""

    name: str
    stages: dict[Kind, Stage]
    """The stage for each kind of batch that takes part."""

    batches: Sequence[Batch]
    learning_rate: float
    steps_before: int
    """Steps of earlier phases, so that steps are counted over the whole run."""

    @property
    def last_step(self) -> int:
        return self.steps_before + len(self.batches)


def plan_phases(
    arguments: TrainArguments, index: RowIndex, options: PlanOptions, steps_of_finished_cpt: int
) -> list[Phase]:
    """Plan the phases that `--phase` asks for.

    Args:
        steps_of_finished_cpt: steps before those of this run, where it continues a finished cpt.

    Raises:
        UserError: if a kind has too few samples for a single batch.
    """
    phases = []
    tunes = arguments.phase == "cpt" or (arguments.phase == "all" and len(index.texts["crayon"]))
    if tunes and arguments.queries != "none":
        batches = _plan(arguments, index, ("crayon",), options)
        phases.append(Phase("cpt", {"crayon": CPT}, batches, arguments.cpt_learning_rate, 0))
    if arguments.phase != "cpt":
        adapter_of = {
            kind: adapter for kind, adapter in ADAPTER_OF[arguments.adapters].items() if len(index.texts[kind])
        }
        if not adapter_of:
            raise UserError("--data: no row of the split 'train' has anything that --adapters could learn from")
        active = tuple(dict.fromkeys(adapter_of.values()))
        stages = {kind: Stage(adapter, active, adapter) for kind, adapter in adapter_of.items()}
        batches = _plan(arguments, index, tuple(stages), options)
        before = phases[0].last_step if phases else steps_of_finished_cpt
        phases.append(Phase("cit", stages, batches, arguments.cit_learning_rate, before))
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
            f"--resume: {done.phase_steps} steps of {done.phase} are done, and --epochs and --max_steps allow "
            f"{len(left[0].batches)}"
        )
    return left


def _plan(arguments: TrainArguments, index: RowIndex, kinds: tuple[Kind, ...], options: PlanOptions) -> list[Batch]:
    batches = [b for epoch in range(arguments.epochs) for b in plan_epoch(index, kinds, options, epoch)]
    for kind in set(kinds) - {batch.kind for batch in batches}:
        texts = "instructions" if kind == "crayon" else "dialogues"
        packed = f" of up to {arguments.instructions_per_sequence} instructions each" if kind == "crayon" else ""
        raise UserError(
            f"--data: {len(index.texts[kind])} {texts} of the split 'train' make no batch of {options.batch_size} "
            f"sequences{packed}; lower --batch_size, build more data, or leave out the phase"
        )
    return batches[: arguments.max_steps]
