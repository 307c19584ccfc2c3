"""Tables and plots of the records: means over seeds, and paired differences of two variants."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import ttest_1samp

from benchmarks.claims.runs import Records
from benchmarks.claims.study import Effect, Study
from benchmarks.report import markdown_row, markdown_table
from common.files import atomic_path

LEAST_SEEDS = 3  # that say whether an effect is clear
MOST_SEEDS = 5  # when an effect is not clear, its two variants get as many
CLEAR = 0.05  # the largest p of a clear effect
EFFECTS = ["claim", "difference of", "in", "mean ± standard error", "seeds", "shown?"]
SHORT = ["shown?", "claim", "in", "mean ± standard error", "seeds"]
VERDICTS = ["shown", "not clear", "the opposite"]


def values_of(study: Study, records: Records, variant: str, column: str) -> dict[int, float]:
    """Returns {seed: value} of a variant: the mean of the column's metrics.

    A seed whose run lacks one of them is left out.
    """
    values = {}
    for (name, seed), record in sorted(records.items()):
        if name == variant:
            found = record["metrics"]
            metrics = [found.get(title, {}).get(key) for title, key in study.columns[column]]
            if None not in metrics:
                values[seed] = mean(metrics)
    return values


# -- Effects ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The differences of two variants, seed by seed."""

    values: list[float]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for one seed."""
        if len(self.values) < 2:
            return math.nan
        return stdev(self.values) / math.sqrt(len(self.values))

    @property
    def p(self) -> float:
        """Of the paired t-test, two-sided; NaN for one seed."""
        if len(self.values) < 2:
            return math.nan
        return float(ttest_1samp(self.values, 0).pvalue)

    @property
    def is_clear(self) -> bool:
        return self.p < CLEAR

    @property
    def verdict(self) -> str:
        """One of VERDICTS, or the number of seeds if these are too few."""
        count = len(self.values)
        if count < LEAST_SEEDS:
            return f"{count} of {LEAST_SEEDS} seeds"
        if LEAST_SEEDS < count < MOST_SEEDS:  # a stop between must not decide
            return Difference(self.values[:LEAST_SEEDS]).verdict
        shown, unclear, opposite = VERDICTS
        if not self.is_clear:
            return unclear
        return shown if self.mean > 0 else opposite


def difference(study: Study, records: Records, effect: Effect) -> Difference | None:
    """Returns the differences of the seeds that both variants have; None without one."""
    better = values_of(study, records, effect.better, effect.column)
    worse = values_of(study, records, effect.worse, effect.worse_column or effect.column)
    seeds = sorted(better.keys() & worse.keys())
    return Difference([better[seed] - worse[seed] for seed in seeds]) if seeds else None


# -- Tables ----------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Formats a metric as papers do: .123."""
    text = f"{value:.3f}"
    return text.removeprefix("0") if value < 1 else text


def variant_table(study: Study, records: Records) -> str:
    """Returns a row per variant: mean and standard deviation over its seeds, and what it costs."""
    headings = ["variant", *study.columns, "seeds", "minutes"]
    if study.costs:
        headings += ["img/s", "GB"]
    lines = []
    for variant in study.variants:
        own = [record for (name, _), record in records.items() if name == variant]
        if not own:
            continue
        cells = [study.label(variant)]
        for column in study.columns:
            values = list(values_of(study, records, variant, column).values())
            spread = f" ± {number(stdev(values))}" if len(values) > 1 else ""
            cells.append(f"{number(mean(values))}{spread}" if values else "")
        cells += [str(len(own)), minutes_of(own)]
        if study.costs:
            cells += costs_of(own)
        lines.append(markdown_row(cells))
    return markdown_table(headings, lines)


def minutes_of(records: list[dict]) -> str:
    """Returns the minutes of the fastest run that was not stopped; "" without one.

    The others may have shared the machine with more than each other.
    """
    seconds = [record["seconds"] for record in records if not record["resumed"]]
    return f"{min(seconds) / 60:.1f}" if seconds else ""


def are_costs(record: dict) -> bool:
    """Returns whether the speed of a run counts: it was neither stopped nor beside another one."""
    return not record["resumed"] and record["jobs"] == 1 and bool(record["img_per_s"])


def costs_of(records: list[dict]) -> tuple[str, str]:
    """Returns the images per second and the GB of runs, as `are_costs` allows."""
    whole = list(filter(are_costs, records))
    if not whole:
        return "", ""
    speed = mean(record["img_per_s"] for record in whole)
    return f"{speed:.1f}", f"{max(record['peak_gb'] for record in whole):.1f}"


