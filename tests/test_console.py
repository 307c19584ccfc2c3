"""The log of a command whose output nobody reads, or whose locale lacks the letters."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from common.console import ConsoleHandler, progress_bar

CODE = """
import logging, sys
from common.command import run_command
def main():
    for i in range(3000):
        logging.getLogger("concord").info("line %d \u732b", i)
    print("progress", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
run_command(main)
"""


@pytest.mark.parametrize("redirection", ["| head -1", "2>&-", ">&-", "> /dev/null"])
def test_a_command_goes_on_without_its_output(tmp_path, redirection):
    env = os.environ | {"PYTHONPATH": str(REPO), "LC_ALL": "C", "PYTHONUTF8": "0"}
    env |= {"PYTHONIOENCODING": "ascii"}
    (tmp_path / "run.py").write_text(CODE)
    line = (
        f"{sys.executable} {tmp_path}/run.py {tmp_path}/end {redirection}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
    assert (tmp_path / "end").read_text() == "done"


def test_what_a_line_quotes_cannot_break_it(capsys):
    """Nor other handlers of the record."""
    handler = ConsoleHandler()
    handler.stream = sys.stdout
    path = Path("a\nb")
    record = logging.LogRecord("concord", 20, "", 0, "%s: %d of %s", (path, 3, "x\r\x1b"), None)
    handler.emit(record)
    assert capsys.readouterr().out == "a\\nb: 3 of x\\r\\x1b\n"
    assert record.args == (path, 3, "x\r\x1b")


def test_letters_beyond_the_locale_are_escapes(tmp_path):
    env = os.environ | {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": "ascii"}
    (tmp_path / "run.py").write_text(CODE)
    command = [sys.executable, tmp_path / "run.py", tmp_path / "end"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("line 0 \\u732b\n") and "Traceback" not in done.stderr


@pytest.mark.parametrize("stays", [True, False])
def test_a_progress_bar_is_lines_in_a_log_file(capsys, stays):
    with progress_bar("train", 3, leave=stays) as bar:
        bar.update(3)
    lines = capsys.readouterr().err.split("\n")
    assert lines[0].startswith("train:   0%") and lines[-1] == ""
    assert len(lines) == 2 + stays and all("\r" not in line for line in lines)
