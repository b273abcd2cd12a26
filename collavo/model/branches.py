"""Low-rank branches beside the linear layers of the decoder, through which the authors' release adds the signal.

At image tokens, and at no others, the output of a linear layer becomes W x + B A x + D C s: x is the layer's input, s
the cell's crayon signal, and A, B, C, D are of rank r. The query/key/value, output, gate and up projections have both
products, the down projection only the first. Their scale is alpha / r = 1.

The branches are modules of their own, not part of the linear layers. Those may be replaced at any time: by NF4 layers,
or by peft's wrappers. So a branch never keeps a reference to a linear layer. When an attention module or an MLP is
entered, a hook looks up the linear layers that are there now and sets hooks on them, and they are removed when the
module is left. A pass without images sets none.

Source: github.com/ByungKwanLee/CoLLaVO, collavo/arch/build_mlp.py and modeling_internlm2.py.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from collavo.model.crayon_prompt import ClosedLinear, suited

CRAYON_SIGNAL = "crayon_signal"
"""The keyword under which the signal travels to the attention modules."""


class CellSignal(NamedTuple):
    """The crayon signal of all cells in a batch, and which tokens they belong to."""

    positions: torch.Tensor
    """int64 [cells]: indices into the tokens of the flattened batch."""

    cells: torch.Tensor
    """float [cells, hidden_size]."""


class LayerBranches(nn.Module):
    """The branches of one decoder layer, each two linear layers. Query, key and value share one, in that order."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv_rows = [linear.out_features for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        hidden_size = attention.q_proj.in_features
        shapes = {
            "qkv": (hidden_size, sum(self.qkv_rows)),
            "o": (attention.o_proj.in_features, hidden_size),
            "gate": (hidden_size, mlp.gate_proj.out_features),
            "up": (hidden_size, mlp.up_proj.out_features),
            "down": (mlp.down_proj.in_features, hidden_size),
        }
        self.image = nn.ModuleDict({name: _branch(*shape, rank, ClosedLinear) for name, shape in shapes.items()})
        # These need not start at zero, because the signal itself does. And they must not: the gradient of each is a
        # product with the other, so if both were zero, neither would ever learn.
        self.crayon = nn.ModuleDict(
            {name: _branch(hidden_size, rows, rank, nn.Linear) for name, (_, rows) in shapes.items() if name != "down"}
        )
        self._signal: CellSignal | None = None
        self._handles: list[Any] = []

    def attach(self, layer: Any) -> None:
        """Take effect in the layer's attention and MLP whenever the attention receives a `CellSignal`."""
        # transformers checkpoints the decoder layer's forward. Hooks of the layer itself would run outside of it, so
        # the recomputed pass would lack the branches. Hooks of its children are inside and run again.
        # `always_call` removes the inner hooks even if the module raises; otherwise the next pass would add twice.
        layer.self_attn.register_forward_pre_hook(self._enter_attention, with_kwargs=True)
        layer.self_attn.register_forward_hook(self._leave_attention, always_call=True)
        layer.mlp.register_forward_pre_hook(self._enter_mlp)
        layer.mlp.register_forward_hook(self._leave_mlp, always_call=True)

    def _enter_attention(self, attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Only the attention modules are given the keyword, so the signal is kept here until the MLP has run.
        self._signal = kwargs.pop(CRAYON_SIGNAL, None)
        if self._signal is not None:
            additions = self._addition("qkv", kwargs["hidden_states"]).split(self.qkv_rows, dim=-1)
            for name, addition in zip("qkv", additions, strict=True):
                self._join(getattr(attention, f"{name}_proj"), "qkv", addition)
            self._join(attention.o_proj, "o")
        return args, kwargs

    def _leave_attention(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _enter_mlp(self, mlp: Any, _: Any) -> None:
        if self._signal is not None:
            for name, linear in (("gate", mlp.gate_proj), ("up", mlp.up_proj), ("down", mlp.down_proj)):
                self._join(linear, name)

    def _leave_mlp(self, *_: Any) -> None:
        self._leave_attention()
        self._signal = None

    def _addition(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the output of a projection at the image tokens: float [cells, out_features]."""
        assert self._signal is not None
        positions, cells = self._signal
        branch: Any = self.image[name]
        # The layers of a model may be spread over several GPUs, the branches with them. Of the two layers, bitsandbytes
        # makes bytes of the first.
        weight = branch[1].weight
        addition: torch.Tensor = branch(suited(states.flatten(0, 1)[positions.to(states.device)], weight))
        return addition + self.crayon[name](suited(cells, weight)) if name in self.crayon else addition

    def _join(self, linear: nn.Module, name: str, addition: torch.Tensor | None = None) -> None:
        """Hook a linear layer: add the branch called `name`, or an addition computed before, to its next output."""
        assert self._signal is not None
        positions = self._signal.positions

        def add(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            rows = self._addition(name, args[0]) if addition is None else addition
            return output.flatten(0, 1).index_add(0, positions.to(output.device), rows.to(output)).view_as(output)

        self._handles.append(linear.register_forward_hook(add))


def _branch(in_features: int, out_features: int, rank: int, last: type[nn.Linear]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), last(rank, out_features, bias=False))


def add_low_rank_branches(layers: nn.ModuleList, rank: int) -> nn.ModuleList:
    """Make branches for every decoder layer, and attach them.

    Raises:
        ValueError: if the layers have no separate q, k, v, o, gate, up and down projections.
    """
    try:
        branches = nn.ModuleList([LayerBranches(layer, rank) for layer in layers])
    except AttributeError as error:
        raise ValueError(f"low-rank branches need Llama-shaped layers: {error}") from error
    for layer, branch in zip(layers, branches, strict=True):
        branch.attach(layer)  # type: ignore[operator]
    return branches
