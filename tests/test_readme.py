"""What README.md says is so: its files, flags, columns and reasons are those of the code, and CI finds its commands."""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from collavo.cli import Parser
from collavo.training.arguments import PRESETS
from pipelines.options import build_parser
from schemas.crayon_row import CRAYON_SCHEMA

ROOT = Path(__file__).parents[1]
README = re.sub(r"<!--(?! \.ci/run ).*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```\w*\n.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)

BUILD = "pipelines/build_crayon.py"
MODULES = ("train", "evaluate", "chat", "export", "convert", "reformat")
FOLDERS = ("schemas", "collavo", "pipelines", "tests", "benchmarks", "docker", "notebooks", "docs", ".ci")

Help = Callable[[str], set[str]]
"""The flags of a command, by the name of its module."""


@pytest.fixture(scope="module")
def flags_of() -> Help:
    return lambda name: build_flags() if name == BUILD else module_flags(name)


def build_flags() -> set[str]:
    """The build's own, and those of Beam that need no extra."""
    beam = Parser(prog="beam", conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(beam)  # type: ignore[arg-type]
    return {*build_parser()._option_string_actions, *beam._option_string_actions}


def module_flags(name: str) -> set[str]:
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Parser, "print_help", lambda parser, file=None: shown.extend(parser._option_string_actions))
        importlib.import_module(f"collavo.{name}").main(["--help"])
    return set(shown)


def commands() -> list[list[str]]:
    """The words of every command in the code blocks, one list per program of a line."""
    lines = "".join(BLOCKS).replace("\\\n", " ").splitlines()
    programs = [part for line in lines for part in line.removeprefix("$ ").split("&&")]
    found = [shlex.split(part, comments=True) for part in programs if re.match(r"\s*(python|torchrun|pip) ", part)]
    assert len(found) > 10
    return found


def test_ci_finds_two_commands_and_they_are_printed_as_they_are() -> None:
    listed = subprocess.run(["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True)
    main_job, tests = listed.stdout.splitlines()
    assert main_job.startswith("pip install") and main_job.endswith(f"python {BUILD} --runner DirectRunner")
    assert tests.startswith("pip install") and tests.endswith("python -m pytest")
    assert all(README.count(f"<!-- .ci/run -->\n```sh\n{command}\n```\n") == 1 for command in (main_job, tests))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_name_programs_and_flags_that_there_are(words: list[str], flags_of: Help) -> None:
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    if words[0] == "torchrun":
        flags -= {"--nproc_per_node"}
    if BUILD in words:
        assert flags <= flags_of(BUILD)
    elif "-m" in words and (module := words[words.index("-m") + 1]).startswith("collavo."):
        assert flags <= flags_of(module.removeprefix("collavo."))
    elif words[1].startswith("benchmarks/"):
        help_text = subprocess.run([sys.executable, *words[1:2], "--help"], cwd=ROOT, capture_output=True, check=True)
        assert flags <= set(re.findall(r"--[a-z_\d]+", help_text.stdout.decode()))
    else:
        assert words[:2] in (["pip", "install"], ["python", "-m"]) and not flags


def test_flags_in_the_text_are_those_of_some_command(flags_of: Help) -> None:
    known = set().union(*(flags_of(name) for name in (BUILD, *MODULES)))
    named = set(re.findall(r"(?<![\w-])--[a-z_]+", PROSE))
    assert len(named) > 15 and named <= known


def test_presets_and_reasons_are_complete() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \| (?:the small|`llava)", PROSE, re.MULTILINE)) == set(PRESETS)
    sources = "".join(path.read_text() for name in ("collavo", "pipelines") for path in (ROOT / name).rglob("*.py"))
    raised = re.findall(r'(?:Image|Path|Storage|Panoptic)Error\("([a-z_]+)"', sources)
    raised += re.findall(r'Rejected\([^"]*(?:\(.*?\))?, "([a-z_]+)"', sources)
    raised += re.findall(r'[Rr]ejects?\([^"\n]*"(?:read|merge|segment|write)", "([a-z_]+)"', sources)
    (table,) = re.findall(r"\| stage \| reasons \|\n(.*?)\n\n", PROSE, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", table)) == set(raised)


def test_columns_are_those_of_the_schema() -> None:
    tables = re.findall(r"^\| (?:column|of an? \w+) \| type \| meaning \|\n\|[-|]+\n((?:\|.*\n)+)", PROSE, re.MULTILINE)
    listed = [re.findall(r"^\| `(\w+)`", table, re.MULTILINE) for table in tables]
    of_structs = [[f.name for f in CRAYON_SCHEMA.field(n).type.value_type] for n in ("segments", "instructions")]
    assert listed == [CRAYON_SCHEMA.names, *of_structs]


def test_files_that_are_named_exist() -> None:
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)", PROSE)
    assert len(named) > 5
    assert [path for path in named if not (ROOT / path.rstrip(".")).exists()] == []


def test_the_tree_of_files_is_there() -> None:
    (tree,) = [block for block in BLOCKS if block.startswith("schemas/")]
    folder, missing = ROOT, []
    for line in tree.splitlines():
        names = re.match(r"( *)((?:\S+/?(?:  ?(?=\S+\.py))?)+)", line)
        assert names, line
        if not names[1]:
            folder = ROOT / names[2]
        if len(names[1]) <= 2:
            missing += [name for name in names[2].split() if not (folder / (name if names[1] else "")).exists()]
    assert missing == []


def test_links_and_pictures_resolve() -> None:
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", PROSE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PROSE):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (ROOT / target).exists(), target
