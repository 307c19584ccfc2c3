"""The label space of ScaleDet's paper, 2148 labels with CLIP's text, and a training step over it.

CONCORD_REAL names the folder of Detic's published tables.
"""

import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import scaledet
from common.batch import Sample, collate
from common.labels import LabelSpace, Vocabulary
from scaledet import Args, LabelTables, Model

REAL = Path(os.environ.get("CONCORD_REAL", Path(__file__).resolve().parents[2] / "shared" / "real"))
DETIC = REAL / "label_spaces" / "detic"
FILES = {
    "coco": "coco_clip_a+cname.npy",
    "lvis": "lvis_v1_clip_a+cname.npy",
    "o365": "o365_clip_a+cnamefix.npy",
    "oid500": "oid_clip_a+cname.npy",
}
SIZES = {"coco": 80, "lvis": 1203, "o365": 365, "oid500": 500}
pytestmark = pytest.mark.skipif(
    not all((DETIC / file).is_file() for file in FILES.values()),
    reason="no CLIP tables: CONCORD_REAL names the folder with label_spaces/detic",
)
ARGS = Args(
    backbone="resnet18",
    text_encoder=",".join(f"{name}={DETIC / file}" for name, file in FILES.items()),
    channels=64,
    fc_dim=128,
    rois_per_image=64,
)


@pytest.fixture(scope="module")
def space() -> LabelSpace:
    return scaledet.build_label_space(ARGS, [Vocabulary.known(name) for name in FILES])


def test_full_size_label_space(space):
    assert len(space) == 2148 and space.datasets == list(SIZES)
    assert space.text.shape == (2148, 512)
    torch.testing.assert_close(space.text.norm(dim=1), torch.ones(2148))
    for name, file in FILES.items():
        rows = torch.from_numpy(np.load(DETIC / file).astype(np.float32))
        own = space.text[space.scope(name)]
        assert len(own) == SIZES[name]
        torch.testing.assert_close(own * rows.norm(dim=1, keepdim=True), rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["minmax", "none"])
def test_full_size_similarity(space, norm):
    tables = LabelTables.of(replace(ARGS, sim_norm=norm), space.text, torch.ones(len(space)))
    cosines = scaledet.label_cosines(tables.text, torch.arange(len(space)))
    similarity = scaledet.label_similarity(cosines, tables.lowest)
    assert similarity.shape == (2148, 2148)
    torch.testing.assert_close(similarity, similarity.T)
    assert (similarity.diagonal() == 1).all() and similarity.max() == 1
    lowest = similarity.min().item()
    assert abs(lowest) < 1e-6 if norm == "minmax" else 0.3 < lowest < 0.7
    sofa = space.scope("coco").start + space.vocabularies["coco"].names.index("couch")
    near = [space.names[j].lower() for j in similarity[sofa].topk(4).indices]
    assert near[0] == "couch" and any("sofa" in name for name in near)


def test_full_size_duplicates_are_the_names_that_datasets_share(space):
    cosines = scaledet.label_cosines(space.text, torch.arange(len(space)))
    duplicates = (cosines > 0.99).fill_diagonal_(False)  # as `class_mask` finds them
    person = [
        space.scope(d).start + names.index("person")
        for d, names in lower_names(space)
        if "person" in names
    ]
    assert len(person) >= 3
    assert all(duplicates[i, j] for i in person for j in person if i != j)
    coco = space.scope("coco")
    assert not duplicates[coco, coco].any()  # no two classes of COCO mean the same


def lower_names(space):
    return [(d, [name.lower() for name in v.names]) for d, v in space.vocabularies.items()]


def synthetic(dataset: str, labels: list[int]) -> Sample:
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    corner = torch.rand(len(labels), 2) * 60
    boxes = torch.cat([corner, corner + 20 + torch.rand(len(labels), 2) * 40], 1)
    return Sample(image, dataset, "boxes", 0, 0, (128, 128), boxes, torch.tensor(labels))


def peak_memory() -> float:
    """GB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )


@pytest.mark.parametrize(
    "changes", [{}, {"neg_scope": "own", "fed_loss": True}], ids=["all", "own"]
)
def test_full_size_training_step(space, changes):
    torch.manual_seed(0)
    args, before = replace(ARGS, **changes), peak_memory()
    model = Model(args, space, pretrained=False).train()
    frequency = torch.cat(
        [torch.tensor(v.image_counts or [100] * len(v)) for v in space.vocabularies.values()]
    )
    tables = LabelTables.of(args, space.text, frequency)
    batch = collate([synthetic("lvis", [3, 1202, 3]), synthetic("oid500", [499])])
    truth = scaledet.prepare_targets(batch, space)
    assert truth[0].labels.tolist() == [83, 1282, 83] and truth[1].labels.tolist() == [2147]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    stages, predictions, losses = model(batch.images, batch.sizes, truth, space.text)
    assert len(stages[0].hidden) == 128
    for stage, prediction in zip(stages, predictions, strict=True):
        cosine, logits = prediction.cosine(), prediction.logits()
        assert cosine.shape == logits.shape == (len(stage.deltas), 2148)
    losses = scaledet.compute_losses(args, stages, predictions, losses, truth, tables)
    assert len(losses) == 3 * 3 + 3 + 1 and all(value.isfinite() for value in losses.values())
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(
        p.grad.abs().max() > 1 for p in model.parameters()
    )  # otherwise clipping is not tried
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(
        torch.equal(p, o) for p, o in zip(model.parameters(), old) if p.grad.abs().max() > 1e-6
    )
    assert peak_memory() - before < 3
