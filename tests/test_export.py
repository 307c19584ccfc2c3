"""Exported files of every method: run without it, they give what the model predicts.

The models are small and have random weights. The photographs are those of CONCORD_REAL, else
generated pictures.
"""

import builtins
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import METHODS, REAL, REPO, SMALL
from PIL import Image
from safetensors.torch import save_file
from timm.layers.padding import pad_same
from torch.nn import functional as F
from torchvision.ops import box_iou

import dataseg
from common import boxes, deformable, export, export_parts, msda, roi_align
from common.batch import Sample, collate
from common.boxes import select_detections
from common.centernet import CenterNet
from common.checkpoint import save_weights
from common.command import run_command
from common.errors import InputError
from common.export_models import best_unions
from common.fine_classes import derive_table
from common.inference import to_sample
from common.labels import Vocabulary
from common.segments import FullMasks
from common.transforms import move

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

NAMES = {"coco": ("person", "dog", "sports ball"), "o365": ("Person", "Chair", "Sheep", "Boat")}
PHOTOS = sorted((REAL / "coco" / "val2017").glob("*.jpg"))[:3]
SCORES = ("classif", "cls_", "agn_hm", "rpn_obj", "objectness", "class_layers", "predictor")
DETECTION = ("scores", "class_names", "boxes")
ONE_DATASET = ["oneformer"]  # their model classifies for one dataset at a time
TEXTLESS = ["category_extended", "domain_attention", "groupsoftmax", "oneformer", "unidet"]
# the others take minutes
QUICK = [("scaledet", "onnx"), ("dataseg", "onnx"), ("dataseg", "torch")]
EVERY = [
    pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.long)
    for pair in product(METHODS, ("onnx", "torch"))
]


def small_args(method: str, **changes):
    """The method's TINY settings, but smaller."""
    module = importlib.import_module(method)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    settings = module.TINY | SMALL | {"test_size": 160, "backbone": "resnet10t"} | changes
    return module.Args(**{name: value for name, value in settings.items() if name in fields})


def make_weights(method: str, folder, **changes):
    """Writes a small model of random weights, whose scores differ widely. Returns the file."""
    torch.manual_seed(0)
    module = importlib.import_module(method)
    args = small_args(method, **changes)
    vocabularies = [Vocabulary(dataset, names) for dataset, names in NAMES.items()]
    metadata = {"method": method, "args": dataclasses.asdict(args)}
    metadata |= {"width": 0, "boxed": [], "groups": False}
    given = [args, vocabularies]
    if method == "groupsoftmax":
        given.append(derive_table(vocabularies, {}))
        metadata["groups"] = given[-1].cells
    space = module.build_label_space(*given)
    model = module.Model(args, space, pretrained=False)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and any(part in name for part in SCORES):
            weight.data *= max(1.0, 0.1 / float(weight.detach().std()))
    path = folder / f"{method}.safetensors"
    save_weights(path, model, space, metadata)
    return path


def photo(number: int, size: tuple[int, int]) -> torch.Tensor:
    """A photograph, or else noise that is smooth in places: (3, H, W) uint8."""
    if number < len(PHOTOS):
        return move(to_sample(str(PHOTOS[number])), size).image
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 9, 9, generator=generator) * 255
    return F.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 255).byte()


def exported_file(method: str, form: str, folder, weights=None, **more):
    """Exports a small model; returns the file, the method file, the model and its classes."""
    if not callable(torch.export.Dim.DYNAMIC):
        pytest.skip("torch is too old for sizes with a range")
    weights = weights or make_weights(method, folder)
    vocabulary = "coco" if method in ONE_DATASET else ""
    path = folder / f"{method}{export.ENDINGS[form]}"
    settings = {"vocabulary": vocabulary, **more}
    check = str(PHOTOS[0]) if PHOTOS else ""
    given = {"weights": str(weights), "output": str(path), "format": form, "check": check}
    args = export.Args(**(given | settings))
    export.export(args)
    module, model, space = export.load_model(args)
    return path, module, export.Exported(model, space).eval()


