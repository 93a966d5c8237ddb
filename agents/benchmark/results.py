"""From the judged trials of a benchmark to its numbers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.benchmark.plan import Benchmark
from agents.benchmark.statistics import (
    aggregate_iqm,
    iqm_difference,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    sample_efficiency,
)
from agents.benchmark.table import SELECTION, version_of
from agents.protocol import EVALUATION_SEED
from agents.result_files import read_json
from agents.run_folder import read_metrics
from agents.statistics import interquartile_mean
from asg_env.core.seeding import numpy_generator
from asg_env.instances import Instance, kind_of

THRESHOLDS = np.linspace(0, 1, 101)  # of performance profiles
GAMMA = 1.0  # of the optimality gap: every image right

Judged = dict[str, Any]  # what a trial wrote of one suite
Places = Mapping[str, Sequence[int]]  # of test instances, by their kind


def summarise_benchmark(
    results: Sequence[Judged], benchmark: Benchmark, root: Path
) -> dict[str, Any]:
    """Reduce a benchmark to the numbers of `results.json`.

    For every suite that was trained on (`comparisons`) and every suite that was judged on: each
    method's interquartile mean over training seeds x test instances with its interval, mean, share
    diverged, optimality gap and cost; the best learned agent and the best baseline, told by train
    instances alone; and their paired difference.

    Suites and methods are those of the results, which several benchmark files may have added to.

    Args:
        results: What every trial wrote.
        benchmark: The present file: its suites and methods come first.
        root: Folder of the benchmark.

    Raises:
        ConfigError: Results of one suite are of two versions, or a file is damaged.
    """
    settings = benchmark.settings
    trained = _distinct(benchmark.trained, [judged["suite"] for judged in results])
    tested = _distinct(benchmark.suites, [judged["tested_on"] for judged in results])
    comparisons, curves, without = [], {}, {}
    for suite in trained:
        selected = _selected(root, suite)
        for other in tested:
            methods = _by_method(results, suite, other, [*settings.agents, *settings.baselines])
            if methods:
                comparisons.append(_comparison(suite, other, methods, selected))
        there = [j["method"] for j in results if (j["suite"], j["kind"]) == (suite, "agent")]
        listed = settings.agents if suite in benchmark.trained else ()
        curves[suite], without[suite] = _efficiency(root, suite, _distinct(listed, there))
    return {
        "suites": version_of(results),
        "statistic": "interquartile mean over training seeds x test instances",
        "interval": "95 %, stratified bootstrap: resamples seeds, then instances, as many of each "
        "kind as there are where kinds are set apart; differences paired by instance",
        "episodes": settings.episodes,
        "seeds": max([settings.seeds, *(e["seeds"] for c in comparisons for e in c["methods"])]),
        "test_instances": settings.test_instances,
        "comparisons": comparisons,
        "sample_efficiency": curves,
        "without_curve": without,
    }


def _distinct(first: Iterable[str], others: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *others]))


def _by_method(
    results: Sequence[Judged], suite: str, tested: str, first: Sequence[str]
) -> dict[str, list[Judged]]:
    """Results of those trained on one suite and judged on another, by method."""
    found: dict[str, list[Judged]] = {}
    for judged in results:
        if (judged["suite"], judged["tested_on"]) == (suite, tested) and judged["results"]:
            found.setdefault(judged["method"], []).append(judged)
    return {method: found[method] for method in _distinct(first, found) if method in found}


def _selected(root: Path, suite: str) -> dict[str, float]:
    """Mean outer_valid score of each method on train instances, over its training seeds."""
    found: dict[str, list[float]] = {}
    for path in sorted((root / suite).glob(f"*/seed-*/{SELECTION}")):
        values = read_json(path, ("outer_valid",), "delete it, and go on with --resume")
        found.setdefault(path.parts[-3], []).append(float(np.mean(values["outer_valid"])))
    return {method: float(np.mean(values)) for method, values in found.items()}


def _comparison(
    suite: str,
    tested: str,
    methods: Mapping[str, Sequence[Judged]],
    selected: Mapping[str, float],
) -> dict[str, Any]:
    every = [judged for rows in methods.values() for judged in rows]
    # All are of one version of the suite, so of one metric, which older files do not name.
    metric = next((judged["metric"] for judged in every if "metric" in judged), "accuracy")
    kinds = _places(every[0]["results"])
    strata = _strata(kinds, len(every[0]["results"]))
    kind_by_method = {method: rows[0]["kind"] for method, rows in methods.items()}

    def best(*groups: str) -> str | None:
        members = [method for method, kind in kind_by_method.items() if kind in groups]
        return max(members, key=lambda method: selected.get(method, 0.0), default=None)

    first = best("agent")
    scores = {method: _scores(rows, metric) for method, rows in methods.items()}

    def stream(*names: str) -> np.random.Generator:
        return numpy_generator(EVALUATION_SEED, "benchmark", suite, tested, *names)

    entries = []
    for method, values in scores.items():
        rows = methods[method]
        units = [one for judged in rows for one in judged["results"]]
        diverged = np.array([bool(one["diverged"]) for one in units]).reshape(values.shape)
        entry: dict[str, Any] = {
            "method": method,
            "kind": kind_by_method[method],
            "settings": sorted({judged["setting"] for judged in rows}),
            "seeds": len(values),
            "instances": values.shape[1],
            "iqm": aggregate_iqm(values, stream(method), strata).to_dict(),
            "mean": float(values.mean()),
            "diverged": float(diverged.mean()),
            "retention": _mean([one["retention"] for one in units]),
            "optimality_gap": optimality_gap(
                values, stream(method, "gap"), GAMMA, strata
            ).to_dict(),
            "profile": performance_profile(
                values, THRESHOLDS, stream(method, "profile"), strata
            ).to_dict(),
            "on_train_instances": selected.get(method),
            "cost": {
                key: float(np.mean([judged["cost"].get(key, 0) for judged in rows]))
                for key in ("episodes", "inner_steps", "validation_images")
            },
        }
        if kinds:
            entry["by_kind"] = _by_kind(values, diverged, kinds)
        if first is not None and method != first:
            pair = (scores[first], values)
            entry["best_agent_minus_this"] = iqm_difference(
                *pair, stream(method, "difference"), strata
            ).to_dict()
            entry["chance_that_best_agent_is_better"] = probability_of_improvement(
                *pair, stream(method, "improvement"), strata
            ).to_dict()
        entries.append(entry)
    return {
        "suite": suite,
        "tested_on": tested,
        "metric": metric,
        "best": {"agent": first, "baseline": best("rule", "search")},
        "methods": entries,
    }


def _scores(rows: Sequence[Judged], metric: str) -> np.ndarray:
    """Score of each training seed on each instance, (S, I)."""
    return np.array(
        [[0.0 if one["diverged"] else one[metric] for one in judged["results"]] for judged in rows]
    )


def _places(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Where the test instances of each kind stand; empty where all are of one kind.

    An instance of several settings of its own, as in `mixed`, is of a kind by each of them, one
    of none is plain.
    """
    found: dict[str, list[int]] = {}
    for place, one in enumerate(records):
        try:
            kinds = kind_of(Instance.from_dict(one["instance"])) or "plain"
        except (KeyError, ValueError):  # of a version whose instances had other settings
            return {}
        for kind in kinds.split(", "):
            found.setdefault(kind, []).append(place)
    return {kind: found[kind] for kind in sorted(found) if len(found[kind]) < len(records)}


