"""The table of reasons names each reason that any step gives, and no other."""

import ast
from collections import defaultdict
from pathlib import Path

from pipelines.records import REJECT_REASONS

ROOT = Path(__file__).parents[1]
NOT_IN_A_BUILD = (
    *("collavo/model", "collavo/export_data.py", "collavo/inference.py", "collavo/server.py"),
    *("collavo/question_file.py", "collavo/training"),
)


def reasons_in_the_code() -> dict[str, set[str]]:
    """First arguments of `Rejected(...)`, and of reject lines, by the files that they stand in."""
    found = defaultdict(set)
    for path in [*(ROOT / "collavo").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())) if not name.startswith(NOT_IN_A_BUILD) else ():
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                place = {"Rejected": 0, "reject": 1, "Reject": 3}.get(called)
                for part in ast.walk(node.args[place]) if place is not None and len(node.args) > place else ():
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        found[part.value].add(name)
    return found


ROWS_READ_LATER = {"collavo/dataset.py", "collavo/row_checks.py"}


def test_the_table_is_complete():
    # Pictures of finished rows are read by their path elsewhere, never in a build.
    elsewhere = {reason for reason, files in reasons_in_the_code().items() if files <= ROWS_READ_LATER}
    rows_of_crayon = {"missing_value", "bad_value"}
    assert rows_of_crayon <= elsewhere
    in_builds = set(reasons_in_the_code()) - (elsewhere - rows_of_crayon)
    assert {reason for of_stage in REJECT_REASONS.values() for reason in of_stage} == in_builds
