"""Writes a trained model as a file that runs without this project: ONNX, or torch.export's .pt2.

    python -m common.export --weights runs/x --format onnx --output detector.onnx
    python -m common.export --weights runs/x --format torch --output detector.pt2 --static
    python -m common.export --weights runs/x --output mine.onnx --vocabulary "cat, traffic cone"
    python -m common.export --weights runs/x --output any.onnx --text-input

The classes are fixed, or their text is a second input. The file takes images of any size and
number, and its metadata has the names of the classes. At the end it is run, and its outputs are
compared with those of the model. docs/export.md describes inputs and outputs.
"""

import contextlib
import importlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from common.batch import Sample, collate
from common.command import SIDE, check_ranges, run_command
from common.errors import InputError
from common.export_models import Exported, constants, queries, text_rows
from common.export_parts import exportable, onnx_nms
from common.files import atomic_path
from common.inference import to_sample
from common.labels import LabelSpace
from common.saved import own_weights, read_metadata
from common.transforms import ResizeShortest, move

# Shapes: B images, N detections of an image, C classes, Q queries, H W pixels.

log = logging.getLogger("concord")
ROOT = Path(__file__).resolve().parents[1]
ENDINGS = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 18
LARGEST = 16384  # side of an image
# the largest differences from the model that are allowed
TOLERANCES = {"boxes": 0.1, "scores": 1e-3, "labels": 0.02, "semantic": 1e-3}
TOLERANCES |= {"probabilities": 1e-3, "masks": 1e-2}
UNITS = {"boxes": "pixels", "labels": "of the detections", "semantic": "of the pixels"}


@dataclass
class Args:
    weights: str = ""
    """run folder or .safetensors file of a training"""
    output: str = ""
    """the file to write: .onnx, or .pt2 with --format torch"""
    format: Literal["onnx", "torch"] = "onnx"
    """onnx for onnxruntime and others; torch for torch.export.load"""
    vocabulary: str = ""
    """classes: "cat, traffic cone", or a .txt file with a name per line; empty: all"""
    text_input: bool = False
    """the text rows (C, D) of the classes are an input"""
    size: Annotated[tuple[int, ...], SIDE] = ()
    """pixels: the short side, or height and width; empty: the --test-size of the training"""
    static: bool = False
    """images of --size alone, one at a time; a short side stands for a square"""
    check: str = ""
    """photograph that the file and the model are compared on; empty: a generated picture"""


# -- the model -------------------------------------------------------------------------------------


def load_model(args: Args) -> tuple[ModuleType, nn.Module, LabelSpace]:
    """Returns the method file of the weights, the model in float32, and the classes.

    Raises InputError for weights that are none, and for classes that do not suit them.
    """
    if not args.weights:
        raise InputError("name --weights: a run folder, a weights file, or hf://OWNER/NAME")
    args.weights = str(own_weights(args.weights) or args.weights)
    method = read_metadata(args.weights)["method"]
    file = ROOT / f"{method}.py"
    if not str(method).isidentifier() or not file.is_file():
        raise InputError(f"--weights {args.weights} are of the unknown method {method!s:.60}")
    module = importlib.import_module(method)
    model, space = module.load(args.weights)
    for part in model.modules():
        if isinstance(getattr(part, "amp", None), str):
            part.amp = "off"
    model.args.amp = "off"
    if args.text_input and space.text is None:
        raise InputError(f"--text-input: {method} classifies without text; leave it out")
    space = space.swap(args.vocabulary)
    least, most = text_rows(model)
    if args.text_input and not least <= len(space) <= most:
        raise InputError(
            f"--text-input: the text of {least} to {most} classes can be an input, and --vocabulary"
            f" has {len(space)}; name others"
        )
    return module, model, space


def example_image(args: Args, transform: ResizeShortest) -> Tensor:
    """Returns the image of --check, or a generated one, in the size of --size: (3, H, W) uint8."""
    if args.check:
        sample = to_sample(args.check)
    else:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(1, 3, 6, 8, generator=generator) * 255
        picture = F.interpolate(coarse, (480, 640), mode="bilinear")[0]
        picture[:, 100:300, 200:420] = coarse[0, :, 0, 0, None, None]
        sample = Sample.unlabelled(picture.byte(), "", 0, 0)
    if len(args.size) == 2 or args.static:
        size = args.size or (transform.size,)
        return move(sample, (size[0], size[-1])).image
    return transform(sample).image


def transform_of(args: Args, module: ModuleType, model: nn.Module) -> ResizeShortest:
    """Returns what images are resized by: --size, else as the method does at test time."""
    if args.size:
        return ResizeShortest(min(args.size))
    if hasattr(module, "test_transform"):  # it has several sizes
        return module.test_transform(model.args, "")
    return ResizeShortest(model.args.test_size, getattr(model.args, "test_longest", 0))


# -- writing ---------------------------------------------------------------------------------------


