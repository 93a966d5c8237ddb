"""The inner trainer: trains one optimizee window by window at given multipliers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asg_env.core.data import DataOrder, Split
from asg_env.core.layer_groups import (
    GroupPatterns,
    build_param_groups,
    effective_lrs,
    set_learning_rates,
    split_parameters,
)
from asg_env.core.objectives import accuracy_counts, kl_to_teacher, objective, task_loss
from asg_env.core.optimizee import Optimizee
from asg_env.core.optimizers import (
    LRFactor,
    MomentumForm,
    OptimizerName,
    build_optimizer,
    lr_factor,
)
from asg_env.core.seeding import torch_generator
from asg_env.core.telemetry import Telemetry, WindowRecorder

EVALUATION_BATCH = 512  # images per forward pass of `evaluate`


@dataclass(frozen=True)
class TrainerSettings:
    """How the optimizee is trained; the same for every instance of an environment."""

    base_lr: float
    total_steps: int
    batch_size: int = 32
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    momentum_form: MomentumForm = "pytorch"
    weight_decay: float = 5e-4
    lr_factor: LRFactor = "constant"


@dataclass(frozen=True)
class Evaluation:
    """Result of one pass over a split.

    Attributes:
        accuracy: Share classified rightly by the new head (`old_task`: by the old head).
        loss: Cross-entropy of that head, mean over images, nats.
        correct: Per image, shape (N,), bool, on the CPU.
    """

    accuracy: float
    loss: float
    correct: Tensor


class Trainer:
    """Trains an optimizee from pretrained weights, as often as asked.

    `reset` copies the pretrained tensors back rather than building anything anew; `run` takes
    K inner steps and synchronises with the host once.
    """

    def __init__(
        self,
        optimizee: Optimizee,
        patterns: GroupPatterns,
        splits: Mapping[str, Split],
        settings: TrainerSettings,
        guidance: Mapping[str, float],
        device: torch.device,
    ) -> None:
        self.settings = settings
        self.guidance = dict(guidance)
        self.layer_groups = tuple(patterns)
        self.optimizee = optimizee.to(device)
        self.splits = {name: split.to(device) for name, split in splits.items()}
        self._device = device
        self.patterns = patterns
        self._pretrained = [tensor.clone() for tensor in optimizee.state_dict().values()]
        self._recorder = WindowRecorder(list(split_parameters(optimizee, patterns).values()))
        self._teacher: dict[str, Tensor] = {}
        self._teacher_log_probs("train")  # while the weights are the teacher's own
        if "old_task" in self.splits:
            self._teacher_log_probs("old_task")
        self.reset(head_seed=0, data_seed=0)

    def reset(self, head_seed: int, data_seed: int, base_lr_scale: float = 1.0) -> None:
        """Go back to inner step 0: pretrained backbone, fresh head, empty optimizer state.

        Args:
            head_seed: Seed of the new head's initial draw.
            data_seed: Seed of the order of training images.
            base_lr_scale: Factor on the base learning rate; > 0.
        """
        with torch.no_grad():
            torch._foreach_copy_(list(self.optimizee.state_dict().values()), self._pretrained)
            self.optimizee.initialise_head(torch_generator(head_seed, "head"))
        self._recorder.start_training()
        self._base_lr = self.settings.base_lr * base_lr_scale
        self._order = DataOrder(
            len(self.splits["train"]), self.settings.batch_size, data_seed, self._device
        )
        self._data_seed = data_seed
        self._optimizer = build_optimizer(
            build_param_groups(self.optimizee, self.patterns, self._base_lr),
            self.settings.optimizer,
            self.settings.momentum,
            self.settings.momentum_form,
            self.settings.weight_decay,
        )
        self.inner_step = 0

    def run(self, steps: int, multipliers: Sequence[float]) -> Telemetry:
        """Take `steps` inner steps with layer group g at base_lr * scale * multipliers[g].

        Raises:
            ValueError: A multiplier is negative or not finite, or their number is wrong.
        """
        if len(multipliers) != len(self.layer_groups):
            raise ValueError(
                f"the number of multipliers must be {len(self.layer_groups)}, one per layer group "
                f"of {', '.join(self.layer_groups)}, got {len(multipliers)}"
            )
        train, teacher = self.splits["train"], self._teacher["train"]
        head_weight = self.optimizee.head_weight()
        self._recorder.start_window()
        self._set_rates(multipliers)
        rates_vary = self.settings.lr_factor != "constant"
        records: list[Tensor] = []
        for _ in range(steps):
            index = self._order.indices(self.inner_step)
            logits, old_logits = self.optimizee(train.batch(index))
            ce = task_loss(logits, train.labels[index])
            kl = kl_to_teacher(teacher[index], old_logits)
            loss = objective(ce, kl, self.guidance)
            self._optimizer.zero_grad()
            loss.backward()
            if rates_vary:
                self._set_rates(multipliers)
            self._optimizer.step()
            std, mean = torch.std_mean(head_weight.detach())
            records += (ce.detach(), kl.detach(), loss.detach(), mean, std)
            self.inner_step += 1
        return self._recorder.report(records)

    @torch.no_grad()
    def initial_report(self, batches: int) -> Telemetry:
        """Report on the first `batches` training batches, no step taken; norms are 0."""
        index = torch.cat([self._order.indices(step) for step in range(batches)])
        train = self.splits["train"]
        logits, old_logits = self.optimizee(train.batch(index))
        ce = task_loss(logits, train.labels[index])
        kl = kl_to_teacher(self._teacher["train"][index], old_logits)
        loss = objective(ce, kl, self.guidance)
        std, mean = torch.std_mean(self.optimizee.head_weight())
        ce_now, kl_now, loss_now, head_mean, head_std = torch.stack(
            (ce, kl, loss, mean, std)
        ).tolist()
        zeros = (0.0,) * len(self.layer_groups)
        return Telemetry(
            ce_now, kl_now, loss_now, head_mean, head_std, zeros, zeros, zeros, False, ""
        )

    @torch.no_grad()
    def evaluate(self, split: str) -> Evaluation:
        """Run the optimizee over a whole split; `old_task` is scored through the old head."""
        data = self.splits[split]
        head = self.optimizee.old_head if split == "old_task" else self.optimizee.head
        scores = self._forward_all(data, head)
        correct = accuracy_counts(scores, data.labels)
        loss = task_loss(scores, data.labels)
        accuracy, mean_loss = torch.stack((correct.float().mean(), loss)).tolist()
        return Evaluation(accuracy, mean_loss, correct.cpu())

    @torch.no_grad()
    def agreement(self, split: str) -> float:
        """Share of images on which the old head predicts what the teacher predicts; no label."""
        old_logits = self._forward_all(self.splits[split], self.optimizee.old_head)
        agreed = accuracy_counts(old_logits, self._teacher_log_probs(split).argmax(dim=1))
        return agreed.float().mean().item()

    def snapshot(self) -> dict[str, Any]:
        """Return everything that the next inner step depends on, as an independent copy."""
        return {
            "optimizee": [t.clone() for t in self.optimizee.state_dict().values()],
            "initial": self._recorder.initial.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "base_lr": self._base_lr,
            "data_seed": self._data_seed,
            "inner_step": self.inner_step,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot; what follows repeats bit for bit."""
        self.reset(head_seed=0, data_seed=snapshot["data_seed"])
        with torch.no_grad():
            torch._foreach_copy_(list(self.optimizee.state_dict().values()), snapshot["optimizee"])
            self._recorder.initial.copy_(snapshot["initial"])
        self._optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self._base_lr = snapshot["base_lr"]
        self.inner_step = snapshot["inner_step"]

    def _set_rates(self, multipliers: Sequence[float]) -> None:
        factor = lr_factor(self.settings.lr_factor, self.inner_step, self.settings.total_steps)
        set_learning_rates(self._optimizer, effective_lrs(self._base_lr, multipliers, factor))

    def _forward_all(self, data: Split, head: nn.Module) -> Tensor:
        """Logits of one head for a whole split, (N, C)."""
        logits = [
            head(self.optimizee.backbone(data.batch(slice(start, start + EVALUATION_BATCH))))
            for start in range(0, len(data), EVALUATION_BATCH)
        ]
        return torch.cat(logits)

    @torch.no_grad()
    def _teacher_log_probs(self, split: str) -> Tensor:
        """Teacher outputs for a split, (N, C_old): computed once, as the images are fixed."""
        if split not in self._teacher:
            now = [t.clone() for t in self.optimizee.state_dict().values()]
            torch._foreach_copy_(list(self.optimizee.state_dict().values()), self._pretrained)
            old_logits = self._forward_all(self.splits[split], self.optimizee.old_head)
            self._teacher[split] = torch.log_softmax(old_logits, dim=1)
            torch._foreach_copy_(list(self.optimizee.state_dict().values()), now)
        return self._teacher[split]
