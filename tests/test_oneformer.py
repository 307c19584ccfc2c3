"""OneFormer: the drawn task and its targets, the text list, the contrastive loss, one per task.

Equations are compared with loops over floats. The tensors of the official code are in
test_parity_oneformer.py.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common.backbone
import common.rescue
import oneformer
from common.batch import Sample, collate
from common.datasets import load_datasets
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.runlog import RunLog
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
    image_size=64,
    batch_size=2,
    base_batch_size=2,
    workers=0,
    steps=1,
)
NAMES = ("cat", "sky", "dog", "road")
THINGS = (True, False, True, False)
SPACE = LabelSpace([Vocabulary("a", NAMES, is_thing=THINGS), Vocabulary("b", ("car", "tree"))])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def datasets(tiny_root):
    known = "coco-panoptic,ade20k"
    return load_datasets(known, "train", str(tiny_root), accepts=oneformer.SUPERVISION)


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
    lists = [oneformer.text_list(model.args, sample, NAMES) for sample in samples]
    texts = tokenize_lists(lists) if model.args.contrastive else None
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


def test_oneformer_projection_of_the_image_starts_as_in_the_code():
    """Kaiming's uniform numbers, of the square root of 3 / C at most; PyTorch's have 1 / C."""
    weight = model_of().class_input_proj.weight
    limit = math.sqrt(3 / SMALL.channels)
    assert math.sqrt(1 / SMALL.channels) < weight.abs().max() <= limit


# -- sentences -------------------------------------------------------------------------------------


def test_oneformer_another_task_is_refused():
    with pytest.raises(ValueError):
        model_of().task_embedding(["panoptic, things"])


def test_oneformer_the_task_is_embedded_in_float32():
    """bfloat16 would round the ids of tokens, which go up to 49407."""
    model = model_of(replace(SMALL, amp="on"))
    seen = []
    for layer in (model.task_mlp, model.class_layers[0].linear1):
        layer.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
    output, _ = step(model, [panoptic([0, 1])])
    assert seen == [torch.float32, torch.bfloat16] and output.queries.dtype == torch.float32


def test_oneformer_the_sentence_changes_the_prediction_and_nothing_else_does():
    model = model_of().eval()
    batch = collate([panoptic([0, 1]), panoptic([2, 1])])
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        outputs = []
        for name in (*oneformer.TASK_NAMES, "semantic"):
            embedding = model.task_embedding([name, name])
            outputs.append(model.decode(*features, SPACE.part("a"), embedding).logits)
    assert torch.equal(outputs[0], outputs[3])
    assert all((outputs[0] - other).abs().max() > 1e-3 for other in outputs[1:3])


def test_oneformer_images_of_a_batch_have_their_own_sentences():
    model = model_of().eval()
    image = panoptic([0, 1])
    batch = collate([image, image])
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        embedding = model.task_embedding(["semantic", "instance"])
        both = model.decode(*features, SPACE.part("a"), embedding)
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
    results = {"semantic": "semantic", "panoptic": "panoptic"}
    results["instance"] = "things" if "things" in task else "masks"
    assert {results[name] for name in oneformer.RESULTS[task]} <= found.keys()
    told.clear()
    oneformer.predict(model, batch, SPACE.part("a"), task, "instance")
    assert told == [["instance"]]


def test_oneformer_instances_are_things_alone(monkeypatch):
    """Of eight sure queries, two a class, the stuff is dropped."""
    model = model_of().eval()
    decode = model.decode

    def sure(*given):
        output = decode(*given)
        output.logits[-1, 0] = 9 * F.one_hot(torch.arange(8) % 4, 5).float()
        return output

    monkeypatch.setattr(model, "decode", sure)
    (found,) = oneformer.predict(model, collate([panoptic([0, 1])]), SPACE.part("a"), "instance")
    assert sorted(found["labels"].tolist()) == [0, 0, 2, 2]
    assert found["class_names"] == [NAMES[label] for label in found["labels"].tolist()]


def test_oneformer_thresholds_of_panoptic_maps(monkeypatch):
    """A query wins 0.8 of its mask. At an --object-threshold of 1 no query is a segment."""
    given = []
    rule = oneformer.panoptic_map
    monkeypatch.setattr(
        oneformer, "panoptic_map", lambda *a, **k: given.append((*a[2:], k)) or rule(*a, **k)
    )
    batch = collate([panoptic([0, 1])])
    for threshold in (0.0, 1.0):
        model = model_of(replace(SMALL, object_threshold=threshold)).eval()
        model.heads.layers[0].bias.data[-1] = -9  # all queries have a class
        (found,) = oneformer.predict(model, batch, SPACE.part("a"), "panoptic")
        assert given.pop() == (THINGS, threshold, 0.8, {"intersect": True})
        assert bool(found["segments_info"]) == bool(found["panoptic"].any()) == (threshold == 0)


@pytest.mark.parametrize("sentences", ["own", "each"])
def test_oneformer_evaluates_the_task_of_a_dataset(sentences, datasets, tmp_path, monkeypatch):
    """With --sentences each, datasets are evaluated with each of the sentences, too."""
    given = []

    def evaluate_dataset(predictor, dataset, transform, args, folder, title=""):
        predictor(None)  # a batch
        return {title or dataset.name: {}}

    def predict(model, batch, label_space, task="", sentence=""):
        given.append((label_space.datasets, task, sentence))

    monkeypatch.setattr(oneformer, "evaluate_dataset", evaluate_dataset)
    monkeypatch.setattr(oneformer, "predict", predict)
    args = replace(SMALL, sentences=sentences)
    space = oneformer.build_label_space(args, [d.vocabulary for d in datasets])
    found = oneformer.evaluate(args, None, space, datasets, tmp_path)
    words = ["", "semantic", "instance", "panoptic"][: 4 if sentences == "each" else 1]
    tasks = {"coco-panoptic": "panoptic, things", "ade20k": "semantic"}
    assert given == [([name], task, word) for name, task in tasks.items() for word in words]
    titles = ["", *(f" (the task is {word})" for word in words[1:])]
    assert list(found) == [name + title for name in tasks for title in titles]


# -- training --------------------------------------------------------------------------------------


def train(args, datasets, folder, monkeypatch) -> oneformer.Model:
    monkeypatch.setattr(common.rescue, "save_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(common.backbone, "load_pretrained", lambda *_: False)
    (folder / "args.json").touch()  # of the run folder
    space = oneformer.build_label_space(args, [d.vocabulary for d in datasets])
    model, _ = oneformer.train(args, datasets, space, folder, torch.device("cpu"))
    return model


@pytest.mark.parametrize("context", [8, 10])
def test_oneformer_without_the_contrastive_loss_there_is_no_text(
    context, datasets, tmp_path, monkeypatch
):
    """Then --context may leave no row of the 8 queries."""
    monkeypatch.setattr(oneformer, "tokenize_lists", None)
    args = replace(SMALL, contrastive=False, context=context)
    model = train(args, datasets[:1], tmp_path, monkeypatch)
    assert not hasattr(model, "text_encoder")


def test_oneformer_images_of_the_loader_have_drawn_tasks(datasets, tiny_root):
    """Those of a panoptic dataset. Their instances are the things of their own dataset."""
    cityscapes = load_datasets(
        "cityscapes-panoptic", "train", str(tiny_root), accepts=oneformer.SUPERVISION
    )
    known = [*datasets, *cityscapes]
    is_thing = {d.name: LabelSpace([d.vocabulary]).is_thing for d in known}
    tasks = {name: set() for name in is_thing}
    loader = oneformer.build_dataloader(replace(SMALL, batch_size=16), known, 0)
    for batch in itertools.islice(loader, 8):
        for sample in batch.samples:
            task = oneformer.task_of(sample)
            tasks[sample.dataset].add(task)
            if task == "instance":
                assert all(is_thing[sample.dataset][label] for label in sample.labels.tolist())
    panoptic = {*oneformer.TASK_NAMES}
    wanted = {"coco-panoptic": panoptic, "ade20k": {"semantic"}, "cityscapes-panoptic": panoptic}
    assert tasks == wanted


def test_oneformer_texts_of_a_step_are_those_of_its_images(datasets, tmp_path, monkeypatch):
    args = replace(SMALL, queries=20)
    loader = oneformer.build_dataloader(args, datasets[:1], 0)
    batch = next(iter(loader))
    names = datasets[0].vocabulary.names
    wanted = [oneformer.text_list(args, sample, names) for sample in batch.samples]
    assert wanted[0] != wanted[1]
    lists = []
    monkeypatch.setattr(RunLog, "batches", lambda log, *_: iter([(1, batch)]))
    monkeypatch.setattr(
        oneformer, "tokenize_lists", lambda given: lists.append(given) or tokenize_lists(given)
    )
    train(args, datasets[:1], tmp_path, monkeypatch)
    assert lists == [wanted]


def test_oneformer_recipe(datasets, tmp_path, monkeypatch):
    """Clipping and weight decay. As in the code, embeddings and norms do not decay, but a scale."""
    adamw, clip = torch.optim.AdamW, nn.utils.clip_grad_norm_
    optimizers, clipped = [], []
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[-1]
    )
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda p, norm: clipped.append(norm) or clip(p, norm)
    )
    model = train(SMALL, datasets[:1], tmp_path, monkeypatch)
    assert clipped == [0.01]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizers[0].param_groups
        for parameter in group["params"]
    }
    # embeddings in the code, and norms
    free = ["query_embed", "level_embed", "context", "text_encoder.token_embedding.weight"]
    free += ["text_encoder.ln_final.weight", "class_norm.bias", "head.decoder_norm.weight"]
    decayed = ["logit_scale", "text_encoder.positional_embedding", "pixel_decoder.level_embed"]
    decayed += ["task_mlp.0.weight", "class_input_proj.bias", "heads.layers.0.bias"]
    assert {decay[name] for name in free} == {0} and {decay[name] for name in decayed} == {0.05}
