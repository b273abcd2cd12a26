"""The stages of training, and the one object that knows what is active and what learns in each.

    align       the projector learns; no adapter is active
    cpt         queries and connector learn; no adapter is active
    image_cit   queries, connector and the first adapter learn; the second is active, but frozen
    vl_cit      queries, connector and the second adapter learn; the first is active, but frozen

Where queries are computed from the names of classes, they and the connector learn in cpt alone. In instruction tuning
they would go on to fit the names that are there, and a name that no training has seen would lose what it means.

"Active" and "learning" are different things. Both adapters are active in every step of instruction tuning, since both
are active when the model is asked later, and each has to learn beside the other. Which one learns depends on the batch.

peft is made for one adapter at a time: activating an adapter makes it trainable, and a frozen adapter differs from an
inactive one only by flags on hundreds of layers. If one of them is wrong, nothing fails, and the model learns something
else. So active adapters and trainable weights are set in one place, `StagedModel.enter`, and checked after every change
and after the first backward pass of every stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

CRAYON_PROMPT, PROJECTOR = "crayon_prompt", "multi_modal_projector"
"""Groups of weights that learn, beside the adapters: queries and connector, and what turns image features into words.
Each is a part of the full names of its weights, and of no other weight's."""


class StageError(RuntimeError):
    """The model is not in the state that its stage demands. A fault of the program, not of its user."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Which adapters are active, and which groups of weights learn: `PROJECTOR`, `CRAYON_PROMPT`, adapters by name."""

    name: str
    active: tuple[str, ...]
    learning: tuple[str, ...]


ALIGN = Stage("align", (), (PROJECTOR,))
CPT = Stage("cpt", (), (CRAYON_PROMPT,))


def cit_stage(adapter: str, active: tuple[str, ...], with_prompt: bool = True) -> Stage:
    """Make the stage of instruction tuning in which one of the active adapters learns, alone or with the prompt."""
    return Stage(adapter, active, (CRAYON_PROMPT, adapter) if with_prompt else (adapter,))


class StagedModel:
    """A CoLLaVO model with its adapters, in one stage at a time.

    Args:
        model: with all its adapters on it.
        adapters: their names.
    """

    def __init__(self, model: PeftModel, adapters: Sequence[str]) -> None:
        self.model = model
        self.stage: Stage | None = None
        self._groups = {
            group: {name: p for name, p in model.named_parameters() if f".{group}." in name}
            for group in (PROJECTOR, CRAYON_PROMPT, *adapters)
        }
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn in the present stage, by full name."""
        return self.parameters_of(self.stage.learning if self.stage else ())

    def parameters_of(self, groups: Sequence[str]) -> dict[str, nn.Parameter]:
        """Return the parameters of some groups, by full name: what an optimizer is made for."""
        return {name: parameter for group in groups for name, parameter in self._groups[group].items()}

    def enter(self, stage: Stage) -> None:
        """Change to a stage.

        Raises:
            StageError: in the middle of a step, or if the model does not follow.
        """
        if stage == self.stage:
            return
        # Gradients of one stage must not meet an update of another, or a frozen adapter would move.
        if self.stage and any(parameter.grad is not None for parameter in self.learning.values()):
            raise StageError(
                f"stage {stage.name}: entered while gradients of stage {self.stage.name} wait for its step"
            )
        if self.stage is None or stage.active != self.stage.active:
            tuner: Any = self.model.base_model
            if stage.active:
                tuner.enable_adapter_layers()
                tuner.set_adapter(list(stage.active))  # makes all of them trainable, which is corrected below
            else:
                tuner.disable_adapter_layers()
        self.stage = stage
        for group, parameters in self._groups.items():
            for parameter in parameters.values():
                parameter.requires_grad_(group in stage.learning)
        self.check()

    def check(self) -> None:
        """Make sure that exactly the stage's adapters are active, and exactly its weights are trainable.

        Raises:
            StageError: naming what differs.
        """
        assert self.stage is not None
        for layer in self._layers:
            active = () if layer.disable_adapters else tuple(layer.active_adapters)
            if active != self.stage.active:
                raise StageError(f"stage {self.stage.name}: a layer has {active} active, not {self.stage.active}")
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if differing := trainable ^ set(self.learning):
            raise StageError(
                f"stage {self.stage.name}: {len(differing)} weights, such as {min(differing)}, are not as set"
            )

    def check_gradients(self) -> None:
        """Make sure, after a backward pass, that exactly the learning weights have gradients.

        Those of a group must not all be zero. Zeros are what checkpointing leaves behind where it loses track of a
        gradient.

        Raises:
            StageError: naming a weight.
        """
        assert self.stage is not None
        learning = self.learning
        for name, parameter in self.model.named_parameters():
            if (parameter.grad is not None) != (name in learning):
                state = "a" if parameter.grad is not None else "no"
                raise StageError(f"stage {self.stage.name}: {name} got {state} gradient")
        for group in (self._groups[name] for name in self.stage.learning):
            # Single ones may be zero: LoRA starts with B = 0, through which no gradient reaches A in the first step.
            if group and not any(p.grad.any() for p in group.values() if p.grad is not None):
                raise StageError(f"stage {self.stage.name}: {min(group)} and its like got gradients of zero")
