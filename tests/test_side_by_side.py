"""The promises of the code: method files line up, common/ knows no method, all stays readable."""

import ast
import difflib
import functools
import io
import itertools
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
METHODS = sorted(p for p in REPO.glob("*.py") if "\nclass Args:" in p.read_text())
BANNERS = ["Args", "Model", "Losses", "Inference", "Train", "Evaluate", "Main"]
NAMES = ["Args", "build_label_space", "Model", "prepare_targets", "compute_losses", "predict"]
NAMES += ["predict_images", "build_dataloader", "train", "evaluate", "load", "main"]
WIRING = [
    "build_dataloader",
    "train",
    "evaluate",
    "load",
    "main",
]  # where single lines are compared

# lines of the wiring that two files write almost alike, and why they may
ALLOWED = {
    "LargeScaleJitter(": "DaTaSeg has another jitter for semantic datasets",
    "training_datasets(args": "methods differ in the masks and the supervision that they read",
    "evaluation_datasets(args": "methods differ in the supervision that they read",
    "predictor = partial(": "segmenters predict for a task",
    "image_weights(": "UniDet samples the images of some datasets by their classes",
    "make_sampler(": "UniDetector has a choice of samplers",
    "refuse_empty(": "in ScaleDet it depends on --neg-scope",
    "run_log.step(": "batches of several datasets have no curves of their own",
    "make_loader(": "some models are compiled for one shape, and the samplers differ",
    "build_dataloader(args, datasets, start": "LMSeg's crops have several shapes",
    "test_transform(model.args": "LMSeg has a test size for each dataset",
    "parameter_groups(": "the papers' weight decay",
    "image_ratios(args": "the papers sample the datasets by other ratios",
    "idle=IDLE": "in some methods, a setting leaves others without an effect",
    'metadata = {"method"': "ScaleDet's weights are those of Detic, too",
    "keep_stage(": "the stages of the papers",
    "for dataset in datasets:": "what is prepared for each dataset",
    "parallel(batch.images": "the models have other inputs",
    "predict_files(partial(": "UniDetector's predictions are calibrated",
    "contrastive": "OneFormer's loss is that of Mask2Former and one more",
    "output.text": "the same",
    "texts = None": "OneFormer's texts are those of the images, LMSeg's text is of the classes",
    "model.args.test_longest": "OneFormer's official models have their own sizes",
    "evaluate_dataset(": "ScaleDet evaluates a control, too, and Detic groups of classes",
    "run_metadata(args)": "UniDetector's two stages write the same metadata",
    "find_unused_parameters=": "which steps leave out parameters",
    "localizer=not weights": "UniDetector has two networks that may be pretrained",
    "width=width": "LMSeg's learned context has the width of its text encoder",
    "images_per_class(": "Detic's novel classes",
    "RunLog(args": "LMSeg's text is learned",
    "compute_losses(args": "the losses have other inputs",
    "raise InputError(": "other errors",
    "text: Tensor": "UniDet has no text",
    "calibrated_text": "OneFormer has no text, Plain-Det centres it",
    "columns": "UniDet has no text, but a column for each class",
    "text: (C, D)": "UniDet has no text",
    "list[Prediction]": "UniDet's prediction is the logits alone",
    "list[TextScores]": "ScaleDet's is the scores by text",
    "return stages,": "the same",
    "self.objectness": "UniDet learns its merges from the probabilities of the classes alone",
    "classify(s.hidden": "UniDet has no text, and ScaleDet needs the cosine, too",
    "predictions = [Prediction(": "ScaleDet needs the cosine, too",
    "warn_of_overlap(": "UniDet learns its merges on further datasets",
    "train(args, datasets, label_space, folder": "the same",
    "if args.attention": "domain attention stands in the backbone",
    "insert_attention(": "domain attention stands in the backbone",
    "torch.arange(": "where the model keeps the number of its classes",
    "ResizeShortestRange(": "the papers' sizes of training images",
    "if args.stage ==": "the stages of the papers",
    "members": "a class of GroupSoftmax may have several columns",
    "anchors": "GroupSoftmax's proposals come from anchors",
    "Anchors]": "the same",
    "prepare_targets(batch, groups)": "GroupSoftmax's labels depend on its groups",
    "a prediction is the logits": "GroupSoftmax has a column for the background",
    "nn.utils.clip_grad_norm_(": "the bases' clipping",
    "if rank() == 0:": "GroupSoftmax writes its table where another file reads one",
    "(batch, task)": "OmDet's labels are indices in the task of the batch",
    "batch.sizes, task)": "the same",
    "(batch, own)": "METR repeats an object for each class above its own",
    "Each dataset is classified by its own part": "ScaleDet says what a further dataset changes",
}