def claim_of(effect: Effect) -> str:
    """Returns the claim, and whose it is."""
    return f"{effect.claim} (ours)" if effect.ours else effect.claim


def effect_cells(study: Study, records: Records) -> list[dict[str, str]]:
    """Returns {heading: cell} of each effect that was measured. The headings are EFFECTS."""
    rows = []
    for effect in study.effects:
        found = difference(study, records, effect)
        if found is None:
            continue
        pair = study.label(effect.better)
        if effect.worse != effect.better:
            pair += f" − {study.label(effect.worse)}"
        size = f"{found.mean:+.3f}"
        if len(found.values) > 1:
            size += f" ± {found.error:.3f} (p {found.p:.2g})"
        column = effect.column
        if effect.worse_column:
            column += f" − {effect.worse_column}"
        cells = [claim_of(effect), pair, column, size, str(len(found.values)), found.verdict]
        rows.append(dict(zip(EFFECTS, cells)))
    return rows


def effect_table(study: Study, records: Records, headings: list[str]) -> str:
    """Returns a row per effect that was measured; "" without one. headings: some of EFFECTS"""
    rows = [[cells[h] for h in headings] for cells in effect_cells(study, records)]
    return markdown_table(headings, map(markdown_row, rows)) if rows else ""


def overview_row(study: Study, records: Records, link: str) -> str:
    """Returns a row of the README: `link`, and the claims of a study, a cell per verdict.

    "" if there is no verdict yet
    """
    claims = {verdict: [] for verdict in VERDICTS}
    for effect in study.effects:
        found = difference(study, records, effect)
        if found is not None and found.verdict in claims:
            claims[found.verdict].append(claim_of(effect))
    if not any(claims.values()):
        return ""
    return markdown_row([link, *("; ".join(texts) for texts in claims.values())])


def text_of(study: Study, records: Records) -> str:
    """Returns what a page says of a study: its question, tables and note."""
    revisions = {record["revision"] for record in records.values()}
    parts = [study.question, variant_table(study, records)]
    if table := effect_table(study, records, EFFECTS):
        parts.append(table)
    if study.note:
        parts.append(study.note)
    timed = [record for record in records.values() if not record["resumed"]]
    machines = {f"{record['jobs']} at once on {record['cpu']}" for record in timed}
    parts.append(
        "± is the standard deviation over the seeds, and of a difference the standard error of the "
        "mean. A difference is that of the seeds which both variants have. In the plot a bar is "
        "the mean, and a dot is a seed. Minutes are those of the fastest run that was not stopped, "
        f"without the runs that it starts from, {' or '.join(sorted(machines))}. Other work ran "
        "beside some runs, so minutes say little about which variant is faster."
    )
    if study.costs:
        alone = filter(are_costs, records.values())
        machines = {f"{record['cpu']}, {record['threads']} threads" for record in alone}
        where = "; ".join(sorted(machines)) or "not measured yet"
        parts.append(
            "Speed is the median of a training, with the decoding of images. Memory is the most of "
            f"the process, of which the libraries are a large part ({where})."
        )
    parts.append(
        f"`python -m benchmarks.claims --method {study.name} --output FOLDER` repeats it. "
        f"`benchmarks/claims/{study.name}.json` has the settings and metrics of each run. "
        f"Commits: {', '.join(sorted(revisions))}."
    )
    return "\n\n".join(parts)


# -- Plot ------------------------------------------------------------------------------------------


def draw(study: Study, records: Records, path: Path) -> None:
    """Draws a panel per metric: a bar per variant, and a dot per seed."""
    from matplotlib.figure import Figure  # without pyplot, matplotlib draws with Agg

    variants = [v for v in study.variants if any(name == v for name, _ in records)]
    number_of_panels = len(study.columns)
    size = (2.2 + 2.6 * number_of_panels, 0.9 + 0.34 * len(variants))
    figure = Figure(figsize=size)
    panels = figure.subplots(1, number_of_panels, sharey=True, squeeze=False)
    for axes, column in zip(panels[0], study.columns):
        for row, variant in enumerate(variants):
            values = list(values_of(study, records, variant, column).values())
            if values:
                axes.barh(row, mean(values), color="#9db8d2", height=0.7)
                axes.plot(values, [row] * len(values), "o", color="#1f4e79", ms=3)
        axes.set_title(column, size=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [study.label(variant).replace("`", "") for variant in variants]
    panels[0][0].set_yticks(range(len(variants)), labels, size=8)
    panels[0][0].invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
