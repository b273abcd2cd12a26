"""Training arguments: the paper's hyper-parameters, the presets, and the command line made of them.

Nothing here imports torch, so that `--help` and mistakes on the command line are answered at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collavo.cli import REQUIRED, Parser, flag, on_disk
from collavo.embedded import TINY
from collavo.errors import UserError
from schemas.crayon_row import TASKS

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, slots=True)
class TrainArguments:
    """Every argument of a run; each field is a flag of `python -m collavo.train`."""

    data: tuple[str, ...] = flag(
        REQUIRED, "crayon data: Parquet files, or folders of them", many=True, metavar="PARQUET", group="data and run"
    )
    image_root: str | None = flag(None, "folder that image paths in the rows start from", metavar="DIR")
    output_dir: str = flag("runs/collavo", "the run directory", kind=on_disk, metavar="DIR")
    preset: str = flag(
        "",
        "tiny, collavo-7b, collavo-internlm2-7b, or a base: folder or hub id (default: collavo-7b on a GPU, else tiny)",
    )
    phase: str = flag(
        "all",
        "all, or one alone: align; cpt, which continues a finished align; cit, which continues a finished cpt",
        choices=("all", "align", "cpt", "cit"),
    )
    projector: str | None = flag(
        None, "a trained projector for the base: projector.safetensors, or the run that holds it", metavar="FILE_OR_RUN"
    )
    resume: bool = flag(False, "continue from the last checkpoint in --output_dir")
    overwrite: bool = flag(False, "replace the run in --output_dir")

    epochs: int = flag(1, "passes over the data, in each phase", least=1, group="optimisation")
    max_steps: int | None = flag(None, "steps of each phase at most", kind=int, least=1)
    cpt_max_steps: int | None = flag(None, "steps of Crayon Prompt Tuning at most, if fewer", kind=int, least=1)
    batch_size: int = flag(32, "sequences per step, over all ranks", least=1)
    align_batch_size: int = flag(256, "the same in alignment", least=1)
    micro_batch_size: int = flag(8, "sequences computed at once, on a CPU shared out among its threads; gradients add "
        "up over the rest (default: 4 for tiny, 2 for collavo-7b, 1 for collavo-internlm2-7b, else 8)",
        least=1)  # fmt: skip
    align_learning_rate: float = flag(1e-3, "of alignment, after a warm-up of 3 % of its steps", least=0)
    cpt_learning_rate: float = flag(1e-4, "at the start of Crayon Prompt Tuning", least=0)
    cit_learning_rate: float = flag(1e-5, "at the start of instruction tuning", least=0)
    final_learning_rate: float = flag(1e-6, "at the end of every phase; the decay is a cosine", least=0)
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm; 0 for none", least=0)
    seed: int = flag(0, "for initial weights and the order of the data", least=0, most=2**63 - 1)

    lora_rank: int = flag(64, "rank of the adapters", least=1, group="method")
    lora_alpha: int = flag(64, "alpha of the adapters", least=1)
    adapters: str = flag("dual", "dual; single or vl_only for an ablation", choices=("dual", "single", "vl_only"))
    queries: str = flag("both", "both; others for an ablation", choices=("both", "semantic", "numbering", "none"))
    semantic_queries: str = flag(
        "table",
        "a query for each class: in a table, or computed from the words of its name, for classes never seen as well",
        choices=("table", "words"),
    )
    query_start: str = flag(
        "random", "first queries: random, or names, the embeddings of class names", choices=("random", "names")
    )
    crayon_share: float | None = flag(
        None, "share of crayon sequences in cit (default: as in the data)", kind=float, least=0.001, most=0.999
    )
    tasks: tuple[str, ...] = flag(TASKS, f"{', '.join(TASKS)} (default: all)", many=True, choices=TASKS, metavar="TASK")
    object_list: str = flag("dialogues", "prompts that begin with the objects", choices=("dialogues", "all", "none"))
    instructions_per_sequence: int = flag(8, "instructions of an image packed into one sequence; 1 for none", least=1)
    max_length: int = flag(
        4096, "tokens of a sequence, object list included; what does not fit is left out and counted", least=1
    )

    device: str = flag("auto", "auto, cpu, cuda or cuda:N; a missing GPU is an error", group="machine")
    quantize: bool = flag(True, "NF4 for the language model's linear layers")
    precision: str = flag(
        "auto", "bf16 or fp32 (default: bf16 on a GPU, and on a CPU made for it)", choices=("auto", "bf16", "fp32")
    )
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, more time")
    attention: str = flag("sdpa", "sdpa, eager, or another of transformers (which packs no instructions)")
    workers: int = flag(1, "processes that read and decode", least=0)

    max_skipped_ratio: float = flag(
        0.01, "stop when more samples of the run than this cannot be prepared", least=0, most=1
    )

    log_steps: int = flag(1, "steps between lines in metrics.jsonl", least=1, group="logs and checkpoints")
    eval_steps: int | None = flag(None, "steps between evaluations (default: once a phase)", kind=int, least=1)
    max_eval_samples: int = flag(32, "sequences of each kind in an evaluation", least=1)
    checkpoint_steps: int = flag(500, "steps between checkpoints", least=1)
    keep_checkpoints: int = flag(2, "checkpoints to keep", least=1)
    report_to: tuple[str, ...] = flag(
        (), f"trackers: {', '.join(TRACKERS)}", many=True, choices=TRACKERS, metavar="NAME"
    )

    @property
    def base(self) -> str:
        """The model to start from: a folder, a hub id, or the name of an embedded model."""
        return PRESETS[self.preset].base if self.preset in PRESETS else self.preset

    def most_steps(self, phase: str) -> int | None:
        """The most steps of a phase; None if its data and `epochs` alone decide."""
        limits = (self.max_steps, self.cpt_max_steps if phase == "cpt" else None)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def by_words(self) -> bool:
        """Whether semantic queries are computed from the names of the classes."""
        return self.semantic_queries == "words"

    @property
    def about(self) -> str:
        """A line about the preset."""
        return PRESETS[self.preset].about if self.preset in PRESETS else "a base of yours, with the paper's arguments"


@dataclass(frozen=True, slots=True)
class Preset:
    """A base model with the arguments that suit it; flags on the command line override them."""

    base: str
    about: str
    arguments: dict[str, Any]
    made_by: str = ""
    """The command that makes the base, where it is in no place that everyone reaches."""


_INTERNLM2 = "models/internlm2"

PRESETS = {
    "tiny": Preset(
        TINY,
        "the small base in this package, sized for a CPU",
        {
            # The whole default run, from build to evaluation, has to end within ten minutes on two cores.
            "epochs": 2,
            "max_steps": 180,
            "cpt_max_steps": 40,  # queries that begin as names have little to learn alone
            "batch_size": 8,
            "micro_batch_size": 4,  # on a CPU, no slower than all eight at once
            "crayon_share": 0.65,  # with half, boxes and counts are learned a little less well
            "cit_learning_rate": 1e-3,
            "final_learning_rate": 5e-5,
            "max_length": 896,
            "instructions_per_sequence": 8,
            "attention": "eager",  # on a CPU, faster than SDPA with the mask of packed sequences
            "object_list": "none",
            "query_start": "names",
            # The embedded base cannot learn lists, and most supervised tokens would be in their long answers.
            "tasks": ("class_to_binary", "counting", "box_to_class", "class_to_box"),
        },
    ),
    # The defaults of `TrainArguments` are the paper's, so that both presets below add nothing to them. The first starts
    # from a projector that is trained; the second, like the paper and its authors' release, from InternLM, for which
    # none is published.
    "collavo-7b": Preset(
        "llava-hf/llava-1.5-7b-hf",
        "CLIP-L/14 at 490 px and a 7B language model, with the paper's arguments",
        {"micro_batch_size": 2},  # sequences of --max_length then fit into 80 GB with a tenth to spare
    ),
    "collavo-internlm2-7b": Preset(
        _INTERNLM2,
        "CLIP-L/14 at 490 px and InternLM2-7B, aligned first, with the paper's arguments",
        {"micro_batch_size": 1},
        "python -m collavo.import_base --vision openai/clip-vit-large-patch14-336 --language internlm/internlm2-7b "
        f"--output {_INTERNLM2}",
    ),
}

_DESCRIPTION = """\
Train CoLLaVO on crayon data: first the Crayon Prompt alone (cpt), then two
QLoRA adapters (cit); crayon batches train one of them, dialogue batches the
other. Where the base has a new projector, alignment (align) trains that before,
on the first question and answer of each dialogue about an image."""

_DEFAULTS_OF_TINY = "\n".join(
    f"  --{name} {' '.join(value) if isinstance(value, tuple) else value}"
    for name, value in PRESETS["tiny"].arguments.items()
)

_EPILOG = f"""\
--preset tiny has other defaults:
{_DEFAULTS_OF_TINY}

