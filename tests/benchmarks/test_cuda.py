import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asg_env.core.data import DataOrder
from asg_env.core.seeding import torch_generator
from benchmarks import cuda

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_dry_run_prints_both_ratios():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "torchvision:resnet18, 64 pixels, batch 32, cpu: ours " in done.stdout
    for other in ("bare", "naive"):
        assert re.search(
            rf"ours is \d+\.\d\d times as fast as {other} \(.* in 1 repeats\)", done.stdout
        )
    assert re.search(r"peak memory of the process \d+\.\d\d GiB", done.stdout)


def test_a_machine_without_cuda_is_told_of_the_figure_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda"])
    monkeypatch.setattr(cuda, "measure", lambda *_: pytest.fail("it measured"))

    with pytest.raises(SystemExit) as stop:
        cuda.main()

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.endswith("no CUDA device is here; add --cpu for the figure without one\n")


@pytest.mark.parametrize(
    ("arguments", "repeats"), [(["--dry-run"], 1), (["--cpu"], 5), (["--cpu", "--repeats", "2"], 2)]
)
def test_ratios_are_of_the_same_repeat(monkeypatch, capsys, arguments, repeats):
    asked = []

    def measure(plan, count):
        asked.append((plan.device.type, plan.batch_size, count))
        ours = [1.0, 2.0, 4.0, 1.0, 1.0][:count]
        return {"ours": ours, "bare": [t / 2 for t in ours], "naive": [3 * t for t in ours]}

    monkeypatch.setattr(cuda, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["cuda", *arguments])

    cuda.main()

    assert asked == [("cpu", 32, repeats)]
    printed = capsys.readouterr().out
    several = f"in {repeats} repeats)"
    assert f"ours is 0.50 times as fast as bare (0.50 to 0.50 {several}" in printed
    assert f"ours is 3.00 times as fast as naive (3.00 to 3.00 {several}" in printed


def test_all_three_loops_train_the_same_network(monkeypatch):
    cpu, models = torch.device("cpu"), []
    plan = cuda.Plan(cpu, "torchvision:resnet18", 32, "float32", 4, window=2, windows=2)
    monkeypatch.setattr(cuda, "IMAGES", 12)
    monkeypatch.setattr(cuda, "RATE", 0.01)
    monkeypatch.setattr(cuda, "KL_WEIGHT", 1.0)
    original = cuda.build_optimizee

    def build_optimizee(pretrained):
        models.append(original(pretrained))
        models[-1].initialise_head(torch_generator(0, "head"))  # as ours does
        return models[-1]

    monkeypatch.setattr(cuda, "build_optimizee", build_optimizee)
    order = DataOrder(12, 4, 0, cpu)
    monkeypatch.setattr(cuda, "batches", lambda plan: [order.indices(i) for i in range(4)])
    pretrained = cuda.load_pretrained(plan.backbone, "random", plan.image_size)
    data = cuda.random_images(plan, pretrained)
    start = build_optimizee(pretrained).state_dict()

    for build in (cuda.ours, cuda.bare, cuda.naive):
        assert len(list(build(plan, pretrained, data)())) == 2  # windows

    _, ours, bare, naive = (model.state_dict() for model in models)
    for name in ("backbone.conv1.weight", "backbone.layer4.0.conv1.weight", "head.2.weight"):
        moved = ours[name] - start[name]
        assert moved.norm() > 1e-4 * start[name].norm()
        for other in (bare, naive):
            difference = other[name] - ours[name]
            assert difference.norm() < 1e-2 * moved.norm()


def test_repeats_below_one_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda", "--cpu", "--repeats", "0"])
    monkeypatch.setattr(cuda, "measure", lambda *_: pytest.fail("it measured"))

    with pytest.raises(SystemExit) as stop:
        cuda.main()

    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("--repeats must be >= 1, got 0; raise it\n")


def test_a_finished_plan_is_kept_when_a_later_one_fails(monkeypatch, tmp_path):
    def measure(plan, count):
        if plan.batch_size > 32:
            raise torch.OutOfMemoryError
        return {name: [1.0] * count for name in ("ours", "bare", "naive")}

    out = tmp_path / "cuda.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["cuda", "--repeats", "1", "--out", str(out)])

    with pytest.raises(torch.OutOfMemoryError):
        cuda.main()

    assert json.loads(out.read_text())["seconds"] == {
        "batch 32": {"ours": [1.0], "bare": [1.0], "naive": [1.0]}
    }
