"""A vision transformer of timm, with and without a learned schedule.

pip install -e '.[timm]'
python docs/examples/digit_folders.py digits
python docs/examples/vit_timm.py digits
"""

import timm
import torch
import torch.nn.functional as F
from digit_folders import accuracy, arguments, batches, compare, load, pretrained
from torch import nn

given = arguments(__doc__)
data = {split: load(given.folder, split) for split in ("train", "valid", "test")}
classes = len(data["train"][1].unique())


def build() -> nn.Module:
    """Twelve narrow blocks for 32 x 32 images; five old classes, as pretrained."""
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 12, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **size)


weights = pretrained(build, lambda model, images: model(images), given).state_dict()


def prepare(seed: int) -> nn.Module:
    """The pretrained network with a fresh head."""
    torch.manual_seed(seed)
    model = build()
    model.load_state_dict(weights)
    model.reset_classifier(classes)
    return model


schedule = given.schedule.by_depth(prepare(0))


def train(rate: float, scheduled: bool, seed: int) -> tuple[float, float]:
    """Train once; return the accuracy on `valid` and on `test`."""
    model = prepare(seed).train()
    groups = schedule.param_groups(model, base_lr=rate, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups)
    scheduler = schedule.to_timm(optimizer, total_steps=given.steps) if scheduled else None
    for step, (images, labels) in enumerate(batches(data["train"], given.steps, seed)):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step_update(step + 1)
    model.eval()
    return accuracy(model, data["valid"]), accuracy(model, data["test"])


print(schedule.table(prepare(0)), flush=True)
compare(train, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3), given.seeds)
