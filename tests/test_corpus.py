"""Broken, hostile and odd inputs: each is refused in one clear line, or read with the right value.

The cases are in tables, one module for each group of formats.
"""

import logging

import corpus_coco
import corpus_folders
import corpus_images
import corpus_maps
import corpus_text
import corpus_tools
import pytest
from corpus import check

MODULES = (corpus_coco, corpus_maps, corpus_tools, corpus_images, corpus_folders, corpus_text)
CASES = [case for module in MODULES for case in module.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
@pytest.mark.filterwarnings("ignore")
def test_corpus(case, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "concord")
    check(case, tmp_path, caplog)
