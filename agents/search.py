"""The strongest hand-free static baseline: a seeded search for one multiplier vector."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agents.baselines import Controller, Static
from agents.rollout import Episode, RolloutPool, run_controller
from asg_env.actions import GRIDS, GridName
from asg_env.core.seeding import numpy_generator
from asg_env.env import LayerwiseLREnv
from asg_env.instances import SCALE_RANGE, Instance, InstanceSet, draw_instance
from asg_env.validation import ConfigError

KEPT = 3  # of so many candidates one goes on to the next rung
FIRST_RUNG = 4  # train instances per candidate in the first rung
RUNGS = 4  # at most; 4, 12, 36 and 108 instances
LAST_RUNG = FIRST_RUNG * KEPT ** (RUNGS - 1)


@dataclass(frozen=True)
class SearchResult:
    """The vector found and what it cost.

    Attributes:
        vector: Multipliers, (G,).
        accuracy: Its mean outer_valid accuracy on the train instances of the last rung.
        episodes: Training runs spent.
        inner_steps: Inner steps spent.
        validation_images: Validation images evaluated.
    """

    vector: tuple[float, ...]
    accuracy: float
    episodes: int
    inner_steps: int
    validation_images: int

    @property
    def setting(self) -> str:
        """The vector for people."""
        return "(" + ", ".join(f"{m:g}" for m in self.vector) + ")"


def run_to_score(env: LayerwiseLREnv, controller: Controller, instance: Instance) -> Episode:
    """Run a controller; its last accuracy is read even where the reward reads no real label.

    Where no labelled real images are held out for it, the return of the episode stands in:
    candidates are then chosen by what the controller is trained on.
    """
    episode = run_controller(env, controller, instance)
    if len(episode.accuracy):
        return episode
    outer_valid = env.trainer.splits.get("outer_valid")
    if outer_valid is None or outer_valid.labels is None:
        return replace(episode, accuracy=episode.rewards.sum(keepdims=True))
    accuracy, images = 0.0, 0
    if not episode.diverged:
        accuracy = env.trainer.evaluate("outer_valid").score(env.settings.metric)
        images = len(outer_valid)
    return replace(
        episode,
        accuracy=np.array([accuracy]),
        validation_images=episode.validation_images + images,
    )


class Scorer:
    """Mean outer_valid accuracy of controllers on a growing list of train instances.

    Episodes already run are remembered, so going from 4 to 12 instances costs 8.
    """

    def __init__(self, pool: RolloutPool, instances: Sequence[Instance]) -> None:
        self._pool, self._instances = pool, instances
        self._scores: dict[str, list[float]] = {}
        self.episodes = self.inner_steps = self.validation_images = 0

    def score(self, candidates: dict[str, Controller], instances: int) -> dict[str, float]:
        """Return each candidate's mean over the first `instances` train instances."""
        jobs, owners = [], []
        for name, controller in candidates.items():
            done = len(self._scores.setdefault(name, []))
            for instance in self._instances[done:instances]:
                jobs.append((controller, instance))
                owners.append(name)
        for name, episode in zip(owners, self._pool.map(run_to_score, jobs), strict=True):
            self._scores[name].append(float(episode.accuracy[-1]))
            self.episodes += 1
            self.inner_steps += episode.inner_steps
            self.validation_images += episode.validation_images
        return {name: float(np.mean(self._scores[name][:instances])) for name in candidates}


def train_instances(task: str, instances: InstanceSet, seed: int, count: int) -> list[Instance]:
    """The train instances on which baselines are searched and tuned."""
    generator = numpy_generator(seed, "search-instances")
    return [draw_instance(task, instances, generator) for _ in range(count)]


