"""A training run, from its arguments to its run directory."""

import math
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from rich.console import Console
from rich.text import Text

from collavo.cli import naming
from collavo.dataset import category_set, check_repeats, find_files, notes
from collavo.device import device_of_ranks
from collavo.errors import UserError
from collavo.folders import locked, make_folder, remove, writing
from collavo.model.configuration import CollavoConfig
from collavo.model.prompt import KINDS, Kind, show_supervision
from collavo.model_card import write_model_card
from collavo.progress import Progress
from collavo.runs import (
    ADAPTERS,
    CARD,
    CONFIG,
    CRAYON,
    METRICS,
    PROJECTOR,
    TRAIN_ARGS,
    WRITTEN,
    base_config,
    base_from,
    check_embedded_base,
    read_metrics,
    read_train_args,
    save_run,
)
from collavo.training import checkpoint, record
from collavo.training.arguments import TrainArguments
from collavo.training.batch_plan import PlanOptions, Sample, evaluation_samples, lanes_of
from collavo.training.batches import ExampleDataset
from collavo.training.display import RunDisplay, memory_table
from collavo.training.lengths import LengthLimit
from collavo.training.loop import StepResult, Trainer, signals_noted
from collavo.training.memory import LongestBatch, Shape, check_memory, estimate, memory_of
from collavo.training.phases import ADAPTER_OF, Phase, phases_left, plan_phases
from collavo.training.row_index import RowIndex, build_row_indexes
from collavo.training.trainable import compute_dtype, count_weights, load_trainable


