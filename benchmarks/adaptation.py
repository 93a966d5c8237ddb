"""How far do controllers answer a hidden factor on the base rate, and is it worth anything?

    python -m benchmarks.adaptation runs/bench-unknown-scale digits-unknown-scale

reads a finished benchmark. For each controller (agent x training seed) it regresses the mean
decadic logarithm of the multipliers of a test instance, over windows and layer groups, on that of
the instance's hidden factor. A slope of -1 undoes the factor, 0 does not answer it. A rank
correlation over all controllers says whether those that answer it more are better.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, trim_mean

from agents.figures import FLOOR
from agents.result_files import read_json, whole
from asg_env.validation import ConfigError

REMEDY = "give a finished benchmark folder"


@dataclass(frozen=True)
class Answer:
    """What one controller does.

    Attributes:
        agent: Its name in the benchmark.
        slope: Decades of the mean multiplier for each decade of the hidden factor.
        accuracy: Interquartile mean over test instances; a diverged training counts as 0.
    """

    agent: str
    slope: float
    accuracy: float


def answer(agent: str, results: Sequence[dict[str, Any]]) -> Answer:
    """Regress a controller's multipliers on the hidden factor.

    Args:
        agent: Its name.
        results: Its episodes on test instances, as a benchmark writes them.
    """
    factors = [np.log10(result["instance"]["base_lr_scale"]) for result in results]
    multipliers = [np.log10(np.maximum(result["multipliers"], FLOOR)).mean() for result in results]
    scores = [0.0 if result["diverged"] else result["accuracy"] for result in results]
    slope, _ = np.polyfit(factors, multipliers, 1)
    return Answer(agent, float(slope), float(trim_mean(scores, 0.25)))


def answers(benchmark: Path, suite: str) -> list[Answer]:
    """Return what every learned controller of a suite does on its own test instances.

    Raises:
        ConfigError: There is none, or a file is damaged.
    """
    found = []
    for path in sorted((benchmark / suite).glob(f"*/seed-*/test-{suite}.json")):
        stored = read_json(path, ("kind", "method", "results"), REMEDY)
        if stored["kind"] == "agent":
            with whole(path, REMEDY):
                found.append(answer(stored["method"], stored["results"]))
    if not found:
        raise ConfigError(f"{benchmark / suite} has no judged controllers; {REMEDY}")
    return found


def table(found: Sequence[Answer]) -> str:
    """A line for each agent, and what the slope has to do with accuracy, as Markdown."""
    lines = ["| agent | controllers | slope, median (lowest to highest) |", "|---|---:|---:|"]
    slopes = {"all": [one.slope for one in found]}
    for one in found:
        slopes.setdefault(one.agent, []).append(one.slope)
    for agent, of_agent in slopes.items():
        lines.append(
            f"| {agent} | {len(of_agent)} | {np.median(of_agent):.2f} "
            f"({min(of_agent):.2f} to {max(of_agent):.2f}) |"
        )
    if len(found) > 2:
        related = spearmanr(slopes["all"], [one.accuracy for one in found])
        lines += [
            "",
            f"Rank correlation of slope and accuracy over {len(found)} controllers: "
            f"{related.statistic:+.2f} (p = {related.pvalue:.2f}).",
        ]
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, read, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", type=Path, help="folder of asg benchmark")
    parser.add_argument("suite", help="that was trained on, with a hidden factor")
    arguments = parser.parse_args()
    try:
        print(table(answers(arguments.benchmark, arguments.suite)))
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
