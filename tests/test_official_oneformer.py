"""Official checkpoints of OneFormer: every model of its zoo loads, trains on, and is evaluated.

The tensors have the official names and shapes and random values.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from parity import FOLDER
from test_official_mask2former import write_panoptic

import oneformer
from benchmarks.mask2former_layouts import COUNTERS
from benchmarks.oneformer_layouts import ZOO, layout, settings
from common.convert import convert_if_official, rename
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.official_mask2former import HEADS
from common.official_oneformer import ONEFORMER, convert_oneformer

KEYS = "oneformer_r50_state_dict_keys.json"
FILES = [(d, b, file) for d, backbones in ZOO.items() for b in backbones for file in backbones[b]]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)  # pytest would keep these files of 100 MB


@pytest.fixture(scope="module")
def listing() -> dict:
    """The recorded list of official keys, with the settings of the model."""
    path = FOLDER / KEYS
    if not path.is_file():
        pytest.skip(f"no {path}; CONCORD_PARITY names the folder of recorded tensors")
    return json.loads(path.read_text())


def official(device: str = "cpu", **given) -> dict:
    """Random values in the official shapes."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in layout(**given).items():
        kind = name.rpartition(".")[2]
        tensors[name] = torch.zeros(shape, device=device)
        if device == "cpu" and kind == "running_var":
            tensors[name].fill_(1.0)
        elif device == "cpu" and kind not in COUNTERS:
            tensors[name].normal_(std=0.05)
    return tensors


def shapes_of_model(metadata: dict) -> dict:
    args = oneformer.Args(**metadata["args"] | metadata["own_head"])
    vocabularies = [
        Vocabulary(name, tuple(record["names"]))
        for name, record in metadata["vocabularies"].items()
    ]
    with torch.device("meta"):
        model = oneformer.Model(args, LabelSpace(vocabularies), pretrained=False)
    return {key: t.shape for key, t in model.state_dict().items()}


def test_the_synthetic_layout_is_the_official_one(listing):
    sizes = listing["settings"]
    shapes = {name: tuple(facts["shape"]) for name, facts in listing["state_dict"].items()}
    given = {"classes": sizes["num_classes"], "queries": sizes["num_object_queries"]}
    ours = layout("R50", **given, context=sizes["num_object_ctx"])
    assert shapes == ours
    absent = set(listing["absent_when_IS_TRAIN_False"])
    assert layout("R50", **given, text=False).keys() == ours.keys() - absent


def test_settings_of_the_official_configuration(listing):
    """The defaults, and what a converted checkpoint brings."""
    sizes = listing["settings"]
    args = oneformer.Args()
    assert args.queries == sizes["num_object_queries"] and args.context == sizes["num_object_ctx"]
    assert args.channels == sizes["hidden_dim"]
    assert args.decoder_layers == sizes["dec_layers"] - 1  # official: and the initial queries
    assert args.encoder_layers == sizes["pixel_decoder_enc_layers"]
    assert args.points == sizes["train_num_points"] and args.lr == sizes["solver"]["base_lr"]
    assert args.batch_size == args.base_batch_size == sizes["solver"]["ims_per_batch"]
    assert sizes["class_dec_layers"] == oneformer.CLASS_LAYERS
    assert sizes["text_encoder"]["num_layers"] == oneformer.TEXT_LAYERS
    space = LabelSpace([Vocabulary("any", ("a", "b"))])
    with torch.device("meta"):
        model = oneformer.Model(replace(args, backbone="resnet18"), space, pretrained=False)
    for layer in (*model.layers, *model.class_layers):
        assert layer.cross_attn.heads == layer.self_attn.heads == sizes["nheads"]
        assert layer.linear1.out_features == sizes["dim_feedforward"]
    given = {"classes": sizes["num_classes"], "queries": sizes["num_object_queries"]}
    _, metadata = convert_oneformer(official("meta", backbone="R50", **given))
    own = metadata["own_head"]
    assert own["object_threshold"] == sizes["test"]["object_mask_threshold"]
    assert own["test_size"] == sizes["input"]["min_size_test"]
    assert own["test_longest"] == sizes["input"]["max_size_test"]


@pytest.mark.parametrize("text", [True, False])
def test_every_tensor_has_its_place_and_shape(text):
    """A file for inference has no text encoder, and its model has none."""
    tensors = official("meta", backbone="R50", classes=150, text=text)
    dropped = {key for key in tensors if rename(key, ONEFORMER) is None}
    assert dropped == {"criterion.empty_weight"}
    assert len({rename(key, ONEFORMER) for key in tensors} - {None}) == len(tensors) - 1
    found, metadata = convert_oneformer(tensors)
    assert metadata["args"]["contrastive"] == text
    own = shapes_of_model(metadata)
    assert {key: t.shape for key, t in found.items()} == own
    modules = {key.partition(".")[0] for key in own} - {"heads"}
    assert set(metadata["base"]) == modules


SIZES = {  # of the official configurations: short and long side of test images, threshold
    "250_16_swin_l_oneformer_ade20k_160k": (640, 2560, 0.5),
    "896x896_250_16_swin_l_oneformer_ade20k_160k": (896, 3584, 0.5),
    "1280x1280_250_16_swin_l_oneformer_ade20k_160k": (1280, 5120, 0.5),
    "250_16_swin_l_oneformer_cityscapes_90k": (1024, 2048, 0.8),
    "150_16_swin_l_oneformer_coco_100ep": (800, 1333, 0.8),
    "250_16_swin_l_oneformer_mapillary_300k": (2048, 2048, 0.8),
}


