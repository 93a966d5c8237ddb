"""Schedules within the training loops of other packages."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from agents.l2o_controller import L2OController
from asg_env.schedule import LearnedSchedule

DOCS = Path(__file__).parents[1] / "docs"
STEPS = 12  # three epochs of four batches


@pytest.fixture
def learned() -> LearnedSchedule:
    return LearnedSchedule(
        layer_groups={"body": r"0\.", "head": r"2\."},
        knots=(0.0, 0.25, 0.5),
        multipliers=((1.0, 0.1), (0.5, 0.2), (0.0, 0.4)),
        spread=((0.0, 0.0),) * 3,
        base_lr=0.01,
        optimizer="sgd",
        momentum_form="pytorch",
        lr_factor="constant",
        episodes=1,
        task="ASG/Digits-v0",
        instances="fixed",
        base_lr_scale=1.0,
        inner_steps=STEPS,
        settings={},
    )


@pytest.fixture
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 3, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def expected(learned, data) -> tuple[nn.Module, list[list[float]]]:
    """Weights and rates of a plain loop."""
    model, rates = network(), []
    optimizer = torch.optim.SGD(learned.param_groups(model), momentum=0.9)
    scheduler = learned.to_torch(optimizer, STEPS)
    for _epoch in range(3):
        for inputs, labels in DataLoader(data, batch_size=8):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            scheduler.step()
    return model, rates


def assert_same_weights(left, right):
    for ours, theirs in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_as_a_plain_loop_and_resumes(learned, data, tmp_path, caplog):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.rates = network(), []

        def training_step(self, batch, _):
            self.rates.append([g["lr"] for g in self.optimizers().param_groups])
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(learned.param_groups(self.model), momentum=0.9)
            scheduler = learned.to_torch(optimizer, STEPS)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def trainer(epochs, **settings):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    model, rates = expected(learned, data)
    module = Module()
    whole = trainer(3)
    whole.fit(module, DataLoader(data, batch_size=8))
    assert whole.estimated_stepping_batches == STEPS  # what a module may ask for
    assert module.rates == rates
    assert_same_weights(module.model, model)

    first, half = Module(), trainer(1)
    half.fit(first, DataLoader(data, batch_size=8))
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    trainer(3).fit(second, DataLoader(data, batch_size=8), ckpt_path=tmp_path / "half.ckpt")
    assert first.rates + second.rates == rates
    assert_same_weights(second.model, model)


def live_on(optimizer, steps=STEPS) -> L2OController:
    """A shipped controller at work, before its first decision."""
    file = DOCS / "examples" / "controller.safetensors"
    return L2OController(optimizer, file, steps, classes=3, inner_valid=lambda: 1.0)


def expected_live(groups, model, data) -> list[list[float]]:
    """Train a network in a plain loop under a live controller; return the rates."""
    rates, optimizer = [], torch.optim.SGD(groups, momentum=0.9)
    live = live_on(optimizer)
    live.begin(ce=1.0, kl=0.0)
    for _ in range(3):
        for batch in DataLoader(data, batch_size=8):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            losses = []
            for half in (0, 4):  # accumulated
                inputs, labels = (part[half : half + 4] for part in batch)
                loss = nn.functional.cross_entropy(model(inputs), labels)
                losses.append(loss.detach())
                (loss / 2).backward()
            optimizer.step()
            live.step(ce=torch.stack(losses).mean(), kl=0.0)
    assert len(set(map(tuple, rates))) > 1
    return rates


def from_the_docs(number: int, **names):
    """What a block of the reuse page defines."""
    blocks = re.findall(r"```py\n(.*?)```", (DOCS / "reuse.md").read_text(), re.DOTALL)
    names |= {"torch": torch, "make_controller": live_on, "first_loss": 1.0}
    exec(compile(blocks[number], "reuse.md", "exec"), names)
    return SimpleNamespace(**names)


@pytest.mark.filterwarnings("ignore")
def test_lightning_reports_to_a_live_controller_and_resumes(learned, data, tmp_path):
    lightning = pytest.importorskip("lightning")
    shown = from_the_docs(0, lightning=lightning, schedule=learned)

    class Module(shown.LiveModule):
        def __init__(self):
            super().__init__(network())
            self.rates = []

        def on_before_optimizer_step(self, optimizer):
            self.rates.append([g["lr"] for g in optimizer.param_groups])

    def trainer(steps):
        return lightning.Trainer(
            max_steps=steps,
            accumulate_grad_batches=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    model = network()
    rates = expected_live(learned.param_groups(model, base_lr=0.1), model, data)
    loader = DataLoader(data, batch_size=4)
    module = Module()
    trainer(STEPS).fit(module, loader)
    assert module.rates == rates
    assert_same_weights(module.model, model)

    class Stops(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    first, half = Module(), trainer(STEPS)
    half.callbacks.append(Stops())
    half.fit(first, loader)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    trainer(STEPS).fit(second, loader, ckpt_path=tmp_path / "half.ckpt")
    assert len(first.rates) == 4
    assert first.rates + second.rates == rates
    assert_same_weights(second.model, model)


class WithLoss(nn.Module):
    """What Hugging Face's Trainer wants: a loss first."""

    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, inputs, labels):
        logits = self.model(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(transformers, data, folder):
    """Rates as they are seen, what every Trainer here is given, and the callback that looks."""
    rates = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_, optimizer, **__):
            rates.append([group["lr"] for group in optimizer.param_groups])

    settings = {
        "args": transformers.TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        ),
        "train_dataset": [{"inputs": x, "labels": y} for x, y in data],
    }
    return rates, settings, Watch()


