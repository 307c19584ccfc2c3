"""UniDet against tensors recorded from the official implementation.

CONCORD_PARITY names the folder. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from parity import (
    case,
    check,
    report,  # noqa: F401 (a fixture)
)
from test_data import labelled
from torch import nn

import unidet
from common.class_ap import CrossAP50, Detections, Truth
from common.evaluation import ancestors
from common.labels import LabelSpace, Vocabulary
from common.shares import BucketBatchSampler, image_weights

SMALL = unidet.Args(backbone="resnet10t", channels=32, fc_dim=24)


def recorded_boxes(tensors: dict, prefix: str) -> np.ndarray:
    """(N, 4) xyxy of stored x, y, w, h."""
    boxes = tensors[f"{prefix}.boxes_xywh.fp64"].clone()
    boxes[:, 2:] += boxes[:, :2]
    return boxes.numpy()


def test_ap_of_any_class_on_any_other():
    tensors, record = case("unidet_label_space")
    config = record["config"]
    for dataset in config["datasets"]:
        offset = config["global_offset"][dataset]
        fields = ("image", "class", "score.fp64")
        images, labels, scores = (tensors[f"pred.{dataset}.{f}"].numpy() for f in fields)
        boxes = recorded_boxes(tensors, f"pred.{dataset}")
        found = Detections(images, labels, scores, boxes).take(scores > config["score_threshold"])
        recorded = tensors[f"ap.{dataset}"]
        truth_boxes = recorded_boxes(tensors, f"gt.{dataset}")
        ours = torch.zeros_like(recorded)
        for j in range(recorded.shape[1]):
            own = (tensors[f"gt.{dataset}.class"] == j).numpy()
            crowd = tensors[f"gt.{dataset}.iscrowd"].numpy().astype(bool)[own]
            truth = Truth(tensors[f"gt.{dataset}.image"].numpy()[own], truth_boxes[own], crowd)
            for i in range(len(recorded)):
                local = i - offset
                if 0 <= local < recorded.shape[1] and local != j:
                    continue  # the dataset's own other classes are not computed
                ours[i, j] = truth.ap50(found.of_classes((i,)))
        check(f"AP on {dataset}", ours, recorded)


def official_space(sizes: dict[str, int]) -> list[Vocabulary]:
    return [Vocabulary(d, tuple(f"{d} {i}" for i in range(n))) for d, n in sizes.items()]


def test_loss_of_each_dataset_and_merged_heads():
    tensors, record = case("unidet")
    config = record["config"]
    sizes = dict(zip(config["datasets"], config["num_classes"]))
    vocabularies = official_space(sizes)
    space = LabelSpace(vocabularies)
    heads = [f"box_predictor.cls_score.{k}" for k in range(len(sizes))]
    weight, bias = (
        torch.cat([tensors[f"{head}.{kind}"][:-1] for head in heads]) for kind in ("weight", "bias")
    )  # without the background, which the loss leaves out
    features = tensors["roi_features"]
    for vocabulary in vocabularies:
        dataset = vocabulary.dataset
        tree = None
        if dataset == "oid":
            parents = {int(child): parent for child, parent in config["oid_parent_of"].items()}
            vocabulary = replace(vocabulary, ids=tuple(range(len(vocabulary))))
            tree = {"Subcategory": children(None, parents, len(vocabulary))}
            upward = torch.from_numpy(ancestors(vocabulary, tree)).float()
            own = tensors["hierarchy.is_parents"] + torch.eye(len(upward))
            check("ancestors", upward, own.clamp(max=1))
        part = SimpleNamespace(name=dataset, vocabulary=vocabulary, hierarchy=tree)
        table = unidet.Supervision.of(part, space, torch.device("cpu"))
        logits = (features @ weight.T + bias).requires_grad_()
        check(f"{dataset} logits", logits[:, table.columns], tensors[f"logits.{dataset}"][:, :-1])
        count = len(vocabulary)
        classes = torch.cat(
            [tensors[f"{dataset}.image{i}.gt_classes"] for i in range(len(config["num_proposals"]))]
        )
        labels = torch.where(classes == count, -1, classes)
        loss = unidet.loss_classes(logits, labels, table)
        loss.backward()
        check(f"{dataset} loss", loss, record[dataset]["loss_cls"])
        gradient = logits.grad[:, table.columns]
        check(f"{dataset} gradient", gradient, tensors[f"{dataset}.grad_logits"][:, :-1], 1e-3)
    groups = {}
    for vocabulary in vocabularies:
        unified = tensors[f"unified.label_map.{vocabulary.dataset}"].tolist()
        for id, name in zip(unified, vocabulary.names):
            groups.setdefault(id, {})[vocabulary.dataset] = name
    merged = LabelSpace(vocabularies, merge=list(groups.values()))
    model = unidet.Model(SMALL, space, pretrained=False)
    for classifier in model.classifiers:
        classifier.weight.data, classifier.bias.data = weight, bias
    ours = unidet.merge_heads(model, merged).classifiers[0](features)
    for vocabulary in vocabularies:
        unified = tensors[f"unified.label_map.{vocabulary.dataset}"]
        columns = merged.columns(vocabulary.dataset)
        check("merged heads", ours[:, columns], tensors["unified.logits"][:, unified])


def children(parent: int | None, parents: dict[int, int], count: int) -> list[dict]:
    own = [i for i in range(count) if parents.get(i) == parent]
    return [{"LabelName": i, "Subcategory": children(i, parents, count)} for i in own]


def test_hierarchy_in_which_a_class_has_two_parents():
    tensors, record = case("unidet_hierarchy_loss")
    by_id = {category["id"]: category for category in record["categories"]}
    ordered = [by_id[id] for id in record["contiguous_order"]]
    names, ids = (tuple(c[key] for c in ordered) for key in ("name", "freebase_id"))
    vocabulary = Vocabulary("oid", names, ids=ids)
    labels = torch.where(tensors["gt_classes"] == len(names), -1, tensors["gt_classes"])
    for variant, tree in (("pos_parents", record["hierarchy_tree"]), ("plain", None)):
        part = SimpleNamespace(name="oid", vocabulary=vocabulary, hierarchy=tree)
        table = unidet.Supervision.of(part, LabelSpace([vocabulary]), torch.device("cpu"))
        if tree:
            check("weights", table.weight, tensors["hierarchy.weight.pos_parents"])
        logits = tensors["logits"][:, :-1].clone().requires_grad_()
        loss = unidet.loss_classes(logits, labels, table)
        loss.backward()
        check(f"{variant} loss", loss, record["losses"][variant])
        check(f"{variant} gradient", logits.grad, tensors[f"grad.{variant}"][:, :-1], 1e-3)


def test_unified_head_is_trained_by_the_columns_of_a_dataset():
    tensors, record = case("unidet_unified_head")
    config = record["config"]
    label_map = record["label_map"]
    vocabularies = official_space({d: len(label_map[d]) for d in config["datasets"]})
    groups = {}
    for vocabulary in vocabularies:
        for id, name in zip(label_map[vocabulary.dataset], vocabulary.names):
            groups.setdefault(id, {})[vocabulary.dataset] = name
    space = LabelSpace(vocabularies, merge=list(groups.values()))
    order = [None] * len(space)  # the official column of each of ours
    for vocabulary in vocabularies:
        columns = space.columns(vocabulary.dataset).tolist()
        for column, id in zip(columns, label_map[vocabulary.dataset]):
            order[column] = id
    head = nn.Linear(config["feature_dim"], len(space))
    for vocabulary in vocabularies:
        dataset = vocabulary.dataset
        head.weight.data = tensors["cls_score.weight"][order].clone()
        head.bias.data = tensors["cls_score.bias"][order].clone()
        head.zero_grad()
        features = tensors["roi_features"].clone().requires_grad_()
        part = SimpleNamespace(name=dataset, vocabulary=vocabulary, hierarchy=None)
        table = unidet.Supervision.of(part, space, torch.device("cpu"))
        local = tensors[f"{dataset}.gt_local"]
        labels = torch.where(local == len(vocabulary), -1, local)
        loss = unidet.loss_classes(head(features), labels, table)
        loss.backward()
        check(f"{dataset} loss", loss, record["losses"][dataset])
        check("features", features.grad, tensors[f"{dataset}.grad.roi_features"], 1e-3)
        check("weight", head.weight.grad, tensors[f"{dataset}.grad.cls_score.weight"][order], 1e-3)


def test_weights_of_images_and_batches():
    tensors, record = case("unidet_sampler_weights")
    config = record["config"]
    datasets, aware = [], []
    for d, count in enumerate(config["num_classes"]):
        present = tensors[f"present.{d}"]
        datasets.append(
            labelled(str(d), [row.nonzero().flatten().tolist() for row in present], count)
        )
        if config["use_cas"][d]:
            aware.append(str(d))
    ratios = dict(zip("012", config["data_ratio"]))
    ours = torch.from_numpy(image_weights(datasets, ratios, aware))
    check("probability", ours / ours.sum(), tensors["probability.fp64"])
    sets, width, height = tensors["stream"].T.numpy()
    buckets = 2 * sets + (width > height)
    sampler = BucketBatchSampler(np.ones(len(sets)), buckets, config["batch_size"], seed=0)
    batches = list(sampler.batches((row, row) for row in range(len(sets))))
    assert [[row for row, _ in batch] for batch in batches] == tensors["batches"].tolist()


def test_costs_candidates_and_program():
    tensors, record = case("unidet_label_space")
    config = record["config"]
    found, truth = [], []
    for dataset, count in zip(config["datasets"], config["num_classes"]):
        images, labels, scores = (
            tensors[f"pred.{dataset}.{field}"].numpy() for field in ("image", "class", "score.fp64")
        )
        all_found = Detections(images, labels, scores, recorded_boxes(tensors, f"pred.{dataset}"))
        found.append(all_found.take(scores > config["score_threshold"]))
        kept = [tensors[f"gt.{dataset}.{field}"].numpy() for field in ("image", "class", "iscrowd")]
        corners = recorded_boxes(tensors, f"gt.{dataset}")
        rows = [kept[1] == label for label in range(count)]
        truth.append([Truth(kept[0][r], corners[r], kept[2][r].astype(bool)) for r in rows])
    ap50 = CrossAP50(found, truth)
    ours = unidet.find_candidates(ap50, config["tau"])
    theirs = {tuple(c["members"]): c["cost"] for c in record["candidates"]}
    assert set(ours) == set(theirs)
    members = sorted(theirs)
    check("costs", [ours[t] for t in members], [theirs[t] for t in members])
    for program in [record["ilp"] | {"lambda_": config["lambda_"]}, *record["ilp_by_lambda"]]:
        chosen = unidet.choose_merges(ours, program["lambda_"])
        if program.get("unique", True):
            assert sorted(chosen) == sorted(map(tuple, program["chosen"]))
    for table in record["ilp_tables"]:
        candidates = {tuple(c["members"]): c["cost"] for c in table["candidates"]}
        lam = table.get("lambda_", config["lambda_"])
        chosen = unidet.choose_merges(candidates, lam)
        objective = sum(len(t) * candidates[t] - lam * (len(t) - 1) for t in chosen)
        check("objective", objective, table["objective"])
