"""The recipe of `train` and the mechanics around it: what no equation says but every number depends on."""

import json
import math
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from conftest import FAST
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn

import scaledet
from common.backbone import Backbone
from common.batch import collate
from common.cascade import BoxStage
from common.checkpoint import (
    load_checkpoint,
    load_plain,
    load_weights,
    read_metadata,
    read_model,
    read_text,
    rng_states,
    save_checkpoint,
    save_weights,
)
from common.command import parse_args, with_saved
from common.datasets import load_datasets
from common.distributed import mean_over_ranks
from common.errors import InputError
from common.files import atomic_path
from common.optim import learning_rate
from common.runlog import RunLog, check_finite
from common.transforms import ResizeShortest


def test_learning_rate_warms_up_and_falls_like_a_cosine():
    def rate(step):
        return learning_rate(step, base=2.0, steps=1000, warmup=100, warmup_factor=1e-4)

    assert rate(0) == pytest.approx(2e-4)
    assert rate(50) == pytest.approx(
        2 * (1e-4 + (1 - 1e-4) * 0.5) * 0.5 * (1 + math.cos(math.pi * 0.05))
    )
    assert rate(500) == pytest.approx(1.0)
    assert rate(1000) == pytest.approx(0, abs=1e-9)
    assert learning_rate(0, 2.0, 1000, 0, 1e-4) == 2.0


def test_recipe_of_scaledet(tiny_root, tmp_path, seen):
    """AdamW with weight decay 1e-4, gradients clipped by value at 1, lr scaled to the batch; Detic's constants."""
    args = parse_args(
        scaledet.Args,
        scaledet.METHOD,
        scaledet.TINY,
        scaledet.MODEL_FIELDS,
        [*FAST, "--steps", "1"],
    )
    args.batch_size, args.base_batch_size, args.lr = 4, 8, 1e-3
    datasets = load_datasets("coco", "train", str(tiny_root))
    scaledet.train(args, datasets, tmp_path, torch.device("cpu"))
    assert seen == {"settings": {"lr": 5e-4, "weight_decay": 1e-4}, "clip": 1.0}
    defaults = scaledet.Args()
    assert (defaults.lr, defaults.base_batch_size, defaults.warmup_steps, defaults.steps) == (
        2e-4,
        64,
        10_000,
        0,
    )
    assert (defaults.image_size, defaults.test_size, defaults.jitter) == (640, 800, (0.1, 2.0))
    assert (defaults.lam, defaults.tau, defaults.repeat_threshold, defaults.rois_per_image) == (
        1.0,
        0.02,
        1e-3,
        512,
    )


def test_box_head_starts_as_in_detectron2():
    stage = BoxStage(64, 128)
    for layer in (stage.box_head[1], stage.box_head[3]):
        assert float(layer.weight.detach().std()) * math.sqrt(layer.in_features) == pytest.approx(
            1.0, rel=0.05
        )
        assert not layer.bias.any()
    assert float(stage.bbox_pred[2].weight.detach().std()) == pytest.approx(0.001, rel=0.2)
    assert scaledet.TextClassifier(128, 16, tau=0.02, cls_bias=0).cls_bias is None


SMALL = scaledet.Args(backbone="resnet18", channels=64, fc_dim=32)


def small_model(text: torch.Tensor) -> scaledet.Model:
    return scaledet.Model(SMALL, text, pretrained=False)


def test_weights_bring_all_but_the_label_space(tmp_path):
    trained, text = small_model(torch.randn(5, 6)), torch.randn(3, 6)
    save_weights(tmp_path / "weights.safetensors", trained, {})
    model = small_model(text)
    load_weights(tmp_path, model)
    assert torch.equal(model.text, text)
    assert torch.equal(read_text(tmp_path), trained.text)  # of a run folder, or of the file itself
    assert torch.equal(read_text(tmp_path / "weights.safetensors"), trained.text)
    theirs = trained.state_dict()
    assert all(
        torch.equal(tensor, theirs[name])
        for name, tensor in model.state_dict().items()
        if name != "text"
    )
    assert model.state_dict().keys() == theirs.keys()


