"""omdet.py against recordings of OmDet-Turbo's decoder, from the maps to boxes and gradients.

`Model.detect` runs with the recorded weights, image by image, since a batch of ours has one task.
The recorded maps are projected as the official decoder does. CONCORD_PARITY names the folder of
recorded tensors. Every size, constant and name is read from it.
"""

import re
from unittest import mock

import pytest
import torch
from parity import Recorded, case, check, check_gradients, report  # noqa: F401
from torch import Tensor, nn

import omdet
from common.deformable import Memory, at_cells, best_cells, best_detections
from common.labels import LabelSpace, Vocabulary

RULES = [  # official name -> ours
    (r"^task_encoder\.mlp\.linear1\.", "task_encoder.mlp.0."),
    (r"^task_encoder\.mlp\.linear2\.", "task_encoder.mlp.2."),
    (r"^task_encoder\.res1\.norm1\.", "task_encoder.norm."),
    (r"^task_project\.", "task_encoder.project."),
    (r"^encoder_vision_features\.0\.", "proposals.linear."),
    (r"^encoder_vision_features\.1\.", "proposals.norm."),
    (r"^encoder_class_head\.", "proposal_classes.linear."),
    (r"^decoder_class_head\.(\d+)\.", r"decoder.class_layers.\1.linear."),
    (r"^layers\.(\d+)\.norm1\.", r"decoder.layers.\1.self_norm."),
    (r"^layers\.(\d+)\.norm2\.", r"decoder.layers.\1.cross_norm."),
    (r"^layers\.(\d+)\.norm3\.", r"decoder.layers.\1.ffn_norm."),
    (r"^layers\.", "decoder.layers."),
]
HEADS = [  # official name of a head of several layers -> ours
    (r"encoder_bbox_head\.layers\.(\d)\.(.*)", "proposals.box_head"),
    (r"decoder_bbox_head\.(\d+)\.layers\.(\d)\.(.*)", "decoder.box_heads"),
    (r"query_position_head\.layers\.(\d)\.(.*)", "decoder.position"),
]
ATTENTION = ("query", "key", "value")


def own_name(key: str) -> str:
    for pattern, head in HEADS:
        if found := re.match(pattern, key):
            *row, layer, rest = found.groups()
            return ".".join([head, *row, str(2 * int(layer)), rest])
    for pattern, name in RULES:
        key = re.sub(pattern, name, key)
    return key


