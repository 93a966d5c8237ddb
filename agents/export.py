"""From a trained policy to a schedule file."""

import numpy as np

from agents.policy import Policy
from agents.rollout import Episode, RolloutPool, run_policy
from agents.run_folder import RunFolder, versions
from asg_env.core.seeding import derive_seed, numpy_generator
from asg_env.instances import TRAIN_SEEDS, Instance
from asg_env.schedule import LearnedSchedule
from asg_env.validation import ConfigError

EXPORT_SEED = 0
EXPORT_EPISODES = 16


def export_schedule(
    run: RunFolder,
    policy: Policy,
    pool: RolloutPool,
    scale: float = 1.0,
    episodes: int = EXPORT_EPISODES,
    *,
    deterministic: bool,
    training_seed: int = 0,
) -> LearnedSchedule:
    """Roll the policy out on fresh train instances and average its multipliers.

    Rollouts that diverge are left out. Under an unknown scale the average blurs what the
    controller does: there the live controller is the artefact, and this is its behaviour at one
    scale.

    Args:
        run: Where the policy comes from.
        policy: One training seed's policy.
        pool: Worker processes.
        scale: `base_lr_scale` of the rollouts, > 0.
        episodes: Rollouts that are averaged.
        deterministic: Greedy instead of sampled actions.
        training_seed: Which of the run's policies it is, for the record.

    Raises:
        ConfigError: Every rollout diverged, so there is no complete schedule to average.
    """
    experiment = run.experiment
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
            "schedule to average; choose another --scale"
        )
    stacked = np.stack([episode.multipliers for episode in rollouts])  # (n, T, G)
    return LearnedSchedule(
        layer_groups=experiment.layer_groups,
        knots=tuple(rollouts[0].progress[:-1].tolist()),
        multipliers=tuple(map(tuple, stacked.mean(axis=0).tolist())),
        spread=tuple(map(tuple, stacked.std(axis=0).tolist())),
        base_lr=experiment.env.base_lr,
        optimizer=experiment.env.optimizer,
        momentum_form=experiment.env.momentum_form,
        lr_factor=experiment.env.lr_factor,
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
