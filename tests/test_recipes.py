"""What a training asks of optimizer, schedule and loader: detectors without text, and their stages.

Those of the other methods are in the tests of each.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import small_flags
from PIL import Image
from test_data import labelled
from torch import nn

import category_extended
import domain_attention
import groupsoftmax
import unidet
from common.command import parse_args
from common.datasets import Dataset, load_datasets
from common.labels import LabelSpace, Vocabulary
from common.merges import write_groups

CPU = torch.device("cpu")
ON_DETIC = [unidet, groupsoftmax, domain_attention]  # whose base is Detic's recipe
STAGED = [unidet, category_extended]


def ids(method: ModuleType) -> str:
    return method.METHOD


class Enough(Exception):
    """The test has seen what it wants."""


def small_args(method: ModuleType, **changes):
    settings = (method.Args, method.METHOD, method.TINY, method.MODEL_FIELDS)
    args = parse_args(*settings, argv=small_flags(method.METHOD, 1))
    return replace(args, **changes)


def first_stage(method: ModuleType) -> dict:
    return {"stage": "partitioned"} if method is unidet else {}


def label_space(method: ModuleType, args, datasets: list[Dataset]) -> LabelSpace:
    if method is groupsoftmax:
        return groupsoftmax.choose_label_space(args, datasets)
    return method.build_label_space(args, [d.vocabulary for d in datasets])


def small_model(method: ModuleType, **changes) -> nn.Module:
    args = method.Args(backbone="resnet10t", channels=32, fc_dim=64, **changes)
    vocabularies = [Vocabulary("a", ("cat", "dog")), Vocabulary("b", ("bird",))]
    datasets = [SimpleNamespace(name=v.dataset, vocabulary=v, hierarchy=None) for v in vocabularies]
    return method.Model(args, label_space(method, args, datasets), pretrained=False)


# -- Detic's recipe --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tiny_root) -> list[Dataset]:
    return load_datasets("coco,o365", "train", str(tiny_root))


@pytest.mark.parametrize("method", ON_DETIC, ids=ids)
def test_recipe(method, two, tmp_path, seen, monkeypatch):
    """AdamW with weight decay 1e-4, gradients clipped by value at 1, lr scaled to the batch."""
    schedule = method.learning_rate

    def spy(step, *settings):
        if step:
            raise Enough
        seen["schedule"] = settings
        return schedule(step, *settings)

    monkeypatch.setattr(method, "learning_rate", spy)
    sizes = {"base_batch_size": 4, "lr": 1e-3, "steps": 90_000, "warmup_steps": 10_000}
    args = small_args(method, **sizes, **first_stage(method), checkpoint_every=1000)
    with pytest.raises(Enough):
        method.train(args, two, label_space(method, args, two), tmp_path, CPU)
    assert seen == {
        "settings": {"lr": 5e-4, "weight_decay": 1e-4, "fused": True},
        "clip": 1.0,
        "schedule": (5e-4, 90_000, 10_000, 1e-4),
    }


@pytest.mark.parametrize("method", ON_DETIC, ids=ids)
@pytest.mark.parametrize(("steps", "expected"), [(None, (180_000, 10_000)), (4500, (4500, 500))])
def test_steps_and_warmup(method, steps, expected, two, tmp_path, monkeypatch):
    """90,000 steps for each dataset. At most a ninth of the steps is warmup."""

    def spy(step, lr, *settings):
        assert settings == (*expected, 1e-4)
        raise Enough

    monkeypatch.setattr(method, "learning_rate", spy)
    args = small_args(method, steps=steps, warmup_steps=10_000, **first_stage(method))
    with pytest.raises(Enough):
        method.train(args, two, label_space(method, args, two), tmp_path, CPU)


OF_DETIC = {
    "image_size": 640,
    "test_size": 800,
    "batch_size": 64,
    "steps": None,
    "lr": 2e-4,
    "base_batch_size": 64,
    "warmup_steps": 10_000,
    "jitter": (0.1, 2.0),
    "one_class_per_proposal": False,
    "channels": 256,
    "fc_dim": 1024,
    "rois_per_image": 512,
}
OWN = {
    unidet: {
        "stage": "all",
        "label_space": "",
        "class_aware": "o365,oid,oid500",
        "tau": 0.2,
        "lam": 0.5,
    },
    groupsoftmax: {"groups": "", "repeat_threshold": 0.001},
    domain_attention: {"attention": True, "adapters": 0, "less_blocks": False},
}


@pytest.mark.parametrize("method", ON_DETIC, ids=ids)
def test_defaults(method):
    defaults = vars(method.Args())
    expected = OF_DETIC | OWN[method]
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize("method", ON_DETIC, ids=ids)
def test_start_of_the_classifiers_and_number_of_proposals(method):
    """Weights of 0.01 in all. A softmax starts uniform, sigmoids at 0.01."""
    model = small_model(method)
    for classifier in model.classifiers:
        assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.3)
        score = 0.5 if method is groupsoftmax else 0.01
        assert classifier.bias.sigmoid().tolist() == pytest.approx([score] * len(classifier.bias))
    proposer = model.rpn if method is groupsoftmax else model.centernet
    per_level = (2000, 1000) if method is groupsoftmax else (4000, 1000)
    assert (proposer.pre_nms, proposer.post_nms) == (per_level, (2000, 256))


@pytest.mark.parametrize("method", ON_DETIC, ids=ids)
@pytest.mark.parametrize("one_class", [False, True])
def test_classes_of_a_proposal(method, one_class, monkeypatch):
    """All that pass the threshold, unless one is asked for."""
    model = small_model(method, one_class_per_proposal=one_class)
    boxes, scores = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.9, 0.8]])
    monkeypatch.setattr(model, "detect", lambda *given: ([boxes], [scores]))
    space = LabelSpace([Vocabulary("a", ("cat", "dog"))])
    [found] = method.predict_images(model, [Image.new("RGB", (32, 32))], space)
    assert found["labels"].tolist() == ([0] if one_class else [0, 1])


def test_loader_of_groupsoftmax(tmp_path, monkeypatch):
    """Repeat factors over all images, Detic's jitter, and a start after the images seen so far."""
    seen = {}

    def spy(mixture, args, least=None, **sampling):
        seen.update(sampling, transforms=mixture.transforms)

    monkeypatch.setattr(groupsoftmax, "make_loader", spy)
    datasets = [labelled("a", [[0]] * 3, 1), labelled("b", [[0]], 1)]
    settings = {"repeat_threshold": 1.0, "jitter": (0.5, 1.5), "image_size": 320}
    args = groupsoftmax.Args(output=str(tmp_path), batch_size=2, seed=7, **settings)
    groupsoftmax.build_dataloader(args, datasets, 5)
    sampler = seen["sampler"]
    assert sampler.factors == pytest.approx([np.sqrt(4 / 3)] * 3 + [2])
    assert (sampler.seed, sampler.start, seen["batch_size"]) == (7, 10, 2)
    for jitter in seen["transforms"].values():
        assert (jitter.size, jitter.scale) == (320, (0.5, 1.5))