def joined(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded weights under our names, with query, key and value as one."""
    state = {}
    for key, tensor in official.items():
        if ".self_attn.query." in key:
            parts = [official[key.replace("query", name)] for name in ATTENTION]
            name = own_name(key).replace("query.", "in_proj_")
            state[name] = torch.cat(parts)
        elif not any(f".self_attn.{name}." in key for name in ATTENTION):
            state[own_name(key)] = tensor
    return state


class Recording:
    """The recorded inputs, and omdet.Model with the recorded weights."""

    def __init__(self, monkeypatch, variant: str = "default"):
        self.tensors, self.record = case("omdet_decoder")
        self.variant = variant
        config = self.config = self.record["config"]
        width, dim, ffn = config["decoder_dim"], config["class_dim"], config["ffn"]
        levels = len(config["level_shapes_hw"])
        sizes = (levels, config["heads"], config["points"])
        nothing = Recorded([])
        nothing.channels = [width]
        monkeypatch.setattr(omdet, "Backbone", lambda *_: nothing)
        for name, value in zip(("LEVELS", "HEADS", "POINTS"), sizes):
            monkeypatch.setattr(omdet, name, value)
        args = omdet.Args(
            channels=width,
            queries=config["num_queries"],
            encoder_layers=1,
            decoder_layers=config["layers"],
            amp="off",
        )
        one, over = config["logit_scale"].split()[0].split("/")
        assert args.tau == float(over) / float(one)
        names = tuple(map(str, range(len(self.tensors["class_features"]))))
        space = LabelSpace([Vocabulary("a", names, text=torch.zeros(len(names), dim))])
        model = self.model = omdet.Model(args, space, pretrained=False)
        model.decoder = omdet.TaskDecoder(args, dim, *sizes, ffn=ffn)
        model.task_encoder = omdet.TaskEncoder(dim, width, config["task_encoder_hidden"])
        prefix = f"{variant}.weights."
        official = {
            key.removeprefix(prefix): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }
        self.table = official.pop("tgt_embed.weight", None)
        projection = {key: official.pop(key) for key in list(official) if "projection" in key}
        missing, unexpected = model.load_state_dict(joined(official), strict=False)
        assert not unexpected
        assert all(key.startswith(("neck.", "encoder.")) for key in missing)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, width, 1, bias=False), nn.BatchNorm2d(width))
            for c in config["vision_channels"]
        ).eval()  # with the running statistics
        state = {key.partition(".")[2]: tensor for key, tensor in projection.items()}
        assert not self.projections.load_state_dict(state, strict=False).unexpected_keys
        inputs = ("class_features", "task_features", *(f"vision.{i}" for i in range(levels)))
        self.inputs = {name: self.tensors[name].requires_grad_() for name in inputs}

    def recorded(self, name: str) -> Tensor:
        return self.tensors[f"{self.variant}.{name}"]

    def encoded(self, image: int) -> omdet.Encoded:
        # all images are projected together, then one is taken: in torch 2.14, BatchNorm of one
        # image has wrong gradients where its result is transposed
        maps = [
            project(self.inputs[f"vision.{i}"])[image : image + 1]
            for i, project in enumerate(self.projections)
        ]
        whole = tuple(8 * side for side in maps[0].shape[-2:])
        memory = Memory.of(maps, [whole], whole)
        return omdet.Encoded(memory, *self.model.proposals(memory))

    def classes(self, image: int) -> Tensor:
        """The class embeddings, with the rows of zeros that pad them."""
        return self.inputs["class_features"][:, image]

    def tokens(self, image: int) -> Tensor:
        """The task tokens, without those that pad them."""
        real = self.tensors["task_mask"][image].bool()
        return self.model.task_encoder(self.inputs["task_features"][real, image])

    def detect(self, image: int) -> omdet.Output:
        tokens = self.tokens(image)
        with mock.patch.object(self.model.task_encoder, "forward", lambda _: tokens):
            return self.model.detect(self.encoded(image), self.classes(image))


@pytest.fixture(params=range(2), ids=lambda i: f"image{i}")
def image(request) -> int:
    return request.param


def test_parity_of_an_image(monkeypatch, image):
    recording = Recording(monkeypatch)
    config = recording.config
    output = recording.detect(image)
    assert len(output.logits) == config["layers"] + 1
    kinds = {"boxes": output.boxes[:, 0], "class_logits": output.logits[:, 0]}
    for kind, ours in kinds.items():
        check(f"first stage: {kind}", ours[0], recording.recorded(f"encoder_{kind}")[image])
        check(f"last layer: {kind}", ours[-1], recording.recorded(kind)[image])
        every = recording.tensors[f"train.{kind}"][:, image]
        check(f"all layers: {kind}", ours[1:], every)
        first = recording.tensors[f"train.encoder_{kind}"][image]
        check(f"first stage: {kind}", ours[0], first)
    start = recording.recorded("reference_logits_init")[image].sigmoid()
    check("first boxes", output.boxes[0, 0], start)


def layer_states(recording: Recording, image: int, q: Tensor, boxes: Tensor) -> list:
    """What goes into the cross-attention of each layer, and what comes out of the layer."""
    states = []
    for layer in recording.model.decoder.layers:
        attend, feed = layer.self_attend, layer.feed_forward

        def merged(both, position, attend=attend):
            found = attend(both, position)
            states.append(found[:, q.shape[1] :])
            return found

        def fed(x, feed=feed):
            states.append(feed(x))
            return states[-1]

        layer.self_attend, layer.feed_forward = merged, fed
    memory = recording.encoded(image).memory
    text, tokens = recording.classes(image), recording.tokens(image)
    output = recording.model.decoder(q, boxes, memory, text, tokens)
    return [*states, output]


@pytest.mark.parametrize("variant", ["default", "learned_query"])
def test_parity_of_queries_and_task_tokens(monkeypatch, variant, image):
    recording = Recording(monkeypatch, variant)
    _, hidden, proposals = recording.encoded(image)
    scores = recording.model.proposal_classes(hidden, recording.classes(image))
    rows = best_cells(proposals, scores.amax(-1), recording.config["num_queries"])
    boxes = at_cells(proposals, rows)
    q = at_cells(hidden, rows) if recording.table is None else recording.table[None]
    check("selected cells: content", q[0], recording.recorded("query_init")[image])
    check("selected cells: boxes", boxes[0], recording.recorded("encoder_boxes")[image])
    *states, (logits, refined) = layer_states(recording, image, q, boxes)
    real = recording.tensors["task_mask"][image].bool()
    for z in range(recording.config["layers"]):
        tokens, queries = states[2 * z : 2 * z + 2]
        official = recording.recorded(f"layer{z}.task_tokens")[real, image]
        check("merged attention: task tokens", tokens[0], official)
        check("layers: queries", queries[0], recording.recorded(f"layer{z}.queries")[image])
    check("decoder: boxes", refined[-1, 0], recording.recorded("boxes")[image])
    check("decoder: logits", logits[-1, 0], recording.recorded("class_logits")[image])


def test_parity_gradients(monkeypatch):
    """The sum of all outputs times their cotangents, of both images."""
    recording = Recording(monkeypatch)
    total = 0
    for image in range(len(recording.tensors["task_mask"])):
        output = recording.detect(image)
        for kind, ours in (("boxes", output.boxes), ("class_logits", output.logits)):
            layers = recording.tensors[f"train.cotangent.{kind}"][:, image]
            first = recording.tensors[f"train.cotangent.encoder_{kind}"][image]
            total = total + (ours[1:, 0] * layers).sum() + (ours[0, 0] * first).sum()
    total.backward()
    official = {name: recording.tensors[f"train.grad.{name}"] for name in recording.inputs}
    check_gradients("gradients", recording.inputs, official)


def test_parity_detections(monkeypatch, image):
    recording = Recording(monkeypatch)
    tensors, config = recording.tensors, recording.config
    post = config["post"]
    assert post["nms"] == omdet.NMS and omdet.Args().score_threshold == post["score"]
    size = tuple(recording.record["results"]["post_sizes_hw"][image])
    logits = tensors["default.class_logits"][image]
    best = best_detections(logits, tensors["default.boxes"][image], size, config[post["max"]])
    boxes, scores, labels = omdet.join_tasks([best])
    # rows that pad the classes are no classes, and weak detections are not drawn
    shown = (scores > post["score"]) & (labels < config["classes_per_image"][image])
    check("detections: boxes", boxes[shown], tensors[f"post{image}.boxes"])
    check("detections: scores", scores[shown], tensors[f"post{image}.scores"])
    assert torch.equal(labels[shown], tensors[f"post{image}.classes"])
