"""From judged rows to the numbers of `results.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.evaluate import EVALUATION_SEED, Row, reward_in_words
from agents.experiment import Experiment
from agents.statistics import bootstrap_iqm, score
from asg_env.core.seeding import numpy_generator


def summarise(rows: Sequence[Row], experiment: Experiment) -> dict[str, Any]:
    """Reduce rows to the numbers of `results.json`: IQM, interval, paired differences.

    They are about the experiment's `metric`; `overall_accuracy` and `mean_recall` of each row
    are plain means over seeds and instances.
    """
    labels = experiment.test_labels
    assert labels is not None  # `compare` has refused
    by_class = labels.numpy()
    classes = by_class if experiment.env.metric == "mean_recall" else None
    count = experiment.classes
    primary = rows[0].correct()
    table = []
    for row in rows:
        correct = row.correct()
        scores = score(correct, classes, count)
        estimate = bootstrap_iqm(
            correct,
            numpy_generator(EVALUATION_SEED, "bootstrap", row.name),
            classes=classes,
            count=count,
        )
        retention = [r.retention for rs in row.results for r in rs if r.retention is not None]
        episodes = [r.episode for results in row.results for r in results]
        entry: dict[str, Any] = {
            "name": row.name,
            "setting": row.setting,
            "reference": row.reference,
            "accuracy": estimate.to_dict(),
            "mean": float(scores.mean()),
            "std_over_instances": float(scores.std()),
            "overall_accuracy": float(correct.mean()),
            "mean_recall": float(score(correct, by_class, count).mean()),
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
            difference = bootstrap_iqm(
                primary,
                numpy_generator(EVALUATION_SEED, "difference", row.name),
                minus=correct,
                classes=classes,
                count=count,
            )
            entry["controller_minus_this"] = difference.to_dict()
        table.append(entry)
    return {
        "protocol": {
            "primary": rows[0].name,
            "statistic": "interquartile mean over training seeds x instances",
            "interval": "95 % percentile; resamples seeds, instances, test images; differences "
            "paired by instance",
            "instances": [r.episode.instance.to_dict() for r in rows[0].results[0]],
            "training_seeds": len(rows[0].results),
            "test_images": primary.shape[-1],
            "reward": reward_in_words(experiment),
            "metric": experiment.env.metric,
        },
        "rows": table,
    }
