"""The two segmenters against recordings of Mask2Former, on whose base they stand.

Both methods' `Model`, `match`, `compute_losses` and `predict` run, with a linear classifier of
fixed classes in the place of their text. CONCORD_PARITY names the folder of recorded tensors. Every
size, constant and name is read from it, so that any recording of the same cases will do.
`pytest -s` prints the worst relative error of each quantity.
"""

from dataclasses import replace

import pytest
import torch
from parity import case, check, check_gradients, drawn_weights, report, restore  # noqa: F401
from torch import nn

import common.point_matching
import dataseg
import lmseg
from common.batch import Sample, collate
from common.checkpoint import load_weights, read_metadata
from common.convert import convert_if_official, rename
from common.labels import LabelSpace, Vocabulary
from common.mask_losses import MaskOutput, mask_cost
from common.official_mask2former import MASK2FORMER
from common.pixel_decoder import MSDeformAttn, PixelDecoder, pixel_centres
from common.point_matching import assign, uncertain_points
from common.segments import panoptic_map, semantic_map
from common.targets import Targets
from common.transformer import DecoderLayer, blocked_pixels, sine_position

METHODS = {"lmseg": lmseg, "dataseg": dataseg}
TEXT = {"class_embed.weight", "class_embed.bias", "background", "logit_scale"}  # dataseg's


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def own_names(prefix: str, official: dict) -> dict:
    """Returns the tensors of a part under our names. Those of the classifier keep theirs."""
    names = {key: rename(f"sem_seg_head.{prefix}.{key}", MASK2FORMER) for key in official}
    names = {key: key if name.startswith("heads.") else name for key, name in names.items()}
    return {names[key].removeprefix("pixel_decoder."): tensor for key, tensor in official.items()}


