"""Fair timing: warm up, interleave, keep raw values and what they depend on."""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from agents.experiment import provenance, write_text

_END = object()  # of a generator


def interleave(
    first: Callable[[], Iterator[None]], second: Callable[[], Iterator[None]], repeats: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of both per repeat, taking turns part by part after one untimed warm-up.

    Both are generators that yield after each part, a window of training, and have as many parts.
    Turns of a few milliseconds make what else the machine does fall on both alike. Process time
    rather than wall time: both run on one thread, and what other programs take of the processor
    does not count.

    Returns:
        For each repeat the sum over its parts, of the first and of the second.

    Raises:
        ValueError: One has more parts than the other.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        running, seconds = (first(), second()), [0.0, 0.0]
        for part in itertools.count():
            ended = []
            # The order alternates over parts and repeats, so that neither always comes second.
            for index in (0, 1) if (part + repeat) % 2 == 0 else (1, 0):
                began = time.process_time()
                ended.append(next(running[index], _END) is _END)
                seconds[index] += time.process_time() - began
            if any(ended):
                if not all(ended):
                    raise ValueError("first and second must have as many parts")
                break
        if repeat > 0:
            for kept, value in zip(times, seconds, strict=True):
                kept.append(value)
    return times


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write raw values with versions and threads, if a path was given."""
    if path is not None:
        record = {**values, "threads": torch.get_num_threads(), "provenance": provenance()}
        write_text(Path(path), json.dumps(record, indent=2) + "\n")
        print(f"written: {path}")
