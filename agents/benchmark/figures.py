"""Which figures a benchmark has; agents.benchmark.drawing draws each."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.benchmark import drawing as draw
from agents.benchmark.statistics import Band, Interval
from agents.benchmark.wording import figure_prefix, metric_in_words, ordered

# Ends of the figures' names, and the one that stands for all suites.
FIGURES, TRANSFER = ("iqm", "gap", "improvement", "profiles", "efficiency"), "transfer"


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of a benchmark by file name, drawn."""
    drawn: dict[str, Any] = {}
    comparisons = summary["comparisons"]
    for comparison in comparisons:
        methods = {entry["method"]: entry for entry in ordered(comparison)}
        learned = [name for name, entry in methods.items() if entry["kind"] == "agent"]
        where, metric = figure_prefix(comparison), metric_in_words([comparison])
        drawn[f"{where}-iqm"] = draw.draw_aggregates(
            _intervals(methods, "iqm"), learned, f"interquartile mean of test {metric}"
        )
        drawn[f"{where}-gap"] = draw.draw_optimality_gaps(
            _intervals(methods, "optimality_gap"), learned
        )
        chances = _intervals(methods, "chance_that_best_agent_is_better")
        if chances:
            best = comparison["best"]["agent"]
            drawn[f"{where}-improvement"] = draw.draw_improvement(chances, best, learned)
        shown = [*learned, *[name for name in methods if name not in learned][:3]]
        bands = {name: _band(methods[name]["profile"]) for name in shown}
        drawn[f"{where}-profiles"] = draw.draw_profiles(bands, learned, metric)
    for suite, curves in summary["sample_efficiency"].items():
        if curves:
            bands = {name: _band(curve) for name, curve in curves.items()}
            metric = metric_in_words(c for c in comparisons if c["tested_on"] == suite)
            drawn[f"{suite}-efficiency"] = draw.draw_sample_efficiency(
                bands, list(bands), f"outer_valid {metric}\nof training episodes"
            )
    matrix = _transfer(summary)
    if matrix is not None:
        drawn[TRANSFER] = draw.draw_transfer(*matrix, metric_in_words(comparisons))
    return drawn


def _intervals(methods: Mapping[str, Mapping[str, Any]], figure: str) -> dict[str, Interval]:
    return {name: Interval(**entry[figure]) for name, entry in methods.items() if figure in entry}


def _band(values: Mapping[str, Sequence[float]]) -> Band:
    return Band(**{key: np.array(part) for key, part in values.items()})


def _transfer(summary: Mapping[str, Any]) -> tuple[np.ndarray, list[str], list[str]] | None:
    """IQM of each agent (trained on a suite) on every suite; None where there is only one."""
    tested = list(dict.fromkeys(c["tested_on"] for c in summary["comparisons"]))
    rows: dict[str, dict[str, float]] = {}
    for comparison in summary["comparisons"]:
        for entry in comparison["methods"]:
            if entry["kind"] == "agent":
                row = rows.setdefault(f"{entry['method']} on {comparison['suite']}", {})
                row[comparison["tested_on"]] = entry["iqm"]["value"]
    if len(tested) < 2 or not rows:
        return None
    values = np.array([[row.get(name, np.nan) for name in tested] for row in rows.values()])
    return values, list(rows), tested