# the budget of each group of modules, in lines; a module that is not listed belongs to "a run"
BUDGETS = {
    "labels & text": 2480,
    "data": 10480,
    "detectors": 5260,
    "segmenters": 2310,
    "a run": 5090,
}
BUDGETS |= {"faults": 2170, "seeing": 980, "hub": 560, "export": 1190}
GROUPS = {
    "labels & text": "labels text class_counts merges merge_scores fine_classes label_report"
    " exemplars pictures aggregator",
    "data": "batch colors transforms sampling shares preview",
    "detectors": "backbone swin vit weight_files boxes targets centernet cascade masks oln"
    " clip_resnet proposals image_label_losses text_classifier official_detectors class_ap"
    " retinanet pseudo_boxes rpn roi_align deformable set_losses"
    " adapted_queries",
    "segmenters": "msda msda_triton pixel_decoder transformer point_matching mask_losses"
    " dataset_heads segments segment_metrics segment_map text_encoder",
    "faults": "checkpoint files process replay rescue runlog saved settings unreadable validation"
    " verdict",
    "seeing": "class_colors cross_labels heat_map label_accuracy mistakes",
    "hub": "hub model_card track",
    "export": "export export_models export_parts",
}


def definitions(path: Path) -> list[ast.AST]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, kinds)]


def functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]


@functools.cache
def blocks(path: Path) -> dict[str, list[str]]:
    """The source lines of every top-level function and class; methods of Model are Model.name."""
    text, found = path.read_text(), {}
    for node in definitions(path):
        if node.name == "Model":
            parts = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"Model.{part.name}": part for part in parts}
        else:
            found[node.name] = node
    return {
        name: ast.get_source_segment(text, node, padded=True).splitlines()
        for name, node in found.items()
    }


def likeness(one: str, other: str) -> float:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio)  # the cheaper one first
    return matcher.ratio() if all(bound() >= 0.9 for bound in bounds) else 0.0


def changed(a: list[str], b: list[str]) -> list[tuple[str, int, int, int, int]]:
    """The places where two lists of lines differ, as difflib's opcodes."""
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [opcode for opcode in opcodes if opcode[0] != "equal"]


def drifts(one: Path, other: Path) -> list[str]:
    """What two method files write almost alike: whole blocks, and lines of the wiring."""
    found = []
    ours, theirs = blocks(one), blocks(other)
    for name in sorted(ours.keys() & theirs.keys() - {"Args"}):
        a, b = ours[name], theirs[name]
        if a != b and name not in WIRING and likeness("\n".join(a), "\n".join(b)) >= 0.9:
            for _, start, end, first, last in changed(a, b):
                for line, twin in itertools.zip_longest(a[start:end], b[first:last], fillvalue=""):
                    found.append(f"{name}: {line.strip()!r} / {twin.strip()!r}")
        if name in WIRING:
            extra, missing = [x for x in a if x not in b], [y for y in b if y not in a]
            for line, twin in itertools.product(extra, missing):
                if likeness(line, twin) >= 0.9:
                    found.append(f"{name}: {line.strip()!r} / {twin.strip()!r}")
    return found


def test_shared_text_does_not_drift():
    found = []
    for one, other in itertools.combinations(METHODS, 2):
        for drift in drifts(one, other):
            if not any(reason in drift for reason in ALLOWED):
                found.append(f"{one.name} {other.name} {drift}")
    assert not found, "\n".join(["the same text to the letter, or an entry in ALLOWED:", *found])


def test_a_drift_is_found(tmp_path):
    text = (REPO / "scaledet.py").read_text()
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text(text)
    other.write_text(
        text.replace("def lowest_cosine(text: Tensor", "def lowest_cosine(rows: Tensor").replace(
            "check_finite(losses, step, batch)", "check_finite(loss, step, batch)"
        )
    )
    assert [drift.partition(":")[0] for drift in drifts(one, other)] == ["lowest_cosine", "train"]


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_banners_and_names(path):
    banners = [
        line.strip("# -") for line in path.read_text().splitlines() if line.startswith("# -- ")
    ]
    assert banners == BANNERS
    names = [node.name for node in definitions(path)]
    assert [name for name in names if name in NAMES] == NAMES


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_losses_name_their_equation(path):
    losses = [node for node in definitions(path) if node.name.startswith("loss_")]
    assert losses
    for node in losses:
        assert (ast.get_docstring(node) or "").startswith(("Eq. ", "Sec. ", "Part ")), node.name


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_method_stays_readable(path):
    assert len(path.read_text().splitlines()) <= 750


def python_files() -> list[Path]:
    return [*METHODS, *(REPO / "common").rglob("*.py")]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(REPO)))
def test_functions_stay_readable(path):
    for node in functions(path):
        triton = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        if triton:  # its parameters stand one a line, and it cannot be cut without a cost
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= (120 if node.name == "train" else 80), f"{node.name} has {length} lines"
        parameters = [arg.arg for arg in node.args.args if arg.arg not in ("self", "cls")]
        assert len(parameters) <= 8, f"{node.name} has {len(parameters)} parameters"


