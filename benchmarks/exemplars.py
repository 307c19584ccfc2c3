"""Novel classes known by five pictures instead of their name, on generated data.

    python benchmarks/exemplars.py [FLAGS of detic.py ...] [--output runs/exemplars]

Trains the first stage of detic.py twice on the boxes of base classes: with the text of the class
names, and with a table of pictures, five of each class from the generated ImageNet-21k. A picture
shows the emoji of the class larger, turned, lit and mirrored in its own way, on another texture,
and in half of them drawn by other artists. The control evaluates the second detector with the
pictures of the novel classes given to each other: its base classes are as they were.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.datasets import load_datasets
from common.exemplars import TINY_SIZE
from common.labels import derangement

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "-m common.exemplars in21k --tiny --classes coco-base --encoder lite0 --out {five}"
TRAIN = "detic.py --datasets coco-base --tiny"
EVALUATE = "detic.py --eval-only --tiny --weights {folder}/pictures --text-encoder {exchanged}"
ROWS = {  # run folder -> what the table says
    "names": "their names",
    "pictures": "five pictures each",
    "exchanged": "five pictures of another novel class",
}


def run(command: str, *flags: str) -> None:
    """Runs `python COMMAND FLAGS` in the repository. Ends this process if it fails."""
    parts = [*shlex.split(command), *flags]
    print(shlex.join(["python", *parts]), flush=True)
    code = subprocess.run([sys.executable, *parts], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def exchange(rows: np.ndarray, novel: list[int], seed: int = 0) -> np.ndarray:
    """Returns a copy of rows (C, D) in which each novel class has the row of another novel one."""
    exchanged = rows.copy()
    order = derangement(len(novel), seed).numpy()
    exchanged[novel] = rows[novel][order]
    return exchanged


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns the table of AP50. results: {run: the metrics of coco-base}"""
    lines = ["| classes are known by | AP50 base | AP50 novel |", "|---|---|---|"]
    for name, title in ROWS.items():
        base, novel = (results[name][f"AP50 {group}"] for group in ("base", "novel"))
        lines.append(f"| {title} | {base:.3f} | {novel:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the two trainings and the control, and prints their table."""
    flags = sys.argv[1:]
    folder = Path("runs/exemplars").absolute()
    if "--output" in flags:
        place = flags.index("--output")
        folder = Path(flags[place + 1]).absolute()
        del flags[place : place + 2]
    five, exchanged = folder / "five.npy", folder / "exchanged.npy"
    os.makedirs(folder, exist_ok=True)
    run(PICTURES.format(five=shlex.quote(str(five))))
    (dataset,) = load_datasets("coco-base", "train", tiny=TINY_SIZE, accepts=("instances",))
    np.save(exchanged, exchange(np.load(five), list(dataset.novel)))
    run(TRAIN, "--output", str(folder / "names"), *flags)
    run(TRAIN, "--text-encoder", str(five), "--output", str(folder / "pictures"), *flags)
    run(
        EVALUATE.format(folder=shlex.quote(str(folder)), exchanged=shlex.quote(str(exchanged))),
        "--output",
        str(folder / "exchanged"),
    )
    results = {
        name: json.loads((folder / name / "results.json").read_text())["coco-base"] for name in ROWS
    }
    text = table(results)
    (folder / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