def check_images(path, module, exported, images: torch.Tensor, **more) -> None:
    """Runs a file on images and compares each with the model; the detections are not few."""
    outputs = list(exported.kind.outputs)
    found = export.run_file(path, {"images": images, **more}, outputs)
    for i, image in enumerate(images):
        wanted = export.reference(module, exported, image)
        of_image = {name: value[i] for name, value in found.items()}
        apart = export.differences(of_image, wanted, exported.kind.least)
        assert all(value <= export.TOLERANCES[name] for name, value in apart.items()), apart
        if "boxes" in found:
            assert len(wanted["scores"]) >= 5
            assert set(apart) == {"boxes", "scores", "labels"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """shared(method, form): `exported_file`, made once."""
    folder = tmp_path_factory.mktemp("files")
    made = {}

    def of(method: str, form: str):
        if (method, form) not in made:
            made[method, form] = exported_file(method, form, folder)
        return made[method, form]

    return of


@pytest.mark.parametrize("method, form", EVERY)
def test_a_file_gives_what_the_model_predicts(method, form, shared):
    path, module, exported = shared(method, form)
    # another size than that of the trace, no multiple of 32, and another number of images
    check_images(path, module, exported, torch.stack([photo(i, (170, 231)) for i in range(3)]))
    check_images(path, module, exported, photo(1, (256, 192))[None])


@pytest.mark.parametrize("form", ["onnx", pytest.param("torch", marks=pytest.mark.long)])
def test_text_is_an_input(form, tmp_path):
    path, module, exported = exported_file("scaledet", form, tmp_path, text_input=True)
    names = "zebra, traffic light, boat, person"
    exported.space = exported.space.swap(names)
    exported.text = exported.space.text
    check_images(path, module, exported, photo(1, (160, 224))[None], text=exported.text)


@pytest.mark.long
@pytest.mark.parametrize("method", sorted({*METHODS} - {*TEXTLESS, "scaledet"}))
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_text_is_an_input_of_every_method_with_text(method, form, tmp_path):
    things = ", ".join(f"thing {i}" for i in range(23))
    # so near to the first that the queries of one dataset suit both
    others = ", ".join(f"thing {i}" for i in reversed(range(24)))
    given = {"text_input": True, "vocabulary": things}
    path, module, exported = exported_file(method, form, tmp_path, **given)
    exported.space = exported.space.swap(others)
    exported.text = exported.space.text
    check_images(path, module, exported, photo(1, (160, 224))[None], text=exported.text)


@pytest.mark.parametrize("method", TEXTLESS)
def test_text_is_no_input_of_a_method_without(method, tmp_path):
    weights = make_weights(method, tmp_path)
    args = export.Args(str(weights), str(tmp_path / "x.onnx"), text_input=True)
    with pytest.raises(InputError, match="classifies without text; leave it out"):
        export.export(args)


@pytest.mark.long
def test_static_file_of_a_convolution_of_tensorflow(tmp_path):
    """The other backbone's convolutions pad by the size of the map."""
    weights = make_weights("scaledet", tmp_path, backbone="tf_efficientnet_lite0")
    settings = {"weights": weights, "static": True, "size": (160, 192)}
    path, module, exported = exported_file("scaledet", "onnx", tmp_path, **settings)
    check_images(path, module, exported, photo(1, (160, 192))[None])
    path, module, exported = exported_file("scaledet", "onnx", tmp_path, weights)
    check_images(path, module, exported, photo(1, (170, 230))[None])


@pytest.mark.long
@pytest.mark.parametrize("method", ["dataseg", "lmseg", "oneformer"])
@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_segmenters_have_the_outputs_of_their_task(method, task, tmp_path):
    weights = make_weights(method, tmp_path, task=task)
    path, module, exported = exported_file(method, "onnx", tmp_path, weights)
    wanted = {"semantic": ["semantic"], "instance": ["probabilities", "masks"]}
    assert list(exported.kind.outputs) == wanted[task]
    check_images(path, module, exported, photo(1, (160, 192))[None])


@pytest.mark.long
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_masks_are_those_of_the_boxes(form, shared):
    path, _, exported = shared("detic", form)
    model = exported.model
    batch = collate([Sample.unlabelled(photo(i, (170, 231)), "", i, i) for i in range(2)])
    images = batch.images[:, :, :170, :231].contiguous()
    found = export.run_file(path, {"images": images}, list(exported.kind.outputs))
    with torch.no_grad():
        features = model.extract(batch.images, batch.sizes)
        wanted = model.mask_head(features, list(found["boxes"])).sigmoid()
    masks = found["masks"].flatten(0, 1)
    there = found["scores"].flatten() > 0
    assert there.sum() > 10 and wanted.std() > 1e-4
    torch.testing.assert_close(masks[there], wanted[there], atol=1e-4, rtol=0)


def test_example_runs_without_the_project(shared, tmp_path):
    path, module, exported = shared("scaledet", "onnx")
    picture = tmp_path / "photo.png"
    Image.fromarray(photo(0, (240, 320)).permute(1, 2, 0).numpy()).save(picture)
    script = (REPO / "examples" / "run_onnx.py").read_text()
    assert "if score > 0.3:" in script
    [wanted] = module.predict_images(exported.model, [picture], exported.space)
    least = float(wanted["scores"][4] + wanted["scores"][5]) / 2  # those of random weights are low
    (tmp_path / "run.py").write_text(script.replace("> 0.3", f"> {least}"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "run.py", path, picture.name]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line, score, name, box in zip(lines, *(wanted[key] for key in DETECTION)):
        assert line.startswith(f"{score:.3f} {name} [")
        printed = [float(x) for x in line.rpartition("[")[2].rstrip("]").split()]
        torch.testing.assert_close(torch.tensor(printed), box, atol=0.6, rtol=0)


def test_example_is_short():
    code = (REPO / "examples" / "run_onnx.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


# -- bad input -------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(*flags): the one line of a command that fails."""

    def start(*flags) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
        with pytest.raises(SystemExit) as exit:
            run_command(export.main)
        assert exit.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return start


def test_bad_flags(refused, tmp_path):
    weights = make_weights("unidet", tmp_path)
    assert "writes *.onnx" in refused("--weights", weights, "--output", "x.pt2")
    assert "writes *.pt2" in refused(
        "--weights", weights, "--output", "x.onnx", "--format", "torch"
    )
    assert "one or two numbers" in refused("--output", "x.onnx", "--size", 200, 200, 200)
    assert "do not exist" in refused("--weights", tmp_path / "no", "--output", "x.onnx")
    flags = ["--weights", weights, "--output", tmp_path / "x.onnx"]
    assert "no dataset 'zebra'" in refused(*flags, "--vocabulary", "zebra")
    assert "photo.jpg" in refused(*flags, "--check", tmp_path / "photo.jpg")


def test_weights_of_an_unknown_method(tmp_path, refused):
    path = tmp_path / "w.safetensors"
    about = {"method": '"os"', "args": "{}", "vocabularies": "{}"}
    save_file({"x": torch.zeros(1)}, path, metadata=about)
    assert "unknown method os" in refused("--weights", path, "--output", tmp_path / "x.onnx")


def test_number_of_classes_whose_text_may_be_an_input(tmp_path, refused):
    weights = make_weights("metr", tmp_path)
    flags = ["--weights", weights, "--output", tmp_path / "x.onnx", "--text-input"]
    assert "20 to 100 classes can be an input, and --vocabulary has 6" in refused(*flags)


def test_missing_package_names_the_command(tmp_path, refused, monkeypatch):
    weights = make_weights("unidet", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = refused("--weights", weights, "--output", tmp_path / "x.onnx")
    assert "pip install onnx onnxscript onnxruntime" in line


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    weights = make_weights("dataseg", tmp_path)
    args = export.Args(str(weights), str(tmp_path / "x.pt2"), "torch")
    module, model, space = export.load_model(args)
    exported = export.Exported(model, space).eval()

    def write(exported, about, image, path, args) -> None:
        path.write_text("a file")

    def run_file(path, inputs, outputs) -> dict:
        wrong = export.reference(module, exported, inputs["images"][0])
        wrong["masks"] = wrong["masks"] * 1.1
        return {name: value[None] for name, value in wrong.items()}

    monkeypatch.setattr(export, "write", write)
    monkeypatch.setattr(export, "run_file", run_file)
    with pytest.raises(InputError, match=r"is not written: .* masks 0.1 \(at most 0.01\)"):
        export.export(args)
    assert [file.name for file in tmp_path.iterdir()] == ["dataseg.safetensors"]
    monkeypatch.setattr(export, "TOLERANCES", export.TOLERANCES | {"masks": 0.2})
    export.export(args)
    assert (tmp_path / "x.pt2").read_text() == "a file"


def test_differences_of_detections():
    wanted = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90], [5, 5, 9, 9]]),
        "scores": torch.tensor([0.9, 0.5, 0.0205]),
        "labels": torch.tensor([1, 0, 2]),
    }
    found = {name: value.clone() for name, value in wanted.items()}
    assert export.differences(found, wanted, 0.02) == {"boxes": 0, "scores": 0, "labels": 0}
    found["boxes"][0, 2] += 0.05
    found["scores"][1] += 0.0005
    apart = export.differences(found, wanted, 0.02)
    assert apart == pytest.approx({"boxes": 0.05, "scores": 0.0005, "labels": 0}, rel=1e-3)
    # the last one is so near to the least score that rounding decides
    fewer = {name: value[:2] for name, value in wanted.items()}
    assert export.differences(fewer, wanted, 0.02)["labels"] == 0
    fewer = {name: value[1:] for name, value in wanted.items()}
    assert export.differences(fewer, wanted, 0.02)["labels"] == pytest.approx(1 / 3)
    assert export.differences(wanted, fewer, 0.02)["labels"] == pytest.approx(1 / 2)
    found["labels"][0] = 3
    assert export.differences(found, wanted, 0.02)["labels"] == pytest.approx(1 / 3)


