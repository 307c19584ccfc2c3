"""A detector of two datasets learns the classes of a third one: what it gains, what it forgets.

    python benchmarks/finetuning.py [--seeds 0 1 2] [--output runs/finetuning]

Trains scaledet.py on the generated coco and o365, and from its weights on the generated oid, in
four ways. Each run is evaluated on the datasets of both trainings, and on lineart, which none has
seen. Runs that have ended are not repeated. Writes results.json and table.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
EVALUATED = ("oid", "coco", "o365", "lineart")
SHARED = f"scaledet.py --tiny --eval-datasets {','.join(EVALUATED)} --seed {{seed}}"
OLD = "--datasets coco,o365"
NEW = "--steps 300 --lr 5e-4"
FROM = "--weights {folder}/before"
WAYS = {  # run folder -> what the table says, and the flags of its training
    "before": ("the first training, on coco and o365", OLD),
    "scratch": ("on oid alone, not from these weights", f"{NEW} --datasets oid"),
    "alone": ("on oid alone", f"{NEW} {FROM} --datasets oid"),
    "names": ("on oid, the old names as negatives", f"{NEW} {FROM} --datasets oid,coco@0,o365@0"),
    "replay": (
        "on oid and 100 images of each old dataset",
        f"{NEW} {FROM} --datasets oid,coco@100,o365@100 --dataset-ratios oid=2,coco=1,o365=1",
    ),
}


def train(way: str, seed: int, folder: Path) -> dict[str, float]:
    """Runs one training, unless it has ended. Returns {dataset: AP50}."""
    run = folder / way
    if not (run / "results.json").exists():
        flags = f"{SHARED} {WAYS[way][1]}".format(seed=seed, folder=shlex.quote(str(folder)))
        command = [*shlex.split(flags), "--output", str(run)]
        print(shlex.join(["python", *command]), flush=True)
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
        if code:
            sys.exit(code)
    results = json.loads((run / "results.json").read_text())
    return {name: results[name]["AP50"] for name in EVALUATED}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Returns the table of AP50, mean and standard deviation. results: {way: one row a seed}"""
    lines = [f"| training | {' | '.join(EVALUATED)} |", "|---" * (1 + len(EVALUATED)) + "|"]
    for way, rows in results.items():
        cells = []
        for name in EVALUATED:
            values = [row[name] for row in rows]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        lines.append(f"| {WAYS[way][0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning"))
    args = parser.parse_args()
    folder = args.output.absolute()
    results = {way: [] for way in WAYS}
    for seed in args.seeds:
        for way in WAYS:
            results[way].append(train(way, seed, folder / f"seed{seed}"))
    text = table(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
