"""The comparisons of a benchmark as tables: in the terminal and in Markdown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from agents.benchmark.figures import FIGURES, TRANSFER, figures
from agents.benchmark.wording import (
    kinds_table,
    metric_in_words,
    ordered,
    signed,
    title,
    verdict,
    warnings,
    without_curve,
)
from agents.figures import save_figure
from agents.results import percent
from agents.run_folder import write_text

RESULTS = "results.json"


def results_markdown(summary: Mapping[str, Any]) -> str:
    """The tables of every comparison."""
    parts = []
    for comparison in summary["comparisons"]:
        best, metric = comparison["best"]["agent"], metric_in_words([comparison])
        heads = ["method", f"test {metric} (IQM)", "95 % interval", "mean", "diverged", "n"]
        heads += ["retention", "episodes", "on train instances"]
        heads += [] if best is None else [f"{best} minus this"]
        rows = {entry["method"]: _cells(entry)[: len(heads) - 1] for entry in ordered(comparison)}
        parts += [f"## {title(comparison)}", "", *_table(heads, rows, comparison)]
        parts += ["", verdict(comparison), *warnings(comparison), ""]
        heads, rows = kinds_table(comparison)
        if heads:
            parts += [f"By kind of instance, in brackets how many: test {metric} (IQM).", ""]
            parts += [*_table(heads, rows, comparison), ""]
    missing = without_curve(summary)
    return "\n".join([*parts, missing, ""] if missing else parts)


def _table(
    heads: Sequence[str], rows: Mapping[str, Sequence[str]], comparison: Mapping[str, Any]
) -> list[str]:
    """Lines of a table of methods, learned agents in bold."""
    learned = [e["method"] for e in comparison["methods"] if e["kind"] == "agent"]
    lines = [[f"**{name}**" if name in learned else name, *rows[name]] for name in rows]
    return [
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    iqm, difference = entry["iqm"], entry.get("best_agent_minus_this")
    return [
        f"{iqm['value']:.3f}",
        f"{iqm['low']:.3f} to {iqm['high']:.3f}",
        f"{entry['mean']:.3f}",
        percent(entry["diverged"]),
        f"{entry['seeds']} x {entry['instances']}",
        "–" if entry["retention"] is None else f"{entry['retention']:.3f}",
        f"{entry['cost']['episodes']:.0f}",
        "–" if entry["on_train_instances"] is None else f"{entry['on_train_instances']:.3f}",
        "" if difference is None else signed(difference),
    ]


def terminal_table(summary: Mapping[str, Any]) -> Table:
    """The comparisons for a terminal of 100 columns."""
    table = Table(title=f"{summary['episodes']} episodes each, {summary['seeds']} seed(s)")
    for index, heading in enumerate(("method", "IQM [95 %]", "mean", "div.", "best agent - this")):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for comparison in summary["comparisons"]:
        table.add_section()
        metric = metric_in_words([comparison])
        table.add_row(f"{title(comparison)}, test {metric}", style="italic")
        for entry in ordered(comparison):
            iqm, difference = entry["iqm"], entry.get("best_agent_minus_this")
            table.add_row(
                entry["method"],
                f"{iqm['value']:.3f} [{iqm['low']:.3f} {iqm['high']:.3f}]",
                f"{entry['mean']:.3f}",
                percent(entry["diverged"]),
                "" if difference is None else signed(difference),
                style="bold" if entry["kind"] == "agent" else None,
            )
    return table


def write_results(summary: Mapping[str, Any], out: Path) -> None:
    """Write results.json, results.md and the figures; figures of earlier results are removed."""
    write_text(out / RESULTS, json.dumps(summary, indent=1) + "\n")
    write_text(out / "results.md", results_markdown(summary))
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    drawn = figures(summary)
    for path in folder.glob("*.png"):
        if path.stem == TRANSFER or path.stem.rpartition("-")[2] in FIGURES:
            path.unlink()
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png")
