"""Broken, hostile and odd inputs: each is refused in one clear line, or read with the right value.

The cases are in tables, one module for each group of formats.
"""

import logging
import os
from importlib import import_module

import pytest
from corpus import check

GROUPS = ("coco", "maps", "tools", "images", "folders", "text", "runs", "commands")
MODULES = [import_module(f"corpus_{group}") for group in GROUPS]
CASES = [case for module in MODULES for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
@pytest.mark.filterwarnings("ignore")
def test_corpus(case, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a busy disk would take most of the time
    caplog.set_level(logging.INFO, "concord")
    check(case, tmp_path, caplog)


def test_the_titles_are_different():
    assert len({case.title for case in CASES}) == len(CASES) >= 300
