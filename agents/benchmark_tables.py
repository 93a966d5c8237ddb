"""The comparisons of a benchmark as tables: in the terminal and in Markdown."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from agents.benchmark_results import figures, ordered, signed, title, verdict, warnings
from agents.figures import save_figure
from agents.run_folder import write_text


def results_markdown(summary: dict[str, Any]) -> str:
    """The tables of every comparison."""
    parts = []
    for comparison in summary["comparisons"]:
        best = comparison["best"]
        parts += [f"## {title(comparison)}", ""]
        heads = ["method", "test accuracy (IQM)", "95 % interval", "mean", "diverged", "n"]
        heads += ["retention", "episodes", "on train instances", f"{best['agent']} minus this"]
        parts += ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        parts += ["| " + " | ".join(_cells(entry)) + " |" for entry in ordered(comparison)]
        parts += ["", verdict(comparison), *warnings(comparison, summary["seeds"]), ""]
    return "\n".join(parts)


def _cells(entry: dict[str, Any]) -> list[str]:
    iqm, difference = entry["iqm"], entry.get("best_agent_minus_this")
    learned = entry["kind"] == "agent"
    return [
        f"**{entry['method']}**" if learned else entry["method"],
        f"{iqm['value']:.3f}",
        f"{iqm['low']:.3f} to {iqm['high']:.3f}",
        f"{entry['mean']:.3f}",
        f"{entry['diverged']:.0%}",
        f"{entry['seeds']} x {entry['instances']}",
        "–" if entry["retention"] is None else f"{entry['retention']:.3f}",
        f"{entry['cost']['episodes']:.0f}",
        "–" if entry["on_train_instances"] is None else f"{entry['on_train_instances']:.3f}",
        "" if difference is None else signed(difference),
    ]


def terminal_table(summary: dict[str, Any]) -> Table:
    """The comparisons for a terminal of 100 columns."""
    table = Table(title=f"{summary['episodes']} episodes each, {summary['seeds']} seed(s)")
    for index, heading in enumerate(("method", "IQM [95 %]", "mean", "div.", "best agent - this")):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for comparison in summary["comparisons"]:
        table.add_section()
        table.add_row(title(comparison), style="italic")
        for entry in ordered(comparison):
            iqm, difference = entry["iqm"], entry.get("best_agent_minus_this")
            table.add_row(
                entry["method"],
                f"{iqm['value']:.3f} [{iqm['low']:.3f} {iqm['high']:.3f}]",
                f"{entry['mean']:.3f}",
                f"{entry['diverged']:.0%}",
                "" if difference is None else signed(difference),
                style="bold" if entry["kind"] == "agent" else None,
            )
    return table


def write_results(summary: dict[str, Any], out: Path) -> None:
    """Write results.json, results.md and the figures."""
    write_text(out / "results.json", json.dumps(summary, indent=1) + "\n")
    write_text(out / "results.md", results_markdown(summary))
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures(summary).items():
        save_figure(figure, folder / f"{name}.png")
