"""Damaged settings and files of others: one line, and memory only for what is there."""

import json
import os
import struct

import numpy as np
import pytest

import scaledet
from common.distributed import setup_device
from common.errors import InputError
from common.files import NO_ARRAY
from common.process import environment_number
from common.saved import read_args

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("value", ["abc", "", "-1", "1.5", "²"])
def test_an_environment_variable_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(InputError, match=r"WORLD_SIZE is .*, no number; unset it"):
        environment_number("WORLD_SIZE", 1)
    monkeypatch.delenv("WORLD_SIZE")
    assert environment_number("WORLD_SIZE", 1) == 1


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_local_rank_without_the_rest_of_torchrun(monkeypatch, missing):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    monkeypatch.setenv("LOCAL_RANK", "0")
    args = scaledet.Args(device="cpu")
    with pytest.raises(InputError, match=f"LOCAL_RANK is set, but {missing} is not"):
        setup_device(args)
    monkeypatch.setenv(missing, TORCHRUN[missing])
    monkeypatch.setenv("LOCAL_RANK", "x")
    with pytest.raises(InputError, match="LOCAL_RANK is 'x', no number"):
        setup_device(args)


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "{", "", "[1]", "\xff", json.dumps({"method": "another"})]
)
def test_settings_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "args.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"args\.json"):
        read_args(path, "mine")


def test_settings_that_are_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "args.json")
    with pytest.raises(InputError, match=r"the settings .*args\.json is no regular file"):
        read_args(tmp_path, "mine")


def test_an_array_that_promises_more_than_the_memory(tmp_path):
    """The header claims 1.8 PiB. All readers of arrays catch what numpy raises for it."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512), }"
    header = header.ljust(117) + b"\n"
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(NO_ARRAY):
        np.load(path, allow_pickle=False)
