"""Proxy guidance on and off, at three learning rates: test accuracy and retention.

    python -m benchmarks.guidance --seeds 5      # about 7 minutes on two cores

Uniform rates on `ASG/DigitsImageNet-v0`, 80 inner steps of 16 images. The rates are three
neighbouring levels of the grid and were fixed on outer_valid before any test image was read.
Seeds 1000 and up: neither the environment's train instances nor its test instances. Intervals
are Student's, over seeds; differences are paired by seed.
"""

import argparse

import numpy as np
from scipy import stats

from agents.baselines import uniform
from agents.protocol import TestResult, judge_controller
from agents.rollout import RolloutPool
from asg_env.instances import Instance
from asg_env.task_settings import settings_class
from asg_env.validation import validate
from benchmarks.timing import write_json

TASK = "ASG/DigitsImageNet-v0"
SETTINGS = {"horizon": 8, "inner_steps": 10, "batch_size": 16, "reward": "train_loss"}
GROUPS = 7
LEVELS = (0.3, 0.1, 0.03)  # of the base rate
WEIGHTS = (0.0, 0.1)
FIRST_SEED = 1000


def interval(values: np.ndarray) -> str:
    """Mean and its 95 % interval."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{values.mean():+.3f} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def figures(results: list[TestResult]) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy and retention of each seed."""
    accuracy = np.array([float(result.correct.mean()) for result in results])
    return accuracy, np.array([result.retention for result in results])


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    jobs = [
        (uniform(level, GROUPS), Instance(TASK, head_seed=seed, data_seed=seed + 500))
        for level in LEVELS
        for seed in seeds
    ]
    found: dict[float, list[TestResult]] = {}
    for weight in WEIGHTS:
        settings = validate(settings_class(TASK), {**SETTINGS, "kl_weight": weight}, "env")
        with RolloutPool(TASK, settings, arguments.workers) as pool:
            found[weight] = list(pool.map(judge_controller, jobs))
    print("| rate | accuracy without | accuracy with | difference | retention without | with |")
    print("|---|---:|---:|---:|---:|---:|")
    raw = {}
    for number, level in enumerate(LEVELS):
        part = slice(number * len(seeds), (number + 1) * len(seeds))
        (off, lost), (on, kept) = (figures(found[weight][part]) for weight in WEIGHTS)
        rate = level * settings.base_lr
        print(
            f"| {rate:g} | {interval(off)} | {interval(on)} | {interval(on - off)} | "
            f"{interval(lost)} | {interval(kept)} |"
        )
        raw[f"{rate:g}"] = {"off": off.tolist(), "on": on.tolist()} | {
            "retention_off": lost.tolist(),
            "retention_on": kept.tolist(),
        }
    write_json(arguments.out, {"rates": raw, "seeds": list(seeds), "settings": SETTINGS})


if __name__ == "__main__":
    main()
