"""Training arguments: the paper's hyper-parameters, the presets, and the command line made of them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from collavo.cli import Parser
from collavo.embedded import TINY
from collavo.errors import UserError
from schemas.crayon_row import TASKS


def _flag(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass(frozen=True, slots=True)
class TrainArguments:
    """Every argument of a run; each field is a flag of `python -m collavo.train`, its metadata the help."""

    data: tuple[str, ...] = _flag((), "crayon data: Parquet files, or folders of them", many=True, metavar="PARQUET")
    image_root: str | None = _flag(None, "where rows that refer to their image find it", type=str, metavar="DIR")
    output_dir: str = _flag("runs/collavo", "the run directory", metavar="DIR")
    preset: str | None = _flag(
        None,
        "tiny, collavo-7b, or a base model: folder or hub id (default: collavo-7b on a GPU, else tiny)",
        type=str,
        metavar="NAME",
    )
    stage: str = _flag("all", "all, cpt, or cit (which goes on from a finished cpt)", choices=("all", "cpt", "cit"))
    resume: bool = _flag(False, "go on from the last checkpoint in --output_dir")
    overwrite: bool = _flag(False, "replace the run that is in --output_dir")

    epochs: int = _flag(1, "passes over the data, in each phase")
    max_steps: int | None = _flag(None, "steps of each phase at most", type=int)
    batch_size: int = _flag(32, "sequences per step, over all ranks")
    micro_batch_size: int = _flag(8, "sequences per forward pass; the rest is accumulated")
    cpt_learning_rate: float = _flag(1e-4, "at the start of Crayon Prompt Tuning")
    cit_learning_rate: float = _flag(1e-5, "at the start of instruction tuning")
    final_learning_rate: float = _flag(1e-6, "at the end of both; the way there is a cosine")
    max_grad_norm: float = _flag(1.0, "gradients are scaled down to it")
    seed: int = _flag(0, "of initial weights and of the order of the data")

    lora_rank: int = _flag(64, "rank of the adapters")
    lora_alpha: int = _flag(64, "alpha of the adapters")
    adapters: str = _flag("dual", "dual; single or vl_only for an ablation", choices=("dual", "single", "vl_only"))
    queries: str = _flag(
        "both", "both; semantic, numbering or none for an ablation", choices=("both", "semantic", "numbering", "none")
    )
    query_start: str = _flag(
        "random",
        "what queries begin as: random, or names, the embeddings of their classes' names and numbers",
        choices=("random", "names"),
    )
    crayon_share: float | None = _flag(
        None, "share of crayon sequences in instruction tuning (default: the data's)", type=float
    )
    tasks: tuple[str, ...] = _flag(
        TASKS, f"of {', '.join(TASKS)} (default: all)", many=True, choices=TASKS, metavar="TASK"
    )
    object_list: str = _flag(
        "dialogues", "prompts that begin with the recognised objects", choices=("dialogues", "all", "none")
    )
    instructions_per_sequence: int = _flag(8, "instructions of an image packed into one sequence; 1 for none")
    max_length: int = _flag(4096, "tokens of a sequence; longer ones are left out, never cut")

    device: str = _flag("auto", "auto, cpu or cuda; a missing GPU is an error")
    quantize: bool = _flag(True, "NF4 for the language model's linear layers")
    precision: str = _flag("auto", "bf16 or fp32 (default: bf16 on a GPU)", choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: bool = _flag(False, "recompute activations: less memory, more time")
    attention: str = _flag("sdpa", "sdpa, eager or flash_attention_2 (which packs no instructions)")
    workers: int = _flag(1, "processes that read and decode")

    log_steps: int = _flag(1, "steps between lines in metrics.jsonl")
    eval_steps: int | None = _flag(None, "steps between evaluations (default: at the end of each phase)", type=int)
    eval_batches: int = _flag(16, "micro-batches of each kind that an evaluation sees")
    checkpoint_steps: int = _flag(500, "steps between checkpoints")
    keep_checkpoints: int = _flag(2, "checkpoints that are kept")
    report_to: tuple[str, ...] = _flag(
        (), "trackers: tensorboard, wandb", many=True, choices=("tensorboard", "wandb"), metavar="NAME"
    )


@dataclass(frozen=True, slots=True)
class Preset:
    """A base model with the arguments that suit it; a flag on the command line goes before both."""

    base: str
    arguments: dict[str, Any]
    about: str


PRESETS = {
    "tiny": Preset(
        TINY,
        {
            # The whole default run, build and evaluation included, is to end in ten minutes on two cores.
            "epochs": 2,
            "max_steps": 100,
            "batch_size": 8,
            "cit_learning_rate": 1e-3,
            "final_learning_rate": 5e-5,
            "max_length": 640,
            "attention": "eager",  # on a CPU faster than SDPA with the mask of packed sequences
            "object_list": "none",
            "query_start": "names",
            # Lists and boxes are beyond the embedded base, and their long answers would be most of what it learns from.
            "tasks": ("class_to_binary", "counting", "box_to_class"),
        },
        "the small base in this package, sized for a CPU",
    ),
    # The paper's own start, InternLM-7B with a projector aligned to it, is not published; this one is.
    "collavo-7b": Preset(
        "llava-hf/llava-1.5-7b-hf", {}, "CLIP-L/14 at 490 px and a 7B language model, with the paper's arguments"
    ),
}


_GROUPS = {
    "data": "data and run",
    "epochs": "optimisation",
    "lora_rank": "method",
    "device": "machine",
    "log_steps": "logs and checkpoints",
}
"""Headings of the help, each by the first argument under it."""

_METAVARS = {int: "N", float: "X", str: "NAME"}

_DESCRIPTION = """\
Train CoLLaVO from crayon data: first the Crayon Prompt alone (cpt), then with
two QLoRA adapters, of which crayon batches move one and dialogue batches the
other (cit)."""

_EPILOG = "\n".join(
    [
        *(
            f"--preset {name} has other defaults:\n" + "\n".join(f"  --{k} {v}" for k, v in preset.arguments.items())
            for name, preset in PRESETS.items()
            if preset.arguments
        ),
        "",
        "several GPUs:",
        "  torchrun --nproc_per_node N -m collavo.train --data PARQUET [options]",
    ]
)


def parse_arguments(argv: Sequence[str] | None, cuda: bool) -> tuple[TrainArguments, Preset]:
    """Read the command line, fill in the preset, and check what can be checked without a model.

    Args:
        cuda: whether there is a GPU, by which the preset is chosen where none is named.

    Raises:
        UserError: for values that cannot work, alone or together.
    """
    given = _parser().parse_args(argv)
    name = given.preset or ("collavo-7b" if cuda else "tiny")
    preset = PRESETS.get(name) or Preset(name, {}, "the base named by --preset")
    chosen = {key: value for key, value in vars(given).items() if value is not None}
    arguments = TrainArguments(**{**preset.arguments, **chosen, "preset": name})
    _check(arguments)
    return arguments, preset


def _parser() -> Parser:
    parser = Parser(
        prog="python -m collavo.train",
        usage="python -m collavo.train --data PARQUET [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    group: Any = parser
    for argument in fields(TrainArguments):
        meta, default = argument.metadata, argument.default
        group = parser.add_argument_group(_GROUPS[argument.name]) if argument.name in _GROUPS else group
        options: dict[str, Any]
        if isinstance(default, bool):
            options = {"action": argparse.BooleanOptionalAction}
        elif meta.get("many"):
            options = {"nargs": "+", "choices": meta.get("choices"), "metavar": meta["metavar"]}
        else:
            options = {"type": meta.get("type", type(default)), "choices": meta.get("choices")}
            options["metavar"] = None if options["choices"] else meta.get("metavar", _METAVARS[options["type"]])
        told = "default" in meta["help"] or meta.get("many") or default is None
        as_told = ("off", "on")[default] if isinstance(default, bool) else default
        shown = "" if told else f" (default: {as_told})"
        group.add_argument(f"--{argument.name}", help=meta["help"] + shown, default=None, **options)
    return parser


def _check(arguments: TrainArguments) -> None:
    if not arguments.data:
        raise UserError("--data is missing; name Parquet files of crayon data, such as out/*.parquet")
    for name in ("epochs", "max_steps", "batch_size", "micro_batch_size", "lora_rank", "lora_alpha",
                 "instructions_per_sequence", "max_length", "log_steps", "eval_steps", "eval_batches",
                 "checkpoint_steps", "keep_checkpoints"):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, but must be at least 1")
    for name in ("seed", "workers"):
        if getattr(arguments, name) < 0:
            raise UserError(f"--{name} is {getattr(arguments, name)}, but must be 0 or more")
    if arguments.crayon_share is not None and not 0 < arguments.crayon_share < 1:
        raise UserError(f"--crayon_share is {arguments.crayon_share}, but must lie between 0 and 1")
    if arguments.queries == "none" and arguments.stage == "cpt":
        raise UserError("--stage cpt trains the queries, and --queries none has none; use --stage cit or all")
    if arguments.attention == "flash_attention_2" and arguments.instructions_per_sequence > 1:
        raise UserError(
            "--attention flash_attention_2 cannot keep packed instructions apart; add --instructions_per_sequence 1, "
            "or use --attention sdpa"
        )
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with the run in --output_dir, --overwrite replaces it; choose one")
