"""What is written of the measurements: tables, the page docs/speed.md and its plot."""

import re
import statistics
from collections.abc import Collection, Iterable
from pathlib import Path

from benchmarks.paired import Row
from common.errors import InputError
from common.files import atomic_path

HEADINGS = {
    "training": "Training step",
    "inference": "Prediction",
    "memory": "Peak memory of a training",
    "classes": "More classes",
    "data": "Data, an image",
    "evaluation": "Evaluation",
    "startup": "Start-up",
    "attention": "Deformable attention",
}
MODES = {"": "", "eager": "float32", "compiled": "float32, compiled", "bf16": "bfloat16"}
COLOURS = {"": "#888888", "eager": "#4878a8", "compiled": "#6aa84f", "bf16": "#d98b3a"}


def digits(value: float) -> str:
    """Returns a number with three digits that count."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def markdown_row(cells: Iterable[object]) -> str:
    """Returns a line of a markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown_table(headings: Collection[str], lines: Iterable[str]) -> str:
    """Returns a markdown table. lines: of `markdown_row`"""
    return "\n".join([markdown_row(headings), "|---" * len(headings) + "|", *lines])


def cell(row: Row, name: str) -> str:
    """Returns the name, the median and the range of one side."""
    values = row.values.get(name)
    title = "" if name == row.what else f"{name}: "
    if not values:
        return title.removesuffix(": ")
    text = f"{title}{digits(statistics.median(values))} {row.unit}"
    if len(values) > 1:
        text += f" ({digits(min(values))} to {digits(max(values))})"
    return text


def table(rows: list[Row]) -> str:
    """Returns a markdown table of rows."""
    headings = ["what", "mode", "ours", "peer", "ratio", "of CPU time", "at least", "holds"]
    lines = []
    for row in rows:
        ratio, cpu = row.ratio(), row.ratio("cpu")
        cells = [
            row.what,
            MODES[row.mode],
            cell(row, row.ours),
            cell(row, row.peer),
            f"**{ratio:.2f}**" if ratio else "",
            f"{cpu:.2f}" if cpu else "",
            f"{row.goal:.2g}" if row.goal else "",
            {True: "yes", False: "no", None: ""}[row.holds],
        ]
        if row.note:
            cells[0] += f"; {row.note}"
        lines.append(markdown_row(cells))
    return markdown_table(headings, lines)


def described(machine: dict) -> str:
    """Returns a sentence about a machine and its versions."""
    flags = ", ".join(machine["CPU flags"]) or "no bfloat16"
    versions = ", ".join(f"{package} {v}" for package, v in machine["versions"].items())
    cpu = f"{machine['CPU']}: {flags}"
    if machine["device"] != machine["CPU"]:
        cpu = f"{machine['device']}, {cpu}"
    return f"{cpu}; {machine['threads']} threads; {versions}."


def summary(record: dict) -> str:
    """Returns all tables of a record, with the machines and the load of each section."""
    machines, parts = {}, []
    for name, section in in_order(record):
        before, after = section["load"]
        revision = section["machine"]["revision"]
        told = (
            f"Revision {revision}, at most {section['rounds']} rounds, {section['seconds']:.0f} "
            f"seconds; load average {before} before and {after} after."
        )
        machines.setdefault(described(section["machine"]), []).append(HEADINGS[name])
        rows = [Row.of(row) for row in section["rows"]]
        parts += [f"### {HEADINGS[name]}", told, table(rows)]
    if len(machines) > 1:
        machines = [f"{', '.join(names)}: {told}" for told, names in machines.items()]
    held = [row.holds for row in all_rows(record)]
    goals = f"{held.count(True)} of {len(held) - held.count(None)} goals hold."
    return "\n\n".join([*machines, goals, *parts])


def in_order(record: dict) -> list[tuple[str, dict]]:
    """Returns (name, section) of a record in the order of HEADINGS."""
    sections = record["sections"]
    return [(name, sections[name]) for name in HEADINGS if name in sections]


def all_rows(record: dict) -> list[Row]:
    """Returns the rows of all sections."""
    return [Row.of(row) for _, section in in_order(record) for row in section["rows"]]


def write_between(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers <!-- name --> and <!-- /name --> of a page.

    Raises InputError if the page does not have both, once.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text()
    if [whole.count(start), whole.count(end)] != [1, 1] or whole.index(start) > whole.index(end):
        raise InputError(f"{page}: write the lines {start} and {end} once, where the table belongs")
    pattern = f"{re.escape(start)}.*{re.escape(end)}"
    changed = re.sub(pattern, lambda _: f"{start}\n{text}\n{end}", whole, flags=re.DOTALL)
    with atomic_path(page) as temporary:
        temporary.write_text(changed)


def plot(record: dict, path: Path) -> None:
    """Draws the ratios as bars, grouped by section, with a line at 1 and a mark at each goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    height, labels, ticks = 0.0, [], []
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.2 * len(all_rows(record))))
    for name, section in in_order(record):
        axes.text(1.02, height, HEADINGS[name], weight="bold", size=9, va="center")
        height += 1
        for row in (Row.of(row) for row in section["rows"]):
            if not (ratio := row.ratio()):
                continue
            axes.barh(height, ratio - 1, left=1, color=COLOURS[row.mode], height=0.75)
            if row.goal:
                axes.plot([row.goal] * 2, [height - 0.45, height + 0.45], color="black", lw=1.2)
            labels.append(f"{row.what}: {ratio:.2f}")
            ticks.append(height)
            height += 1
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xscale("log")
    shown = [0.5, 1, 2, 4, 10, 40]
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.minorticks_off()
    axes.set_yticks(ticks, labels, size=7)
    axes.set_ylim(height, -1)
    axes.set_xlabel("times as good as the peer (time or memory); black marks are goals")
    modes = {row.mode for row in all_rows(record)}
    handles = [
        Patch(color=COLOURS[mode], label=MODES[mode]) for mode in MODES if mode and mode in modes
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
