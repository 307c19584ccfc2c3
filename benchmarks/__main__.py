"""Measures Concord against what a user would take instead: torchvision, transformers, pycocotools.

    python -m benchmarks                        # all sections
    python -m benchmarks training inference --rounds 7
    python -m benchmarks --quick                # the smallest sizes, to see that all works
    python -m benchmarks profile                # top operations of a training step
    python -m benchmarks --device cuda

It writes benchmarks/results-<device>.json, the tables of docs/speed.md and the plot docs/speed.png.
A section that was not measured keeps its last figures. Needs `pip install concord[bench]`.
"""

import argparse
import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.paired import HERE, Options, device_name, load, machine, record_path, write_json
from benchmarks.sections import ON_GPU, SECTIONS
from common.errors import InputError, tell

MODES = ("eager", "compiled", "bf16")
DOCS = HERE.parent / "docs"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*SECTIONS, "profile"]
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, at most")
    parser.add_argument(
        "--limit",
        type=float,
        default=25,
        help="seconds of the rounds of one comparison, after which there are no more than two",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="default: eager bf16, on a GPU all three; compiling takes minutes on a CPU",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, 2 rounds; kept only by --output"
    )
    parser.add_argument("--output", type=Path, help="a folder for all that is written")
    args = parser.parse_args()
    unknown = set(args.sections).difference(names)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; take {', '.join(names)}")
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU here; take --device cpu")
    return args


def measure(name: str, options: Options) -> dict:
    """Measures a section. Prints each row when it is there. Returns the record of the section."""
    before, start = load(), time.perf_counter()
    print(
        f"{report.HEADINGS[name]}: about {SECTIONS[name]:g} minutes on two quiet cores", flush=True
    )
    rows = []
    for row in importlib.import_module(f"benchmarks.sections.{name}").rows(options):
        rows.append(row.record())
        print(report.table([row]).splitlines()[-1], flush=True)
    return {
        "machine": machine(options.device),
        "rounds": options.rounds,
        "load": [before, load()],
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }


def write_profiles(options: Options, docs: Path | None) -> None:
    """Prints the top operations and writes them to the page in `docs`."""
    from benchmarks.operations import profiles, small_profiles

    tables = {f"profiles on {kind(options)}": profiles(options)}
    if not options.on_gpu:
        tables["profiles of small models"] = small_profiles()
    for place, table in tables.items():
        text = f"{device_name(options.device)}:\n\n{table}"
        print(text)
        if docs:
            report.write_between(docs / "speed.md", place, text)


def kind(options: Options) -> str:
    """Returns "CPU" or "GPU", of which the page has a part each."""
    return "GPU" if options.on_gpu else "CPU"


def keep(record: dict, path: Path, docs: Path, options: Options) -> None:
    """Writes the json file, the tables of the page and the plot."""
    write_json(path, record)
    report.write_between(docs / "speed.md", f"results on {kind(options)}", report.summary(record))
    report.plot(record, docs / ("speed-gpu.png" if options.on_gpu else "speed.png"))


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    modes = args.modes or (["eager", "bf16"] if args.device == "cpu" else MODES)
    rounds = min(args.rounds, 2) if args.quick else args.rounds
    options = Options(rounds, args.limit, args.quick, args.device, tuple(modes))
    path = record_path("results", device_name(args.device))
    docs = DOCS
    if args.output:
        path, docs = args.output / path.name, args.output
        docs.mkdir(parents=True, exist_ok=True)
        if not (docs / "speed.md").exists():
            shutil.copy(DOCS / "speed.md", docs)
    elif args.quick:
        docs = None
    default = [name for name in SECTIONS if options.on_gpu or name not in ON_GPU]
    names = args.sections or default
    minutes = sum(SECTIONS.get(name, 1) for name in names)
    print(f"about {minutes:.0f} minutes on two quiet CPU cores; a GPU needs less")
    record = {"sections": {}}
    if docs and path.exists():
        record = json.loads(path.read_text())
    for name in names:
        if name == "profile":
            write_profiles(options, docs)
            continue
        record["sections"][name] = measure(name, options)
        if docs:  # after each section, so that an interrupted run keeps what it has
            keep(record, path, docs, options)
    print(report.summary(record) if record["sections"] else "")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        tell(str(error))
        sys.exit(2)
