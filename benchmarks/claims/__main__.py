"""Tries the papers' claims on the generated datasets.

    python -m benchmarks.claims                          # all studies: about 20 hours of two cores
    python -m benchmarks.claims --method scaledet detic --minutes 60
    python -m benchmarks.claims --tables                 # trains nothing, writes tables and plots

Each study trains variants that differ in one thing, with several seeds. Runs that have ended are
not repeated, and one that was stopped goes on, so the command may be stopped at any time. A run is
a record in benchmarks/claims/<study>.json, with its settings, metrics and commit. An effect that is
not clear gets five seeds. The tables go to the methods' pages in docs/, all effects to
docs/claims.md, and the verdicts to README.md.
"""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from benchmarks.claims import summary
from benchmarks.claims.across import ACROSS
from benchmarks.claims.detectors import DETECTORS
from benchmarks.claims.finetuning import FINETUNING
from benchmarks.claims.halves import HALVES
from benchmarks.claims.runs import Records, Run, execute, read_records, stop_all, write_records
from benchmarks.claims.segmenters import SEGMENTERS
from benchmarks.claims.study import ROOT, Study
from benchmarks.paired import revision
from benchmarks.report import markdown_table, write_between
from common.errors import InputError, tell

HERE = Path(__file__).resolve().parent
STUDIES = {study.name: study for study in (*DETECTORS, *SEGMENTERS, FINETUNING, HALVES, *ACROSS)}
# what this command writes: a difference in it is no change of the code
RESULTS = ("benchmarks/claims/*.json", "docs", "README.md")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=STUDIES,
        default=list(STUDIES),
        help="studies of these methods; or finetuning, halves, detectors, segmenters: of several",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of each variant")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no run begins")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--work", type=Path, help="the run folders; else runs/claims, or in OUTPUT")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the json files")
    parser.add_argument("--tables", action="store_true", help="trains nothing")
    args = parser.parse_args()
    if min(args.seeds, args.jobs) < 1:
        parser.error("--seeds and --jobs are at least 1")
    args.output = args.output.resolve()
    own = ROOT / "runs/claims" if args.output == HERE else args.output / "runs"
    args.work = (args.work or own).resolve()
    return args


def missing(study: Study, seeds: int, records: Records) -> list[Run]:
    """Returns the runs that a study lacks; if none, those of effects that are not clear."""
    runs = [Run(study, variant, seed) for seed in range(seeds) for variant in study.variants]
    if seeds >= summary.LEAST_SEEDS and all(run.key in records for run in runs):
        # without later seeds, which do not decide whether they are needed
        first = {run.key: records[run.key] for run in runs}
        for effect in study.effects:
            found = summary.difference(study, first, effect)
            if found is not None and not found.is_clear:
                for seed in range(seeds, summary.MOST_SEEDS):
                    runs += [Run(study, v, seed) for v in (effect.worse, effect.better)]
    return [run for run in dict.fromkeys(runs) if run.key not in records]