class TrainingRun:
    """One run: construction loads and checks everything, `train` does the rest.

    Args:
        console: has to be quiet on all ranks but the first.
        held: keeps the folder locked for this run.

    Raises:
        UserError: if data, base, device or output folder cannot be used; it names the flag.
    """

    def __init__(self, arguments: TrainArguments, console: Console, held: ExitStack) -> None:
        self.arguments = arguments
        self.console = console
        self.folder = Path(arguments.output_dir)
        with naming("data"):
            self.files = find_files(arguments.data)
            self.categories = category_set(self.files)
            check_repeats(self.files)
        for note in notes(self.files):
            console.print(note, highlight=False, soft_wrap=True)
        self.accelerator = _accelerator(arguments)
        with naming("output_dir"), writing(self.folder):
            make_folder(self.folder)
            if self.accelerator.is_main_process:
                # Started twice, or as tasks of a cluster without torchrun, each process would think itself the first.
                held.enter_context(locked(self.folder))
        self.replaces = self._replaces()
        self.begun = self._begun()
        if (self.folder / TRAIN_ARGS).exists() and not self.replaces:
            with naming("output_dir"):
                check_embedded_base(self.folder, read_train_args(self.folder))
        self.learned_from = record.learned_from(arguments, self.files)
        self.start = self._last_checkpoint() if arguments.resume else None
        if arguments.resume and not self.start:
            lacking = "checkpoint" if arguments.phase == "all" else f"checkpoint of {arguments.phase}"
            console.print(f"--resume: {self.folder} holds no {lacking}; training begins anew", soft_wrap=True)
        self.done = checkpoint.Position("", 0, 0)
        if self.start:
            with naming("resume"):  # before a large base is loaded
                self.done = checkpoint.read_position(self.start, self.learned_from)
            self.files = [file for file, _ in self.learned_from["data"]]  # moved, their names may sort otherwise
        self._check_ranks_agree()
        self.dtype = compute_dtype(arguments.precision, self.accelerator.device)
        self.adapters = list(dict.fromkeys(ADAPTER_OF[arguments.adapters].values()))
        self._check_base()
        torch.manual_seed(arguments.seed)
        self.staged, self.processor = load_trainable(
            arguments,
            self.adapters,
            self.categories,
            self.folder / CRAYON,
            projector_file := self._projector_file(),
            self.accelerator.device,
            self.dtype,
        )
        self.config = cast(CollavoConfig, self.staged.model.get_base_model().config)
        self.shape = Shape.of(self.config)
        self.aligns = arguments.phase == "align" or self.config.projector_untrained
        _check_shares(arguments, self.accelerator.num_processes, self.aligns)
        self.projector_trained = self.aligns or projector_file is not None
        longest = min(arguments.max_length, self.config.context)
        if longest < arguments.max_length:
            said = f"--max_length {arguments.max_length}: the base takes {longest} tokens, so no sequence is longer"
            console.print(said, highlight=False, soft_wrap=True)
        self.limit = LengthLimit(self.processor, longest, arguments.object_list, arguments.instructions_per_sequence)
        examples = self._examples()
        self.train_set, self.validation_set = examples["train"], examples["validation"]
        self.plan_options = PlanOptions(
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            instructions_per_sequence=arguments.instructions_per_sequence,
            max_tokens=self.limit.room,
            crayon_share=arguments.crayon_share,
        )
        self.display = RunDisplay(console, self.folder / METRICS, self.accelerator, arguments.log_steps)

    def train(self) -> None:
        """Take all steps, then write the run directory."""
        arguments, is_main = self.arguments, self.accelerator.is_main_process
        phases = plan_phases(arguments, self.train_set.index, self.plan_options, self.aligns, self._steps_before())
        samples = sum(len(batch.samples) for phase in phases for batch in phase.batches)
        learning = list(dict.fromkeys(group for phase in phases for group in phase.groups))
        done = self.done
        if self.start:
            with naming("resume"):
                checkpoint.load_weights(self.start, self.staged.parameters_of(learning))
        saved_adapters = [adapter for adapter in self.adapters if adapter in learning]
        phases = phases_left(phases, done)
        if phases[-1].last_step == done.total_steps and (self.folder / CARD).exists():
            self.console.print(
                f"{self.folder} has taken all of its {done.total_steps} steps; with --resume, a higher --epochs or "
                "--max_steps extends it.",
                soft_wrap=True,
            )
            return
        prompt = Text("none of the first batch")
        if shown := self.train_set.prompt_of(phases[-1].batches[0]):
            prompt = show_supervision(self.processor.tokenizer, shown, self.display.in_color)
        most_skipped = int(arguments.max_skipped_ratio * samples)
        steps_done = max(done.total_steps, phases[0].steps_before)
        damaged = self.train_set.index.left_out.lines()
        left = [phase for phase in phases if phase.last_step > done.total_steps]
        available = memory_of(self.accelerator.device)
        rehearsed = [] if available is None else [(phase, *found) for phase in left if (found := self._longest(phase))]
        memory = None
        if available is not None and (longest := {phase.name: batch for phase, _, batch in rehearsed}):
            needs = check_memory(self.shape, arguments, len(self.adapters), longest, available)
            memory = memory_table(needs, longest, available)
        self._prepare_folder()
        if arguments.report_to:
            self.accelerator.init_trackers("collavo", {k: str(v) for k, v in asdict(arguments).items()})
        if is_main:
            (self.folder / CARD).unlink(missing_ok=True)  # written last, it says that the run has ended
            dtype, ranks = str(self.dtype).removeprefix("torch."), self.accelerator.num_processes
            record.write_train_args(
                self.folder, arguments, self.files, saved_adapters, self.projector_trained, dtype, ranks
            )
        facts = self._facts(phases)
        with self.display.shown(phases, facts, memory, damaged, prompt, steps_done), signals_noted() as signals:
            trainer = Trainer(self.staged, self.accelerator, arguments, self.dtype)
            trainer.skipped, trainer.signals = done.skipped, signals
            for phase, sample, batch in rehearsed:  # of all phases, for nobody wants to wait days for the last one's
                trainer.rehearse(phase, sample, batch.sequences, self.train_set)
            for phase in left:
                self._run_phase(trainer, phase, learning, most_skipped)
        self.display.left_out(trainer.skipped.lines())
        self.config.projector_untrained = False
        if is_main:
            save_run(self.folder, self.staged.model, saved_adapters, self.processor)
            left_out = self.train_set.index.left_out.counts + trainer.skipped.counts
            base = base_from(self.folder, self.folder)
            write_model_card(self.folder, self.folder, "run", base, left_out=left_out)
        self.console.print(f"Trained: {self.folder}", soft_wrap=True)
        self.accelerator.end_training()

    def _longest(self, phase: Phase) -> tuple[Sample, LongestBatch] | None:
        """Find the sequence of a phase that takes most memory, and the batch that holds nothing else."""
        one = estimate(self.shape, self.arguments, len(self.adapters), phase.name, LongestBatch(1, 1, 1))
        samples = (sample for batch in phase.batches for sample in batch.samples)
        found = self.train_set.longest(samples, one["logits"] / one["activations"])
        if not found:
            return None
        sample, tokens, supervised = found
        return sample, LongestBatch(self._at_once(len(phase.batches[0].samples)), tokens, supervised)

    def _at_once(self, batch_size: int) -> int:
        """Return how many sequences of a step a rank takes forward and back at once."""
        return min(self.arguments.micro_batch_size, batch_size // self.accelerator.num_processes)

    def _check_base(self) -> None:
        """Refuse a base that a GPU has no room for, before it is loaded: the image alone, for the data are not known
        yet.

        Raises:
            UserError: naming the flags with which it fits.
        """
        arguments, available = self.arguments, memory_of(self.accelerator.device)
        if available is None:
            return
        with naming("preset"):
            config = base_config(arguments.base)
        if not hasattr(config, "text_config"):
            return  # which loading it says in a line
        phase = "cit" if arguments.phase == "all" else arguments.phase
        size = arguments.align_batch_size if phase == "align" else arguments.batch_size
        cells = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        image = {phase: LongestBatch(self._at_once(size), cells, 0)}
        check_memory(Shape.of(config), arguments, len(self.adapters), image, available)

    def _run_phase(self, trainer: Trainer, phase: Phase, learning: Sequence[str], most_skipped: int) -> None:
        """Take the steps of a phase that are not done yet; `learning` are the groups of weights of all phases."""
        arguments = self.arguments
        # One optimizer knows both adapters from the start. Batches of both kinds alternate, and AdamW skips weights
        # without a gradient, so an adapter keeps its moments and its own count of steps while the other one learns.
        parameters = self.staged.parameters_of(phase.groups)
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
        first_step = 0
        if self.start and self.done.phase == phase.name:
            with naming("resume"):
                checkpoint.load_optimizer(self.start, parameters, optimizer)
            first_step = self.done.phase_steps

        def after_step(result: StepResult) -> None:
            steps = result.step - phase.steps_before
            last = steps == len(phase.batches)
            self.display.step(result, phase)
            if last or (arguments.eval_steps and steps % arguments.eval_steps == 0):
                self.display.evaluation(result.step, phase, self._evaluate(trainer, phase))
            # After the evaluation of its step, which a run resumed from here does not repeat.
            if last or steps % arguments.checkpoint_steps == 0 or trainer.stopped_by:
                position = checkpoint.Position(phase.name, steps, result.step, trainer.skipped)
                self._save_checkpoint(position, optimizer, learning)
            if trainer.stopped_by:
                name = signal.Signals(trainer.stopped_by).name
                raise UserError(
                    f"stopped by {name} after step {result.step}, with a checkpoint; --resume goes on from it",
                    128 + trainer.stopped_by,
                )

        trainer.run(phase, self.train_set, optimizer, first_step, most_skipped, after_step)

    def _evaluate(self, trainer: Trainer, phase: Phase) -> dict[Kind, float]:
        """Validation losses, on the same samples every time, from all over the rows; of no kind of which there are
        none."""
        index, most = self.validation_set.index, self.arguments.max_eval_samples
        chosen = evaluation_samples(index, tuple(phase.stages), self.plan_options, most)
        return trainer.evaluate(chosen, self.validation_set)

    def _save_checkpoint(
        self, position: checkpoint.Position, optimizer: torch.optim.Optimizer, learning: Sequence[str]
    ) -> None:
        if self.accelerator.is_main_process:  # all ranks hold the same weights and moments
            parameters = self.staged.parameters_of(learning)
            checkpoint.save_checkpoint(
                self.folder, position, parameters, optimizer, self.learned_from, self.arguments.keep_checkpoints
            )
        self.accelerator.wait_for_everyone()

    def _examples(self) -> dict[str, ExampleDataset]:
        """Index the rows of both splits, in one pass."""
        arguments = self.arguments
        indexes: dict[str, RowIndex] | UserError | None = None
        if self.accelerator.is_main_process:  # the others wait for what it reads
            kinds = (*(() if arguments.phase == "align" else KINDS), *(("caption",) if self.aligns else ()))
            try:
                with naming("data"), Progress(self.console, transient=True) as progress:  # minutes for 100,000s of rows
                    files = progress.track(self.files, "Reading texts, files", len(self.files))
                    indexes = build_row_indexes(files, self.limit, arguments.tasks, self.categories, kinds)
            except UserError as error:
                indexes = error
        (indexes,) = broadcast_object_list([indexes])
        if not isinstance(indexes, dict):
            assert indexes is not None
            raise indexes
        if indexes["train"].has_null_images and arguments.image_root is None:
            raise UserError("--data: rows refer to their images; --image_root must name the folder of the images")
        image_root = Path(arguments.image_root) if arguments.image_root else None
        # A lane belongs to one rank where ranks divide the lanes.
        ranks = math.gcd(self.accelerator.num_processes, lanes_of(arguments.batch_size))
        return {
            split: ExampleDataset(index, self.processor, image_root, self.categories, ranks)
            for split, index in indexes.items()
        }

    def _projector_file(self) -> Path | None:
        """Find the trained projector that this run begins with: one that is named, or that of a finished align."""
        if self.arguments.projector is not None:
            named = Path(self.arguments.projector)
            return named / PROJECTOR if named.is_dir() else named
        own = self.folder / PROJECTOR
        return own if self.arguments.phase in ("cpt", "cit") and own.exists() and not self.replaces else None

    def _steps_before(self) -> int:
        """Return the steps of earlier phases in the same folder, which this run continues."""
        if self.replaces:
            return 0
        earlier = _EARLIER[self.arguments.phase]
        return max((line["step"] for line in read_metrics(self.folder) if line["phase"] in earlier), default=0)

    def _facts(self, phases: Sequence[Phase]) -> dict[str, str]:
        """Say what is printed about a run before it starts."""
        index = self.train_set.index
        learning = {p.name: sum(w.numel() for w in self.staged.parameters_of(p.groups).values()) for p in phases}
        texts = ", ".join(f"{len(texts):,} {kind} texts" for kind, texts in index.texts.items())
        alone = [stage.name for stage in phases[-1].stages.values()] if phases[-1].name == "cit" else []
        return {
            "classes": f"{len(self.categories)}, {self.categories.name}",
            "base": f"{self.arguments.base}, computing in {self.dtype} on {self.accelerator.device}",
            "weights": ", ".join(f"{count:,} in {kind}" for kind, count in count_weights(self.staged.model).items()),
            "learning": ", ".join(f"{name} {count:,}" for name, count in learning.items()),
            "data": f"{len(self.files)} files, {texts}" + (f"; so only {alone[0]} learns" if len(alone) == 1 else ""),
            "validation": "losses of rows that are not trained on"
            if any(map(len, self.validation_set.index.texts.values()))
            else "none: no row is in that split, and no loss of it is measured",
            "steps": ", ".join(
                f"{phase.name} {len(phase.batches)} of {len(phase.batches[0].samples)} sequences" for phase in phases
            ),
        }

    def _replaces(self) -> bool:
        """Tell whether this run replaces one in its folder, so that two are never mixed there.

        Raises:
            UserError: if the folder holds a run that is neither resumed, replaced nor continued, or files that no run
                has written and this one would.
        """
        folder, arguments = self.folder, self.arguments
        if not (folder / TRAIN_ARGS).exists():
            if foreign := [name for name in (CONFIG, CARD) if (folder / name).exists()]:
                raise UserError(f"--output_dir {folder} holds a {foreign[0]} that is of no run; name another folder")
            return False
        aligned, tuned, instructed = ((folder / name).exists() for name in (PROJECTOR, CRAYON, ADAPTERS))
        continues = {"cpt": aligned and not tuned, "cit": tuned and not instructed}.get(arguments.phase, False)
        replaces = not (arguments.resume or continues)
        if replaces and not arguments.overwrite:
            raise UserError(f"--output_dir {folder} holds a run; --resume continues it, --overwrite replaces it")
        if replaces and arguments.phase == "cit" and arguments.queries != "none":
            raise UserError(
                f"--phase cit goes on from a finished cpt, and --overwrite would replace what is in {folder}; use "
                "--phase all, or another --output_dir with a copy of the cpt"
            )
        return replaces

    def _last_checkpoint(self) -> Path | None:
        """Find the checkpoint to resume from; none where the last one is of a phase that this one continues.

        Raises:
            UserError: if the last one is damaged.
        """
        checkpoints = checkpoint.list_checkpoints(self.folder)
        with naming("resume"):
            is_earlier = bool(checkpoints) and checkpoint.phase_of(checkpoints[-1]) in _EARLIER[self.arguments.phase]
        return checkpoints[-1] if checkpoints and not is_earlier else None

    def _begun(self) -> list[Path]:
        """List the checkpoints of an earlier attempt at the phase, which this one begins anew.

        Raises:
            UserError: if there are any that are neither resumed nor replaced.
        """
        if self.replaces or self.arguments.resume:
            return []
        phase, checkpoints = self.arguments.phase, checkpoint.list_checkpoints(self.folder)
        with naming("output_dir"):
            begun = [path for path in checkpoints if checkpoint.phase_of(path) == phase]
        if begun and not self.arguments.overwrite:
            raise UserError(
                f"--output_dir {self.folder} holds an unfinished {phase}; --resume continues it, --overwrite begins it "
                "anew"
            )
        return begun

    def _check_ranks_agree(self) -> None:
        """Refuse a folder in which ranks find different checkpoints, as where each machine has one of its own.

        Raises:
            UserError: naming two ranks, and what they find.
        """
        start = f"{self.start.name} of {self.done.phase}" if self.start else "no checkpoint"
        places = gather_object([start])
        if others := [rank for rank, place in enumerate(places) if place != places[0]]:
            raise UserError(
                f"--output_dir {self.folder}: rank 0 finds {places[0]} there, and rank {others[0]} "
                f"{places[others[0]]}; name a folder that all machines share, and wait until all of them see the same"
            )

    def _prepare_folder(self) -> None:
        """Remove what this run replaces. By now, all is loaded and checked, so that a mistake costs no run.

        Raises:
            UserError: if the disk refuses.
        """
        self.accelerator.wait_for_everyone()  # none reads of it any more
        if self.accelerator.is_main_process:  # ranks that delete the same folder trip over each other
            with naming("output_dir"), writing(self.folder):
                # Not the folder with all that is in it: a log may lie there, which is being written, or other runs.
                written = (path for name in WRITTEN for path in self.folder.glob(name))
                remove([*written] if self.replaces else self.begun)


_EARLIER: dict[str, tuple[str, ...]] = {"all": (), "align": (), "cpt": ("align",), "cit": ("align", "cpt")}
"""The phases whose results each `--phase` takes over from its folder."""

_LONGEST_WAIT = timedelta(hours=2)
"""How long ranks wait for one that indexes the data or writes a checkpoint; ten minutes is the default on GPUs."""


def _accelerator(arguments: TrainArguments) -> Accelerator:
    """Processes, device and trackers.

    Raises:
        UserError: for a GPU that is not there, a batch that the ranks cannot share evenly, or a tracker that is not
            installed.
    """
    for tracker in arguments.report_to:
        if find_spec(tracker) is None:  # accelerate would go on without it
            raise UserError(f"--report_to {tracker}: not installed; pip install {tracker}")
    with naming("device"):
        device, _ = device_of_ranks(arguments.device)
    if arguments.device.startswith("cuda:"):
        # Accelerate computes on "cuda", which is the current device; with several ranks it chooses one for each.
        torch.cuda.set_device(device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        log_with=list(arguments.report_to) or None,
        project_dir=arguments.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
    )
    _check_shares(arguments, accelerator.num_processes, aligns=arguments.phase == "align")
    return accelerator


def _check_shares(arguments: TrainArguments, ranks: int, aligns: bool) -> None:
    """Refuse batches that the ranks cannot share evenly; a remainder would be left out of every step.

    Args:
        aligns: whether there is an alignment.
    """
    sizes = {} if arguments.phase == "align" else {"batch_size": arguments.batch_size}
    for name, size in (sizes | {"align_batch_size": arguments.align_batch_size} if aligns else sizes).items():
        if size % ranks:
            raise UserError(f"--{name} {size} cannot be shared evenly by {ranks} processes")
