"""The command line: every method from end to end, resuming, several ranks, and bad input.

For bad input there is one clear line.
"""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import FAST, METHODS, REAL, REPO, small_runs
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hubconf
from common.datasets.known import KNOWN
from common.demo import commands
from common.demo import main as demo_main
from common.errors import InputError

# -- every method, from end to end -----------------------------------------------------------------


def unseen_dataset(method: str) -> str:
    """A generated dataset of the method's kind, boxes or maps, that its DEMO does not name."""
    (first, *_) = re.findall(r"--datasets ([\w-]+)", importlib.import_module(method).DEMO[0])
    if KNOWN[first].supervision not in ("semantic", "panoptic"):
        return "lineart"
    return "ade20k" if first.startswith("cityscapes") else "cityscapes"


@dataclasses.dataclass
class Trained:
    """A finished training of a method, by its demonstration."""

    method: str
    folder: Path
    module: ModuleType
    output: str


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tiny_root, tmp_path_factory, run) -> Trained:
    method = request.param
    folder = tmp_path_factory.mktemp(method) / "a run"
    for flags in small_runs(method, folder, tiny_root):
        done = run(*flags, method=method)
        assert done.returncode == 0, done.stderr
    return Trained(method, folder, importlib.import_module(method), done.stdout)


def words(finished: Trained) -> tuple[str, list[str]]:
    """A --vocabulary and its classes: any names, or without text a dataset of the training."""
    _, label_space = finished.module.load(finished.folder)
    if label_space.text is not None:
        return "cat, traffic light", ["cat", "traffic light"]
    dataset = label_space.datasets[0]
    return dataset, list(label_space.part(dataset).names)


