"""What the README promises first: the lines of Python that open it work as they stand."""

import re
from dataclasses import asdict

import torch
from conftest import REPO
from PIL import Image

import scaledet
from common.checkpoint import save_weights
from common.labels import Vocabulary

ARGS = scaledet.Args(
    backbone="tf_efficientnet_lite0",
    text_encoder="minilm",
    test_size=96,
    channels=64,
    fc_dim=32,
    device="cpu",
)


def test_the_first_lines_of_python_work(tmp_path, monkeypatch, capsys):
    vocabulary = Vocabulary("coco", ("person", "dog"))
    label_space = scaledet.build_label_space(ARGS, [vocabulary])
    model = scaledet.Model(ARGS, label_space, pretrained=False)
    metadata = {"method": "scaledet", "args": asdict(ARGS)}
    save_weights(tmp_path / "runs/scaledet/weights.safetensors", model, label_space, metadata)
    Image.new("RGB", (120, 90), "white").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)

    (code, *_) = re.findall(r"```python\n(.+?)```", (REPO / "README.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 6
    names = {}
    exec(code, names)
    detections = names["detections"]
    assert set(detections["class_names"]) <= {"cat", "traffic cone"}
    assert detections["boxes"].shape == (len(detections["scores"]), 4)
    assert detections["labels"].dtype == torch.int64 and detections["size"] == (90, 120)
    assert "tensor" in capsys.readouterr().out
