"""What stands beside the code says what the code says: workflow, citation, changelog, BibTeX."""

import re

import pytest
import yaml
from conftest import METHODS, REPO

PROJECT = (REPO / "pyproject.toml").read_text()
ARXIV = r"\d{4}\.\d{4,5}"


def project(pattern: str) -> str:
    """Returns the part of pyproject.toml that the pattern's group matches."""
    return re.search(pattern, PROJECT)[1]


def test_workflow_has_the_oldest_versions_and_the_command_of_the_readme():
    workflow = yaml.safe_load((REPO / ".github/workflows/tests.yml").read_text())
    tests, style = workflow["jobs"]["tests"], workflow["jobs"]["style"]
    matrix = tests["strategy"]["matrix"]
    oldest = project(r'requires-python = ">=([\d.]+)"')
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    assert matrix["python"][0] == oldest
    [held] = matrix["include"]
    assert held["python"] == oldest
    for package in ("torch", "torchvision"):
        assert held[package] == project(rf'"{package}>=([\d.]+)"') + ".0"
    command = tests["steps"][-1]["run"]
    assert command in (REPO / "README.md").read_text()
    assert command in (REPO / ".ci/run").read_text()
    commands = [step.get("run") for step in style["steps"]]
    assert commands[-2:] == ["ruff check .", "ruff format --check ."]


def test_citation_has_the_fields_of_cff_and_of_pyproject():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "abstract", "type", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert all(author["name"] for author in citation["authors"])
    assert citation["version"] == project(r'\nversion = "(.+)"')
    assert citation["license"] == project(r'\nlicense = "(.+)"')


def test_changelog_begins_with_what_is_not_released():
    titles = re.findall(r"^## (.+)", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    for title in titles[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", title), title


@pytest.mark.parametrize("method", METHODS)
def test_page_ends_with_the_papers_of_its_head(method):
    page, _, end = (REPO / f"docs/{method}.md").read_text().partition("\n## BibTeX\n")
    head = page.partition("\n## ")[0]
    entries = re.findall(r"^@(\w+){([a-z0-9]+),\n(.+?)^}$", end, re.MULTILINE | re.DOTALL)
    assert end.endswith("}\n```\n") and len(entries) == end.count("@")
    cited = set()
    for kind, key, body in entries:
        fields = dict(re.findall(r"^  (\w+) += {(.+)},$", body, re.MULTILINE))
        assert body.count("{") == body.count("}") and len(fields) == body.count("\n"), key
        assert {"title", "year"} <= fields.keys() and fields["year"] in key, key
        assert ("booktitle" in fields) == (kind == "inproceedings"), key
        number = fields.get("eprint")
        assert number is None or f"arxiv.org/abs/{number}" in page, key
        cited.add(number)
    assert set(re.findall(rf"arxiv\.org/abs/({ARXIV})", head)) <= cited
    assert entries
