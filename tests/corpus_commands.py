"""Whole commands, in this process: their exit code, and their one line on the standard error."""

import importlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import FAST
from corpus import Case, changed, photos, write
from corpus_coco import RECORD

import scaledet
from common.checkpoint import save_weights
from common.command import run_command
from common.datasets.__main__ import main as datasets_main
from common.errors import InputError
from common.labels import Vocabulary

MODEL = ["--backbone", "tf_efficientnet_lite0", "--channels", "64", "--fc-dim", "32"]


def called(main: Callable[[], None], name: str, argv: list[str]) -> dict:
    """Calls a command. Returns its exit code and what it says on the standard error.

    Raises InputError with the line of the command if it ends with exit code 2.
    """
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(sys, "argv", [name, *argv])
        try:
            run_command(main)
            code = 0
        except SystemExit as exit:
            code = exit.code
    said = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    if code == 2:
        (line,) = said
        raise InputError(line.removeprefix("error: "))
    return {"exit": code, "error": "\n".join(said)}


def command(*argv: str, method: str = "scaledet", **files) -> Callable[[Path], dict]:
    """A method with flags. DIR/a.json is a sound file; `files`: "_" stands for "."."""

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        write(folder / "a.json", RECORD)
        for name, content in files.items():
            write(folder / name.replace("_", "."), content)
        values = [value.replace("DIR", str(folder)) for value in argv]
        return called(importlib.import_module(method).main, f"{method}.py", values)

    return attempt


def train(*argv: str, method: str = "scaledet", **files) -> Callable[[Path], dict]:
    """A training of DIR/a.json that stops before its first step."""
    data = ["--datasets", "mine=DIR/a.json:DIR/im", "--output", "DIR/run", "--device", "cpu"]
    return command(*data, *argv, method=method, **files)


@cache
def weights() -> bytes:
    """Returns the weights of a model that has learned nothing, with random text."""
    text = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        np.save(folder / "t.npy", text)
        args = scaledet.Args(backbone=MODEL[1], channels=64, fc_dim=32, test_size=32)
        args.text_encoder = str(folder / "t.npy")
        space = scaledet.build_label_space(args, [Vocabulary("mine", ("cat", "dog"))])
        model = scaledet.Model(args, space, pretrained=False)
        names = ("backbone", "text_encoder", "channels", "fc_dim", "test_size")
        metadata = {"method": "scaledet", "args": {name: getattr(args, name) for name in names}}
        save_weights(folder / "w.safetensors", model, space, metadata)
        return (folder / "w.safetensors").read_bytes()


def predict(*names: str, flags: tuple[str, ...] = (), **files) -> Callable[[Path], dict]:
    """A prediction with the weights of an untrained model."""

    def attempt(folder: Path) -> dict:
        write(folder / "w.safetensors", weights())
        settings = ["--weights", "DIR/w.safetensors", "--output", "DIR/out", "--device", "cpu"]
        return command(*settings, "--predict", *names, *flags, **files)(folder)

    return attempt


def check_data(*argv: str, **files) -> Callable[[Path], dict]:
    """`python -m common.datasets check` of a file."""

    def attempt(folder: Path) -> dict:
        photos(folder / "im", "0.png")
        for name, content in files.items():
            write(folder / name.replace("_", "."), content)
        values = [value.replace("DIR", str(folder)) for value in argv]
        return called(datasets_main, "datasets", ["check", *values])

    return attempt


BROKEN = json.dumps(RECORD)[:-9]
NO_BOX = changed(RECORD, {"annotations.1.bbox": None})
MINE = "mine=DIR/a.json:DIR/im"
COMMANDS = [
    ("nothing", command(), "no dataset named; give --datasets"),
    ("a typing error", command("--dataset", "coco"), "did you mean --datasets?"),
    (
        "an unknown dataset",
        command("--datasets", "cocoa"),
        "unknown dataset 'cocoa'; nearest: coco",
    ),
    ("json cut off", train(a_json=BROKEN), "DIR/a.json is not valid json"),
    ("bbox null", train(a_json=NO_BOX), "annotation 1 has the bbox None"),
    ("a broken image", train("--steps", "1", *FAST, **{"im/0_png": "x"}), "cannot be decoded"),
    ("renamed to one name", train("--rename", "DIR/r.txt", r_txt="cat=dog"), "'dog' twice"),
    ("classes of none", train("--classes", "bird"), "no training dataset has a class 'bird'"),
    ("text embeddings of text", train("--text-encoder", "DIR/t.npy", t_npy="x"), "DIR/t.npy"),
    ("run folder a file", train(*FAST, run="x"), "run folder DIR/run cannot be written"),
    ("--resume of nothing", command("--resume", "DIR/run"), "DIR/run/args.json cannot be read"),
    ("--weights of text", train("--weights", "DIR/w_x", **{"w_x": "x"}), "DIR/w"),
    ("--eval-only alone", command("--eval-only"), "--predict and --eval-only need --weights"),
    ("--predict alone", command("--predict", "DIR/im/0.png"), "need --weights"),
    ("boxes for lmseg", train(method="lmseg"), "this method needs"),
    (
        "a backbone of nobody",
        train(*FAST, "--backbone", "resnet5000"),
        "--backbone resnet5000 is not a timm model",
    ),
    ("an image", predict("DIR/im/0.png"), {"exit": 0, "error": ""}),
    ("no image", predict("DIR/gone.png"), "image DIR/gone.png does not exist"),
    ("text named .png", predict("DIR/t.png", t_png="x"), "image DIR/t.png cannot be decoded"),
    ("one of two broken", predict("DIR/im/0.png", "DIR/t.png", t_png="x"), {"exit": 1}),
    ("a vocabulary of blanks", predict("DIR/im/0.png", flags=("--vocabulary", " , ")), "empty"),
    ("check: sound", check_data(MINE, a_json=RECORD), {"exit": 0}),
    ("check: bbox null", check_data(MINE, a_json=NO_BOX), "annotation 1 has the bbox None"),
    ("check: cut off", check_data(MINE, a_json=BROKEN), "DIR/a.json is not valid json"),
    ("check: nothing there", check_data("mine=DIR/gone/"), "DIR/gone does not exist"),
]
CASES = [Case(f"command: {title}", attempt, expected) for title, attempt, expected in COMMANDS]
