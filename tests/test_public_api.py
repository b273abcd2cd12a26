"""What `import collavo` offers, and what it costs."""

import subprocess
import sys

import pytest

import collavo


@pytest.mark.parametrize("code", ["import collavo", "import collavo.train; collavo.train.main(['--help'])"])
def test_neither_the_package_nor_help_loads_torch(code: str) -> None:
    heavy = "{'torch', 'transformers', 'peft', 'rich', 'matplotlib'}"
    check = f"import sys, atexit; atexit.register(lambda: print('loaded', {heavy} & set(sys.modules)))\n{code}"
    shown = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout
    assert shown.splitlines()[-1] == "loaded set()"


def test_every_public_name_resolves_and_no_other_does() -> None:
    for name in collavo.__all__:
        assert getattr(collavo, name).__name__ == name
        assert name in dir(collavo)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        collavo.nothing  # noqa: B018
