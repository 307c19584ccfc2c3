"""Memory of each method's training at its default size, and the parts that one card needs.

    python benchmarks/one_card.py [METHOD...] [--card 24] [--output FOLDER]

Measures three short trainings of a method on generated images of the default size, in float32 and
on the CPU: one image, two, and two in two parts. From these it computes

    memory = fixed + in_part * images of a part + in_batch * images of the batch

and for the default batch size the least --accumulate with which that is below 85 % of the card. On
a GPU the layers run in bfloat16, which takes less. The rate is that of two images a step, on as
many threads as OMP_NUM_THREADS says.

Backbones have random weights where none can be downloaded, and the text is MiniLM's. Of
unidetector.py the localizer is measured; its classifier, a second network, is not.

Writes one_card-<machine>.json, and the table of the README. A method that the file holds already is
not measured again.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.paired import HERE, cpu_name, machine, record_path, write_json
from benchmarks.report import markdown_row, markdown_table, write_between
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
SHARE = 0.85  # of the card may be taken


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
    if method == "unidetector":
        flags += ["--stage", "localizer"]
    return [*flags, "--steps", str(PROBE_STEPS)]


def peak(method: str, images: int, parts: int) -> tuple[float, float]:
    """Returns the peak GB of a training of PROBE_STEPS steps, and the seconds of the last step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, f"{method}.py", *flags_of(method)]
        command += ["--batch-size", str(images), "--accumulate", str(parts), "--output", folder]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {MEASURE: "1"}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        found = json.loads((Path(folder) / RECORD).read_text())
    return found["peak"] / 1e9, found["seconds"]


def measure(method: str) -> dict:
    """Returns the record of a method: what was measured."""
    (one, _), (two, seconds), (parted, _) = (peak(method, *p) for p in ((1, 1), (2, 1), (2, 2)))
    return {
        "img_per_s": round(2 / seconds, 3),
        "GB": {"1 image": one, "2 images": two, "2 images in 2 parts": parted},
        "batch_size": importlib.import_module(method).Args().batch_size,
    }


def needed(measured: dict[str, float], batch: int) -> dict[int, float]:
    """Returns {--accumulate: GB} of a step of `batch` images, for each number that divides it."""
    one, two, parted = measured.values()
    in_batch = max(parted - one, 0.0)
    in_part = two - one - in_batch
    fixed = one - in_batch - in_part
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    return {n: fixed + in_part * (batch // n) + in_batch * batch for n in divisors}


def table(record: dict, card: float) -> str:
    """Returns a row per method."""
    names = ["method", "images a step", "GB", f"`--accumulate` for {card:g} GB", "GB with it"]
    names.append("img/s on the CPU")
    lines = []
    for method, found in sorted(record["methods"].items()):
        batch = found["batch_size"]
        memory = needed(found["GB"], batch)
        fits = [n for n, size in memory.items() if size <= SHARE * card]
        chosen = f"{fits[0]} | {memory[fits[0]]:.0f}" if fits else f"none | {memory[batch]:.0f}"
        cells = (f"`{method}.py`", batch, f"{memory[1]:.0f}", chosen, f"{found['img_per_s']:.2f}")
        lines.append(markdown_row(cells))
    machine = record["machine"]
    told = f"{machine['CPU']}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    rows = markdown_table(names, lines)
    return f"{rows}\n\n{told}; on a GPU: not measured. `python benchmarks/one_card.py`"


def main() -> None:
    methods = sorted(p.stem for p in ROOT.glob("*.py") if "\nclass Args:" in p.read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=methods)
    parser.add_argument("--card", type=float, default=24.0, help="GB of the card")
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args()
    file = args.output / record_path("one_card", cpu_name()).name
    record = {"machine": machine("cpu"), "methods": {}}
    if file.exists():
        record = json.loads(file.read_text())
    for method in args.methods:
        if method not in record["methods"]:
            record["methods"][method] = measure(method)
            print(method, record["methods"][method], flush=True)
            write_json(file, record)
    text = table(record, args.card)
    print(text)
    if args.output == HERE:
        write_between(HERE.parent / "README.md", "costs", text)


if __name__ == "__main__":
    main()
