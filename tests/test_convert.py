"""Official checkpoints: every tensor is mapped or dropped by a named rule, no code of theirs runs, the model stays."""

import json
import logging
import os
import pickle

import pytest
import torch
from parity import FOLDER
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import detic
from common import convert
from common.checkpoint import load_weights, read_metadata, read_text, save_weights
from common.convert import DETIC, convert_detic, converted, rename
from common.errors import InputError
from common.labels import Vocabulary
from common.training import parse_args

KEYS = FOLDER / "detic_r50_state_dict_keys.json"
CPU = torch.device("cpu")
SETTINGS = {"backbone": "resnet50", "channels": 64, "fc_dim": 16, "amp": "off"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


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
    return {"centernet": f"proposal_generator.{rest}", "mask_head": f"roi_heads.mask_head.{rest}"}.get(kind)


def make(classes: int = 7, **changes):
    """A random model, and its weights in the official layout with all that is dropped."""
    torch.manual_seed(0)
    model = detic.Model(detic.Args(**SETTINGS | changes), F.normalize(torch.randn(classes, 512)), pretrained=False)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif key.endswith("running_var"):
            tensor.uniform_(0.9, 1.1)
    own = model.state_dict()
    official = {name: t for key, t in own.items() if (name := official_name(key)) and "num_batches" not in key}
    weight = F.pad(model.text, (0, 0, 0, 1)).T.contiguous()  # (D, C + 1)
    official |= {f"roi_heads.box_predictor.{k}.cls_score.zs_weight": weight for k in range(3)}
    official |= {f"roi_heads.box_predictor.{k}.freq_weight": torch.ones(classes) for k in range(3)}
    official |= {"backbone.bottom_up.base.fc.weight": torch.ones(1), "pixel_mean": torch.ones(3, 1, 1)}
    return model.eval(), official


@pytest.fixture(scope="module")
def model_and_official():
    return make()


@pytest.fixture
def pth(tmp_path, model_and_official):
    torch.save({"model": model_and_official[1]}, tmp_path / "official.pth")
    return tmp_path / "official.pth"


@torch.no_grad()
def outputs(model, height: int = 64, width: int = 96) -> list[torch.Tensor]:
    """Features, boxes, scores and masks of one image."""
    images = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()
    features = model.eval().extract(images, [(height, width)])
    (boxes,), (scores,) = model.detect(features, [(height, width)])
    return [*features, boxes, scores, model.mask_head(features, [boxes[:5]])]


def same(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.skipif(not KEYS.is_file(), reason=f"no {KEYS.name}; CONCORD_PARITY names the folder of recorded tensors")
@pytest.mark.parametrize("number", [0, 1])
def test_every_official_tensor_has_its_place_and_shape(number, caplog):
    listing = list(json.loads(KEYS.read_text()).values())[number]
    official = {key: torch.empty(facts["shape"], device="meta") for key, facts in listing.items()}
    dropped = {key for key in official if rename(key, DETIC) is None}
    assert all(key.endswith("freq_weight") or "zs_weight" in key or ".base.fc." in key for key in dropped)
    with caplog.at_level(logging.WARNING):
        tensors, metadata = convert_detic(official)
    assert len({rename(key, DETIC) for key in official} - {None}) == len(official) - len(dropped)  # no two in one place
    classes = official["roi_heads.box_predictor.0.cls_score.zs_weight"].shape[1] - 1
    with torch.device("meta"):
        args = detic.Args(**metadata["args"])
        model = detic.Model(args, torch.empty(classes, 512), pretrained=False)
    assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in model.state_dict().items()}
    ((name, names),) = metadata["vocabularies"].items()
    assert len(names) == classes and metadata["boxed"] == list(names)
    assert metadata["args"].keys() == set(detic.MODEL_FIELDS)
    if classes in convert.VOCABULARIES:
        assert name == "lvis" and tuple(names) == Vocabulary.known("lvis").names and not caplog.records
    else:
        assert names[0] == "class 1" and names[-1] == f"class {classes}"
        assert f"{classes} classes are not known; name yours with --vocabulary" in caplog.text


def test_converted_model_sees_the_same(pth, cache, model_and_official, tmp_path):
    model, official = model_and_official
    flags = ["--weights", str(pth), "--amp", "off"]
    args = parse_args(detic.Args, "detic", detic.TINY, detic.MODEL_FIELDS, flags)
    assert args.weights.endswith(".safetensors") and (args.channels, args.fc_dim, args.masks) == (64, 16, True)
    loaded, label_space, boxed = detic.load_trained(args, CPU)
    assert loaded.backbone.frozen_norm and label_space.names == tuple(boxed) == tuple(f"class {i}" for i in range(1, 8))
    assert torch.equal(loaded.text, model.text)
    expected = outputs(model)
    assert expected[-1].shape == (5, 28, 28) and same(outputs(loaded), expected)

    save_weights(tmp_path / "again.safetensors", loaded, {"method": "detic", "args": {}, "vocabularies": {"x": []}})
    again = detic.Model(args, read_text(tmp_path / "again.safetensors"), pretrained=False)
    load_weights(tmp_path / "again.safetensors", again)
    assert same(outputs(again), expected)
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(args.weights).keys()

    (twin,) = cache.iterdir()
    before = twin.stat().st_mtime_ns
    assert converted(pth, "detic") == twin and twin.stat().st_mtime_ns == before  # converted once
    torch.save({"model": official | {"pixel_std": torch.ones(3)}}, pth)
    assert converted(pth, "detic") != twin  # another file of that name


def test_state_dict_alone_and_older_tensors(tmp_path, model_and_official):
    """Without the "model" around it, with BatchNorm's counters, with the bias, the ranks of WSDDN and no masks."""
    model, official = make(classes=80, cls_bias=-2.0, image_label_loss="wsddn", masks=False)
    counters = {key.replace("running_var", "num_batches_tracked"): torch.tensor(3) for key in official if "_var" in key}
    torch.save(official | counters, tmp_path / "official.pth")
    twin = converted(tmp_path / "official.pth", "detic")
    metadata = read_metadata(twin, "detic")
    args, (vocabulary,) = metadata["args"], metadata["vocabularies"]
    assert vocabulary == "coco"  # by the number of classes
    assert (args["cls_bias"], args["image_label_loss"], args["masks"]) == (-2.0, "wsddn", False)
    loaded = detic.Model(detic.Args(**args), read_text(twin), pretrained=False)
    load_weights(twin, loaded)
    counted = {key for key in loaded.state_dict() if "num_batches_tracked" in key}
    assert all(loaded.state_dict()[key] == 3 for key in counted)
    for key, tensor in model.state_dict().items():
        assert key in counted or key == "backbone.frozen_norm" or torch.equal(loaded.state_dict()[key], tensor), key


class Malicious:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_code_in_a_checkpoint_does_not_run(save, tmp_path, cache, model_and_official):
    file, folder = tmp_path / "official.pth", tmp_path / "made by the pickle"
    save({"model": model_and_official[1] | {"extra": Malicious(folder)}}, file)
    with pytest.raises(InputError, match=r"official\.pth cannot be read without running code") as error:
        converted(file, "detic")
    assert "\n" not in str(error.value) and not folder.exists() and not cache.exists()
    pickle.loads(pickle.dumps(Malicious(folder)))
    assert folder.exists()  # so it would have


FC1 = "roi_heads.box_head.0.fc1.weight"
LATERAL = "backbone.fpn_lateral4.bias"
ZS = "roi_heads.box_predictor.0.cls_score.zs_weight"


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda o: o | {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}, ["'backbone.bottom_up.stem.conv1"]),
        (lambda o: o | {"roi_heads.res5.0.conv1.weight": torch.ones(1)}, ["'roi_heads.res5.0", "ResNet-50"]),
        (lambda o: {k: t for k, t in o.items() if k != FC1}, ["box_head.1.weight", "missing"]),
        (lambda o: {k: t for k, t in o.items() if k != LATERAL}, ["inner_blocks.4.0.bias", "missing"]),
        (lambda o: {k: t for k, t in o.items() if k != ZS}, ["'text'", "missing"]),
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
        converted(tmp_path / "official.pth", "detic")
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in ["official.pth", *words]), line
    assert not cache.exists()


