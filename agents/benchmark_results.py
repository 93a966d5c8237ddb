"""From the judged trials of a benchmark to its numbers and pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents import benchmark_figures as draw
from agents.benchmark import Benchmark
from agents.benchmark_statistics import (
    Band,
    Interval,
    aggregate_iqm,
    iqm_difference,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
)
from agents.benchmark_table import version_of
from agents.evaluate import EVALUATION_SEED
from agents.results import FEW_SEEDS
from agents.run_folder import read_metrics
from agents.trials import SELECTION
from asg_env.core.seeding import numpy_generator

FEW_UNITS = 20  # below this an interval covers less than its name says
THRESHOLDS = np.linspace(0, 1, 101)  # of performance profiles
GAMMA = 1.0  # of the optimality gap: every image right


def summarise_benchmark(
    results: Sequence[dict[str, Any]], benchmark: Benchmark, root: Path
) -> dict[str, Any]:
    """Reduce a benchmark to the numbers of `results.json`.

    For every suite that was trained on (`comparisons`) and every suite that was judged on: each
    method's interquartile mean over training seeds x test instances with its interval, mean, share
    diverged, optimality gap and cost; the best learned agent and the best baseline, told by train
    instances alone; and their paired difference.

    Raises:
        ConfigError: Results of one suite are of two versions.
    """
    versions = version_of(results)
    comparisons = []
    for suite in benchmark.trained:
        selected = _selected(root, suite)
        for tested in benchmark.suites:
            scores = _scores(results, suite, tested)
            if scores:
                comparisons.append(_comparison(suite, tested, scores, selected, results))
    return {
        "suites": versions,
        "statistic": "interquartile mean over training seeds x test instances",
        "interval": "95 %, stratified bootstrap: resamples seeds, then instances; differences "
        "paired by instance",
        "episodes": benchmark.settings.episodes,
        "seeds": benchmark.settings.seeds,
        "test_instances": benchmark.settings.test_instances,
        "comparisons": comparisons,
        "sample_efficiency": {
            suite: _efficiency(root, suite, benchmark.settings.agents)
            for suite in benchmark.trained
        },
    }


def _scores(results: Sequence[dict[str, Any]], suite: str, tested: str) -> dict[str, np.ndarray]:
    """Accuracy by method, (S, I): those trained on one suite and judged on another."""
    rows: dict[str, list[list[float]]] = {}
    for judged in results:
        if (judged["suite"], judged["tested_on"]) == (suite, tested) and judged["results"]:
            row = [one["accuracy"] for one in judged["results"]]
            rows.setdefault(judged["method"], []).append(row)
    counts = {len(row) for found in rows.values() for row in found}
    if len(counts) > 1:  # an earlier run judged fewer instances: compare on those that all have
        least = min(counts)
        rows = {method: [row[:least] for row in found] for method, found in rows.items()}
    return {method: np.array(found) for method, found in rows.items()}


def _selected(root: Path, suite: str) -> dict[str, float]:
    """Mean outer_valid accuracy of each method on train instances, over its training seeds."""
    found: dict[str, list[float]] = {}
    for path in sorted((root / suite).glob(f"*/seed-*/{SELECTION}")):
        values = json.loads(path.read_text(encoding="utf-8"))["outer_valid"]
        found.setdefault(path.parts[-3], []).append(float(np.mean(values)))
    return {method: float(np.mean(values)) for method, values in found.items()}


def _comparison(
    suite: str,
    tested: str,
    scores: dict[str, np.ndarray],
    selected: dict[str, float],
    results: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    about = {
        judged["method"]: judged
        for judged in results
        if (judged["suite"], judged["tested_on"]) == (suite, tested)
    }
    learned = [method for method in scores if about[method]["kind"] == "agent"]
    rules = [method for method in scores if about[method]["kind"] in ("rule", "search")]
    best = {
        group: max(members, key=lambda method: selected.get(method, 0.0), default=None)
        for group, members in (("agent", learned), ("baseline", rules))
    }

    def stream(*names: str) -> np.random.Generator:
        return numpy_generator(EVALUATION_SEED, "benchmark", suite, tested, *names)

    methods = []
    for method, values in scores.items():
        of_method = [
            judged
            for judged in results
            if (judged["suite"], judged["tested_on"], judged["method"]) == (suite, tested, method)
        ]
        entry: dict[str, Any] = {
            "method": method,
            "kind": about[method]["kind"],
            "settings": sorted({judged["setting"] for judged in of_method}),
            "seeds": len(values),
            "instances": values.shape[1],
            "iqm": aggregate_iqm([values], stream(method)).to_dict(),
            "mean": float(values.mean()),
            "diverged": float(
                np.mean([one["diverged"] for judged in of_method for one in judged["results"]])
            ),
            "retention": _mean([one["retention"] for j in of_method for one in j["results"]]),
            "optimality_gap": optimality_gap([values], stream(method, "gap"), GAMMA).to_dict(),
            "profile": performance_profile(
                [values], THRESHOLDS, stream(method, "profile")
            ).to_dict(),
            "on_train_instances": selected.get(method),
            "cost": {
                key: float(np.mean([judged["cost"].get(key, 0) for judged in of_method]))
                for key in ("episodes", "inner_steps", "validation_images")
            },
        }
        first = best["agent"]
        if first is not None and method != first:
            pair = ([scores[first]], [values])
            entry["best_agent_minus_this"] = iqm_difference(
                *pair, stream(method, "difference")
            ).to_dict()
            entry["chance_that_best_agent_is_better"] = probability_of_improvement(
                *pair, stream(method, "improvement")
            ).to_dict()
        methods.append(entry)
    return {"suite": suite, "tested_on": tested, "best": best, "methods": methods}


def _efficiency(root: Path, suite: str, agents: Any) -> dict[str, dict[str, list[float]]]:
    """Training accuracy on outer_valid against inner steps, by agent, over training seeds."""
    curves = {}
    for agent in agents:
        lines = [read_metrics(folder) for folder in sorted((root / suite / agent).glob("seed-*"))]
        lines = [found for found in lines if found]
        if lines:
            budgets = [np.cumsum([line["inner_steps"] for line in found]) for found in lines]
            reached = [np.array([line["accuracy"] for line in found]) for found in lines]
            stream = numpy_generator(EVALUATION_SEED, "efficiency", suite, agent)
            curves[agent] = sample_efficiency(budgets, reached, stream).to_dict()
    return curves


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def warnings(comparison: dict[str, Any], seeds: int) -> list[str]:
    """What a reader of a comparison must know of its sample sizes."""
    said = []
    units = min(entry["seeds"] * entry["instances"] for entry in comparison["methods"])
    if units < FEW_UNITS:
        said.append(
            f"n = {units} units (training seeds x instances): below {FEW_UNITS} an interval covers "
            "less than its name says."
        )
    if seeds < FEW_SEEDS:
        said.append(f"{seeds} training seed(s) say little about another training.")
    return said


def title(comparison: dict[str, Any]) -> str:
    """What a comparison is called."""
    suite, tested = comparison["suite"], comparison["tested_on"]
    return suite if suite == tested else f"trained on {suite}, tested on {tested}"


def ordered(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Its methods, the best first."""
    return sorted(comparison["methods"], key=lambda entry: -entry["iqm"]["value"])


