"""OneFormer: the drawn task and its targets, the text list, the contrastive loss, one per task.

Equations are compared with loops over floats. The tensors of the official code are in
test_parity_oneformer.py.
"""

import inspect
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import common.backbone
import oneformer
from common.batch import Sample, collate
from common.datasets import load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.text_encoder import TextEncoder, tokenize, tokenize_lists

SMALL = oneformer.Args(
    backbone="resnet18",
    channels=32,
    queries=8,
    context=3,
    points=64,
    encoder_layers=1,
    decoder_layers=3,
    object_threshold=0.0,
    amp="off",
)
NAMES = ("cat", "sky", "dog", "road")
THINGS = (True, False, True, False)
SPACE = LabelSpace([Vocabulary("a", NAMES, is_thing=THINGS), Vocabulary("b", ("car", "tree"))])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def panoptic(labels: list[int], height: int = 40, width: int = 50) -> Sample:
    """A sample whose segments are columns of equal width; the last column is unlabelled."""
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    rows = torch.arange(width) * (len(labels) + 1) // width
    rows = torch.where(rows == len(labels), -1, rows)
    segments = rows.expand(height, -1).to(torch.int16).contiguous()
    sample = Sample.unlabelled(image, "a", 0, 0)
    labels = torch.tensor(labels, dtype=torch.long)
    return replace(sample, supervision="panoptic", labels=labels, segments=segments)


def model_of(args=SMALL) -> oneformer.Model:
    return oneformer.Model(args, SPACE, pretrained=False)


def step(model, samples: list[Sample]):
    """Output and losses of a training step."""
    batch = collate(samples)
    tasks = [oneformer.task_of(sample) for sample in samples]
    texts = None
    if model.args.contrastive:
        texts = tokenize_lists([oneformer.text_list(model.args, s, NAMES) for s in samples])
    output = model(batch.images, batch.sizes, SPACE.part("a"), tasks, texts)
    return output, oneformer.compute_losses(model.args, output, oneformer.prepare_targets(batch))


# -- the task of an image --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["semantic", "instances"])
def test_oneformer_targets_of_a_task_are_made_of_the_panoptic_map(kind):
    labels = [2, 1, 0, 2, 1]
    given = panoptic(labels)
    made = oneformer.derive(given, kind, THINGS)
    wanted = {}  # {target: its pixels}
    for row, label in enumerate(labels):
        pixels = {(y, x) for y, x in zip(*torch.where(given.segments == row))}
        pixels = {(int(y), int(x)) for y, x in pixels}
        if kind == "semantic":
            wanted[label] = wanted.get(label, set()) | pixels
        elif THINGS[label]:
            wanted[row] = pixels
    found = []
    for row, label in enumerate(made.labels.tolist()):
        pixels = {(int(y), int(x)) for y, x in zip(*torch.where(made.segments == row))}
        found.append((label, pixels))
    owner = {key: key if kind == "semantic" else labels[key] for key in wanted}
    assert len(found) == len(wanted)
    assert all((owner[key], pixels) in found for key, pixels in wanted.items())
    assert made.segments.max() < len(made.labels) and made.supervision == kind
    assert given.labels.tolist() == labels  # left as it was


@pytest.mark.parametrize(
    "number, task",
    [
        (0, "semantic"),
        (0.329, "semantic"),
        (0.331, "instance"),
        (0.659, "instance"),
        (0.661, "panoptic"),
    ],
)
def test_oneformer_a_third_of_the_images_has_each_task(number, task, monkeypatch):
    monkeypatch.setattr(oneformer, "uniform", lambda low, high: number)
    draw = oneformer.DrawTask(64, (1.0, 1.0), is_thing=THINGS)
    assert oneformer.task_of(draw(panoptic([0, 1, 2]))) == task
    semantic = replace(panoptic([0, 1, 2]), supervision="semantic")
    assert oneformer.task_of(draw(semantic)) == "semantic"  # it has no instances


def test_oneformer_an_image_without_a_thing_has_no_instance():
    made = oneformer.derive(panoptic([1, 3]), "instances", THINGS)
    assert not len(made.labels) and (made.segments == -1).all()
    assert oneformer.text_list(SMALL, made, NAMES) == ["an instance photo"] * 5
    model = model_of()
    _, losses = step(model, [made, made])
    losses["loss"].backward()
    assert losses["loss"].isfinite() and losses["loss_mask"] == losses["loss_dice"] == 0


# -- text ------------------------------------------------------------------------------------------


