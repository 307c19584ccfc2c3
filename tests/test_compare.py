"""python -m common.compare."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.compare import differences, rows

ROOT = Path(__file__).resolve().parent.parent


def compare(*flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "common.compare", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_rows_have_the_change_from_the_first_run_to_the_last():
    before = {"coco": {"AP": 0.5, "AP50": 0.75}, "mine": {"AP50": 0.1}}
    after = {"mine": {"AP50": 0.5}, "coco": {"AP": 0.25, "AP50": None}, "new": {"PQ": 0.5}}
    assert rows([before, {}, after], ()) == [
        ["coco", "AP", "0.500", "-", "0.250", "-0.250"],
        ["mine", "AP50", "0.100", "-", "0.500", "+0.400"],
        ["new", "PQ", "-", "-", "0.500", "-"],
    ]
    assert [row[:2] for row in rows([before, after], ("AP50", "PQ"))] == [
        ["coco", "AP50"],
        ["mine", "AP50"],
        ["new", "PQ"],
    ]


def test_settings_that_differ():
    one = {"lr": 0.1, "datasets": "a", "output": "x", "environment": {"torch": "1"}}
    other = {"lr": 0.2, "datasets": "a", "output": "y", "ema": 0.5}
    assert differences([one, other]) == ["--lr: 0.1 | 0.2", "--ema: null | 0.5"]


@pytest.fixture
def runs(tmp_path):
    for name, value in (("before", 0.5), ("after", 0.75)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"coco": {"AP": value}}))
        (folder / "args.json").write_text(json.dumps({"lr": value, "seed": 0}))
    return tmp_path


def test_the_command_prints_a_table(runs):
    done = compare(runs / "before", runs / "after" / "results.json")
    assert done.returncode == 0, done.stderr
    settings, heading, row = done.stdout.splitlines()
    assert settings == "--lr: 0.5 | 0.75"
    names = [str(runs / "before"), str(runs / "after/results.json")]
    assert heading.split() == ["dataset", "metric", *names, "change"]
    assert row.split() == ["coco", "AP", "0.500", "0.750", "+0.250"]


@pytest.mark.parametrize(
    "content, flags, words",
    [
        (None, [], "results.json does not exist; name a run that has ended"),
        ("{", [], "results.json cannot be read"),
        ("[1]", [], "is not a json object"),
        ('{"lr": 1}', [], "has no metrics of datasets"),
        ('{"coco": {"AP": 1}}', ["--metrics", "PQ"], "no run has the metric PQ"),
    ],
)
def test_what_cannot_be_compared(content, flags, words, tmp_path):
    if content:
        (tmp_path / "results.json").write_text(content)
    done = compare(tmp_path, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