def signed(interval: dict[str, float]) -> str:
    """A difference and its interval."""
    return f"{interval['value']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def verdict(comparison: dict[str, Any]) -> str:
    """The one sentence that a comparison is made for."""
    best = comparison["best"]
    if best["agent"] is None or best["baseline"] is None:
        return "There are not both learned agents and tuned baselines to compare."
    rival = next(e for e in comparison["methods"] if e["method"] == best["baseline"])
    difference = rival["best_agent_minus_this"]
    if difference["low"] > 0:
        found = "is above"
    elif difference["high"] < 0:
        found = "is below"
    else:
        found = "cannot be told from"
    return (
        f"By train instances {best['agent']} is the best learned agent and {best['baseline']} the "
        f"best baseline; on test instances the agent {found} the baseline: {signed(difference)}."
    )


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """Every figure of a benchmark by file name, drawn."""
    drawn: dict[str, Any] = {}
    for comparison in summary["comparisons"]:
        methods = {entry["method"]: entry for entry in ordered(comparison)}
        learned = [name for name, entry in methods.items() if entry["kind"] == "agent"]
        where = comparison["suite"]
        if comparison["tested_on"] != where:
            where += f"-to-{comparison['tested_on']}"
        drawn[f"{where}-iqm"] = draw.draw_aggregates(_intervals(methods, "iqm"), learned)
        drawn[f"{where}-gap"] = draw.draw_optimality_gaps(
            _intervals(methods, "optimality_gap"), learned
        )
        chances = _intervals(methods, "chance_that_best_agent_is_better")
        if chances:
            best = comparison["best"]["agent"]
            drawn[f"{where}-improvement"] = draw.draw_improvement(chances, best, learned)
        shown = [*learned, *[name for name in methods if name not in learned][:3]]
        bands = {name: _band(methods[name]["profile"]) for name in shown}
        drawn[f"{where}-profiles"] = draw.draw_profiles(bands, learned)
    for suite, curves in summary["sample_efficiency"].items():
        if curves:
            bands = {name: _band(curve) for name, curve in curves.items()}
            drawn[f"{suite}-efficiency"] = draw.draw_sample_efficiency(
                bands, list(bands), "outer_valid accuracy\nof training episodes"
            )
    matrix = _transfer(summary)
    if matrix is not None:
        drawn["transfer"] = draw.draw_transfer(*matrix)
    return drawn


def _intervals(methods: dict[str, dict[str, Any]], figure: str) -> dict[str, Interval]:
    return {name: Interval(**entry[figure]) for name, entry in methods.items() if figure in entry}


def _band(values: dict[str, list[float]]) -> Band:
    return Band(**{key: np.array(part) for key, part in values.items()})


def _transfer(summary: dict[str, Any]) -> tuple[np.ndarray, list[str], list[str]] | None:
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