def test_oneformer_text_list_has_each_target_and_then_the_task():
    sample = panoptic([2, 1, 0, 2])
    texts = [f"a photo with a {name}" for name in ("cat", "sky", "dog", "dog")]
    assert oneformer.text_list(SMALL, sample, NAMES) == [*texts, "a panoptic photo"]
    many = panoptic([0] * 9)
    assert oneformer.text_list(SMALL, many, NAMES) == ["a photo with a cat"] * 5  # 8 - 3


def test_oneformer_texts_are_encoded_once_and_as_far_as_they_are_long():
    """The result is that of the whole lists, each padded to 77 tokens."""
    encoder = TextEncoder(64, 2).eval()
    lists = [["a cat", "a big dog", "a cat"], ["a sky", "a cat", "a cat"]]
    ids, rows = tokenize_lists(lists)
    assert len(ids) == 3 and ids.shape[1] == 5  # start, three words, end
    found = encoder(ids)[rows]
    for texts, encoded in zip(lists, found):
        torch.testing.assert_close(encoded, encoder(tokenize(texts)), rtol=1e-4, atol=1e-5)


def test_oneformer_context_must_leave_room_for_text():
    with pytest.raises(InputError, match="--context 8 must be below --queries 8"):
        model_of(replace(SMALL, context=8))


# -- losses ----------------------------------------------------------------------------------------


def test_oneformer_sec3_contrastive_loss():
    queries, text = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    scale = torch.tensor(7.0)

    def unit(rows):
        values = [x for row in rows.tolist() for x in row]
        length = math.sqrt(sum(x * x for x in values))
        return [x / length for x in values]

    q, t = [unit(x) for x in queries], [unit(x) for x in text]
    similar = [[7.0 * sum(a * b for a, b in zip(x, y)) for y in t] for x in q]
    wanted = 0.0
    for i in range(3):
        across = sum(math.exp(similar[i][j]) for j in range(3))
        down = sum(math.exp(similar[j][i]) for j in range(3))
        own = math.exp(similar[i][i])
        wanted -= (math.log(own / across) + math.log(own / down)) / 3
    loss = oneformer.loss_contrastive(queries, text, scale)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_oneformer_contrastive_loss_of_ranks(monkeypatch):
    """The mean over the ranks is the loss of all images at once."""
    queries, text, scale = torch.randn(4, 2, 3), torch.randn(4, 2, 3), torch.tensor(3.0)
    whole = oneformer.loss_contrastive(queries, text, scale)
    parts = []
    everything = [F.normalize(x.flatten(1), dim=-1) for x in (text, queries)]
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        of_all = iter(everything)
        monkeypatch.setattr(oneformer, "rank", lambda number=number: number)
        monkeypatch.setattr(oneformer, "all_rows", lambda _, of_all=of_all: next(of_all))
        parts.append(oneformer.loss_contrastive(queries[rows], text[rows], scale))
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize("contrastive", [True, False])
def test_oneformer_total_and_what_learns(contrastive):
    model = model_of(replace(SMALL, contrastive=contrastive)).train()
    samples = [panoptic([2, 1, 0]), oneformer.derive(panoptic([0, 1, 1]), "semantic", THINGS)]
    output, losses = step(model, samples)
    terms = {"loss_class", "loss_mask", "loss_dice"}
    terms |= {"loss_contrastive"} if contrastive else set()
    assert losses.keys() == terms | {"loss"}
    assert losses["loss"].item() == pytest.approx(sum(losses[term].item() for term in terms))
    if contrastive:
        compared = oneformer.loss_contrastive(output.queries, output.text, output.scale)
        assert losses["loss_contrastive"].item() == pytest.approx(0.5 * compared.item())
        assert output.scale.item() == pytest.approx(1 / 0.07)
    losses["loss"].backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    frozen = {name for name, _ in model.named_parameters()} - learning
    # timm's residual branches, and the offsets and weights of deformable attention, start at 0
    others = ("heads.layers.1.", "class_input_proj.bias", "backbone.", "pixel_decoder.level_embed")
    still = {name for name in frozen if not name.startswith(others)}
    assert not still
    assert any(name.startswith("text_encoder.") for name in learning) == contrastive


# -- sentences -------------------------------------------------------------------------------------


def test_oneformer_the_sentence_changes_the_prediction_and_nothing_else_does():
    model = model_of().eval()
    batch = collate([panoptic([0, 1]), panoptic([2, 1])])
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        outputs = []
        for name in (*oneformer.TASK_NAMES, "semantic"):
            embedded = model.task_embedding([name, name])
            outputs.append(model.decode(*features, SPACE.part("a"), embedded).logits)
    assert torch.equal(outputs[0], outputs[3])
    assert all((outputs[0] - other).abs().max() > 1e-3 for other in outputs[1:3])