# -- parts -----------------------------------------------------------------------------------------


def some_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 60
    side = torch.rand(count, 2, generator=generator) * 40 + 5
    return torch.cat([low, low + side], 1)


@pytest.mark.parametrize("classes", [1, 5, 400])  # the last: more pairs than NMS sees
@pytest.mark.parametrize("one_class", [False, True])
def test_selection_is_that_of_each_image(classes, one_class):
    torch.manual_seed(0)
    every = torch.stack([some_boxes(40, seed) for seed in range(3)])
    scores = torch.rand(3, 40, classes) ** 4
    scores[2] = 0.01  # an image without a detection
    found = export_parts.select(every, scores, one_class)
    for i in range(3):
        wanted = select_detections(every[i], scores[i], one_class)
        count = len(wanted[0])
        assert (count > 0) == (i < 2)
        for value, expected in zip(found, wanted):
            assert len(value[i]) == 300
            torch.testing.assert_close(value[i, :count], expected)
        assert not found[0][i, count:].any() and not found[1][i, count:].any()


def test_greedy_nms_against_a_loop():
    every = torch.stack([some_boxes(12, seed) for seed in (1, 2)])
    scores = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
    kept = export_parts.greedy_nms(every, scores, 0.3, 0.25)
    for b, c in product(range(2), range(3)):
        iou = box_iou(every[b], every[b])
        chosen = []
        for q in sorted(range(12), key=lambda q: -float(scores[b, c, q])):
            if scores[b, c, q] > 0.25 and all(iou[q, other] <= 0.3 for other in chosen):
                chosen.append(q)
        assert sorted(chosen) == kept[b, c].nonzero().flatten().tolist()


