"""Random search over settings of SB3's agents, on train instances alone.

    python -m benchmarks.tune_sb3 --kind ppo sac --out tuning.csv
    python -m benchmarks.tune_sb3 --out tuning.csv       # all nine; hours on two cores

Every candidate trains one seed on `ASG/Digits-v0`, hidden scale unknown, observation `normalised`.
Its score is the mean outer_valid accuracy that its greedy policy reaches on train instances drawn
for the purpose; a diverged episode counts as 0. The first candidate of each agent is its defaults.
Each candidate's seed and draws follow from --seed, the agent and its number, so that a longer
search begins with a shorter one. A result is a line of the CSV as soon as those before it are
done; the best of each agent is printed at the end. The test split is never read.
"""

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.experiment import AGENTS, Experiment
from agents.rollout import WorkerPool, run_policy
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.env import LayerwiseLREnv
from asg_env.instances import draw_instance
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
ENV = {"instances": "unknown-scale", "observation": "normalised"}
KINDS = tuple(kind for kind, (module, _) in AGENTS.items() if module == "agents.sb3.learner")
FULL_EPISODES = 960  # of the trainings that the best settings are for
COLUMNS = ("kind", "candidate", "score", "deviation", "diverged", "episodes", "seconds", "settings")

Draw = Callable[[np.random.Generator], Any]


def log_uniform(low: float, high: float) -> Draw:
    """Draw between two positive numbers, even on a log scale, with two digits."""
    return lambda draw: float(f"{np.exp(draw.uniform(np.log(low), np.log(high))):.1e}")


def one_of(*values: Any) -> Draw:
    """Draw one of these."""
    return lambda draw: values[int(draw.integers(len(values)))]


COMMON: dict[str, Draw] = {"normalise_observations": one_of(False, True)}
NETWORK: dict[str, Draw] = {
    **COMMON,
    "hidden_size": one_of(32, 64, 128),
    "normalise_rewards": one_of(False, True),
    "discount": one_of(0.9, 0.97, 1.0),
}
ON_POLICY: dict[str, Draw] = {**NETWORK, "gae_lambda": one_of(0.8, 0.95, 1.0)}
CLIPPED: dict[str, Draw] = {
    **ON_POLICY,
    "policy_lr": log_uniform(3e-4, 1e-2),
    "entropy": log_uniform(1e-4, 1e-2),
    "passes": one_of(4, 10),
    "minibatch_size": one_of(60, 120, 240),
    "episodes_per_update": one_of(16, 32),
}
OFF_POLICY: dict[str, Draw] = {
    **NETWORK,
    "policy_lr": log_uniform(3e-4, 5e-3),
    "learning_starts": one_of(150, 300, 600),
    "gradient_steps": one_of(4, 8, 16),
}
ENTROPY: dict[str, Draw] = {**OFF_POLICY, "temperature": log_uniform(1e-3, 0.1)}
POLYAK: dict[str, Draw] = {"polyak": one_of(0.005, 0.02)}
SPACES: dict[str, dict[str, Draw]] = {
    "ppo": CLIPPED,
    "recurrent-ppo": {**CLIPPED, "lstm_size": one_of(32, 64)},
    "a2c": {
        **ON_POLICY,
        "policy_lr": log_uniform(3e-4, 1e-2),
        "entropy": log_uniform(1e-4, 1e-2),
        "rollout_steps": one_of(5, 15, 30),
        "normalise_advantages": one_of(False, True),
    },
    "trpo": {
        **ON_POLICY,
        "policy_lr": log_uniform(3e-4, 1e-2),
        "max_kl": log_uniform(3e-3, 0.1),
        "episodes_per_update": one_of(16, 32),
    },
    "sac": {**ENTROPY, **POLYAK},
    "td3": {
        **OFF_POLICY,
        **POLYAK,
        "policy_delay": one_of(2, 4, 8),
        "action_noise": one_of(0.1, 0.2, 0.4),
    },
    "tqc": {**ENTROPY, **POLYAK, "quantiles_dropped": one_of(0, 2, 5)},
    "crossq": {**ENTROPY, "policy_delay": one_of(1, 3)},
    "ars": {
        **COMMON,
        "hidden_size": one_of(0, 16),
        "policy_lr": log_uniform(0.02, 0.5),
        "noise": log_uniform(0.03, 0.5),
        "episodes_per_candidate": one_of(2, 4),
        "episodes_per_update": one_of(32, 64),
    },
}


