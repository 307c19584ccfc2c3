"""Weights and their metadata, run folders, checkpoints of others, proposals, flags, environment."""

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import DROP, Case, changed, load, nested, picture, write
from corpus_folders import packed as packed_tar
from corpus_folders import tars
from safetensors.torch import save
from torch import nn

import scaledet
from common import runlog
from common.checkpoint import (
    last_checkpoint,
    load_checkpoint,
    load_weights,
    read_model,
    save_checkpoint,
)
from common.command import parse_args, saved_args
from common.convert import convert_if_official
from common.distributed import setup_device
from common.labels import LabelSpace, Vocabulary
from common.official_detectors import convert_centernet2
from common.official_mask2former import convert_mask2former
from common.process import unlock
from common.proposals import block_file, missing_blocks
from common.runlog import RunLog, make_run_folder

# -- weights


@dataclass
class Args:
    """What a run folder needs to know."""

    resume: str = ""
    output: str = ""
    predict: str = ""
    replay: str = ""
    eval_every: int = 0
    eval_only: bool = False
    keep: int = 2
    lr: float = 0.1
    seed: int = 0
    checkpoint_every: int = 1
    ema: float = 0.0
    accumulate: int = 1
    track: str = ""
    fsdp: bool = False
    score_threshold: float = 0.3


class Model(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)


NAMES = ("cat", "dog")
TENSORS = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "label_space.mine": torch.eye(2, 5)}
METADATA = {
    "method": "scaledet",
    "args": {"lr": 0.1, "seed": 3},
    "vocabularies": {"mine": {"names": ["cat", "dog"], "is_thing": None}},
}


def packed(tensors: dict, metadata: dict) -> bytes:
    return save(tensors, {key: json.dumps(value) for key, value in metadata.items()})


def weights(content: bytes, name: str = "w.safetensors") -> Callable[[Path], dict]:
    """The model of a weights file is rebuilt."""

    def attempt(folder: Path) -> dict:
        path = write(folder / name, content)
        model = Model()
        metadata, (vocabulary,) = read_model(path, "scaledet")
        args = saved_args(scaledet.Args, metadata)
        load_weights(path, model, base=True)
        return {"names": vocabulary.names, "bias": model.bias.tolist(), "seed": args.seed}

    return attempt


def of_metadata(changes: dict):
    return weights(packed(TENSORS, changed(METADATA, changes)))


def of_tensor(name: str, value):
    tensors = dict(TENSORS)
    if value is DROP:
        del tensors[name]
    else:
        tensors[name] = value
    return weights(packed(tensors, METADATA))


def raw_metadata(**texts: str):
    """Metadata that are no json, or other json."""
    known = {key: json.dumps(value) for key, value in METADATA.items()}
    return weights(save(TENSORS, known | texts))


def with_header(length: int, header: str = "{}"):
    return weights(struct.pack("<Q", length) + header.encode())