# -- The category-extended detector's --------------------------------------------------------------


def test_recipe_of_the_category_extended_detector(two, tmp_path, monkeypatch):
    """SGD with momentum, the norm of the gradients clipped at 35, a warmup from 1e-3."""
    seen = {}
    method, schedule = category_extended, category_extended.stepped_learning_rate
    sgd, clip = torch.optim.SGD, nn.utils.clip_grad_norm_

    def spy_sgd(parameters, **settings):
        seen["settings"] = settings
        return sgd(parameters, **settings)

    def spy_clip(parameters, norm):
        seen["clip"] = norm
        return clip(parameters, norm)

    def spy_schedule(step, *settings):
        if step:
            raise Enough
        seen["schedule"] = settings
        return schedule(step, *settings)

    monkeypatch.setattr(torch.optim, "SGD", spy_sgd)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(method, "stepped_learning_rate", spy_schedule)
    sizes = {"base_batch_size": 4, "lr": 1e-3, "steps": 900, "warmup_steps": 500}
    args = small_args(method, **sizes, optimizer="sgd", stage="first", checkpoint_every=1000)
    with pytest.raises(Enough):
        method.train(args, two, label_space(method, args, two), tmp_path, CPU)
    assert seen == {
        "settings": {"lr": 5e-4, "momentum": 0.9, "weight_decay": 1e-4, "fused": True},
        "clip": 35.0,
        "schedule": (5e-4, 900, 500, 1e-3),
    }


def test_defaults_of_the_category_extended_detector():
    expected = {
        "image_size": 800,
        "test_size": 800,
        "batch_size": 16,
        "steps": None,
        "lr": 0.01,
        "base_batch_size": 16,
        "warmup_steps": 500,
        "optimizer": "sgd",
        "stage": "all",
        "negatives": "conflict_free",
        "pseudo_boxes": "",
        "pseudo_negatives": "weighted",
        "dropout_runs": 20,
        "least_confidence": 0.525,
        "channels": 256,
        "convs": 4,
        "norm": "none",
        "frozen": "stem",
    }
    defaults = vars(category_extended.Args())
    assert {name: defaults[name] for name in expected} == expected


# -- Stages ----------------------------------------------------------------------------------------


