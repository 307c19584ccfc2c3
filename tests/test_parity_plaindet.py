"""plaindet.py against recordings of Plain-Det, from the maps of the neck to losses and gradients.

`Model`, `compute_losses` and the sampling run with the recorded weights. The official first stage
has a column for each class; the model takes them as they are. CONCORD_PARITY names the folder of
recorded tensors. Every size, constant and name is read from it.
"""

import itertools
import re

import numpy as np
import pytest
import torch
from parity import Recorded, case, check, check_gradients, report  # noqa: F401
from torch import nn
from torch.nn import functional as F

import plaindet
from common.deformable import Decoder, Encoder, Proposals, best_detections
from common.labels import LabelSpace, Vocabulary
from common.targets import Targets

RULES = [  # official name -> ours
    (r"^label_proj_list\.", "composer.projections."),
    (r"^meta_init_query\.weight", "composer.initial"),
    (r"^ca_text\.", "composer.attention."),
    (r"^catext_norm\.", "composer.norm."),
    (r"^temp\.", "classifier.embedding."),
    (r"^transformer\.temp\.", "object_embed."),
    (r"^transformer\.level_embeds", "encoder.level_embed"),
    (r"^transformer\.enc_output_norm\.", "proposals.norm."),
    (r"^transformer\.enc_output\.", "proposals.linear."),
    (r"^transformer\.encoder\.(.*)\.attentions\.0\.", r"encoder.\1.self_attn."),
    (r"^transformer\.encoder\.(.*)\.norms\.0\.", r"encoder.\1.norm1."),
    (r"^transformer\.encoder\.(.*)\.norms\.1\.", r"encoder.\1.norm2."),
    (r"^transformer\.encoder\.", "encoder."),
    (r"^transformer\.decoder\.(.*)\.attentions\.0\.attn\.", r"decoder.\1.self_attn."),
    (r"^transformer\.decoder\.(.*)\.attentions\.1\.", r"decoder.\1.cross_attn."),
    (r"^transformer\.decoder\.(.*)\.norms\.0\.", r"decoder.\1.self_norm."),
    (r"^transformer\.decoder\.(.*)\.norms\.1\.", r"decoder.\1.cross_norm."),
    (r"^transformer\.decoder\.(.*)\.norms\.2\.", r"decoder.\1.ffn_norm."),
    (r"^transformer\.decoder\.", "decoder."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
]
UNUSED = ("transformer.pos_trans", "transformer.tgt_embed")
DATASETS = ["coco", "lvis_v1", "o365", "oid"]


class Recording:
    """The recorded model, images and ground truth. plaindet.Model with the recorded weights."""

    def __init__(self, monkeypatch):
        self.tensors, self.record = case("plaindet_model")
        config = self.config = self.record["config"]
        self.depth, width = config["decoder_layers"], config["embed_dim"]
        levels, heads, points = config["levels"], config["transformer_heads"], config["num_points"]
        self.maps = [self.tensors[f"level{i}.features"].requires_grad_() for i in range(levels)]
        shape = (config["ffn"], levels, heads, points)
        nothing = Recorded([])
        nothing.channels = [width]
        monkeypatch.setattr(plaindet, "HEADS", config["query_attention_heads"])
        monkeypatch.setattr(plaindet, "Backbone", lambda *_: nothing)
        args = plaindet.Args(
            channels=width,
            queries=config["num_queries"],
            encoder_layers=config["encoder_layers"],
            decoder_layers=self.depth,
            tau=1.0,
            amp="off",
        )
        vocabularies = []
        for dataset in DATASETS:
            text = self.tensors[f"label_embedding.{dataset}"]
            names = tuple(f"{dataset} {i}" for i in range(len(text)))
            vocabularies.append(Vocabulary(dataset, names, text=text))
        self.space = LabelSpace(vocabularies)
        model = self.model = plaindet.Model(args, self.space, pretrained=False)
        model.neck = Recorded(self.maps)
        model.encoder = Encoder(width, args.encoder_layers, *shape)
        model.proposals = Proposals(width)
        eps = config["inverse_sigmoid_eps"]
        assert model.decoder.eps == eps
        model.decoder = Decoder(width, self.depth, *shape, eps=eps)
        official = {
            key.removeprefix("weights."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith("weights.")
        }
        inner = official["label_proj_list.0.0.weight"].shape[0]
        for i, v in enumerate(vocabularies):
            d = v.text.shape[1]
            model.composer.projections[i] = nn.Sequential(
                nn.Linear(d, inner), nn.ReLU(), nn.Linear(inner, width)
            )
            model.object_heads[i] = nn.Linear(d, len(v))
        state = {self.own_name(key): tensor for key, tensor in official.items()}
        state.pop("", None)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) <= {"hardness.sums", "hardness.means", "text_means"}
        self.sizes = [tuple(size) for size in config["image_sizes_hw"]]
        self.images = torch.zeros(len(self.sizes), 3, *config["padded_hw"], dtype=torch.uint8)

    def own_name(self, key: str) -> str:
        """Returns our name of an official parameter; "" of one that nothing uses."""
        if key.startswith(UNUSED):
            return ""
        if found := re.match(r"transformer\.decoder\.class_embed_(\d)\.(\d)\.(.*)", key):
            dataset, layer, rest = found.groups()
            return f"object_heads.{dataset}.{rest}" if int(layer) == self.depth else ""
        if found := re.match(r"bbox_embed\.(\d+)\.layers\.(\d)\.(.*)", key):
            layer, rest = 2 * int(found[2]), found[3]
            last = int(found[1]) == self.depth
            of = "proposals.box_head" if last else f"decoder.box_heads.{found[1]}"
            return f"{of}.{layer}.{rest}"
        for pattern, name in RULES:
            key = re.sub(pattern, name, key)
        return key

    def output(self, dataset: str, sizes=None) -> plaindet.Output:
        classes = self.space.part(dataset)
        row = DATASETS.index(dataset)
        return self.model(self.images, sizes or self.sizes, row, classes)

    def supervision(self, dataset: str) -> plaindet.Supervision:
        classes = self.space.part(dataset)
        count = len(classes)
        positive, weight = torch.eye(count), torch.ones(count, count)
        federated = torch.full((count,), -1.0)
        if dataset == "oid":
            positive = positive + self.tensors["oid.is_ancestor"]
            weight = self.tensors["oid.loss_weight"]
        if dataset == "lvis_v1":
            federated = self.tensors["fed.image_count"]
        positive = F.pad(positive, (0, 0, 0, 1))
        weight = F.pad(weight, (0, 0, 0, 1), value=1.0)
        return plaindet.Supervision(classes, positive, weight, federated)

    def targets(self, dataset: str) -> list[Targets]:
        return [
            Targets(self.tensors[f"{dataset}.image{i}.boxes"], self.classes(dataset, i))
            for i in range(len(self.sizes))
        ]

    def matched_cells(self, dataset: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns image and cell of all matched cells of the first stage."""
        cells = [self.tensors[f"{dataset}.match.enc.image{i}.query"] for i in range(2)]
        images = [torch.full_like(cell, i) for i, cell in enumerate(cells)]
        return torch.cat(images), torch.cat(cells)

    def classes(self, dataset: str, image: int) -> torch.Tensor:
        return self.tensors[f"{dataset}.image{image}.classes"]


@pytest.fixture
def recording(monkeypatch):
    return Recording(monkeypatch)


@pytest.mark.parametrize("dataset", DATASETS)
def test_parity_composed_queries(recording, dataset):
    """Of each image alone: in a batch, the official code mixes the biases of the images."""
    composer = recording.model.composer
    text = recording.tensors[f"label_embedding.{dataset}"]
    row = DATASETS.index(dataset)
    keys = composer.projections[row](text)
    check("compositor: keys", keys, recording.tensors[f"{dataset}.label_queries"])
    queries = composer(recording.maps[-1], text, row)
    for i, ours in enumerate(queries):
        official = recording.tensors[f"{dataset}.query_embed_alone{i}"]
        check("compositor: queries", ours, official)


def feed_queries(recording, monkeypatch, dataset: str) -> None:
    """Mixes the biases of the images as the official batch does."""
    composer = recording.model.composer
    attend = composer.attention.forward
    bias = recording.tensors[f"{dataset}.attn_mask"]

    def mixed(*given, attn_mask, **options):
        images = len(recording.sizes)
        heads = len(attn_mask) // images
        rows = [row % images * heads for row in range(len(attn_mask))]
        attn_mask = attn_mask[rows]
        check("compositor: weights", attn_mask[:, 0], bias)
        return attend(*given, attn_mask=attn_mask, **options)

    monkeypatch.setattr(composer.attention, "forward", mixed)


@pytest.mark.parametrize("dataset", DATASETS)
def test_parity_predictions(recording, monkeypatch, dataset):
    feed_queries(recording, monkeypatch, dataset)
    output = recording.output(dataset)
    recorded = {
        key.removeprefix(f"{dataset}."): tensor
        for key, tensor in recording.tensors.items()
        if key.startswith(f"{dataset}.")
    }
    check("first stage: boxes", output.proposals, recorded["enc.pred_boxes"])
    if "enc.pred_logits" in recorded:
        check("first stage: logits", output.objectness, recorded["enc.pred_logits"])
    for z in range(recording.depth):
        check("decoder: boxes", output.boxes[z], recorded[f"layer{z}.pred_boxes"])
        check("decoder: logits", output.logits[z], recorded[f"layer{z}.pred_logits"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_parity_losses_and_gradients(recording, monkeypatch, dataset):
    feed_queries(recording, monkeypatch, dataset)
    if dataset == "lvis_v1":
        layers = itertools.count()
        draw = plaindet.sample_federated

        def recorded_classes(labels, frequency):
            ours = draw(labels, frequency)
            drawn = recording.tensors[f"lvis_v1.fed_classes.layer{next(layers)}"]
            assert ours.sum() == len(drawn) == recording.config["fed_num_classes"]
            assert set(labels.tolist()) <= set(drawn.tolist())
            return torch.zeros_like(ours).index_fill(0, drawn, 1)

        monkeypatch.setattr(plaindet, "sample_federated", recorded_classes)
    output = recording.output(dataset)
    if dataset == "lvis_v1":
        # of the classes in the first stage, too, the official code trains a sample
        drawn = recording.tensors["lvis_v1.fed_classes.enc"]
        output = output._replace(objectness=output.objectness[..., drawn])
    official = recording.record["results"][dataset]["losses_unweighted"]
    if dataset == "oid":
        # and at a cell that shows an object, it does not train the descendants of the first class
        below = recording.tensors["oid.loss_weight"][0] == 0
        objectness = output.objectness
        matched = recording.matched_cells("oid")
        skipped = torch.zeros_like(objectness).bool()
        skipped[matched] = below
        output = output._replace(objectness=objectness.masked_fill(skipped, -100))
    losses = plaindet.compute_losses(
        output, recording.targets(dataset), recording.sizes, recording.supervision(dataset)
    )
    result = recording.record["results"][dataset]
    weights = recording.config["loss_weights"]
    for name in ("loss_class", "loss_bbox", "loss_giou"):
        terms = [f"{name}_{z}" for z in range(recording.depth - 1)] + [name]
        wanted = weights[name] * sum(official[term] for term in terms)
        ours = losses[name] + losses.get(f"{name}_aux", 0)
        check("losses: decoder", ours, wanted)
        wanted = weights[name] * official[f"{name}_enc"]
        check("losses: first stage", losses[f"{name}_enc"], wanted)
    wanted = weights["loss_bbox"] * official["loss_bbox"]
    check("losses: boxes of the last layer", losses["loss_bbox"], wanted)
    check("losses: total", losses["loss"], result["total_weighted"])
    losses["loss"].backward()
    prefix = f"{dataset}.grad."
    gradients = {
        key.removeprefix(prefix): gradient
        for key, gradient in recording.tensors.items()
        if key.startswith(prefix)
    }
    ours = dict(recording.model.named_parameters())
    ours = {key: ours[recording.own_name(key)] for key in gradients if "level" not in key}
    ours |= {f"level{i}.features": feature for i, feature in enumerate(recording.maps)}
    check_gradients("gradients", ours, gradients)


@pytest.mark.parametrize("dataset", ["coco", "oid"])
def test_parity_detections(recording, monkeypatch, dataset):
    """Without masks of the padding, as the official code at test time."""
    feed_queries(recording, monkeypatch, dataset)
    padded = tuple(recording.config["padded_hw"])
    whole = [padded] * len(recording.sizes)
    with torch.no_grad():
        output = recording.output(dataset, whole)
    limit = recording.config["infer_topk"]
    for i, (logits, boxes) in enumerate(zip(output.logits[-1], output.boxes[-1])):
        found, scores, labels = best_detections(logits, boxes, padded, limit)
        end = torch.tensor([padded[1], padded[0]] * 2)
        official = recording.tensors[f"{dataset}.infer{i}.boxes"].clamp(min=0).minimum(end)
        check("detections: boxes", found, official)
        check("detections: scores", scores, recording.tensors[f"{dataset}.infer{i}.scores"])
        assert torch.equal(labels, recording.tensors[f"{dataset}.infer{i}.classes"])


def test_parity_factors_of_the_sampling():
    tensors, record = case("plaindet_sampler")
    config = record["config"]
    sizes = np.array(config["dataset_sizes"])
    losses = [tensors[f"log.{name}.loss_bbox"].mean() for name in config["datasets"]]
    ours = plaindet.dataset_factors(np.array(losses), sizes)
    check("sampling: factors", ours, tensors["dynamic_factor"])
    ours = plaindet.dataset_factors(np.zeros(len(sizes)), sizes)
    check("sampling: first factors", ours, tensors["initial_factor"])
    # the probability of an image: that of its dataset, times its weight in it
    dataset, weights = tensors["dataset_of_image"].numpy(), tensors["static_weights"].numpy()
    for factors, name in (
        (tensors["dynamic_factor"], "image_probability"),
        (tensors["initial_factor"], "image_probability_initial"),
    ):
        shares = sizes * factors.numpy()
        own = [weights[dataset == d].sum() for d in range(len(sizes))]
        image = (shares / shares.sum())[dataset] * weights / np.array(own)[dataset]
        check("sampling: images", image, tensors[name])