several GPUs:
  torchrun --nproc_per_node N -m collavo.train --data PARQUET [options]"""


def parse_arguments(argv: Sequence[str] | None) -> TrainArguments:
    """Read the command line, fill in the preset's values, and check what can be checked without a model.

    Without `--preset`, the choice depends on whether there is a GPU, and torch is imported to find that out.

    Raises:
        UserError: for values that cannot work, alone or together.
    """
    parser = Parser(
        prog="python -m collavo.train",
        usage="python -m collavo.train --data PARQUET [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_flags(TrainArguments)
    given = parser.parse_args(argv)
    preset = given.preset or ("collavo-7b" if _has_gpu() else "tiny")
    defaults = PRESETS[preset].arguments if preset in PRESETS else {}
    arguments = parser.flags_of(TrainArguments, given, {**defaults, "preset": preset})
    _check(arguments)
    return arguments


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check(arguments: TrainArguments) -> None:
    if arguments.preset not in PRESETS and "/" not in arguments.preset and not Path(arguments.preset).is_dir():
        raise UserError(
            f"--preset {arguments.preset}: neither one of {', '.join(PRESETS)}, nor a folder, nor a hub id (owner/name)"
        )
    made_by = PRESETS[arguments.preset].made_by if arguments.preset in PRESETS else ""
    if made_by and not Path(arguments.base).is_dir():
        raise UserError(f"--preset {arguments.preset} starts from the folder {arguments.base}; make it once: {made_by}")
    if arguments.queries == "none" and arguments.phase == "cpt":
        raise UserError("--phase cpt trains the queries, and --queries none has none; use --phase cit or all")
    if arguments.attention not in ("sdpa", "eager") and arguments.instructions_per_sequence > 1:
        raise UserError(
            f"--attention {arguments.attention} cannot keep packed instructions apart; add --instructions_per_sequence "
            "1, or use --attention sdpa"
        )
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume continues the run in --output_dir, --overwrite replaces it; choose one")
