"""A flag without an effect is refused, or told in a line of the log."""

import importlib
import logging
from dataclasses import replace

import pytest
from conftest import METHODS

import category_extended
import dataseg
import detic
import domain_attention
import lmseg
import oneformer
import plaindet
import scaledet
import unidet
import unidetector
from common.checkpoint import save_weights
from common.class_counts import federated_counts
from common.command import parse_args, per_dataset
from common.datasets import load_datasets
from common.effects import flag, refuse_conflicts, tell_of_effects
from common.errors import InputError
from common.labels import LabelSpace, Vocabulary
from common.shares import trained_names
from common.text import embed

PREDICT = ["--predict", "a.jpg", "--weights", "w"]
EVALUATE = ["--eval-only", "--weights", "w"]
WITH_IDLE = [m for m in map(importlib.import_module, METHODS) if hasattr(m, "IDLE")]


@pytest.fixture(autouse=True)
def log_of_concord(caplog):
    caplog.set_level(logging.INFO, "concord")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*PREDICT, "--eval-only"], "--eval-only has no effect beside --predict"),
        ([*PREDICT, "--datasets", "coco"], "--datasets has no effect beside --predict"),
        ([*PREDICT, "--eval-datasets", "coco"], "--eval-datasets has no effect beside --predict"),
        ([*PREDICT, "--track", "wandb"], "--track has no effect beside --predict"),
        ([*EVALUATE, "--vocabulary", "cat"], "--vocabulary has no effect beside --eval-only"),
        ([*EVALUATE, "--track", "wandb"], "--track has no effect beside --eval-only"),
        (["--datasets", "coco", "--vocabulary", "cat"], "--vocabulary names the classes of --pre"),
        (["--resume", "r", "--eval-only"], "--eval-only has no effect beside --resume"),
        ([*EVALUATE, "--datasets", "lvis,coco:train"], "--datasets coco:train: --eval-only"),
        (
            [*EVALUATE, "--datasets", "coco@500"],
            "--datasets coco@500: --eval-only evaluates the whole split",
        ),
        ([*EVALUATE, "--datasets", "my@5=a.json:im/"], "--datasets my@5=a.json:im/: --eval-only"),
    ],
)
def test_flags_that_exclude_each_other(flags, words):
    with pytest.raises(InputError) as error:
        parse_args(scaledet.Args, "scaledet", scaledet.TINY, [], argv=flags)
    assert words in str(error.value)


def test_novel_classes_are_those_of_a_training():
    args = detic.Args(eval_only=True, weights="w", novel="cat")
    with pytest.raises(InputError, match="--novel has no effect beside --eval-only"):
        refuse_conflicts(args)


def test_flags_that_go_together():
    for more in ({"datasets": "coco"}, {"datasets": "my=a.json:images", "eval_datasets": "my:val"}):
        refuse_conflicts(scaledet.Args(eval_only=True, weights="w", **more))
    refuse_conflicts(scaledet.Args(predict=("a.jpg",), weights="w", vocabulary="cat"))


@pytest.fixture
def parse(tmp_path, caplog):
    """parse(module, *flags): the log of a start from weights that were trained with --tiny."""

    def parse(module, *flags, trained=()):
        settings = (module.Args, module.METHOD, module.TINY, module.MODEL_FIELDS)
        args = parse_args(*settings, argv=["--tiny", "--datasets", "coco@5", *trained])
        text = lambda names, dataset: embed(names, "minilm")  # noqa: E731
        space = LabelSpace([Vocabulary("coco", ("cat",))], text)
        model = module.Model(args, space, pretrained=False)
        metadata = {"method": module.METHOD, "args": vars(args)}
        save_weights(tmp_path / "weights.safetensors", model, space, metadata)
        caplog.clear()
        return parse_args(*settings, argv=["--weights", str(tmp_path), *flags])

    return parse


