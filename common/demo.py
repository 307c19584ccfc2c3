"""Runs the demonstration of a method: python -m common.demo METHOD [FLAGS...].

DEMO in METHOD.py lists the commands of the demonstration. FLAGS are added to each of them. If FLAGS
name data of their own, or ask for something else than a training, METHOD.py runs with them alone.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from common.flag_check import read_names

ROOT = Path(__file__).resolve().parents[1]
OWN = ("--datasets", "--predict", "--eval-only", "--resume", "--help", "-h")


def commands(method: str, flags: list[str]) -> list[list[str]]:
    """Returns the arguments of each run of `METHOD.py`, a list per run, in order.

    "{output}" in DEMO stands for the run folder: --output of `flags`, or a new one below runs/.
    """
    if any(flag.partition("=")[0] in OWN for flag in flags):
        return [flags]
    output = f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    rest = list(flags)
    for i, flag in enumerate(flags):
        if flag.partition("=")[0] == "--output":
            output = flag.partition("=")[2] or flags[i + 1]
            rest = flags[:i] + flags[i + 1 + ("=" not in flag) :]
    runs = []
    for demo in read_names(ROOT / f"{method}.py", "DEMO")["DEMO"]:
        args = [part.format(output=output) for part in shlex.split(demo)]
        runs.append([*args, *([] if "--output" in args else ["--output", output]), *rest])
    return runs


def main() -> None:
    """Runs the commands one after the other. Stops at the first that fails, with its exit code."""
    method, *flags = sys.argv[1:]
    for args in commands(method, flags):
        print(shlex.join(["python", f"{method}.py", *args]), flush=True)
        code = subprocess.run([sys.executable, f"{method}.py", *args]).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
