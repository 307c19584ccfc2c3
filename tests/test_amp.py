"""What --amp does: the layers run in bfloat16, all else in float32, and a run keeps its choice."""

import importlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from conftest import METHODS, small_runs
from torch import nn

import scaledet
from common import cascade, centernet, distributed, oln, retinanet, rpn
from common.batch import collate
from common.checkpoint import save_weights
from common.clip_resnet import RegionClassifier
from common.command import parse_args, saved_args
from common.dataset_heads import DatasetHeads
from common.distributed import amp_context, setup_device
from common.labels import LabelSpace, Vocabulary
from common.pixel_decoder import PixelDecoder
from common.process import unlock
from common.runlog import RunLog, make_run_folder
from common.targets import Targets
from common.text_classifier import TextClassifier
from common.transformer import QueryHead

SIZES = [(64, 96), (60, 80)]
BOXES = [torch.tensor([[4.0, 6, 40, 50], [10, 8, 60, 33]]), torch.tensor([[1.0, 2, 70, 59]])]
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# the layers that stay in float32: where points are sampled, and what a temperature divides
EXACT = ("sampling_offsets", "class_embed", "adapter.1")
EXACT += ("task_mlp.0", "task_mlp.2", "heads.layers.0")  # token ids; a classifier per dataset


@contextmanager
def outputs_of_layers() -> Iterator[dict[nn.Module, torch.dtype]]:
    """Yields {layer: data type of what it returned last}, of all layers that run in the block."""
    found = {}

    def note(module, given, output):
        if isinstance(module, LAYERS):
            found[module] = output.dtype

    hook = nn.modules.module.register_module_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()


# -- heads -----------------------------------------------------------------------------------------