def test_hugging_faces_trainer_takes_the_scheduler(learned, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    rates, settings, watch = hugging_face(transformers, data, tmp_path)

    def train(resume=None):
        model = WithLoss()
        patterns = {name: rf"model\.{p}" for name, p in learned.layer_groups.items()}
        mapped = learned.regroup(patterns)
        optimizer = torch.optim.SGD(mapped.param_groups(model), momentum=0.9)
        trainer = transformers.Trainer(
            model,
            **settings,
            optimizers=(optimizer, mapped.to_torch(optimizer, STEPS)),
            callbacks=[watch],
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters()]

    whole = train()
    assert rates == expected(learned, data)[1]
    rates.clear()
    again = train(resume=str(tmp_path / "checkpoint-8"))
    assert rates == expected(learned, data)[1][8:]
    assert all(map(torch.equal, again, whole))


def test_hugging_faces_trainer_reports_to_a_live_controller_and_resumes(learned, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    rates, settings, watch = hugging_face(transformers, data, tmp_path)

    def groups(model):
        patterns = {name: rf"model\.{p}" for name, p in learned.layer_groups.items()}
        return learned.regroup(patterns).param_groups(model, base_lr=0.1)

    def train(resume=None):
        shown = from_the_docs(1, transformers=transformers)
        model = WithLoss()
        optimizer = torch.optim.SGD(groups(model), momentum=0.9)
        keeps = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 1.0)
        shown.LiveTrainer(
            model,
            **settings,
            optimizers=(optimizer, keeps),
            callbacks=[shown.live, watch],
        ).train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in model.parameters()]

    whole = train()
    seen = list(rates)
    assert len(set(map(tuple, seen))) > 1
    rates.clear()
    again = train(resume=str(tmp_path / "checkpoint-8"))
    assert rates == seen[8:]
    assert all(map(torch.equal, again, whole))


def test_accelerates_optimizer_is_driven(learned, data):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, rates = network(), []
    optimizer = torch.optim.SGD(learned.param_groups(model), momentum=0.9)
    scheduler = learned.to_torch(optimizer, STEPS)
    loader = DataLoader(data, batch_size=8)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _epoch in range(3):
        for inputs, labels in loader:
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            scheduler.step()
    plain, expected_rates = expected(learned, data)
    assert rates == expected_rates
    assert_same_weights(accelerator.unwrap_model(model), plain)
    wrapped = accelerator.prepare(torch.optim.Rprop(learned.param_groups(network())))
    with pytest.raises(ValueError, match="optimizer Rprop cannot take a rate"):
        learned.to_torch(wrapped, STEPS)