def _strata(kinds: Places, count: int) -> list[int] | None:
    """Kind of each test instance as a number; None where one may be of several kinds, or all alike.

    `mixed` varies everything at once: nearly every instance would be a kind for itself.
    """
    if not kinds or sum(map(len, kinds.values())) != count:
        return None
    of = {place: number for number, places in enumerate(kinds.values()) for place in places}
    return [of[place] for place in range(count)]


def _by_kind(values: np.ndarray, diverged: np.ndarray, kinds: Places) -> dict[str, Any]:
    """Figures of each kind of instance alone: one that fails can hide in the IQM of all."""
    return {
        kind: {
            "iqm": float(interquartile_mean(values[:, places].reshape(-1))),
            "mean": float(values[:, places].mean()),
            "diverged": float(diverged[:, places].mean()),
            "instances": len(places),
        }
        for kind, places in kinds.items()
    }


def _efficiency(
    root: Path, suite: str, agents: Sequence[str]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Training score on outer_valid against inner steps, over the finished training seeds.

    Returns:
        The curves by agent, and for each agent without one why it has none.
    """
    curves, without = {}, {}
    for agent in agents:
        finished = sorted((root / suite / agent).glob(f"seed-*/{SELECTION}"))
        budgets, reached = [], []
        for path in finished:
            lines = read_metrics(path.parent)
            steps = np.cumsum([line["inner_steps"] for line in lines])
            scores = np.array([line["accuracy"] for line in lines], dtype=float)
            measured = ~np.isnan(scores)  # SB3 may end an update before any episode ends
            if measured.any():
                budgets.append(steps[measured])
                reached.append(scores[measured])
        if not budgets:
            without[agent] = "nothing was measured" if finished else "no training is finished"
            continue
        stream = numpy_generator(EVALUATION_SEED, "efficiency", suite, agent)
        try:
            curves[agent] = sample_efficiency(budgets, reached, stream).to_dict()
        except ValueError as error:  # seeds with no span in common
            without[agent] = str(error)
    return curves, without


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
