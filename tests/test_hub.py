"""Weights pushed to a hub and taken from it. A thread of this process stands in for the hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from conftest import REPO
from PIL import Image
from test_readme import ARGS

import scaledet
from common import hub
from common.checkpoint import save_weights
from common.errors import InputError
from common.flag_check import check
from common.labels import Vocabulary
from common.model_card import model_card
from common.saved import hub_address, read_metadata

TOKEN = "hf_of_the_owner"
RESULTS = {"coco": {"AP": 0.25, "AP50": 0.5, "APl": None}}


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that a push and a download of one file call."""

    protocol_version = "HTTP/1.1"
    repos: dict  # of the server: {owner/name: {"private": bool, "files": {name: bytes}}}

    def answer(self, status: int, body: bytes = b"{}", **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        sent = self.headers["Authorization"]
        if sent != f"Bearer {TOKEN}":
            return self.answer(403 if sent == "Bearer hf_reader" else 401, b'{"error": "no"}')
        if path == "/api/repos/create":
            asked = json.loads(data)
            repo = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.repos.setdefault(repo, {"private": private, "files": {}})
            made = {"url": f"{self.repos['address']}/{repo}"}
            return self.answer(200, json.dumps(made).encode())
        _, _, _, owner, name, verb, _ = path.split("/")
        files = self.repos[f"{owner}/{name}"]["files"]
        if verb == "preupload":
            listed = [file["path"] for file in json.loads(data)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in listed]
            return self.answer(200, json.dumps({"files": modes}).encode())
        for line in map(json.loads, data.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.repos['address']}/{owner}/{name}/commit/{'c' * 40}"
        made = {"commitUrl": url, "commitOid": "c" * 40}
        return self.answer(200, json.dumps(made).encode())

    def do_GET(self) -> None:
        parts = self.path.strip("/").split("/")
        if len(parts) != 5 or parts[2] != "resolve":
            return self.answer(404)
        owner, name, _, revision, file = parts
        repo = self.repos.get(f"{owner}/{name}")
        allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if repo is None or (repo["private"] and not allowed):
            return self.answer(401, X_Error_Code="RepoNotFound")
        if revision not in ("main", "v1", "c" * 40):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if file not in repo["files"]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
        body = repo["files"][file]
        etag = hashlib.sha256(body).hexdigest()
        return self.answer(200, body, X_Repo_Commit="c" * 40, ETag=f'"{etag}"')

    do_HEAD = do_GET


@pytest.fixture
def repos():
    """What the hub has: {owner/name: {"private": bool, "files": {name: bytes}}}, and "address"."""
    handler = type("Own", (Hub,), {"repos": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.repos["address"] = f"http://127.0.0.1:{server.server_port}"
    yield handler.repos
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with untrained weights and results."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    vocabularies = [Vocabulary("coco", Vocabulary.known("coco").names[:9])]
    text = torch.full((1, 384), 384**-0.5)  # of a name that the table lacks
    vocabularies.append(Vocabulary("mine", ("a|b",), text=text))
    args = replace(
        ARGS, datasets="coco,mine=/home/me/a.json:/home/me/im/", data_root="/home/me/data", lam=0.5
    )
    label_space = scaledet.build_label_space(args, vocabularies)
    model = scaledet.Model(args, label_space, pretrained=False)
    metadata = {"method": "scaledet", "args": asdict(args)}
    save_weights(folder / "weights.safetensors", model, label_space, metadata)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "args.json").write_text("{}")
    return folder


@pytest.fixture
def python(repos, tmp_path):
    """python(*args, token=...): a process that knows the hub. HF_ENDPOINT is read at its import."""

    def start(*args, token: str = "", **variables) -> tuple[int, str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": repos["address"], "HF_HOME": str(tmp_path / "hf")}
        environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"} | variables
        if token:
            environment["HF_TOKEN"] = token
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(
            command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200
        )
        return done.returncode, done.stdout, done.stderr

    return start


LOAD = "import sys; from common.hub import download; print(download(sys.argv[1]))"
TELL = """
import sys
from common.command import run_command
from common.hub import download
run_command(lambda: download(sys.argv[1]))
"""


def test_a_run_is_pushed_and_its_weights_are_used(run_folder, repos, python, tmp_path):
    push = ("-m", "common.hub", "push", run_folder, "me/animals", "--private")
    code, output, errors = python(*push, token=TOKEN)
    assert code == 0, errors
    assert f"{repos['address']}/me/animals/commit/{'c' * 40}" in output
    assert "with the paths of this machine" in output and "--weights hf://me/animals" in output
    pushed = repos["me/animals"]
    assert pushed["private"]
    assert pushed["files"].keys() == {"README.md", "weights.safetensors", "results.json"}
    weights = (run_folder / "weights.safetensors").read_bytes()
    assert pushed["files"]["weights.safetensors"] == weights
    card = pushed["files"]["README.md"].decode()
    metadata = read_metadata(run_folder)
    assert card == model_card("me/animals", metadata, RESULTS)

    Image.new("RGB", (120, 90), "white").save(tmp_path / "photo.jpg")
    predict = ("scaledet.py", "--predict", tmp_path / "photo.jpg", "--vocabulary", "cat")
    predict += ("--weights", "hf://me/animals@v1", "--output", tmp_path / "out", "--device", "cpu")
    code, output, errors = python(*predict, token=TOKEN)
    assert code == 0, errors
    assert (tmp_path / "out/predictions.json").exists()

    # what was downloaded is used without a network
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    code, path, errors = python("-c", LOAD, "hf://me/animals@v1", **offline)
    assert code == 0, errors
    with open(path.strip(), "rb") as file:
        assert file.read() == weights


@pytest.mark.long  # the library tries again and again
def test_what_the_hub_does_not_have(repos, python):
    repos["me/empty"] = {"private": False, "files": {"model.bin": b"0"}}
    repos["me/hidden"] = {"private": True, "files": {"weights.safetensors": b"0"}}
    for address, said in (
        ("me/gone", "no such repository, or it is private, and needs a token: `hf auth login`"),
        ("me/hidden", "no such repository, or it is private, and needs a token"),
        ("me/empty", "it has no weights.safetensors; `python -m common.hub push"),
        ("me/empty@v9", "the repository has no revision 'v9'"),
        ("me", "write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ):
        code, _, errors = python("-c", TELL, f"hf://{address}")
        assert code == 2 and errors.count("\n") == 1, errors
        assert errors.startswith(f"error: --weights hf://{address}: ") and said in errors
    code, _, errors = python("-c", TELL, "hf://me/gone", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and errors.count("\n") == 1
    assert "the hub does not answer, and the weights were never downloaded" in errors


@pytest.mark.long  # the library tries again and again
def test_a_push_that_the_hub_does_not_take(run_folder, python, tmp_path):
    push = ("-m", "common.hub", "push", run_folder)
    for repo, token, said in (
        (
            "me/x",
            "",
            "error: pushing to me/x needs a token with the right to write: `hf auth login`",
        ),
        ("me/x", "hf_wrong", "error: me/x: the hub does not know the token"),
        ("me/x", "hf_reader", "error: me/x: the token may not write there"),
        ("x", TOKEN, "error: --weights hf://x: write hf://OWNER/NAME"),
    ):
        code, _, errors = python(*push, repo, token=token)
        assert code == 2 and errors.count("\n") == 1, errors
        assert errors.startswith(said)
    code, _, errors = python(*push, "me/x", token=TOKEN, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and errors.startswith("error: the hub does not answer; connect")
    code, _, errors = python("-m", "common.hub", "push", tmp_path, "me/x", token=TOKEN)
    assert code == 2 and "weights.safetensors do not exist" in errors


def test_the_card(run_folder):
    metadata = read_metadata(run_folder)
    card = model_card("me/animals", metadata, RESULTS)
    _, head, text = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["pipeline_tag"] == "object-detection" and "license" not in head
    assert head["library_name"] == "concord" and "scaledet" in head["tags"]
    assert "# scaledet trained on coco, mine\n" in text
    assert "| coco | 9 | person, bicycle" in text and "truck, ... |" in text
    assert r"| mine | 1 | a\|b |" in text
    assert "coco     0.250  0.500    -" in text
    assert "python scaledet.py --datasets coco,mine=... --backbone tf_efficientnet_lite0" in text
    assert "--lam 0.5" in text and "/home/me" not in card
    assert "The code is Apache-2.0." in text and "have terms of their own" in text
    assert "arxiv.org/abs/2306.04849" in text and "@inproceedings{chen2023scaledet," in text
    for line in card.splitlines():
        assert line == line.rstrip()

    best = metadata | {"best": {"of": "coco AP", "value": 0.25, "step": 100}}
    assert "coco AP 0.250, the best of the training, after step 100." in model_card(
        "a/b", best, None
    )
    assert "None are given." in model_card("a/b", metadata, None)
    of_segments = metadata | {"method": "lmseg", "args": {"tiny": True, "compile": "on"}}
    card = model_card("a/b", of_segments, None)
    assert "pipeline_tag: image-segmentation" in card and "lmseg.py --tiny --compile on\n" in card
    with pytest.raises(InputError, match=r"are of other\.py, which is not here"):
        model_card("a/b", metadata | {"method": "other"}, None)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://me/a", ("me/a", None)),
        ("hf://me/a.b-c@refs/pr/1", ("me/a.b-c", "refs/pr/1")),
        ("hf://me", None),
        ("hf://me/a/b", None),
        ("hf://me/a@", None),
        ("hf:///a", None),
    ],
)
def test_addresses(address, parts):
    if parts:
        assert hub_address(address) == parts
    else:
        with pytest.raises(InputError, match="write hf://OWNER/NAME"):
            hub_address(address)


def test_early_checks_reach_no_network(monkeypatch):
    monkeypatch.setattr(hub, "download", lambda address: pytest.fail("it downloads"))
    for flags in ("--predict REPO/README.md", "--eval-only", "--datasets coco --tiny"):
        flags = flags.replace("REPO", str(REPO)).split()
        monkeypatch.setattr(sys, "argv", ["scaledet.py", "--weights", "hf://me/a", *flags])
        check(REPO / "scaledet.py")
    monkeypatch.setattr(sys, "argv", ["scaledet.py", "--weights", "hf://me", "--eval-only"])
    with pytest.raises(InputError, match="write hf://OWNER/NAME"):
        check(REPO / "scaledet.py")


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install -U huggingface_hub"):
        hub.download("hf://me/a")