def tuning_instances(task: str, instances: InstanceSet, seed: int, count: int) -> list[Instance]:
    """Return train instances whose hidden scales are spread evenly.

    The scales stand in the middle of `count` equal parts of the log range: a few random ones could
    all be small, and the rates chosen on them would diverge elsewhere.
    """
    drawn = train_instances(task, instances, seed, count)
    if instances == "fixed":
        return drawn
    low, high = np.log(SCALE_RANGE)
    scales = np.exp(low + (high - low) * (np.arange(count) + 0.5) / count).tolist()
    return [replace(i, base_lr_scale=s) for i, s in zip(drawn, scales, strict=True)]


def tune(
    pool: RolloutPool, candidates: dict[str, Controller], listed: Sequence[Instance]
) -> tuple[str, Scorer]:
    """Return the name of the best candidate on train instances, and what counted the cost."""
    scorer = Scorer(pool, listed)
    scores = scorer.score(candidates, len(listed))
    return max(scores, key=lambda name: scores[name]), scorer


def search(
    pool: RolloutPool,
    task: str,
    instances: InstanceSet,
    grid: GridName,
    groups: int,
    budget: int,
    seed: int,
) -> SearchResult:
    """Search on train instances that follow from the seed; see `search_static`."""
    scorer = Scorer(pool, train_instances(task, instances, seed, LAST_RUNG))
    return search_static(scorer, grid, groups, budget, seed)


def search_static(
    scorer: Scorer,
    grid: GridName,
    groups: int,
    budget: int,
    seed: int,
) -> SearchResult:
    """Successive halving over random vectors of grid levels.

    Args:
        scorer: Runs and remembers the episodes.
        grid: Levels the vectors are made of.
        groups: G.
        budget: Training runs that the whole search may cost.
        seed: Of the random vectors.

    Returns:
        The best vector, and what the search cost.

    Raises:
        ConfigError: The budget is below the cost of one candidate.
    """
    count, rungs = candidates_within(budget)
    generator = numpy_generator(seed, "static-search")
    levels = GRIDS[grid]
    vectors = generator.integers(len(levels), size=(count, groups))
    candidates: dict[str, Controller] = {}
    for row in vectors.tolist():
        vector = tuple(levels[i] for i in row)
        candidates[str(vector)] = Static(vector)
    best, accuracy = successive_halving(scorer, candidates, rungs)
    winner = candidates[best]
    assert isinstance(winner, Static)
    return SearchResult(
        winner.vector, accuracy, scorer.episodes, scorer.inner_steps, scorer.validation_images
    )


def candidates_within(budget: int) -> tuple[int, int]:
    """Candidates, and rungs, that successive halving has room for.

    Of n candidates the first rung costs n * FIRST_RUNG episodes and each later one two thirds of
    that, so n follows from the budget. A small budget has room for fewer rungs: the last one has
    KEPT candidates or so.

    Raises:
        ConfigError: The budget is below the cost of one candidate.
    """
    if budget < FIRST_RUNG:
        raise ConfigError(
            f"the episodes of a search must be >= {FIRST_RUNG}, got {budget}; raise them"
        )
    count = 0
    for rungs in range(RUNGS, 0, -1):
        count = int(budget / (FIRST_RUNG * (1 + (rungs - 1) * (1 - 1 / KEPT))))
        if count >= KEPT**rungs:
            return count, rungs
    return count, 1


def successive_halving(
    scorer: Scorer,
    candidates: dict[str, Controller],
    rungs: int,
) -> tuple[str, float]:
    """Triple the train instances from rung to rung, and keep a third of the candidates.

    Args:
        scorer: Runs and remembers the episodes.
        candidates: At least one, by name.
        rungs: The first scores every candidate on FIRST_RUNG train instances.

    Returns:
        The best candidate, and its mean score on the train instances of the last rung.
    """
    alive, scores = candidates, dict.fromkeys(candidates, 0.0)
    for rung in range(rungs):
        scores = scorer.score(alive, FIRST_RUNG * KEPT**rung)
        ranked = sorted(alive, key=lambda name: -scores[name])
        keep = ranked if rung == rungs - 1 else ranked[: max(1, len(ranked) // KEPT)]
        alive = {name: alive[name] for name in keep}
    best = next(iter(alive))
    return best, scores[best]
