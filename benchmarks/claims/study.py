"""A study: variants of a method, the metrics they are compared by, and the effects to look for."""

import string
from dataclasses import dataclass


@dataclass(frozen=True)
class Effect:
    """A claim: variant `better` has a higher value than variant `worse` in a column."""

    better: str
    worse: str
    column: str
    claim: str


@dataclass(frozen=True, eq=False)
class Study:
    """Variants that are trained alike but for what a paper claims to matter.

    name:     of the json file, and of the plot
    question: what the variants answer, in a sentence
    variants: {key: (the words of the table, the command)}. A command is "METHOD.py FLAGS"; --tiny,
              --seed and --output are added. {key} in it is the run folder of that variant.
    columns:  {heading: (title in results.json, metric)}
    effects:  what the paper claims, or what the comparison is made for
    page:     of docs/, which gets the table
    note:     why a claim may not show here
    costs:    whether the table also has the speed and the memory of each variant
    """

    name: str
    question: str
    variants: dict[str, tuple[str, str]]
    columns: dict[str, tuple[str, str]]
    effects: tuple[Effect, ...]
    page: str = ""
    note: str = ""
    costs: bool = False

    def words(self, variant: str) -> str:
        return self.variants[variant][0]

    def command(self, variant: str) -> str:
        return self.variants[variant][1]

    def needs(self, variant: str) -> list[str]:
        """Returns the variants whose run folders a command names."""
        return [name for _, name, _, _ in string.Formatter().parse(self.command(variant)) if name]
