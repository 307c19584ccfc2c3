"""The claims: every variant trains two steps, and what is made of its numbers."""

import argparse
import importlib
import json
import math
import shlex
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import REPO, small_flags

import dataseg
import domain_attention
import unidetector
from benchmarks.claims import (
    dataseg_backgrounds,
    domain_attention_fixed,
    halves,
    runs,
    study,
    unidet_shuffled,
    unidetector_coupled,
)
from benchmarks.claims.__main__ import STUDIES, Sitting, missing, write_tables
from benchmarks.claims.across import ACROSS
from benchmarks.claims.runs import Records, Run, command_of, read_records, start
from benchmarks.claims.study import Effect, Study, ap50, module_of
from benchmarks.claims.summary import (
    EFFECTS,
    Difference,
    difference,
    effect_table,
    number,
    overview_row,
    values_of,
    variant_table,
)
from benchmarks.claims.text_merges import TABLE, similar_pairs
from common.command import parse_args
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.merges import write_groups
from common.optim import parameter_groups

SMALL = Study(
    "small",
    "Is b better?",
    {"a": ("plain", "scaledet.py --lam 0"), "b": ("ours", "scaledet.py --weights {a}")},
    {"AP50": ap50("coco"), "mean": ap50("coco", "o365")},
    (Effect("b", "a", "AP50", "ours is better"),),
)
# of the long tests alone
SLOW = {
    "scaledet",
    "detic",
    "unidetector",
    "plaindet",
    "dataseg",
    "finetuning",
    "halves",
    "detectors",
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(halves, "LIMIT", 24)


def record(variant: str, seed: int, value: float | None) -> dict:
    run = {"variant": variant, "seed": seed, "digest": SMALL.digest(variant), "revision": "abc"}
    run |= {"resumed": False, "jobs": 1, "img_per_s": 2.0, "peak_gb": 1.0, "seconds": 90}
    run |= {"cpu": "a CPU", "threads": "2"}
    return run | {"metrics": {"coco": {"AP50": value}, "o365": {"AP50": 0.5}}}


def records(a: list[float], b: list[float]) -> Records:
    found = {("a", seed): record("a", seed, value) for seed, value in enumerate(a)}
    return found | {("b", seed): record("b", seed, value) for seed, value in enumerate(b)}


def in_python(command: list[str]) -> list[str]:
    """Returns the module that a command runs, and its flags."""
    first = 2 if command[0] == "-m" else 1
    return [module_of(" ".join(command)), *command[first:]]


def sitting(tmp_path, name: str, **changes) -> Sitting:
    args = {"method": [name], "seeds": 1, "minutes": 60.0, "jobs": 1, "work": tmp_path / "work"}
    args |= {"output": tmp_path / "json"} | changes
    args["output"].mkdir(exist_ok=True)
    return Sitting(argparse.Namespace(**args))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in SLOW else []) for name in STUDIES]
)
def test_each_variant_trains_and_its_tables_are_written(
    name, tmp_path, tiny_root, run, monkeypatch
):
    def start(command, log):
        method, *flags = in_python(command)
        # settings of a model are those of its training
        small = [] if "--eval-only" in command else small_flags(method, 2)
        if method.endswith("_coupled"):
            small += ["--classifier-steps", "0"]  # it has one stage
        # the images are few, and no --tiny generates them
        given = [part.replace("@100", "@6") for part in flags if part != "--tiny"]
        done = run(*given, *small, "--data-root", tiny_root, method=method)
        assert done.returncode == 0, done.stderr
        return {"seconds": 1, "peak_gb": 1.0}

    monkeypatch.setattr(runs, "start", start)
    sitting(tmp_path, name).run_all()
    study = STUDIES[name]
    found = read_records(study, tmp_path / "json")
    assert str(tmp_path) not in (tmp_path / "json" / f"{name}.json").read_text()  # of this machine
    assert [variant for variant, _ in found] == list(study.variants)
    for record in found.values():  # a metric of few images may be None
        for metrics in record["metrics"].values():
            metrics.update({name: 0.5 for name, value in metrics.items() if value is None})
    for effect in study.effects:
        assert difference(study, found, effect)
    for column in study.columns:
        if study.columns[column][0][0] != "merges":  # of --tiny alone
            assert any(values_of(study, found, variant, column) for variant in study.variants)

    monkeypatch.setattr(runs, "start", None)  # nothing is repeated
    sitting(tmp_path, name).run_all()
    docs = tmp_path / "docs"
    shutil.copytree(REPO / "docs", docs)
    shutil.copy(REPO / "README.md", tmp_path)
    write_tables([study], tmp_path / "json", tmp_path)
    assert f"{len(found)} of {3 * len(found)} runs" in (docs / "claims.md").read_text()
    text = (docs / (study.page or "claims.md")).read_text()
    assert all(f"| {label} |" in text for label, _ in study.variants.values())
    assert (docs / "claims" / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_effects_name_variants_and_columns(study):
    for effect in study.effects:
        assert {effect.better, effect.worse} <= study.variants.keys()
        assert {effect.column, effect.worse_column or effect.column} <= study.columns.keys()
    for variant in study.variants:
        assert study.ancestors(variant) <= study.variants.keys() - {variant}
        assert len(study.parents(variant)) <= 1  # two could be of two chains, and run twice


def test_runs_wait_only_for_those_whose_folder_they_need(tmp_path):
    chains = sitting(tmp_path, "unidet", seeds=2).chains()
    assert [[run.variant for run in chain] for chain in chains] == [
        *(["partitioned", "learned", "unified", "shuffled"], ["names"], ["text"]) * 2
    ]
    assert [{run.seed for run in chain} for chain in chains] == [{0}] * 3 + [{1}] * 3


@pytest.mark.parametrize("study", ACROSS, ids=lambda study: study.name)
def test_all_methods_of_a_comparison_take_as_many_steps(study, tmp_path):
    for variant in study.variants:
        name, *flags = in_python(command_of(Run(study, variant, 0), tmp_path))
        module = importlib.import_module(name)
        settings = (module.Args, module.METHOD, module.TINY, module.MODEL_FIELDS)
        args = module.parse_args(*settings, argv=flags)
        steps = args.steps + getattr(args, "classifier_steps", 0)
        assert f"{steps} steps of {args.batch_size} images" in study.question


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_methods_have_the_flags_of_all_variants(study, tmp_path):
    for variant in study.variants:
        name, *flags = in_python(command_of(Run(study, variant, 0), tmp_path))
        module = importlib.import_module(name)
        tyro.cli(module.Args, args=flags)


def test_a_command_names_the_folder_of_its_seed(tmp_path):
    command = command_of(Run(SMALL, "b", 2), tmp_path)
    a, b = (tmp_path / f"small/{name}-2-{SMALL.digest(name)}" for name in "ab")
    assert command == f"scaledet.py --weights {a} --tiny --seed 2 --output {b}".split()


def test_the_table_of_similar_names_is_made_by_its_command(tmp_path):
    write_groups(tmp_path / "a.csv", ["coco", "oid"], *similar_pairs())
    assert (tmp_path / "a.csv").read_text() == TABLE.read_text()


def test_each_half_has_images_and_classes_of_its_own(tmp_path):
    flag, datasets = shlex.split(halves.make_halves(tmp_path)["halves"])
    assert flag == "--datasets"
    (source,) = tmp_path.glob("data/*/coco/annotations/instances_train2017.json")
    source = json.loads(source.read_text())
    parts = []
    for text in datasets.split(","):
        _, file = text.split("=")
        file, images = file.split(":")
        parts.append(json.loads(Path(file).read_text()))
        assert all((Path(images) / row["file_name"]).exists() for row in parts[-1]["images"])
    for key in ("images", "categories"):
        first, second = ([row["id"] for row in part[key]] for part in parts)
        assert sorted(first + second) == sorted(row["id"] for row in source[key])
        assert abs(len(first) - len(second)) <= 1
    for part in parts:
        images, classes = ({row["id"] for row in part[key]} for key in ("images", "categories"))
        shown = [row for row in source["annotations"] if row["image_id"] in images]
        kept = [row for row in shown if row["category_id"] in classes]
        assert part["annotations"] == kept and 0 < len(kept) < len(shown)


def test_a_changed_command_is_another_run():
    changed = replace(SMALL, variants=SMALL.variants | {"a": ("plain", "scaledet.py --lam 2")})
    assert all(changed.digest(name) != SMALL.digest(name) for name in "ab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.claims.study.tiny_settings", lambda module: "lr 1")
        other = SMALL.digest("a")
    assert other != SMALL.digest("a")
    relabelled = replace(SMALL, variants=SMALL.variants | {"a": ("other", "scaledet.py --lam 0")})
    assert all(relabelled.digest(name) == SMALL.digest(name) for name in "ab")


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
        ([0.1, 0.2, 0.3], "not clear"),  # more than two standard errors, but p is .07
        ([0.1, 0.2, 0.3, 0.2], "not clear"),  # a sitting that ends here must not decide
        ([0.1, 0.11, 0.12, -0.5], "shown"),
        ([0.1, 0.2, 0.3, 0.2, 0.2], "shown"),
    ],
)
def test_verdicts(values, verdict):
    assert Difference(values).verdict == verdict


