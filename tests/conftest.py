"""Small generated data in the real layouts, and the command line run as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors; two threads that wait for each other on a busy machine are slower than one

REPO = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("CONCORD_REAL", REPO / "../shared/real"))
# a model and a run of seconds; the backbone's weights come from a pip package, so that no test uses the network
FAST = [
    *["--backbone", "tf_efficientnet_lite0", "--text-encoder", "minilm", "--channels", "64", "--fc-dim", "32"],
    *["--rois-per-image", "16", "--image-size", "96", "--test-size", "96", "--batch-size", "4"],
    *["--base-batch-size", "4", "--steps", "6", "--warmup-steps", "2", "--lr", "1e-3", "--workers", "0"],
    *["--device", "cpu", "--cls-bias", "-4.6"],
]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A data root with 12 + 12 images of each generated dataset, 96 pixels."""
    from common.datasets import tiny

    cache = tmp_path_factory.mktemp("tiny")
    for name in tiny.TINY:
        root = tiny.generate(name, cache, size=96, limit=12)
    return root


@pytest.fixture
def run():
    """run(*args, ranks=1) -> the finished process of `python scaledet.py *args`, output as text."""

    def start(*args, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        command = [sys.executable, *launcher, "scaledet.py", *map(str, args)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=timeout)

    return start
