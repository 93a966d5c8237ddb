"""What each guidance term adds to an inner step, against the same training without guidance.

    python -m benchmarks.guidance_cost                                       # half a minute
    python -m benchmarks.guidance_cost --task ASG/DigitsImageNet-v0 --repeats 3

All loops take turns window by window on one thread; the figure is the median ratio of the pairs and
its range. KL is computed without guidance too, as it is observed; there only its gradient is new.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch

from agents.experiment import env_settings
from asg_env.build import build_trainer
from asg_env.core.guidance import TERMS
from asg_env.core.trainer import Trainer
from benchmarks.timing import interleave, write_json

MULTIPLIER = 0.01
WEIGHT = 1e-3


def loop(trainer: Trainer, windows: int, steps: int) -> Callable[[], Iterator[None]]:
    """Train window by window."""

    def run() -> Iterator[None]:
        trainer.reset(1, 2)
        for _ in range(windows):
            trainer.run(steps, [MULTIPLIER] * len(trainer.layer_groups))
            yield

    return run


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="ASG/Digits-v0")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["none", *TERMS]
    loops = []
    for name in names:
        trainer = build_trainer(arguments.task, env_settings(arguments.task))
        trainer.guide({} if name == "none" else {name: WEIGHT})
        loops.append(loop(trainer, arguments.windows, 10))
    times = dict(zip(names, interleave(loops, arguments.repeats), strict=True))
    print("| guidance | an inner step, times that of none |")
    print("|---|---|")
    for name in names[1:]:
        ratios = [a / b for a, b in zip(times[name], times["none"], strict=True)]
        print(
            f"| {name} | {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
        )
    write_json(arguments.out, {"task": arguments.task, "seconds": times})


if __name__ == "__main__":
    main()