def test_every_method_trains_and_evaluates(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"args.json", "metrics.jsonl", "weights.safetensors", "first_batch.jpg"} <= names
    assert not [name for name in names if name.startswith(".")]
    saved = json.loads((finished.folder / "args.json").read_text())
    assert saved["method"] == finished.method and saved["steps"] == 2
    results = json.loads((finished.folder / "results.json").read_text())
    assert results and all(metrics for metrics in results.values())
    assert next(iter(results)) in finished.output
    per_class = json.loads((finished.folder / "per_class.json").read_text())
    check_classes(results, per_class)
    text = (finished.folder / "per_class.txt").read_text()
    assert all(f"{title}: {len(rows)} classes by " in text for title, rows in per_class.items())
    assert [name for name in names if name.startswith("predictions-") and name.endswith(".jpg")]
    log = [
        json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert log[-1]["step"] >= 2 and math.isfinite(log[-1]["loss"])


def check_classes(results: dict, per_class: dict) -> None:
    """Each title has a row per class, but the proposals. The first metric is the mean of rows."""
    assert list(per_class) == [title for title in results if "(proposals)" not in title]
    for title, rows in per_class.items():
        name, value = next(iter(results[title].items()))
        column = {"mIoU": "IoU"}.get(name, name)
        known = [row[column] for row in rows if row[column] is not None]
        assert math.fsum(known) / len(known) == pytest.approx(value, abs=1e-9)


def test_every_method_resumes(finished, tmp_path, call, caplog):
    """Without its last checkpoint and its weights, the run ends with the same weights again."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder)
    (folder / "weights.safetensors").unlink()
    (*_, last) = sorted(folder.glob("checkpoint-*"))
    shutil.rmtree(last)
    with caplog.at_level("INFO", "concord"):
        call("--resume", folder, method=finished.method)
    assert "resumed from" in caplog.text
    ours = load_file(folder / "weights.safetensors")
    theirs = load_file(finished.folder / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    results = [json.loads((f / "results.json").read_text()) for f in (folder, finished.folder)]
    assert results[0] == results[1]


def test_every_method_predicts_with_a_vocabulary(finished, tmp_path, call):
    Image.new("RGB", (90, 60), "green").save(tmp_path / "green.png")
    flags = ["--weights", finished.folder, "--output", tmp_path / "o"]
    vocabulary, classes = words(finished)
    flags += ["--vocabulary", vocabulary]
    call("--predict", tmp_path / "green.png", *flags, method=finished.method)
    assert Image.open(tmp_path / "o" / "green-0.jpg").size[0] >= 90
    names = []
    for file in ("predictions.json", "panoptic.json"):
        if (tmp_path / "o" / file).exists():
            record = json.loads((tmp_path / "o" / file).read_text())
            names.append([category["name"] for category in record["categories"]])
            assert [(image["width"], image["height"]) for image in record["images"]] == [(90, 60)]
    if (tmp_path / "o" / "semantic").exists():
        names.append((tmp_path / "o" / "semantic" / "classes.txt").read_text().splitlines())
        assert Image.open(tmp_path / "o" / "semantic" / "green-0.png").size == (90, 60)
    assert names and all(found == classes for found in names)


def test_every_method_loads_and_predicts_in_python(finished, tmp_path):
    Image.new("RGB", (90, 60), "green").save(tmp_path / "green.png")
    model, label_space = finished.module.load(finished.folder)
    assert not model.training and len(label_space.names) == len(label_space)
    vocabulary, names = words(finished)
    classes = label_space.swap(vocabulary)
    images = [
        tmp_path / "green.png",
        Image.new("RGB", (40, 70), "red"),
        torch.zeros(3, 50, 30, dtype=torch.uint8),
    ]
    predictions = finished.module.predict_images(model, images, classes)
    sizes = [(60, 90), (70, 40), (50, 30)]
    for prediction, size in zip(predictions, sizes, strict=True):
        maps = [prediction[kind] for kind in ("semantic", "panoptic") if kind in prediction]
        assert maps or "boxes" in prediction
        assert all(tuple(pixels.shape) == size for pixels in maps)
        if "boxes" in prediction:
            assert prediction["size"] == size
            numbers = [len(prediction[key]) for key in ("boxes", "scores", "labels", "class_names")]
            assert len(set(numbers)) == 1
            assert set(prediction["class_names"]) <= set(names)
        for pixels in (prediction[kind] for kind in ("semantic",) if kind in prediction):
            assert pixels.max() < len(classes)


def test_every_method_evaluates_a_dataset_it_never_saw(finished, tiny_root, tmp_path, call):
    """With the first of the training, whose results are those of its end.

    Refused by models that know their classes neither by text nor by name ("all").
    """
    unseen = unseen_dataset(finished.method)
    trained = json.loads((finished.folder / "args.json").read_text())["datasets"]
    assert unseen not in trained
    before = json.loads((finished.folder / "results.json").read_text())
    first = trained.split(",")[0]
    flags = ["--eval-only", "--weights", finished.folder, "--data-root", tiny_root]
    flags += ["--eval-datasets", f"{first},{unseen}", "--workers", 0, "--output", tmp_path / "o"]
    flags += ["--device", "cpu"]
    label_space = finished.module.load(finished.folder)[1]
    if label_space.text is None and "all" not in label_space.datasets:
        with pytest.raises(InputError, match=f"no dataset '{unseen}'"):
            call(*flags, method=finished.method)
        return
    call(*flags, method=finished.method)
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert results[first] == before[first]
    main, *others = results[unseen].values()
    assert math.isfinite(main)
    assert all(math.isfinite(value) for value in others if value is not None)  # of small objects
    assert (tmp_path / "o" / f"predictions-{unseen}.jpg").exists()


def test_every_method_is_an_entry_of_torch_hub(finished):
    """torch.hub.load(REPO, METHOD, weights) is `load` of the method's file."""
    loaded = torch.hub.load(str(REPO), finished.method, str(finished.folder), source="local")
    model, label_space = loaded
    own, own_space = finished.module.load(finished.folder)
    assert type(model).__name__ == "Model" and not model.training
    theirs = own.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in model.state_dict().items())
    assert label_space.names == own_space.names and label_space.datasets == own_space.datasets