def test_lost_tensor_is_named_when_the_model_is_made(tmp_path, model_and_official):
    lost = "roi_heads.mask_head.mask_fcn2.weight"
    torch.save({k: t for k, t in model_and_official[1].items() if k != lost}, tmp_path / "official.pth")
    args = parse_args(
        detic.Args, "detic", detic.TINY, detic.MODEL_FIELDS, ["--weights", str(tmp_path / "official.pth")]
    )
    with pytest.raises(InputError, match=r"'mask_head.mask_fcn2.weight' is missing for this model"):
        detic.load_trained(args, CPU)


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    save_file({"x": torch.ones(1)}, tmp_path / "tensors.pth")
    for name in ("text", "empty", "tensors"):
        with pytest.raises(InputError, match=rf"{name}\.pth cannot be read without running code") as error:
            converted(tmp_path / f"{name}.pth", "detic")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="do not exist"):
        converted(tmp_path / "gone.pth", "detic")


def test_other_methods_have_no_official_weights(pth):
    with pytest.raises(InputError, match=r"no \.safetensors of scaledet\.py, whose official weights do not exist"):
        converted(pth, "scaledet")


def test_predict_with_an_official_checkpoint(pth, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 48), "green").save(tmp_path / "green.png")
    flags = ["--predict", tmp_path / "green.png", "--weights", pth, "--output", tmp_path / "run", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["detic.py", *map(str, flags), "--test-size", "64", "--score-threshold", "0.02"])
    detic.main()
    record = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert [category["name"] for category in record["categories"]] == [f"class {i}" for i in range(1, 8)]
    assert record["annotations"] and all("segmentation" in annotation for annotation in record["annotations"])
