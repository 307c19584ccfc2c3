"""Memory of each method's training at its default size, and the parts that one card needs.

    python benchmarks/one_card.py [METHOD...] [--card 24] [--output FOLDER]

Measures three short trainings of a method on generated images of the default size, in float32 and
on the CPU: one image, two, and two in two parts. From these it computes

    memory = fixed + in_part * images of a part + in_batch * images of the batch

and for the default batch size the least --accumulate with which that is below 85 % of the card. On
a GPU the layers run in bfloat16, which takes less. The rate is that of two images a step, on as
many threads as OMP_NUM_THREADS says. Weights are random, since none can be downloaded
here; the text is MiniLM's. Writes one_card-<machine>.json. What it holds already is kept.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.paired import cpu_name, machine, record_path, write_json
from common.memory import MEASURE, PROBE_STEPS, RECORD

ROOT = Path(__file__).resolve().parent.parent

# settings of TINY that are not of its size
KEPT = {"text_encoder", "prompts", "null", "amp", "workers", "steps", "classifier_steps", "tau"}
KEPT |= {"warmup_steps", "period", "checkpoint_every", "lr", "base_batch_size", "cls_bias"}
DATASETS = {
    "detic": "coco-base",
    "category_extended": "cityscapes-common,cityscapes-rare",
    "domain_attention": "coco,oid",
    "metr": "coco,cityscapes-instances",
    "lmseg": "ade20k,cityscapes",
    "dataseg": "ade20k,coco-panoptic",
    "oneformer": "coco-panoptic",
    "groupsoftmax": "coco,oid",
}
BACKBONE = {"unidetector": ["--classifier-backbone", "resnet50"]}  # RN50/openai is not here


COLUMNS = ("batch_size", "whole", "accumulate", "in_parts", "img_per_s")


def flags_of(method: str) -> list[str]:
    """Returns the flags that undo --tiny, but for what is KEPT of it."""
    module = importlib.import_module(method)
    defaults = {field.name: field.default for field in fields(module.Args)}
    flags = ["--tiny", "--datasets", DATASETS.get(method, "coco,o365"), "--workers", "0"]
    for name in module.TINY.keys() - KEPT - {"batch_size"}:
        value = defaults[name]
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return [*flags, *BACKBONE.get(method, [])]


def peak(method: str, images: int, parts: int) -> tuple[float, float]:
    """Returns the peak GB of a training of PROBE_STEPS steps, and the seconds of the last step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{method}.py", *flags_of(method), "--steps", str(PROBE_STEPS)]
        command += ["--batch-size", str(images), "--accumulate", str(parts), "--output", folder]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {MEASURE: "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        found = json.loads((Path(folder) / RECORD).read_text())
    return found["peak"] / 1e9, found["seconds"]


def measure(method: str, card: float) -> dict:
    """Returns the record of a method: what was measured, and what follows from it."""
    (one, _), (two, seconds), (parted, _) = (peak(method, *p) for p in ((1, 1), (2, 1), (2, 2)))
    in_batch = max(parted - one, 0.0)
    in_part = max(two - parted, 0.0)
    fixed = one - in_batch - in_part
    batch = importlib.import_module(method).Args().batch_size
    needed = {n: fixed + in_part * math.ceil(batch / n) + in_batch * batch for n in divisors(batch)}
    fits = [n for n, memory in needed.items() if memory <= 0.85 * card]
    chosen = fits[0] if fits else batch
    return {
        "img_per_s": round(2 / seconds, 3),
        "measured": {"1 image": one, "2 images": two, "2 images in 2 parts": parted},
        "batch_size": batch,
        "whole": round(needed[1], 1),
        "accumulate": chosen,
        "in_parts": round(needed[chosen], 1),
        "fits": bool(fits),
    }


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def table(records: dict[str, dict]) -> str:
    """Returns a row per method."""
    names = ["method", "images a step", "GB whole", "--accumulate", "GB in parts", "img/s"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method, r in records.items():
        cells = (method, *(r[key] for key in COLUMNS))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    methods = sorted(p.stem for p in ROOT.glob("*.py") if "\nclass Args:" in p.read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=methods)
    parser.add_argument("--card", type=float, default=24.0, help="GB of the card")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    file = args.output / record_path("one_card", cpu_name()).name
    record = {"machine": machine("cpu"), "card": args.card, "methods": {}}
    if file.exists():
        record = json.loads(file.read_text())
    for method in args.methods:
        if method not in record["methods"]:
            record["methods"][method] = measure(method, args.card)
            print(method, record["methods"][method], flush=True)
            write_json(file, record)
    print(table(record["methods"]))


if __name__ == "__main__":
    main()