def candidate(kind: str, number: int, episodes: int, seed: int) -> Experiment:
    """Return the experiment of a candidate; number 0 is the defaults.

    Args:
        kind: Of the agent.
        number: Of the candidate.
        episodes: Training episodes; what remains of the last update is left out.
        seed: Of the search.

    Raises:
        ConfigError: The episodes are too few for one update, or to begin to learn.
    """
    draw = numpy_generator(seed, "tune-sb3", kind, number)
    values = {name: drawn(draw) for name, drawn in SPACES[kind].items()} if number else {}
    action = "box" if kind not in ("ppo", "a2c", "recurrent-ppo", "trpo") else "relative"

    def build(updates: int) -> Experiment:
        return Experiment(
            {
                "env": {"id": TASK, "action": action, **ENV},
                "agent": {"kind": kind, **values, "updates": updates},
                "seed": derive_seed(seed, "tune-sb3", kind, number, "training"),
            }
        )

    updates = episodes // build(1).agent.episodes_per_update
    if updates < 1:
        raise ConfigError(f"--episodes must be enough for one update, got {episodes}; raise it")
    return build(updates)


def judge(env: None, values: dict[str, Any], instances: int, seed: int) -> dict[str, Any]:
    """Train a candidate in this process and judge it; runs in a worker.

    Args:
        env: Nothing: the learner builds its own environments.
        values: Of the experiment.
        instances: Train instances that it is judged on, the same for all candidates.
        seed: Of the search.
    """
    experiment, began = Experiment(values), time.perf_counter()
    learner = experiment.agent_module.Learner(
        experiment.task, experiment.env, experiment.agent, experiment.seed, 0
    )
    episodes = 0
    for _, metrics in learner.train(0):
        episodes = metrics["episodes"]
    judged_on = LayerwiseLREnv(experiment.task, experiment.env)
    draw = numpy_generator(seed, "tune-sb3", "instances")
    drawn = [
        draw_instance(experiment.task, experiment.env.instances, draw) for _ in range(instances)
    ]
    played = [run_policy(judged_on, learner.policy, instance, 0, True) for instance in drawn]
    accuracies = np.array([0.0 if e.diverged else e.accuracy[-1] for e in played])
    return {
        "score": round(float(accuracies.mean()), 4),
        "deviation": round(float(accuracies.std()), 4),
        "diverged": round(float(np.mean([e.diverged for e in played])), 3),
        "episodes": int(episodes),
        "seconds": round(time.perf_counter() - began, 1),
    }


def nothing() -> None:
    """Build what a worker keeps between jobs."""


def search(
    kinds: Sequence[str],
    candidates: int,
    episodes: int,
    instances: int,
    seed: int,
    workers: int,
    path: Path,
) -> dict[str, dict[str, Any]]:
    """Write the CSV; return the best row of each agent."""
    named = [(kind, number) for kind in kinds for number in range(candidates)]
    experiments = [candidate(*name, episodes, seed) for name in named]
    for experiment in experiments:
        experiment.agent.check(experiment.env)
    jobs = [(experiment.to_dict(), instances, seed) for experiment in experiments]
    best: dict[str, dict[str, Any]] = {}
    with (
        path.open("w", newline="", encoding="utf-8") as file,
        WorkerPool(workers, nothing, ()) as pool,
    ):
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        results = pool.map(judge, jobs)
        for (kind, number), experiment, result in zip(named, experiments, results, strict=True):
            settings = experiment.agent.model_dump(exclude_none=True)
            row = {"kind": kind, "candidate": number, **result, "settings": json.dumps(settings)}
            table.writerow(row)
            file.flush()
            print(f"{kind} {number}: {result['score']:.3f}", flush=True)
            if kind not in best or row["score"] > best[kind]["score"]:
                best[kind] = row
    return best


def main() -> None:
    """Search, and print the best of each agent as YAML for configs/agent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--episodes", type=int, default=480)
    parser.add_argument("--instances", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; choose another --out")
    try:
        best = search(
            arguments.kind,
            arguments.candidates,
            arguments.episodes,
            arguments.instances,
            arguments.seed,
            arguments.workers,
            arguments.out,
        )
    except ConfigError as error:
        parser.error(str(error))
    for kind, row in best.items():
        print(f"\n# {kind}, candidate {row['candidate']}: {row['score']} ± {row['deviation']}")
        settings = json.loads(row["settings"])
        settings["updates"] = FULL_EPISODES // settings["episodes_per_update"]
        print("\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items()))


if __name__ == "__main__":
    main()