def maps(strides: list[int]) -> list[torch.Tensor]:
    """Feature maps (2, 32, 64 / stride, 96 / stride)."""
    return [torch.randn(2, 32, max(64 // s, 1), max(96 // s, 1)) for s in strides]


def space() -> LabelSpace:
    return LabelSpace([Vocabulary("a", ("cat", "sky"), text=torch.eye(2, 8))])


def region_classifier():
    network = RegionClassifier("resnet10t", 8, 32, 16, False, "on")
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    return network(images, SIZES, BOXES)


def oln_network():
    network = oln.OLN("resnet10t", 32, 16, False, "on").eval()
    return network(torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8), SIZES)


P = [8, 16, 32, 64, 128]
HEADS = {
    "CenterNetHead": lambda: centernet.CenterNetHead(32, 5)(maps(P)),
    "BoxStage": lambda: cascade.BoxStage(32, 16)(torch.randn(3, 32, 7, 7)),
    "MaskHead": lambda: cascade.MaskHead(32, 2)(maps(P), BOXES),
    "TextClassifier": lambda: TextClassifier(16, 8, 0.02, -4.6)(
        torch.randn(3, 16), torch.eye(2, 8)
    ).logits(),
    "DatasetHeads": lambda: DatasetHeads(16, space())(torch.randn(2, 3, 16), space()),
    "RPN of classes": lambda: rpn.RPN(32, torch.tensor([0, 1]), (9, 9), (9, 9)).head(maps(P)),
    "RPN of OLN": lambda: oln.RPN(32).head(maps(oln.STRIDES)),
    "OLN": oln_network,
    "RetinaHead": lambda: retinanet.RetinaHead(32, 4)(maps(P)),
    "RegionClassifier": region_classifier,
    "QueryHead": lambda: QueryHead(32)(torch.randn(2, 3, 32)),
    "PixelDecoder": lambda: PixelDecoder([32] * 4, 32, 1, 48)(maps([4, 8, 16, 32])),
}


def tensors(found) -> list[torch.Tensor]:
    """All tensors in nested lists and tuples."""
    if torch.is_tensor(found):
        return [found]
    return [tensor for part in found for tensor in tensors(part)]


@pytest.mark.parametrize("name", HEADS)
def test_a_head_returns_float32(name):
    with outputs_of_layers() as seen, torch.autocast("cpu", torch.bfloat16):
        found = tensors(HEADS[name]())
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert torch.bfloat16 in set(seen.values())


def test_a_temperature_does_not_multiply_a_rounding_error():
    """The logits are those of the rounded embedding, computed in float32."""
    torch.manual_seed(0)
    classifier = TextClassifier(16, 8, 0.02, 0.0)
    hidden, text = torch.randn(50, 16), nn.functional.normalize(torch.randn(30, 8))
    with torch.autocast("cpu", torch.bfloat16):
        embedded = classifier.embedding(hidden).float()
        logits = classifier(hidden, text).logits()
    expected = nn.functional.normalize(embedded) @ text.T / 0.02
    assert torch.equal(logits, expected)


# -- boxes -----------------------------------------------------------------------------------------


def targets() -> list[Targets]:
    return [Targets(boxes, torch.arange(len(boxes)) % 2) for boxes in BOXES]


def of_centernet():
    network = centernet.CenterNet(32, P, (50, 50), (20, 20))
    grid = centernet.Grid.of(maps(P), P)
    logits = torch.randn(2, len(grid.points)) * 3
    ltrb = torch.rand(2, len(grid.points), 4) * 4
    losses = network.losses(grid, logits, ltrb, BOXES)
    return [*losses.values()], network.proposals(grid, logits.sigmoid(), ltrb)


def of_cascade():
    network = cascade.Cascade(32, 16)
    regions, matched = cascade.match_regions(BOXES, targets(), 0.6, 8)
    count = sum(map(len, regions))
    output = cascade.StageOutput(1, regions, torch.zeros(count, 16), torch.randn(count, 4), matched)
    return network.refine(output, SIZES), cascade.loss_box_reg(output)


def of_rpn():
    network = rpn.RPN(32, torch.tensor([0, 1]), (50, 50), (20, 20))
    anchors = network.anchors(maps(P))
    logits = [torch.randn(len(a), 3) for a in anchors]
    deltas = [torch.randn(len(a), 4) for a in anchors]
    joined = (torch.cat(anchors), torch.cat(logits)[None], torch.cat(deltas)[None])
    sampled = network.sample(*joined, SIZES[:1], targets()[:1])
    scores = [rpn.object_score(level) for level in logits]
    return network.propose(anchors, scores, deltas, SIZES[0]), sampled.loss_box, sampled.logits


def of_oln():
    network = oln.RPN(32)
    anchors = network.anchors(maps(oln.STRIDES))
    tblr = [torch.rand(len(a), 4) for a in anchors]
    logits = [torch.randn(len(a)) for a in anchors]
    joined = (torch.cat(anchors), torch.cat(tblr)[None], torch.cat(logits)[None])
    losses = network.losses(*joined, BOXES[:1], SIZES[:1])
    return [*losses.values()], network.proposals(anchors, tblr, logits, SIZES[0])


def of_retinanet():
    anchors = torch.cat(retinanet.grid_anchors(maps(P), P))
    return retinanet.decode_corners(torch.randn(len(anchors), 4), anchors)


@pytest.mark.parametrize("arithmetic", [of_centernet, of_cascade, of_rpn, of_oln, of_retinanet])
def test_boxes_and_their_losses_do_not_depend_on_autocast(arithmetic):
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(tensors(arithmetic()))
    assert all(torch.equal(rounded, exact) for rounded, exact in zip(*found, strict=True))
    assert all(len(exact.shape) == 0 or len(exact) for exact in found[1])


# -- models ----------------------------------------------------------------------------------------


class Done(Exception):
    """The first step has its losses."""


def first_step(flags: list[str], method: str, call, monkeypatch) -> tuple[dict, list[dict]]:
    """The losses of the first step of a training, and {layer: data type of what it returned}.

    The second are of the training step, and of a prediction.
    """
    module = importlib.import_module(method)
    losses, models, seen = {}, [], []

    def check(run_log, found, step, batch):
        losses.update(found)
        model, label_space, *_ = run_log.content
        models.append(model)
        label_space = label_space() if callable(label_space) else label_space
        with outputs_of_layers() as predicted:
            module.predict(model, collate(batch.samples[:1]), label_space)
        seen.append(predicted)
        raise Done

    monkeypatch.setattr(RunLog, "check_finite", check)
    with outputs_of_layers() as trained, pytest.raises(Done):
        call(*flags, method=method)
    names = {module: name for name, module in models[0].named_modules()}
    both = [trained, *seen]
    return losses, [{names[m]: dtype for m, dtype in one.items() if m in names} for one in both]


TRAININGS = [(method, []) for method in METHODS if method not in ("scaledet", "unidetector")]
# random regions are almost alike: at tau = 0.02, all logits would move with their mean
TRAININGS += [("scaledet", ["--tau", "0.2"])]
TRAININGS += [("unidetector", []), ("unidetector", ["--structure", "unified", "--steps", "0"])]


@pytest.mark.parametrize("method, more", TRAININGS, ids=str)
def test_all_layers_of_a_model_run_in_bfloat16(
    method, more, call, monkeypatch, tmp_path, tiny_root
):
    found = {}
    for amp in ("off", "on"):
        flags, *_ = small_runs(method, tmp_path / amp, tiny_root, steps=1)
        found[amp] = first_step([*flags, *more, "--amp", amp], method, call, monkeypatch)
    exact, in_float32 = found["off"]
    assert all(set(seen.values()) == {torch.float32} for seen in in_float32)
    losses, in_bfloat16 = found["on"]
    for seen in in_bfloat16:
        others = [name for name, dtype in seen.items() if dtype != torch.bfloat16]
        assert all(name.endswith(EXACT) for name in others), others
        assert len(seen) > len(others) + 20
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(loss.isfinite() for loss in losses.values())
    # with random weights, rounding selects other cells and regions: up to .1 in the seeds tried
    assert float(losses["loss"]) == pytest.approx(float(exact["loss"]), rel=0.12)


# -- the choice ------------------------------------------------------------------------------------


def precision(amp: str, monkeypatch, caplog, **tests) -> tuple[str, list[str]]:
    """--amp as `setup_device` resolves it, and what it logs. tests: answers of torch.cpu"""
    for name, answer in tests.items():
        monkeypatch.setattr(torch.cpu, f"_test_{name}", lambda answer=answer: answer, raising=False)
    answers = {name: f"_test_{name}" for name in ("AMX", "AVX512_BF16")}
    monkeypatch.setattr(distributed, "CPU_TESTS", answers)
    args = scaledet.Args(device="cpu", amp=amp)
    with caplog.at_level(logging.INFO, logger="concord"):
        device = setup_device(args)
    enabled = args.amp == "on"
    for choice in (amp, args.amp):
        with amp_context(choice, device):
            assert torch.is_autocast_enabled("cpu") == enabled
    return args.amp, [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "amp, tests, line",
    [
        ("auto", {"AMX": True}, "bfloat16: this CPU has AMX (--amp off for float32)"),
        (
            "auto",
            {"AMX": False, "AVX512_BF16": True},
            "bfloat16: this CPU has AVX512_BF16 (--amp off for float32)",
        ),
        ("auto", {"AMX": False}, "float32: this CPU is not built for bfloat16"),
        ("auto", {}, "float32: this CPU is not built for bfloat16"),  # a torch without the tests
        ("on", {"AMX": False}, "bfloat16: --amp on"),
        ("off", {"AMX": True}, "float32: --amp off"),
    ],
)
def test_the_log_says_which_precision_and_why(amp, tests, line, monkeypatch, caplog):
    found, lines = precision(amp, monkeypatch, caplog, **tests)
    assert found == ("on" if line.startswith("bfloat16") else "off")
    assert lines == [line]


def test_a_resumed_run_keeps_its_precision_on_another_machine(tmp_path, monkeypatch, caplog):
    args = scaledet.Args(device="cpu", output=str(tmp_path))
    monkeypatch.setattr(torch.cpu, "_test_AMX", lambda: True, raising=False)
    monkeypatch.setattr(distributed, "CPU_TESTS", {"AMX": "_test_AMX"})
    setup_device(args)
    make_run_folder(args, "scaledet", space())
    unlock()
    (tmp_path / "metrics.jsonl").touch()  # it has begun
    monkeypatch.setattr(distributed, "CPU_TESTS", {})
    for more, amp in ([], "on"), (["--amp", "auto"], "off"):
        flags = ["--resume", str(tmp_path), *more]
        args = parse_args(scaledet.Args, "scaledet", {}, [], argv=flags)
        setup_device(args)
        assert args.amp == amp
        with caplog.at_level(logging.INFO, logger="concord"):
            make_run_folder(args, "scaledet", space())
        unlock()
        assert json.loads((tmp_path / "args.json").read_text())["amp"] == amp
        assert ("--amp off instead of on" in caplog.text) == (amp == "off")


@pytest.mark.parametrize("saved, loaded", [("on", "auto"), ("auto", "auto"), ("off", "off")])
def test_bfloat16_depends_on_the_machine_but_float32_stays(saved, loaded):
    metadata = {"args": asdict(scaledet.Args(amp=saved, lr=1.0)), "file": "weights"}
    args = saved_args(scaledet.Args, metadata)
    assert (args.amp, args.lr) == (loaded, 1.0)


@pytest.mark.parametrize(
    "flags, amp",
    [
        (["--eval-only"], "off"),
        (["--predict", "a.jpg"], "off"),
        (["--eval-only", "--amp", "on"], "on"),
        (["--datasets", "coco"], "auto"),  # a training of its own
    ],
)
def test_results_of_a_float32_training_stay_in_float32(flags, amp, tmp_path):
    weights = tmp_path / "weights.safetensors"
    metadata = {"method": "scaledet", "args": asdict(scaledet.Args(amp="off"))}
    save_weights(weights, nn.Linear(1, 1), space(), metadata)
    settings = (scaledet.Args, scaledet.METHOD, scaledet.TINY, scaledet.MODEL_FIELDS)
    args = parse_args(*settings, argv=["--weights", str(weights), *flags])
    assert args.amp == amp
