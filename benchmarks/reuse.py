"""What a learned schedule costs beside PyTorch's LambdaLR, and what the live controller costs.

    python -m benchmarks.reuse --out reuse.json

Schedulers are stepped through the same seven parameter groups, in turns; LambdaLR looks its
multipliers up in a list, as short as it can be written. The decision is one step of a
coordinate-wise network of 32 units for seven layer groups in NumPy, with the choice of actions. The
training is that of the digits task, once plain and once with the shipped controller, which decides
every ten inner steps; the loss on held-out images, which the loop computes for it, is left out.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from agents.coordinatewise import CoordinatewiseNetwork
from agents.l2o_controller import L2OController
from agents.numpy_policy import NumpyPolicy, choose
from agents.recurrent_policy import Layout
from asg_env.actions import ACTIONS
from asg_env.core.layer_groups import build_param_groups
from asg_env.observations import Observation
from asg_env.schedule import Interpolation, LearnedSchedule
from asg_env.schedulers import ScheduleLR
from asg_env.tasks import load_task
from benchmarks.timing import interleave, write_json

GROUPS = tuple(f"layer{i}" for i in range(7))
WINDOWS, STEPS = 15, 1500
DECISIONS = 2000
CONTROLLER = Path(__file__).parents[1] / "docs" / "examples" / "controller.safetensors"


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


def training(live: bool) -> Callable[[], Iterator[None]]:
    """A training of the digits network, in parts of one window."""
    task = load_task("ASG/Digits-v0")
    train = task.splits["train"]
    images = train.normalise(train.pixels(torch.arange(32)))
    labels = train.known_labels()[:32]
    weights = copy.deepcopy(task.optimizee.state_dict())

    def loop() -> Iterator[None]:
        task.optimizee.load_state_dict(weights)
        groups = build_param_groups(task.optimizee, task.layer_groups, 0.3)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        steps = 10 * WINDOWS
        controller = None
        if live:
            controller = L2OController(
                optimizer, CONTROLLER, steps, classes=5, inner_valid=lambda: 1.6
            )
            controller.begin(ce=1.6, kl=0.0)
        yield
        for step in range(1, steps + 1):
            loss = torch.nn.functional.cross_entropy(task.optimizee(images)[0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if controller is not None:
                controller.step(ce=loss, kl=0.0)
            if step % 10 == 0:
                yield

    return loop


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
    alone, watched = interleave([training(False), training(True)], arguments.repeats)
    live = [own / base for own, base in zip(watched, alone, strict=True)]
    print(
        f"a training with the live controller: {statistics.median(live):.2f} times the plain one's "
        f"time ({min(live):.2f} to {max(live):.2f})"
    )
    values = {"ratios": ratios, "plain": plain, "decisions": decisions, "live": live}
    write_json(arguments.out, values)


if __name__ == "__main__":
    main()
