"""From judged rows to the numbers of `results.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.evaluate import Row
from agents.experiment import Experiment
from agents.protocol import EVALUATION_SEED, reward_in_words
from agents.statistics import Estimate, bootstrap_iqm, bootstrap_values
from asg_env.core.seeding import numpy_generator
from asg_env.instances import VARIED


def summarise(rows: Sequence[Row], experiment: Experiment) -> dict[str, Any]:
    """Reduce rows to the numbers of `results.json`: IQM, interval, paired differences.

    They are about the experiment's `metric`; `overall_accuracy` and `mean_recall` of each row
    are plain means over seeds and instances.
    """
    metric = experiment.env.metric
    table = []
    for row in rows:
        scores = row.scores(metric)
        estimate = _estimate(row, None, experiment, ("bootstrap", row.name))
        retention = [r.retention for rs in row.results for r in rs if r.retention is not None]
        episodes = [r.episode for results in row.results for r in results]
        entry: dict[str, Any] = {
            "name": row.name,
            "setting": row.setting,
            "reference": row.reference,
            "accuracy": estimate.to_dict(),
            "mean": float(scores.mean()),
            "std_over_instances": float(scores.std()),
            "overall_accuracy": float(row.scores("accuracy").mean()),
            "mean_recall": float(row.scores("mean_recall").mean()),
            "retention": float(np.mean(retention)) if retention else None,
            "diverged": float(np.mean([e.diverged for e in episodes])),
            "cost": {
                "episodes": row.tuning_episodes,
                "inner_steps": row.tuning_inner_steps,
                "validation_images": row.tuning_images,
            },
            "per_instance": scores.round(6).tolist(),
        }
        if row is not rows[0]:
            difference = _estimate(rows[0], row, experiment, ("difference", row.name))
            entry["controller_minus_this"] = difference.to_dict()
        table.append(entry)
    same_images = not varies_images(experiment)
    return {
        "protocol": {
            "primary": rows[0].name,
            "statistic": "interquartile mean over training seeds x instances",
            "interval": f"95 %; resamples seeds, instances{', test images' * same_images}; "
            "differences paired by instance",
            "instances": [r.episode.instance.to_dict() for r in rows[0].results[0]],
            "training_seeds": len(rows[0].results),
            "test_images": max(len(r.correct) for r in rows[0].results[0]),
            "reward": reward_in_words(experiment),
            "metric": experiment.env.metric,
        },
        "rows": table,
    }


def varies_images(experiment: Experiment) -> bool:
    """Whether instances of the set have test images of their own.

    They are then a part of the instance: a resample of instances draws them too.
    """
    return bool({"classes", "target"} & set(VARIED[experiment.env.instances]))


def _estimate(
    row: Row, minus: Row | None, experiment: Experiment, names: tuple[str, str]
) -> Estimate:
    """IQM and interval of a row's figure, or of its paired difference to another row's."""
    metric, generator = experiment.env.metric, numpy_generator(EVALUATION_SEED, *names)
    if varies_images(experiment):
        other = None if minus is None else minus.scores(metric)
        estimate = bootstrap_values(row.scores(metric), generator, other, (0.0, 1.0))
        assert estimate is not None  # no figure is missing
        return estimate
    labels = experiment.test_labels
    assert labels is not None  # `compare` has refused
    return bootstrap_iqm(
        row.correct(),
        generator,
        minus=None if minus is None else minus.correct(),
        classes=labels.numpy() if metric == "mean_recall" else None,
        count=experiment.classes,
    )
