"""The stages of training, and the one object that knows what each of them moves.

    cpt         queries and connector learn; no adapter is active
    image_cit   queries, connector and the first adapter learn; the second is active and stays as it is
    vl_cit      queries, connector and the second adapter learn; the first is active and stays as it is

Everything that has to agree about a stage - active adapters, trainable weights, the optimizer's groups - is set here
and checked here. A stage changes between complete steps only: a backward pass under another stage than its forward
pass would give wrong gradients without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from collavo.model.adapters import adapter_parameters

CRAYON_PROMPT = "crayon_prompt"
"""What the full names of queries and connector contain."""


class StageError(RuntimeError):
    """The model is not in the state that its stage demands; a fault of the program, not of its user."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What is active and what learns, beside the Crayon Prompt, which always does both."""

    name: str
    active: tuple[str, ...]
    learning: str | None


CPT = Stage("cpt", (), None)


class StagedModel:
    """A CoLLaVO model with its adapters, in one stage at a time.

    Args:
        model: with all its adapters on it.
        adapters: their names.
    """

    def __init__(self, model: PeftModel, adapters: Sequence[str]) -> None:
        self.model = model
        self.stage: Stage | None = None
        self._prompt = {name: p for name, p in model.named_parameters() if CRAYON_PROMPT in name}
        self._adapters = {adapter: adapter_parameters(model, adapter) for adapter in adapters}
        self._layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn in the present stage, by full name."""
        adapter = self._adapters[self.stage.learning] if self.stage and self.stage.learning else {}
        return {**self._prompt, **adapter}

    def parameters_of(self, adapters: Sequence[str]) -> dict[str, nn.Parameter]:
        """The Crayon Prompt and some adapters: what an optimizer has to know from the start."""
        return {**self._prompt, **{name: p for adapter in adapters for name, p in self._adapters[adapter].items()}}

    def enter(self, stage: Stage) -> None:
        """Make a stage the present one.

        Raises:
            StageError: in the middle of a step, or if the model does not follow.
        """
        if stage == self.stage:
            return
        if self.stage and any(parameter.grad is not None for parameter in self.learning.values()):
            raise StageError(
                f"stage {stage.name}: entered while gradients of stage {self.stage.name} wait for its step"
            )
        if self.stage is None or stage.active != self.stage.active:
            self._activate(stage.active)
        self.stage = stage
        for parameter in self._prompt.values():
            parameter.requires_grad_(True)
        for adapter, parameters in self._adapters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(adapter == stage.learning)
        self.check()

    def check(self) -> None:
        """Make sure that exactly the stage's adapters are active and exactly its weights trainable.

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
        """After a backward pass: every learning weight has a gradient, and no other weight has any; and neither all
        those of the Crayon Prompt nor all those of the learning adapter are zero.

        Raises:
            StageError: naming a weight.
        """
        assert self.stage is not None
        learning = self.learning
        for name, parameter in self.model.named_parameters():
            if (parameter.grad is not None) != (name in learning):
                state = "a" if parameter.grad is not None else "no"
                raise StageError(f"stage {self.stage.name}: {name} got {state} gradient")
        adapter = self._adapters[self.stage.learning] if self.stage.learning else {}
        for group in (self._prompt, adapter):
            # Single ones may be: of a new adapter, all A's are.
            if group and not any(p.grad.any() for p in group.values() if p.grad is not None):
                raise StageError(f"stage {self.stage.name}: {min(group)} and its like got gradients of zero")

    def _activate(self, adapters: tuple[str, ...]) -> None:
        tuner: Any = self.model.base_model
        if not adapters:
            tuner.disable_adapter_layers()
            return
        tuner.enable_adapter_layers()
        tuner.set_adapter(list(adapters))  # makes all of them trainable; `enter` says which are