class Nms(torch.nn.Module):
    """NMS alone, as it is exported."""

    def forward(self, every, scores):
        return export_parts.nms(every, scores, 0.3, 0.25)


def test_nms_of_onnx_is_that_of_torch(tmp_path):
    from onnxruntime import InferenceSession

    every = torch.stack([some_boxes(30, seed) for seed in (1, 2)])
    every[0, 3:9] = every[0, 3:9].roll(2, 1)  # corners that have changed places
    every[1, 5:9, 2:] = every[1, 5:9, :2]  # without a size
    scores = torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(0))
    with export_parts.exportable(operator=True):
        program = torch.export.export(Nms(), (every, scores))
    table = {torch.ops.concord.nms.default: export_parts.onnx_nms()}
    file = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=export.OPSET,
        custom_translation_table=table,
        verbose=False,
    )
    file.save(tmp_path / "nms.onnx")
    session = InferenceSession(tmp_path / "nms.onnx")
    names = [entry.name for entry in session.get_inputs()]
    [kept] = session.run(None, dict(zip(names, (every.numpy(), scores.numpy()))))
    wanted = export_parts.greedy_nms(every, scores, 0.3, 0.25)
    assert torch.equal(torch.from_numpy(kept), wanted)
    assert 20 < wanted.sum() < (scores > 0.25).sum()
    assert wanted[0, :, 3:9].equal(scores[0, :, 3:9] > 0.25)


def test_soft_nms_of_empty_boxes():
    every = some_boxes(5)
    every[1:3, 2:] = every[1:3, :2]
    scores = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    wanted = boxes.soft_nms(every, scores)
    assert wanted.isfinite().all() and wanted[1:3].equal(scores[1:3])
    torch.testing.assert_close(export_parts.soft_nms(every[None], scores[None])[0], wanted)


