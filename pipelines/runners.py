"""Beam's own options, which are the words of a command line that are not our flags, and what a runner cannot do."""

import argparse
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners import create_runner
from apache_beam.runners.portability.portable_runner import PortableRunner
from apache_beam.transforms.environments import DockerEnvironment

from collavo.cli import Parser, naming, unknown_flag
from collavo.errors import UserError
from collavo.storage import check_reachable, is_local

# Beam warns that Google's client libraries are missing, which only a job on Google Cloud needs, and of an incomplete
# command line for such a job that it made no bucket, before the line that says what is missing.
logging.getLogger("apache_beam.options.pipeline_options").setLevel(logging.ERROR)


def parse_beam_options(rest: Sequence[str], own: Parser) -> PipelineOptions:
    """Parse Beam's options; where no runner is named, the local one is meant.

    Args:
        own: the parser of the build's flags, to name the nearest one where a flag is unknown.

    Raises:
        UserError: for what Beam does not know, and for what the runner itself finds missing.
    """
    parser = Parser(prog=own.prog, add_help=False)
    for options_class in PipelineOptions.__subclasses__():
        with suppress(argparse.ArgumentError):  # a few options are declared by two of Beam's classes
            options_class._add_argparse_args(parser)  # type: ignore[arg-type]
    _, unknown = parser.parse_known_args(list(rest))
    if unknown:
        raise UserError(unknown_flag(unknown[0], [*own._option_string_actions, *parser._option_string_actions]))
    options = _Options(list(rest))
    standard = options.view_as(StandardOptions)
    standard.runner = standard.runner or "DirectRunner"
    try:
        faults = PipelineOptionsValidator(options, create_runner(standard.runner)).validate()
    except (ValueError, ImportError) as error:
        raise UserError(f"--runner {standard.runner}: {error}") from error
    if faults:
        raise UserError(f"--runner {standard.runner}: {' '.join(faults)}")
    return options


class _Options(PipelineOptions):
    """Beam's options that keep their views: Beam asks for one hundreds of times as it makes a graph, and would
    parse the command line each time."""

    def __init__(self, flags: Sequence[str]) -> None:
        self.__dict__["_views"] = {}  # Beam's __setattr__ takes options only
        super().__init__(flags)

    def view_as(self, cls: type[PipelineOptions]) -> Any:
        """Return the options as those of a kind; all views share their values."""
        views = self.__dict__["_views"]
        if cls not in views:
            views[cls] = super().view_as(cls)
        return views[cls]


def check_file_systems(options: PipelineOptions, paths: Sequence[tuple[str, str]]) -> None:
    """Refuse paths that no file system is installed for, or that the runner's workers cannot see.

    Args:
        paths: flag and path, for every path on the command line.
    """
    for flag, path in paths:
        with naming(flag):
            check_reachable(path)
        if is_local(path) and _is_dataflow(options):
            raise UserError(f"--{flag} {path}: Dataflow's workers see no local disk; a gs:// path would work")


def check_workers(
    options: PipelineOptions,
    share_gpu: bool,
    model_device: str | None,
    model_copies: int | None,
    accelerator: str | None = None,
) -> None:
    """Refuse workers that would lack this package, would share a GPU's memory, or would never start.

    Args:
        share_gpu: whether several processes of a local run would be on one GPU.
        model_device: `--device`, None where no model runs.
        model_copies, accelerator: `--model_copies` and `--accelerator`.
    """
    if _is_dataflow(options):
        _check_dataflow(options, accelerator)
    _check_environment(options)
    if options.view_as(StandardOptions).runner != "DirectRunner":
        return
    if accelerator:
        raise UserError("--accelerator acts only on a runner that fits workers to steps, as Dataflow does")
    if share_gpu and model_device and not model_copies and _is_cuda(model_device):
        raise UserError(
            "several processes (--direct_num_workers, --direct_running_mode multi_processing) would each load a model "
            "into one GPU; add --model_copies 1, or leave the flag out for a process per GPU"
        )


def _check_environment(options: PipelineOptions) -> None:
    """Refuse Beam's own image, which runners with a job service start where nothing else is named."""
    name, given = options.view_as(StandardOptions).runner, options.view_as(PortableOptions)
    runner = create_runner(name)
    if not isinstance(runner, PortableRunner):
        return
    try:
        environment = runner.default_environment(options)
    except ValueError as error:
        config = f" --environment_config {given.environment_config}" * bool(given.environment_config)
        raise UserError(f"--environment_type {given.environment_type}{config}: {error}") from error
    if getattr(environment, "container_image", "") == DockerEnvironment.default_docker_image():
        raise UserError(
            f"--runner {name} would start Beam's own image for its workers, which lacks this package and torch; "
            "--environment_type DOCKER --environment_config IMAGE names one, which docker/Dockerfile makes; "
            "EXTERNAL and PROCESS do without"
        )


def _check_dataflow(options: PipelineOptions, accelerator: str | None) -> None:
    if not options.view_as(WorkerOptions).sdk_container_image:
        raise UserError(
            "--runner DataflowRunner needs --sdk_container_image, for Beam's own lacks this package and torch; "
            "docker/Dockerfile makes one"
        )
    services = options.view_as(GoogleCloudOptions).dataflow_service_options or []
    experiments = options.view_as(DebugOptions).experiments or []
    if accelerator and any(service.startswith("worker_accelerator") for service in services):
        raise UserError(
            "--dataflow_service_options worker_accelerator gives every worker a GPU, --accelerator only those of the "
            "network's steps; take either"
        )
    if (
        any("use_nvidia_mps" in hint for hint in (*services, accelerator or ""))
        and "no_use_multiple_sdk_containers" in experiments
    ):
        raise UserError(
            "use_nvidia_mps shares the GPU among processes, of which --experiments "
            "no_use_multiple_sdk_containers leaves one; take either"
        )


def _is_dataflow(options: PipelineOptions) -> bool:
    return str(options.view_as(StandardOptions).runner).endswith("DataflowRunner")


def _is_cuda(device: str) -> bool:
    if device != "auto":
        return device.startswith("cuda")
    from collavo.device import resolve_device  # loads torch, which most builds can do without

    return resolve_device(device).type == "cuda"
