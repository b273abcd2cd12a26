"""The console script names its commands and hands them their flags."""

import subprocess
import sys

import pytest

from collavo import __version__
from pipelines.console import COMMANDS, main


def test_help_has_a_line_for_every_command_and_imports_none_of_them():
    code = (
        "import sys; from pipelines.console import main; main(['--help']); "
        "assert not {'torch', 'apache_beam', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"collavo {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("biuld", "did you mean build?"), ("xyz", "collavo --help lists")])
def test_an_unknown_command_is_answered_with_the_nearest(capsys, name, hint):
    assert main([name, "--output", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"collavo: error: unknown command {name}; {hint}")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_the_flags_after_its_name(capsys, name):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "usage: " in shown
    assert "[-h]" not in shown  # argparse's own usage calls every flag optional
