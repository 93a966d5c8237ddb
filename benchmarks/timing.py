"""Fair timing: warm up, interleave, keep raw values and what they depend on."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agents.experiment import provenance, write_text


def interleave(
    first: Callable[[], None], second: Callable[[], None], repeats: int
) -> tuple[list[float], list[float]]:
    """CPU seconds of both, alternating after one untimed warm-up each.

    Process time rather than wall time: both run on one thread, and what other programs take of
    the processor does not count.
    """
    first()
    second()
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        # The order within a pair alternates, so that neither always comes second.
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            began = time.process_time()
            (first, second)[index]()
            times[index].append(time.process_time() - began)
    return times


def write_json(path: str | None, values: dict[str, Any]) -> None:
    """Write raw values with versions and threads, if a path was given."""
    if path is not None:
        record = {**values, "threads": torch.get_num_threads(), "provenance": provenance()}
        write_text(Path(path), json.dumps(record, indent=2) + "\n")
        print(f"written: {path}")
