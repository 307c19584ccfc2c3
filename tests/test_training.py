"""The recipe of `train` and the mechanics around it, on which every number depends."""

import importlib
import itertools
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import FAST, small_flags
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch import nn

import scaledet
from common.backbone import Backbone
from common.batch import collate
from common.cascade import BoxStage, mlp
from common.checkpoint import (
    load_checkpoint,
    load_plain,
    load_weights,
    read_metadata,
    read_model,
    rng_states,
    save_checkpoint,
    save_weights,
)
from common.command import parse_args, with_saved
from common.datasets import load_datasets
from common.distributed import gather, mean_over_ranks, same_on_ranks
from common.errors import InputError
from common.files import atomic_path, sweep
from common.labels import LabelSpace, Vocabulary
from common.optim import learning_rate
from common.process import leave_group
from common.transforms import ResizeShortest


def test_learning_rate_warms_up_and_falls_like_a_cosine():
    def rate(step):
        return learning_rate(step, base=2.0, steps=1000, warmup=100, warmup_factor=1e-4)

    assert rate(0) == pytest.approx(2e-4)
    end = 1 + math.cos(math.pi * 0.1)  # where the line meets the cosine
    assert rate(100) == pytest.approx(end)
    assert rate(25) == pytest.approx(2e-4 + 0.25 * (end - 2e-4))
    assert rate(500) == pytest.approx(1.0)
    assert rate(1000) == pytest.approx(0, abs=1e-9)
    assert learning_rate(0, 2.0, 1000, 0, 1e-4) == 2.0


