"""A study: variants of a method, the metrics they are compared by, and the effects to look for."""

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.flag_check import read_names

ROOT = Path(__file__).resolve().parents[2]
Metric = tuple[str, str]  # title in results.json, and the metric below it


def ap50(*titles: str) -> tuple[Metric, ...]:
    """Returns the AP50 of some titles in results.json: a column is their mean."""
    return tuple((title, "AP50") for title in titles)


@dataclass(frozen=True)
class Effect:
    """What is claimed: variant `better` has a higher value in a column than variant `worse`.

    worse_column: the column of `worse`, if it is another one
    ours: whether the question is ours, and no claim of the paper
    """

    better: str
    worse: str
    column: str
    claim: str
    worse_column: str = ""
    ours: bool = False


@dataclass(frozen=True, eq=False)  # hashed by identity, as its dicts have no hash
class Study:
    """Variants that are trained alike but for what a paper claims to matter.

    name:     of the json file, and of the plot
    question: what the variants answer, in a sentence
    variants: {variant: (label in the tables, command)}. A command is what follows "python":
              "METHOD.py FLAGS", or "-m MODULE FLAGS" for what no flag of the method does. --tiny,
              --seed and --output are added. "{other}" in it is the run folder of that variant,
              or what `make` returns by that name.
    columns:  {heading: the metrics whose mean it shows}
    effects:  what the paper claims, or what the comparison is made for
    page:     of docs/, which gets the table; "" for docs/claims.md
    note:     what a reader must know of the comparison, or why a claim may not show here
    costs:    whether the table also has the speed and the memory of each variant
    make:     writes data of the study below a folder, and returns {name: flags}
    """

    name: str
    question: str
    variants: dict[str, tuple[str, str]]
    columns: dict[str, tuple[Metric, ...]]
    effects: tuple[Effect, ...]
    page: str = ""
    note: str = ""
    costs: bool = False
    make: Callable[[Path], dict[str, str]] | None = None

    def label(self, variant: str) -> str:
        return self.variants[variant][0]

    def command(self, variant: str) -> str:
        return self.variants[variant][1]

    def parents(self, variant: str) -> list[str]:
        """Returns the variants whose run folders a command names."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.command(variant))]
        return [name for name in names if name in self.variants]

    def ancestors(self, variant: str) -> set[str]:
        """Returns the parents, their parents, and so on."""
        parents = self.parents(variant)
        return set(parents).union(*map(self.ancestors, parents))

    def root(self, variant: str) -> str:
        """Returns the first of the variants that lead to this one, each the parent of the next."""
        parents = self.parents(variant)
        return self.root(parents[0]) if parents else variant

    def digest(self, variant: str) -> str:
        """Returns a hash of what makes a variant and its ancestors what they are.

        These are the commands, the --tiny settings, and the files of benchmarks/claims that they
        name. Other changes of the code do not show in it; the record of a run has the commit.
        """
        parts = []
        for name in (variant, *sorted(self.ancestors(variant))):
            command = self.command(name)
            parts += [command, tiny_settings(module_of(command)), *own_files(command)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def module_of(command: str) -> str:
    """Returns the module that a command runs, such as scaledet or benchmarks.claims.other."""
    first, *rest = command.split()
    return rest[0] if first == "-m" else first.removesuffix(".py")


def own_files(command: str) -> list[str]:
    """Returns the texts of the module and the tables of this package that a command names."""
    texts = []
    for word in command.split():
        if word.startswith("benchmarks.claims."):
            word = f"{word.replace('.', '/')}.py"
        if word.startswith("benchmarks/claims/"):
            texts.append((ROOT / word).read_text())
    return texts


def tiny_settings(module: str) -> str:
    """Returns the settings of --tiny that stand in a module."""
    file = ROOT / f"{module.replace('.', '/')}.py"
    return repr(sorted(read_names(file, "TINY")["TINY"].items()))
