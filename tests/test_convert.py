"""Official checkpoints: a rule maps or drops every tensor, and no code in them runs.

The converted model gives the same results.
"""

import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from parity import listings, without_data
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import detic
from common.checkpoint import load_weights, read_model, save_weights
from common.command import parse_args
from common.convert import convert_if_official, rename
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.official_detectors import CENTERNET2, convert_centernet2
from common.official_mask2former import convert_mask2former

CPU = torch.device("cpu")
SETTINGS = {"backbone": "resnet50", "channels": 64, "fc_dim": 16, "amp": "off"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def convert_detic(path):
    """Returns the converted file of official Detic weights."""
    return convert_if_official(path, "detic", convert_centernet2)


def official_name(key: str) -> str | None:
    """Written from the official key list: our key -> theirs, None for what they do not have."""
    kind, _, rest = key.partition(".")
    if kind == "backbone":
        kind, _, rest = rest.partition(".")
        if kind == "body":
            return f"backbone.bottom_up.base.{rest}"
        if rest.startswith("extra_blocks"):
            return f"backbone.top_block.{rest.removeprefix('extra_blocks.')}"
        part, level, _, leaf = rest.split(".") if kind == "fpn" else ("", "", "", "")
        names = {"inner_blocks": "lateral", "layer_blocks": "output"}
        return f"backbone.fpn_{names[part]}{int(level) + 3}.{leaf}" if part else None
    if kind == "cascade":
        _, stage, part, layer, leaf = rest.split(".")
        if part == "bbox_pred":
            return f"roi_heads.box_predictor.{stage}.bbox_pred.{layer}.{leaf}"
        return f"roi_heads.box_head.{stage}.{ {'1': 'fc1', '3': 'fc2'}[layer] }.{leaf}"
    if kind == "classifiers":
        stage, _, leaf = rest.partition(".")
        return f"roi_heads.box_predictor.{stage}.cls_score.{leaf.replace('embedding', 'linear')}"
    if kind == "prop_score":
        stage, _, leaf = rest.partition(".")
        return f"roi_heads.box_predictor.{stage}.prop_score.{leaf}"
    return {
        "centernet": f"proposal_generator.{rest}",
        "mask_head": f"roi_heads.mask_head.{rest}",
    }.get(kind)


def make(classes: int = 7, **changes):
    """A random model, its weights in the official layout with all that is dropped, its labels."""
    torch.manual_seed(0)
    names = tuple(f"class {i}" for i in range(1, classes + 1))
    text = F.normalize(torch.randn(classes, 512))
    label_space = LabelSpace([Vocabulary("official", names)], lambda names, dataset: text)
    model = detic.Model(detic.Args(**SETTINGS | changes), label_space, pretrained=False)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.9, 1.1)
    own = model.state_dict()
    official = {
        name: t
        for key, t in own.items()
        if (name := official_name(key)) and "num_batches" not in key
    }
    weight = F.pad(text, (0, 0, 0, 1)).T.contiguous()  # (D, C + 1)
    official |= {f"roi_heads.box_predictor.{k}.cls_score.zs_weight": weight for k in range(3)}
    official |= {f"roi_heads.box_predictor.{k}.freq_weight": torch.ones(classes) for k in range(3)}
    official |= {
        "backbone.bottom_up.base.fc.weight": torch.ones(1),
        "pixel_mean": torch.ones(3, 1, 1),
    }
    return model.eval(), official, label_space


@pytest.fixture(scope="module")
def model_and_official():
    return make()


@pytest.fixture
def pth(tmp_path, model_and_official):
    torch.save({"model": model_and_official[1]}, tmp_path / "official.pth")
    return tmp_path / "official.pth"


@torch.no_grad()
def outputs(model, label_space, height: int = 64, width: int = 96) -> list[torch.Tensor]:
    """Features, boxes, scores and masks of one image."""
    images = torch.randint(
        0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(1)
    ).byte()
    features = model.eval().extract(images, [(height, width)])
    (boxes,), (scores,) = model.detect(features, [(height, width)], label_space.text)
    return [*features, boxes, scores, model.mask_head(features, [boxes[:5]])]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("listing", listings("detic_r50_state_dict_keys.json"))
