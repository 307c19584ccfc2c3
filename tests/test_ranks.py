"""Two ranks against one with the double batch: docs/ranks.md lists all that differs."""

import fnmatch
import json
import re
import sys

import pytest
from conftest import METHODS, REPO

sys.path.insert(0, str(REPO / "benchmarks"))
from ranks import CASES, measure

PAGE = (REPO / "docs/ranks.md").read_text()
NUMBERS = r"(\d\.\de[-+]\d\d) \| (\d\.\de[-+]\d\d) \|"
LISTED = re.findall(rf"^\| (\w+, [\w ]+) \| `([\w*]+)` \| .* \| {NUMBERS}$", PAGE, re.MULTILINE)
WHOLE = re.findall(rf"^\| (\w+, [\w ]+) \| {NUMBERS}$", PAGE, re.MULTILINE)


def cases() -> list:
    """All cases. The first of a method is quick, and the others are marked as long."""
    params, seen = [], set()
    for method, what, changes in CASES:
        marks = [pytest.mark.long] if method in seen else []
        seen.add(method)
        params.append(pytest.param(method, what, changes, marks=marks, id=f"{method}, {what}"))
    return params


def is_listed(case: str, term: str) -> bool:
    return any(case == of and fnmatch.fnmatch(term, pattern) for of, pattern, *_ in LISTED)


@pytest.mark.parametrize("method, what, changes", cases())
def test_listed_losses_alone_depend_on_the_ranks(method, what, changes, forks, tiny_root, tmp_path):
    found = measure(method, changes, tiny_root, tmp_path, forks)
    terms = found.keys() - {"loss"}
    assert terms
    for term in terms:
        if is_listed(f"{method}, {what}", term):
            assert found[term]["gradient"] > 1e-4, term
        else:
            assert max(found[term].values()) < 1e-5, term


def test_the_page_has_each_case_with_the_measured_numbers():
    assert {method for method, *_ in CASES} == set(METHODS)
    [file] = (REPO / "benchmarks").glob("ranks-*.json")
    record = json.loads(file.read_text())["relative differences"]
    assert list(record) == [f"{method}, {what}" for method, what, _ in CASES]
    rows = [*LISTED, *((case, "loss", *numbers) for case, *numbers in WHOLE)]
    assert {case for case, *_ in WHOLE} == set(record)
    for case, pattern, *numbers in rows:
        terms = fnmatch.filter(record[case], pattern)
        for name, number in zip(("loss", "gradient"), numbers, strict=True):
            assert number == f"{max(record[case][term][name] for term in terms):.1e}", pattern
    for case, terms in record.items():
        differ = {term for term in terms if terms[term]["gradient"] > 1e-5} - {"loss"}
        assert differ == {term for term in terms if is_listed(case, term)}