def trace(exported: Exported, image: Tensor, args: Args) -> torch.export.ExportedProgram:
    """Traces the model on an image (3, H, W), with symbols for what may differ.

    Raises InputError if torch cannot trace it, or is too old for sizes with a range.
    """
    ranged = args.text_input or not args.static
    if ranged and not callable(torch.export.Dim.DYNAMIC):
        raise InputError(
            f"inputs whose size may differ need a newer torch than {torch.__version__}: "
            "pip install -U torch torchvision, or give --static and no --text-input"
        )
    inputs = [image[None]]
    shapes: list[dict | None] = [None]
    if not args.static:
        least = exported.kind.least_side
        missing = [max(0, least - side) for side in image.shape[1:]]
        image = F.pad(image, (0, missing[1], 0, missing[0]))
        inputs = [image[None].repeat(2, 1, 1, 1)]
        any_side = torch.export.Dim.DYNAMIC(min=least, max=LARGEST)
        shapes = [{0: torch.export.Dim.DYNAMIC, 2: any_side, 3: any_side}]
    if args.text_input:
        least, most = text_rows(exported.model)
        inputs.append(exported.text.clone())  # the buffer itself would be a constant
        shapes.append({0: torch.export.Dim.DYNAMIC(min=least, max=most)})
    onnx = args.format == "onnx"
    parts = exportable(onnx, constants(exported.model))
    with torch.no_grad(), quiet(), without_hooks(exported), parts:
        program = torch.export.export(exported, tuple(inputs), dynamic_shapes=tuple(shapes))
    return program


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Context manager in which the modules have no hooks: those of common/ are for trainings."""
    hooks = {part: part._forward_pre_hooks.copy() for part in model.modules()}
    for part in hooks:
        part._forward_pre_hooks.clear()
    try:
        yield
    finally:
        for part, of_part in hooks.items():
            part._forward_pre_hooks.update(of_part)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context manager without the warnings and the log of the exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def metadata_of(
    method: str, exported: Exported, transform: ResizeShortest, size: tuple[int, int] | None
) -> dict[str, str]:
    """Returns what the file says of itself. size: the only (height, width) of images, or None."""
    kind = exported.kind
    longest = transform.longest or round(transform.size * 1333 / 800)
    resize = {"short": transform.size, "longest": longest}
    if size:
        resize = dict(zip(("height", "width"), size))
    return {
        "method": method,
        "class_names": json.dumps(exported.space.names),
        "input": "images: uint8 RGB (B, 3, H, W), 0..255; the file normalises them itself",
        "outputs": json.dumps(kind.outputs),
        "score": kind.score,
        "resize": json.dumps(resize),
        "project": "Concord",
    }


def write(exported: Exported, about: dict[str, str], image: Tensor, path: Path, args: Args) -> None:
    """Writes the file. Raises InputError if the model cannot be written in this format.

    about: its metadata; image: (3, H, W), which is traced
    """
    inputs = ["images", "text"] if args.text_input else ["images"]
    try:
        program = trace(exported, image, args)
        if args.format == "torch":
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps(about)})
            return
        with quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=list(exported.kind.outputs),
                custom_translation_table={torch.ops.concord.nms.default: onnx_nms()},
                verbose=False,
            )
        written.model.metadata_props.update(about)
        written.save(path, external_data=False)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(
            f"--format {args.format}: {about['method']} cannot be written ({reason}); try --static,"
            " or the other format"
        ) from error


def need(package: str) -> None:
    """Raises InputError if a package of the extra "export" is missing."""
    try:
        importlib.import_module(package)
    except ImportError:
        raise InputError(
            f"--format onnx needs {package}: pip install onnx onnxscript onnxruntime"
        ) from None


# -- checking --------------------------------------------------------------------------------------


def run_file(path: Path, inputs: dict[str, Tensor], outputs: list[str]) -> dict[str, Tensor]:
    """Runs a written file. inputs: {"images": (B, 3, H, W) uint8, and "text" if it is one}"""
    if path.suffix == ".pt2":
        with quiet():
            module = torch.export.load(path).module()
        with torch.no_grad():
            found = module(*inputs.values())
        return dict(zip(outputs, found))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = session.run(outputs, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(np.asarray(array)) for name, array in zip(outputs, arrays)}


@torch.no_grad()
def reference(module: ModuleType, exported: Exported, image: Tensor) -> dict[str, Any]:
    """Returns what the model predicts for an image (3, H, W): the export is compared with it.

    An export of detections is compared with those of `predict`. An export of queries is compared
    with the probabilities and masks of which `predict` makes a map.
    """
    model, space = exported.model, exported.space
    batch = collate([Sample.unlabelled(image, "", 0, 0)])
    if "probabilities" not in exported.kind.outputs:
        return module.predict(model, batch, space)[0]
    found = queries(model, batch.images, batch.sizes, space, exported.text)
    result = {"probabilities": found[0][0], "masks": found[1][0]}
    if "semantic" in exported.kind.outputs:
        # one task makes the queries of all outputs
        told = {"sentence": model.args.task} if hasattr(model, "task_embedding") else {}
        result["semantic"] = module.predict(model, batch, space, **told)[0]["semantic"]
    return result


def unmatched(wanted: dict, found: dict, least: float) -> tuple[int, float, float]:
    """Compares the detections of an image. Returns how many of `wanted` are not in `found`, and the
    largest differences of the boxes and of the scores of the others.

    A detection is missing if no other of its label is near, unless its score is so low that
    rounding decides whether it is there. least: the score below which there is none
    """
    missing, of_boxes, of_scores = 0, 0.0, 0.0
    margin = 2 * TOLERANCES["scores"]
    lowest = max(least, float(found["scores"].min()) if len(found["scores"]) else least)
    for box, score, label in zip(wanted["boxes"], wanted["scores"], wanted["labels"]):
        of_label = found["labels"] == label
        box_gaps = (found["boxes"][of_label] - box).abs().amax(1)
        score_gaps = (found["scores"][of_label] - score).abs()
        near = (box_gaps < 10 * TOLERANCES["boxes"]) & (score_gaps < 10 * TOLERANCES["scores"])
        if near.any():
            best = (box_gaps + score_gaps).masked_fill(~near, torch.inf).argmin()
            of_boxes = max(of_boxes, float(box_gaps[best]))
            of_scores = max(of_scores, float(score_gaps[best]))
        elif score > lowest + margin or len(found["scores"]) < len(wanted["scores"]):
            missing += bool(score > least + margin)
    return missing, of_boxes, of_scores


def differences(found: dict[str, Tensor], wanted: dict, least: float) -> dict[str, float]:
    """Returns {output: the largest difference}, of the file's outputs for an image and the model's.

    That of "labels" is the share of the detections that only one of the two has, that of "semantic"
    the share of the pixels. That of "masks" is in units of the largest logit.
    """
    if "boxes" in found:
        there = found["scores"] > 0
        found = {name: value[there] for name, value in found.items()}
        pairs = ((wanted, found), (found, wanted))
        counts, boxes, scores = zip(*(unmatched(*pair, least) for pair in pairs))
        number = max(len(wanted["scores"]), 1)
        return {"boxes": max(boxes), "scores": max(scores), "labels": max(counts) / number}
    result = {}
    for name, value in found.items():
        if name == "semantic":
            result[name] = float((value != wanted[name]).float().mean())
            continue
        result[name] = float((value - wanted[name]).abs().max())
        if name == "masks":
            result[name] /= float(wanted[name].abs().max())
    return result


def check(path: Path, module: ModuleType, exported: Exported, image: Tensor, args: Args) -> None:
    """Runs the written file on an image (3, H, W) and compares it with the model.

    Raises InputError if they differ by more than the TOLERANCES.
    """
    outputs = list(exported.kind.outputs)
    inputs = {"images": image[None]}
    if args.text_input:
        inputs["text"] = exported.text
    found = {name: value[0] for name, value in run_file(path, inputs, outputs).items()}
    wanted = reference(module, exported, image)
    apart = differences(found, wanted, exported.kind.least)
    parts = []
    for name, value in apart.items():
        unit = UNITS.get(name, "")
        parts.append(f"{name} {value:.2g} (at most {TOLERANCES[name]:g}) {unit}".strip())
    line = f"largest differences from the model on {args.check or 'a generated picture'}: "
    line += ", ".join(parts)
    if any(not value <= TOLERANCES[name] for name, value in apart.items()):
        raise InputError(f"--output {args.output} is not written: {line}")
    log.info("%s", line)
    if "boxes" in found and not len(wanted["scores"]):
        log.warning("the model finds nothing there; compare on a photograph: --check photo.jpg")


def export(args: Args) -> None:
    """Writes the file of --output and checks it."""
    path = Path(args.output).expanduser()
    if path.suffix != ENDINGS[args.format]:
        raise InputError(
            f"--output '{args.output}': --format {args.format} writes *{ENDINGS[args.format]}"
        )
    if len(args.size) > 2:
        raise InputError(f"--size {' '.join(map(str, args.size))}: give one or two numbers")
    if args.format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package)
    module, model, space = load_model(args)
    exported = Exported(model, space).eval()
    transform = transform_of(args, module, model)
    image = example_image(args, transform)
    size = tuple(image.shape[1:]) if args.static else None
    about = metadata_of(module.__name__, exported, transform, size)
    log.info("writes %s: that takes a minute or two", path)
    with atomic_path(path) as temporary:
        write(exported, about, image, temporary, args)
        check(temporary, module, exported, image, args)
    log.info("%s: %d classes, %.0f MB", path, len(space), path.stat().st_size / 1e6)


def main() -> None:
    """Exports a model as the command line asks."""
    args = tyro.cli(Args, prog="python -m common.export", description=__doc__)
    check_ranges(args)
    export(args)


if __name__ == "__main__":
    run_command(main)
