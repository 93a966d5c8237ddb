import numpy as np
import pytest

from agents import search
from agents.baselines import Static
from agents.rollout import run_controller
from agents.search import (
    FIRST_RUNG,
    KEPT,
    RUNGS,
    Scorer,
    run_to_score,
    search_static,
    train_instances,
)
from asg_env.actions import GRIDS
from asg_env.instances import TRAIN_SEEDS, published_test_instances
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
IDEAL = (0.0, 0.03, 0.1, 0.3, 1.0)


class FakePool:
    """Scores a static vector by its distance from the ideal, plus noise of the instance."""

    def __init__(self, make_episode, noise: float = 0.0) -> None:
        self._make, self._noise, self.jobs = make_episode, noise, []

    def map(self, function, jobs):
        for controller, instance in jobs:
            self.jobs.append((controller, instance))
            levels = GRIDS["log"]
            away = sum(
                abs(levels.index(m) - levels.index(i))
                for m, i in zip(controller.vector, IDEAL, strict=True)
            )
            noise = self._noise * np.random.default_rng(instance.head_seed).normal()
            accuracy = 1 - away / 30 + noise
            yield self._make([0.0], accuracy=[0.0, accuracy])


@pytest.fixture
def make_scorer(make_episode):
    def make(noise: float = 0.0) -> Scorer:
        return Scorer(FakePool(make_episode, noise), train_instances(TASK, "fixed", 0, 108))

    return make


@pytest.mark.parametrize("budget", [4, 7, 11, 20, 40, 100, 350, 600, 1920])
def test_search_spends_its_budget_and_no_more(make_scorer, budget):
    scorer = make_scorer()
    result = search_static(scorer, "log", 5, budget, seed=0)
    assert result.episodes == scorer.episodes <= budget
    # A rung keeps whole candidates, so up to a candidate's cost per rung may be left over.
    assert budget - result.episodes <= sum(FIRST_RUNG * KEPT**rung for rung in range(RUNGS))
    if budget >= 100:
        assert result.episodes >= 0.75 * budget


def test_search_charges_all_that_it_spends(make_scorer):
    scorer = make_scorer()
    result = search_static(scorer, "log", 5, 40, seed=0)
    assert result.episodes == len(scorer._pool.jobs)
    assert result.inner_steps == 2 * result.episodes
    assert result.validation_images == 100 * result.episodes


@pytest.mark.parametrize("budget", [20, 100, 600])
def test_search_is_deterministic(make_scorer, budget):
    first = search_static(make_scorer(0.1), "log", 5, budget, seed=3)
    assert first == search_static(make_scorer(0.1), "log", 5, budget, seed=3)
    assert first != search_static(make_scorer(0.1), "log", 5, budget, seed=4)


@pytest.mark.parametrize("budget", [11, 40, 600])
def test_search_finds_the_best_vector_that_it_drew(make_scorer, budget):
    scorer = make_scorer()
    result = search_static(scorer, "log", 5, budget, seed=1)
    drawn = {controller.vector for controller, _ in scorer._pool.jobs}
    scores = {name: np.mean(values) for name, values in scorer._scores.items()}
    assert result.vector in drawn
    assert result.accuracy == pytest.approx(max(scores.values()))
    assert scores[str(result.vector)] == pytest.approx(max(scores.values()))


def test_search_finds_a_better_vector_with_a_larger_budget(make_scorer):
    accuracies = [
        search_static(make_scorer(), "log", 5, budget, seed=0).accuracy for budget in (4, 100, 4000)
    ]
    assert accuracies[0] < accuracies[1] < accuracies[2]
    assert accuracies[2] > 0.9


def test_search_gives_later_rungs_more_instances(make_scorer):
    scorer = make_scorer(0.1)
    search_static(scorer, "log", 5, 1920, seed=0)
    runs = np.bincount([len(values) for values in scorer._scores.values()])
    lengths = np.flatnonzero(runs)
    assert lengths.tolist() == [4, 12, 36, 108]
    assert runs[4] > runs[12] > runs[36] >= 1


def test_search_accuracy_is_the_mean_over_the_last_rungs_instances(make_scorer):
    scorer = make_scorer(0.1)
    result = search_static(scorer, "log", 5, 1920, seed=0)
    assert result.accuracy == pytest.approx(np.mean(scorer._scores[str(result.vector)]))
    assert len(scorer._scores[str(result.vector)]) == 108


def test_search_draws_levels_of_the_grid_it_is_given(make_episode, make_scorer):
    scorer = make_scorer()
    search_static(scorer, "log", 5, 100, seed=0)
    drawn = {m for controller, _ in scorer._pool.jobs for m in controller.vector}
    assert drawn == set(GRIDS["log"])


@pytest.mark.parametrize("budget", [1, 3])
def test_search_refuses_a_budget_below_one_candidate(make_scorer, budget):
    with pytest.raises(ConfigError, match=f"must be >= 4, got {budget}; raise them"):
        search_static(make_scorer(), "log", 5, budget, seed=0)


