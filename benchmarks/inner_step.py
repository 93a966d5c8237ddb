"""Inner trainer against a bare PyTorch loop that does the same arithmetic.

    python -m benchmarks.inner_step --out inner_step.json

A and B are interleaved; the figure is the median ratio of the pairs. The bare loop is written
out below: same network, data, loss and optimizer; no telemetry, no divergence check.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from asg_env.build import build_trainer
from asg_env.config import EnvSettings
from asg_env.core.layer_groups import build_param_groups
from asg_env.core.trainer import Trainer
from benchmarks.timing import interleave, write_json

TASK = "ASG/Digits-v0"
MULTIPLIER = 0.03


class BareLoop:
    """Plain PyTorch training of a trainer's network, on batches chosen beforehand."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._start = {k: v.clone() for k, v in trainer.optimizee.state_dict().items()}
        size, batch = len(trainer.splits["train"]), trainer.settings.batch_size
        epochs = -(-trainer.settings.total_steps * batch // size)
        generator = torch.Generator().manual_seed(2)
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])
        self._batches = order[: trainer.settings.total_steps * batch].view(-1, batch)
        model, train = trainer.optimizee, trainer.splits["train"]
        with torch.no_grad():  # the weights are the teacher's own, but for the new head
            features = model.backbone(train.batch(slice(None)))
            self._teacher = F.log_softmax(model.old_head(features), dim=1)

    def run(self, windows: Sequence[int], validate: bool) -> Iterator[None]:
        """Train window by window; with `validate` score outer_valid first and after each."""
        trainer, settings = self._trainer, self._trainer.settings
        model, train = trainer.optimizee, trainer.splits["train"]
        weight, labels = trainer.guidance.weighted["kl"].weight, train.known_labels()
        model.load_state_dict(self._start)
        optimizer = torch.optim.SGD(
            build_param_groups(model, trainer.patterns, settings.base_lr * MULTIPLIER),
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        if validate:
            self._validate()
        yield
        step = 0
        for window in windows:
            for _ in range(window):
                index = self._batches[step]
                images = train.pixels(index).float().sub_(train.mean).div_(train.std)
                features = model.backbone(images)
                ce = F.cross_entropy(model.head(features), labels[index])
                old = F.log_softmax(model.old_head(features), dim=1)
                kl = F.kl_div(old, self._teacher[index], log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                (ce + weight * kl).backward()
                optimizer.step()
                step += 1
            if validate:
                self._validate()
            yield

    @torch.no_grad()
    def _validate(self) -> float:
        model, data = self._trainer.optimizee, self._trainer.splits["outer_valid"]
        logits = model.head(model.backbone(data.batch(slice(None))))
        return float((logits.argmax(dim=1) == data.labels).float().mean())


def our_trainer(trainer: Trainer, windows: Sequence[int]) -> Iterator[None]:
    """Train the same network through `Trainer.run`, window by window."""
    trainer.reset(1, 2)
    yield
    for window in windows:
        trainer.run(window, [MULTIPLIER] * len(trainer.layer_groups))
        yield


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = EnvSettings()
    trainer = build_trainer(TASK, settings)
    windows = settings.windows()
    loop = BareLoop(build_trainer(TASK, settings))  # a network of its own
    ours, bare = interleave(
        (lambda: our_trainer(trainer, windows), lambda: loop.run(windows, validate=False)),
        arguments.repeats,
    )
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(
        f"trainer {statistics.median(ours) / sum(windows) * 1e3:.2f} ms an inner step, bare loop "
        f"{statistics.median(bare) / sum(windows) * 1e3:.2f} ms; ratio {ratio:.3f} (median of "
        f"{arguments.repeats} interleaved pairs)"
    )
    write_json(
        arguments.out,
        {
            "trainer_s": ours,
            "bare_s": bare,
            "ratio": ratio,
            "inner_steps": sum(windows),
            "clock": "process_time",
        },
    )


if __name__ == "__main__":
    main()