def stored(tensors: dict, prefix: str) -> dict:
    """Returns the tensors whose names start so, without this start."""
    return {
        key.removeprefix(prefix): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def check_norms(quantity: str, norms: dict, parameters: dict) -> None:
    """Checks the norms of the gradients of all parameters.

    Those that are 0 up to rounding are measured against the largest.
    """
    assert norms.keys() == parameters.keys()
    for name, norm in norms.items():
        found = parameters[name].grad.norm()
        check(quantity, found, norm, 1e-3, floor=1e-3 * max(norms.values()))


# -- pixel decoder ---------------------------------------------------------------------------------


def test_parity_pixel_decoder():
    tensors, record = case("mask2former_pixel_decoder")
    config = record["config"]
    channels = config["conv_dim"]
    sizes = [config[key] for key in ("enc_layers", "dim_feedforward", "nheads", "n_points")]
    decoder = PixelDecoder(list(config["in_channels"].values()), channels, *sizes)
    decoder.mask_features = nn.Conv2d(channels, config["mask_dim"], 1)
    decoder.load_state_dict(own_names("pixel_decoder", stored(tensors, "pixel_decoder.")))
    features = [tensors[f"features.{name}"].requires_grad_() for name in config["in_channels"]]
    mask_features, maps = decoder(features)
    check("pixel decoder: mask features", mask_features, tensors["out.mask_features"])
    total = (mask_features * tensors["cotangent.mask_features"]).sum()
    for i, ours in enumerate(maps):
        check("pixel decoder: memories", ours, tensors[f"out.multi_scale.{i}"])
        total = total + (ours * tensors[f"cotangent.multi_scale.{i}"]).sum()
        position = sine_position(*ours.shape[-2:], ours.shape[1])
        check("pixel decoder: position", position, tensors[f"position_embedding.{i}"])
    # (S, 2), the same for all levels
    centres = torch.cat([pixel_centres(*m.shape[-2:], "cpu") for m in maps])
    centres = centres[None, :, None].expand(-1, -1, len(maps), -1)
    check("pixel decoder: reference points", centres, tensors["reference_points"])
    total.backward()
    official = {key: tensors[f"grad.features.{key}"] for key in config["in_channels"]}
    check_gradients("pixel decoder: gradients", dict(zip(official, features)), official)
    norms = own_names("pixel_decoder", record["grad_norms"])
    check_norms("pixel decoder: gradient norms", norms, dict(decoder.named_parameters()))


def test_parity_deformable_attention():
    """Neither reference boxes nor padding masks: Mask2Former uses none."""
    tensors, record = case("mask2former_pixel_decoder")
    config = record["config"]
    shapes = tuple(map(tuple, tensors["msda.module_in.spatial_shapes"].tolist()))
    attention = MSDeformAttn(config["conv_dim"], config["nheads"], len(shapes), config["n_points"])
    attention.load_state_dict(stored(tensors, "msda.module."))
    given = stored(tensors, "msda.module_in.")
    ours = attention(given["query"], given["input_flatten"], shapes, given["reference_points2"])
    check("deformable attention", ours, tensors["msda.module_out.ref2"])


# -- transformer decoder ---------------------------------------------------------------------------


def fixed_classes(method, args, classes: int, is_thing: tuple | None = None):
    """Returns the Model of a method with a linear classifier, and its label space.

    It is `--classifier heads` in lmseg, and replaces `classify` in dataseg.
    """
    names = tuple(map(str, range(classes)))
    vocabulary = Vocabulary("any", names, is_thing=is_thing, text=torch.eye(classes))
    label_space = LabelSpace([vocabulary])
    if method is lmseg:
        args = replace(args, classifier="heads")
    model = method.Model(args, label_space, pretrained=False)
    if method is lmseg:
        model.linear = model.heads.layers[0]
    else:
        model.linear = nn.Linear(args.channels, classes + 1)
        model.classify = lambda z, text: model.linear(z)
    return model, label_space


def decoder_case(method, monkeypatch):
    """Returns the Model of a method with the recorded decoder alone, its label space, ..."""
    tensors, record = case("mask2former_decoder")
    config = record["config"]
    heads, ffn, channels = (config[key] for key in ("nheads", "dim_feedforward", "hidden_dim"))
    nothing = nn.Identity()
    nothing.channels = []
    monkeypatch.setattr(method, "Backbone", lambda *_, **__: nothing)
    monkeypatch.setattr(method, "PixelDecoder", lambda *_: nothing)
    monkeypatch.setattr(method, "DecoderLayer", lambda *_: DecoderLayer(channels, heads, ffn))
    layers, queries = config["dec_layers"], config["num_queries"]
    args = method.Args(channels=channels, decoder_layers=layers, queries=queries, amp="off")
    model, label_space = fixed_classes(method, args, config["num_classes"])
    model.head.mask_embed[-1] = nn.Linear(channels, config["mask_dim"])
    return model, label_space, tensors, record


def own_decoder_names(official: dict) -> dict:
    names = own_names("predictor", official)
    return {key.replace("class_embed", "linear"): value for key, value in names.items()}


def load_decoder(model: nn.Module, official: dict) -> None:
    """Loads the recorded weights of the decoder. Those of the text keep theirs."""
    tensors = own_decoder_names(official)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    again = {key for key in missing if key.startswith("heads.")}  # lmseg's linear, by both names
    assert not unexpected and set(missing) - again <= TEXT


def output_masks(output: MaskOutput, z: int) -> torch.Tensor:
    """Returns the mask logits of all images in prediction z, (B, Q, h, w)."""
    return torch.stack([output.masks(z, i) for i in range(len(output.mask_features))])


def test_parity_transformer_decoder(method, monkeypatch):
    model, label_space, tensors, record = decoder_case(method, monkeypatch)
    load_decoder(model, stored(tensors, "predictor."))
    blocked = []

    def spy(*given):
        blocked.append(blocked_pixels(*given))
        return blocked[-1]

    monkeypatch.setattr(method, "blocked_pixels", spy)
    mask_features = tensors["in.mask_features"].requires_grad_()
    maps = [tensors[f"in.multi_scale.{i}"].requires_grad_() for i in range(3)]
    text = [label_space, None] if method is lmseg else [label_space.text]
    output = model.decode(mask_features, maps, *text)
    total = 0
    assert len(output.logits) == record["config"]["dec_layers"] + 1 == len(blocked) + 1
    for z, logits in enumerate(output.logits):
        for name, ours in (("pred_logits", logits), ("pred_masks", output_masks(output, z))):
            check(f"transformer decoder: {name}", ours, tensors[f"out.layer{z}.{name}"])
            total = total + (ours * tensors[f"cotangent.layer{z}.{name}"]).sum()
    for i, ours in enumerate(blocked):
        official = tensors[f"out.attn_mask.{i}"].bool()  # before the repair of rows that block all
        assert torch.equal(ours, official & ~official.all(2, keepdim=True))
    total.backward()
    official = {f"multi_scale.{i}": tensors[f"grad.multi_scale.{i}"] for i in range(3)}
    official["mask_features"] = tensors["grad.mask_features"]
    ours = dict(zip(official, [*maps, mask_features]))
    check_gradients("transformer decoder: gradients", ours, official)
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
    parameters = {name.replace("heads.layers.0", "linear"): p for name, p in parameters.items()}
    norms = own_decoder_names(record["grad_norms"])
    check_norms("transformer decoder: gradient norms", norms, parameters)


# -- matching and losses ---------------------------------------------------------------------------


class LossCase:
    """The recorded predictions of all layers as one output, the ground truth, and the draws.

    The draws of points are recorded for each layer. Ours are shared by the layers, so that
    `feed_points` and `feed_samples` take the place of the draws, but not of what follows.
    """

    def __init__(self, method):
        self.method = method
        self.tensors, self.record = case("mask2former_loss")
        config = self.record["config"]
        self.layers = [*(f"layer{i}" for i in range(config["num_aux"])), "final"]
        logits = [self.tensors[f"pred.{layer}.logits"] for layer in self.layers]
        masks = [self.tensors[f"pred.{layer}.masks"] for layer in self.layers]
        self.logits = torch.stack(logits).requires_grad_()  # (Z, B, Q, K + 1)
        self.masks = torch.cat(masks, 1).requires_grad_()  # (B, Z Q, h, w)
        depth, images, queries, _ = self.logits.shape
        pick = torch.eye(depth * queries).view(depth, 1, queries, -1).expand(-1, images, -1, -1)
        self.output = MaskOutput(self.logits, pick, self.masks)
        self.targets = []
        for i in range(images):
            labels = self.tensors[f"target{i}.labels"]
            masks = self.tensors[f"target{i}.masks"].bool()
            self.targets.append(Targets(torch.zeros(len(labels), 4), labels, masks=masks))
        self.args = method.Args(points=config["num_points"])

    def feed_points(self, monkeypatch) -> None:
        """Feeds the recorded points of the matching, and checks the cost that comes of them."""
        images = iter(range(len(self.targets)))

        def recorded_points(embed, features, masks, num_points):
            parts, image = [], next(images)
            for z, layer in enumerate(self.layers):
                points = self.tensors[f"match.{layer}.image{image}.point_coords"]
                assert points.shape[1] == num_points
                with monkeypatch.context() as patch:
                    patch.setattr(torch, "rand", lambda *_, points=points, **__: points)
                    parts.append(mask_cost(embed[z : z + 1], features, masks, num_points))
            return torch.cat(parts)

        def checked(costs):
            for image, cost in enumerate(costs):
                for layer, ours in zip(self.layers, cost, strict=True):
                    official = self.tensors[f"match.{layer}.image{image}.cost"]
                    check("matching: cost", ours, official)
            return assign(costs)

        monkeypatch.setattr(self.method, "mask_cost", recorded_points)
        monkeypatch.setattr(self.method, "assign", checked)

    def official_pairs(self, image: int) -> list[tuple[int, int, int]]:
        """Returns (layer, query, target) of an image's pairs, layer by layer."""
        pairs = []
        for z, layer in enumerate(self.layers):
            ends = (
                self.tensors[f"match.{layer}.image{image}.{end}"] for end in ("query", "target")
            )
            pairs += [(z, *pair) for pair in zip(*(end.tolist() for end in ends))]
        return pairs

    def points_of(self, image: int, kind: str) -> torch.Tensor:
        """Returns the recorded points of an image's pairs in our order, by target: (R, P, 2)."""
        parts = []
        for layer in self.layers:
            counts = [
                len(self.tensors[f"match.{layer}.image{i}.query"]) for i in range(len(self.targets))
            ]
            parts.append(self.tensors[f"points.{layer}.{kind}"].split(counts)[image])
        targets = torch.tensor([target for *_, target in self.official_pairs(image)])
        return torch.cat(parts)[targets.argsort(stable=True)]

    def feed_samples(self, monkeypatch) -> None:
        """Feeds the recorded points of the losses, and checks which of them are taken."""
        images = iter([i for i, target in enumerate(self.targets) if len(target.labels)])

        def recorded_points(logits, num):
            image = next(images)
            drawn = (self.points_of(image, kind) for kind in ("candidates", "random"))
            points = uncertain_points(logits, num, *drawn)
            for ours, theirs in zip(points, self.points_of(image, "coords"), strict=True):
                assert sorted(ours.tolist()) == sorted(theirs.tolist())  # in any order
            return points

        monkeypatch.setattr(common.point_matching, "uncertain_points", recorded_points)


def test_parity_matching(method, monkeypatch):
    recorded = LossCase(method)
    recorded.feed_points(monkeypatch)
    pairs = method.match(recorded.args, recorded.output, recorded.targets)
    for image, found in enumerate(pairs):
        ours = list(zip(*(part.tolist() for part in found[:3])))
        assert sorted(ours) == sorted(recorded.official_pairs(image))


def test_parity_losses(method, monkeypatch):
    recorded = LossCase(method)
    recorded.feed_points(monkeypatch)
    recorded.feed_samples(monkeypatch)
    given = [recorded.args, recorded.output, recorded.targets]
    if method is dataseg:
        given.append(torch.zeros(recorded.record["config"]["num_classes"], dtype=torch.bool))
    losses = method.compute_losses(*given)
    official, weights = recorded.record["losses_unweighted"], recorded.record["loss_weights"]
    names = {"loss_class": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}
    for ours, theirs in names.items():
        terms = [name for name in official if name.startswith(theirs)]
        assert len(terms) == len(recorded.layers)
        wanted = sum(weights[name] * official[name] for name in terms)
        check(f"losses: {ours}", losses[ours], wanted)
    check("losses: total", losses["loss"], recorded.record["total_weighted"])
    losses["loss"].backward()
    grads = recorded.masks.grad.chunk(len(recorded.layers), 1)
    for layer, logits, masks in zip(recorded.layers, recorded.logits.grad, grads, strict=True):
        wanted = recorded.tensors
        check("losses: gradients of logits", logits, wanted[f"grad.{layer}.logits"], 1e-3)
        check("losses: gradients of masks", masks, wanted[f"grad.{layer}.masks"], 1e-3)


# -- whole model -----------------------------------------------------------------------------------


class WholeModel:
    """A method's Model with official weights, the recorded images as a batch, and its outputs."""

    def __init__(self, method, folder, monkeypatch):
        self.method = method
        self.tensors, self.record = case("mask2former_whole_model")
        file = folder / "official.pth"
        official = drawn_weights(self.record)
        torch.save({"model": official}, file)
        monkeypatch.setenv("CONCORD_CACHE", str(folder))
        twin = convert_if_official(file, method.METHOD, method.OFFICIAL)
        settings = read_metadata(twin, method.METHOD)["args"]
        head = "sem_seg_head.predictor.class_embed."
        classes = len(official[head + "bias"]) - 1
        is_thing = tuple(i in self.config["thing_class_ids"] for i in range(classes))
        args = method.Args(**settings, amp="off", object_threshold=self.threshold("OBJECT_MASK"))
        self.model, self.label_space = fixed_classes(method, args, classes, is_thing)
        linear = {key: official[head + key] for key in ("weight", "bias")}
        self.model.linear.load_state_dict(linear)
        load_weights(twin, self.model, base=True)  # all but the classifier
        samples = []
        for i, size in enumerate(self.config["output_sizes_hw"]):
            sample = Sample.unlabelled(self.tensors[f"image{i}"], "any", i, i)
            samples.append(replace(sample, original_size=tuple(size)))
        self.batch = collate(samples)
        assert self.batch.sizes == [tuple(size) for size in self.config["image_sizes_hw"]]

    @property
    def config(self) -> dict:
        return self.record["config"]

    def threshold(self, kind: str) -> float:
        overrides = iter(self.config["overrides"])
        return dict(zip(overrides, overrides))[f"MODEL.MASK_FORMER.TEST.{kind}_THRESHOLD"]

    def outputs(self):
        """Returns the backbone's maps, those of the pixel decoder, and the output of the model."""
        seen = []
        for part in (self.model.backbone, self.model.pixel_decoder):
            part.register_forward_hook(lambda module, given, found: seen.append(found))
        text = self.label_space if self.method is lmseg else self.label_space.text
        with torch.no_grad():
            output = self.model.eval()(self.batch.images, self.batch.sizes, text)
        return *seen, output


@pytest.fixture(scope="module", params=METHODS)
def whole_model(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield WholeModel(METHODS[request.param], tmp_path_factory.mktemp("official"), patch)


def test_parity_whole_model_from_official_checkpoint(whole_model):
    tensors, config = whole_model.tensors, whole_model.config
    features, (mask_features, maps), output = whole_model.outputs()
    strides = config["channel_strides"]
    for name, feature in zip(("res2", "res3", "res4", "res5"), features, strict=True):
        step = strides.get(f"backbone.{name}", 1)
        check(f"whole model: {name}", feature[:, ::step], tensors[f"backbone.{name}"])
    step = strides["mask_features"]
    check("whole model: mask features", mask_features[:, ::step], tensors["mask_features"])
    for i, ours in enumerate(maps):
        check("whole model: memories", ours, tensors[f"multi_scale.{i}"])
    depth = len(output.logits) - 1
    assert depth == sum(key.startswith("aux") and "logits" in key for key in tensors)
    step = config["query_stride_aux_masks"]
    for z in range(depth):
        check("whole model: auxiliary logits", output.logits[z], tensors[f"aux{z}.pred_logits"])
        if f"aux{z}.pred_masks" in tensors:
            ours = output_masks(output, z)[:, ::step]
            check("whole model: auxiliary masks", ours, tensors[f"aux{z}.pred_masks"])
    check("whole model: logits", output.logits[-1], tensors["pred_logits"])
    check("whole model: masks", output_masks(output, -1), tensors["pred_masks"])


def predict(whole_model, task: str, monkeypatch) -> list[dict]:
    """Runs the method's `predict` by the rules of Mask2Former.

    The share of a mask that a segment must win is the recorded one. lmseg's segments are not cut to
    their mask, and dataseg merges proposals before they compete for pixels; not so here.
    """
    method, overlap = whole_model.method, whole_model.threshold("OVERLAP")

    def official_rule(probabilities, masks, is_thing, object_threshold, *_, **__):
        return panoptic_map(probabilities, masks, is_thing, object_threshold, overlap, True)

    monkeypatch.setattr(method, "panoptic_map", official_rule)
    if method is dataseg:
        none = torch.zeros(len(whole_model.label_space), dtype=torch.bool)
        monkeypatch.setattr(method, "merged_classes", lambda *_: none)
        monkeypatch.setattr(whole_model.model.args, "merge", "sum")
    return method.predict(whole_model.model, whole_model.batch, whole_model.label_space, task)


def check_pixels(quantity: str, ours: torch.Tensor, official: torch.Tensor) -> None:
    """One pixel in 10,000, or one in all, may differ: rounding decides where queries are equal."""
    assert ours.shape == official.shape
    most = max(1, ours.numel() // 10_000)
    wrong = (ours != official).sum()
    check(f"{quantity}, pixels that differ", wrong, 0, most, floor=1)


def test_parity_whole_model_maps(whole_model, monkeypatch):
    tensors, record = whole_model.tensors, whole_model.record
    for i, found in enumerate(predict(whole_model, "panoptic", monkeypatch)):
        labels = tensors[f"post{i}.semantic_argmax"]
        check_pixels("whole model: semantic map", found["semantic"], labels)
        check_pixels("whole model: panoptic map", found["panoptic"], tensors[f"post{i}.panoptic"])
        official = [(s["id"], s["category_id"], s["isthing"]) for s in record[f"post{i}.segments"]]
        ours = [(s["id"], s["label"], s["isthing"]) for s in found["segments_info"]]
        assert ours == official


def test_parity_whole_model_semantic_scores(whole_model):
    batch, (*_, output) = whole_model.batch, whole_model.outputs()
    for i, sample in enumerate(batch.samples):
        padded = tuple(batch.images.shape[-2:])
        masks = restore(output.masks(-1, i), padded, batch.sizes[i], sample.original_size)
        scores = semantic_map(output.logits[-1, i].softmax(-1)[:, :-1], masks)
        official = whole_model.tensors[f"post{i}.semantic_first10"]
        check("whole model: semantic scores", scores[:10], official)


@pytest.mark.parametrize("whole_model", ["dataseg"], indirect=True)  # lmseg has no instances
def test_parity_whole_model_instances(whole_model, monkeypatch):
    is_thing = torch.tensor(whole_model.label_space.is_thing)
    for i, found in enumerate(predict(whole_model, "instance", monkeypatch)):
        things = is_thing[found["labels"]]
        official = whole_model.tensors[f"post{i}.instance.scores"]
        check("whole model: scores of instances", found["scores"][things], official)
        official = whole_model.tensors[f"post{i}.instance.classes"]
        assert torch.equal(found["labels"][things], official)
