"""What a command tells before it imports torch: --help, wrong flags, names and paths."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import METHODS, REPO

from common.flag_check import BOXES, check, read_names

# runs a program, and then prints the modules that it has imported
COUNT_MODULES = """
import atexit, runpy, sys
heavy = ("torch", "torchvision", "timm", "scipy", "hotcoco")
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(*argv: str) -> tuple[int, str, str, list[str]]:
    """Returns the exit code, standard output and error of a program, and its heavy imports."""
    command = [sys.executable, "-c", COUNT_MODULES, *map(str, argv)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    output, _, imported = done.stdout.rpartition("imported:")
    return done.returncode, output, done.stderr, imported.split()


@pytest.mark.parametrize("method", METHODS)
def test_help_needs_no_torch(method):
    code, output, _, imported = run(f"{method}.py", "--help")
    assert code == 0 and not imported
    assert "datasets to train on, by commas" in output  # the comments of the fields


WRONG = [
    "--foo",
    "--lr -1",
    "--jitter 2 0.1",
    "--datasets ballon",
    "--datasets coco,coco",
    "--datasets coco --data-root /nowhere",
    "--datasets mine=/nowhere.json:images",
    "--datasets mine=/nowhere/",
    "",
    "--weights missing/",
    "--weights one.pth,two.pth",
    "--resume missing/",
    "--predict a.jpg",
    "--eval-only",
    "--replay 3",
]


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_told_before_torch_with_the_line_of_the_command(flags, fails):
    line = fails(*flags.split())
    assert run("scaledet.py", *flags.split()) == (2, "", f"{line}\n", [])


def test_a_value_of_another_type_is_told_before_torch(call, capsys):
    with pytest.raises(SystemExit) as exit:
        call("--seed", "x")
    code, _, errors, imported = run("scaledet.py", "--seed", "x")
    assert (code, imported) == (exit.value.code, [])
    said = "Error parsing --seed: invalid literal for int() with base 10: 'x'"
    assert said in errors and said in capsys.readouterr().err


def test_a_missing_image_is_told_before_torch(tmp_path):
    weights = tmp_path / "official.pth"
    weights.write_bytes(b"")
    flags = ["--weights", weights, "--predict"]
    code, _, errors, imported = run("scaledet.py", *flags, "gone.jpg")
    assert (code, imported) == (2, [])
    assert errors == "error: image gone.jpg does not exist; check the path\n"
    # of several files, the others are predicted
    assert "torch" in run("scaledet.py", *flags, "gone.jpg", "away.jpg")[3]


def test_a_name_to_evaluate_is_told_before_the_training_data_is_read():
    flags = ["--datasets", "coco", "--tiny", "--eval-datasets", "mine=a.json:im,ballon"]
    code, _, errors, imported = run("scaledet.py", *flags)
    assert (code, imported) == (2, []) and errors.startswith("error: unknown dataset 'ballon'")


def test_the_list_of_datasets_needs_no_torch():
    code, output, _, imported = run("common.datasets", "list")
    assert code == 0 and not imported
    assert "80 classes" in output and "coco-panoptic" in output


def test_a_demonstration_tells_a_wrong_flag_before_torch():
    code, output, errors, imported = run("common.demo", "category_extended", "--quux")
    assert (code, imported) == (2, []) and output.startswith("python category_extended.py ")
    assert errors == "error: unknown argument '--quux'; --help lists all flags\n"


def test_a_method_that_is_imported_reads_no_flags(tmp_path):
    (tmp_path / "other.py").write_text("import scaledet, sys; print(sys.argv[1], scaledet.METHOD)")
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, tmp_path / "other.py", "--foo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "--foo scaledet\n" and not done.stderr


def test_what_needs_torch_is_left_to_the_command(tmp_path, monkeypatch):
    """Official weights, a dataset of another kind, and generated data."""
    weights = tmp_path / "official.pth"
    weights.write_bytes(b"")
    passed = ["--datasets coco --tiny", f"--datasets coco --tiny --weights {weights}"]
    passed += ["--datasets ade20k --data-root /nowhere", "--eval-only --weights " + str(weights)]
    for flags in passed:
        monkeypatch.setattr(sys, "argv", ["scaledet.py", *flags.split()])
        check(REPO / "scaledet.py")


@pytest.mark.parametrize("method", METHODS)
def test_names_are_read_as_the_module_has_them(method):
    module = __import__(method)
    names = ("DEMO", "METHOD", "TINY", "MODEL_FIELDS", "SUPERVISION")
    found = read_names(REPO / f"{method}.py", *names, "Args")
    args = found.pop("Args")
    assert vars(args()) == vars(module.Args())
    assert found == {name: getattr(module, name) for name in names if hasattr(module, name)}
    assert found.get("SUPERVISION", BOXES)


def test_a_run_that_is_not_there_any_more(tmp_path):
    """The settings of a run that is resumed are checked, too: its data may have moved."""
    settings = {"method": "scaledet", "datasets": "mine=/nowhere.json:images"}
    (Path(tmp_path) / "args.json").write_text(json.dumps(settings))
    code, _, errors, imported = run("scaledet.py", "--resume", tmp_path)
    assert (code, imported) == (2, []) and "/nowhere.json do not exist" in errors