def test_scorer_remembers_episodes_it_has_run(make_episode):
    pool = FakePool(make_episode)
    scorer = Scorer(pool, train_instances(TASK, "fixed", 0, 12))
    candidates = {"a": Static(IDEAL), "b": Static((1.0,) * 5)}
    first = scorer.score(candidates, 4)
    assert len(pool.jobs) == scorer.episodes == 8
    assert scorer.score({"a": candidates["a"]}, 12) == {"a": pytest.approx(first["a"])}
    assert len(pool.jobs) == scorer.episodes == 16
    scorer.score(candidates, 4)
    assert len(pool.jobs) == 16


def test_scorer_scores_every_candidate_on_the_same_instances(make_episode):
    pool = FakePool(make_episode)
    instances = train_instances(TASK, "unknown-scale", 0, 3)
    Scorer(pool, instances).score({"a": Static(IDEAL), "b": Static((1.0,) * 5)}, 3)
    for vector in (IDEAL, (1.0,) * 5):
        assert [i for c, i in pool.jobs if c.vector == vector] == instances


def test_scorer_means_final_outer_valid_accuracy_of_real_episodes(inline_pool, make_settings, env):
    instances = train_instances(TASK, "fixed", 0, 2)
    scorer = Scorer(inline_pool(TASK, make_settings()), instances)
    score = scorer.score({"a": Static((0.1,) * 5)}, 2)["a"]
    finals = [run_controller(env, Static((0.1,) * 5), i).accuracy[-1] for i in instances]
    assert score == pytest.approx(np.mean(finals))
    assert (scorer.episodes, scorer.inner_steps, scorer.validation_images) == (2, 12, 400)


def test_scorer_reads_outer_valid_once_when_the_reward_does_not(inline_pool, make_settings, env):
    instances = train_instances(TASK, "fixed", 0, 2)
    scorer = Scorer(inline_pool(TASK, make_settings(reward="train_loss")), instances)
    score = scorer.score({"a": Static((0.1,) * 5)}, 2)["a"]
    finals = [run_controller(env, Static((0.1,) * 5), i).accuracy[-1] for i in instances]
    assert score == pytest.approx(np.mean(finals))
    assert scorer.validation_images == 2 * 50


def test_scorer_counts_a_diverged_run_as_zero(inline_pool, make_settings):
    for reward in ("gain", "train_loss"):
        settings = make_settings(base_lr=1e25, reward=reward)
        scorer = Scorer(inline_pool(TASK, settings), train_instances(TASK, "fixed", 0, 1))
        assert scorer.score({"a": Static((1.0,) * 5)}, 1) == {"a": 0.0}


def test_run_to_score_takes_the_return_where_no_real_images_are_held_out(
    make_env, instance, monkeypatch
):
    env = make_env(reward="train_loss")
    with_images = run_to_score(env, Static((0.1,) * 5), instance)
    monkeypatch.delitem(env.trainer.splits, "outer_valid")

    episode = run_to_score(env, Static((0.1,) * 5), instance)

    np.testing.assert_array_equal(episode.rewards, with_images.rewards)
    assert episode.accuracy.tolist() == [pytest.approx(episode.rewards.sum())]
    assert episode.accuracy[-1] != with_images.accuracy[-1]
    assert (episode.validation_images, with_images.validation_images) == (0, 50)


def test_scorer_ranks_by_the_return_where_no_real_images_are_held_out(
    inline_pool, make_settings, monkeypatch
):
    settings = make_settings(reward="train_loss")
    pool = inline_pool(TASK, settings)
    monkeypatch.delitem(pool.env.trainer.splits, "outer_valid")
    instances = train_instances(TASK, "fixed", 0, 2)
    candidates = {"still": Static((0.0,) * 5), "moving": Static((0.1,) * 5)}
    scorer = Scorer(pool, instances)

    scores = scorer.score(candidates, 2)

    returns = {
        name: np.mean([run_controller(pool.env, c, i).rewards.sum() for i in instances])
        for name, c in candidates.items()
    }
    assert scores == pytest.approx(returns)
    assert scores["moving"] > scores["still"]
    assert scorer.validation_images == 0


def test_run_to_score_reads_the_metric_of_the_environment(make_env, instance):
    scores = {}
    for metric in ("accuracy", "mean_recall"):
        env = make_env(metric=metric, reward="train_loss", outer_valid_size=52)
        scores[metric] = run_to_score(env, Static((0.1,) * 5), instance).accuracy[-1]
        result = env.trainer.evaluate("outer_valid")
        assert scores[metric] == pytest.approx(result.score(metric))
    assert scores["accuracy"] != scores["mean_recall"]


def test_train_instances_are_repeatable_and_no_test_instances():
    listed = train_instances(TASK, "unknown-scale", 5, 20)
    assert listed == train_instances(TASK, "unknown-scale", 5, 20)
    assert listed[:10] == train_instances(TASK, "unknown-scale", 5, 10)
    assert listed != train_instances(TASK, "unknown-scale", 6, 20)
    published = {i.head_seed for i in published_test_instances(TASK, "unknown-scale")}
    assert all(TRAIN_SEEDS[0] <= i.head_seed < TRAIN_SEEDS[1] for i in listed)
    assert not published & {i.head_seed for i in listed}


def test_rungs_fit_the_train_instances_that_the_evaluation_draws():
    assert search.FIRST_RUNG * search.KEPT ** (search.RUNGS - 1) == 108
