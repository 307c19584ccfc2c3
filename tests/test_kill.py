"""kill -9 at random moments: the same command, started again, ends with the same bits.

Each start is a process that is forked from one with all imports, since these take longer than the
training. It has a process group of its own, which is killed as a whole: with the data loading
processes and, with two ranks, with torchrun. The moments are drawn from a seed that is printed;
CONCORD_KILL_SEED repeats them, as far as the machine does. 20 kills of each method:

    python -m pytest -m long tests/test_kill.py
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import METHODS, generated, run_method, small_runs, stand_alone
from safetensors.torch import load_file

from common import runlog
from common.checkpoint import checkpoints, load_plain

STEPS = 6  # of each stage, with a checkpoint every second step
SETTINGS = [(0, 1), (2, 1), (0, 2)]  # (--workers, ranks)
PATIENCE = 600  # seconds that a command may take
BAR = re.compile(r"(?:^|[\r\n])([^\r\n|]+): +\d+%\|")
TRAIN, WRITE, START = "train", "a checkpoint", "start-up"


def command(method: str, flags: list[str], ranks: int, folder: Path) -> None:
    """What `python METHOD.py` does, or torchrun. Losses are logged each step, with all digits."""
    stand_alone(folder / "log", folder / "log")
    os.environ["CONCORD_CACHE"] = str(folder / "cache")
    runlog.EVERY = 1
    runlog.round = lambda value, digits: value  # in place of the built-in one
    run_method(method, flags, ranks)


@dataclass
class Visit:
    """A phase of a whole training."""

    phase: str
    seconds: float


@dataclass
class Moment:
    """When a command is killed, `delay` seconds after it comes to a phase, and whom of it."""

    phase: str
    number: int  # 1: the first time that it comes to this phase
    delay: float
    rank: int | None  # only this one, and the others have to end by themselves; None: all

    @classmethod
    def draw(cls, rng: random.Random, visits: list[Visit], phases: list[str], victims: list):
        """Draws a moment of a training in one of the phases, and one of the victims."""
        row = rng.choice([row for row, visit in enumerate(visits) if visit.phase in phases])
        phase = visits[row].phase
        # a training that goes on has fewer visits before it
        number = rng.randint(1, sum(visit.phase == phase for visit in visits[: row + 1]))
        delay = round(rng.uniform(0, visits[row].seconds), 3)
        return cls(phase, number, delay, rng.choice(victims))


@dataclass
class Training:
    """A training that one command starts, or goes on with, in `folder`/run."""

    forks: object
    method: str
    flags: list[str]
    ranks: int
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self):
        """Starts the command and returns its process."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "log").unlink(missing_ok=True)
        flags = [*self.flags, "--output", str(self.run)]
        given = (self.method, flags, self.ranks, self.folder)
        process = self.forks.Process(target=command, args=given)
        process.start()
        return process

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def phase(self) -> str:
        """What the command does now: a checkpoint, or the title of its last progress bar.

        It is "" before the process has its own group.
        """
        if not (self.folder / "log").exists():
            return ""
        if list(self.run.glob(".checkpoint-*")):
            return WRITE
        titles = BAR.findall(self.log)
        return titles[-1] if titles else START

    def hidden(self) -> list[str]:
        """The names of temporary files."""
        return [path.name for path in self.run.rglob(".*")]

    def follow(self, process) -> Iterator[str]:
        """Yields the phases of a process until it ends."""
        begin = time.monotonic()
        while process.is_alive():
            if phase := self.phase():
                yield phase
            if time.monotonic() - begin > PATIENCE:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"it hangs:\n{self.log[-3000:]}")
            time.sleep(0.004)

    def finish(self) -> list[Visit]:
        """Runs the command to its end. Returns its phases, in order."""
        process = self.start()
        visits = []
        for phase in self.follow(process):
            now = time.monotonic()
            if not visits or visits[-1][0] != phase:
                visits.append([phase, now, now])
            visits[-1][2] = now
        assert process.exitcode == 0, self.log[-3000:]
        return [Visit(phase, end - first) for phase, first, end in visits]

    def kill(self, moment: Moment) -> bool:
        """Starts the command and kills it at a moment. Returns False if it ended before."""
        process = self.start()
        last, entered, end = "", 0, float("inf")
        for phase in self.follow(process):
            if phase != last and phase == moment.phase:
                entered += 1
                if entered == moment.number:
                    end = time.monotonic() + moment.delay
            last = phase
            if time.monotonic() >= end:
                break
        else:
            assert process.exitcode == 0, self.log[-3000:]
            return False
        ranks = children(process.pid)
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            if moment.rank is not None and ranks:
                os.kill(ranks[moment.rank % len(ranks)], signal.SIGKILL)
            else:
                os.killpg(process.pid, signal.SIGKILL)
        for _ in self.follow(process):
            pass
        return process.exitcode != 0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


# -- what must be equal ----------------------------------------------------------------------------