class Stage:
    """Starts a stage of a method with stand-ins, and notes what it does before its first step."""

    def __init__(self, method: ModuleType, monkeypatch):
        self.method, self.loaded, self.models = method, [], []
        replaced = {
            "RunLog": self.run_log,
            "build_dataloader": self.loader,
            "load_weights": lambda path, model: self.loaded.append(str(path)),
            "load_checkpoint": lambda path, optimizer: int(path.name[-7:]),
            "last_checkpoint": self.sound,
            "learning_rate": self.schedule,
            "stepped_learning_rate": self.schedule,
        }
        for name, stand_in in replaced.items():
            if hasattr(method, name):
                monkeypatch.setattr(method, name, stand_in)

    def run_log(self, args, folder, last, start, model, *rest) -> SimpleNamespace:
        self.last, self.start = last, start
        self.models.append(model)
        return SimpleNamespace(batches=lambda loader, *given: enumerate(loader, start + 1))

    def sound(self, folder, replay, after) -> Path | None:
        is_later = self.checkpoint and int(self.checkpoint.name[-7:]) > after
        return self.checkpoint if is_later else None

    def loader(self, args, datasets, start, *device) -> list:
        self.skipped = start
        return [SimpleNamespace(to=lambda device: None)]

    def schedule(self, *settings) -> None:
        self.scheduled = settings
        raise Enough

    def begin(self, steps: range, checkpoint: str | None = None) -> None:
        """Starts the steps of a run whose last checkpoint is given."""
        self.checkpoint = Path(checkpoint) if checkpoint else None
        args = small_args(self.method, weights="given", warmup_steps=500)
        datasets = [labelled("a", [[0]] * 3, 1), labelled("b", [[0]], 1)]
        space = label_space(self.method, args, datasets)
        first = () if self.method is unidet else ("plain", steps)
        last = (steps,) if self.method is unidet else ()
        with pytest.raises(Enough):
            self.method.train_stage(args, *first, datasets, space, *last, Path(), CPU, ())


@pytest.fixture(params=STAGED, ids=ids)
def stage(request, monkeypatch) -> Stage:
    return Stage(request.param, monkeypatch)


@pytest.mark.parametrize(
    ("steps", "checkpoint", "loaded", "start"),
    [
        (range(90), None, ["given"], 0),
        (range(90), "checkpoint-0000005", ["checkpoint-0000005"], 5),
        (range(90, 180), None, [], 90),
        (range(90, 180), "checkpoint-0000090", [], 90),  # of the stage before
        (range(90, 180), "checkpoint-0000097", ["checkpoint-0000097"], 97),
    ],
)
def test_a_stage_begins_anew_or_goes_on(stage, steps, checkpoint, loaded, start):
    """Its images and its learning rate too. --weights is for the first stage alone."""
    stage.begin(steps, checkpoint)
    assert stage.loaded == loaded
    assert (stage.start, stage.last) == (start, steps.stop)
    assert stage.skipped == start - steps.start
    warmup = (10, 1e-4) if stage.method is unidet else (500, 1e-3)
    assert stage.scheduled[0] == start - steps.start
    assert stage.scheduled[2:] == (90, *warmup)


def test_a_stage_begins_alike_whatever_came_before(stage):
    for seed in (1, 2):
        torch.manual_seed(seed)
        stage.begin(range(90, 180))
    one, other = (dict(model.named_parameters()) for model in stage.models)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", STAGED, ids=ids)
@pytest.mark.parametrize(
    ("replay", "expected"), [(0, range(5, 10)), (5, range(5)), (6, range(5, 10))]
)
def test_a_replay_is_of_the_stage_of_its_step(method, replay, expected, tmp_path, monkeypatch):
    """What the first stage has left would skip it, but for a replay of one of its steps."""
    begun = []

    def spy(*given):
        begun.extend(part for part in given if isinstance(part, range))
        raise Enough

    datasets = [labelled("a", [[0]] * 3, 1), labelled("b", [[0]], 1)]
    monkeypatch.setattr(method, "train_stage", spy)
    if method is unidet:
        write_groups(tmp_path / "label_space.csv", ["a", "b"], [], [])
    else:
        monkeypatch.setattr(method, "are_complete", lambda *given: True)
        monkeypatch.setattr(method, "with_pseudo_boxes", lambda dataset, *given: dataset)
    args = small_args(method, steps=5, replay=replay)
    with pytest.raises(Enough):
        method.train(args, datasets, label_space(method, args, datasets), tmp_path, CPU)
    assert begun == [expected]


def test_twelve_epochs_are_the_default_of_the_category_extended_detector(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(category_extended, "train_stage", lambda *given: begun.append(given[2]))
    datasets = [labelled("a", [[0]] * 20, 1), labelled("b", [[0]] * 5, 1)]
    args = category_extended.Args(batch_size=4, stage="first")
    space = label_space(category_extended, args, datasets)
    category_extended.train(args, datasets, space, tmp_path, CPU)
    assert begun == [range(12 * 25 // 4)]
