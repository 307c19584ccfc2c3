"""Official detectors by the names and shapes of their tensors: what loads, and what it then is."""

import json
import logging

import pytest
import torch
from PIL import Image
from torch import Tensor

import detic
import scaledet
import unidetector
from benchmarks import official_layouts as layouts
from benchmarks import official_weights
from benchmarks.official_weights import FAMILIES, PAGE, convert
from common.checkpoint import read_model
from common.command import parse_args
from common.convert import convert_if_official, timm_name
from common.errors import InputError
from common.labels import Vocabulary
from common.official_detectors import (
    boxed_classes,
    convert_centernet2,
    convert_centernet2_boxes,
    convert_two_stages,
)
from common.text import known_vocabularies

LVIS = Vocabulary.known("lvis")
BASE = "BoxSup-C2_Lbase_CLIP_R18_640b32_4x"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_text_encoder(monkeypatch):
    """Fails a test that embeds names anew instead of taking the rows of the file."""

    def refuse(names, encoder, prompts, dataset=None):
        raise AssertionError(f"{names[:2]} of {dataset} are embedded by {encoder}")

    for method in (detic, scaledet, unidetector):
        monkeypatch.setattr(method, "embed", refuse)


def fill(layout: layouts.Layout) -> dict[str, Tensor]:
    """Random tensors of these names and shapes, with which a model computes finite numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in layout.items():
        tensors[name] = torch.randn(shape, generator=generator) * 0.05
        if name.endswith("running_var"):
            tensors[name] += 1
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
    return tensors


@pytest.fixture(scope="session")
def resnet18() -> dict[str, Tensor]:
    """A Detic with a ResNet-18, few channels in its heads, and few objects in its images."""
    tensors = fill(layouts.detic("R18", wide=32, fc=16))
    tensors["proposal_generator.centernet_head.agn_hm.bias"].fill_(-9.3)
    return tensors


@pytest.fixture
def pth(tmp_path, resnet18):
    torch.save({"model": resnet18, "iteration": 3}, tmp_path / f"{BASE}.pth")
    return tmp_path / f"{BASE}.pth"


# -- The table -------------------------------------------------------------------------------------


def test_page_has_every_row():
    """A row more or less, or a text that the command does not write, shows here."""
    text = PAGE.read_text()
    assert text.startswith(official_weights.HEAD)
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [name for family in FAMILIES.values() for name in family.rows]
    assert sum(line.startswith("## ") for line in text.splitlines()) == len(FAMILIES)


CHECKED = {  # one file of each kind that is quickly built
    "Detic": [
        "BoxSup-C2_Lbase_CLIP_R5021k_640b64_4x.pth",
        "Detic_LCOCOI21k_CLIP_R18_640b32_4x_ft4x_max-size.pth",
        "Detic_LCOCOI21k_CLIP_CXT21k_640b32_4x_ft4x_max-size.pth",
        "Detic_DeformDETR_LI_R50_4x_ft4x.pth",
        "BoxSup_OVCOCO_CLIP_R50_1x.pth",
    ],
    "CenterNet2": ["CenterNet-FPN_R50_1x.pth", "CenterNet2-F_R50_1x.pth", "CenterNet2_R50_1x.pth"],
    "UniDet": ["Partitioned_COI_R50_2x.pth"],
    "UniDetector": ["FIRST.pth", "SECOND.pth", "FIRST.pth,END2END.pth"],
    "RegionCLIP": ["regionclip_pretrained-cc_rn50.pth", "rpn_coco_48.pth"],
    "Mask2Former": [
        "coco/panoptic 51.9: model_final_94dc52.pkl",
        "ade20k/semantic 47.2: model_final_500878.pkl",
        "ytvis_2019/video 46.4: model_final_34112b.pkl",
    ],
}


@pytest.mark.parametrize("family", CHECKED)
def test_page_is_what_the_command_writes(family):
    text = PAGE.read_text()
    for name in CHECKED[family]:
        assert official_weights.line(FAMILIES[family], name) in text.splitlines(), name


def test_swin_fits():
    """The largest of the models, with the tensors of the published demonstration."""
    _, metadata = convert(detic, {"LCOCOI21k": layouts.detic("SwinB", 22047)})
    assert metadata["args"]["backbone"] == "swin_base_patch4_window7_224"


def test_tensor_of_another_shape_does_not_fit():
    """What makes a row of the table say no."""
    layout = layouts.detic("R18") | {"backbone.bottom_up.base.conv1.weight": (64, 3, 5, 5)}
    with pytest.raises(AssertionError, match=r"backbone\.body\.conv1\.weight"):
        convert(detic, {"changed": layout})


@pytest.mark.parametrize(
    "width, depth, window, name",
    [
        (96, 6, 7, "swin_tiny_patch4_window7_224"),
        (96, 18, 7, "swin_small_patch4_window7_224"),
        (128, 18, 12, "swin_base_patch4_window12_384"),
        (192, 18, 7, "swin_large_patch4_window7_224"),
    ],
)
def test_swin_by_its_tensors(width, depth, window, name):
    layout = layouts.swin(width, (2, 2, depth, 2), (1, 2, 4, 8), window)
    assert timm_name(layouts.tensors(layouts.within("body.", layout)), "body.") == name


@pytest.mark.parametrize(
    "layout, name",
    [
        (layouts.resnet((3, 4, 6, 3), bottleneck=False), "resnet34"),
        (layouts.resnet((3, 4, 23, 3)), "resnet101"),
    ],
)
def test_resnet_by_its_tensors(layout, name):
    assert timm_name(layouts.tensors(layout), "") == name


def test_backbone_of_another_depth_is_refused():
    for layout in (layouts.resnet((3, 3, 3, 3)), layouts.swin(64, (2, 2, 4, 2), (1, 2, 4, 8))):
        with pytest.raises(InputError, match="of no known kind or depth; supported: resnet18"):
            timm_name(layouts.tensors(layout), "")


def test_other_model_is_named_in_one_line(tmp_path):
    torch.save(layouts.tensors(layouts.detic_deformable(), "cpu"), tmp_path / "detr.pth")
    with pytest.raises(InputError) as error:
        convert_if_official(tmp_path / "detr.pth", "detic", convert_centernet2)
    line = str(error.value)
    assert line.startswith(f"weights {tmp_path}/detr.pth: they are of Deformable DETR, which")
    assert "\n" not in line and "docs/official-weights.md" in line


# -- Detic: settings, classes, text ----------------------------------------------------------------


def test_settings_are_the_official_ones(pth):
    flags = ["--eval-only", "--weights", str(pth), "--data-root", "DATA"]
    args = parse_args(
        detic.Args, "detic", detic.TINY, detic.MODEL_FIELDS, detic.OFFICIAL, argv=flags
    )
    assert (args.backbone, args.channels, args.fc_dim, args.masks) == ("resnet18", 32, 16, True)
    assert (args.text_encoder, args.prompts) == ("ViT-B-32/openai", "a")
    assert (args.test_size, args.tau, args.cls_bias) == (800, 0.02, 0.0)
    assert args.one_class_per_proposal is False
    assert args.datasets == "lvis-base"  # which --eval-only evaluates


@pytest.mark.parametrize(
    "file, dataset, novel, words",
    [
        ("Detic_LbaseCCimg_CLIP_R5021k", "lvis-base", 337, "337 rare classes of LVIS had no boxes"),
        ("Detic_LCOCOI21k_CLIP_SwinB", "lvis", 0, "by its name, all classes of LVIS had boxes"),
        ("mine", "lvis", 0, "neither its tensors nor its name tell"),
    ],
)
def test_novel_classes_by_the_name_of_the_file(file, dataset, novel, words, caplog):
    with caplog.at_level(logging.INFO):
        trained_on, boxed = boxed_classes("lvis", list(LVIS.names), file)
    assert trained_on == dataset and len(LVIS) - len(boxed) == novel
    assert ("applesauce" in boxed) == (novel == 0)  # it is rare
    assert words in caplog.text


def test_classes_of_other_datasets_all_had_boxes():
    assert boxed_classes("coco", ["cat"], "Detic_Lbase") == ("coco", ["cat"])


def test_lvis_keeps_the_text_of_the_file(pth, resnet18):
    """In any order and spelling, and though the encoder would read other words."""
    model, label_space = detic.load(pth)
    rows = resnet18["roi_heads.box_predictor.0.cls_score.zs_weight"][:, :-1].T
    assert torch.equal(label_space.text, rows)
    spaced = tuple(name.replace("_", " ") for name in reversed(LVIS.names))
    assert torch.equal(label_space.swap(Vocabulary("lvis-base", spaced)).text, rows.flip(0))
    assert len(model.boxed) == 866


def test_lvis_of_the_large_vocabulary_keeps_its_rows(caplog):
    official = layouts.tensors(layouts.detic("R18", 1203, wide=8, fc=8), "cpu")
    rows = torch.randn(512, 22048)
    official["roi_heads.box_predictor.0.cls_score.zs_weight"] = rows
    with caplog.at_level(logging.WARNING):
        tensors, metadata = convert_centernet2(official, "Detic_LCOCOI21k_CLIP_R18")
    assert torch.equal(tensors["label_space.lvis"], rows[:, :1203].T)
    assert tuple(metadata["vocabularies"]["lvis"]["names"]) == LVIS.names
    assert "the names of 20844 classes of ImageNet-21k are not in the file" in caplog.text


@pytest.fixture
def tiny_lvis(tiny_root):
    """Flags of an evaluation and of a training on the generated LVIS."""
    flags = f"--data-root {tiny_root} --device cpu --workers 0 --test-size 96 --image-size 96"
    flags += " --batch-size 2 --steps 1 --warmup-steps 1 --rois-per-image 8"
    return flags.split()


def test_evaluation_has_base_and_novel_classes(pth, tiny_lvis, call, tmp_path):
    """The official file alone says what to evaluate."""
    call("--eval-only", "--weights", pth, *tiny_lvis, "--output", tmp_path / "run", method="detic")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"AP50 base", "AP50 novel"} <= results["lvis-base"].keys()


def test_second_stage_starts_from_the_file(pth, tiny_lvis, call, tmp_path, resnet18):
    """Trained and resumed with the text of the file, whose mask head it keeps."""
    run = tmp_path / "run"
    flags = ["--datasets", "lvis", *tiny_lvis]
    call("--weights", pth, *flags, "--output", run, method="detic")
    rows = resnet18["roi_heads.box_predictor.0.cls_score.zs_weight"][:, :-1].T
    _, [vocabulary] = read_model(run, "detic")
    row_of = {name: row for row, name in enumerate(LVIS.names)}
    expected = rows[[row_of[name] for name in vocabulary.names]]
    assert torch.equal(vocabulary.text, expected)
    call("--resume", run, "--steps", "2", method="detic")
    _, [resumed] = read_model(run, "detic")
    assert torch.equal(resumed.text, expected)


def test_scaledet_starts_from_the_file(pth, tiny_lvis, call, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        tensors, metadata = convert_centernet2_boxes(torch.load(pth)["model"], BASE)
    assert not any(key.startswith("mask_head") for key in tensors)
    assert "12 tensors of the heads of masks and image labels are left out" in caplog.text
    of_config = {"one_class_per_proposal"}  # the file does not hold it
    assert metadata["args"].keys() == {*scaledet.MODEL_FIELDS, "datasets"} - of_config
    run = tmp_path / "run"
    call("--weights", pth, "--datasets", "lvis", *tiny_lvis, "--output", run)
    model, _ = scaledet.load(run)
    before = tensors["backbone.body.bn1.running_mean"]
    assert torch.equal(model.backbone.body.bn1.running_mean, before)  # frozen, as in the file


def test_own_text_settings_win(pth):
    """Names are embedded anew where --text-encoder or --prompts are not those of the weights."""

    class Source:
        vocabulary = Vocabulary("mine", ("zebra", "aerosol can"))

    weights = convert_if_official(pth, "detic", convert_centernet2)
    args = detic.Args(weights=str(weights))
    [known] = known_vocabularies(args, "detic", [Source])
    _, [stored] = read_model(weights, "detic")
    assert torch.equal(known.text[1], stored.text[0])  # aerosol_can
    for changes in ({"prompts": "name"}, {"text_encoder": "minilm"}, {"weights": ""}):
        args = detic.Args(**{"weights": str(weights)} | changes)
        [known] = known_vocabularies(args, "detic", [Source])
        assert known.text is None
    Source.vocabulary = Vocabulary("mine", ("zebra", "no class of LVIS"))
    [known] = known_vocabularies(detic.Args(weights=str(weights)), "detic", [Source])
    assert known.text is None


# -- UniDetector: two files, one model -------------------------------------------------------------


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """The paths of a first stage, with few channels in its box head, and of a second stage."""
    folder = tmp_path_factory.mktemp("stages")
    for name, layout in [
        ("first", layouts.localizer(fc=16)),
        ("second", layouts.classifier()),
        ("both", layouts.end_to_end()),
    ]:
        meta = {"epoch": 12, "CLASSES": ("person",)}
        torch.save({"meta": meta, "state_dict": fill(layout)}, folder / f"{name}.pth")
    return folder


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (96, 64), "green").save(tmp_path / "green.png")
    return tmp_path / "green.png"


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_two_stages_are_one_model(order, stages):
    paths = ",".join(str(stages / f"{name}.pth") for name in order)
    file = convert_if_official(paths, "unidetector", convert_two_stages)
    metadata, [vocabulary] = read_model(file, "unidetector")
    assert "stage" not in metadata["args"] and metadata["args"]["datasets"] == "coco"
    assert vocabulary.names == Vocabulary.known("coco").names
    columns = torch.load(stages / "second.pth")["state_dict"]["roi_head.bbox_head.zs_weights"]
    expected = torch.nn.functional.normalize(columns[:, :-1].T)
    torch.testing.assert_close(vocabulary.text, expected)  # not of unit norm in the file


def test_prediction_with_both_stages(stages, photo, call, tmp_path):
    paths = f"{stages}/first.pth,{stages}/second.pth"
    flags = f"--weights {paths} --output {tmp_path}/run --device cpu --test-size 64 --gamma 0"
    flags += " --test-proposals 5 --rpn-proposals 20"
    call("--predict", photo, *flags.split(), method="unidetector")
    record = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert len(record["categories"]) == 80 and record["annotations"]


def test_first_stage_proposes_boxes(stages, tiny_root, call, tmp_path, monkeypatch):
    """It has no text, so the names of COCO are embedded, though they change nothing."""
    monkeypatch.setattr(unidetector, "embed", lambda names, **_: torch.eye(len(names)))
    flags = f"--weights {stages}/first.pth --eval-only --output {tmp_path}/run --device cpu"
    flags += f" --data-root {tiny_root} --test-size 64 --workers 0 --rpn-proposals 20"
    call(*flags.split(), method="unidetector")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"coco (proposals)"}


def test_classifier_alone_is_refused(stages):
    for name in ("second", "both"):
        with pytest.raises(InputError) as error:
            convert_if_official(stages / f"{name}.pth", "unidetector", convert_two_stages)
        line = str(error.value)
        assert f"{name}.pth: the localizer is missing; give its file as well, by a comma" in line


def test_end_to_end_model_lends_its_classifier(stages, caplog):
    paths = f"{stages}/first.pth,{stages}/both.pth"
    with caplog.at_level(logging.WARNING):
        convert_if_official(paths, "unidetector", convert_two_stages)
    assert "both: 6 tensors of proposals are left out: the localizer makes them here" in caplog.text


def test_two_files_of_one_part_are_refused(stages):
    paths = f"{stages}/second.pth,{stages}/both.pth"
    with pytest.raises(InputError, match=r"two of the files hold 'classifiers\.0\.fc_reg\.bias'"):
        convert_if_official(paths, "unidetector", convert_two_stages)
    with pytest.raises(InputError, match=r"gone\.pth do not exist"):
        paths = f"{stages}/first.pth,{stages}/gone.pth"
        convert_if_official(paths, "unidetector", convert_two_stages)


def test_comma_in_the_name_of_a_file(tmp_path, pth):
    pth.rename(tmp_path / "a,b_Lbase.pth")
    file = convert_if_official(tmp_path / "a,b_Lbase.pth", "detic", convert_centernet2)
    assert read_model(file, "detic")[0]["args"]["datasets"] == "lvis-base"
