"""The benchmarks: turns, medians, tables, the page, absent peers, and one section end to end."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import REPO

from benchmarks import paired, report
from benchmarks.__main__ import main
from benchmarks.detectors import lowest_of_best
from benchmarks.paired import Options, Row, Setting, compare, fill
from benchmarks.sections import ON_GPU, SECTIONS, evaluation, training
from benchmarks.sections.data import HEIGHT, QUALITY, WIDTH, photo
from common.errors import InputError
from common.segment_metrics import confusion, match_segments


class Clock:
    """Time that passes only when a function takes some."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(paired.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(paired.time, "process_time", lambda: self.now * 2)

    def task(self, name, durations):
        durations = iter(durations)

        def run():
            self.calls.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_functions_take_turns_and_the_first_round_is_not_counted(clock):
    functions = {"a": clock.task("a", [9, 1, 2, 6]), "b": clock.task("b", [9, 4, 8, 6])}
    taken = compare(functions, rounds=3, limit=100)
    assert clock.calls == ["a", "b"] * 4
    assert taken["a"] == {"seconds": [1, 2, 6], "CPU seconds": [2, 4, 12]}
    assert taken["b"]["seconds"] == [4, 8, 6]


def test_rounds_end_at_the_limit_but_two_are_counted(clock):
    taken = compare({"a": clock.task("a", [99, 20, 20, 20, 20])}, rounds=4, limit=25)
    assert taken["a"]["seconds"] == [20, 20]


def test_each_call_has_the_same_random_numbers():
    drawn = []
    compare({"a": lambda: drawn.append(torch.rand(1).item())}, rounds=2)
    assert len(set(drawn)) == 1 and len(drawn) == 3


def test_a_row_has_the_ratio_of_medians(clock):
    functions = {"a": clock.task("a", [9, 1, 2, 6]), "b": clock.task("b", [9, 3, 8, 6])}
    row = Row("data", "both", "a", "b", goal=3.1, unit="ms")
    [row] = fill([row], functions, Options(limit=100), count=10)
    assert row.values["a"] == [100, 200, 600] and row.ratio() == 3
    assert row.ratio("cpu") == pytest.approx(3)
    assert row.holds is False
    row.goal = 3
    assert row.holds is True


def test_what_cannot_be_compiled_is_told_in_the_row():
    def refused():
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nmore")

    [row] = fill([Row("data", "both", "a", "b")], {"a": refused, "b": refused}, Options())
    assert row.note == "cannot be compiled here: no compiler" and row.ratio() is None
    assert "no compiler" in report.table([row]) and row.holds is None


def rows_by_hand():
    first = Row("training", "x, 320 px", "x", "peer", "eager", goal=2)
    first.values = {"x": [1.0, 2.0, 3.0], "peer": [5.0, 6.0, 7.0]}
    first.cpu = {"x": [1.0], "peer": [4.0]}
    return [first, Row("startup", "y", "y", "z", note="not here")]


def record_by_hand():
    sections = {}
    for row in rows_by_hand():
        machine = paired.machine("cpu")
        section = {"machine": machine, "rounds": 3, "load": [0.1, 0.2], "seconds": 60.4}
        sections[row.section] = section | {"rows": [row.record()]}
    return {"sections": dict(reversed(sections.items()))}