def test_torch_hub_has_one_entry_per_method():
    """torch.hub takes each callable without a leading underscore for an entry."""
    entries = {name: value for name, value in vars(hubconf).items() if callable(value)}
    entries = {name: value for name, value in entries.items() if not name.startswith("_")}
    assert sorted(entries) == METHODS
    for method, entry in entries.items():
        assert entry.__name__ == method and f"{method}.py" in entry.__doc__


# -- demonstrations --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_demo_adds_flags_to_every_run(method, monkeypatch):
    module = importlib.import_module(method)
    runs = commands(method, ["--steps", "3", "--output", "a folder", "--seed=5"])
    assert len(runs) == len(module.DEMO)
    for run, demo in zip(runs, module.DEMO):
        own = [part.format(output="a folder") for part in shlex.split(demo)]
        assert run[: len(own)] == own and run[-3:] == ["--steps", "3", "--seed=5"]
        assert run.count("--output") == 1
    assert runs[-1][runs[-1].index("--output") + 1] == "a folder"
    assert commands(method, ["--output=b"])[-1] == commands(method, ["--output", "b"])[-1]
    # without --output, all runs of a demonstration share a new folder below runs/
    (*_, last) = commands(method, [])
    folder = last[last.index("--output") + 1]
    assert re.fullmatch(rf"runs/{method}-\d{{8}}-\d{{6}}-{os.getpid()}", folder)
    for run in commands(method, []):
        assert run[run.index("--output") + 1].startswith(f"runs/{method}-") and "{" not in str(run)


def test_demo_fills_in_the_run_folder_wherever_it_is_named(monkeypatch):
    """Of several runs, a later one may start from the weights of an earlier one."""
    demo = ["--datasets a --output {output}-first", "--datasets b --weights {output}-first"]
    monkeypatch.setattr("common.demo.read_names", lambda file, name: {name: demo})
    assert commands("scaledet", ["--output", "my run", "--lam", "2"]) == [
        ["--datasets", "a", "--output", "my run-first", "--lam", "2"],
        ["--datasets", "b", "--weights", "my run-first", "--output", "my run", "--lam", "2"],
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--datasets", "coco", "--steps", "3"],
        ["--datasets=my=ann.json:images/"],
        ["--predict", "a.jpg", "--weights", "runs/a", "--output", "o"],
        ["--eval-only", "--weights", "runs/a"],
        ["--resume=runs/a"],
        ["--help"],
        ["-h"],
    ],
)
def test_demo_leaves_runs_on_own_data_alone(flags):
    for method in METHODS:
        assert commands(method, list(flags)) == [flags]


def test_demo_stops_at_the_first_run_that_fails(monkeypatch, capsys):
    """It prints each command before it runs it, and ends with the exit code of the failed one."""
    started = []

    def start(command):
        started.append(command)
        printed = capsys.readouterr().out.splitlines()
        assert [shlex.split(line)[1:] for line in printed] == [command[1:]]
        return subprocess.CompletedProcess(command, 7 * ("b" in command))

    monkeypatch.setattr(subprocess, "run", start)
    demo = ["--datasets a", "--datasets b", "--datasets c"]
    monkeypatch.setattr("common.demo.read_names", lambda file, name: {name: demo})
    monkeypatch.setattr(sys, "argv", ["demo.py", "scaledet", "--output", "my run"])
    with pytest.raises(SystemExit) as exit:
        demo_main()
    assert exit.value.code == 7
    python = [sys.executable, "scaledet.py", "--datasets"]
    assert started == [[*python, name, "--output", "my run"] for name in "ab"]


