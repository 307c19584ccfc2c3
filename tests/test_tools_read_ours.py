"""The code of docs/other-tools.md runs as it stands, where the tool is installed."""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import REPO
from PIL import Image
from test_readme import ARGS

import scaledet
from common.checkpoint import save_weights
from common.labels import Vocabulary

PAGE = (REPO / "docs/other-tools.md").read_text()


def blocks(tool: str) -> list[str]:
    """Returns the code below the heading of a tool."""
    part = PAGE.split(f"\n## {tool}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.+?)```", part, re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with photo.jpg, weights and what --predict made of them in runs/predicted."""
    folder = tmp_path_factory.mktemp("work")
    label_space = scaledet.build_label_space(ARGS, [Vocabulary("coco", ("person", "dog"))])
    model = scaledet.Model(ARGS, label_space, pretrained=False)
    metadata = {"method": "scaledet", "args": asdict(ARGS)}
    save_weights(folder / "weights.safetensors", model, label_space, metadata)
    Image.new("RGB", (120, 90), "white").save(folder / "photo.jpg")
    flags = ["--predict", "photo.jpg", "--weights", "weights.safetensors", "--device", "cpu"]
    command = [sys.executable, REPO / "scaledet.py", *flags, "--output", "runs/predicted"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.filterwarnings("ignore:OpenCV")
def test_supervision(folder, monkeypatch):
    pytest.importorskip("supervision")
    monkeypatch.chdir(folder)
    model, label_space = scaledet.load("weights.safetensors")
    known = {"scaledet": scaledet, "model": model, "classes": label_space.swap("dog, cat")}
    first, second = blocks("supervision")
    exec(first, known)
    detections, found = known["detections"], known["found"]
    assert len(detections) == len(found["scores"]) > 0
    assert np.array_equal(detections.xyxy, found["boxes"].numpy())
    assert np.array_equal(detections.confidence, found["scores"].numpy())
    assert list(detections["class_name"]) == found["class_names"]

    exec(second, known)
    ((_, image, read),) = known["dataset"]
    predicted = json.loads((folder / "runs/predicted/predictions.json").read_text())
    boxes = np.array([entry["bbox"] for entry in predicted["annotations"]])
    boxes[:, 2:] += boxes[:, :2]
    assert np.allclose(read.xyxy, boxes, atol=1e-3)
    assert image.shape == (90, 120, 3)
    assert known["dataset"].classes == ["person", "dog"]


def test_fiftyone(folder, monkeypatch):
    fiftyone = pytest.importorskip("fiftyone")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fiftyone, "launch_app", lambda dataset: None)
    (code,) = blocks("FiftyOne")
    known = {}
    try:
        exec(code, known)
    except fiftyone.core.config.FiftyOneConfigError as error:  # it keeps its data in MongoDB
        pytest.skip(str(error))
    (sample,) = known["dataset"]
    predicted = json.loads((folder / "runs/predicted/predictions.json").read_text())
    scores = [entry["score"] for entry in predicted["annotations"]]
    assert [box.confidence for box in sample.detections.detections] == pytest.approx(scores)
    assert {box.label for box in sample.detections.detections} <= {"person", "dog"}
