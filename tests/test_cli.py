"""The command line: what a run leaves behind, resuming, several ranks, and one clear line for every bad input."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import FAST, REAL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


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
    expected = "args.json metrics.jsonl results.json weights.safetensors label_space.md label_space.png first_batch.jpg"
    names = {path.name for path in folder.iterdir()}
    assert set(expected.split()) <= names
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


def test_resume_after_kill_ends_with_the_same_weights(
    trained, tiny_root, tmp_path, run, run_and_kill
):
    """SIGKILL after the first checkpoint, --resume: every bit of the weights is that of the uninterrupted run."""
    folder = tmp_path / "killed"
    command = [
        "--datasets",
        "coco,o365",
        "--eval-datasets",
        "coco",
        "--data-root",
        tiny_root,
        *FAST,
    ]
    run_and_kill(folder, *command, "--checkpoint-every", 2)
    done = run("--resume", folder)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    ours, theirs = (
        load_file(folder / "weights.safetensors"),
        load_file(trained[0] / "weights.safetensors"),
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def own(tiny_root, tmp_path):
    """own(change, image=...) -> --datasets argument of a broken copy of the tiny coco validation set."""

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
        (lambda r: first(r, "images", file_name="gone.jpg"), ["gone.jpg is missing", "1 of 12"]),
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
        ("--resume /nowhere", ["--resume", "/nowhere"]),
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
    tensors = {
        key: t for key, t in load_file(trained[0] / "weights.safetensors").items() if key != "text"
    }
    save_file(tensors, tmp_path / "textless.safetensors", metadata)
    assert "no text embeddings" in fails(
        "--predict", "a.jpg", "--weights", tmp_path / "textless.safetensors"
    )
    common = ["--datasets", own(), "--weights", trained[0], "--output", tmp_path / "run", *FAST]
    assert "has the shape" in fails(*common, "--fc-dim", 48)
    classes = len(json.loads((tmp_path / "ann.json").read_text())["categories"])
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(classes, 24)))
    line = fails(*common, "--text-encoder", f"my={tmp_path / 'text.npy'}")
    assert "text embeddings of 384 dimensions, these have 24" in line and "--text-encoder" in line
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
    assert "state.pt cannot be read" in fails("--resume", folder)


def test_extreme_aspect_ratio_is_drawn_within_reason(trained, tmp_path, run):
    Image.new("RGB", (1, 5000)).save(tmp_path / "tall.png")
    weights = ["--weights", trained[0], "--output", tmp_path / "o"]
    done = run("--predict", tmp_path / "tall.png", "--vocabulary", "cat", *weights)
    assert done.returncode == 0, done.stderr
    assert max(Image.open(tmp_path / "o" / "tall-0.jpg").size) <= 5000


def test_full_disk_is_one_line(fails, own, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "weights"))

    monkeypatch.setattr("scaledet.save_weights", full)
    assert "No space left" in fails(
        "--datasets", own(), "--output", tmp_path / "run", *FAST, "--steps", 1
    )
