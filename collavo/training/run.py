"""A training run, from its arguments to its run directory."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from collavo.dataset import find_files
from collavo.device import resolve_device
from collavo.errors import UserError
from collavo.model import CollavoForConditionalGeneration
from collavo.model.adapters import (
    DIALOGUE_ADAPTER,
    IMAGE_ADAPTER,
    add_adapters,
    enable_checkpointing,
    quantize_language_model,
)
from collavo.model.processing import CollavoProcessor
from collavo.model.prompt import show_supervision
from collavo.model.query_init import begin_with_names
from collavo.runs import (
    CARD,
    CRAYON,
    METRICS,
    TRAIN_ARGS,
    load_base,
    load_crayon_prompt,
    read_train_args,
    save_run,
)
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import Batch, PlanOptions, plan_epoch
from collavo.training.batches import ExampleDataset, ExampleOptions
from collavo.training.card import write_model_card
from collavo.training.checkpoint import (
    Progress,
    list_checkpoints,
    load_optimizer,
    load_weights,
    read_progress,
    save_checkpoint,
)
from collavo.training.display import RunDisplay
from collavo.training.loop import Phase, StepResult, Trainer
from collavo.training.row_index import Kind, build_row_index
from collavo.training.stages import CPT, Stage, StagedModel

# Arguments that change neither what is learned nor in which order; a resumed run may change them. Where the data lie is
# one: their checksums tell what they are.
_FREE_ARGUMENTS = (
    "data", "image_root", "resume", "overwrite", "output_dir", "micro_batch_size", "device", "gradient_checkpointing",
    "attention", "workers", "log_steps", "eval_steps", "eval_batches", "checkpoint_steps", "keep_checkpoints",
    "report_to",
)  # fmt: skip

_CIT_ADAPTERS: dict[str, dict[Kind, str]] = {
    "dual": {"crayon": IMAGE_ADAPTER, "dialogue": DIALOGUE_ADAPTER},
    "single": {"crayon": "cit", "dialogue": "cit"},
    "vl_only": {"dialogue": DIALOGUE_ADAPTER},
}
"""Which adapter each kind of batch moves, by `--adapters`."""


class TrainingRun:
    """One run: everything is loaded and checked on construction, `train` does the rest.

    Args:
        base: folder or hub id of the model to start from.
    """

    def __init__(self, arguments: TrainArguments, base: str, console: Console) -> None:
        self.arguments = arguments
        self.base = base
        self.folder = Path(arguments.output_dir)
        self.files = find_files(arguments.data)
        _check_folder(arguments, self.folder)
        self.accelerator = _accelerator(arguments)
        self.dtype = _dtype(arguments, self.accelerator.device)
        self.adapter_of = _CIT_ADAPTERS[arguments.adapters]
        self.adapters = list(dict.fromkeys(self.adapter_of.values()))
        torch.manual_seed(arguments.seed)
        self.staged, self.processor = self._load_model()
        self.fingerprint = self._fingerprint()
        self.train_set = self._examples("train")
        self.validation_set = self._examples("validation")
        self.display = RunDisplay(console, self.folder / METRICS, self.accelerator, arguments.log_steps)

    def train(self) -> None:
        """Take all steps, then write the run directory."""
        phases = self._phases()
        checkpoint, done = self._resume_point()
        self._write_train_args()
        example = show_supervision(self.processor.tokenizer, self.train_set.prompt_of(phases[-1].batches[0].samples[0]))
        self.display.begin(phases, self._facts(phases), example, max(done.total_steps, phases[0].steps_before))
        try:
            self._run_phases(phases, checkpoint, done)
        finally:
            self.display.end()
        if self.accelerator.is_main_process:
            adapters = self.adapters if self.arguments.stage != "cpt" else []
            save_run(self.folder, self.staged.model, adapters, self.processor)
            write_model_card(self.folder / CARD, read_train_args(self.folder), self.folder / METRICS)
        self.accelerator.end_training()

    def _run_phases(self, phases: Sequence[Phase], checkpoint: Path | None, done: Progress) -> None:
        """Take the steps that are not done yet."""
        trainer = Trainer(self.staged, self.accelerator, self.arguments, self.dtype)
        for phase in phases:
            if phase.steps_before + len(phase.batches) <= done.total_steps:
                continue
            parameters = self.staged.parameters_of(self.adapters if phase.name == "cit" else ())
            optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
            first_step = 0
            if checkpoint and done.phase == phase.name:
                load_optimizer(checkpoint, parameters, optimizer)
                first_step = done.phase_steps
            self._run_phase(trainer, phase, optimizer, first_step)

    def _run_phase(self, trainer: Trainer, phase: Phase, optimizer: torch.optim.Optimizer, first_step: int) -> None:
        arguments = self.arguments

        def after_step(result: StepResult, done: Progress) -> None:
            last = done.phase_steps == len(phase.batches)
            self.display.step(result)
            if last or (arguments.eval_steps and done.phase_steps % arguments.eval_steps == 0):
                self.display.evaluation(result.step, phase.name, self._evaluate(trainer, phase))
            # After the evaluation of its step, which a run that goes on from here does not repeat.
            if last or done.phase_steps % arguments.checkpoint_steps == 0:
                self._save_checkpoint(done, optimizer)

        trainer.run(phase, self.train_set, self._pad_token_id, optimizer, first_step, after_step)

    def _evaluate(self, trainer: Trainer, phase: Phase) -> dict[Kind, float]:
        """Validation losses, on the same batches every time; empty where the split is too small for one batch."""
        plan = plan_epoch(
            self.validation_set.index, tuple(phase.stages), self._plan_options(self.arguments.micro_batch_size), 0
        )
        chosen = [
            batch
            for kind in phase.stages
            for batch in [batch for batch in plan if batch.kind == kind][: self.arguments.eval_batches]
        ]
        return trainer.evaluate(chosen, self.validation_set, self._pad_token_id)

    def _facts(self, phases: Sequence[Phase]) -> dict[str, str]:
        """What is said of a run before it starts."""
        model, index = self.staged.model, self.train_set.index
        learning = {name: sum(p.numel() for p in self.staged.parameters_of(names).values()) for name, names in (
            ("queries and connector", ()), ("with adapters", tuple(self.adapters)),
        )}  # fmt: skip
        texts = ", ".join(f"{len(texts)} {kind} texts" for kind, texts in index.texts.items())
        left_out = ", ".join(f"{count} {kind}" for kind, count in index.too_long.items() if count)
        return {
            "base": f"{self.base}, computing in {self.dtype} on {self.accelerator.device}",
            "weights": ", ".join(f"{count:,} in {kind}" for kind, count in _weights_by_type(model).items()),
            "learning": ", ".join(f"{count:,} {name}" for name, count in learning.items()),
            "data": f"{len(self.files)} files, {texts}" + (f"; too long, left out: {left_out}" if left_out else ""),
            "steps": ", ".join(f"{phase.name} {len(phase.batches)}" for phase in phases)
            + f" of {self.arguments.batch_size} sequences",
        }

    def _phases(self) -> list[Phase]:
        arguments = self.arguments
        phases = []
        if arguments.stage != "cit" and arguments.queries != "none":
            phases.append(Phase("cpt", {"crayon": CPT}, self._plan(("crayon",)), arguments.cpt_learning_rate, 0))
        if arguments.stage != "cpt":
            active = tuple(self.adapters)
            stages = {kind: Stage(adapter, active, adapter) for kind, adapter in self.adapter_of.items()}
            steps_before = sum(len(phase.batches) for phase in phases) or self._steps_of_cpt()
            plan = self._plan(tuple(stages))
            phases.append(Phase("cit", stages, plan, arguments.cit_learning_rate, steps_before))
        return phases

    def _steps_of_cpt(self) -> int:
        """Steps of an earlier `--stage cpt` in the same folder, on which this run goes on."""
        metrics = self.folder / METRICS
        lines = map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else ()
        return max((line["step"] for line in lines if line["phase"] == "cpt"), default=0)

    def _plan(self, kinds: tuple[Kind, ...]) -> list[Batch]:
        """All batches of a phase.

        Raises:
            UserError: if a kind has too few samples for a single batch.
        """
        options = self._plan_options(self.arguments.batch_size)
        index = self.train_set.index
        batches = [b for epoch in range(self.arguments.epochs) for b in plan_epoch(index, kinds, options, epoch)]
        for kind in kinds:
            if not any(batch.kind == kind for batch in batches):
                texts = "instructions" if kind == "crayon" else "dialogues"
                raise UserError(
                    f"--data: {len(index.texts[kind])} {texts} of the split 'train' make no batch of "
                    f"{options.batch_size} sequences; lower --batch_size, build more data, or leave out the phase"
                )
        return batches[: self.arguments.max_steps]

    def _plan_options(self, batch_size: int) -> PlanOptions:
        arguments = self.arguments
        return PlanOptions(
            batch_size=batch_size,
            seed=arguments.seed,
            instructions_per_sequence=arguments.instructions_per_sequence,
            max_tokens=self._max_text_tokens,
            crayon_share=arguments.crayon_share,
        )

    def _load_model(self) -> tuple[StagedModel, CollavoProcessor]:
        arguments, device = self.arguments, self.accelerator.device
        base_dtype = self.dtype if device.type == "cuda" else torch.float32
        model, processor = load_base(self.base, base_dtype, arguments.queries, arguments.attention)
        if arguments.stage == "cit":
            load_crayon_prompt(self.folder / CRAYON, model)
        elif arguments.query_start == "names":
            _begin_with_names(model, processor)
        if arguments.quantize:
            quantize_language_model(model, self.dtype, device)
        if arguments.gradient_checkpointing:
            enable_checkpointing(model)
        adapted = add_adapters(model, self.adapters, arguments.lora_rank, arguments.lora_alpha)
        staged = StagedModel(adapted.to(device).train(), self.adapters)
        for parameter in staged.parameters_of(self.adapters).values():
            parameter.data = parameter.data.float()  # what learns is kept in full precision
        return staged, processor

    def _examples(self, split: str) -> ExampleDataset:
        arguments = self.arguments
        index = build_row_index(self.files, split, self._token_bound, self._max_text_tokens, arguments.tasks)
        image_root = Path(arguments.image_root) if arguments.image_root else None
        return ExampleDataset(index, self.processor, ExampleOptions(arguments.object_list, image_root))

    def _token_bound(self, text: str) -> int:
        """No tokenizer makes more tokens than bytes; only where that bound says nothing is the text tokenized."""
        length = len(text.encode())
        if length > self._max_text_tokens:
            return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        return length

    @cached_property
    def _max_text_tokens(self) -> int:
        rows, columns = self.processor.grid_hw
        empty = self.processor.render([("human", ""), ("gpt", "")], objects="")
        tokens = self.arguments.max_length - len(empty.input_ids)
        if tokens < 1:
            raise UserError(
                f"--max_length {self.arguments.max_length} leaves no room for text beside an image of "
                f"{rows} x {columns} tokens"
            )
        return tokens

    @property
    def _pad_token_id(self) -> int:
        pad_token_id: int = self.processor.tokenizer.pad_token_id
        return pad_token_id

    def _resume_point(self) -> tuple[Path | None, Progress]:
        """The checkpoint to go on from, its weights loaded, and what is done; nothing without `--resume`."""
        checkpoints = list_checkpoints(self.folder) if self.arguments.resume else []
        if not checkpoints:
            return None, Progress("", 0, 0)
        done = read_progress(checkpoints[-1], self.fingerprint)
        load_weights(checkpoints[-1], self.staged.parameters_of(self.adapters))
        return checkpoints[-1], done

    def _save_checkpoint(self, done: Progress, optimizer: torch.optim.Optimizer) -> None:
        if self.accelerator.is_main_process:
            parameters = self.staged.parameters_of(self.adapters)
            save_checkpoint(self.folder, done, parameters, optimizer, self.fingerprint, self.arguments.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _fingerprint(self) -> str:
        """Identifies what a run learns from what, in which order: its data and the arguments that matter."""
        arguments = {name: value for name, value in asdict(self.arguments).items() if name not in _FREE_ARGUMENTS}
        data = [_data_digest(file) for file in self.files]
        facts = {"arguments": arguments, "data": data}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def _write_train_args(self) -> None:
        if not self.accelerator.is_main_process:
            return
        facts = {
            **asdict(self.arguments),
            "base": self.base,
            "adapter_names": self.adapters if self.arguments.stage != "cpt" else [],
            "dtype": str(self.dtype).removeprefix("torch."),
            "files": {str(file): _data_digest(file) for file in self.files},
            "ranks": self.accelerator.num_processes,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "collavo")},
        }
        (self.folder / TRAIN_ARGS).write_text(json.dumps(facts, indent=2) + "\n")


def _accelerator(arguments: TrainArguments) -> Accelerator:
    """Processes, device and trackers.

    Raises:
        UserError: for a GPU that is not there.
        UserError: for a batch that the ranks cannot share evenly, or a tracker that is not installed.
    """
    for tracker in arguments.report_to:
        if find_spec(tracker) is None:  # accelerate would go on without it
            raise UserError(f"--report_to {tracker}: not installed; pip install {tracker}")
    device = resolve_device(arguments.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=list(arguments.report_to) or None, project_dir=arguments.output_dir
    )
    if arguments.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch_size {arguments.batch_size} cannot be shared evenly by {accelerator.num_processes} processes"
        )
    if arguments.report_to:
        accelerator.init_trackers("collavo", {k: str(v) for k, v in asdict(arguments).items()})
    return accelerator


def _begin_with_names(model: CollavoForConditionalGeneration, processor: CollavoProcessor) -> None:
    try:
        begin_with_names(model, processor.tokenizer)
    except ValueError as error:
        raise UserError(f"--query_start names: {error}; use --query_start random") from error


def _dtype(arguments: TrainArguments, device: torch.device) -> torch.dtype:
    if arguments.precision == "auto":
        # A processor without instructions for bfloat16 computes in it too, but slower than in float32.
        in_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        in_bf16 = arguments.precision == "bf16"
    return torch.bfloat16 if in_bf16 else torch.float32


def _weights_by_type(model: torch.nn.Module) -> Counter[str]:
    """Numbers of weights by how they are kept: `NF4`, `bfloat16`, `float32`."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        if quantization := getattr(parameter, "quant_state", None):
            counts["NF4"] += quantization.shape.numel()
        else:
            counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return counts


def _check_folder(arguments: TrainArguments, folder: Path) -> None:
    """Refuse to mix two runs, or make room for a new one.

    Raises:
        UserError: where `--output_dir` holds a run that is neither resumed, replaced nor gone on from.
    """
    goes_on = arguments.stage == "cit" and (folder / CRAYON).exists() and not (folder / "adapters").exists()
    if (folder / TRAIN_ARGS).exists() and not (arguments.resume or goes_on):
        if not arguments.overwrite:
            raise UserError(
                f"--output_dir {folder} holds a run already; --resume goes on with it, --overwrite replaces it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _data_digest(file: Path) -> str:
    """SHA-256 of a Parquet file's footer, which tells where every page lies and how large it is."""
    with file.open("rb") as stream:
        stream.seek(-8, 2)
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(-8 - length, 2)
        return hashlib.sha256(stream.read(length)).hexdigest()
