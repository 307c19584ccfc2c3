"""OneFormer against tensors recorded from the official implementation.

The file's own `Model`, `derive`, `text_list`, `compute_losses` and `predict` run. CONCORD_PARITY
names the folder of recorded tensors. Every size, constant and name is read from it.
`pytest -s` prints the worst relative error of each quantity.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from parity import case, check, check_gradients, report  # noqa: F401
from test_parity_mask2former import LossCase, check_norms, check_pixels, output_masks, stored
from torch import Tensor, nn

import common.text_encoder
import oneformer
from common.batch import Batch, Sample, collate
from common.convert import rename
from common.labels import LabelSpace, Vocabulary
from common.official_oneformer import ONEFORMER
from common.pixel_decoder import PixelDecoder
from common.segments import instances, panoptic_map
from common.text_encoder import TextEncoder, tokenize
from common.transformer import DecoderLayer, blocked_pixels

TEXT = ("text_encoder", "text_projector", "context", "logit_scale")


def own_names(official: dict) -> dict:
    """Returns values by our names. Those of a decoder alone may lack the start of their names."""
    heads = ("task_mlp", "text_", "prompt_ctx", "criterion", "sem_seg_head")

    def whole(key: str) -> str:
        if key.startswith(heads):
            return key
        return f"sem_seg_head.predictor.{key.removeprefix('predictor.')}"

    names = {key: rename(whole(key), ONEFORMER) for key in official}
    return {names[key]: value for key, value in official.items() if names[key]}


def changes_width(key: str) -> bool:
    """Whether it is of the convolutions before a decoder, which the real models do not have."""
    return "input_proj." in key and "class_input_proj" not in key and "pixel_decoder" not in key


def weights(tensors: dict) -> dict:
    """Returns the recorded weights by our names, with a whole table of tokens."""
    starts = ("predictor.", "sem_seg_head.", "task_mlp.", "text_", "prompt_ctx", "criterion.")
    official = {key: t for key, t in tensors.items() if key.startswith(starts)}
    rows = official.pop("text_encoder.token_embedding.rows", None)
    ids = official.pop("text_encoder.token_embedding.row_ids", None)
    official = {key: t for key, t in official.items() if not changes_width(key)}
    found = own_names(official)
    if rows is not None:
        table = torch.zeros(common.text_encoder.VOCABULARY, rows.shape[1])
        table[ids] = rows
        found["text_encoder.token_embedding.weight"] = table
    return found


def space(classes: int, things: list | None = None, names: list | None = None) -> LabelSpace:
    names = tuple(names or map(str, range(classes)))
    is_thing = tuple(i in things for i in range(classes)) if things is not None else None
    return LabelSpace([Vocabulary("any", names, is_thing=is_thing)])


class Features(nn.Module):
    """Stands in for the backbone: it returns the recorded maps."""

    def __init__(self, maps: list[Tensor]):
        super().__init__()
        self.maps = maps
        self.channels = [x.shape[1] for x in maps]

    def normalise(self, images: Tensor, sizes: list) -> Tensor:
        return images

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def build(monkeypatch, config: dict, label_space: LabelSpace, maps=(), **given) -> oneformer.Model:
    """Returns the Model with the sizes of a recording."""
    hidden = config["hidden_dim"]
    layer = partial(DecoderLayer, hidden, config.get("nheads", 8), config.get("dim_feedforward", 8))
    monkeypatch.setattr(oneformer, "Backbone", lambda *_, **__: Features(maps))
    monkeypatch.setattr(oneformer, "DecoderLayer", lambda *_: layer())
    monkeypatch.setattr(oneformer, "CLASS_LAYERS", config.get("class_dec_layers", 1))
    if pixels := config.get("pixel_decoder"):
        sizes = [pixels[key] for key in ("enc_layers", "dim_feedforward", "nheads")]
        decoder = PixelDecoder(pixels["feature_channels"], pixels["conv_dim"], *sizes)
        decoder.mask_features = nn.Conv2d(pixels["conv_dim"], pixels["mask_dim"], 1)
    monkeypatch.setattr(oneformer, "PixelDecoder", lambda *_: decoder if pixels else nn.Identity())
    text = config.get("text") or (config if "context_length" in config else None)
    if text:
        length = text["context_length"]
        monkeypatch.setattr(oneformer, "TEXT_LAYERS", text["layers"])
        monkeypatch.setattr(oneformer, "TextEncoder", partial(TextEncoder, length=length))
        monkeypatch.setattr(common.text_encoder, "tokenize", partial(tokenize, length=length))
    given = {"channels": hidden, "queries": config["num_queries"], "amp": "off"} | given
    if text:
        given["context"] = config["n_ctx"]
    layers = config.get("dec_layers", 1)
    args = oneformer.Args(contrastive=bool(text), decoder_layers=layers, **given)
    model = oneformer.Model(args, label_space, pretrained=False)
    channels = config.get("in_channels", hidden)
    model.class_input_proj = nn.Conv2d(channels, hidden, 1)
    model.head.mask_embed[-1] = nn.Linear(hidden, config.get("mask_dim", channels))
    model.task_mlp[0] = nn.Linear(config.get("task_seq_len", model.sentences.shape[1]), hidden)
    return model


def load(model: nn.Module, tensors: dict, absent: tuple[str, ...] = ()) -> None:
    """Loads the recorded weights. Parts that start with `absent` alone may be missing."""
    missing, unexpected = model.load_state_dict(weights(tensors), strict=False)
    assert not unexpected
    assert all(name.startswith(absent) for name in missing), missing


def check_all_norms(quantity: str, norms: dict, model: nn.Module, ours: dict) -> None:
    """Checks the norms of all recorded gradients. ours: tensors that are no parameters, by name"""
    of_inputs = {name: norms[name] for name in norms.keys() & ours.keys()}
    norms = {name: norm for name, norm in norms.items() if name not in of_inputs}
    norms = {key: norm for key, norm in norms.items() if not changes_width(key)}
    rows = norms.pop("text_encoder.token_embedding.rows", None)
    if rows is not None:
        norms["text_encoder.token_embedding.weight"] = rows
    norms = own_names(norms)
    parameters = dict(model.named_parameters()) | {name: ours[name] for name in of_inputs}
    norms |= of_inputs
    if norms.pop("class_input_proj.bias", None):  # all keys move alike: its gradient is rounding
        noise = parameters["class_input_proj.bias"].grad.norm()
        assert noise <= 1e-5 * max(norms.values())
    check_norms(quantity, norms, {name: parameters[name] for name in norms})


# -- task and text ---------------------------------------------------------------------------------


def panoptic_sample(panoptic: Tensor, segments_info: list[dict]) -> Sample:
    """Returns a sample of a recorded map. Crowd and segments without a pixel are left out."""
    rows = torch.full(panoptic.shape, -1, dtype=torch.int16)
    labels = []
    for info in segments_info:
        inside = panoptic == info["id"]
        if not info["iscrowd"] and inside.any():
            rows[inside] = len(labels)
            labels.append(info["category_id"])
    image = torch.zeros(3, *panoptic.shape, dtype=torch.uint8)
    sample = Sample.unlabelled(image, "any", 0, 0)
    labels = torch.tensor(labels, dtype=torch.long)
    return replace(sample, supervision="panoptic", segments=rows, labels=labels)


def test_parity_tokens():
    tensors, record = case("oneformer_text")
    sentences = tokenize(record["task_sentences"], record["config"]["task_seq_len"])
    assert torch.equal(sentences, tensors["task_tokens"])
    length = record["config"]["max_seq_len"]
    assert torch.equal(tokenize(record["extra_strings"], length), tensors["extra_tokens"])
    for row, sentence in zip(("semantic", "instance", "panoptic"), record["task_sentences"]):
        assert sentence == f"The task is {row}"


def test_parity_targets_and_texts_of_each_task():
    tensors, record = case("oneformer_text")
    config = record["config"]
    names = config["class_names"]
    args = oneformer.Args(queries=config["num_text"] + 5, context=5)
    is_thing = [i in config["thing_ids"] for i in range(len(names))]
    for e, example in enumerate(record["examples"]):
        given = panoptic_sample(tensors[f"example{e}.panoptic_map"], example["segments_info"])
        for task in oneformer.TASK_NAMES:
            official = example[task]
            sample = given
            if task != "panoptic":
                kind = "instances" if task == "instance" else task
                sample = oneformer.derive(given, kind, is_thing)
            assert oneformer.task_of(sample) == task
            masks = tensors[f"example{e}.{task}.masks"]
            ours = [sample.segments == row for row in range(len(sample.labels))]
            pairs = sorted((int(c), m.int().tolist()) for c, m in zip(sample.labels, ours))
            wanted = zip(official["gt_classes"], masks.int().tolist(), strict=True)
            assert pairs == sorted(wanted)
            texts = oneformer.text_list(args, sample, names)
            assert texts == official["texts"]
            recorded = tensors[f"example{e}.{task}.text_tokens"]
            assert torch.equal(tokenize(texts, config["max_seq_len"]), recorded)


# -- queries ---------------------------------------------------------------------------------------


def test_parity_queries(monkeypatch):
    tensors, record = case("oneformer_queries")
    config = record["config"]
    model = build(monkeypatch, config, space(config["num_classes"]))
    unused = ("layers.", "heads.", "head.mask_embed", "level_embed")
    load(model, tensors, unused)
    rows = [oneformer.TASK_NAMES.index(task) for task in config["tasks"]]
    assert torch.equal(model.sentences[rows], tensors["in.task_tokens"].float())
    task = model.task_embedding(config["tasks"])
    task.retain_grad()
    check("queries: task embedding", task, tensors["out.task_embedding"])
    mask_features = tensors["in.mask_features"].requires_grad_()
    queries = model.make_queries(mask_features, task)
    check("queries: task token", queries[:, -1], tensors["out.task_token"])
    check("queries: of the class transformer", queries[:, :-1], tensors["out.class_queries"])
    check("queries", queries, tensors["out.queries"])
    (queries * tensors["cotangent"]).sum().backward()
    ours = {"mask_features": mask_features, "task_embedding": task}
    own = own_names({key: key for key in stored(tensors, "grad.") if key not in ours})
    parameters = dict(model.named_parameters())
    ours |= {official: parameters[name] for name, official in own.items()}
    check_gradients("queries: gradients", ours, stored(tensors, "grad."))
    check_all_norms("queries: gradient norms", record["grad_norms"], model, ours)


# -- text ------------------------------------------------------------------------------------------


def test_parity_contrastive_loss(monkeypatch):
    tensors, record = case("oneformer_contrastive")
    config = record["config"]
    model = build(monkeypatch, config, space(1))
    load(model, tensors, ("pixel", "layers", "head", "query", "level", "task", "class_"))
    assert model.text_encoder.blocks[0].attn.heads == config["heads"]
    queries = tensors["in.queries"].requires_grad_()
    output = oneformer.Output(None, None, None, queries)
    monkeypatch.setattr(model, "extract", lambda *_: ())
    monkeypatch.setattr(model, "decode", lambda *_: output)
    texts = common.text_encoder.tokenize_lists(record["texts"])
    output = model(None, None, None, ["panoptic"] * config["batch"], texts)
    output.text.retain_grad()
    check("text: queries", output.text, tensors["out.text_queries"])
    check("text: scale", output.scale, record["scale_used"])
    loss = oneformer.loss_contrastive(output.queries, output.text, output.scale)
    check("text: contrastive loss", loss, record["loss_contrastive"])
    loss.backward()
    official = stored(tensors, "grad.")
    ids = tensors["text_encoder.token_embedding.row_ids"]
    table = model.text_encoder.token_embedding.weight
    rows = official.pop("text_encoder.token_embedding.rows")
    check("text: gradients of tokens", table.grad[ids], rows, 1e-3)
    ours = {"queries": queries, "text_queries": output.text}
    parameters = dict(model.named_parameters())
    own = own_names({key: key for key in official if key not in ours})
    ours |= {key: parameters[name] for name, key in own.items()}
    check_gradients("text: gradients", ours, official)
    check_all_norms("text: gradient norms", record["grad_norms"], model, ours)


# -- decoder ---------------------------------------------------------------------------------------


def project(tensors: dict, maps: list[Tensor]) -> list[Tensor]:
    """Applies the recorded convolutions that change the width of the maps, if there are any."""
    found = []
    for i, x in enumerate(maps):
        key = f"predictor.input_proj.{i}."
        if f"{key}weight" in tensors:
            x = nn.functional.conv2d(x, tensors[f"{key}weight"], tensors[f"{key}bias"])
        found.append(x)
    return found


def test_parity_transformer_decoder(monkeypatch):
    tensors, record = case("oneformer_decoder")
    config = record["config"]
    label_space = space(config["num_classes"])
    model = build(monkeypatch, config, label_space)
    load(model, tensors, ("task_mlp",))
    blocked = []

    def spy(*given):
        blocked.append(blocked_pixels(*given))
        return blocked[-1]

    monkeypatch.setattr(oneformer, "blocked_pixels", spy)
    mask_features = tensors["in.mask_features"].requires_grad_()
    task = tensors["in.task_embedding"].requires_grad_()
    maps = [tensors[f"in.multi_scale.{i}"].requires_grad_() for i in range(3)]
    output = model.decode(mask_features, project(tensors, maps), label_space, task)
    check("decoder: queries", output.queries, tensors["out.queries"])
    total = (output.queries * tensors["cotangent.queries"]).sum()
    assert len(output.logits) == config["dec_layers"] + 1 == len(blocked) + 1
    for z, logits in enumerate(output.logits):
        masks = output_masks(output, z)
        check("decoder: pred_logits", logits, tensors[f"out.layer{z}.pred_logits"])
        check("decoder: pred_masks", masks, tensors[f"out.layer{z}.pred_masks"])
        total = total + (logits * tensors[f"cotangent.layer{z}.pred_logits"]).sum()
        mean = masks.mean((2, 3)) * tensors[f"cotangent.layer{z}.pred_masks"]
        total = total + mean.sum()
    for i, ours in enumerate(blocked):
        official = tensors[f"out.attn_mask.{i}"].bool()  # before the repair of rows that block all
        assert torch.equal(ours, official & ~official.all(2, keepdim=True))
    total.backward()
    ours = {f"multi_scale.{i}": x for i, x in enumerate(maps)}
    ours |= {"mask_features": mask_features, "task_embedding": task}
    official = {key: t for key, t in stored(tensors, "grad.").items() if not changes_width(key)}
    parameters = dict(model.named_parameters())
    own = own_names({key: key for key in official if key not in ours})
    ours |= {key: parameters[name] for name, key in own.items()}
    check_gradients("decoder: gradients", ours, official)
    check_all_norms("decoder: gradient norms", record["grad_norms"], model, ours)


# -- whole model -----------------------------------------------------------------------------------


class WholeCase(LossCase):
    """The whole model but its backbone, with the recorded draws of its losses."""

    def __init__(self, monkeypatch):
        tensors, self.record = case("oneformer_whole_model")
        self.all = tensors
        self.method = oneformer
        self.tensors = stored(tensors, "train.")
        config = self.record["config"]
        self.layers = [*(f"layer{i}" for i in range(config["dec_layers"])), "final"]
        names = ("res2", "res3", "res4", "res5")
        self.maps = {name: tensors[f"features.{name}"].requires_grad_() for name in names}
        self.label_space = space(config["num_classes"], config["thing_ids"], config["class_names"])
        settings = {"points": config["num_points"]}
        settings["object_threshold"] = config["object_mask_threshold"]
        maps = [*self.maps.values()]
        self.model = build(monkeypatch, config, self.label_space, maps, **settings)
        load(self.model, tensors)
        self.args = self.model.args

    def use_official_limits(self, monkeypatch) -> None:
        """The recorded overlap of segments and number of instances, in place of our constants."""
        config = self.record["config"]

        def official_rule(p, masks, is_thing, threshold, *_, **__):
            return panoptic_map(p, masks, is_thing, threshold, config["overlap_threshold"], True)

        def official_instances(p, masks, _, *others):
            return instances(p, masks, config["test_topk_per_image"], *others)

        monkeypatch.setattr(oneformer, "panoptic_map", official_rule)
        monkeypatch.setattr(oneformer, "instances", official_instances)

    @property
    def config(self) -> dict:
        return self.record["config"]

    def batch(self) -> Batch:
        samples = []
        for i, images in enumerate(self.config["image_sizes_hw"]):
            image = torch.zeros(3, *images, dtype=torch.uint8)
            original = tuple(self.config["output_sizes_hw"][i])
            samples.append(replace(Sample.unlabelled(image, "any", i, i), original_size=original))
        batch = collate(samples, self.config["size_divisibility"])
        assert list(batch.images.shape[-2:]) == self.config["padded_hw"]
        return batch

    def training_batch(self) -> Batch:
        """The recorded maps, as what the drawn task makes of them."""
        batch = self.batch()
        is_thing = self.label_space.is_thing
        for i, facts in enumerate(self.record["train"]["images"]):
            sample = panoptic_sample(self.all[f"example{i}.panoptic_map"], facts["segments_info"])
            if facts["task"] != "panoptic":
                kind = {"semantic": "semantic", "instance": "instances"}[facts["task"]]
                sample = oneformer.derive(sample, kind, is_thing)
            order = self.in_official_order(sample, i)
            batch.samples[i] = replace(batch.samples[i], **order)
        return batch

    def in_official_order(self, sample: Sample, image: int) -> dict:
        """The targets of a sample, sorted as the recorded ones, to which its draws belong."""
        masks = self.tensors[f"target{image}.masks"].bool()
        ours = [sample.segments == row for row in range(len(sample.labels))]
        order = [next(n for n, m in enumerate(ours) if torch.equal(m, mask)) for mask in masks]
        assert sorted(order) == list(range(len(ours)))
        labels = sample.labels[order]
        assert torch.equal(labels, self.tensors[f"target{image}.labels"])
        place = torch.tensor([*(order.index(row) for row in range(len(order))), -1])
        segments = place[sample.segments.long()].to(torch.int16)
        return {"supervision": sample.supervision, "labels": labels, "segments": segments}


def test_parity_training_step(monkeypatch):
    recorded = WholeCase(monkeypatch)
    record, model, tensors = recorded.record, recorded.model, recorded.tensors
    batch = recorded.training_batch()
    names = recorded.label_space.names
    tasks = [oneformer.task_of(sample) for sample in batch.samples]
    texts = [oneformer.text_list(recorded.args, sample, names) for sample in batch.samples]
    assert tasks == [facts["task"] for facts in record["train"]["images"]]
    assert texts == [facts["texts"] for facts in record["train"]["images"]]
    tokens = common.text_encoder.tokenize_lists(texts)
    output = model(batch.images, batch.sizes, recorded.label_space, tasks, tokens)
    check("step: mask features", output.mask_features, tensors["mask_features"])
    check("step: queries", output.queries, tensors["queries"])
    check("step: text queries", output.text, tensors["text_queries"])
    for z, layer in enumerate(recorded.layers):
        check("step: logits", output.logits[z], tensors[f"pred.{layer}.logits"])
        if f"pred.{layer}.masks" in tensors:
            check("step: masks", output_masks(output, z), tensors[f"pred.{layer}.masks"])
    recorded.targets = oneformer.prepare_targets(batch)
    recorded.feed_points(monkeypatch)
    recorded.feed_samples(monkeypatch)
    losses = oneformer.compute_losses(recorded.args, output, recorded.targets)
    official, factors = record["train"]["losses_unweighted"], recorded.config["loss_weights"]
    names = {"loss_class": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}
    names["loss_contrastive"] = "loss_contrastive"
    for ours, theirs in names.items():
        terms = [value for name, value in official.items() if name.startswith(theirs)]
        assert len(terms) == (1 if ours == "loss_contrastive" else len(recorded.layers))
        check(f"step: {ours}", losses[ours], factors[theirs] * sum(terms))
    check("step: total", losses["loss"], record["train"]["total_weighted"])
    losses["loss"].backward()
    ours = {f"features.{name}": x for name, x in recorded.maps.items()}
    official = stored(tensors, "grad.")
    parameters = dict(model.named_parameters())
    own = own_names({key: key for key in official if key not in ours})
    ours |= {key: parameters[name] for name, key in own.items()}
    check_gradients("step: gradients", ours, official)
    check_all_norms("step: gradient norms", record["grad_norms"], model, ours)


def check_instances(things: dict, official: dict) -> None:
    check("inference: scores of instances", things["scores"], official["instance.scores"])
    assert torch.equal(things["labels"], official["instance.classes"])
    check_pixels("inference: instances", things["masks"], official["instance.masks"].bool())


@pytest.mark.parametrize("name", oneformer.TASK_NAMES)
def test_parity_inference(name, monkeypatch):
    """All results under each sentence, as `--sentences each` evaluates them."""
    recorded = WholeCase(monkeypatch)
    recorded.use_official_limits(monkeypatch)
    tensors = stored(recorded.all, f"infer.{name}.")
    decode, outputs = recorded.model.decode, []

    def spy(*given):
        outputs.append(decode(*given))
        return outputs[-1]

    monkeypatch.setattr(recorded.model, "decode", spy)
    given = recorded.model, recorded.batch(), recorded.label_space, "panoptic, things"
    predictions = oneformer.predict(*given, name)
    (output,) = outputs
    check("inference: logits", output.logits[-1], tensors["pred_logits"])
    check("inference: masks", output_masks(output, -1), tensors["pred_masks"])
    segments = recorded.record["infer"]["panoptic_segments"][name]
    for i, found in enumerate(predictions):
        official = stored(tensors, f"image{i}.")
        check_pixels("inference: semantic map", found["semantic"], official["semantic_argmax"])
        check_pixels("inference: panoptic map", found["panoptic"], official["panoptic"])
        theirs = [(s["id"], s["category_id"], s["isthing"]) for s in segments[i]]
        assert [(s["id"], s["label"], s["isthing"]) for s in found["segments_info"]] == theirs
        check_instances(found["things"], official)


def test_parity_own_sentences(monkeypatch):
    """Without a sentence, each result is that of the sentence of its own task."""
    recorded = WholeCase(monkeypatch)
    recorded.use_official_limits(monkeypatch)
    batch = recorded.batch()
    found = oneformer.predict(recorded.model, batch, recorded.label_space, "panoptic, things")
    for i, result in enumerate(found):
        of = {
            name: stored(recorded.all, f"infer.{name}.image{i}.") for name in oneformer.TASK_NAMES
        }
        semantic, panoptic = of["semantic"]["semantic_argmax"], of["panoptic"]["panoptic"]
        check_pixels("own sentences: semantic map", result["semantic"], semantic)
        check_pixels("own sentences: panoptic map", result["panoptic"], panoptic)
        check_instances(result["things"], of["instance"])