# -- one method in detail --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory, run):
    """Run folder of a finished training on two datasets."""
    folder = tmp_path_factory.mktemp("run") / "first run"  # a path with a space
    command = [
        "--datasets",
        "coco,o365",
        "--eval-datasets",
        "coco,o365,lineart",
        "--data-root",
        tiny_root,
    ]
    done = run(*command, "--output", folder, *FAST)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_run_folder_has_everything(trained):
    folder, output = trained
    expected = {"args.json", "metrics.jsonl", "results.json", "weights.safetensors"}
    expected |= {"label_space.md", "label_space.png", "first_batch.jpg"}
    names = {path.name for path in folder.iterdir()}
    assert expected <= names
    assert {f"predictions-{name}.jpg" for name in ("coco", "o365", "lineart")} <= names
    assert not [name for name in names if name.startswith(".")]
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["coco", "o365", "lineart", "lineart (shuffled text)"]
    assert all({"AP", "AP50", "AP75"} <= metrics.keys() for metrics in results.values())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 6
    assert {
        "loss",
        "loss_hard_stage0",
        "loss_soft_stage2",
        "loss_centernet_pos",
        "img_per_s",
    } <= steps[-1].keys()
    assert "dataset" in output and "lineart (shuffled text)" in output


def test_predict_writes_picture_and_coco_json(trained, tmp_path, run):
    image = tmp_path / "grün und blau.png"
    Image.new("RGB", (90, 60), "green").save(image)
    weights = ["--weights", trained[0], "--output", tmp_path / "o"]
    done = run("--predict", image, "--vocabulary", "cat, traffic light", *weights)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "o" / "grün und blau-0.jpg").size[0] >= 90
    record = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert [c["name"] for c in record["categories"]] == ["cat", "traffic light"]
    assert record["images"] == [{"id": 0, "file_name": str(image), "height": 60, "width": 90}]
    assert all(
        {"bbox", "score", "category_id", "image_id", "area"} <= a.keys()
        for a in record["annotations"]
    )


def test_two_ranks_evaluate_each_image_once(trained, tiny_root, tmp_path, run):
    results = {}
    for ranks in (1, 2):
        arguments = [
            "--eval-only",
            "--weights",
            trained[0],
            "--eval-datasets",
            "coco,oid",
            "--data-root",
            tiny_root,
        ]
        done = run(*arguments, "--workers", 0, "--output", tmp_path / str(ranks), ranks=ranks)
        assert done.returncode == 0, done.stderr
        results[ranks] = json.loads((tmp_path / str(ranks) / "results.json").read_text())
    assert results[1] == results[2]
    assert list(results[1]["oid"]) == ["AP50"]


def test_two_ranks_train_into_one_folder(tiny_root, tmp_path, run):
    arguments = [
        "--datasets",
        "coco,o365",
        "--eval-datasets",
        "coco",
        "--data-root",
        tiny_root,
        *FAST,
    ]
    done = run(*arguments, "--steps", 2, "--output", tmp_path / "run", ranks=2)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["run"]
    assert json.loads((tmp_path / "run" / "args.json").read_text())["environment"]["ranks"] == 2
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples at {REAL}")
def test_two_real_label_spaces_each_by_its_own_metric(tmp_path, run):
    arguments = [
        "--datasets",
        "coco:val,openimages",
        "--data-root",
        REAL,
        "--output",
        tmp_path / "run",
        *FAST,
    ]
    done = run(*arguments, "--steps", 2)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: list(metrics) for name, metrics in results.items()} == {
        "coco": ["AP", "AP50", "AP75", "APs", "APm", "APl"],
        "oid": ["AP50"],
    }


# -- bad input -------------------------------------------------------------------------------------


@pytest.fixture
def own(tiny_root, tmp_path):
    """own(change, cut=0): the argument of --datasets for a broken copy of tiny coco's val split.

    change: of the annotations; cut: characters that their file lacks at its end
    """

    def make(change=lambda record: None, cut: int = 0) -> str:
        record = json.loads((tiny_root / "coco/annotations/instances_val2017.json").read_text())
        change(record)
        text = json.dumps(record)
        (tmp_path / "ann.json").write_text(text[: len(text) - cut])
        shutil.copytree(tiny_root / "coco/val2017", tmp_path / "images", dirs_exist_ok=True)
        return f"my={tmp_path / 'ann.json'}:{tmp_path / 'images'}"

    return make