def test_oneformer_images_of_a_batch_have_their_own_sentences():
    model = model_of().eval()
    image = panoptic([0, 1])
    batch = collate([image, image])
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        embedded = model.task_embedding(["semantic", "instance"])
        both = model.decode(*features, SPACE.part("a"), embedded)
        for row, name in enumerate(("semantic", "instance")):
            alone = model.decode(*features, SPACE.part("a"), model.task_embedding([name, name]))
            torch.testing.assert_close(both.logits[:, row], alone.logits[:, row])


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance", "panoptic, things"])
def test_oneformer_each_result_is_decoded_with_its_own_sentence(task, monkeypatch):
    model = model_of().eval()
    told = []
    embed = model.task_embedding
    monkeypatch.setattr(model, "task_embedding", lambda tasks: told.append(tasks) or embed(tasks))
    batch = collate([panoptic([0, 1])])
    (found,) = oneformer.predict(model, batch, SPACE.part("a"), task)
    assert sorted(told) == sorted([name] for name in oneformer.RESULTS[task])
    kinds = {"semantic": "semantic", "panoptic": "panoptic"}
    kinds["instance"] = "things" if "things" in task else "masks"
    assert {kinds[name] for name in oneformer.RESULTS[task]} <= found.keys()
    told.clear()
    oneformer.predict(model, batch, SPACE.part("a"), task, "instance")
    assert told == [["instance"]]


def sure_model(labels: list[int], monkeypatch, args=SMALL) -> oneformer.Model:
    """A model whose eight queries are sure of these classes, 4 for none."""
    model = model_of(args).eval()
    decode = model.decode

    def sure(*given):
        output = decode(*given)
        output.logits[-1, 0] = 9 * F.one_hot(torch.tensor(labels), 5).float()
        return output

    monkeypatch.setattr(model, "decode", sure)
    return model


def test_oneformer_instances_are_things_alone(monkeypatch):
    """Of eight sure queries, two a class, the stuff is dropped."""
    model = sure_model([0, 1, 2, 3] * 2, monkeypatch)
    (found,) = oneformer.predict(model, collate([panoptic([0, 1])]), SPACE.part("a"), "instance")
    assert sorted(found["labels"].tolist()) == [0, 0, 2, 2]
    assert found["class_names"] == [NAMES[label] for label in found["labels"].tolist()]


@pytest.mark.parametrize("threshold, segments", [(0.5, 1), (1.0, 0)])
def test_oneformer_a_segment_needs_the_probability_of_the_setting(threshold, segments, monkeypatch):
    args = replace(SMALL, object_threshold=threshold)
    model = sure_model([0] + [4] * 7, monkeypatch, args)
    (found,) = oneformer.predict(model, collate([panoptic([0, 1])]), SPACE.part("a"), "panoptic")
    assert len(found["segments_info"]) == segments
    assert found["panoptic"].unique().tolist() == ([0, 1] if segments else [0])


def test_oneformer_panoptic_maps_are_made_by_the_rule_of_the_code(monkeypatch):
    seen = []
    rule = oneformer.panoptic_map

    def spy(*given, **more):
        bound = inspect.signature(rule).bind(*given, **more).arguments
        seen.append([bound[name] for name in ("overlap_threshold", "intersect")])
        return rule(*given, **more)

    monkeypatch.setattr(oneformer, "panoptic_map", spy)
    oneformer.predict(model_of(), collate([panoptic([0, 1])]), SPACE.part("a"))
    assert seen == [[0.8, True]]


@pytest.mark.parametrize("sentences", ["own", "each"])
def test_oneformer_what_an_evaluation_tells_the_model(sentences, monkeypatch, tmp_path):
    """The task is that of the dataset. With "each", panoptic datasets are evaluated four times."""
    told = []

    def spy(predictor, dataset, transform, args, folder, title=""):
        predictor("batch")
        told[-1]["title"] = title
        return {}

    monkeypatch.setattr(oneformer, "evaluate_dataset", spy)
    monkeypatch.setattr(oneformer, "predict", lambda model, batch, **given: told.append(given))
    datasets = []
    for name, kind in (("b", "semantic"), ("a", "panoptic")):
        vocabulary = SPACE.vocabularies[name]
        datasets.append(SimpleNamespace(name=name, supervision=kind, vocabulary=vocabulary))
    args = replace(SMALL, sentences=sentences)
    oneformer.evaluate(args, None, SPACE, datasets, tmp_path)
    assert [given["label_space"].datasets for given in told[:2]] == [["b"], ["a"]]
    found = [(given["task"], given.get("sentence", ""), given["title"]) for given in told]
    wanted = [("semantic", "", ""), ("panoptic, things", "", "")]
    if sentences == "each":
        for name in ("semantic", "instance", "panoptic"):
            wanted.append(("panoptic, things", name, f"a (the task is {name})"))
    assert found == wanted


