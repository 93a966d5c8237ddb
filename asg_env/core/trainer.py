"""The inner trainer: trains one optimizee window by window at given multipliers."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asg_env.core.augmentation import Augmentation, AugmentationName
from asg_env.core.data import DataOrder, HostImages, Split, place, to_device
from asg_env.core.evaluation import Evaluation, evaluate_split, forward_all
from asg_env.core.guidance import (
    IMPORTANCE_BATCH,
    IMPORTANCE_SEED,
    TERMS,
    Guidance,
    GuidanceError,
    Pretrained,
    Step,
    Term,
    Weighted,
)
from asg_env.core.layer_groups import (
    GroupPatterns,
    build_param_groups,
    effective_lrs,
    set_learning_rates,
    split_parameters,
)
from asg_env.core.numerics import Precision, autocast, kernels
from asg_env.core.objectives import accuracy_counts, kl_to_teacher, task_loss
from asg_env.core.optimizee import Optimizee
from asg_env.core.optimizers import (
    ONE_RATE,
    LRFactor,
    MomentumForm,
    OneRateError,
    OptimizerName,
    build_optimizer,
    lr_factor,
)
from asg_env.core.seeding import derive_seed, torch_generator
from asg_env.core.teacher import LayerOutputs, Teacher
from asg_env.core.telemetry import Telemetry, WindowRecorder


@dataclass(frozen=True)
class TrainerSettings:
    """How the optimizee is trained; the same for every instance of an environment.

    The fields have the names and meanings of the settings in docs/environment.md.
    """

    base_lr: float
    total_steps: int
    batch_size: int = 32
    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    momentum_form: MomentumForm = "pytorch"
    weight_decay: float = 5e-4
    lr_factor: LRFactor = "constant"
    augmentation: AugmentationName = "none"
    flip_average: bool = False
    precision: Precision = "float32"
    compile: bool = False
    deterministic: bool = False


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
        guidance: Mapping[str, float | Weighted],
        device: torch.device,
        processes: int = 1,
    ) -> None:
        """Prepare everything that does not change from training to training.

        Args:
            optimizee: The network, at its pretrained weights.
            patterns: Layer groups.
            splits: Images by split; `train` is needed.
            settings: How it is trained.
            guidance: See `guide`.
            device: Where it is trained.
            processes: How many share the device, each with a trainer of its own.

        Raises:
            ValueError: The layer groups do not cover the network.
            GuidanceError: As `guide`.
        """
        self.settings = settings
        self.layer_groups = tuple(patterns)
        self.patterns = patterns
        self.optimizee = optimizee.to(device)
        self.splits = place(splits, device, processes)
        self._device = device
        self._network: nn.Module = (
            torch.compile(self.optimizee) if settings.compile else self.optimizee  # type: ignore[assignment]
        )
        self._recorder = WindowRecorder(list(split_parameters(optimizee, patterns).values()))
        self._teacher = Teacher(optimizee, settings.precision, device)
        self._augmentation: Augmentation | None = None
        if settings.augmentation != "none":
            height, width = self.splits["train"].images.shape[2:]
            self._augmentation = Augmentation(settings.augmentation, (height, width))
        self._outputs = LayerOutputs(self.optimizee.backbone)
        self._terms: dict[tuple[Callable[..., Term], str], Term] = {}
        self.images_evaluated = 0  # by `evaluate` and `agreement`, over all trainings
        self.guide(guidance)
        self.reset(head_seed=0, data_seed=0)

    @property
    def chance_loss(self) -> float:
        """Cross-entropy of guessing among the new head's classes, nats."""
        return math.log(len(self.optimizee.head_weight()))

    def guide(self, guidance: Mapping[str, float | Weighted]) -> None:
        """Set the guidance terms of the objective; those built before are kept.

        Args:
            guidance: Name of a term to its weight in the objective, or to a `Weighted`.

        Raises:
            GuidanceError: A term cannot be built with its options.
        """
        weighted = {
            name: asked if isinstance(asked, Weighted) else Weighted(TERMS[name], asked)
            for name, asked in guidance.items()
        }
        order = DataOrder(
            len(self.splits["train"]),
            min(IMPORTANCE_BATCH, len(self.splits["train"])),
            derive_seed(IMPORTANCE_SEED, "guidance"),
            torch.device("cpu"),
        )
        pretrained = Pretrained(
            self.optimizee,
            self._teacher,
            self._outputs,
            lambda number: self.splits["train"].batch(order.indices(number)),
        )
        built = {}
        for name, term in weighted.items():
            # Importances take a while: the same term with another weight is not built again.
            key = (term.build, repr(sorted(term.options.items())))
            if key not in self._terms:
                try:
                    with self._kernels():
                        self._terms[key] = term.build(pretrained, **term.options)
                except GuidanceError:
                    raise
                except Exception as error:  # a user's code, or an option of the wrong kind
                    raise GuidanceError(
                        f"'{name}' cannot be built: {type(error).__name__}: {error}"
                    ) from None
            built[name] = self._terms[key]
        self.guidance = Guidance(weighted, built)
        if self.settings.compile and self._outputs.grown():
            # What was compiled without a layer's hook would never run it.
            torch.compiler.reset()
            self._network = torch.compile(self.optimizee)  # type: ignore[assignment]

    def reset(
        self,
        head_seed: int,
        data_seed: int,
        base_lr_scale: float = 1.0,
        settings: TrainerSettings | None = None,
    ) -> None:
        """Go back to inner step 0: pretrained backbone, fresh head, empty optimizer state.

        Args:
            head_seed: Seed of the new head's initial draw.
            data_seed: Seed of the order of training images.
            base_lr_scale: Factor on the base learning rate; > 0.
            settings: From now on, in the place of those before. Optimizer, rates, batch size and
                number of steps may be others; what the network is run through may not.
        """
        if settings is not None:
            self.settings = settings
        with torch.no_grad():
            self._teacher.restore(self.optimizee)
            self.optimizee.initialise_head(torch_generator(head_seed, "head"))
        self._recorder.start_training()
        self._base_lr = self.settings.base_lr * base_lr_scale
        train = self.splits["train"]
        on_host = isinstance(train.images, HostImages)
        self._order = DataOrder(
            len(train),
            self.settings.batch_size,
            data_seed,
            torch.device("cpu") if on_host else self._device,
        )
        self._data_seed = data_seed
        self._optimizer = build_optimizer(
            build_param_groups(self.optimizee, self.patterns, self._base_lr),
            self.settings.optimizer,
            self.settings.momentum,
            self.settings.momentum_form,
            self.settings.weight_decay,
            fused=self._device.type == "cuda",
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
        head_weight = self.optimizee.head_weight()
        self._recorder.start_window()
        self._set_rates(multipliers)
        rates_vary = self.settings.lr_factor != "constant"
        records: list[Tensor] = []
        with self._kernels():
            for step in range(steps):
                ce, kl, loss, extra = self._losses([self.inner_step])
                self._optimizer.zero_grad()
                loss.backward()
                if step == steps - 1:
                    self._recorder.mark()
                if rates_vary:
                    self._set_rates(multipliers)
                self._optimizer.step()
                std, mean = torch.std_mean(head_weight.detach())
                records += (ce.detach(), kl.detach(), loss.detach(), mean, std, *extra)
                self.inner_step += 1
        return self._recorder.report(records, self.guidance.extra)

    @torch.no_grad()
    def initial_report(self, batches: int) -> Telemetry:
        """Report on the first `batches` training batches, no step taken; norms are 0."""
        with self._kernels():
            ce, kl, loss, extra = self._losses(range(batches))
        std, mean = torch.std_mean(self.optimizee.head_weight())
        return self._recorder.report_before_training(
            (ce, kl, loss, mean, std, *extra), self.guidance.extra
        )

    @torch.no_grad()
    def evaluate(self, split: str) -> Evaluation:
        """Run the optimizee over a whole split; `old_task` is scored through the old head.

        Raises:
            ValueError: The split has no labels.
        """
        self.images_evaluated += len(self.splits[split])
        head = self.optimizee.old_head if split == "old_task" else self.optimizee.head
        with self._judged():
            return evaluate_split(
                self.splits[split], self._through(head), self.settings.flip_average
            )

    @torch.no_grad()
    def agreement(self, split: str) -> float:
        """Share of images on which the old head predicts what the teacher predicts; no label."""
        data = self.splits[split]
        self.images_evaluated += len(data)
        with self._judged():
            predicted = self._teacher.of_split(split, data).argmax(dim=1)
            agreed = accuracy_counts(
                forward_all(data, self._through(self.optimizee.old_head)), predicted
            )
        return agreed.float().mean().item()

    def retention(self) -> float | None:
        """What is left of the old task: accuracy of the old head on its held-out images.

        Where nobody labelled them, agreement with the teacher; None where there are none.
        """
        if "old_task" not in self.splits:
            return None
        if self.splits["old_task"].labels is None:
            return self.agreement("old_task")
        return self.evaluate("old_task").accuracy

    def weights(self) -> dict[str, Tensor]:
        """Return the network's tensors by name, as they are to be judged and saved."""
        with self._judged():
            return {name: t.clone() for name, t in self.optimizee.state_dict().items()}

    def features(self, split: str, most: int) -> Tensor:
        """Return what the heads read of a split's images, float32, shape (N, F).

        Args:
            split: Which images.
            most: Of a larger split so many are taken, balanced over classes.
        """
        images = self.splits[split]
        images = images if len(images) <= most else images.head(most)
        with torch.no_grad(), self._judged():
            return forward_all(images, self._through(nn.Flatten(1)))

    def snapshot(self) -> dict[str, Any]:
        """Return everything that the next inner step depends on, as an independent copy."""
        return {
            "optimizee": [t.clone() for t in self.optimizee.state_dict().values()],
            "initial": self._recorder.initial.clone(),
            "marked": self._recorder.marked.clone(),
            "optimizer": copy.deepcopy(self._optimizer.state_dict()),
            "settings": self.settings,
            "base_lr": self._base_lr,
            "data_seed": self._data_seed,
            "inner_step": self.inner_step,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot; what follows repeats bit for bit."""
        self.reset(0, snapshot["data_seed"], settings=snapshot["settings"])
        with torch.no_grad():
            torch._foreach_copy_(list(self.optimizee.state_dict().values()), snapshot["optimizee"])
            self._recorder.initial.copy_(snapshot["initial"])
            self._recorder.marked.copy_(snapshot["marked"])
        self._optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
        self._base_lr = snapshot["base_lr"]
        self.inner_step = snapshot["inner_step"]

    def _set_rates(self, multipliers: Sequence[float]) -> None:
        if self.settings.optimizer in ONE_RATE and len({m for m in multipliers if m}) > 1:
            raise OneRateError(
                f"optimizer {self.settings.optimizer} takes one rate for all layer groups, or 0, "
                f"got multipliers {', '.join(f'{m:g}' for m in multipliers)}; use a uniform rule"
            )
        factor = lr_factor(self.settings.lr_factor, self.inner_step, self.settings.total_steps)
        set_learning_rates(self._optimizer, effective_lrs(self._base_lr, multipliers, factor))

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Stand at the weights to be judged: schedule-free training takes its steps elsewhere."""
        switch = getattr(self._optimizer, "eval", None)
        if switch is None:
            with self._kernels():
                yield
            return
        weights = [p for group in self._optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in weights]
        switch()
        try:
            with self._kernels():
                yield
        finally:
            self._optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():  # the way back is exact to rounding only
                torch._foreach_copy_(weights, before)

    def _kernels(self) -> AbstractContextManager[None]:
        return kernels(self.settings.deterministic, self._device)

    def _losses(self, steps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """CE, KL, objective and further terms on the batches of these steps, taken as one."""
        train = self.splits["train"]
        batches = [self._batch(step) for step in steps]
        images, index = (
            batches[0] if len(batches) == 1 else map(torch.cat, zip(*batches, strict=True))
        )
        self._outputs.clear()
        with autocast(self.settings.precision, self._device):
            logits, old_logits = self._network(images)
        if self._augmentation is None:
            teacher = self._teacher.of_split("train", train)[index]
        else:
            teacher = self._teacher.log_probs(images)
        ce = task_loss(logits.float(), train.known_labels()[index])
        kl = kl_to_teacher(teacher, old_logits.float())
        values = self.guidance.values(
            Step(kl, teacher, old_logits.float(), lambda layer: self._taught(layer, images, index))
        )
        extra = [values[name].detach() for name in self.guidance.extra]
        return ce, kl, self.guidance.objective(ce, values), extra

    def _taught(self, layer: str, images: Tensor, index: Tensor) -> Tensor:
        """Return a watched layer's output in the teacher, remembered where that can be."""
        if self._augmentation is not None:  # the teacher has just seen these images
            return self._teacher.outputs.last(layer)
        known = self._teacher.features_of_split("train", self.splits["train"], layer)
        return self._teacher.features(layer, images) if known is None else known[index]

    def _batch(self, inner_step: int) -> tuple[Tensor, Tensor]:
        """Images of an inner step, normalised, and where they stand in the split."""
        train = self.splits["train"]
        index = self._order.indices(inner_step)
        pixels = train.pixels(index)
        if isinstance(train.images, HostImages):
            train.images.prefetch(self._order.indices(inner_step + 1))
            index = to_device(index, self._device)
        if self._augmentation is not None:
            seed = derive_seed(self._data_seed, "augmentation", inner_step)
            pixels = self._augmentation(pixels, seed)
        return train.normalise(pixels), index

    def _through(self, head: nn.Module) -> Callable[[Tensor], Tensor]:
        """The backbone and one head as a function from images to logits, float32."""

        def forward(images: Tensor) -> Tensor:
            with autocast(self.settings.precision, self._device):
                logits: Tensor = head(self.optimizee.backbone(images))
            return logits.float()

        return forward