def test_rows_survive_the_json_file(tmp_path):
    path = tmp_path / "results.json"
    paired.write_json(path, record_by_hand())
    read = json.loads(path.read_text())
    assert report.all_rows(read) == rows_by_hand()
    assert read["sections"]["training"]["rows"][0]["ratio"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_has_medians_ranges_and_goals():
    *_, first, second = report.table(rows_by_hand()).splitlines()
    assert first == (
        "| x, 320 px | float32 | x: 2 s (1 to 3) | peer: 6 s (5 to 7) | **3.00** | 4.00 | 2 | yes |"
    )
    assert second == "| y; not here |  |  | z |  |  |  |  |"
    text = report.summary(record_by_hand())
    assert "1 of 1 goals hold." in text and "load average 0.1 before and 0.2 after" in text
    assert text.index("### Training step") < text.index("### Start-up")


def test_the_page_is_rewritten_between_its_markers(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\n")
    for text in ("new \\1", "newer \\1"):
        report.write_between(page, "a", text)
        whole = f"before\n<!-- a -->\n{text}\n<!-- /a -->\nbetween\n<!-- b -->\n<!-- /b -->\n"
        assert page.read_text() == whole
    with pytest.raises(InputError, match=r"speed.md: write the lines <!-- c -->"):
        report.write_between(page, "c", "new")


def test_the_page_has_the_markers_that_the_command_needs(tmp_path):
    page = tmp_path / "speed.md"
    shutil.copy(REPO / "docs/speed.md", page)
    names = ["results on CPU", "profiles on CPU", "results on GPU", "profiles on GPU"]
    for name in (*names, "profiles of small models"):
        report.write_between(page, name, f"figures: {name}")
        assert f"figures: {name}" in page.read_text()


def test_the_plot_is_a_picture(tmp_path):
    report.plot(record_by_hand(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[1:4] == b"PNG"


def test_an_absent_peer_leaves_its_rows_out(monkeypatch, capsys):
    monkeypatch.setattr(paired.util, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "PAIRS", [])
    assert list(training.rows(Options(quick=True))) == []
    told = "transformers is not installed, and its rows are left out: pip install transformers\n"
    assert capsys.readouterr().out == told
    monkeypatch.setattr(evaluation, "count_rows", lambda options: [])
    assert list(evaluation.rows(Options(quick=True))) == []
    assert "pip install faster-coco-eval" in capsys.readouterr().out


def test_peers_of_the_counts_count_the_same():
    truth, found = evaluation.label_maps()
    classes = evaluation.SEGMENTS
    void = np.where(truth < 0, classes, truth)
    theirs = evaluation.bincount_confusion(void, found, classes)[:classes, :classes]
    assert (confusion(truth, found, classes) == theirs.T).all() and theirs.any()
    labels, crowd = np.arange(classes), np.zeros(classes, bool)
    counts = match_segments(truth, labels, crowd, found, labels, classes)
    matched = evaluation.unique_pairs(truth, found, labels)
    assert matched == counts[0].sum() > 0


def test_box_ap_of_the_peer_is_ours():
    truth, found = evaluation.draw(5)
    ours = evaluation.concord_ap(5, truth, found)()
    theirs = evaluation.coco_ap("pycocotools", 5, truth, found)()
    assert abs(ours - theirs) < 1e-6 and ours > 0.001


def test_photographs_have_the_size_of_photographs():
    from torchvision.io import encode_jpeg

    torch.manual_seed(0)
    assert photo().shape == (3, HEIGHT, WIDTH)
    assert 140e3 < len(encode_jpeg(photo(), QUALITY)) < 180e3


def test_the_threshold_passes_the_best_scores():
    scores = torch.tensor([[0.1, 0.5], [0.4, 0.2]])
    assert (scores >= lowest_of_best(scores, 3)).sum() == 3
    assert lowest_of_best(scores, 9) == pytest.approx(0.1)


def test_only_the_smallest_size_is_compiled():
    options = Options(modes=("eager", "compiled"))
    assert options.modes_of(320) == ("eager", "compiled") and options.modes_of(640) == ("eager",)
    assert Options(device="cuda").sides == (512, 1024) and Options(device="cuda").on_gpu


def test_settings_of_both_sides():
    assert Setting(mode="bf16").amp == "on" and Setting(mode="compiled").amp == "off"
    with Setting(mode="bf16").autocast():
        assert torch.is_autocast_enabled("cpu")
    with Setting().autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_all_sections_have_a_module_and_a_heading():
    modules = {path.stem for path in (REPO / "benchmarks/sections").glob("[a-z]*.py")}
    assert modules == set(SECTIONS) == set(report.HEADINGS) and set(ON_GPU) < modules


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *flags])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    main()


def test_a_section_end_to_end(monkeypatch, tmp_path, capsys):
    kept = record_by_hand()["sections"]["startup"]
    file = tmp_path / paired.record_path("results", paired.cpu_name()).name
    file.write_text(json.dumps({"sections": {"startup": kept}}))
    run_main(monkeypatch, "evaluation", "--quick", "--output", str(tmp_path))
    record = json.loads(file.read_text())
    assert record["sections"]["startup"] == kept
    rows = [Row.of(row) for row in record["sections"]["evaluation"]["rows"]]
    assert {"pycocotools", "as detectron2", "as panopticapi"} <= {row.peer for row in rows}
    assert all(len(row.values[row.ours]) == 2 and not row.note for row in rows)
    page = (tmp_path / "speed.md").read_text()
    assert "### Start-up" in page and report.table(rows) in page
    assert (tmp_path / "speed.png").exists()
    assert "about" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, told",
    [
        (["trainin"], "there is no section trainin; take training, inference"),
        (["--rounds", "0"], "--rounds and --threads are at least 1"),
        (["--modes", "fp8"], "invalid choice: 'fp8'"),
    ],
)
def test_wrong_flags_are_told(monkeypatch, capsys, flags, told):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, *flags)
    assert told in capsys.readouterr().err
