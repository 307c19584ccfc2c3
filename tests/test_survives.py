"""docs/what-survives-what.md: each promise names a test that exists."""

import ast
import re

from conftest import REPO

PAGE = REPO / "docs" / "what-survives-what.md"


def promises() -> list[list[str]]:
    """The cells of each row of the tables."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return [row for row in rows if row[-1] != "test"]


def test_each_promise_names_a_test_that_exists():
    rows = promises()
    assert len(rows) > 30
    for row in rows:
        assert len(row) == 3, row
        file, name = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", row[-1]).groups()
        tree = ast.parse((REPO / "tests" / file).read_text())
        assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, row


def test_no_test_holds_two_promises():
    names = [row[-1] for row in promises()]
    assert len(names) == len(set(names))
