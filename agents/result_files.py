"""Reading what runs and benchmarks wrote; what cannot be used gives one sentence."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agents.run_folder import read_metrics
from asg_env.validation import ConfigError


@contextmanager
def whole(path: Path, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with values of a damaged file into a sentence.

    Args:
        path: The file.
        remedy: What the reader can do.

    Raises:
        ConfigError: A value is missing, or of another kind than it must be.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged or of another version; {remedy}") from error


def read_json(path: Path, keys: Sequence[str], remedy: str) -> dict[str, Any]:
    """Read a JSON mapping that has these keys.

    Raises:
        ConfigError: It is none.
    """
    with whole(path, remedy):
        values: dict[str, Any] = dict(**json.loads(path.read_text(encoding="utf-8")))
        for key in keys:
            values[key]
    return values


def read_training(folder: Path, remedy: str) -> list[dict[str, float]]:
    """Read the metrics of a training seed.

    Raises:
        ConfigError: They are damaged.
    """
    with whole(folder / "metrics.jsonl", remedy):
        lines = read_metrics(folder)
        for line in lines:
            line["episodes"], line["return"], line["accuracy"], line["entropy"]
    return lines
