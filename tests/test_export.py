"""Exported files of every method: run without it, they give what the model predicts.

The models are small and have random weights, on the backbone's own. The photographs are those of
CONCORD_REAL, else generated pictures.
"""

import dataclasses
import importlib

import pytest
import torch
from conftest import REAL, SMALL

from common.checkpoint import save_weights
from common.fine_classes import derive_table
from common.labels import Vocabulary

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")

NAMES = {"coco": ("person", "dog", "sports ball"), "o365": ("Person", "Chair", "Sheep", "Boat")}
PHOTOS = sorted((REAL / "coco" / "val2017").glob("*.jpg"))[:3]
SCORES = ("classif", "cls_", "agn_hm", "rpn_obj", "objectness", "class_layers")
TEXTLESS = ["category_extended", "domain_attention", "groupsoftmax", "oneformer", "unidet"]


def small_args(method: str, **changes):
    """The method's TINY settings, but smaller."""
    module = importlib.import_module(method)
    fields = {field.name for field in dataclasses.fields(module.Args)}
    settings = module.TINY | {name: SMALL[name] for name in SMALL.keys() & fields} | changes
    settings |= {"test_size": 160}
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
    model = module.Model(args, space)
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and any(part in name for part in SCORES):
            weight.data *= max(1.0, 0.1 / float(weight.std()))
    path = folder / f"{method}.safetensors"
    save_weights(path, model, space, metadata)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """weights(method): a small model of it, made once."""
    folder = tmp_path_factory.mktemp("weights")

    def of(method: str):
        path = folder / f"{method}.safetensors"
        return path if path.is_file() else make_weights(method, folder)

    return of