def same(one, other) -> bool:
    """Whether two nested values are equal, with all bits of their tensors."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def steps(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line.keys() - {"img_per_s"}} for line in lines]


def differences(training: Training, reference: Training) -> list[str]:
    """What differs between two finished trainings, and temporary files of the first."""
    ours, theirs = training.run, reference.run
    found = [f"{name} is left" for name in training.hidden()]
    found += [f"step {b['step']}" for a, b in zip(steps(ours), steps(theirs)) if a != b]
    if len(steps(ours)) != len(steps(theirs)):
        found.append("the number of steps")
    last, whole = (checkpoints(run)[-1] for run in (ours, theirs))
    if last.name != whole.name:
        return [*found, f"{last.name} is the last, not {whole.name}"]
    pairs = {"the last weights": (ours, theirs), f"the weights of {last.name}": (last, whole)}
    for what, folders in pairs.items():
        if not same(*(load_file(folder / "weights.safetensors") for folder in folders)):
            found.append(what)
    state, other = (load_plain(folder / "state.pt") for folder in (last, whole))
    found += [f"{key} of {last.name}" for key in other if not same(state.get(key), other[key])]
    if (ours / "results.json").read_text() != (theirs / "results.json").read_text():
        found.append("results.json")
    return found


# -- kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def few_images(tmp_path_factory) -> Path:
    return generated(tmp_path_factory.mktemp("few"), 8)  # the fewest of which all parts have some


@dataclass
class Cases:
    """The trainings of one method: the whole ones, and further ones to kill."""

    forks: object
    method: str
    root: Path
    folder: Path

    def __post_init__(self):
        # all runs of a demonstration before the last one only make its --weights
        *before, last = small_runs(self.method, self.folder / "demo", self.root, STEPS)
        first = re.search(r"[\w-]+", last[last.index("--datasets") + 1])[0]
        self.flags = [*last, "--checkpoint-every", "2", "--eval-datasets", first]
        for flags in before:
            made = Training(self.forks, self.method, flags, 1, self.folder / "before")
            made.finish()
            made.run.rename(flags[flags.index("--output") + 1])
        self.whole = {}

    def make(self, workers: int, ranks: int, name: str) -> Training:
        flags = [*self.flags, "--workers", str(workers)]
        return Training(self.forks, self.method, flags, ranks, self.folder / name)

    def reference(self, ranks: int) -> tuple[Training, list[Visit]]:
        """The training that nothing stops, and its phases."""
        if ranks not in self.whole:
            training = self.make(0, ranks, f"whole-{ranks}")
            self.whole[ranks] = training, training.finish()
        return self.whole[ranks]


def stages(phases: list[str]) -> list[str]:
    """The phases between the first step and the last, without steps and checkpoints."""
    steps = [i for i, phase in enumerate(phases) if phase == TRAIN]
    between = phases[steps[0] : steps[-1]]
    return sorted(set(between) - {TRAIN, WRITE})


def stitch(training: Training, moments: list[Moment], report: Counter) -> None:
    """Starts the training and kills it at each of the moments, then lets it end."""
    for moment in moments:
        if not training.kill(moment):
            break
        report["kills"] += 1
        report[f"in {moment.phase}"] += 1
        report["of one rank"] += moment.rank is not None
        report["before the first checkpoint"] += not checkpoints(training.run)
        report["left half-written files"] += bool(training.hidden())
    training.finish()


def seeded(method: str) -> random.Random:
    seed = os.environ.get("CONCORD_KILL_SEED") or str(time.time_ns())
    print(f"CONCORD_KILL_SEED={seed}")
    return random.Random(f"{seed} {method}")


@pytest.mark.parametrize("method", METHODS)
def test_a_training_killed_twice_ends_with_the_same_bits(method, forks, few_images, tmp_path):
    """While it writes a checkpoint, and between its stages, or before or amid its only one.

    Of two ranks, one is killed amid its steps.
    """
    rng = seeded(method)
    workers, ranks = SETTINGS[METHODS.index(method) % len(SETTINGS)]
    cases = Cases(forks, method, few_images, tmp_path)
    whole, visits = cases.reference(ranks)
    moments = [Moment.draw(rng, visits, [WRITE], [None])]
    if ranks > 1:
        moments.append(Moment.draw(rng, visits, [TRAIN], range(ranks)))
    else:
        between = stages([visit.phase for visit in visits]) or [START, TRAIN]
        moments.append(Moment.draw(rng, visits, between, [None]))
    rng.shuffle(moments)
    print(moments)
    training, report = cases.make(workers, ranks, "killed"), Counter()
    stitch(training, moments, report)
    assert report["kills"]
    assert differences(training, whole) == [], moments


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_training_killed_20_times_ends_with_the_same_bits(
    method, forks, few_images, tmp_path, capsys
):
    """In several trainings of at most four kills each: with and without workers, and two ranks."""
    with capsys.disabled():
        rng = seeded(method)
    cases = Cases(forks, method, few_images, tmp_path)
    report, found = Counter(), []
    while report["kills"] < 20:
        workers, ranks = SETTINGS[report["trainings"] % len(SETTINGS)]
        whole, visits = cases.reference(ranks)
        count = min(4, 20 - report["kills"])
        phases = [visit.phase for visit in visits]
        victims = [None, *range(ranks)] if ranks > 1 else [None]
        moments = [Moment.draw(rng, visits, phases, victims) for _ in range(count)]
        training = cases.make(workers, ranks, f"killed-{report['trainings']}")
        stitch(training, moments, report)
        report["trainings"] += 1
        where = f"{workers} workers, {ranks} ranks, {moments}"
        found += [f"{where}: {difference}" for difference in differences(training, whole)]
        shutil.rmtree(training.folder)
    with capsys.disabled():
        listed = ", ".join(f"{count} {what}" for what, count in report.items())
        print(f"{method}: {listed}: {'; '.join(found) or 'equal'}")
    assert found == []
