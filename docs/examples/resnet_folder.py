"""A ResNet-18 on a folder of images, with and without a learned schedule.

python docs/examples/digit_folders.py digits
python docs/examples/resnet_folder.py digits
"""

import torch
import torch.nn.functional as F
from digit_folders import accuracy, arguments, batches, compare, load, pretrained
from torch import nn
from torchvision.models import resnet18

from asg_env.schedule import LearnedSchedule

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


def train(rate: float, schedule: LearnedSchedule | None, seed: int) -> tuple[float, float]:
    """Train once; return the accuracy on `valid` and on `test`."""
    model = prepare(seed)
    if schedule is None:
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
    else:
        groups = schedule.param_groups(model, base_lr=rate)
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
        scheduler = schedule.to_torch(optimizer, total_steps=given.steps)
    for images, labels in batches(data["train"], given.steps, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
    return accuracy(model, data["valid"]), accuracy(model, data["test"])


schedule = given.schedule.by_depth(prepare(0))
print(schedule.table(prepare(0)))
compare(train, schedule, (0.003, 0.01, 0.03, 0.1, 0.3), given.seeds)
