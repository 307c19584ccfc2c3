"""Classifiers from pictures, text, or both: each step against loops over floats, and the command.

The published tables of mm-ovod are read where they are.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL, REPO
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from common import aggregator, exemplars, hub, pictures, text
from common.aggregator import Aggregator, info_nce, load_aggregator, two_sets
from common.command import run_command
from common.datasets import Dataset
from common.datasets.index import Index
from common.errors import InputError
from common.exemplars import Args, fuse
from common.labels import Vocabulary
from common.pictures import Picture, Pool, Tower, Views, draw, encode, square_around

sys.path.insert(0, str(REPO))
from benchmarks.exemplars import ROWS, exchange, table

COLOURS = {"ant": (200, 0, 0), "bee": (0, 200, 0), "cat": (0, 0, 200)}


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)  # no test uses the network
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a sub-folder of one to three pictures of one colour for each class."""
    for count, (name, colour) in enumerate(COLOURS.items(), 1):
        (tmp_path / "im" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40 + i, 30), colour).save(tmp_path / "im" / name / f"{i}.png")
    return tmp_path / "im"


@pytest.fixture
def stub(monkeypatch):
    """Replaces the image encoder by the mean colour, in 0..1."""

    def preprocess(image: Image.Image) -> torch.Tensor:
        pixels = np.array(image.convert("RGB").resize((4, 4)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    tower = Tower(4, preprocess, lambda images: images.mean((2, 3)))
    monkeypatch.setattr(exemplars, "load_tower", lambda encoder: tower)
    return tower


def command(*argv) -> None:
    """python -m common.exemplars ARGV, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["exemplars", *map(str, argv), "--workers", "0"])
        exemplars.main()


def boxed(boxes: list[list[float]], labels: list[int], ignore: list[bool] | None = None) -> Dataset:
    """A dataset of one image with these boxes, of the classes of COLOURS."""
    count = len(boxes)
    index = Index(
        source="a.json",
        file_names=np.array([b"0.png"]),
        image_ids=[0],
        sizes=np.array([[100, 120]], np.int32),
        offsets=np.array([0, count]),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        areas=np.zeros(count, np.float32),
        ignore=np.array(ignore or [False] * count),
    )
    return Dataset("a", Vocabulary("a", tuple(COLOURS)), index, Path("nowhere"))


# -- pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, context, square",
    [
        # 11 x 21 pixels, centre (15.5, 30.5), half a side 10.5
        ([10.3, 20.8, 20.9, 41.6], 0.0, (5, 20, 26, 41)),
        # half a side 10.5 * 1.4 = 14.7
        ([10.3, 20.8, 20.9, 41.6], 0.4, (0, 15, 30, 45)),
        ([10.3, 20.8, 20.9, 41.6], 0.2, (2, 17, 28, 43)),
        # cut at the right and the bottom of the image
        ([100.0, 80.0, 119.5, 99.5], 0.4, (96, 76, 120, 100)),
    ],
)
def test_square_with_context(box, context, square):
    assert square_around(box, (120, 100), context) == square


def test_pool_has_each_class_its_pictures():
    boxes = [[0, 0, 9, 9], [0, 0, 5, 5], [1, 1, 1, 8], [0, 0, 20, 10], [0, 0, 50, 50]]
    boxes.append([120, 0, 130, 10])  # outside the image
    dataset = boxed(boxes, [2, 0, 2, 2, 0, 0], [False, False, False, False, True, False])
    pool = Pool(dataset)
    kept = {name: [pool.picture(row).box.tolist() for row in pool.rows(name)] for name in COLOURS}
    # neither the box without a width, nor the crowd, nor the box outside
    assert kept == {"ant": [boxes[1]], "bee": [], "cat": [boxes[0], boxes[3]]}
    assert [pool.areas[row] for row in pool.rows("Cat")] == [81, 200]
    assert not len(pool.rows("dog"))
    dataset.index.relative = True
    dataset.index.boxes = dataset.index.boxes / 120
    assert Pool(dataset).areas[0] == pytest.approx(9 * 9 / 120**2 * 640 * 480)


def test_pictures_are_drawn_by_area_without_repetition():
    sides = [2, 4, 30, 6, 8]
    pool = Pool(boxed([[0, 0, side, side] for side in sides], [1] * 5))
    for seed in range(5):
        drawn = [picture.box[2] for picture in draw([pool], "bee", 3, seed)]
        weights = np.array(sides) ** 2 / sum(side**2 for side in sides)
        expected = np.random.default_rng(seed).choice(sides, 3, replace=False, p=weights)
        assert drawn == expected.tolist() and len(set(drawn)) == 3
    firsts = [draw([pool], "bee", 1, seed)[0].box[2] for seed in range(100)]
    assert firsts.count(30) > 75  # 900 of 1020
    assert len(draw([pool], "bee", 9, 0)) == 5 and draw([pool], "ant", 2, 0) == []
    # a picture without a box counts as one of 100 x 100 pixels
    pool.areas[:] = [1e4, 1e4, 1e4, 1e4, 0.5]
    others = Pool(boxed([[0, 0, 1, 1]] * 5, [1] * 5))
    found = [draw([others, pool], "bee", 4, seed) for seed in range(20)]
    assert sum(picture.box[2] > 1 for chosen in found for picture in chosen) >= 79


def test_whole_pictures_have_the_published_area(folder):
    (dataset,) = exemplars.load_datasets(f"a={folder}", "train", accepts=exemplars.KINDS)
    assert Pool(dataset).areas.tolist() == [1e4] * 6


def test_a_crop_is_of_the_box_nearest_to_the_annotated_one(tmp_path):
    pixels = np.zeros((100, 120, 3), np.uint8)
    pixels[10:31, 20:41] = (255, 0, 0)
    pixels[60:81, 70:91] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    dataset = boxed([[20, 10, 40, 30], [70, 60, 90, 80]], [0, 0])
    dataset.images = tmp_path
    for box, colour in (([20, 10, 40, 30], 0), ([70, 60, 90, 80], 1)):
        crop = Picture(dataset, 0, 0, np.array(box, np.float32)).crop(0.0)
        assert crop.size == (21, 21)
        assert (np.array(crop)[..., colour] == 255).all()
    with pytest.raises(InputError, match=r"a box of 'bee' is outside its image '0\.png'"):
        Picture(dataset, 0, 1, np.array(box, np.float32)).crop(0.0)
    assert Picture(dataset, 0, 0, None).crop(0.4).size == (120, 100)
    # as fractions of the image
    dataset.index.relative = True
    dataset.index.boxes = dataset.index.boxes / np.array([120, 100, 120, 100], np.float32)
    crop = Picture(dataset, 0, 0, dataset.index.boxes[1]).crop(0.0)
    assert np.array(crop)[..., 1].mean() > 0.9 * 255  # fractions are rounded


def test_views_are_the_same_in_any_process_and_differ_from_each_other(folder, stub):
    (dataset,) = exemplars.load_datasets(f"a={folder}", "train", accepts=exemplars.KINDS)
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    for path in folder.glob("*/*.png"):
        Image.fromarray(noise).save(path)
    pool = Pool(dataset)
    chosen = [draw([pool], name, 5, 0) for name in COLOURS]
    views = Views(chosen, stub, 0.4, 3, 7)
    state = torch.get_rng_state()
    found = [views[row] for row in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [images.shape for images in found] == [(n, 3, 3, 4, 4) for n in (1, 2, 3)]
    assert all(torch.equal(images, views[row]) for row, images in enumerate(found))
    assert not torch.equal(found[0][0], found[1][0])  # of one picture, in two classes
    flat = found[2].flatten(0, 1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(flat, 2))
    plain = Views(chosen, stub, 0.4, 0, 7)[1]  # the pictures themselves
    assert plain.shape == (2, 1, 3, 4, 4) and torch.equal(plain[0, 0], stub.preprocess(noise_image))
    features = encode(stub, views, 0)
    assert [tuple(f.shape) for f in features] == [(1, 3, 3), (2, 3, 3), (3, 3, 3)]
    torch.testing.assert_close(features[2], found[2].mean((3, 4)))


noise_image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))


def test_lite0_is_the_network_of_the_package():
    tower = pictures.lite0_tower()
    image = Image.effect_noise((300, 260), 80).convert("RGB")
    pixels = tower.preprocess(image)
    assert pixels.shape == (3, 224, 224)
    black = tower.preprocess(Image.new("RGB", (224, 224)))
    assert torch.equal(black, torch.full((3, 224, 224), -127 / 128))
    with torch.no_grad():
        rows = tower.encode(pixels[None].repeat(5, 1, 1, 1))
    assert rows.shape == (5, 1280) and (rows >= 0).all() and rows.std() > 0
    torch.testing.assert_close(rows[4], rows[0])


# -- rows ------------------------------------------------------------------------------------------


def test_rows_are_means_over_pictures_and_views():
    features = [torch.randn(2, 3, 8), torch.randn(1, 4, 8)]
    rows = exemplars.image_rows(Args(), features)
    for row, feature in zip(rows, features):
        count = feature.shape[0] * feature.shape[1]
        for d in range(8):
            total = sum(float(feature[p, v, d]) for p in range(len(feature)) for v in range(3))
            total += sum(float(feature[p, 3, d]) for p in range(len(feature)) if count == 4)
            assert float(row[d]) == pytest.approx(total / count, abs=1e-6)
    centred = exemplars.image_rows(Args(encoder="lite0"), features)
    torch.testing.assert_close(centred, rows - (rows[0] + rows[1]) / 2)


def norm(row: list[float]) -> list[float]:
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def test_text_and_image_are_normalised_added_and_normalised():
    words, images = 5 * torch.randn(4, 6), 0.1 * torch.randn(4, 6)
    both = fuse(words, images)
    for w, v, found in zip(words.tolist(), images.tolist(), both.tolist()):
        expected = norm([a + b for a, b in zip(norm(w), norm(v))])
        assert found == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(fuse(images, words), both)
    with pytest.raises(InputError, match="width 6, the pictures 5"):
        fuse(words, images[:, :5])


def test_descriptions_are_means_that_are_not_normalised_before(tmp_path, monkeypatch):
    vectors = {"red thing": [3.0, 0.0], "big": [0.0, 1.0], "buzzes": [1.0, 1.0]}

    class Clip:
        logit_scale = torch.zeros(())

        def encode_text(self, tokens):
            return tokens

    def tokenize(sentences):
        return torch.tensor([vectors[s] for s in sentences])

    monkeypatch.setattr(exemplars, "load_clip", lambda *_: (Clip(), tokenize))
    file = tmp_path / "d.json"
    file.write_text(json.dumps({"Ant_hill": ["red thing", "\nbig "], "bee": ["buzzes"]}))
    rows = exemplars.description_rows(file, "A/b", ("bee", "ant hill"))
    assert rows[0].tolist() == pytest.approx(norm([1, 1])) and rows[1].tolist() == pytest.approx(
        norm([3, 1])
    )
    for content, complaint in (
        ('{"bee": ["buzzes"]}', "has no sentence for 'ant hill'"),
        ('["bee"]', "give json, {class name"),
        ("{", "give json, {class name"),
        ('{"bee": 3}', "give json, {class name"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=complaint):
            exemplars.description_rows(file, "A/b", ("bee", "ant hill"))


# -- the aggregator --------------------------------------------------------------------------------


def linear(weight, x: list[float], bias=None) -> list[float]:
    out = [sum(float(w) * v for w, v in zip(row, x)) for row in weight]
    return out if bias is None else [o + float(b) for o, b in zip(out, bias)]


def layer_norm(x: list[float], weight, bias) -> list[float]:
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) / spread * float(w) + float(b) for v, w, b in zip(x, weight, bias)]


def aggregate(state: dict, features: list[list[float]]) -> list[float]:
    """The network in loops over floats, with the published names of its tensors."""
    width = len(features[0])
    head = width // 8
    tokens = [
        linear(state["mapper.linear.weight"], f, state["mapper.linear.bias"]) for f in features
    ]
    tokens.append(state["mapper.cls_token"][0].tolist())
    for i in range(2):
        s = {
            key.split(f"layers.{i}.")[1]: value
            for key, value in state.items()
            if f"layers.{i}." in key
        }
        normed = [layer_norm(t, s["norm1.weight"], s["norm1.bias"]) for t in tokens]
        queries = [linear(s["attn.to_queries.weight"], t) for t in normed]
        both = [linear(s["attn.to_keys_values.weight"], t) for t in normed]
        for t, query in enumerate(queries):
            mixed = []
            for start in range(0, width, head):
                part = range(start, start + head)
                scores = [sum(query[d] * kv[d] for d in part) / math.sqrt(head) for kv in both]
                weights = [math.exp(score) for score in scores]
                mixed += [
                    sum(w * kv[width + d] for w, kv in zip(weights, both)) / sum(weights)
                    for d in part
                ]
            out = linear(s["attn.project.weight"], mixed, s["attn.project.bias"])
            tokens[t] = [a + b for a, b in zip(tokens[t], out)]
        for t, token in enumerate(tokens):
            hidden = layer_norm(token, s["norm2.weight"], s["norm2.bias"])
            hidden = linear(s["mlp.fc1.weight"], hidden, s["mlp.fc1.bias"])
            hidden = [max(h, 0.0) for h in hidden]
            out = linear(s["mlp.fc2.weight"], hidden, s["mlp.fc2.bias"])
            tokens[t] = [a + b for a, b in zip(token, out)]
    return tokens[-1]


def published(model: Aggregator) -> dict[str, torch.Tensor]:
    """The state of an aggregator with the published names."""
    state = {}
    for key, tensor in model.state_dict().items():
        inner = "transformer." if key.startswith("layers.") else ""
        state[f"mapper.{inner}{key}"] = tensor
    return state


def random_aggregator(width: int = 16) -> Aggregator:
    model = Aggregator(width, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def test_aggregator_is_the_published_network(tmp_path):
    model = random_aggregator()
    torch.save({"state_dict": published(model), "epoch": 3}, tmp_path / "a.pth.tar")
    loaded = load_aggregator(str(tmp_path / "a.pth.tar"), 16)
    features = torch.randn(2, 3, 16)
    with torch.no_grad():
        found = loaded(features)
        # neither the order nor the number of the pictures is built in
        torch.testing.assert_close(loaded(features[:, [2, 0, 1]]), found)
        assert loaded(features[:, :1]).shape == (2, 16)
    for row, own in zip(found.tolist(), features.tolist()):
        assert row == pytest.approx(aggregate(published(model), own), rel=1e-3, abs=1e-3)


def test_aggregator_of_many_layers():
    shapes = {key: tuple(t.shape) for key, t in published(Aggregator(512)).items()}
    assert len(shapes) == 51 and shapes["mapper.cls_token"] == (1, 512)
    assert shapes["mapper.transformer.layers.3.attn.to_keys_values.weight"] == (1024, 512)
    assert shapes["mapper.transformer.layers.0.mlp.fc1.weight"] == (2048, 512)
    with pytest.raises(InputError, match="width 12 cannot be aggregated by 8 heads"):
        Aggregator(12)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda s: s.pop("mapper.linear.bias"), r"lacks tensor 'linear.bias'"),
        (lambda s: s["mapper.linear.bias"].fill_(math.nan), "has a damaged tensor 'linear.bias'"),
        (lambda s: s.update({"mapper.linear.bias": torch.ones(3)}), "has a damaged tensor"),
        (lambda s: s.update({"mapper.other": torch.ones(3)}), "the unknown tensor 'other'"),
        (lambda s: s.pop("mapper.cls_token"), "holds no visual aggregator"),
        (lambda s: s.clear(), "holds no visual aggregator"),
    ],
)
def test_broken_aggregators(tmp_path, change, complaint):
    state = {key: tensor.clone() for key, tensor in published(random_aggregator()).items()}
    change(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(InputError, match=f"^--aggregator: .*{complaint}"):
        load_aggregator(str(tmp_path / "a.pth"), 16)


def test_aggregator_of_another_width_or_with_code(tmp_path):
    save_file(random_aggregator().state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="of width 16, the encoder's have 24"):
        load_aggregator(str(tmp_path / "a.safetensors"), 24)
    torch.save({"state_dict": Vocabulary("a", ("b",))}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="no file of plain tensors"):
        load_aggregator(str(tmp_path / "a.pth"), 16)


def test_info_nce():
    first, second = torch.randn(3, 4), 7 * torch.randn(3, 4)
    a, b = ([norm(row) for row in x.tolist()] for x in (first, second))
    s = [[sum(x * y for x, y in zip(p, q)) / 0.07 for q in b] for p in a]
    expected = 0.0
    for i in range(3):
        expected += math.log(sum(math.exp(s[i][j]) for j in range(3))) - s[i][i]
        expected += math.log(sum(math.exp(s[j][i]) for j in range(3))) - s[i][i]
    assert float(info_nce(first, second)) == pytest.approx(expected / 6, rel=1e-4)


@pytest.mark.parametrize("count", [2, 9])
def test_two_sets_share_no_picture(count):
    features = torch.arange(5.0)[:, None, None] * 10 + torch.arange(3.0)[:, None]  # (5, 3, 1)
    seen = set()
    for _ in range(30):
        first, second = two_sets(features, count)
        assert first.shape == second.shape == (count, 1)
        one, other = ((values // 10).flatten().tolist() for values in (first, second))
        assert not set(one) & set(other)
        assert count > 2 or (len(set(one)) == 2 and len(set(other)) == 2)
        seen.update(first.flatten().tolist(), second.flatten().tolist())
    assert len(seen) == 15  # all pictures and all views


def test_training_teaches_to_tell_classes_apart():
    """The class of a picture is in four of its numbers, the others are larger and say nothing."""

    def sample(classes: int) -> list[torch.Tensor]:
        found = [3 * torch.randn(8, 2, 16) for _ in range(classes)]
        for features in found:
            features[..., :4] = torch.randn(4)
        return found

    def told_apart(model) -> float:
        one, other = (torch.stack([f[rows, 0] for f in unseen]) for rows in (slice(4), slice(4, 8)))
        with torch.no_grad():
            first, second = (F.normalize(model(x), dim=-1) for x in (one, other))
        return float(((first @ second.T).argmax(1) == torch.arange(len(unseen))).float().mean())

    unseen = sample(12)
    model = aggregator.train(sample(48), 4, 60, 3e-3)
    mean = told_apart(lambda features: features.mean(1))
    assert not model.training and told_apart(model) > mean + 0.4, mean
    with pytest.raises(InputError, match="two classes with two pictures each"):
        aggregator.train([torch.randn(1, 5, 16), torch.randn(3, 5, 16)], 2, 1, 1e-3)


# -- the command -----------------------------------------------------------------------------------


def test_a_folder_becomes_a_table_in_the_order_of_its_folders(folder, stub, tmp_path):
    command(folder, "--out", tmp_path / "t.npy", "--views", 0)
    assert (tmp_path / "t.txt").read_text() == "ant\nbee\ncat\n"
    rows = text.embed(list(COLOURS), str(tmp_path / "t.npy"))
    assert np.load(tmp_path / "t.npy").dtype == np.float32
    torch.testing.assert_close(rows, torch.eye(3), atol=1e-4, rtol=0)
    command(folder, "--out", tmp_path / "u.npy", "--views", 0, "--classes", "Cat, ant")
    assert (tmp_path / "u.txt").read_text() == "Cat\nant\n"
    torch.testing.assert_close(np.load(tmp_path / "u.npy"), np.load(tmp_path / "t.npy")[[2, 0]])


def test_text_is_added_to_the_pictures_or_stands_alone(folder, stub, tmp_path):
    np.save(tmp_path / "text.npy", 9 * np.eye(3, dtype=np.float16)[[1, 1, 2]])
    given = ["--text", tmp_path / "text.npy", "--out", tmp_path / "t.npy"]
    command(folder, *given, "--views", 0)
    half = math.sqrt(0.5)
    expected = np.array([[half, half, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), expected, atol=1e-4)
    command("--classes", "x, y, z", *given)
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), np.eye(3)[[1, 1, 2]], atol=1e-6)
    assert (tmp_path / "t.txt").read_text() == "x\ny\nz\n"


def test_a_row_is_the_feature_of_clip(folder, small_clip, tmp_path):
    """One picture, no other views: the row is CLIP's own feature, as open_clip computes it."""
    import open_clip

    flags = ["--encoder", small_clip, "--out", tmp_path / "t.npy"]
    command(folder, *flags, "--views", 0, "--classes", "ant")
    name, _, weights = small_clip.partition("/")
    model, _, preprocess = open_clip.create_model_and_transforms(name, weights)
    with torch.no_grad():
        image = preprocess(Image.open(folder / "ant/0.png"))
        expected = F.normalize(model.eval().encode_image(image[None]), dim=-1)
    np.testing.assert_allclose(np.load(tmp_path / "t.npy"), expected, atol=1e-5)
    command(folder, *flags, "--text", "a")  # both from one CLIP
    rows = np.load(tmp_path / "t.npy")
    assert rows.shape == (3, 24)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    words = text.embed(list(COLOURS), small_clip, "a").numpy()
    command(folder, *flags)
    alone = np.load(tmp_path / "t.npy")
    sums = words + alone
    np.testing.assert_allclose(rows, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-5)


def test_an_aggregator_is_trained_and_makes_the_rows(folder, small_clip, tmp_path):
    flags = [folder, "--encoder", small_clip, "--views", 2]
    out = tmp_path / "a.safetensors"
    (folder / "empty").mkdir()
    command(*flags, "--train", "--steps", 2, "--out", out)
    assert set(load_file(out)) == set(Aggregator(24).state_dict())
    command(*flags, "--aggregator", out, "--out", tmp_path / "t.npy")
    rows = np.load(tmp_path / "t.npy")
    _, chosen = exemplars.choose(Args(str(folder)))
    args = Args(encoder=small_clip, views=2, aggregator=str(out), workers=0)
    features = exemplars.picture_features(args, chosen)
    with torch.no_grad():
        model = load_aggregator(str(out), 24)
        expected = torch.cat([model(f.flatten(0, 1)[None]) for f in features])
    np.testing.assert_allclose(rows, F.normalize(expected, dim=-1), atol=1e-5)


def test_pictures_of_several_datasets(tiny_root, stub, tmp_path):
    """Boxes and image labels are one pool. A class has the rows of all names that fold to its."""
    root = str(tiny_root)
    loaded = exemplars.load_datasets("in21k,coco", "train", root, accepts=exemplars.KINDS)
    pools = list(map(Pool, loaded))
    seen = [[n for n in p.dataset.vocabulary.names if len(p.rows(n))] for p in pools]
    shared = [name for name in seen[0] if name in seen[1]]
    names = list(dict.fromkeys([*shared, *seen[0][:2], *seen[1][:2]]))
    assert shared
    (tmp_path / "n.txt").write_text("\n".join(names))
    where = ["--data-root", root, "--out", tmp_path / "t.npy"]
    command("in21k,coco", "--classes", tmp_path / "n.txt", *where, "--per-class", 1)
    assert np.load(tmp_path / "t.npy").shape == (len(names), 3)
    drawn = {draw(pools, name, 1, seed)[0].dataset.name for name in shared for seed in range(20)}
    assert drawn == {"coco", "in21k"}


def test_classes_of_a_dataset_have_its_order(tiny_root):
    (dataset,) = exemplars.load_datasets("coco-base", "val", str(tiny_root), accepts=("instances",))
    given = Args(classes="coco-base", data_root=str(tiny_root))
    assert exemplars.classes_of(given).names == dataset.vocabulary.names
    assert exemplars.classes_of(Args(classes="x, coco")).names == ("x", "coco")
    assert exemplars.classes_of(Args()) is None


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["DIR/im", "--out", "t.txt"], "--out 't.txt': give the name of the file to write, *.npy"),
        (["DIR/im"], "--out '': give the name of the file"),
        (["DIR/im", "--train", "--out", "t.npy"], "to write, *.safetensors"),
        (["--out", "DIR/t.npy"], "name pictures, or --text and --classes"),
        (["--out", "DIR/t.npy", "--text", "a"], "name pictures, or --text and --classes"),
        (["DIR/im", "--out", "DIR/t.npy", "--classes", "ant, dog"], "has no picture of 'dog'; add"),
        (["DIR/gone", "--out", "DIR/t.npy"], "needs a name: NAME="),
        (["DIR/im", "--out", "DIR/t.npy", "--per-class", "0"], "--per-class 0 must be at least 1"),
        (["DIR/im", "--out", "DIR/t.npy", "--text", "poem"], "--text poem: give a .npy table, a"),
        (["DIR/im", "--out", "DIR/t.npy", "--text", "DIR/t.json"], "t.json cannot be read"),
        (
            ["DIR/im", "--out", "DIR/t.npy", "--encoder", "lite0", "--text", "a"],
            "lite0 has no text",
        ),
        (
            ["DIR/im", "--out", "DIR/t.npy", "--encoder", "vgg"],
            "--encoder vgg: use lite0, or MODEL",
        ),
        (["DIR/im", "--out", "DIR/t.npy", "--aggregator", "DIR/gone.pth"], "--aggregator: "),
    ],
)
def test_bad_flags(folder, tmp_path, monkeypatch, capsys, flags, complaint):
    small = Tower(4, lambda image: torch.ones(3, 4, 4), lambda images: images.mean((2, 3)))
    if "vgg" not in flags:
        monkeypatch.setattr(exemplars, "load_tower", lambda encoder: small)
    argv = [flag.replace("DIR", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as exit:
        run_command(lambda: command(*argv))
    assert exit.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert complaint in line
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob("*.txt"))


def test_zero_features_are_refused(folder, monkeypatch, tmp_path):
    zero = Tower(4, lambda image: torch.zeros(3, 4, 4), lambda images: images.mean((2, 3)))
    monkeypatch.setattr(exemplars, "load_tower", lambda encoder: zero)
    with pytest.raises(InputError, match="zero or not finite"):
        command(folder, "--out", tmp_path / "t.npy")
    assert not (tmp_path / "t.npy").exists()


# -- the demonstration -----------------------------------------------------------------------------


def test_control_gives_novel_classes_the_pictures_of_each_other():
    rows = np.arange(20.0).reshape(10, 2)
    novel = [1, 4, 7]
    exchanged = exchange(rows, novel)
    base = [i for i in range(10) if i not in novel]
    assert np.array_equal(exchanged[base], rows[base])
    assert sorted(exchanged[novel].tolist()) == sorted(rows[novel].tolist())
    assert (exchanged[novel] != rows[novel]).all()
    assert np.array_equal(rows, np.arange(20.0).reshape(10, 2))


def test_table_of_the_demonstration():
    results = {name: {"AP50 base": i + 0.5, "AP50 novel": i / 8} for i, name in enumerate(ROWS)}
    assert table(results).splitlines()[2:] == [
        "| their names | 0.500 | 0.000 |",
        "| five pictures each | 1.500 | 0.125 |",
        "| five pictures of another novel class | 2.500 | 0.250 |",
    ]


# -- the published tables --------------------------------------------------------------------------

TABLES = REAL / "label_spaces/mm-ovod"
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="mm-ovod's tables are not here")
LVIS = Vocabulary.known("lvis").names


