"""A ResNet-18 on a folder of images, with and without a learned schedule.

python docs/examples/digit_folders.py digits
python docs/examples/resnet_folder.py digits
"""

import torch
import torch.nn.functional as F
from digit_folders import accuracy, arguments, batches, compare, load, pretrained
from torch import nn
from torchvision.models import resnet18

given = arguments(__doc__)
data = {split: load(given.folder, split) for split in ("train", "valid", "test")}
classes = len(data["train"][1].unique())


def build() -> nn.Module:
    """Five old classes, as pretrained."""
    return resnet18(num_classes=5)


weights = pretrained(build, lambda model, images: model(images), given).state_dict()


def prepare(seed: int) -> nn.Module:
    """The pretrained network with a fresh head."""
    torch.manual_seed(seed)
    model = build()
    model.load_state_dict(weights)
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model.eval()  # batch norm keeps the statistics of pretraining


schedule = given.schedule.by_depth(prepare(0))


def train(rate: float, scheduled: bool, seed: int) -> tuple[float, float]:
    """Train once; return the accuracy on `valid` and on `test`."""
    model = prepare(seed)
    groups = schedule.param_groups(model, base_lr=rate)
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    if scheduled:
        scheduler = schedule.to_torch(optimizer, total_steps=given.steps)
    else:
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    for images, labels in batches(data["train"], given.steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
    return accuracy(model, data["valid"]), accuracy(model, data["test"])


print(schedule.table(prepare(0)), flush=True)
compare(train, (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), given.seeds)
