"""What is said of a benchmark's comparisons, in the terminal, in Markdown and on the page."""

from collections.abc import Iterable, Mapping
from typing import Any

from agents.results import FEW_SEEDS, IN_WORDS, percent

FEW_UNITS = 20  # below this a reader is told that the interval is a rough one


def warnings(comparison: Mapping[str, Any]) -> list[str]:
    """What a reader of a comparison must know of its sample sizes."""
    said = []
    units = min(entry["seeds"] * entry["instances"] for entry in comparison["methods"])
    if units < FEW_UNITS:
        said.append(
            f"n = {units} units (training seeds x instances): below {FEW_UNITS} the interval is a "
            "rough one."
        )
    seeds = [e["seeds"] for e in comparison["methods"] if e["kind"] in ("agent", "search")]
    if seeds and max(seeds) < FEW_SEEDS:
        said.append(f"{max(seeds)} training seed(s) say little about another training.")
    return said


def without_curve(summary: Mapping[str, Any]) -> str:
    """Say which agents have no curve of sample efficiency, and why; empty where all have one."""
    said = [
        f"{agent} on {suite} ({why})"
        for suite, agents in summary.get("without_curve", {}).items()
        for agent, why in agents.items()
    ]
    return f"Without a curve of sample efficiency: {'; '.join(said)}." if said else ""


def kinds_table(comparison: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The methods by kind of instance: headings, and cells by method; empty where it has one kind.

    A cell is the interquartile mean, and the share that diverged if any did.
    """
    entries = [entry for entry in ordered(comparison) if "by_kind" in entry]
    if not entries:
        return [], {}
    first = entries[0]["by_kind"]
    heads = ["method", *(f"{kind} ({found['instances']})" for kind, found in first.items())]

    def cell(found: Mapping[str, float]) -> str:
        lost = f", {percent(found['diverged'])} diverged" if found["diverged"] else ""
        return f"{found['iqm']:.3f}{lost}"

    return heads, {e["method"]: [cell(e["by_kind"][kind]) for kind in first] for e in entries}


def metric_in_words(comparisons: Iterable[Mapping[str, Any]]) -> str:
    """What is scored; older results do not say: accuracy."""
    metrics = dict.fromkeys(one.get("metric", "accuracy") for one in comparisons)
    return " or ".join(IN_WORDS[metric] for metric in metrics) or IN_WORDS["accuracy"]


def figure_prefix(comparison: Mapping[str, Any]) -> str:
    """What the names of a comparison's figures begin with."""
    suite, tested = comparison["suite"], comparison["tested_on"]
    return str(suite) if suite == tested else f"{suite}-to-{tested}"


def title(comparison: Mapping[str, Any]) -> str:
    """What a comparison is called."""
    suite, tested = comparison["suite"], comparison["tested_on"]
    return str(suite) if suite == tested else f"trained on {suite}, tested on {tested}"


def ordered(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its methods, the best first."""
    return sorted(comparison["methods"], key=lambda entry: -entry["iqm"]["value"])


def signed(interval: Mapping[str, float]) -> str:
    """A difference and its interval."""
    return f"{interval['value']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f})"


def verdict(comparison: Mapping[str, Any]) -> str:
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