def test_every_official_tensor_has_its_place_and_shape(listing, caplog):
    official = without_data(listing)
    dropped = {key for key in official if rename(key, CENTERNET2) is None}
    assert all(
        key.endswith("freq_weight") or "zs_weight" in key or ".base.fc." in key for key in dropped
    )
    with caplog.at_level(logging.WARNING):
        tensors, metadata = convert_centernet2(official, "BoxSup-C2_L_CLIP")
    assert len({rename(key, CENTERNET2) for key in official} - {None}) == len(official) - len(
        dropped
    )  # no two in one place
    [(name, record)] = metadata["vocabularies"].items()
    names = record["names"]
    columns = official["roi_heads.box_predictor.0.cls_score.zs_weight"].shape[1]
    assert name == ("o365" if columns == 366 else "lvis")
    assert tuple(names) == Vocabulary.known(name).names
    assert metadata["boxed"] == names and record["is_thing"] is None
    text = tensors.pop(f"label_space.{name}")
    assert text.shape == (len(names), 512)
    text = torch.zeros(len(names), 512)
    label_space = LabelSpace([Vocabulary(name, tuple(names))], lambda names, dataset: text)
    with torch.device("meta"):
        args = detic.Args(**metadata["args"])
        model = detic.Model(args, label_space, pretrained=False)
    assert {key: t.shape for key, t in tensors.items()} == {
        key: t.shape for key, t in model.state_dict().items()
    }
    of_config = {"one_class_per_proposal"}  # the file does not hold it
    assert metadata["args"].keys() == {*detic.MODEL_FIELDS, "datasets"} - of_config
    lost = "20844 classes of ImageNet-21k are not in the file: 1203 of LVIS are kept"
    assert (lost in caplog.text) == (columns == 22048)


def test_converted_model_sees_the_same(pth, cache, model_and_official, tmp_path):
    model, official, label_space = model_and_official
    flags = ["--weights", str(pth), "--amp", "off"]
    args = parse_args(
        detic.Args, "detic", detic.TINY, detic.MODEL_FIELDS, detic.OFFICIAL, argv=flags
    )
    assert args.weights.endswith(".safetensors")
    assert (args.channels, args.fc_dim, args.masks) == (64, 16, True)
    loaded, known = detic.load(args.weights, args)
    assert loaded.backbone.frozen_norm
    assert known.names == tuple(loaded.boxed) == tuple(f"class {i}" for i in range(1, 8))
    assert torch.equal(known.text, label_space.text)
    expected = outputs(model, label_space)
    assert expected[-1].shape == (5, 28, 28) and same(outputs(loaded, known), expected)

    file = tmp_path / "again.safetensors"
    save_weights(file, loaded, known, {"method": "detic", "args": {}, "boxed": []})
    again, known = detic.load(file, args)
    assert same(outputs(again, known), expected)
    assert load_file(file).keys() == load_file(args.weights).keys()

    (twin,) = cache.iterdir()
    before = twin.stat().st_mtime_ns
    assert convert_detic(pth) == twin and twin.stat().st_mtime_ns == before  # converted once
    torch.save({"model": official | {"pixel_std": torch.ones(3)}}, pth)
    assert convert_detic(pth) != twin  # another file of that name


def test_state_dict_alone_and_older_tensors(tmp_path, model_and_official):
    """Without "model" around it, with BatchNorm's counters, a bias and WSDDN, without masks."""
    model, official, _ = make(classes=80, cls_bias=-2.0, image_label_loss="wsddn", masks=False)
    counters = {
        key.replace("running_var", "num_batches_tracked"): torch.tensor(3)
        for key in official
        if "_var" in key
    }
    torch.save(official | counters, tmp_path / "official.pth")
    twin = convert_detic(tmp_path / "official.pth")
    metadata, [vocabulary] = read_model(twin, "detic")
    args = metadata["args"]
    assert vocabulary.dataset == "coco"  # by the number of classes
    assert vocabulary.names == Vocabulary.known("coco").names
    assert (args["cls_bias"], args["image_label_loss"], args["masks"]) == (-2.0, "wsddn", False)
    loaded = detic.Model(detic.Args(**args), LabelSpace([vocabulary]), pretrained=False)
    load_weights(twin, loaded)
    counted = {key for key in loaded.state_dict() if "num_batches_tracked" in key}
    assert all(loaded.state_dict()[key] == 3 for key in counted)
    for key, tensor in model.state_dict().items():
        assert (
            key in counted
            or key == "backbone.frozen_norm"
            or torch.equal(loaded.state_dict()[key], tensor)
        ), key


class Malicious:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))]
)
def test_code_in_a_checkpoint_does_not_run(save, tmp_path, cache, model_and_official):
    file, folder = tmp_path / "official.pth", tmp_path / "made by the pickle"
    save({"model": model_and_official[1] | {"extra": Malicious(folder)}}, file)
    with pytest.raises(
        InputError, match=r"official\.pth cannot be read without running code"
    ) as error:
        convert_detic(file)
    assert "\n" not in str(error.value) and not folder.exists() and not cache.exists()
    pickle.loads(pickle.dumps(Malicious(folder)))
    assert folder.exists()  # so it would have


FC1 = "roi_heads.box_head.0.fc1.weight"
LATERAL = "backbone.fpn_lateral4.bias"
ZS = "roi_heads.box_predictor.0.cls_score.zs_weight"