def test_settings_of_the_weights_are_told(parse, caplog):
    args = parse(unidetector, "--datasets", "o365", trained=["--stage", "localizer"])
    assert args.stage == "localizer"  # the default would train both stages
    (line,) = [line for line in caplog.messages if line.startswith("taken from the weights")]
    assert "--stage 'localizer'" in line and "--beta 0.7" in line and "--gamma" not in line
    args = parse(unidetector, "--tiny", "--stage", "both", trained=["--stage", "localizer"])
    assert args.stage == "both" and not caplog.messages


def test_only_the_first_rank_tells(parse, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    parse(scaledet, "--datasets", "o365")
    assert not caplog.messages


@pytest.mark.parametrize("method", ["scaledet", "detic", "unidet"])
def test_settings_of_the_predictions_are_those_of_the_training(method, parse):
    module = importlib.import_module(method)
    start = ["--predict", "a.jpg"]
    assert parse(module, *start, trained=["--one-class-per-proposal"]).one_class_per_proposal
    assert not parse(module, *start).one_class_per_proposal


def test_another_text_is_told(parse, caplog):
    def told() -> str:
        return " ".join(line for line in caplog.messages if "keep the text" in line)

    parse(scaledet, "--predict", "a.jpg", "--prompts", "a", "--text-encoder", "minilm")
    assert told().startswith("--prompts: classes keep the text of the training")
    parse(plaindet, "--eval-only", "--null", "thing")
    assert told().startswith("--null: ")
    parse(scaledet, "--predict", "a.jpg")
    assert not told()
    parse(scaledet, "--datasets", "coco", "--prompts", "a")  # a training embeds all names anew
    assert not told()
    parse(scaledet, "--eval-only", "--text-encoder", "coco=a.npy")  # `with_table` takes its rows
    assert not told()


@pytest.mark.parametrize(
    ("module", "flags", "idle"),
    [
        (scaledet, ["--eval-only", "--lr", "1", "--batch-size", "1"], "--lr, --batch-size"),
        (scaledet, ["--predict", "a.jpg", "--image-size", "320"], "--image-size"),
        (dataseg, ["--eval-only", "--datasets", "coco", "--task", "semantic"], "--task"),
        (dataseg, ["--predict", "a.jpg", "--data-root", "data"], "--data-root"),
    ],
)
def test_flags_of_a_training_are_told_without_one(module, flags, idle, parse, caplog):
    parse(module, *flags)
    assert f"no effect with {flags[0]}: {idle}" in caplog.messages
    parse(module, *flags[:2] if "--predict" in flags else flags[:1])
    assert not any("no effect" in line for line in caplog.messages)


def test_flags_that_are_used_are_not_told(parse, caplog):
    parse(scaledet, "--eval-only", "--image-size", "96")  # of the generated images
    parse(dataseg, "--predict", "a.jpg", "--task", "semantic")
    assert not any("no effect" in line for line in caplog.messages)


def test_ratios_in_place_of_the_sampling_are_told(caplog):
    flags = ["--datasets", "coco,lvis", "--dataset-ratios", "coco=2"]
    parse_args(plaindet.Args, "plaindet", plaindet.TINY, [], argv=flags)
    assert caplog.messages == ["--dataset-ratios takes the place of --sampling hardness"]
    parse_args(plaindet.Args, "plaindet", plaindet.TINY, [], argv=flags[:2])
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("module", WITH_IDLE)
@pytest.mark.parametrize("tiny", [False, True])
def test_settings_without_an_effect_are_told(module, tiny, caplog):
    defaults = module.Args(**module.TINY if tiny else {}, tiny=tiny)
    for (name, value), fields in module.IDLE.items():
        idle = replace(defaults, **{name: value})
        assert idle != defaults
        for changed in (None, *fields):
            args = replace(idle, **{changed: "another"}) if changed else idle
            tell_of_effects(args, module.TINY, module.MODEL_FIELDS, {(name, value): fields})
            told = [f"no effect with {shown(name, value)}: {flag(changed)}"] if changed else []
            assert caplog.messages == told
            caplog.clear()


def shown(name: str, value: object) -> str:
    """Returns the flag that sets the field."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


@pytest.mark.parametrize(
    ("module", "without", "flags"),
    [
        (lmseg, ["--classifier", "heads"], ["--prompts", "a", "--tau", "0.5", "--cgd", "off"]),
        (plaindet, ["--classifier", "heads"], ["--prompts", "name"]),
        (plaindet, ["--sampling", "size"], ["--period", "50"]),
        (domain_attention, ["--no-attention"], ["--adapters", "5", "--less-blocks"]),
        (oneformer, ["--no-contrastive"], ["--context", "4"]),
        (scaledet, ["--lam", "0"], ["--sim-norm", "none"]),
        (category_extended, ["--pseudo-boxes", "runs/a"], ["--negatives", "plain"]),
        (unidet, ["--stage", "partitioned"], ["--lam", "1"]),
        (unidetector, ["--stage", "localizer"], ["--classifier-lr", "1"]),
    ],
)
def test_settings_of_a_part_that_is_left_out_are_told(module, without, flags, monkeypatch, caplog):
    def start(*more: str) -> list[str]:
        caplog.clear()
        argv = [module.METHOD, "--datasets", "unknown", "--device", "cpu", *more]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(InputError):  # of the dataset: nothing is trained here
            module.main()
        return [line for line in caplog.messages if "no effect" in line]

    names = ", ".join(name for name in flags if name.startswith("--"))
    mode = " ".join(without).removesuffix(" runs/a")
    assert start(*without, *flags) == [f"no effect with {mode}: {names}"]
    assert not start(*without)
    assert not start(*flags)


def test_sizes_that_differ_by_dataset_are_told(caplog, tiny_root):
    datasets = load_datasets("coco,lvis", "train", str(tiny_root))
    args = detic.Args()
    assert per_dataset(args, "dataset_sizes", datasets, 640) == {"coco": 640, "lvis": 640}
    assert "image size" not in caplog.text
    per_dataset(args, "dataset_sizes", datasets, 640, instances=320)
    assert "image size of each dataset: coco 320, lvis 320" in caplog.messages
    args = replace(args, dataset_batches="lvis=8")
    per_dataset(args, "dataset_batches", datasets, 4)
    assert "batch of each dataset: coco 4, lvis 8" in caplog.messages


def test_pseudo_boxes_belong_to_the_second_training(tmp_path):
    """They took the place of the first training, and --weights changed nothing."""
    for flags in ({"weights": "w"}, {"stage": "first"}, {"stage": "mine", "weights": "w"}):
        args = category_extended.Args(pseudo_boxes="p", **flags)
        with pytest.raises(InputError, match="give --stage second"):
            category_extended.train(args, [], None, tmp_path, None)


def test_names_of_datasets_in_a_flag(tiny_root):
    datasets = load_datasets("coco,oid", "train", str(tiny_root))
    assert trained_names("--a", "o365,oid", "o365,oid", datasets) == ["o365", "oid"]
    assert trained_names("--a", "coco, openimages", "", datasets) == ["coco", "oid"]
    with pytest.raises(InputError, match=r"--a o365: no dataset .*there are coco, oid"):
        trained_names("--a", "coco,objects365", "", datasets)
    args = unidet.Args(class_aware="coco,o365", image_size=64)
    with pytest.raises(InputError, match="--class-aware o365: no dataset"):
        unidet.build_dataloader(args, datasets, 0)


def test_classes_of_lvis_without_images_are_negatives(tiny_root):
    """The federated loss draws no negatives for them, so they are negatives of all images."""
    coco, lvis = load_datasets("coco,lvis@0", "train", str(tiny_root))
    assert lvis.federated and not len(lvis)
    space = LabelSpace([coco.vocabulary, lvis.vocabulary])
    assert (federated_counts([coco, lvis], space) == -1).all()
    (some,) = load_datasets("lvis@5", "train", str(tiny_root))
    assert (federated_counts([coco, some], space)[space.scope("lvis")] >= 0).all()