def test_recipe_of_scaledet(tiny_root, tmp_path, seen):
    """AdamW with weight decay 1e-4, gradients clipped by value at 1, lr scaled to the batch.

    The constants are Detic's.
    """
    args = parse_args(
        scaledet.Args,
        scaledet.METHOD,
        scaledet.TINY,
        scaledet.MODEL_FIELDS,
        argv=[*FAST, "--steps", "1"],
    )
    args.batch_size, args.base_batch_size, args.lr = 4, 8, 1e-3
    datasets = load_datasets("coco", "train", str(tiny_root))
    label_space = scaledet.build_label_space(args, [d.vocabulary for d in datasets])
    scaledet.train(args, datasets, label_space, tmp_path, torch.device("cpu"))
    assert seen == {"settings": {"lr": 5e-4, "weight_decay": 1e-4, "fused": True}, "clip": 1.0}
    defaults = scaledet.Args()
    assert (defaults.lr, defaults.base_batch_size, defaults.warmup_steps, defaults.steps) == (
        2e-4,
        64,
        10_000,
        None,
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
    branches = (stage.bbox_pred, mlp(128, 40))
    for layer in (stage.box_head[1], stage.box_head[3], *(branch[0] for branch in branches)):
        assert float(layer.weight.detach().std()) * math.sqrt(layer.in_features) == pytest.approx(
            1.0, rel=0.05
        )
        assert not layer.bias.any()
    for branch in branches:
        assert float(branch[2].weight.detach().std()) == pytest.approx(0.001, rel=0.2)
        assert not branch[2].bias.any()
    assert scaledet.TextClassifier(128, 16, tau=0.02, cls_bias=0).cls_bias is None


SMALL = scaledet.Args(backbone="resnet18", channels=64, fc_dim=32)


def small_space(classes: int, width: int = 6) -> LabelSpace:
    """A label space with random text (classes, width)."""
    vocabulary = Vocabulary("a", tuple(f"class {i}" for i in range(classes)))
    return LabelSpace([vocabulary.with_text(lambda names, dataset: torch.randn(len(names), width))])


def small_model(width: int = 6) -> scaledet.Model:
    """A model for text embeddings of this width."""
    return scaledet.Model(SMALL, small_space(5, width), pretrained=False)


METADATA = {"method": "scaledet", "args": {}}


def test_weights_bring_the_model_and_its_label_space(tmp_path):
    trained, label_space = small_model(), small_space(5)
    save_weights(tmp_path / "weights.safetensors", trained, label_space, METADATA)
    model = small_model()
    load_weights(tmp_path, model)
    theirs = trained.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    for path in (tmp_path, tmp_path / "weights.safetensors"):  # the run folder, or the file
        [vocabulary] = read_model(path, "scaledet")[1]
        assert vocabulary.dataset == "a" and vocabulary.names == label_space.names
        assert torch.equal(vocabulary.text, label_space.text)


def test_weights_of_another_text_encoder_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_model(6), small_space(5, 6), METADATA)
    with pytest.raises(InputError, match=r"the flags \(--text-encoder, ...\)") as error:
        load_weights(tmp_path, small_model(8))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def damage(path, tensors: dict) -> None:
    """Replaces tensors of a weights file, or removes those that are None. Keeps the metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = load_file(path) | tensors
    save_file({key: t for key, t in changed.items() if t is not None}, path, metadata)


@pytest.mark.parametrize("text", [None, torch.zeros(4, 6), torch.zeros(6, 6), torch.zeros(5)])
def test_weights_with_a_damaged_label_space_are_refused(tmp_path, text):
    """No text for a dataset that has one, or not one row for each class."""
    vocabularies = [Vocabulary(name, tuple("12345")) for name in "ab"]
    label_space = LabelSpace(vocabularies, lambda names, dataset: torch.randn(len(names), 6))
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model(), label_space, METADATA)
    damage(path, {"label_space.b": text})
    with pytest.raises(InputError, match="damaged class names or text"):
        read_model(path, "scaledet")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_weights_of_another_precision(tmp_path, dtype):
    model, path = small_model(), tmp_path / "weights.safetensors"
    save_weights(path, model, small_space(5), METADATA)
    damage(path, {name: tensor.to(dtype) for name, tensor in load_file(path).items()})
    if dtype == torch.float16:
        load_weights(path, model)
        [vocabulary] = read_model(path, "scaledet")[1]
        assert vocabulary.text.dtype == torch.float32 == next(model.parameters()).dtype
    else:
        with pytest.raises(InputError, match="int32"):
            load_weights(path, model)


DAMAGED = ["cat", ["cat"], {"a": "cat"}, {"a": ["cat"]}, {"a": None}, {"a": {}}]
DAMAGED += [{"a": {"names": names}} for names in (None, [1], ["cat", "cat"])]


@pytest.mark.parametrize("names", DAMAGED)
def test_weights_with_damaged_class_names_are_refused(tmp_path, names):
    metadata = {key: json.dumps(value) for key, value in METADATA.items()}
    tensors = {"label_space.a": torch.randn(1, 6)}
    save_file(tensors, tmp_path / "a.safetensors", metadata | {"vocabularies": json.dumps(names)})
    with pytest.raises(InputError, match=r"damaged (settings|class names)"):
        read_model(tmp_path / "a.safetensors", "scaledet")


def test_weights_without_classes_are_refused(tmp_path):
    save_weights(tmp_path / "weights.safetensors", small_model(), LabelSpace([]), METADATA)
    with pytest.raises(InputError, match="without classes"):
        read_model(tmp_path, "scaledet")


def test_weights_of_the_older_layout_are_refused(tmp_path):
    """They kept the label space as the tensor "text" of the model."""
    path = tmp_path / "weights.safetensors"
    save_weights(path, small_model(), small_space(5), METADATA)
    damage(path, {"text": torch.randn(5, 6), "label_space.a": None})
    with pytest.raises(InputError, match="of an older version") as error:
        read_metadata(path, "scaledet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting, value", [("amp", "perhaps"), ("amp", 1), ("lr", "high"), ("steps", 1.5)]
)
def test_saved_settings_that_do_not_fit_are_refused(setting, value):
    with pytest.raises(InputError, match=f"the saved setting {setting} is {value!r}"):
        with_saved(scaledet.Args(), {setting: value}, [setting], "run")
    assert with_saved(scaledet.Args(), {"amp": "off", "lr": 1}, ["amp", "lr"], "run").amp == "off"


@pytest.mark.parametrize("kind", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_moments_of_another_model_are_refused(tmp_path, kind):
    def saved(width):
        model = nn.Linear(width, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        rng = [rng_states()]
        torch.save(
            {"step": 1, "optimizer": optimizer.state_dict(), "rng": rng, "ranks": 1},
            tmp_path / "state.pt",
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


@pytest.mark.parametrize(
    "words, error, line",
    [
        ("[enforce fail at inline_container.cc:671] . unexpected pos 1", OSError, "on a full disk"),
        ("PytorchStreamWriter failed writing file data/0", OSError, "as on a full disk"),
        ("CUDA error: unspecified launch failure", RuntimeError, "CUDA error"),
    ],
)
def test_full_disk_while_a_checkpoint_is_written(tmp_path, monkeypatch, words, error, line):
    """An error of another kind stays what it is."""

    def full(*_):
        raise RuntimeError(words)

    model = small_model()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(error, match=line):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        save_checkpoint(tmp_path, 1, [], model, small_space(5), optimizer, {}, keep=2)
    assert not list(tmp_path.iterdir())


def test_flags_win_over_weights_and_presets(tmp_path):
    def parse(*flags: str) -> scaledet.Args:
        return parse_args(scaledet.Args, scaledet.METHOD, scaledet.TINY, [], argv=[*flags])

    args = parse("--tiny", "--steps", "7")
    assert args.tiny and args.steps == 7 and args.backbone == "tf_efficientnet_lite0"
    assert parse().backbone == "resnet50.tv_in1k"


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


def test_sweep_removes_what_killed_writes_left(tmp_path, monkeypatch):
    """Files and folders of any name, and nothing else: another run may write below."""
    kept = {".hidden", ".a-1", "b-12-0123abcd.json", "weights.safetensors", "another run"}
    for name in kept - {"another run"}:
        (tmp_path / name).write_text("")
    (tmp_path / "another run").mkdir()
    of_another = tmp_path / "another run" / ".weights-77-0123abcd.safetensors"
    of_another.touch()
    monkeypatch.setattr(os, "replace", lambda *_: None)  # the last step of a write
    monkeypatch.setattr(shutil, "rmtree", lambda *_: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    for name in ("proposals-a-0a1b.npy", "first_batch.jpg", "checkpoint-0000002", "archive.tar.gz"):
        with atomic_path(tmp_path / name) as path:
            path.mkdir() if "checkpoint" in name else path.write_text("half")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == len(kept) + 4
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert of_another.exists()


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


def test_mean_over_ranks(tmp_path, forks):
    assert float(mean_over_ranks(torch.tensor(3.0))) == 3.0
    results = mp.Manager().dict()
    mp.start_processes(
        _mean_on_rank,
        (str(tmp_path / "store"), results),
        nprocs=2,
        start_method=forks.get_start_method(),
    )
    assert dict(results) == {0: 3.0, 1: 3.0}


def _leave_on_rank(rank: int, folder: str) -> None:
    for i in range(10):
        dist.init_process_group("gloo", init_method=f"file://{folder}/{i}", rank=rank, world_size=2)
        dist.all_reduce(torch.ones(100_000))
        leave_group()


def test_ranks_part_right_after_a_collective(tmp_path, forks):
    """With torch 2.6 they hung, more often than not."""
    ranks = [forks.Process(target=_leave_on_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _same_on_rank(rank: int, file: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module[1].running_mean += rank
    same_on_ranks(module)
    results[rank] = [tensor.tolist() for tensor in module.state_dict().values()]
    dist.destroy_process_group()


def test_ranks_get_the_same_weights_and_statistics(tmp_path, forks):
    results = mp.Manager().dict()
    mp.start_processes(
        _same_on_rank,
        (str(tmp_path / "store"), results),
        nprocs=2,
        start_method=forks.get_start_method(),
    )
    assert results[0] == results[1] and results[0][4] == [0, 0]


def _gather_on_rank(rank: int, file: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    rows = None if rank == 1 else torch.full((1 + rank, 2), float(rank))
    found = gather(rows)
    results[rank] = None if found is None else found[:, 0].tolist()
    dist.destroy_process_group()


def test_rows_of_all_ranks_begin_with_the_own_ones(tmp_path, forks):
    results = mp.Manager().dict()
    mp.start_processes(
        _gather_on_rank,
        (str(tmp_path / "store"), results),
        nprocs=3,
        start_method=forks.get_start_method(),
    )
    assert dict(results) == {0: [0, 2, 2, 2], 1: None, 2: [2, 2, 2, 0]}
    assert gather(None) is None


def test_rng_states_are_tensors():
    assert all(isinstance(state, torch.Tensor) for state in rng_states())


@pytest.mark.parametrize("method", ["metr", "omdet"])
def test_datasets_are_drawn_by_their_sizes(method, tiny_root):
    module = importlib.import_module(method)
    settings = (module.Args, method, module.TINY, module.MODEL_FIELDS)
    args = parse_args(*settings, argv=small_flags(method, 4))
    datasets = load_datasets("coco@6,o365", "train", str(tiny_root))
    sampler = module.build_dataloader(args, datasets, start=0).batch_sampler
    assert [len(d) for d in datasets] == [6, 12]
    assert sampler.edges == pytest.approx([1 / 3]) and sampler.apart
    assert all((factors == 1).all() for factors in sampler.factors)
    batches = list(itertools.islice(sampler, 9))
    resumed = module.build_dataloader(args, datasets, start=5).batch_sampler
    assert list(itertools.islice(resumed, 4)) == batches[5:]
