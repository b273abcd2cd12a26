"""What README and docs name is there: commands, flags, files, links and tables."""

import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType

from apache_beam.options.pipeline_options import PipelineOptions

from collavo.cli import Parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "docker" / "README.md", *sorted((ROOT / "examples").glob("*.sh"))]
CODE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)

FOLDERS = ("schemas", "collavo", "pipelines", "pretraining", "tests", "benchmarks", "docker", "docs", "examples", ".ci")
OTHERS_FLAGS = {"--data_path", "--image_folder", "--format", "--shutdown_timeout"}
"""Flags of other people's programs that the prose names."""


@cache
def generate() -> ModuleType:
    """The script that makes the tables of the docs."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def flags_of(command: str) -> set[str]:
    """The flags of one of `collavo`'s commands; for the build also Beam's."""
    flags = set(generate().parser_of(command)._option_string_actions)
    if command == "build":
        beam = Parser(prog="beam", conflict_handler="resolve")
        for options in PipelineOptions.__subclasses__():
            options._add_argparse_args(beam)  # type: ignore[arg-type]
        flags |= set(beam._option_string_actions)
    return flags


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def calls(text: str) -> list[tuple[str, str]]:
    """Every call of a command in code: the command as `collavo` calls it, or a path, and what follows."""
    program = r"(?:python )?(pipelines/build_crayon\.py|benchmarks/\w+\.py|(?:-m )(?:collavo|pretraining)\.\w+)(.*)"
    found = re.findall(program, text.replace("\\\n", " "))
    return [(name.removeprefix("-m "), re.split(r"[#`]|&&", rest)[0]) for name, rest in found]


def test_ci_finds_two_commands_as_they_are_printed() -> None:
    listed = subprocess.run(["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True)
    main_job, tests = listed.stdout.splitlines()
    assert main_job == "pip install . && python pipelines/build_crayon.py --runner DirectRunner"
    assert tests == "pip install -e '.[dev]' && python -m pytest -n auto"


def test_readme_stays_a_page_of_200_lines() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 200


def test_commands_and_their_flags_exist() -> None:
    modules = {module.removesuffix(".__main__"): command for command, module in generate().COMMANDS.items()}
    modules["pipelines/build_crayon.py"] = "build"
    wrong, seen = [], 0
    for text in TEXTS:
        for program, rest in calls(text.read_text(encoding="utf-8")):
            flags = set(re.findall(r"(?<![\w-])--[a-z_]+", rest))
            seen += len(flags)
            if program in modules:
                wrong += [f"{text.name}: {program} {flag}" for flag in flags - flags_of(modules[program])]
            elif not (ROOT / (program if "/" in program else f"{program.replace('.', '/')}.py")).exists():
                wrong.append(f"{text.name}: {program}")
    assert wrong == [] and seen > 80


def test_flags_in_prose_belong_to_some_command() -> None:
    known = OTHERS_FLAGS.union(*map(flags_of, generate().COMMANDS))
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", prose(page))}
    assert len(named) > 30 and named <= known


def test_tables_of_the_docs_are_known_and_complete() -> None:
    asked = {name for page in PAGES for name in re.findall(r"^<!-- table: (.+) -->$", page.read_text(), re.MULTILINE)}
    assert asked == set(generate().TABLES)
    for name in asked:
        if not name.startswith("flags"):  # a column, reject or placeholder without a meaning fails here
            assert generate().TABLES[name]().count("\n") > 2


def test_files_that_are_named_exist() -> None:
    named = {
        (page.name, path.rstrip("."))
        for page in PAGES
        for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*)", prose(page))
    }
    assert len(named) > 40 and [name for name in sorted(named) if not (ROOT / name[1]).exists()] == []


def test_links_and_pictures_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose(page)):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
