"""Hugging Face's Trainer on a vision transformer, with and without a learned schedule.

pip install -e '.[elsewhere]'
python docs/examples/digit_folders.py digits
python docs/examples/hf_trainer.py digits
"""

import tempfile

import torch
from digit_folders import BATCH, accuracy, arguments, compare, load, pretrained
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

given = arguments(__doc__)
data = {split: load(given.folder, split) for split in ("train", "valid", "test")}
classes = len(data["train"][1].unique())


class Images(Dataset):
    """The training images as the Trainer wants them."""

    def __len__(self) -> int:
        return len(data["train"][1])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": data["train"][0][index], "labels": data["train"][1][index]}


def build(labels: int = 5) -> ViTForImageClassification:
    """Six narrow layers for 32 x 32 images; five old classes, as pretrained."""
    size = {"image_size": 32, "patch_size": 4, "hidden_size": 64, "intermediate_size": 128}
    layers = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_labels": labels}
    return ViTForImageClassification(ViTConfig(**size, **layers))


weights = pretrained(build, lambda model, i: model(i).logits, given).state_dict()


def prepare(seed: int) -> ViTForImageClassification:
    """The pretrained network with a fresh head."""
    torch.manual_seed(seed)
    model = build(classes)
    head = {name for name in weights if name.startswith("classifier.")}
    model.load_state_dict({n: t for n, t in weights.items() if n not in head}, strict=False)
    return model


schedule = given.schedule.by_depth(prepare(0))


def train(rate: float, scheduled: bool, seed: int) -> tuple[float, float]:
    """Train once; return the accuracy on `valid` and on `test`."""
    model = prepare(seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=given.steps,
            per_device_train_batch_size=BATCH,
            seed=seed,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        groups = schedule.param_groups(model, base_lr=rate, weight_decay=0.05)
        optimizer = torch.optim.AdamW(groups)
        if scheduled:
            scheduler = schedule.to_torch(optimizer, total_steps=given.steps)
        else:
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
        trainer = Trainer(
            model, settings, train_dataset=Images(), optimizers=(optimizer, scheduler)
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return tuple(accuracy(lambda i: model(i).logits, data[s]) for s in ("valid", "test"))


print(schedule.table(prepare(0)), flush=True)
compare(train, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3), given.seeds)
