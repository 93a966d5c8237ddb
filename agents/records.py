"""What result files keep of an episode: plain values that JSON can hold."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluate import Row
from agents.protocol import TestResult
from agents.run_folder import write_text

EPISODES = "episodes.json"  # of a run folder, beside results.json
RIVAL = "static search"  # the baseline whose episodes are kept beside the controller's


def episode_record(result: TestResult) -> dict[str, Any]:
    """Return instance, multipliers over time, losses and figures of a judged episode.

    Figures that are not finite, as losses at divergence, are None.
    """
    episode = result.episode
    return {
        "instance": episode.instance.to_dict(),
        "accuracy": result.score("accuracy"),
        "mean_recall": result.recall,
        "retention": result.retention,
        "diverged": episode.diverged,
        "inner_steps": episode.inner_steps,
        "multipliers": np.round(episode.multipliers, 5).tolist(),
        "progress": np.round(episode.progress, 5).tolist(),
        "ce": _finite(np.round(episode.ce, 4)),
        "outer_valid": _finite(np.round(episode.accuracy, 4)),
    }


def write_episodes(rows: Sequence[Row], layer_groups: Sequence[str], folder: Path) -> None:
    """Write the episodes of the controller and of its rival into a run folder.

    Args:
        rows: Results of the comparison, the controller's first.
        layer_groups: Names, input to head.
        folder: Of the run.
    """
    kept = [row for row in rows if row.name.startswith("controller") or row.name == RIVAL]
    values = {
        "layer_groups": list(layer_groups),
        "rows": [
            {
                "name": row.name,
                "results": [[episode_record(one) for one in seed] for seed in row.results],
            }
            for row in kept
        ],
    }
    write_text(folder / EPISODES, json.dumps(values) + "\n")


def _finite(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