GOOD = packed(TENSORS, METADATA)
SOUND = {"names": NAMES, "bias": [1.0, 1.0], "seed": 3}
NOT_READ = "weights DIR/w.safetensors cannot be read"
DAMAGED = "weights DIR/w.safetensors have damaged"
INFINITE = torch.tensor([1.0, float("inf")])
VOCABULARY = "vocabularies.mine"
WEIGHTS = [
    ("sound", weights(GOOD), SOUND),
    ("empty", weights(b""), NOT_READ),
    ("text", weights(b"no weights"), NOT_READ),
    ("zeros", weights(bytes(4000)), NOT_READ),
    ("cut off", weights(GOOD[:-9]), NOT_READ),
    ("bytes after the end", weights(GOOD + b"x"), NOT_READ),
    ("cut in the header", weights(GOOD[:50]), NOT_READ),
    ("a header of 2**63 bytes", with_header(2**63), NOT_READ),
    ("a header of 2**60 bytes", with_header(2**60), NOT_READ),
    ("a header that is no json", with_header(2, "{{"), NOT_READ),
    ("a header nested deep", with_header(200_000, nested()), NOT_READ),
    ("a header of a tensor beyond", weights(GOOD.replace(b"[0,", b"[9,", 1)), NOT_READ),
    ("a pickle", weights(pickle.dumps({"weight": [1]})), NOT_READ),
    ("a zip", weights(b"PK\x03\x04" + bytes(99)), NOT_READ),
    ("a git-lfs pointer", weights(b"version https://git-lfs.github.com/spec/v1"), NOT_READ),
    ("no metadata", weights(save(TENSORS)), "were not saved by this project"),
    ("no method", of_metadata({"method": DROP}), "were not saved by this project"),
    ("another method", of_metadata({"method": "detic"}), "not of scaledet.py but of detic.py"),
    ("method a list", of_metadata({"method": ["a"]}), "are not of scaledet.py"),
    ("method of 5000 letters", of_metadata({"method": "x" * 5000}), "are not of scaledet.py"),
    ("method of two lines", of_metadata({"method": "a\nb"}), "but of a\\nb.py"),
    ("args a list", of_metadata({"args": [1]}), f"{DAMAGED} settings"),
    ("args null", of_metadata({"args": None}), f"{DAMAGED} settings"),
    ("args no json", raw_metadata(args="{"), NOT_READ),
    ("args nested deep", raw_metadata(args=nested()), NOT_READ),
    ("an unknown setting", of_metadata({"args.colour": "red"}), SOUND),
    ("a setting of a text", of_metadata({"args.seed": "three"}), "setting seed is 'three'"),
    ("a setting of null", of_metadata({"args.seed": None}), "setting seed is None"),
    ("a setting of a list", of_metadata({"args.lr": [1]}), "setting lr is (1,)"),
    ("a setting of no choice", of_metadata({"args.amp": "maybe"}), "setting amp is 'maybe'"),
    ("a setting nested", of_metadata({"args.lr": {"a": 1}}), "setting lr is {'a': 1}"),
    ("a setting of true", of_metadata({"args.seed": True}), "setting seed is True"),
    ("steps of true", of_metadata({"args.steps": True}), "setting steps is True"),
    ("a setting of NaN", of_metadata({"args.lr": float("nan")}), "setting lr is nan"),
    ("a setting of 400 digits", of_metadata({"args.lr": 10**400}), "setting lr is 1000"),
    ("a setting out of range", of_metadata({"args.seed": -1}), "which must be between 0 and 2147"),
    ("a pair of texts", of_metadata({"args.jitter": ["a", "b"]}), "setting jitter is ('a', 'b')"),
    ("a pair of one", of_metadata({"args.jitter": [0.5]}), "setting jitter is (0.5,)"),
    ("a pair of none", of_metadata({"args.jitter": []}), "setting jitter is ()"),
    ("a pair in reverse", of_metadata({"args.jitter": [2, 1]}), "the smaller number first"),
    ("a number for a pair", of_metadata({"args.jitter": 2}), "setting jitter is 2, which does"),
    ("a text for a list", of_metadata({"args.predict": "a"}), "setting predict is 'a'"),
    ("a text for a switch", of_metadata({"args.fed_loss": "no"}), "setting fed_loss is 'no'"),
    ("a setting of 5000 letters", of_metadata({"args.lr": "x" * 5000}), "setting lr is 'xxx"),
    ("vocabularies a list", of_metadata({"vocabularies": [1]}), f"{DAMAGED} settings"),
    ("vocabularies empty", of_metadata({"vocabularies": {}}), "base model without classes"),
    ("vocabulary null", of_metadata({VOCABULARY: None}), f"{DAMAGED} class names"),
    ("no names", of_metadata({f"{VOCABULARY}.names": DROP}), f"{DAMAGED} class names"),
    ("names null", of_metadata({f"{VOCABULARY}.names": None}), f"{DAMAGED} class names"),
    ("names numbers", of_metadata({f"{VOCABULARY}.names": [1, 2]}), f"{DAMAGED} class names"),
    ("a name twice", of_metadata({f"{VOCABULARY}.names": ["a", "a"]}), f"{DAMAGED} class names"),
    ("a name too many", of_metadata({f"{VOCABULARY}.names.2": "pig"}), f"{DAMAGED} class names"),
    ("names empty", of_metadata({f"{VOCABULARY}.names": []}), f"{DAMAGED} class names"),
    ("is_thing a number", of_metadata({f"{VOCABULARY}.is_thing": 5}), f"{DAMAGED} class names"),
    ("is_thing too few", of_metadata({f"{VOCABULARY}.is_thing": [True]}), f"{DAMAGED} class"),
    ("another dataset", of_metadata({"vocabularies": {"b": {"names": ["a"]}}}), f"{DAMAGED} class"),
    ("no text", of_tensor("label_space.mine", DROP), {"names": NAMES}),
    ("text of integers", of_tensor("label_space.mine", torch.ones(2, 5).int()), f"{DAMAGED} class"),
    ("text of NaN", of_tensor("label_space.mine", torch.eye(2, 5) / 0), f"{DAMAGED} class"),
    ("text of one row", of_tensor("label_space.mine", torch.ones(1, 5)), f"{DAMAGED} class"),
    ("text of one dimension", of_tensor("label_space.mine", torch.ones(2)), f"{DAMAGED} class"),
    ("a tensor missing", of_tensor("bias", DROP), "tensor 'bias' is missing for this model"),
    ("a tensor too many", of_tensor("x", torch.ones(1)), "tensor 'x' is unknown to this model"),
    ("a tensor of another shape", of_tensor("bias", torch.ones(3)), "'bias' has the shape [3]"),
    ("a tensor without elements", of_tensor("bias", torch.ones(0)), "'bias' has the shape [0]"),
    ("a tensor of integers", of_tensor("bias", torch.ones(2).int()), "'bias' is torch.int32"),
    ("a tensor of complex numbers", of_tensor("bias", torch.ones(2) * 1j), "'bias' is torch.comp"),
    ("a tensor of infinity", of_tensor("bias", INFINITE), "'bias' holds values that are not"),
    ("a tensor of NaN", of_tensor("bias", INFINITE * 0), "'bias' holds values that are not"),
    ("a tensor of half precision", of_tensor("bias", torch.ones(2).half()), SOUND),
    ("base no json", raw_metadata(base="{"), NOT_READ),
    ("base a number", raw_metadata(base="5"), f"{NOT_READ} (its base is no list"),
]


