"""--compile: few graphs, none of them broken, and the same results."""

import importlib
import json
import logging
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import METHODS, small_runs
from torch._dynamo.utils import counters

from common import compiling
from common.compiling import Compiling, compilable
from common.process import Process

# the long runs alone compile retinanet.py, rpn.py, oln.py and clip_resnet.py
QUICK = {"scaledet", "detic", "dataseg", "lmseg"}
# the symbolic sizes of this test's backbone take minutes, so batches have few shapes
DATASETS = {"lmseg": "ade20k,cityscapes", "detic": "coco-base"}
# with one layer, the class loss has one row of predictions, and runs as it is
TWO_LAYERS = {"metr", "omdet", "plaindet"}


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs of each compiled function. They run as they are, without a compiler."""
    found = Counter()
    compile_function = torch.compile

    def counting(function, dynamic):
        def count(graph, inputs):
            found[function.__qualname__] += 1
            return graph.forward

        return compile_function(function, dynamic=dynamic, backend=count)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(Compiling, "on", True)
    monkeypatch.setattr(Compiling, "few_shapes", False)
    compiling._compiled.cache_clear()
    counters.clear()
    yield found
    compiling._compiled.cache_clear()
    torch._dynamo.reset()


def train(method: str, folder, tiny_root, monkeypatch, compiled: str, steps: int) -> list[dict]:
    """Trains without an evaluation. Returns the lines of metrics.jsonl."""
    flags = small_runs(method, folder, tiny_root, steps)[0]
    flags += ["--compile", compiled]
    if method in DATASETS:
        flags += ["--datasets", DATASETS[method]]
    if method in TWO_LAYERS:
        flags += ["--decoder-layers", "2"]
    module = importlib.import_module(method)
    monkeypatch.setattr(module, "evaluate", lambda *_: {})
    monkeypatch.setattr(module, "evaluation_datasets", lambda *_, **__: [])
    monkeypatch.setattr("sys.argv", [f"{method}.py", *flags])
    monkeypatch.setattr(Process, "training", None)
    module.main()
    (metrics,) = folder.parent.glob(f"{folder.name}*/metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.long) for m in METHODS]
)
def test_few_graphs_and_no_break(method, graphs, tiny_root, tmp_path, monkeypatch):
    """Numbers of boxes, regions and masks differ in each step."""
    train(method, tmp_path / "run", tiny_root, monkeypatch, "on", steps=10)
    assert max(graphs.values()) <= 2
    assert not counters["graph_break"]
    assert not compiling._refused
    assert "Backbone.forward" in graphs and any("loss" in name for name in graphs)


def test_a_compiled_training_has_the_same_losses(graphs, tiny_root, tmp_path, monkeypatch):
    compiled, plain = (
        train("scaledet", tmp_path / choice, tiny_root, monkeypatch, choice, steps=3)
        for choice in ("on", "off")
    )
    assert graphs
    for one, other in zip(compiled, plain, strict=True):
        for line in (one, other):
            del line["img_per_s"]
        assert one == pytest.approx(other, rel=1e-4)


@compilable
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@compilable(of_images=True)
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_what_runs_as_it_is(graphs):
    square(torch.ones(0, 3))
    square(torch.ones(1, 3))
    with torch.no_grad():
        square(torch.ones(4, 3))
    Compiling.on = False
    square(torch.ones(4, 3))
    assert not graphs


def test_one_graph_for_any_number_of_rows(graphs):
    for rows, columns in ((4, 4), (7, 4), (2, 9), (1000, 5)):
        assert torch.equal(square(torch.full((rows, columns), 3.0)), torch.full((rows, columns), 9))
    assert graphs == {"square": 1}


@pytest.mark.parametrize("few, count", [(True, 2), (False, 1)])
def test_two_shapes_of_images_have_a_graph_each(few, count, graphs):
    Compiling.few_shapes = few
    for side in (8, 16, 8, 16):
        twice(torch.ones(2, side, side))
    assert graphs == {"twice": count}


def test_what_cannot_be_compiled_runs_and_says_so(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(Compiling, "on", True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    compiling._compiled.cache_clear()
    monkeypatch.setattr(compiling, "_refused", set())
    with caplog.at_level(logging.WARNING, "concord"):
        for _ in range(2):
            assert torch.equal(square(torch.full((3,), 3.0)), torch.full((3,), 9.0))
    (line,) = caplog.messages
    assert "square runs uncompiled" in line and "no compiler here" in line
    compiling._compiled.cache_clear()


def test_inductor_gives_the_same_loss(monkeypatch):
    import scaledet

    monkeypatch.setattr(Compiling, "on", True)
    logits = torch.randn(5, 7, requires_grad=True)
    labels = torch.tensor([0, 6, -1, -1, 3])
    mask = (torch.rand(5, 7) > 0.5).float()
    compiled = scaledet.loss_hard_label(logits, labels, mask)
    plain = scaledet.loss_hard_label.__wrapped__(logits, labels, mask)
    torch.testing.assert_close(compiled, plain)
    one, other = (torch.autograd.grad(loss, logits) for loss in (compiled, plain))
    torch.testing.assert_close(one, other)
