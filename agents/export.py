"""From a trained policy to a schedule."""

import numpy as np

from agents.policy import Policy
from agents.protocol import reads_real_labels
from agents.rollout import Episode, RolloutPool, run_policy
from agents.run_folder import RunFolder, versions
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.instances import TRAIN_SEEDS, Instance
from asg_env.schedule import LearnedSchedule, Selection
from asg_env.validation import ConfigError

EXPORT_SEED = 0
EXPORT_EPISODES = 16
FLOOR = 1e-3  # multipliers at or below, 0 included, are alike where their logarithms are compared


def export_schedule(
    run: RunFolder,
    policy: Policy,
    pool: RolloutPool,
    scale: float = 1.0,
    episodes: int = EXPORT_EPISODES,
    selection: Selection = "mean",
    *,
    deterministic: bool,
    training_seed: int = 0,
) -> LearnedSchedule:
    """Roll the policy out on fresh train instances; take the mean of its multipliers, or one.

    Rollouts that diverge are left out. Under an unknown scale the average blurs what the
    controller does: there the live controller is the artefact, and this is its behaviour at one
    scale.

    Args:
        run: Where the policy comes from.
        policy: One training seed's policy.
        pool: Worker processes.
        scale: `base_lr_scale` of the rollouts, > 0.
        episodes: Rollouts that are averaged, or of which one is taken.
        selection: `mean`; `median`, the rollout nearest to the median of all; `best`, the one
            that ended with the best accuracy on outer_valid.
        deterministic: Greedy instead of sampled actions.
        training_seed: Which of the run's policies it is, for the record.

    Raises:
        ConfigError: Every rollout diverged, so there is no complete schedule; or the best is
            asked for, and the run reads no real label.
    """
    experiment = run.experiment
    if selection == "best" and not reads_real_labels(experiment):
        raise ConfigError(
            "--select best needs a run whose reward reads real labels, which outer_valid is scored "
            "by; use mean or median"
        )
    generator = numpy_generator(EXPORT_SEED, "export-instances")
    instances = []
    for _ in range(episodes):
        head_seed, data_seed = generator.integers(*TRAIN_SEEDS, size=2).tolist()
        instances.append(Instance(experiment.task, head_seed, data_seed, scale))
    jobs = [
        (policy, instance, derive_seed(EXPORT_SEED, "export", index), deterministic)
        for index, instance in enumerate(instances)
    ]
    rollouts: list[Episode] = [e for e in pool.map(run_policy, jobs) if not e.diverged]
    if not rollouts:
        raise ConfigError(
            f"all {episodes} rollouts at scale {scale} diverged, so there is no "
            "schedule to take from them; choose another --scale"
        )
    stacked = np.stack([episode.multipliers for episode in rollouts])  # (n, T, G)
    # From the first on: where all are equal the mean is that value to the last bit, the spread 0.
    beyond = stacked - stacked[0]
    mean = stacked[0] + beyond.mean(axis=0)
    chosen = mean if selection == "mean" else stacked[_chosen(rollouts, stacked, selection)]
    return LearnedSchedule(
        layer_groups=experiment.layer_groups,
        knots=tuple(rollouts[0].progress[:-1].tolist()),
        multipliers=tuple(map(tuple, chosen.tolist())),
        spread=tuple(map(tuple, beyond.std(axis=0).tolist())),
        base_lr=experiment.env.base_lr * scale,
        optimizer=experiment.env.optimizer,
        momentum_form=experiment.env.momentum_form,
        lr_factor=experiment.env.lr_factor,
        selection=selection,
        episodes=len(rollouts),
        task=experiment.task,
        instances=experiment.env.instances,
        base_lr_scale=scale,
        inner_steps=rollouts[0].inner_steps,
        settings=experiment.env.model_dump(mode="json", exclude_none=True),
        provenance={
            "config_digest": experiment.digest(),
            "training_seed": str(training_seed),
            "actions": "greedy" if deterministic else "sampled",
            **versions(),
        },
    )


def _chosen(rollouts: list[Episode], stacked: np.ndarray, selection: Selection) -> int:
    """Which of all rollouts is taken, the first of equals; their multipliers are (n, T, G)."""
    if selection == "best":
        return int(np.argmax([episode.accuracy[-1] for episode in rollouts]))
    logs = np.log(np.maximum(stacked, FLOOR))
    distances = np.abs(logs - np.median(logs, axis=0)).sum(axis=(1, 2))
    return int(distances.argmin())