def test_the_overview_sorts_the_claims_by_verdict():
    few = records([0.1, 0.2], [0.3, 0.4])
    assert overview_row(SMALL, few, "small") == ""
    shown = records([0.1, 0.2, 0.3], [0.41, 0.5, 0.6])
    assert overview_row(SMALL, shown, "small") == f"| small | {SMALL.effects[0].claim} |  |  |"


def test_p_is_that_of_the_paired_test():
    # t = .11 / (.01 / sqrt 3), two degrees of freedom
    assert Difference([0.1, 0.11, 0.12]).p == pytest.approx(0.00274, abs=1e-5)
    assert math.isnan(Difference([0.1]).p)


def test_tables():
    found = records([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert "| plain | .200 ± .100 | .350 ± .050 | 3 | 1.5 |" in variant_table(SMALL, found)
    *_, row = effect_table(SMALL, found, EFFECTS).splitlines()
    assert row.endswith("| +0.200 ± 0.058 (p 0.074) | 3 | not clear |")
    costs = replace(SMALL, costs=True)
    assert "| 3 | 1.5 | 2.0 | 1.0 |" in variant_table(costs, found)
    for run in found.values():  # its speed is not that of a whole run alone on the machine
        run["resumed"] = True
    assert "| 3 |  |  |  |" in variant_table(costs, found)
    assert [number(x) for x in (0.1234, 1.0, 10.2)] == [".123", "1.000", "10.200"]


def test_an_effect_may_be_of_two_columns():
    effect = Effect("a", "a", "AP50", "", "mean")
    assert difference(SMALL, records([0.1], []), effect).values == pytest.approx([0.1 - 0.3])


def test_effects_that_are_not_clear_get_more_seeds():
    unclear = records([0.1, 0.2, 0.3], [0.2, 0.1, 0.3])
    assert {run.key for run in missing(SMALL, 3, unclear)} == {
        (variant, seed) for variant in "ab" for seed in (3, 4)
    }
    assert not missing(SMALL, 3, records([0.1, 0.2, 0.3], [0.2, 0.31, 0.4]))
    assert [run.key for run in missing(SMALL, 2, records([0.1, 0.2], []))] == [("b", 0), ("b", 1)]


def test_runs_of_another_command_do_not_count(tmp_path, capsys):
    old = record("a", 0, 0.1) | {"digest": "0"}
    (tmp_path / "small.json").write_text(json.dumps([old, record("b", 0, 0.1)]))
    assert list(read_records(SMALL, tmp_path)) == [("b", 0)]
    assert "1 records are left out" in capsys.readouterr().out


@pytest.fixture
def executed(monkeypatch):
    """The runs in their order. No training takes place."""
    started = []

    def execute(run, work, revision, jobs):
        started.append(f"{run.variant}-{run.seed}")
        run.folder(work).mkdir(parents=True)
        (run.folder(work) / "results.json").write_text("{}")
        return record(run.variant, run.seed, {"a": 0.1, "b": 0.2}[run.variant] + run.seed / 100)

    monkeypatch.setattr("benchmarks.claims.__main__.execute", execute)
    monkeypatch.setitem(STUDIES, "small", SMALL)
    return started


def test_no_run_begins_when_the_time_is_over(tmp_path, executed):
    sitting(tmp_path, "small", minutes=0.0).run_all()
    assert not executed


def test_runs_that_have_ended_are_not_repeated(tmp_path, executed):
    sitting(tmp_path, "small", seeds=2).run_all()
    assert executed == ["a-0", "b-0", "a-1", "b-1"]
    sitting(tmp_path, "small", seeds=2).run_all()
    assert len(executed) == 4


def test_a_repeated_run_replaces_what_came_of_it(tmp_path, executed):
    """On another machine there are the records, but not the folders that the next run needs."""
    sitting(tmp_path, "small", seeds=2).run_all()
    shutil.rmtree(tmp_path / "work")
    rows = [record("a", 0, 0.9), record("b", 0, 0.9), record("a", 1, 0.9)]
    (tmp_path / "json" / "small.json").write_text(json.dumps(rows))
    executed.clear()
    sitting(tmp_path, "small", seeds=2).run_all()
    assert executed == ["a-1", "b-1"]  # the weights of a-0 and b-0 are needed by none
    found = read_records(SMALL, tmp_path / "json")
    values = {key: run["metrics"]["coco"]["AP50"] for key, run in found.items()}
    assert values["a", 0] == values["b", 0] == 0.9 and values["a", 1] == pytest.approx(0.11)

    shutil.rmtree(tmp_path / "work")
    three = replace(SMALL, variants=SMALL.variants | {"c": ("more", "scaledet.py --weights {a}")})
    assert [str(run) for run in missing(three, 1, found)] == ["small/c-0"]


def test_a_failed_run_names_its_log(tmp_path):
    with pytest.raises(InputError, match=r"python nothing.py: exit code 2, see .*x.log"):
        start(["nothing.py"], tmp_path / "x.log")


def test_a_failure_stops_the_others(tmp_path, monkeypatch):
    """One of two trainings at once fails; the other would take a minute."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    slow, failing = str(tmp_path / "slow.py"), "nothing.py"
    both = {"a": ("", failing), "b": ("", slow), "c": ("", slow)}
    monkeypatch.setitem(STUDIES, "small", replace(SMALL, variants=both, effects=()))
    monkeypatch.setattr(
        "benchmarks.claims.__main__.execute",
        lambda run, work, revision, jobs: start([run.study.command(run.variant)], tmp_path / "log"),
    )
    monkeypatch.setattr(runs, "_stopping", threading.Event())
    begin = time.monotonic()
    runner = sitting(tmp_path, "small", jobs=2)
    monkeypatch.setattr(runner, "chains", lambda: [[Run(STUDIES["small"], v, 0)] for v in "bac"])
    with pytest.raises(InputError, match=r"nothing.py: exit code 2"):
        runner.run_all()
    assert time.monotonic() - begin < 20
    assert not runs._children


# -- What no flag of a method does -----------------------------------------------------------------


def small_args(module, *flags: str):
    small = [*small_flags(module.METHOD, 1), *flags]
    return parse_args(module.Args, module.METHOD, module.TINY, module.MODEL_FIELDS, argv=small)


def test_a_coupled_step_trains_localizer_and_classifier(tmp_path, tiny_root, monkeypatch):
    """It trains each part of the network, on proposals as well as on the ground truth."""
    regions = []

    class Spy(unidetector_coupled.Coupled):
        def forward(self, *given):
            self.before = {name: p.clone() for name, p in self.named_parameters()}
            outputs, losses = super().forward(*given)
            regions.extend(map(len, outputs.boxes))
            assert {name.split("_")[1] for name in losses} == {"rpn", "roi"}
            return outputs, losses

    trained = []
    for name in ("Model", "train_stage", "TINY"):  # main changes them
        monkeypatch.setattr(unidetector, name, getattr(unidetector, name))
    monkeypatch.setattr(unidetector_coupled, "Coupled", Spy)
    monkeypatch.setattr(
        unidetector, "evaluate", lambda args, model, *_: trained.append(model) or {}
    )
    monkeypatch.setattr(unidetector, "report", lambda *_: None)
    flags = [*small_flags("unidetector", 1), "--classifier-steps", "0", "--datasets", "coco"]
    flags += ["--data-root", str(tiny_root), "--output", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["unidetector.py", *flags])
    unidetector_coupled.main()
    (model,) = trained
    after = dict(model.named_parameters())
    assert not any("classifiers" in name and "backbone" in name for name in after)
    for part in ("localizer.backbone", "localizer.rpn", "localizer.fc", "classifiers.0"):
        names = [name for name in after if name.startswith(part)]
        assert any(not torch.equal(after[name], model.before[name]) for name in names), part
    assert max(regions) > 12  # more than the boxes of an image

    # P3 to P5, whose strides the classifier pools with, and a gradient into them
    images = torch.rand(1, 3, 96, 96)
    every, own = model.localizer.backbone(images), model.classifiers[0].regions.backbone(images)
    assert (len(every), len(own)) == (5, 3)
    assert all(torch.equal(a, b) for a, b in zip(every[1:4], own))
    model.classifiers[0].requires_grad_(False)
    x, _ = model.classifiers[0](images.byte(), [(96, 96)], [torch.tensor([[0.0, 0.0, 60.0, 70.0]])])
    assert x.requires_grad


def test_the_coupled_training_has_one_stage():
    label_space = unidetector.build_label_space(
        small_args(unidetector), [Vocabulary("a", ("cat",))]
    )
    with pytest.raises(InputError, match="--classifier-steps 0"):
        unidetector_coupled.Coupled(small_args(unidetector), label_space)
    args = small_args(unidetector_coupled, "--classifier-steps", "0")
    clip = replace(args, classifier_backbone="RN50/openai")
    as_wide = LabelSpace([Vocabulary("a", ("cat",), text=torch.ones(1, 1024))])
    with pytest.raises(InputError, match="must be a timm model"):
        unidetector_coupled.Coupled(clip, as_wide, pretrained=False)


def test_each_dataset_has_its_background():
    args = small_args(dataseg_backgrounds)
    names = {"a": ("cat", "dog", "sky"), "b": ("cat", "sky")}
    vocabularies = [Vocabulary(*item) for item in names.items()]
    label_space = dataseg.build_label_space(args, vocabularies)
    torch.manual_seed(0)
    model = dataseg_backgrounds.Model(args, label_space, pretrained=False)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    shared = dataseg.Model(args, label_space, pretrained=False)
    assert torch.equal(drawn, torch.rand(1))
    assert shared.load_state_dict(model.state_dict(), strict=False).missing_keys == ["background"]
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, 0.05)
        for p in group["params"]
    }
    z = torch.randn(1, 1, 4, args.channels)
    a, b = (label_space.part(name).text for name in "ab")
    for text, row in ((a, 0), (b, 1), (a[1:], 0)):
        own, other = (getattr(model, f"background_{i}") for i in (row, 1 - row))
        shared.background.data = own.data
        model.zero_grad()
        logits = model.classify(z, text)
        assert torch.equal(logits, shared.classify(z, text))
        logits.sum().backward()
        assert own.grad is not None and other.grad is None
        assert decay[id(own)] == 0


def test_fixed_gates_are_the_same_for_all_images(monkeypatch):
    args = small_args(domain_attention_fixed, "--backbone", "resnet10t")
    label_space = domain_attention.build_label_space(args, [Vocabulary("a", ("cat",))])
    monkeypatch.setattr(domain_attention, "main", lambda: None)
    monkeypatch.setattr(domain_attention, "DomainAttention", None)
    domain_attention_fixed.main()
    model = domain_attention.Model(args, label_space, pretrained=False)
    gates = [m for m in model.modules() if isinstance(m, domain_attention_fixed.FixedGates)]
    assert gates
    x = torch.rand(2, len(gates[0].logits), 3, 3) + 0.1
    torch.testing.assert_close(gates[0](x), 0.9 * x)
    gates[0](x).sum().backward()
    assert gates[0].logits.grad.abs().min() > 0


def test_shuffled_merges_join_the_same_classes_in_other_pairs():
    groups = [{"coco": f"a{i}", "oid": f"b{i}"} for i in range(9)]
    first, second = (unidet_shuffled.shuffle(groups, seed) for seed in (0, 1))
    assert first != second
    for shuffled in (first, second):
        assert [group["coco"] for group in shuffled] == [group["coco"] for group in groups]
        assert sorted(group["oid"] for group in shuffled) == [group["oid"] for group in groups]
        assert not any(group in groups for group in shuffled)


def test_a_changed_file_of_the_claims_is_another_run(tmp_path, monkeypatch):
    folder = tmp_path / "benchmarks/claims"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("1")
    (folder / "b.py").write_text("2")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    command = "-m benchmarks.claims.b --label-space benchmarks/claims/a.csv"
    assert study.own_files(command) == ["2", "1"]
