"""The claims: every variant trains two steps, and what is made of its numbers."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
from conftest import REPO, small_flags

from benchmarks.claims import runs, summary
from benchmarks.claims.__main__ import STUDIES, Sitting, missing, write_tables
from benchmarks.claims.runs import Run, command_of, read_records
from benchmarks.claims.study import Effect, Study
from benchmarks.claims.summary import Difference, difference, effect_rows, variant_table
from common.errors import InputError

SMALL = Study(
    "small",
    "Is b better?",
    {"a": ("plain", "scaledet.py --lam 0"), "b": ("ours", "scaledet.py --weights {a}")},
    {"coco AP": ("coco", "AP")},
    (Effect("b", "a", "coco AP", "ours is better"),),
)


def record(variant: str, seed: int, value: float | None, study: Study = SMALL) -> dict:
    run = {"variant": variant, "seed": seed, "command": study.command(variant), "peak_gb": 1.0}
    run |= {"img_per_s": 2.0, "args": {"environment": {"revision": "abc"}}}
    return run | {"metrics": {"coco": {"AP": value}}}


def records(a: list[float], b: list[float]) -> summary.Records:
    found = {("a", seed): record("a", seed, value) for seed, value in enumerate(a)}
    return found | {("b", seed): record("b", seed, value) for seed, value in enumerate(b)}


def sitting(tmp_path, name: str, **changes) -> Sitting:
    args = {"study": [name], "seeds": 1, "minutes": 60.0, "jobs": 1, "work": tmp_path / "work"}
    args |= {"output": tmp_path / "json"} | changes
    args["output"].mkdir(exist_ok=True)
    return Sitting(argparse.Namespace(**args))


@pytest.mark.parametrize("name", STUDIES)
def test_each_variant_trains_and_its_tables_are_written(
    name, tmp_path, tiny_root, run, monkeypatch
):
    def start(command, log):
        method = command[0].removesuffix(".py")
        # settings of a model are those of its training
        small = [] if "--eval-only" in command else small_flags(method, 2)
        given = [part for part in command[1:] if part != "--tiny"]
        done = run(*given, *small, "--data-root", tiny_root, method=method)
        assert done.returncode == 0, done.stderr
        return {"seconds": 1, "cpu_seconds": 1, "peak_gb": 1.0, "threads": "1"}

    monkeypatch.setattr(runs, "start", start)
    sitting(tmp_path, name).run_all()
    study = STUDIES[name]
    found = read_records(study, tmp_path / "json")
    assert [variant for variant, _ in found] == list(study.variants)
    for title, metric in study.columns.values():
        assert any(metric in record["metrics"].get(title, {}) for record in found.values())

    monkeypatch.setattr(runs, "start", None)  # nothing is repeated
    sitting(tmp_path, name).run_all()
    docs = tmp_path / "docs"
    shutil.copytree(REPO / "docs", docs)
    write_tables([study], tmp_path / "json", docs)
    text = (docs / (study.page or "claims.md")).read_text()
    assert all(f"| {words} |" in text for words, _ in study.variants.values())
    assert (docs / "claims" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_effects_name_variants_and_columns(study):
    for effect in study.effects:
        assert {effect.better, effect.worse} <= study.variants.keys()
        assert effect.column in study.columns
    order = list(study.variants)
    for variant in order:  # a run may start from one that comes after it: it is run before
        assert set(study.needs(variant)) <= set(order) - {variant}


def test_a_command_names_the_folder_of_its_seed(tmp_path):
    command = command_of(Run(SMALL, "b", 2), tmp_path)
    assert command[:3] == ["scaledet.py", "--weights", str(tmp_path / "small/a-2")]
    assert command[3:] == ["--tiny", "--seed", "2", "--output", str(tmp_path / "small/b-2")]


def test_a_difference_is_of_the_same_seeds():
    found = difference(SMALL, records([0.1, 0.2, 0.4], [0.2, 0.4]), SMALL.effects[0])
    np.testing.assert_allclose(found.values, [0.1, 0.2])
    assert found.mean == pytest.approx(0.15) and found.error == pytest.approx(0.05)
    assert difference(SMALL, records([0.1], []), SMALL.effects[0]) is None
    none = records([0.1], []) | {("b", 0): record("b", 0, None)}
    assert difference(SMALL, none, SMALL.effects[0]) is None


@pytest.mark.parametrize(
    "values, verdict",
    [
        ([0.1, 0.2], "2 of 3 seeds"),
        ([0.1, 0.11, 0.12], "shown"),
        ([-0.1, -0.11, -0.12], "the opposite"),
        ([0.1, -0.11, 0.12], "not clear"),
    ],
)
def test_verdicts(values, verdict):
    assert Difference(values).verdict == verdict


def test_p_is_that_of_the_paired_test():
    # t = .11 / (.01 / sqrt 3), two degrees of freedom
    assert Difference([0.1, 0.11, 0.12]).p == pytest.approx(0.00274, abs=1e-5)
    assert math.isnan(Difference([0.1]).p)


def test_tables():
    found = records([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert "| plain | .200 ± .100 | 3 |" in variant_table(SMALL, found)
    (row,) = effect_rows(SMALL, found)
    assert row.endswith("| +0.200 ± 0.058 (p 0.07) | 3 | shown |")


def test_effects_that_are_not_clear_get_more_seeds():
    unclear = records([0.1, 0.2, 0.3], [0.2, 0.1, 0.3])
    assert {run.key for run in missing(SMALL, 3, unclear)} == {
        (variant, seed) for variant in "ab" for seed in (3, 4)
    }
    assert not missing(SMALL, 3, records([0.1, 0.2, 0.3], [0.2, 0.31, 0.4]))
    assert [run.key for run in missing(SMALL, 2, records([0.1, 0.2], []))] == [("b", 0), ("b", 1)]


def test_runs_of_another_command_do_not_count(tmp_path, capsys):
    old = record("a", 0, 0.1) | {"command": "scaledet.py"}
    (tmp_path / "small.json").write_text(json.dumps([old, record("b", 0, 0.1)]))
    assert list(read_records(SMALL, tmp_path)) == [("b", 0)]
    assert "1 runs are of commands that the study has no more" in capsys.readouterr().out


@pytest.mark.parametrize("minutes, expected", [(60.0, ["a-0", "b-0", "a-1", "b-1"]), (0.0, [])])
def test_a_run_comes_after_those_that_it_needs(tmp_path, monkeypatch, minutes, expected):
    started = []

    def execute(run, work):
        started.append(f"{run.variant}-{run.seed}")
        (work / str(run)).mkdir(parents=True)
        (work / str(run) / "results.json").write_text("{}")
        return record(run.variant, run.seed, {"a": 0.1, "b": 0.2}[run.variant] + run.seed / 100)

    monkeypatch.setattr("benchmarks.claims.__main__.execute", execute)
    monkeypatch.setitem(STUDIES, "small", SMALL)
    sitting(tmp_path, "small", seeds=2, minutes=minutes).run_all()
    assert started == expected
    if expected:  # another machine has the records, but not the folders
        shutil.rmtree(tmp_path / "work")
        (tmp_path / "json" / "small.json").write_text(json.dumps([record("a", 0, 0.15)]))
        started.clear()
        sitting(tmp_path, "small").run_all()
        assert started[:2] == ["a-0", "b-0"]
        assert read_records(SMALL, tmp_path / "json")["a", 0]["metrics"]["coco"]["AP"] == 0.15


def test_a_failed_run_names_its_log(tmp_path):
    with pytest.raises(InputError, match=r"python nothing.py: exit code 2, see .*x.log"):
        runs.start(["nothing.py"], tmp_path / "x.log")
