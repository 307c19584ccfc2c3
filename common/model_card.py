"""The model card of weights on the Hugging Face hub, written from the metadata of the weights."""

import math
import re
import shlex
from pathlib import Path

from common.command import with_saved
from common.errors import InputError
from common.flag_check import BOXES, read_names
from common.saved import OF_A_START
from common.tables import format_table

ROOT = Path(__file__).resolve().parents[1]
# settings that say nothing of the model, or name files of one machine
LEFT_OUT = OF_A_START | {"data_root", "device", "workers", "vocabulary", "score_threshold"}
SHOWN = 8  # class names of a dataset

CARD = """\
---
library_name: concord
pipeline_tag: {task}
tags:
{tags}
---

# {method} trained on {datasets}

Weights of `{method}.py` of Concord: single-file implementations of detectors and segmenters that
are trained on several datasets at once.

## Use

```
python {method}.py --predict photo.jpg --weights hf://{repo}
```

```python
import {method}

model, label_space = {method}.load("hf://{repo}")
```

## Classes

{classes}

## Results

{results}

## Training

```
{command}
```

Paths of the machine that trained it are left out.

## Licence

The code is Apache-2.0. This card sets no licence for the weights. The datasets that they were
trained on, and the weights that the training began with, have terms of their own, which whoever
uses these weights must know.

## Paper

{paper}
"""


def model_card(repo: str, metadata: dict, results: dict | None) -> str:
    """Returns the text of README.md for weights with this metadata (`read_metadata`).

    repo:    owner/name on the hub
    results: the content of results.json; None without
    """
    method = str(metadata["method"])
    file = ROOT / f"{method}.py"
    if not re.fullmatch(r"\w+", method) or not file.is_file():
        raise InputError(f"weights {metadata['file']} are of {method:.60}.py, which is not here")
    found = read_names(file, "Args", "TINY", "SUPERVISION")
    segments = {"semantic", "panoptic"} & {*found.get("SUPERVISION", BOXES)}
    task = "image-segmentation" if segments else "object-detection"
    datasets = list(metadata["vocabularies"])
    return CARD.format(
        task=task,
        tags="\n".join(f"- {tag}" for tag in ("concord", "pytorch", "multi-dataset", method)),
        method=method,
        datasets=", ".join(datasets) or "no dataset",
        repo=repo,
        classes=_class_table(metadata["vocabularies"]),
        results=_results(results, metadata),
        command=shlex.join(["python", file.name, *_flags(found["Args"], found["TINY"], metadata)]),
        paper=_paper(ROOT / "docs" / f"{method}.md"),
    )


def _class_table(vocabularies: dict) -> str:
    """Returns a table with a row per dataset: how many classes, and the first names."""
    rows = ["| dataset | classes | some of them |", "|---|---|---|"]
    for dataset, record in vocabularies.items():
        names = record["names"]
        first = ", ".join(name.replace("|", r"\|") for name in names[:SHOWN])
        more = ", ..." if len(names) > SHOWN else ""
        rows.append(f"| {dataset} | {len(names)} | {first}{more} |")
    return "\n".join(rows)


def _results(results: dict | None, metadata: dict) -> str:
    """Returns the table of results.json, or the metric by which the weights were the best."""
    if results:
        rows = {
            title: {name: math.nan if value is None else value for name, value in row.items()}
            for title, row in results.items()
        }
        return f"```\n{format_table(rows)}\n```"
    if best := metadata.get("best"):
        value = f"{best['of']} {best['value']:.3f}"
        return f"{value}, the best of the training, after step {best['step']}."
    return "None are given."


def _flags(args_class: type, tiny: dict, metadata: dict) -> list[str]:
    """Returns the flags of the training: its settings that are not the defaults, without paths."""
    small = bool(metadata["args"].get("tiny"))
    default = args_class(tiny=True, **tiny) if small else args_class()
    args = with_saved(default, metadata["args"], vars(default).keys(), metadata["file"])
    flags = ["--tiny"] if small else []
    for name in (name for name in vars(default) if name not in LEFT_OUT):
        value = getattr(args, name)
        flag = name.replace("_", "-")
        if value == getattr(default, name):
            continue
        if isinstance(value, bool):
            flags += [f"--{flag}" if value else f"--no-{flag}"]
            continue
        values = value if isinstance(value, tuple) else (value,)
        flags += [f"--{flag}", *(_without_paths(str(part)) for part in values)]
    return flags


def _without_paths(value: str) -> str:
    """Returns the value of a flag with "..." for the paths of datasets, and bare names of files."""
    value = re.sub(r"=[^,]*[/:][^,]*", "=...", value)  # NAME=ANNOTATIONS:IMAGES
    return re.sub(r"(?<![\w.-])(~|[A-Za-z]:)?[/\\][^,]*[/\\]", "", value)


def _paper(page: Path) -> str:
    """Returns the first paragraph and the BibTeX of a method's page."""
    text = page.read_text(encoding="utf-8")
    first = text.split("\n\n")[1]
    _, _, bibtex = text.partition("\n## BibTeX\n")
    return f"{first}\n\n{bibtex.strip()}"
