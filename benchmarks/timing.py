"""Fair timing: warm up, interleave, keep raw values and what they depend on."""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from agents.run_folder import provenance, write_text

_END = object()  # of a generator


def interleave(
    loops: Sequence[Callable[[], Iterator[None]]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> list[list[float]]:
    """Seconds of each loop per repeat, taking turns part by part after one untimed warm-up.

    All are generators that yield after each part, a window of training, and have as many parts.
    Turns of a few milliseconds make what else the machine does fall on all alike. Process time
    by default rather than wall time: on a CPU all run on one thread, and what other programs take
    of the processor does not count.

    Returns:
        For each loop and repeat the sum over its parts.

    Raises:
        ValueError: One has more parts than another.
    """
    times: list[list[float]] = [[] for _ in loops]
    for repeat in range(repeats + 1):
        running, seconds = [loop() for loop in loops], [0.0] * len(loops)
        for part in itertools.count():
            ended = []
            # The order rotates over parts and repeats, so that none always comes last.
            for turn in range(len(loops)):
                index = (turn + part + repeat) % len(loops)
                began = clock()
                ended.append(next(running[index], _END) is _END)
                seconds[index] += clock() - began
            if any(ended):
                if not all(ended):
                    raise ValueError("all loops must have as many parts")
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