def test_public_functions_of_methods_have_docstrings():
    for path in METHODS:
        bare = [
            n.name
            for n in functions(path)
            if not n.name.startswith("__") and not ast.get_docstring(n)
        ]
        assert set(bare) <= {"main"}, f"{path.name}: {bare}"


def code_size(path: Path) -> tuple[int, int]:
    """Syntax nodes (ast.expr, ast.stmt) and code lines of a file, comments and docstrings apart."""
    text = path.read_text()
    rows: set[int] = set()
    layout = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            rows.update(range(token.start[0], token.end[0] + 1))
    tree = ast.parse(text)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:
            rows -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(isinstance(node, (ast.expr, ast.stmt)) for node in ast.walk(tree)), len(rows)


def test_one_thought_a_line():
    datasets = list((REPO / "common/datasets").rglob("*.py"))
    for paths in (METHODS, list((REPO / "common").glob("*.py")), datasets):
        sizes = {path: code_size(path) for path in paths}
        for path, (nodes, lines) in sizes.items():
            assert lines <= 40 or nodes / lines <= 8, (
                f"{path.name} has {nodes / lines:.1f} syntax nodes a line"
            )
        assert sum(n for n, _ in sizes.values()) / sum(lines for _, lines in sizes.values()) <= 6.5


def test_common_stays_small():
    lines = dict.fromkeys(BUDGETS, 0)
    for path in (REPO / "common").rglob("*.py"):
        length = len(path.read_text().splitlines())
        assert length <= 450, f"{path.name} has {length} lines"
        group = next((g for g, names in GROUPS.items() if path.stem in names.split()), "a run")
        lines["data" if "datasets" in path.parts else group] += length
    assert all(lines[group] <= budget for group, budget in BUDGETS.items()), lines


def test_common_knows_no_method():
    """No module of common/ imports or names a method file, or a flag that one method alone has."""
    flags = {}
    for path in METHODS:
        args = next(node for node in definitions(path) if node.name == "Args")
        for node in args.body:
            if isinstance(node, ast.AnnAssign):
                flags.setdefault("--" + node.target.id.replace("_", "-"), []).append(path.stem)
    alone = {flag for flag, methods in flags.items() if len(methods) == 1}
    methods = {p.stem for p in METHODS}
    found = []
    for path in (REPO / "common").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names += (
                    [node.value]
                    if node.value in methods
                    else re.findall(r"\b(\w+)\.py\b", node.value)
                )
                found += [
                    f"{path.name}: {f}" for f in re.findall(r"--[a-z-]+", node.value) if f in alone
                ]
            found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in methods]
    assert not found, "\n".join(found)


def shared_args(path: Path) -> list[str]:
    """The lines of Args above '# paper settings'."""
    text = path.read_text().split("class Args:")[1]
    return text.split("# paper settings")[0].splitlines()


def test_shared_args_do_not_drift():
    for one, other in itertools.pairwise(METHODS):
        for line, twin in zip(shared_args(one), shared_args(other), strict=True):
            assert line == twin, f"{one.name} and {other.name} drift at: {line!r} / {twin!r}"
    fields = [line for line in shared_args(METHODS[0]) if re.match(r"    \w+: ", line)]
    assert len(fields) <= 29


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_defaults_have_an_origin(path):
    """The line of each default below '# paper settings' ends with its origin."""
    args = path.read_text().split("class Args:")[1].split("\n\n\n")[0]
    heading, *lines = args.split("# paper settings; defaults: ")[1].splitlines()
    fields = [line for line in lines if re.match(r"    \w+: ", line)]
    found = {line.rpartition("  # ")[2] for line in fields}
    assert len(fields) >= 15 and found <= {"paper", "code", "base", "ours"}, found
    assert all(origin in heading for origin in found)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_inline_dependencies_are_those_of_the_project(path):
    wanted = (REPO / "pyproject.toml").read_text()
    wanted = re.findall(r'"([a-zA-Z][\w-]*)>=', wanted.partition("text = [")[0])
    block = path.read_text().split("# dependencies = [")[1].split("# ///")[0]
    assert sorted(re.findall(r'"([\w-]+)"', block)) == sorted(wanted)


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_help_is_the_manual(path):
    done = subprocess.run(
        [sys.executable, path.name, "--help"], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    args = next(node for node in definitions(path) if node.name == "Args")
    for field in (node.target.id for node in args.body if isinstance(node, ast.AnnAssign)):
        assert "--" + field.replace("_", "-") in done.stdout


def test_readme_lists_every_method_and_module():
    readme = (REPO / "README.md").read_text()
    for path in [*METHODS, *(REPO / "common").glob("[a-z]*.py")]:
        assert path.name in readme, path.name


def test_code_is_formatted():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=REPO, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