def official(name: str) -> torch.Tensor:
    return text.embed(LVIS, str(TABLES / f"lvis_{name}_author.npy"))


@needs_tables
def test_published_tables_load_in_the_order_of_lvis():
    words = official("gpt3_text-davinci-002_features")
    names = text.embed(LVIS, str(TABLES / "lvis_v1_clip_a+cname.npy"))
    both = [official("multi-modal_avg_K-005"), official("multi-modal_agg_K-005")]
    for rows in (names, official("image_exemplar_features_avg_K-005"), *both):
        assert rows.shape == (1203, 512)
        # the row of a class is nearer to that of its description than to those of others
        cosines = words @ (rows - rows.mean(0)).T
        own = (cosines > cosines.diagonal()[:, None]).sum(1)
        assert float((own < 60).float().mean()) > 0.9, own


@needs_tables
def test_published_sum_of_text_and_pictures():
    words = official("gpt3_text-davinci-002_features")
    mean = fuse(words, official("image_exemplar_features_avg_K-005"))
    torch.testing.assert_close(mean, official("multi-modal_avg_K-005"), atol=4e-4, rtol=0)
    # the published sum was made of other aggregated rows than those published
    aggregated = fuse(words, official("image_exemplar_features_agg_K-005"))
    assert (aggregated * official("multi-modal_agg_K-005")).sum(1).min() > 0.99


@needs_tables
def test_published_descriptions_are_of_the_classes_of_lvis():
    record = json.loads(
        (TABLES / "lvis_gpt3_text-davinci-002_descriptions_author.json").read_text()
    )
    named = {text.fold(name) for name in record}
    assert named ^ set(map(text.fold, LVIS)) == {"horned cow", "bull"}  # its first synonym
    assert {len(sentences) for sentences in record.values()} == {10}