def first(record, list_name, **values):
    record[list_name][0].update(values)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: first(r, "annotations", category_id=999), ["category_id 999"]),
        (lambda r: first(r, "annotations", image_id=-5), ["image_id -5"]),
        (
            lambda r: first(r, "annotations", bbox=[1, 2, -3, 4]),
            ["negative size", "mend or remove"],
        ),
        (lambda r: first(r, "annotations", bbox=[1, None, 3, 4]), ["four numbers"]),
        (lambda r: first(r, "annotations", bbox=[1, 2, 3]), ["four numbers"]),
        (lambda r: first(r, "images", file_name="gone.jpg"), ["gone.jpg is missing", "1 of 4"]),
        (lambda r: first(r, "images", file_name="../../etc/passwd"), ["leaves the image folder"]),
        (
            lambda r: first(r, "images", file_name="images/v2/../passwd"),
            ["leaves the image folder"],
        ),
        (lambda r: first(r, "categories", name=" "), ["empty class name"]),
        (lambda r: r.update(categories=[]), ["vocabulary", "empty"]),
        (lambda r: r.pop("images"), ["'images' is missing"]),
        (lambda r: r["images"].append(r["images"][0]), ["two images share an id"]),
        (lambda r: r.update(images=[], annotations=[]), ["no images"]),
    ],
)
def test_broken_annotations(fails, own, change, words):
    line = fails("--datasets", own(change), *FAST)
    assert "ann.json" in line or "gone.jpg" in line or "vocabulary of 'my'" in line
    assert all(word in line for word in words), line


def test_truncated_json(fails, own):
    assert "not valid json" in fails("--datasets", own(cut=100), *FAST)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image(fails, own, tmp_path, workers):
    dataset = own()
    for image in (tmp_path / "images").iterdir():
        image.write_text("this is no image")
    line = fails("--datasets", dataset, "--output", tmp_path / "run", *FAST, "--workers", workers)
    assert "cannot be decoded" in line and str(tmp_path / "images") in line


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--datasets cocoa", ["unknown dataset 'cocoa'", "coco"]),
        ("--datasets coco --data-root /nowhere/at/all", ["/nowhere/at/all", "--data-root"]),
        ("--datasets coco,coco --data-root .", ["named twice"]),
        ("--datasets coco:test --data-root .", ["no split 'test'"]),
        ("--datasets my=ann.json", ["ANNOTATIONS.json:IMAGE"]),
        ("--datasets my=/nowhere.json:/tmp", ["/nowhere.json"]),
        ("--datasets lvis --data-root .", ["lvis_v1_train.json", "lvisdataset.org"]),
        ("--data-sets coco", ["--data-sets", "--datasets"]),
        ("", ["no dataset named"]),
        ("--eval-only --eval-datasets coco", ["weights"]),
        ("--predict a.jpg --weights /nowhere", ["/nowhere"]),
        ("--device cuda:77 --datasets coco", ["--device"]),
        ("--resume /nowhere", ["/nowhere"]),
        ("--lr nan", ["--lr nan", "finite"]),
        ("--seed -1", ["--seed -1", "between"]),
        ("--channels -8", ["--channels -8", "between 1 and 8192"]),
        ("--jitter 2 0.1", ["--jitter 2.0 0.1"]),
        ("--device banana", ["--device banana"]),
    ],
)
def test_bad_flags(fails, arguments, words):
    line = fails(*arguments.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--backbone", "resnet5000"], ["resnet5000", "not a timm model"]),
        (["--text-encoder", "nonsense"], ["--text-encoder nonsense"]),
        (["--batch-size", 0], ["--batch-size"]),
        (["--tau", 0], ["--tau"]),
    ],
)
def test_bad_model_flags(fails, own, tmp_path, flags, words):
    line = fails("--datasets", own(), *FAST, "--output", tmp_path / "run", *flags)
    assert all(word in line for word in words), line