# -- run folders


def space(*names: str) -> LabelSpace:
    return LabelSpace([Vocabulary("mine", names or NAMES)])


def start(folder: Path, label_space: LabelSpace | None = None, **settings) -> dict:
    """Starts or goes on with a training in DIR/run: all that reads the folder."""
    args = Args(output=str(folder / "run"), **settings)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    patch = pytest.MonkeyPatch()
    patch.setattr(runlog, "environment", lambda: {"ranks": 1})  # without asking git
    try:
        run = make_run_folder(args, "mine", label_space or space())
        found = last_checkpoint(run)
        step = load_checkpoint(found, optimizer) if found else 0
        if found:
            load_weights(found, model)
        RunLog(args, run, 9, step, model, space(), optimizer, {"method": "mine"}).close()
    finally:
        patch.undo()
        unlock()
    lines = (run / "metrics.jsonl").read_text().count("\n")
    return {"step": step, "lines": lines, "saved": json.loads((run / "args.json").read_text())}


@cache
def finished() -> dict[str, bytes]:
    """Returns the files of a training of two steps, by their paths in the run folder."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        start(folder)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters())
        for step in (1, 2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            state = [[torch.get_rng_state()]]
            content = (state, model, space(), optimizer, {"method": "mine", "args": {}})
            save_checkpoint(folder / "run", step, *content, keep=2)
        lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2))
        write(folder / "run/metrics.jsonl", lines)
        files = (folder / "run").rglob("*")
        return {
            str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()
        }


def run(change: Callable[[Path], object] = lambda folder: None, label_space=None, **settings):
    """A training of two steps, in whose folder something is changed, goes on."""

    def attempt(folder: Path) -> dict:
        for name, content in finished().items():
            write(folder / name, content)
        change(folder / "run")
        return start(folder, label_space, **settings)

    return attempt


def put(name: str, content) -> Callable[[Path], dict]:
    """A file of the run folder has another content."""
    return run(lambda folder: write(folder / name, content))


def flipped(name: str, place: int) -> Callable[[Path], dict]:
    """One bit of a file of the newest checkpoint is flipped."""

    def change(folder: Path) -> None:
        file = folder / NEWEST / name
        data = bytearray(file.read_bytes())
        data[place] ^= 1
        file.write_bytes(data)

    return run(change)


def settings_of(changes: dict) -> Callable[[Path], dict]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "args.json").read_text())
        write(folder / "args.json", changed(record, changes))

    return run(change)


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], dict]:
    """A pipe or a folder has the name of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return run(change)


