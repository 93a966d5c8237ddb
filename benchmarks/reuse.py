"""What a learned schedule costs beside PyTorch's LambdaLR, and a decision of the live controller.

    python -m benchmarks.reuse --out reuse.json

Schedulers are stepped through the same seven parameter groups, in turns; LambdaLR looks its
multipliers up in a list, as short as it can be written. The decision is one step of a
coordinate-wise network of 32 units for seven layer groups in NumPy, with the choice of actions.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from agents.coordinatewise import CoordinatewiseNetwork
from agents.numpy_policy import NumpyPolicy, choose
from agents.recurrent_policy import Layout
from asg_env.actions import ACTIONS
from asg_env.observations import Observation
from asg_env.schedule import Interpolation, LearnedSchedule
from asg_env.schedulers import ScheduleLR
from benchmarks.timing import interleave, write_json

GROUPS = tuple(f"layer{i}" for i in range(7))
WINDOWS, STEPS = 15, 1500
DECISIONS = 2000


def learned(interpolation: Interpolation) -> LearnedSchedule:
    """A schedule of fifteen windows and seven groups."""
    rows = np.random.default_rng(0).random((WINDOWS, len(GROUPS)))
    return LearnedSchedule(
        layer_groups={name: rf"{i}\." for i, name in enumerate(GROUPS)},
        interpolation=interpolation,
        knots=tuple(i / WINDOWS for i in range(WINDOWS)),
        multipliers=tuple(map(tuple, rows.tolist())),
        spread=tuple(map(tuple, np.zeros_like(rows).tolist())),
        base_lr=0.1,
        optimizer="sgd",
        momentum_form="pytorch",
        lr_factor="constant",
        episodes=1,
        task="none",
        instances="none",
        base_lr_scale=1.0,
        inner_steps=STEPS,
        settings={},
    )


def stepping(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> Callable[[], Iterator[None]]:
    """A loop of scheduler steps alone, in parts of one window."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in GROUPS))
    groups = learned("step").param_groups(model)

    def loop() -> Iterator[None]:
        optimizer = torch.optim.SGD([{**group} for group in groups])
        scheduler = make(optimizer)
        optimizer.step()
        yield
        for _ in range(WINDOWS):
            for _ in range(STEPS // WINDOWS):
                scheduler.step()
            yield

    return loop


def lambda_lr(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The same multipliers, each in a list with an entry for every step."""
    schedule = learned("step")
    columns = zip(*(schedule.at(step / STEPS) for step in range(STEPS)), strict=True)
    return LambdaLR(optimizer, [[*column, column[-1]].__getitem__ for column in columns])


def seconds_of_decisions() -> list[float]:
    """Seconds of each of many decisions for seven groups."""
    observation = Observation("normalised", GROUPS, "log")
    layout = Layout.of(observation.labels, GROUPS, ACTIONS["relative"]("log", len(GROUPS)))
    network = CoordinatewiseNetwork(layout, 32, torch.Generator().manual_seed(0))
    policy = NumpyPolicy(
        {name: tensor.numpy() for name, tensor in network.state_dict().items()},
        {
            "kind": network.kind,
            "shared": layout.shared,
            "per_group": layout.per_group,
            "memoryless": False,
        },
    )
    generator = np.random.default_rng(0)
    seen = generator.random((DECISIONS, layout.width)).astype(np.float32)
    state, times = None, []
    for row in seen:
        began = time.perf_counter()
        odds, state = policy.step(row, state)
        choose(odds, generator)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", help="JSON file for the raw values")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names: tuple[Interpolation, ...] = ("step", "linear", "log-linear")
    loops = [stepping(lambda_lr)]
    for schedule in map(learned, names):
        loops.append(stepping(partial(ScheduleLR, schedule=schedule, total_steps=STEPS)))
    plain, *ours = interleave(loops, arguments.repeats)
    ratios = {}
    for name, times in zip(names, ours, strict=True):
        ratios[name] = [own / base for own, base in zip(times, plain, strict=True)]
        low, high = min(ratios[name]), max(ratios[name])
        print(
            f"interpolation {name}: {statistics.median(ratios[name]):.2f} times LambdaLR's time a "
            f"step (median of {arguments.repeats} pairs, {low:.2f} to {high:.2f}); LambdaLR "
            f"{1e6 * statistics.median(plain) / STEPS:.1f} us"
        )
    decisions = seconds_of_decisions()
    print(
        f"a decision for {len(GROUPS)} layer groups in NumPy: "
        f"{1e6 * statistics.median(decisions):.0f} us (median of {DECISIONS})"
    )
    write_json(arguments.out, {"ratios": ratios, "plain": plain, "decisions": decisions})


if __name__ == "__main__":
    main()