def test_bad_weights(fails, own, trained, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights at all")
    assert "cannot be read" in fails("--predict", "a.jpg", "--weights", broken)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "other.safetensors" in fails(
        "--predict", "a.jpg", "--weights", tmp_path / "other.safetensors"
    )
    with safe_open(trained[0] / "weights.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(trained[0] / "weights.safetensors")
    del tensors["label_space.o365"]
    save_file(tensors, tmp_path / "textless.safetensors", metadata)
    line = fails("--predict", "a.jpg", "--weights", tmp_path / "textless.safetensors")
    assert "damaged class names or text" in line and "label_space.o365" in line
    common = ["--datasets", own(), "--weights", trained[0], "--output", tmp_path / "run", *FAST]
    assert "has the shape" in fails(*common, "--fc-dim", 48)
    classes = len(json.loads((tmp_path / "ann.json").read_text())["categories"])
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(classes, 24)))
    line = fails(*common, "--text-encoder", f"my={tmp_path / 'text.npy'}")
    assert ".embedding." in line and "--text-encoder" in line
    assert "[384" in line and "[24" in line
    assert "missing" in fails(*common, "--cls-bias", 0) or "unknown" in fails(
        *common, "--cls-bias", 0
    )


def test_bad_vocabulary_and_image(fails, trained, tmp_path):
    image = tmp_path / "text.jpg"
    image.write_text("not an image")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    weights = ["--weights", trained[0], "--output", tmp_path / "run"]
    assert "cannot be decoded" in fails("--predict", image, "--vocabulary", "cat", *weights)
    assert "empty" in fails("--predict", tmp_path / "one.png", "--vocabulary", " , ", *weights)
    assert "twice" in fails("--predict", tmp_path / "one.png", "--vocabulary", "cat,cat", *weights)
    (tmp_path / "empty.txt").write_text("\n")
    assert "empty" in fails(
        "--predict", tmp_path / "one.png", "--vocabulary", tmp_path / "empty.txt", *weights
    )


def test_one_pixel_image(trained, tmp_path, run):
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    weights = ["--weights", trained[0], "--output", tmp_path / "o"]
    done = run("--predict", tmp_path / "one.png", "--vocabulary", "cat", *weights)
    assert done.returncode == 0, done.stderr


def test_unwritable_run_folder(fails, own, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    assert "cannot be written" in fails(
        "--datasets", own(), "--output", tmp_path / "file" / "run", *FAST
    )


def test_failed_commands_leave_the_run_as_it_was(fails, trained, tmp_path, run):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    saved = (folder / "args.json").read_text()
    fails("--resume", folder, "--fc-dim", 48)
    assert (folder / "args.json").read_text() == saved
    done = run("--resume", folder)  # finished: evaluates again, trains nothing
    assert done.returncode == 0 and (folder / "args.json").read_text() == saved
    assert (
        load_file(folder / "weights.safetensors").keys()
        == load_file(trained[0] / "weights.safetensors").keys()
    )
    state = next(folder.glob("checkpoint-*")) / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    line = fails("--resume", folder)
    assert "no checkpoint of" in line and "state.pt is not as it was written" in line


def test_extreme_aspect_ratio_is_drawn_within_reason(trained, tmp_path, run):
    Image.new("RGB", (1, 5000)).save(tmp_path / "tall.png")
    weights = ["--weights", trained[0], "--output", tmp_path / "o"]
    done = run("--predict", tmp_path / "tall.png", "--vocabulary", "cat", *weights)
    assert done.returncode == 0, done.stderr
    assert max(Image.open(tmp_path / "o" / "tall-0.jpg").size) <= 5000


def test_full_disk_is_one_line(fails, own, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "weights"))

    monkeypatch.setattr("common.runlog.save_weights", full)
    assert "No space left" in fails(
        "--datasets", own(), "--output", tmp_path / "run", *FAST, "--steps", 1
    )
