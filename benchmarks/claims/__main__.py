"""Tries the papers' claims on the generated datasets.

    python -m benchmarks.claims                          # all studies: about 12 hours of two cores
    python -m benchmarks.claims --study scaledet detic --minutes 60
    python -m benchmarks.claims --tables                 # trains nothing, writes tables and plots

Each study trains the variants of a method that differ in one thing, with several seeds. Runs that
are done are not repeated, and one that was stopped goes on, so the command may be stopped at any
time. A run is a record in benchmarks/claims/<study>.json, with its settings, metrics and commit.
Effects within two standard errors of 0 get up to five seeds. The tables go to the methods' pages
in docs/, and all effects to docs/claims.md.
"""

import argparse
import shutil
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from benchmarks.claims import summary
from benchmarks.claims.across import ACROSS
from benchmarks.claims.detectors import DETECTORS
from benchmarks.claims.finetuning import FINETUNING
from benchmarks.claims.runs import Run, execute, is_whole, read_records, write_records
from benchmarks.claims.segmenters import SEGMENTERS
from benchmarks.claims.study import Study
from benchmarks.report import write_between

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
STUDIES = {study.name: study for study in (*DETECTORS, *SEGMENTERS, FINETUNING, *ACROSS)}
MOST_SEEDS = 5  # of the two variants of an effect that is not clear


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=3, help="of each variant")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then no run begins")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="the run folders")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the json files")
    parser.add_argument("--tables", action="store_true", help="trains nothing")
    return parser.parse_args()


def missing(study: Study, seeds: int, records: summary.Records) -> list[Run]:
    """Returns the runs that a study lacks; if none, those of effects that are not clear."""
    runs = [Run(study, variant, seed) for seed in range(seeds) for variant in study.variants]
    if seeds >= summary.LEAST_SEEDS and all(run.key in records for run in runs):
        for effect in study.effects:
            found = summary.difference(study, records, effect)
            if found is not None and not found.is_clear:
                for seed in range(seeds, MOST_SEEDS):
                    runs += [Run(study, v, seed) for v in (effect.worse, effect.better)]
    return [run for run in dict.fromkeys(runs) if run.key not in records]


class Sitting:
    """The runs of one call of the command, until its minutes are over."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.end = time.monotonic() + 60 * args.minutes
        self.records = {name: read_records(STUDIES[name], args.output) for name in args.study}
        self.lock = threading.Lock()

    def chains(self) -> list[list[Run]]:
        """Returns the missing runs, a list per seed and study: a run may start from another."""
        chains = defaultdict(list)
        for name in self.args.study:
            for run in missing(STUDIES[name], self.args.seeds, self.records[name]):
                chains[run.seed, name].append(run)
        return [chains[key] for key in sorted(chains, key=lambda key: key[0])]

    def run_all(self) -> None:
        """Runs what is missing, on --jobs threads, with a bar."""
        while (chains := self.chains()) and time.monotonic() < self.end:
            total = sum(map(len, chains))
            with tqdm(total=total, unit="run") as bar, ThreadPoolExecutor(self.args.jobs) as pool:
                for done in [pool.submit(self.run_chain, chain, bar) for chain in chains]:
                    done.result()

    def run_chain(self, chain: list[Run], bar: tqdm) -> None:
        """Runs a chain, one after the other."""
        for run in chain:
            if run.key not in self.records[run.study.name]:
                self.run(run, bar)
            bar.update()

    def run(self, run: Run, bar: tqdm) -> None:
        """Runs one training, after those whose folders it needs and that are not there.

        Does nothing when the time is over. A run that has a record keeps it.
        """
        for variant in run.study.needs(run.variant):
            needed = Run(run.study, variant, run.seed)
            if not is_whole(needed, self.args.work):
                self.run(needed, bar)
        if time.monotonic() > self.end:
            return
        bar.set_description(str(run))
        record = execute(run, self.args.work.absolute())
        with self.lock:
            records = self.records[run.study.name]
            records.setdefault(run.key, record)
            write_records(run.study, records, self.args.output)


def write_tables(studies: list[Study], folder: Path, docs: Path) -> None:
    """Writes the tables of the pages in `docs`, docs/claims.md, and the plots."""
    effects, parts = [], []
    for study in studies:
        records = read_records(study, folder)
        if not records:
            continue
        plot = f"claims/{study.name}.png"
        (docs / "claims").mkdir(exist_ok=True)
        summary.draw(study, records, docs / plot)
        text = f"{summary.text_of(study, records)}\n\n![{study.question}]({plot})"
        if study.page:
            write_between(docs / study.page, "claims", text)
            link = f"[{study.name}]({study.page})"
            rows = summary.effect_rows(study, records)
            effects += [f"| {link} {row}" for row in rows]
        else:
            parts.append(text)
    table = summary.effect_table(effects, ["study", *summary.EFFECTS])
    write_between(docs / "claims.md", "claims", "\n\n".join([table, *parts]))


def main() -> None:
    args = parse()
    if not args.tables:
        args.output.mkdir(parents=True, exist_ok=True)
        Sitting(args).run_all()
    docs = DOCS
    if args.output != HERE:
        docs = args.output / "docs"
        shutil.copytree(DOCS, docs, dirs_exist_ok=True)
    write_tables(list(STUDIES.values()), args.output, docs)


if __name__ == "__main__":
    main()
