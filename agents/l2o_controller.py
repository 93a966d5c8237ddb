"""`L2OController`: a trained controller in anyone's PyTorch training.

Example:
    optimizer = torch.optim.SGD(groups, momentum=0.9)  # a group for each layer group, input to head
    controller = L2OController(optimizer, "controller.safetensors", total_steps=1000)
    controller.begin(ce=first_loss, kl=0.0)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = ...
        loss.backward()
        optimizer.step()
        controller.step(ce=loss, kl=0.0)
"""

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from agents.controller_file import Controller, read_controller
from agents.live import LivePolicy
from agents.live_inputs import Loss, is_like, layer_groups_of, number, scalar, whole
from asg_env.core.layer_groups import set_learning_rates
from asg_env.core.optimizers import lr_factor
from asg_env.core.telemetry import Telemetry, WindowRecorder
from asg_env.schedulers import check_optimizer, unwrapped

WEIGHTS = ("initial", "marked", "started")  # copies of them that a state holds
LOSSES = 5  # numbers of an inner step besides further terms, as `WindowRecorder.report` takes them


class L2OController:
    """Watches a training and sets each layer group's learning rate, window by window.

    A group's rate is its own base rate, the `lr` that it came with, times the multiplier chosen,
    times the common warm-up and decay that the controller was trained with, stretched, if any.
    The host waits for the device once a window. Seven copies of the weights are kept for what the
    controller observes of them.

    Steps are those of the optimizer: with accumulated gradients one report for all of its parts,
    and a step that a `GradScaler` skips does not count. Where several processes train, each gets
    the losses averaged over all, so that all decide alike.

    Args:
        optimizer: With a parameter group for each layer group, input to head, whose name it has as
            `name`; neighbours of the same name, or of the same `layer_group` (with and without
            weight decay, say), are one layer group.
        controller: A file of `asg export`, a run folder, or what `read_controller` returned.
        total_steps: Inner steps of the whole training, all epochs; steps of the optimizer.
        every: Inner steps between decisions; by default at the same shares of the training as
            where the controller was trained, or as often as there are steps.
        classes: Of the task; an observation of `normalised` losses needs it.
        inner_valid: Returns the cross-entropy on held-out images of the *training* domain [nats];
            the observations `extended` and `normalised` need it. Called once a window; one that is
            not finite counts as the largest there is, as in the environment.
        greedy: Likeliest actions or draws; by default what the file says.
        seed: Of the draws.

    Raises:
        ValueError: The controller does not fit the optimizer or the training, or cannot be read.

    Attributes:
        diverged: Whether a loss, gradient or weight was not finite; the rates then stay.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        controller: Controller | Path | str,
        total_steps: int,
        *,
        every: int | None = None,
        classes: int | None = None,
        inner_valid: Callable[[], float] | None = None,
        greedy: bool | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(controller, Controller):
            controller = read_controller(controller)
        record = controller.record
        check_optimizer(optimizer, record.momentum_form)
        self._optimizer, self._record = unwrapped(optimizer), record
        self._total = whole("total_steps", total_steps)
        self._every = None if every is None else whole("every", every, 1, self._total)
        learned = sum(record.windows)
        self._ends = {round(self._total * end / learned) for end in accumulate(record.windows)}
        self._owners, self.layer_groups = layer_groups_of(self._optimizer, record.layer_groups)
        self._greedy = record.greedy if greedy is None else greedy
        self._seed, self._digest = whole("seed", seed, 0), controller.digest()
        self._terms, self._inner_valid = record.encoding.terms, inner_valid
        self._chance_loss = 0.0
        if record.encoding.observation == "normalised":
            if classes is None:
                raise ValueError(
                    "`classes` must be the number of classes, as the controller sees losses in "
                    "units of chance, got None; give it"
                )
            self._chance_loss = math.log(whole("classes", classes, 2))
        policy = controller.policy(self.layer_groups)
        policy.seed(seed)
        self._state_width = policy.network.initial_state(1).shape[-1]
        self._live = LivePolicy(
            policy,
            controller.observation(self.layer_groups),
            controller.action(self.layer_groups),
            (record.encoding.start_multiplier,) * len(self.layer_groups),
            self._greedy,
        )
        if self._live.needs_inner_valid and not callable(inner_valid):
            raise ValueError(
                f"`inner_valid` must be a function that returns the loss on held-out training "
                f"images, as the controller observes it ({record.encoding.observation}), got "
                f"{inner_valid!r}; give one"
            )
        self._parameters: list[list[Tensor]] = [[] for _ in self.layer_groups]
        for owner, group in zip(self._owners, self._optimizer.param_groups, strict=True):
            self._parameters[owner] += group["params"]
        half = {p.dtype for group in self._parameters for p in group if p.dtype.itemsize < 4}
        if half:  # the square of a norm overflows in them
            raise ValueError(
                f"parameters must be float32 or float64, got {', '.join(map(str, half))}; keep "
                "them so and train under autocast"
            )
        self._head = []
        if record.encoding.observation == "asg":  # no other encoding reads the head's statistics
            self._head = [p for p in self._parameters[-1] if p.ndim > 1][-1:]
        self._storages = self._pointers()
        self._recorder = WindowRecorder(self._parameters)
        self._base_lrs = [
            float(group.setdefault("initial_lr", float(group["lr"])))  # a tensor is overwritten
            for group in self._optimizer.param_groups
        ]
        self._records: list[Tensor] = []  # of the window so far
        self._step: int | None = None  # inner steps done; None before `begin`
        self._unreported = 0  # steps of the optimizer since the last report
        self.diverged = False
        self._optimizer.register_step_pre_hook(self._before_step)

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier of each layer group in the current window."""
        return dict(zip(self.layer_groups, self._live.multipliers, strict=True))

    def begin(self, ce: Loss, kl: Loss, **terms: Loss) -> None:
        """Make the first decision; to be called once, before the first step.

        Args:
            ce: Cross-entropy of the untrained network on its first batches [nats]; in training
                it was the mean over four of them, or over a window of fewer.
            kl: KL divergence from the pretrained network's predictions on its old task to those of
                the network, as in the objective but unweighted [nats]; 0 without such a term.
            terms: Values of further guidance terms that the controller observes.

        Raises:
            ValueError: Terms are missing or unknown, a loss is no finite number, the optimizer has
                taken a step, or the training has begun.
        """
        if self._step is not None:
            raise ValueError("the training has begun; call begin() once, before the first step")
        if self._unreported:
            raise ValueError(
                f"the optimizer must not have taken a step before begin(), got {self._unreported}; "
                "call begin() before the first step, or make the controller after those"
            )
        row = self._row(ce, kl, terms)
        self._recorder.start_training()
        first = self._recorder.report_before_training(row, self._terms)
        for name, value in {"ce": first.ce, "kl": first.kl, **first.guidance}.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"`{name}` of the untrained network must be a finite float32, got {value}; "
                    "look at the network before it is trained"
                )
        loss = self._held_out_loss()
        self._step = self._unreported = 0
        self._live.begin(first)
        self._decide(first, loss)

    def step(self, ce: Loss, kl: Loss, **terms: Loss) -> None:
        """Report an inner step, after `optimizer.step()` and before the next `zero_grad()`.

        Arguments are as of `begin`, of the batch that was trained on. Beyond `total_steps` the
        rates stay.

        Raises:
            ValueError: Terms are missing or unknown, a loss is no number, `begin` was not called,
                the optimizer took no step since the last report or several, or at the end of a
                window the gradients are gone or parameters are no longer where they were.
        """
        if self._step is None:
            raise ValueError("the training has not begun; call begin() before the first step")
        if self._step >= self._total or self.diverged:
            return
        row = self._row(ce, kl, terms)
        taken, self._unreported = self._unreported, 0
        if taken == 0 and self._skipped():
            return
        if taken != 1:
            raise ValueError(
                f"the optimizer must take one step between two reports, got {taken}; call "
                "controller.step() after each optimizer.step(), before zero_grad()"
            )
        self._records += row
        self._step += 1
        if not self._ends_at(self._step):
            if self._record.lr_factor != "constant":
                self._set_rates()
            return
        if self._pointers() != self._storages:
            raise ValueError(
                "parameters are no longer where they were when the controller was made (moved to "
                "a device, or replaced); make it after that"
            )
        if all(p.grad is None for group in self._parameters for p in group):
            raise ValueError("gradients are gone; call controller.step() before zero_grad()")
        report = self._recorder.report(self._records, self._terms)
        self._records, self.diverged = [], report.diverged
        if self._step < self._total and not self.diverged:
            self._decide(report, self._held_out_loss())

    def state_dict(self) -> dict[str, Any]:
        """Return where the controller stands, as tensors and plain values."""
        live, recorder = self._live, self._recorder
        begun = self._step is not None
        return {
            **self._identity(),
            "step": self._step,
            "diverged": self.diverged,
            "multipliers": list(live.multipliers) if begun else None,
            "previous_ce": live.previous_ce if begun else None,
            "policy": torch.from_numpy(live.state.copy()) if begun else None,
            "generator": live.policy.generator_state(),  # type: ignore[attr-defined]
            "records": [record.clone() for record in self._records],
            "initial": recorder.initial.clone(),
            "marked": recorder.marked.clone(),
            "started": recorder.started.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, at its rates; model and optimizer are loaded separately.

        Raises:
            ValueError: The state is of another controller or training.
        """
        missing = sorted(self.state_dict().keys() ^ state_dict.keys())
        if missing:
            raise ValueError(
                f"the state must be one that L2OController.state_dict made, but for {missing} it "
                "is not; give such a one"
            )
        for name, mine in self._identity().items():
            if state_dict[name] != mine:
                raise ValueError(
                    f"`{name}` must be {state_dict[name]}, as when the state was saved, got "
                    f"{mine}; make the controller with that"
                )
        self._check_state(state_dict)
        live, recorder = self._live, self._recorder
        live.policy.load_generator_state(state_dict["generator"])  # type: ignore[attr-defined]
        self._step, self.diverged = state_dict["step"], state_dict["diverged"]
        self._unreported = 0
        # A state may have been loaded to any device.
        self._records = [r.detach().clone().to(recorder.initial) for r in state_dict["records"]]
        for name in WEIGHTS:
            getattr(recorder, name).copy_(state_dict[name])
        if self._step is not None:
            live.multipliers = tuple(state_dict["multipliers"])
            live.previous_ce = state_dict["previous_ce"]
            live.state = state_dict["policy"].cpu().numpy().copy()
            self._set_rates()

    def _identity(self) -> dict[str, Any]:
        """What a state must agree with."""
        return {
            "controller": self._digest,
            "total_steps": self._total,
            "every": self._every,
            "layer_groups": list(self.layer_groups),
            "weights": self._recorder.initial.numel(),
            "base_lrs": self._base_lrs,
            "greedy": self._greedy,
            "seed": self._seed,
        }

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Find out, before anything is changed, whether a state can be one of this training."""
        step = state["step"]
        good = {name: is_like(state[name], getattr(self._recorder, name).shape) for name in WEIGHTS}
        good["diverged"] = isinstance(state["diverged"], bool)
        good["generator"] = isinstance(state["generator"], Mapping)
        good["step"] = step is None or (type(step) is int and 0 <= step <= self._total)
        good["records"] = (
            isinstance(state["records"], list)
            and all(is_like(record, torch.Size()) for record in state["records"])
            and len(state["records"]) % (LOSSES + len(self._terms)) == 0
        )
        if step is not None:  # before the first decision there are none of these
            multipliers = state["multipliers"]
            good["multipliers"] = (
                isinstance(multipliers, list)
                and len(multipliers) == len(self.layer_groups)
                and all(isinstance(m, float) and 0 <= m < math.inf for m in multipliers)
            )
            good["previous_ce"] = isinstance(state["previous_ce"], float)
            good["policy"] = is_like(state["policy"], torch.Size((1, 2, self._state_width)))
            good["policy"] = good["policy"] and bool(state["policy"].isfinite().all())
        bad = [name for name, right in good.items() if not right]
        if bad:
            raise ValueError(
                f"the state is damaged: {', '.join(bad)} cannot be of this training; give one that "
                "L2OController.state_dict made"
            )

    def _before_step(self, *_: Any) -> None:
        """Note where the window's last gradient was taken, before the optimizer uses it."""
        overflow = getattr(self._optimizer, "found_inf", None)  # by a GradScaler, if it is fused
        if overflow is not None and bool(overflow):
            return  # its kernel leaves the weights alone
        self._unreported += 1
        if self._step is not None and self._step < self._total and not self.diverged:
            if self._ends_at(self._step + 1):
                self._recorder.mark()

    def _ends_at(self, step: int) -> bool:
        """Whether a window ends when so many inner steps are done."""
        last = step in self._ends if self._every is None else step % self._every == 0
        return last or step == self._total

    def _skipped(self) -> bool:
        """Whether a gradient is not finite: why a `GradScaler` takes no step."""
        gradients = [p.grad for group in self._parameters for p in group if p.grad is not None]
        return any(not bool(gradient.isfinite().all()) for gradient in gradients)

    def _held_out_loss(self) -> float:
        if not (self._live.needs_inner_valid and self._inner_valid):
            return 0.0  # nobody reads it
        loss = number("inner_valid", self._inner_valid())
        if loss < 0:
            raise ValueError(
                f"`inner_valid` must return a cross-entropy, >= 0, got {loss}; return the mean "
                "over held-out training images"
            )
        return loss

    def _decide(self, report: Telemetry, loss: float) -> None:
        assert self._step is not None
        self._live.decide(report, self._step / self._total, loss, self._chance_loss)
        self._set_rates()
        self._recorder.start_window()

    def _set_rates(self) -> None:
        assert self._step is not None
        multipliers, learned = self._live.multipliers, self._record.inner_steps
        factor = lr_factor(self._record.lr_factor, self._step * learned / self._total, learned)
        rates = [
            base_lr * multipliers[owner] * factor
            for base_lr, owner in zip(self._base_lrs, self._owners, strict=True)
        ]
        set_learning_rates(self._optimizer, rates)

    def _row(self, ce: Loss, kl: Loss, terms: Mapping[str, Loss]) -> list[Tensor]:
        """One step as `WindowRecorder` takes it; copies, as loops may reuse a loss's memory."""
        if set(terms) != set(self._terms):
            raise ValueError(
                f"terms beside ce and kl must be {list(self._terms)}, which the controller "
                f"observes, got {list(terms)}; give those"
            )
        like = self._recorder.initial
        std, mean = like.new_zeros(2)
        if self._head:
            std, mean = torch.std_mean(self._head[0].detach())
        named = {"ce": ce, "kl": kl, **terms}
        values = {name: scalar(name, value, like) for name, value in named.items()}
        loss = values["ce"]
        return [loss, values["kl"], loss, mean, std, *(values[name] for name in self._terms)]

    def _pointers(self) -> list[int]:
        return [parameter.data_ptr() for group in self._parameters for parameter in group]