def both(content: bytes) -> Callable[[Path], dict]:
    """Both checkpoints are damaged."""

    def change(folder: Path) -> None:
        for name in (NEWEST, OLDER):
            write(folder / name / "state.pt", content)

    return run(change)


def swapped(folder: Path) -> None:
    """The newest checkpoint has the files of the older one."""
    for file in (folder / OLDER).iterdir():
        write(folder / NEWEST / file.name, file.read_bytes())


NEWEST, OLDER = "checkpoint-0000002", "checkpoint-0000001"
OLD = {"step": 1, "log": "it is renamed to damaged-checkpoint-0000002"}
ARGS = "DIR/run/args.json"
RUN = "DIR/run"
RUNS = [
    ("a new one", start, {"step": 0}),
    ("goes on", run(), {"step": 2, "lines": 2}),
    ("with another lr", run(lr=0.5), {"step": 2, "log": "--lr 0.5 instead of 0.1"}),
    ("with another seed", run(seed=5), "has other settings: --seed 0 is now 5"),
    ("with other names", run(label_space=space("cat", "pig")), "other class names of 'mine'"),
    ("a file", lambda folder: start(write(folder / "run", "").parent), "cannot be written"),
    ("below a file", lambda folder: start(write(folder / "a", "")), "cannot be written"),
    ("weights cut off", put(f"{NEWEST}/weights.safetensors", b"x" * 99), OLD),
    ("weights empty", put(f"{NEWEST}/weights.safetensors", b""), OLD),
    ("weights of a flipped bit", flipped("weights.safetensors", -1), OLD),
    ("weights of a flipped header", flipped("weights.safetensors", 3), OLD),
    ("state cut off", put(f"{NEWEST}/state.pt", b"PK\x03\x04"), OLD),
    ("state of a flipped bit", flipped("state.pt", 999), OLD),
    ("state of a pickle", put(f"{NEWEST}/state.pt", pickle.dumps(print)), OLD),
    ("state missing", run(lambda folder: (folder / NEWEST / "state.pt").unlink()), OLD),
    ("no checksums", run(lambda folder: (folder / NEWEST / "checksums.json").unlink()), OLD),
    ("checksums cut off", put(f"{NEWEST}/checksums.json", "{"), OLD),
    ("checksums a list", put(f"{NEWEST}/checksums.json", [1]), OLD),
    ("checksums empty", put(f"{NEWEST}/checksums.json", {"step": 2, "files": {}}), OLD),
    ("checksums of step null", put(f"{NEWEST}/checksums.json", {"step": None}), OLD),
    ("checksums nested deep", put(f"{NEWEST}/checksums.json", nested()), OLD),
    ("checksums of bytes", put(f"{NEWEST}/checksums.json", b"\xff"), OLD),
    ("files of another step", run(swapped), OLD),
    ("a checkpoint that is a file", put("checkpoint-0000003", "x"), {"step": 2}),
    ("an empty checkpoint", run(lambda folder: (folder / "checkpoint-3").mkdir()), {"step": 2}),
    ("a checkpoint of letters", put("checkpoint-best/a", "x"), {"step": 2}),
    ("a checkpoint of a superscript", put("checkpoint-²/a", "x"), {"step": 2}),
    (
        "a half-written checkpoint",
        put(".checkpoint-3-1-0123abcd/x", "x"),
        {"log": "1 half-written files"},
    ),
    ("both damaged", both(b"x"), ("no checkpoint of DIR/run is sound", "delete them")),
    ("args missing", run(lambda folder: (folder / "args.json").unlink()), f"{ARGS} cannot be read"),
    ("args cut off", put("args.json", '{"method": '), f"{ARGS} cannot be read"),
    ("args empty", put("args.json", ""), f"{ARGS} cannot be read"),
    ("args of bytes", put("args.json", b"\xff\xfe"), f"{ARGS} cannot be read"),
    ("args nested deep", put("args.json", nested()), f"{ARGS} cannot be read"),
    ("args a list", put("args.json", [1]), f"{ARGS} is not of a mine training"),
    ("args of another method", settings_of({"method": "b"}), f"{ARGS} is not of a mine training"),
    ("args of a null", settings_of({"seed": None}), "--seed None is now 0"),
    ("args of a list", settings_of({"lr": [1]}), {"step": 2, "log": "instead of [1]"}),
    ("args without a setting", settings_of({"lr": DROP}), {"step": 2}),
    ("args of more", settings_of({"colour": "red"}), {"step": 2}),
    ("environment null", settings_of({"environment": None}), "DIR/run/args.json"),
    ("environment a list", settings_of({"environment": [1]}), "DIR/run/args.json"),
    ("history a number", settings_of({"history": 5, "lr": 0.5}), "DIR/run/args.json"),
    (
        "metrics cut off",
        put("metrics.jsonl", '{"step": 1}\n{"st'),
        {"lines": 1, "log": "1 damaged"},
    ),
    ("metrics of bytes", put("metrics.jsonl", b'\xff\n{"step": 1}\n'), {"lines": 1}),
    ("metrics of a list", put("metrics.jsonl", "[1]\n5\nnull\n"), {"lines": 0, "log": "3 damaged"}),
    ("metrics of a huge step", put("metrics.jsonl", '{"step": 1e999}\n'), {"lines": 0}),
    ("metrics of NaN", put("metrics.jsonl", '{"step": NaN}\n'), {"lines": 0, "log": "1 damaged"}),
    ("metrics nested deep", put("metrics.jsonl", nested() + "\n"), {"lines": 0}),
    ("a lock that is a pipe", instead("run.lock", os.mkfifo), f"{RUN}/run.lock is a folder, a"),
    ("a lock that is a folder", instead("run.lock", os.mkdir), f"{RUN}/run.lock is a folder, a"),
    ("args a pipe", instead("args.json", os.mkfifo), f"{RUN}/args.json is a folder, a pipe"),
    ("metrics a pipe", instead("metrics.jsonl", os.mkfifo), f"{RUN}/metrics.jsonl is a"),
    ("results a folder", instead("results.json", os.mkdir), f"{RUN}/results.json is a folder"),
    ("weights a folder", instead("weights.safetensors", os.mkdir), f"{RUN}/weights.safetensors"),
    ("a picture a folder", instead("label_space.png", os.mkdir), f"{RUN}/label_space.png is a"),
    ("a link to nothing", instead("results.json", lambda path: path.symlink_to("x")), {"step": 2}),
    ("checksums a pipe", instead(f"{NEWEST}/checksums.json", os.mkfifo), OLD),
    ("state a pipe", instead(f"{NEWEST}/state.pt", os.mkfifo), OLD),
    ("checkpoint weights a pipe", instead(f"{NEWEST}/weights.safetensors", os.mkfifo), OLD),
    ("metrics a folder", run(lambda f: (f / "metrics.jsonl").rename(f / "m")), {"lines": 0}),
]