def test_soft_nms_is_that_of_each_image():
    every = torch.stack([some_boxes(20, seed) for seed in (1, 2)])
    scores = torch.rand(2, 20, 3, generator=torch.Generator().manual_seed(0)) ** 3
    found = export_parts.soft_nms(every, scores)
    for i in range(2):
        torch.testing.assert_close(found[i], boxes.soft_nms(every[i], scores[i]))


def test_regions_are_pooled_from_their_level():
    torch.manual_seed(0)
    features = [torch.randn(2, 3, 32 // s, 40 // s) for s in (1, 2, 4)]
    regions = torch.cat([some_boxes(6, 1), some_boxes(6, 2)]) * 2
    regions[3, 2:] = regions[3, :2]  # without a size
    image = torch.arange(2).repeat_interleave(6)
    level = torch.arange(12) % 3
    given = (features, [8, 16, 32], regions, image, level, 7)
    wanted = roi_align.roi_align(*given)
    given = (features, [8, 16, 32], regions, torch.zeros_like(image), level, 7)
    torch.testing.assert_close(export_parts.roi_align(*given), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["(Q, 2)", "(B, Q, 2)", "(B, Q, L, 2)"])
def test_deformable_attention_is_the_formula(form):
    torch.manual_seed(0)
    shapes = ((5, 7), (3, 4))
    value = torch.randn(2, 47, 4, 6)
    offsets = torch.randn(2, 9, 4, 2, 3, 2) * 3
    logits = torch.randn(2, 9, 4, 6)
    size = {"(Q, 2)": (9, 2), "(B, Q, 2)": (2, 9, 2), "(B, Q, L, 2)": (2, 9, 2, 2)}[form]
    given = (value, shapes, offsets, logits, torch.rand(size))
    torch.testing.assert_close(export_parts.msda(*given), msda.formula(*given))


def test_memory_of_padded_images():
    maps = [torch.randn(2, 4, 8, 12), torch.randn(2, 4, 4, 6), torch.randn(2, 4, 2, 3)]
    wanted = deformable.Memory.of(maps, [(50, 66)] * 2, (64, 96))
    found = export_parts.memory_of(maps, [(50, 66)], (50, 66))  # padded by the file
    assert found.shapes == wanted.shapes
    for name in ("tokens", "cells", "ratios", "centres", "padding"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 2, 1)])
def test_padding_of_tensorflow(kernel, stride, dilation):
    x = torch.randn(1, 2, 8, 12)
    given = (x, [kernel] * 2, [stride] * 2, [dilation] * 2)
    assert torch.equal(export_parts.pad_same(*given), pad_same(*given))


@pytest.mark.parametrize("none", [False, True])
def test_best_unions_are_those_of_the_merge(none):
    torch.manual_seed(0)
    masks = torch.randn(2, 9, 4, 6)
    logits = torch.randn(2, 9, 4) * 3
    if none:
        logits[1, :, -1] = 50  # all are background
    p = logits.softmax(-1)
    full = F.interpolate(masks, (16, 24), mode="bilinear")[:, :, :15, :22]
    found = best_unions(p, full.sigmoid())
    for i in range(2):
        of_image = FullMasks(masks[i], (16, 24), (15, 22), (15, 22))
        unions, rows = dataseg.merge(of_image, p[i], torch.ones(3, dtype=torch.bool))
        assert torch.equal(found[i], unions.best_labels(rows).long())


def test_substitutes_are_there_for_a_trace_alone():
    before = (CenterNet.proposals, boxes.roi_align, deformable.Memory.of, len)
    with export_parts.exportable(operator=False):
        assert CenterNet.proposals is export_parts.centre_proposals
        assert builtins.len("abc") == 3
    assert (CenterNet.proposals, boxes.roi_align, deformable.Memory.of, len) == before


def test_metadata_names_the_classes(shared):
    import onnx

    path, *_ = shared("dataseg", "onnx")
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(about["class_names"]) == [
        "person",
        "dog",
        "sports ball",
        "Chair",
        "Sheep",
        "Boat",
    ]
    assert json.loads(about["resize"]) == {"short": 160, "longest": 267}
    assert about["method"] == "dataseg" and "uint8 RGB" in about["input"]
