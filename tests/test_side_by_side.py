"""The promise of the method files: the same banners and names in the same order, small enough to read, no drift."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
METHODS = [REPO / f"{name}.py" for name in ("lmseg", "dataseg", "detic", "unidetector", "scaledet")]
BANNERS = ["Args", "Model", "Losses", "Inference", "Train", "Evaluate", "Main"]
NAMES = [
    "Args",
    "build_label_space",
    "Model",
    "assign_targets",
    "compute_losses",
    "predict",
    "build_dataloader",
]
NAMES += ["train", "evaluate", "main"]
# the blocks that are the same to the letter in several method files: change one, change all
DETECTORS, SEGMENTERS = ["detic", "scaledet"], ["dataseg", "lmseg"]
SHARED = {
    "TextClassifier": [DETECTORS],
    "Output": [SEGMENTERS],
    "loss_class": [SEGMENTERS],
    "loss_mask": [SEGMENTERS],
    "loss_dice": [SEGMENTERS],
    "Model.set_vocabulary": [DETECTORS + SEGMENTERS],
    "Model.extract": [DETECTORS, SEGMENTERS],
    "Model.detect": [DETECTORS],
    "load_trained": [["dataseg", "scaledet"]],
}


def definitions(path: Path) -> list[ast.AST]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]


def blocks(path: Path) -> dict[str, list[str]]:
    """The source lines of every top-level function and class, and of the methods of Model as Model.name."""
    text, found = path.read_text(), {}
    for node in definitions(path):
        methods = node.body if node.name == "Model" else []
        found |= {
            f"Model.{part.name}": part for part in methods if isinstance(part, ast.FunctionDef)
        }
        found[node.name] = node
    return {
        name: ast.get_source_segment(text, node, padded=True).splitlines()
        for name, node in found.items()
    }


@pytest.mark.parametrize("name", SHARED)
def test_shared_blocks_do_not_drift(name):
    for one, other in (pair for group in SHARED[name] for pair in itertools.pairwise(group)):
        one, other = REPO / f"{one}.py", REPO / f"{other}.py"
        for line, twin in itertools.zip_longest(blocks(one)[name], blocks(other)[name]):
            assert line == twin, (
                f"{name} of {one.name} and {other.name} drifts at: {line!r} / {twin!r}"
            )


def test_shared_blocks_are_declared():
    for one, other in itertools.combinations(METHODS, 2):
        ours, theirs = blocks(one), blocks(other)
        for name in ours.keys() & theirs.keys():
            declared = any({one.stem, other.stem} <= set(group) for group in SHARED.get(name, []))
            assert declared or ours[name] != theirs[name], (
                f"{name} is the same in {one.name} and {other.name}: SHARED"
            )


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_banners_and_names(path):
    banners = [
        line.strip("# -") for line in path.read_text().splitlines() if line.startswith("# ----")
    ]
    assert banners == BANNERS
    names = [node.name for node in definitions(path)]
    assert [name for name in names if name in NAMES] == NAMES


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_losses_name_their_equation(path):
    losses = [node for node in definitions(path) if node.name.startswith("loss_")]
    assert losses
    for node in losses:
        assert (ast.get_docstring(node) or "").startswith(("Eq. ", "Sec. ")), node.name


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_method_stays_readable(path):
    assert len(path.read_text().splitlines()) <= 650
    for node in functions(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= (120 if node.name == "train" else 80), f"{node.name} has {length} lines"
        assert len(node.args.args) <= 8, f"{node.name} has {len(node.args.args)} parameters"


def test_common_stays_small():
    sizes = {p: len(p.read_text().splitlines()) for p in (REPO / "common").rglob("*.py")}
    assert max(sizes.values()) <= 450, max(sizes, key=sizes.get)
    assert sum(sizes.values()) <= 9400


def test_common_imports_no_method():
    methods = {p.stem for p in METHODS}
    for path in (REPO / "common").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not methods & {m.split(".")[0] for m in modules}, path


def shared_args(path: Path) -> list[str]:
    """The lines of Args above '# paper settings'."""
    text = path.read_text().split("class Args:")[1]
    return text.split("# paper settings")[0].splitlines()


def test_shared_args_do_not_drift():
    for one, other in itertools.pairwise(METHODS):
        for line, twin in zip(shared_args(one), shared_args(other), strict=True):
            assert line == twin, f"{one.name} and {other.name} drift at: {line!r} / {twin!r}"
    for path in METHODS:
        fields = [
            line
            for line in shared_args(path)
            if ": " in line and " = " in line and not line.startswith('    """')
        ]
        assert len(fields) <= 24


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_help_is_the_manual(path):
    done = subprocess.run(
        [sys.executable, path.name, "--help"], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    args = next(node for node in definitions(path) if node.name == "Args")
    for field in (node.target.id for node in args.body if isinstance(node, ast.AnnAssign)):
        assert "--" + field.replace("_", "-") in done.stdout


def test_code_is_formatted():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=REPO, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