# -- layers ----------------------------------------------------------------------------------------


def test_oneformer_image_keys_start_as_in_the_code():
    """Kaiming's uniform weights (a = 1) have the variance 1 / C; the bias is zero."""
    layer = model_of().class_input_proj
    assert layer.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert layer.weight.abs().max() <= (3 / 32) ** 0.5 and not layer.bias.any()


def test_oneformer_the_task_is_embedded_in_float32():
    """bfloat16 would round the ids of tokens, which go up to 49407."""
    model = model_of(replace(SMALL, amp="on"))
    seen = []
    for layer in (model.task_mlp, model.class_layers[0].linear1):
        layer.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
    output, _ = step(model, [panoptic([0, 1])])
    assert seen == [torch.float32, torch.bfloat16] and output.queries.dtype == torch.float32


# -- training --------------------------------------------------------------------------------------

TRAINED = "cityscapes-panoptic,ade20k-panoptic"


@pytest.fixture(scope="module")
def datasets(tiny_root):
    return load_datasets(
        TRAINED, "train", str(tiny_root), masks=True, accepts=oneformer.SUPERVISION
    )


def train_one_step(datasets, folder, **given) -> oneformer.Model:
    args = replace(SMALL, image_size=64, batch_size=4, steps=1, workers=0, **given)
    label_space = oneformer.build_label_space(args, [d.vocabulary for d in datasets])
    (folder / "args.json").touch()  # of the run folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.backbone, "load_pretrained", lambda *_: False)
        model, _ = oneformer.train(args, datasets, label_space, folder, torch.device("cpu"))
    return model


def test_oneformer_images_draw_tasks_by_the_things_of_their_dataset(datasets):
    args = replace(SMALL, image_size=64, batch_size=8, workers=0)
    found = {}
    for batch in itertools.islice(oneformer.build_dataloader(args, datasets, 0), 6):
        assert len({oneformer.task_of(sample) for sample in batch.samples}) > 1
        for sample in batch.samples:
            if sample.supervision == "instances":
                found.setdefault(sample.dataset, set()).update(sample.labels.tolist())
    assert found.keys() == {d.name for d in datasets}
    for dataset in datasets:
        assert all(dataset.vocabulary.is_thing[label] for label in found[dataset.name])
        assert found[dataset.name]


@pytest.mark.parametrize("context", [8, 10])
def test_oneformer_without_the_loss_no_text_is_needed(context, datasets, monkeypatch, tmp_path):
    """Then --context does not matter, even where it leaves no row of 8 for text."""
    monkeypatch.setattr(oneformer, "tokenize_lists", None)
    model = train_one_step(datasets, tmp_path, contrastive=False, context=context)
    assert not hasattr(model, "text_encoder")


def test_oneformer_recipe(datasets, monkeypatch, tmp_path):
    """Each image has its own text. Clipping is the code's, and so is weight decay but for tau."""
    lists, batches, norms, groups = [], [], [], []
    spy_on = {"tokenize_lists": lists, "prepare_targets": batches}
    for name, seen in spy_on.items():
        own = getattr(oneformer, name)
        spy = lambda given, own=own, seen=seen: seen.append(given) or own(given)  # noqa: E731
        monkeypatch.setattr(oneformer, name, spy)
    clip, adamw = torch.nn.utils.clip_grad_norm_, torch.optim.AdamW
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm)
    )
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda given, **more: groups.extend(given) or adamw(given, **more)
    )
    model = train_one_step(datasets, tmp_path)

    names = {d.name: d.vocabulary.names for d in datasets}
    wanted = []
    for sample in batches[0].samples:
        wanted.append(oneformer.text_list(model.args, sample, names[sample.dataset]))
    assert lists == [wanted] and wanted != wanted[::-1]
    assert norms == [0.01]
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    undecayed = ("query_embed", "level_embed", "context", "logit_scale", "class_norm.weight")
    undecayed += ("text_encoder.token_embedding.weight", "text_encoder.ln_final.weight")
    decayed = ("text_encoder.positional_embedding", "pixel_decoder.level_embed", "task_mlp.0.bias")
    decayed += ("heads.layers.0.weight", "text_projector.0.weight", "backbone.body.conv1.weight")
    wanted = dict.fromkeys(undecayed, 0.0) | dict.fromkeys(decayed, 0.05)
    assert wanted.items() <= found.items()