def test_weights_of_another_text_encoder_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_model(torch.randn(5, 6)), {})
    with pytest.raises(
        InputError, match=r"text embeddings of 6 dimensions, these have 8; use the --text-encoder"
    ) as e:
        load_weights(tmp_path, small_model(torch.randn(5, 8)))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    "text, words", [(None, "'text' is missing"), (torch.full((5, 6), math.nan), "not finite")]
)
def test_weights_with_a_damaged_label_space_are_refused(tmp_path, text, words):
    model = small_model(torch.randn(5, 6))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "text"}
    save_file(
        tensors if text is None else tensors | {"text": text}, tmp_path / "weights.safetensors"
    )
    with pytest.raises(InputError, match=words):
        load_weights(tmp_path, model)
    if text is None:
        with pytest.raises(InputError, match="no text embeddings"):
            read_text(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_weights_of_another_precision(tmp_path, dtype):
    model = small_model(torch.randn(5, 6))
    save_file(
        {name: tensor.to(dtype) for name, tensor in model.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    if dtype == torch.float16:
        load_weights(tmp_path, model)
        assert read_text(tmp_path).dtype == torch.float32 == next(model.parameters()).dtype
    else:
        with pytest.raises(InputError, match="int32"):
            load_weights(tmp_path, model)
        with pytest.raises(InputError, match="no table of text embeddings"):
            read_text(tmp_path)


@pytest.mark.parametrize("names", ["cat", ["cat"], {"a": "cat"}, {"a": [1]}, {"a": None}, {}])
def test_weights_with_damaged_class_names_are_refused(tmp_path, names):
    metadata = {"method": "scaledet", "args": {}, "vocabularies": names}
    save_weights(tmp_path / "weights.safetensors", small_model(torch.randn(5, 6)), metadata)
    with pytest.raises(InputError, match="damaged settings or class names"):
        read_metadata(tmp_path, "scaledet")


@pytest.mark.parametrize("rows, fits", [(1, False), (2, True), (3, True), (4, True), (5, False)])
def test_weights_have_a_row_of_text_for_each_class(tmp_path, rows, fits):
    """Classes of one name may share theirs, and background may have one."""
    metadata = {
        "method": "scaledet",
        "args": {},
        "vocabularies": {"a": ["cat", "dog"], "b": ["Cat"]},
    }
    save_weights(tmp_path / "weights.safetensors", small_model(torch.randn(rows, 6)), metadata)
    if fits:
        assert len(read_model(tmp_path, "scaledet")[1]) == rows
    else:
        with pytest.raises(InputError, match=f"{rows} text embeddings for 3 classes"):
            read_model(tmp_path, "scaledet")


@pytest.mark.parametrize("width, fits", [(0, True), (512, True), ("512", False), (None, False)])
def test_weights_with_a_damaged_width_are_refused(tmp_path, width, fits):
    metadata = {"method": "lmseg", "args": {}, "vocabularies": {"a": ["cat"]}, "width": width}
    save_weights(tmp_path / "weights.safetensors", small_model(torch.randn(2, 6)), metadata)
    if fits:
        assert read_metadata(tmp_path, "lmseg")["width"] == width
    else:
        with pytest.raises(InputError, match="damaged settings"):
            read_metadata(tmp_path, "lmseg")


@pytest.mark.parametrize(
    "setting, value", [("amp", "perhaps"), ("amp", 1), ("lr", "high"), ("steps", 1.5)]
)
def test_saved_settings_that_do_not_fit_are_refused(setting, value):
    with pytest.raises(InputError, match=f"the saved setting {setting} is {value!r}"):
        with_saved(scaledet.Args(), {setting: value}, [setting])
    assert with_saved(scaledet.Args(), {"amp": "off", "lr": 1}, ["amp", "lr"]).amp == "off"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_moments_of_another_model_are_refused(tmp_path, kind):
    def saved(width):
        model = nn.Linear(width, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        torch.save(
            {"step": 1, "optimizer": optimizer.state_dict(), "rng": []}, tmp_path / "state.pt"
        )
        return optimizer

    assert load_checkpoint(tmp_path, saved(3)) == 1
    four = saved(4)
    saved(3)
    with pytest.raises(InputError, match="the optimiser's moments are of another model"):
        load_checkpoint(tmp_path, four)


@pytest.mark.parametrize("content", [b"", b".", b"hello world", b"PK\x03\x04", b"\x80\x02"])
def test_damaged_torch_files_have_one_reason(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_plain(tmp_path / "state.pt")
    assert str(error.value).strip() and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"state\.pt cannot be read"):
        load_checkpoint(tmp_path, None)


def test_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 1 vs 2")

    model = small_model(torch.randn(5, 6))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="enforce fail"):
        save_checkpoint(tmp_path, 1, model, torch.optim.SGD(model.parameters(), 0.1), {})
    assert not list(tmp_path.iterdir())


def test_two_runs_cannot_train_in_one_folder(tmp_path):
    first = RunLog(tmp_path, 10, 0)
    with pytest.raises(InputError, match="another run is training"):
        RunLog(tmp_path, 10, 0)
    first.close()
    RunLog(tmp_path, 10, 0).close()


def test_flags_win_over_weights_and_presets(tmp_path):
    args = parse_args(scaledet.Args, scaledet.METHOD, scaledet.TINY, [], ["--tiny", "--steps", "7"])
    assert args.tiny and args.steps == 7 and args.backbone == "tf_efficientnet_lite0"
    assert parse_args(scaledet.Args, scaledet.METHOD, scaledet.TINY, [], []).backbone == "resnet50"


def test_non_finite_loss_is_named():
    with pytest.raises(InputError, match="step 3: loss_b is not finite"):
        check_finite(
            {
                "loss_a": torch.tensor(1.0),
                "loss_b": torch.tensor(math.nan),
                "loss": torch.tensor(math.nan),
            },
            3,
        )


def test_atomic_path_leaves_old_content_when_writing_fails(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_path(tmp_path / "folder") as path:
        path.mkdir()
        (path / "b.txt").write_text("new")
    assert (tmp_path / "folder" / "b.txt").read_text() == "new"


def test_frozen_norm_stays_frozen_and_is_kept_with_the_weights():
    backbone = Backbone("tf_efficientnet_lite0", 64).train()
    norms = [m for m in backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(not m.training and not m.weight.requires_grad for m in norms)
    fresh = Backbone("tf_efficientnet_lite0", 64, pretrained=False).train()
    assert any(m.training for m in fresh.body.modules() if isinstance(m, nn.BatchNorm2d))
    fresh.load_state_dict(backbone.state_dict())
    assert not any(
        m.training for m in fresh.train().body.modules() if isinstance(m, nn.BatchNorm2d)
    )


def test_lite0_weights_are_imagenet_weights():
    """Tensors copied in order land where they belong: a pretrained stem is not a random one."""
    torch.manual_seed(0)
    random, pretrained = (
        Backbone("tf_efficientnet_lite0", 64, pretrained=p).body for p in (False, True)
    )
    assert not torch.equal(random.conv_stem.weight, pretrained.conv_stem.weight)
    variances = [m.running_var for m in pretrained.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((v >= 0).all() for v in variances) and all((v != 1).any() for v in variances)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_backbones_give_p3_to_p7(name):
    backbone = Backbone(name, 64, pretrained=False).eval()
    images = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8)
    with torch.no_grad():
        features = backbone(backbone.normalise(images, [(96, 160)]))
    assert [f.shape for f in features] == [
        (1, 64, 12, 20),
        (1, 64, 6, 10),
        (1, 64, 3, 5),
        (1, 64, 2, 3),
        (1, 64, 1, 2),
    ]


def test_padding_is_zero_after_normalisation():
    backbone = Backbone("resnet18", 64, pretrained=False)
    images = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    x = backbone.normalise(images, [(20, 10)])
    assert (
        (x[:, :, 20:] == 0).all()
        and (x[:, :, :, 10:] == 0).all()
        and (x[:, :, :20, :10] != 0).all()
    )


def test_compiled_backbone_agrees_with_eager(tiny_root):
    """--compile on is the same maths."""
    torch.manual_seed(0)
    backbone = Backbone("tf_efficientnet_lite0", 64).eval()
    (dataset,) = load_datasets("coco", "val", str(tiny_root))
    batch = collate([ResizeShortest(64)(dataset.load(0))])
    x = backbone.normalise(batch.images, batch.sizes)
    with torch.no_grad():
        eager = backbone(x)
        compiled = torch.compile(backbone, backend="aot_eager")(x)
    for one, other in zip(eager, compiled):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def _mean_on_rank(rank: int, file: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    value = torch.tensor(float(1 + 4 * rank))
    results[rank] = float(mean_over_ranks(value))
    assert float(value) == 1 + 4 * rank  # the argument is left alone
    dist.destroy_process_group()


def test_mean_over_ranks(tmp_path):
    assert float(mean_over_ranks(torch.tensor(3.0))) == 3.0
    results = mp.Manager().dict()
    mp.spawn(_mean_on_rank, (str(tmp_path / "store"), results), nprocs=2)
    assert dict(results) == {0: 3.0, 1: 3.0}


def test_rng_states_are_tensors():
    assert all(isinstance(state, torch.Tensor) for state in rng_states())


def test_damaged_lines_of_the_log_are_dropped_with_a_count(tmp_path, caplog):
    """A killed run may leave half a line."""
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (20, 40, 60)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([good[0], "[1]", *good[1:], '{"step": 8']))
    RunLog(tmp_path, 100, 40).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == good[:2]
    assert "2 damaged lines are dropped" in caplog.text
