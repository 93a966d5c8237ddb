import pytest

from agents.evaluate import Evaluation
from agents.policy import RandomPolicy
from agents.results import episodes_of_comparison
from agents.run_folder import RunFolder
from agents.train import load_policies, train


class CountingPool:
    """Counts the jobs that it hands on."""

    def __init__(self, pool) -> None:
        self._pool, self.jobs = pool, 0

    def map(self, function, jobs):
        jobs = list(jobs)
        self.jobs += len(jobs)
        return self._pool.map(function, jobs)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"reference": False}},
        {"train": {"search_episodes": 0}},
        {"env": {"instances": "fixed"}},
        {"env": {"reward": "train_loss"}},
    ],
)
def test_the_estimate_counts_the_episodes_that_a_comparison_runs(
    make_experiment, inline_pool, tmp_path, changes
):
    experiment = make_experiment(**changes)
    run = RunFolder.create(tmp_path / "run", experiment, False, False)
    train(run, lambda *_: None)
    inner = inline_pool(experiment.task, experiment.env)
    pool = CountingPool(inner)
    random = RandomPolicy(inner.env.action_space)
    Evaluation(run, pool, groups=5).rows(load_policies(run), random, 2)
    assert pool.jobs == episodes_of_comparison(experiment, 5)