# -- checkpoints of other projects


class Hostile:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def official(content: Callable[[str], bytes] | bytes, name: str = "o.pth"):
    """An official checkpoint; `content` gets the folder that hostile code would make."""

    def attempt(folder: Path) -> dict:
        marker = folder / "made by the pickle"
        data = content(str(marker)) if callable(content) else content
        path = write(folder / name, data)
        convert = convert_mask2former if name.endswith(".pkl") else convert_centernet2
        try:
            convert_if_official(path, "detic", convert)
        finally:
            assert not marker.exists()
        return {}

    return attempt


def gone(folder: Path) -> dict:
    convert_if_official(folder, "detic", convert_centernet2)
    return {}


def torch_file(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def hostile_torch(folder: str) -> bytes:
    return torch_file({"model": {"a": torch.ones(1), "b": Hostile(folder)}})


def hostile_old(folder: str) -> bytes:
    return torch_file({"a": Hostile(folder)}, _use_new_zipfile_serialization=False)


def bomb() -> bytes:
    """Returns a zip file as torch writes, whose member unzips to 64 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    return file.getvalue()


def array_pickle(value, protocol: int = 2) -> bytes:
    return pickle.dumps({"model": value}, protocol)


UNREAD = "cannot be read without running code"
STATE = {"a": torch.ones(1)}
OFFICIAL = [
    ("empty", official(b""), f"DIR/o.pth {UNREAD}"),
    ("text", official(b"text"), f"DIR/o.pth {UNREAD}"),
    ("cut off", official(torch_file(STATE)[:-99]), f"DIR/o.pth {UNREAD}"),
    ("a zip bomb", official(bomb()), f"DIR/o.pth {UNREAD}"),
    ("code", official(hostile_torch), f"DIR/o.pth {UNREAD}"),
    ("code in an old file", official(hostile_old), f"DIR/o.pth {UNREAD}"),
    ("code in a bare pickle", official(lambda f: pickle.dumps(Hostile(f))), f"DIR/o.pth {UNREAD}"),
    ("a list", official(torch_file([1])), "hold no state dict"),
    ("a tensor", official(torch_file(torch.ones(1))), "hold no state dict"),
    ("empty state", official(torch_file({"model": {}})), "hold no state dict"),
    ("numbers as names", official(torch_file({1: torch.ones(1)})), "hold no state dict"),
    ("unknown tensors", official(torch_file(STATE)), "'a' is of no known official layout"),
    ("a name of 5000 letters", official(torch_file({"x" * 5000: torch.ones(1)})), "'xxx"),
    ("a name of two lines", official(torch_file({"a\nb": torch.ones(1)})), "'a\\nb' is of no"),
    ("pickle empty", official(b"", "o.pkl"), f"DIR/o.pkl {UNREAD}"),
    ("pickle of text", official(b"text", "o.pkl"), f"DIR/o.pkl {UNREAD}"),
    (
        "pickle of code",
        official(lambda f: pickle.dumps(Hostile(f)), "o.pkl"),
        f"DIR/o.pkl {UNREAD}",
    ),
    (
        "pickle of code inside",
        official(lambda f: array_pickle({"a": Hostile(f)}), "o.pkl"),
        "posix.mkdir is no part of an array",
    ),
    ("pickle of eval", official(b"cbuiltins\neval\n(S'1'\ntR.", "o.pkl"), f"DIR/o.pkl {UNREAD}"),
    ("pickle nested deep", official(b"(" * 10**5 + b"l" * 10**5 + b".", "o.pkl"), UNREAD),
    ("pickle of 2**62 bytes", official(b"\x80\x04\x8e" + b"\xff" * 8, "o.pkl"), UNREAD),
    ("pickle of 64 GB", official(b"\x80\x02}r\xff\xff\xff\xff.", "o.pkl"), "has the number 42949"),
    (
        "pickle of 64 GB in text",
        official(b"(dp4294967295\n.", "o.pkl"),
        "has the number 4294967295",
    ),
    ("pickle of texts", official(array_pickle({"a": "x"}), "o.pkl"), UNREAD),
    ("pickle of objects", official(array_pickle({"a": np.array([{}])}), "o.pkl"), UNREAD),
    ("pickle of an array", official(array_pickle({"a": np.ones(2)}), "o.pkl"), "no known official"),
    ("a folder without weights", gone, "DIR/weights.safetensors do not exist"),
]


# -- proposals


def proposals(content: bytes) -> Callable[[Path], dict]:
    def attempt(folder: Path) -> dict:
        write(block_file(folder, 0), content)
        return {"missing": missing_blocks(folder, 2)}

    return attempt


def rows(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


BOXES = np.ones((2, 3, 4), np.uint16)
AGAIN = {"missing": [0]}  # they are computed again
PROPOSALS = [
    ("sound", proposals(rows(BOXES)), {"missing": []}),
    ("missing", lambda folder: {"missing": missing_blocks(folder, 2)}, AGAIN),
    ("empty", proposals(b""), AGAIN),
    ("text", proposals(b"text"), AGAIN),
    ("cut off", proposals(rows(BOXES)[:-4]), AGAIN),
    ("cut in the header", proposals(rows(BOXES)[:40]), AGAIN),
    ("a flipped header", proposals(rows(BOXES).replace(b"shape", b"shap(")), AGAIN),
    ("a zip", proposals(b"PK\x03\x04" + bytes(99)), AGAIN),
    ("of other images", proposals(rows(BOXES[:1])), AGAIN),
    ("of other numbers", proposals(rows(BOXES.astype(np.float32))), AGAIN),
    ("of one number", proposals(rows(np.uint16(1))), AGAIN),
    ("of zeros alone", proposals(rows(BOXES * 0)), {"missing": []}),
    ("objects", proposals(rows(np.array([{}, {}]))), AGAIN),
]

# -- flags and environment


def flags(*argv: str, **environment: str) -> Callable[[Path], dict]:
    """Flags of a method. tyro itself reports a value of another type, in a box."""

    def attempt(folder: Path) -> dict:
        values = [value.replace("DIR", str(folder)) for value in argv]
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as stderr:
            for name, value in environment.items():
                patch.setenv(name, value.replace("DIR", str(folder)))
            try:
                args = parse_args(scaledet.Args, "scaledet", scaledet.TINY, [], None, values)
                setup_device(args)
            except SystemExit as exit:
                said = next(word for word in argv if word.startswith("--")) in stderr.getvalue()
                return {"exit": exit.code, "said": said}
        return asdict(args)

    return attempt


def wrong(flag: str, *values: str) -> tuple:
    """A value out of the range of a flag."""
    return f"{flag} {' '.join(values)}", flags(flag, *values), f"{flag} {values[0]}"


def typed(flag: str, *values: str) -> tuple:
    """A value of another type."""
    return f"{flag} {' '.join(values)}", flags(flag, *values), {"exit": 2, "said": True}


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FLAGS = [
    ("none", flags(), {"seed": 0}),
    ("a typing error", flags("--datset", "coco"), "'--datset'; did you mean --datasets?"),
    ("an unknown one", flags("--xyzzy"), "unknown argument '--xyzzy'; --help lists all flags"),
    ("a word", flags("coco"), "unknown argument 'coco'"),
    ("a flag of two lines", flags("--a\nb"), "unknown argument '--a\\nb'"),
    ("a flag of 5000 letters", flags("--" + "x" * 5000), "unknown argument '--xxx"),
    ("a flag without its value", flags("--lr"), {"exit": 2, "said": True}),
    ("a flag twice", flags("--seed", "1", "--seed", "2"), {"seed": 2}),
    wrong("--lr", "nan"),
    wrong("--lr", "inf"),
    wrong("--lr", "0"),
    wrong("--lr", "-1"),
    ("--lr 1e999", flags("--lr", "1e999"), "--lr inf must be a finite number"),
    typed("--lr", "fast"),
    typed("--lr", "0,1"),
    typed("--lr", ""),
    wrong("--batch-size", "0"),
    wrong("--batch-size", "-8"),
    typed("--batch-size", "8.5"),
    typed("--batch-size", "1e9"),
    wrong("--image-size", "15"),
    wrong("--image-size", "16385"),
    wrong("--test-size", "0"),
    wrong("--seed", "-1"),
    wrong("--seed", "2147483648"),
    typed("--seed", "0x10"),
    wrong("--steps", "-1"),
    wrong("--steps", "9" * 30),
    typed("--steps", "many"),
    wrong("--workers", "-1"),
    wrong("--checkpoint-every", "0"),
    wrong("--keep", "0"),
    wrong("--skip-bad", "-1"),
    wrong("--tau", "0"),
    wrong("--score-threshold", "-0.1"),
    ("--jitter 2 0.1", flags("--jitter", "2", "0.1"), "the smaller number first"),
    typed("--jitter", "0.1"),
    typed("--amp", "maybe"),
    typed("--compile", "yes"),
    ("--device banana", flags("--device", "banana"), "--device banana"),
    ("--device empty", flags("--device", ""), "--device"),
    ("--device cpu:-1", flags("--device", "cpu:-1"), "--device cpu:-1"),
    ("--weights missing", flags("--weights", "DIR/gone"), "weights DIR/gone do not exist"),
    ("--weights an empty folder", flags("--weights", "DIR"), "weights DIR/weights.safetensors do"),
    ("--weights long", flags("--weights", "x" * 300), "do not exist"),
    ("--weights a device", flags("--weights", "/dev/zero"), "weights /dev/zero do not exist"),
    ("--weights at home", flags("--weights", "~/gone", HOME="DIR"), "weights DIR/gone do not"),
    ("--resume missing", flags("--resume", "DIR/gone"), "DIR/gone/args.json cannot"),
    ("--resume at home", flags("--resume", "~/gone", HOME="DIR"), "DIR/gone/args.json cannot"),
    (
        "--resume and --output",
        flags("--resume", "DIR", "--output", "DIR"),
        "--output has no effect",
    ),
    ("WORLD_SIZE a text", flags(WORLD_SIZE="many"), "variable WORLD_SIZE is 'many', no number"),
    ("WORLD_SIZE -1", flags(WORLD_SIZE="-1"), "variable WORLD_SIZE is '-1', no number"),
    ("WORLD_SIZE 3", flags("--batch-size", "8", WORLD_SIZE="3"), "not a multiple of the 3 ranks"),
    ("WORLD_SIZE of 9999 digits", flags(WORLD_SIZE="9" * 9999), "WORLD_SIZE"),
    ("LOCAL_RANK alone", flags(LOCAL_RANK="0"), "LOCAL_RANK is set, but RANK is not"),
    ("LOCAL_RANK a text", flags(LOCAL_RANK="a", **LAUNCHED), "LOCAL_RANK is 'a', no number"),
    ("MASTER_PORT a text", flags(LOCAL_RANK="0", **LAUNCHED | {"MASTER_PORT": "x"}), "MASTER_PORT"),
    (
        "MASTER_PORT 99999",
        flags(LOCAL_RANK="0", **LAUNCHED | {"MASTER_PORT": "99999"}),
        "MASTER_PORT",
    ),
    ("RANK 5 of 1", flags(LOCAL_RANK="0", **LAUNCHED | {"RANK": "5"}), "RANK"),
]


def within(attempt: Callable[[Path], dict], **environment: str) -> Callable[[Path], dict]:
    """Another case, with environment variables."""

    def attempt_within(folder: Path) -> dict:
        write(folder / "file", "x")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value.replace("DIR", str(folder)))
            return attempt(folder)

    return attempt_within


def coco(folder: Path) -> dict:
    return load("coco")


TAR = tars(packed_tar({"0.png": picture()}))
UNWRITTEN = {"names": ("cat",), "log": "cannot be written, so the headers of"}
ENVIRONMENT = [
    ("data root missing", within(coco, DETECTRON2_DATASETS="DIR/gone"), "data root DIR/gone does"),
    ("data root a file", within(coco, DETECTRON2_DATASETS="DIR/file"), "data root DIR/file does"),
    ("data root empty", within(coco, DETECTRON2_DATASETS="DIR"), "coco/annotations/instances_tr"),
    ("data root at home", within(coco, DETECTRON2_DATASETS="~/x", HOME="DIR"), "root DIR/x does"),
    ("data root long", within(coco, DETECTRON2_DATASETS="x" * 300), "does not exist"),
    ("cache a file", within(TAR, CONCORD_CACHE="DIR/file"), UNWRITTEN),
    ("cache below a file", within(TAR, CONCORD_CACHE="DIR/file/a"), UNWRITTEN),
    ("cache of a long name", within(TAR, CONCORD_CACHE="DIR/" + "x" * 300), UNWRITTEN),
    ("cache at home", within(TAR, CONCORD_CACHE="~/cache", HOME="DIR"), {"names": ("cat",)}),
]
GROUPS = {
    "environment": ENVIRONMENT,
    "weights": WEIGHTS,
    "run folder": RUNS,
    "official": OFFICIAL,
    "proposals": PROPOSALS,
    "flags": FLAGS,
}
CASES = [
    Case(f"{group}: {title}", attempt, expected)
    for group, rows in GROUPS.items()
    for title, attempt, expected in rows
]