@pytest.mark.parametrize(
    "content, words",
    [
        (
            lambda o: o | {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)},
            ["'backbone.bottom_up.stem.conv1"],
        ),
        (
            lambda o: o | {"roi_heads.res5.0.conv1.weight": torch.ones(1)},
            ["Faster R-CNN with a C4 ResNet", "docs/official-weights.md"],
        ),
        (lambda o: {k: t for k, t in o.items() if k != FC1}, ["box_head.1.weight", "missing"]),
        (
            lambda o: {k: t for k, t in o.items() if k != LATERAL},
            ["inner_blocks.4.0.bias", "missing"],
        ),
        (lambda o: {k: t for k, t in o.items() if k != ZS}, ["'label_space'", "missing"]),
        (lambda o: [1, 2], ["no state dict"]),
        (lambda o: {}, ["no state dict"]),
        (lambda o: {"model": [torch.ones(1)]}, ["no state dict"]),
        (lambda o: {"model": {}}, ["no state dict"]),
        (lambda o: {"model": {"epoch": 3}}, ["no state dict"]),
        (lambda o: {"model": {1: torch.ones(1)}}, ["no state dict"]),
        (lambda o: torch.ones(2), ["no state dict"]),
    ],
)
def test_other_files_are_refused(content, words, tmp_path, cache, model_and_official):
    torch.save(content(model_and_official[1]), tmp_path / "official.pth")
    with pytest.raises(InputError) as error:
        convert_detic(tmp_path / "official.pth")
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in ["official.pth", *words]), line
    assert not cache.exists()


def test_lost_tensor_is_named_when_the_model_is_made(tmp_path, model_and_official):
    lost = "roi_heads.mask_head.mask_fcn2.weight"
    torch.save(
        {k: t for k, t in model_and_official[1].items() if k != lost}, tmp_path / "official.pth"
    )
    with pytest.raises(InputError, match=r"'mask_head.mask_fcn2.weight' is missing for this model"):
        detic.load(tmp_path / "official.pth")


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    save_file({"x": torch.ones(1)}, tmp_path / "tensors.pth")
    for name in ("text", "empty", "tensors"):
        with pytest.raises(
            InputError, match=rf"{name}\.pth cannot be read without running code"
        ) as error:
            convert_detic(tmp_path / f"{name}.pth")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="do not exist"):
        convert_detic(tmp_path / "gone.pth")


def test_other_methods_have_no_official_weights(pth):
    with pytest.raises(InputError, match=r"no \.safetensors; scaledet has no official weights"):
        convert_if_official(pth, "scaledet", None)


def test_weights_of_this_project_are_returned_as_they_are(tmp_path, cache):
    """A file or a run folder, also for a method that has official weights."""
    file = tmp_path / "weights.safetensors"
    save_file({"x": torch.ones(1)}, file)
    for function in (None, convert_centernet2):
        assert convert_if_official(file, "detic", function) == file
        assert convert_if_official(tmp_path, "detic", function) == file
    assert not cache.exists()


def test_predict_with_an_official_checkpoint(pth, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 48), "green").save(tmp_path / "green.png")
    flags = [
        "--predict",
        tmp_path / "green.png",
        "--weights",
        pth,
        "--output",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(
        "sys.argv", ["detic.py", *map(str, flags), "--test-size", "64", "--score-threshold", "0.02"]
    )
    detic.main()
    record = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [category["name"] for category in record["categories"]] == [
        f"class {i}" for i in range(1, 8)
    ]
    assert record["annotations"] and all(
        "segmentation" in annotation for annotation in record["annotations"]
    )


# -- pickles of numpy arrays -----------------------------------------------------------------------


class Calls:
    """Pickled, it calls `function` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "inside", [lambda x: x, lambda x: np.array([x], dtype=object), lambda x: {"model": {"a": x}}]
)
def test_code_in_a_pickle_of_arrays_does_not_run(protocol, inside, tmp_path, cache):
    file, folder = tmp_path / "zoo.pkl", tmp_path / "made by the pickle"
    for call in [
        Calls(os.mkdir, str(folder)),
        Calls(eval, f"__import__('os').mkdir({str(folder)!r})"),
    ]:
        file.write_bytes(pickle.dumps(inside(call), protocol))
        with pytest.raises(
            InputError,
            match=r"zoo\.pkl cannot be read without running code .* is no part of an array",
        ):
            convert_if_official(file, "lmseg", convert_mask2former)
        assert not folder.exists() and not cache.exists()
        pickle.loads(file.read_bytes())
        assert folder.is_dir()  # so it would have
        folder.rmdir()


# an array that would crash when it is read
POINTERS = Calls(np.ndarray, (1,), np.dtype("O"), b"12345678")


NO_ARRAYS = [[1], {"a": "text"}, {"a": {"b": 1}}, {"a": np.array(["b"], dtype=object)}]
NO_ARRAYS.append({"a": POINTERS})


@pytest.mark.parametrize("content", [b"", b"no pickle", *map(pickle.dumps, NO_ARRAYS)])
def test_other_pickles_are_refused(content, tmp_path, cache):
    (tmp_path / "zoo.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"zoo\.pkl cannot be read without running code") as error:
        convert_if_official(tmp_path / "zoo.pkl", "lmseg", convert_mask2former)
    assert "\n" not in str(error.value) and not cache.exists()