class Sitting:
    """Runs the trainings that are missing, until the minutes are over."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes
        self.records = {name: read_records(STUDIES[name], args.output) for name in args.method}
        self.lock = threading.Lock()  # of the records and their files

    def chains(self) -> list[list[Run]]:
        """Returns the missing runs in lists, low seeds first.

        A list has a variant and those that need its folder, of one seed. They run one after the
        other.
        """
        chains = defaultdict(list)
        for name in self.args.method:
            for run in missing(STUDIES[name], self.args.seeds, self.records[name]):
                chains[run.seed, name, run.study.root(run.variant)].append(run)
        return [chains[key] for key in sorted(chains, key=lambda key: key[0])]

    def run_all(self) -> None:
        """Runs what is missing, --jobs at once, with a bar.

        If one fails, or this process is asked to stop, the others stop, too.
        """
        while (chains := self.chains()) and time.monotonic() < self.end:
            total = sum(map(len, chains))
            with tqdm(total=total, unit="run") as bar, ThreadPoolExecutor(self.args.jobs) as pool:
                try:
                    futures = [pool.submit(self.run_chain, chain, bar) for chain in chains]
                    for future in as_completed(futures):
                        future.result()
                except BaseException:
                    self.end = time.monotonic()
                    stop_all()
                    raise

    def run_chain(self, chain: list[Run], bar: tqdm) -> None:
        """Runs a chain, one after the other, until the time is over."""
        for run in chain:
            if run.key not in self.records[run.study.name]:
                try:
                    self.run(run, bar)
                except BaseException:
                    self.end = time.monotonic()  # before this thread takes the next chain
                    raise
            if time.monotonic() > self.end:
                return
            bar.update()

    def run(self, run: Run, bar: tqdm) -> None:
        """Runs a training, and before it the parents that have not ended in --work.

        None begins when the time is over. A parent that is repeated, since its folder is not here,
        replaces its record. The records of the runs that started from the old one are dropped: they
        are missing, and repeated, too.
        """
        for parent in run.parents:
            if not parent.has_ended(self.args.work):
                self.run(parent, bar)
        if time.monotonic() > self.end:
            return
        bar.set_description(str(run))
        record = execute(run, self.args.work, revision(*RESULTS), self.args.jobs)
        with self.lock:
            records = self.records[run.study.name]
            for variant, seed in list(records):
                if seed == run.seed and run.variant in run.study.ancestors(variant):
                    bar.write(f"{run} is repeated, so that of {variant} is dropped")
                    del records[variant, seed]
            records[run.key] = record
            write_records(run.study, records, self.args.output)


def write_tables(studies: list[Study], folder: Path, root: Path) -> None:
    """Writes what the records in `folder` say into the pages below `root`, and the plots.

    The pages are README.md, docs/claims.md and those of the studies.
    """
    docs = root / "docs"
    (docs / "claims").mkdir(exist_ok=True)
    verdicts, parts, waiting, every = [], [], [], []
    for study in studies:
        records = read_records(study, folder)
        every += records.values()
        text = f"No run has ended yet: `python -m benchmarks.claims --method {study.name}` trains."
        if records:
            plot = f"claims/{study.name}.png"
            summary.draw(study, records, docs / plot)
            text = f"{summary.text_of(study, records)}\n\n![{study.question}]({plot})"
        if study.page:
            write_between(docs / study.page, "claims", text)
        if not records:
            waiting.append(study.name)
            continue
        link = f"claims.md#{study.name}"
        if study.page:
            link = f"{study.page}#the-claims-on-generated-data"
            text = f"{study.question} [Variants, means and plot]({link})\n\n"
            table = summary.effect_table(study, records, summary.SHORT)
            text += table or "No claim has both of its variants yet."
        parts.append(f"## {study.name}\n\n{text}")
        verdicts.append(summary.overview_row(study, records, f"[{study.name}](docs/{link})"))
    if waiting:
        parts.append(f"No run of these has ended yet: {', '.join(waiting)}.")
    write_between(docs / "claims.md", "claims", "\n\n".join([count_of(studies, every), *parts]))
    table = markdown_table(["study", *summary.VERDICTS], filter(None, verdicts))
    write_between(root / "README.md", "claims", table)


def count_of(studies: list[Study], records: list[dict]) -> str:
    """Returns a sentence on how many runs have ended, and how long they took."""
    seeds = summary.LEAST_SEEDS
    first = sum(record["seed"] < seeds for record in records)
    variants = sum(len(study.variants) for study in studies)
    hours = sum(record["seconds"] / record["jobs"] for record in records) / 3600
    return (
        f"{first} of {seeds * variants} runs have ended ({variants} variants, {seeds} seeds), and "
        f"{len(records) - first} with the further seeds of unclear effects. They took {hours:.1f} "
        "hours of two cores."
    )


def main() -> None:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // args.jobs)))
    signal.signal(signal.SIGTERM, _interrupt)
    if not args.tables:
        args.output.mkdir(parents=True, exist_ok=True)
        Sitting(args).run_all()
    root = ROOT
    if args.output != HERE:
        root = args.output
        shutil.copytree(ROOT / "docs", root / "docs", dirs_exist_ok=True)
        shutil.copy(ROOT / "README.md", root)
    write_tables(list(STUDIES.values()), args.output, root)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        tell(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        tell("stopped; the same command goes on")
        sys.exit(130)