@pytest.mark.parametrize("dataset, backbone, file", FILES)
def test_every_model_of_the_zoo_is_known_by_its_tensors(dataset, backbone, file):
    given = settings(dataset, file)
    found, metadata = convert_oneformer(official("meta", backbone=backbone, **given), file)
    assert {key: t.shape for key, t in found.items()} == shapes_of_model(metadata)
    args = metadata["args"]
    assert args["backbone"] == "swin_large_patch4_window12_384"
    assert (args["queries"], args["context"]) == (given["queries"], given["context"])
    assert (args["encoder_layers"], args["decoder_layers"], args["channels"]) == (6, 9, 256)
    assert tuple(metadata["vocabularies"]) == HEADS[given["classes"]][1]
    own = metadata["own_head"]
    assert (own["test_size"], own["test_longest"], own["object_threshold"]) == SIZES[file]


@pytest.mark.parametrize(
    "name", ["backbone.downsample_layers.0.0.weight", "backbone.levels.0.blocks.0.attn.rpb"]
)
def test_other_backbones_are_refused(name, tmp_path):
    """ConvNeXt and DiNAT."""
    tensors = official("meta", backbone="R50", classes=150, small=True)
    tensors = {key: torch.zeros(1) for key in tensors if not key.startswith("backbone.")}
    torch.save({"model": tensors | {name: torch.ones(1)}}, tmp_path / "official.pth")
    with pytest.raises(InputError) as error:
        convert_if_official(tmp_path / "official.pth", "oneformer", convert_oneformer)
    assert "\n" not in str(error.value) and f"'{name}'" in str(error.value)


# -- the command -----------------------------------------------------------------------------------


def saved(folder, classes: int, **given):
    """The file of a ResNet-50 with small decoders and random weights. Its class head is sure."""
    tensors = official(backbone="R50", classes=classes, small=True, queries=20, **given)
    tensors["sem_seg_head.predictor.class_embed.weight"] *= 100
    file = folder / "official.pth"
    torch.save({"model": tensors, "iteration": 5}, file)
    return file


@pytest.mark.parametrize("text", [True, False])
def test_the_command_evaluates(text, tmp_path, call):
    """All three tasks, with the sentences of each and of the others."""
    write_panoptic(tmp_path)
    given = ["--eval-only", "--weights", saved(tmp_path, 133, text=text), "--data-root", tmp_path]
    given += ["--eval-datasets", "coco-panoptic", "--output", tmp_path / "run", "--workers", 0]
    given += ["--device", "cpu", "--test-size", 64, "--sentences", "each"]
    call(*given, method="oneformer")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    told = [f"coco-panoptic (the task is {word})" for word in oneformer.TASK_NAMES]
    assert list(results) == ["coco-panoptic", *told]
    own, *others = results.values()
    assert own.keys() == {"PQ", "SQ", "RQ", "PQ things", "PQ stuff", "mIoU", "AP things"}
    semantic, instance, panoptic = others  # each result has the sentence of its own task
    assert own["mIoU"] == semantic["mIoU"] and own["PQ"] == panoptic["PQ"]
    assert own["AP things"] == instance["AP things"]


def test_loading_brings_the_official_settings(tmp_path):
    file = saved(tmp_path, 150)
    model, label_space = oneformer.load(file)
    assert label_space.datasets == ["ade20k", "ade20k-panoptic"]
    assert (model.args.test_size, model.args.test_longest) == (512, 2048)
    assert model.args.object_threshold == 0.5 and model.args.queries == 20
    one, other = (layer.state_dict() for layer in model.heads.layers)
    assert all(torch.equal(one[key], other[key]) for key in one)
    stored = torch.load(file)["model"]
    ours = model.class_layers[1].cross_attn.in_proj_weight
    name = "sem_seg_head.predictor.class_transformer.decoder.layers.1.multihead_attn.in_proj_weight"
    assert torch.equal(ours, stored[name])
    assert torch.equal(model.context, stored["prompt_ctx.weight"])
    assert torch.equal(model.task_mlp[2].bias, stored["task_mlp.layers.1.bias"])


def test_a_training_starts_from_the_base(tmp_path, call, tiny_root, caplog):
    """With a new classifier for the classes of its own."""
    file = saved(tmp_path, 133)
    given = ["--datasets", "ade20k-panoptic", "--data-root", tiny_root, "--weights", file]
    given += ["--output", tmp_path / "run", "--device", "cpu", "--workers", 0, "--steps", 0]
    given += ["--image-size", 32, "--test-size", 32]
    with caplog.at_level("INFO"):
        call(*given, method="oneformer")
    assert "2 tensors of 'heads.' are not in it and start anew" in caplog.text
    model, label_space = oneformer.load(tmp_path / "run")
    assert (model.args.backbone, model.args.queries, model.args.channels) == ("resnet50", 20, 32)
    assert label_space.datasets == ["ade20k-panoptic"]
    assert torch.equal(
        model.query_embed, torch.load(file)["model"]["sem_seg_head.predictor.query_embed.weight"]
    )
