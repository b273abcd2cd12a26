"""What `import collavo` offers, and what it costs."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

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


def test_calls_that_the_docs_show_have_the_arguments_of_the_functions() -> None:
    pages = (page.read_text(encoding="utf-8") for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")))
    snippets = [
        code for page in pages for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    ]
    (shown,) = re.findall(r"(?:^    .*\n|^\n)+", collavo.__doc__ or "", re.MULTILINE)[-1:]
    calls = [
        node for code in [*snippets, dedent(shown)] for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
    ]
    public = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in collavo.__all__]
    assert len(public) >= 8
    for call in public:
        signature = inspect.signature(getattr(collavo, call.func.id))  # type: ignore[attr-defined]
        signature.bind(*call.args, **{keyword.arg or "": keyword.value for keyword in call.keywords})
