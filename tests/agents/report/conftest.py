import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from agents import statistics
from agents.benchmark.plan import Benchmark, BenchmarkSettings
from agents.benchmark.results import summarise_benchmark
from agents.benchmark.table import MANIFEST, write_manifest
from agents.records import EPISODES
from agents.report.document import report_html

TASK = "ASG/Digits-v0"
GROUPS = ["conv1", "conv2", "conv3", "conv4", "head"]
KINDS = {
    "reinforce": "agent",
    "coordinate-wise": "agent",
    "es": "agent",
    "cosine": "rule",
    "static-search": "search",
    "random": "random",
}
SKILL = {"reinforce": 0.03, "coordinate-wise": 0.045, "es": -0.02, "random": -0.2}


def made_up_episode(method, number, count, generator, steps=15, mixed=False):
    """What a record of an episode looks like: rates fall, the more the higher the hidden scale."""
    scale = float(10 ** (-1 + 2 * (number + 0.5) / count))
    instance = {"task": TASK, "head_seed": number, "data_seed": number, "base_lr_scale": scale}
    if mixed:
        instance["optimizer"] = ("sgd", "adam")[number % 2]
        steps = (10, 15, 20)[number % 3]
    progress = np.linspace(0, 1, steps + 1)
    depth = np.linspace(0, 0.7, len(GROUPS))
    level = -1 - 0.6 * np.log10(scale) - 1.5 * progress[:-1, None] + depth
    noise = generator.normal(0, 0.15, (steps, len(GROUPS)))
    multipliers = np.clip(10 ** (level + noise), 0, 1)
    final = 0.55 + SKILL.get(method, 0) + generator.normal(0, 0.03)
    accuracy = final * (1 - np.exp(-4 * progress[1:])) / (1 - np.exp(-4))
    ce = 0.2 + 1.5 * np.exp(-3 * progress[1:]) + generator.normal(0, 0.03, steps)
    diverged = scale > 5 and generator.random() < (0.5 if method == "random" else 0.05)
    lasts = steps // 2 if diverged else steps
    losses = [round(x, 4) for x in ce[:lasts].tolist()]
    return {
        "instance": instance,
        "accuracy": 0.0 if diverged else float(np.clip(final, 0, 1)),
        "mean_recall": 0.5,
        "retention": 0.0 if diverged else 0.95,
        "diverged": bool(diverged),
        "inner_steps": 10 * lasts,
        "multipliers": multipliers[:lasts].round(5).tolist(),
        "progress": progress[: lasts + 1].round(5).tolist(),
        "ce": [*losses[:-1], None] if diverged else losses,
        "outer_valid": accuracy[:lasts].round(4).tolist(),
    }


def write_metrics(folder, generator, updates=30):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for update in range(updates):
        rise = 1 - np.exp(-update / 8)
        lines.append(
            {
                "update": update,
                "episodes": 32 * (update + 1),
                "return": 0.15 + 0.3 * rise + float(generator.normal(0, 0.02)),
                "accuracy": 0.3 + 0.25 * rise + float(generator.normal(0, 0.02)),
                "diverged": 0.1,
                "entropy": 1.1 - 0.5 * rise,
                "inner_steps": 4800,
                "validation_images": 100,
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def _write_benchmark(root, kinds=KINDS, suites=("scale", "mixed"), seeds=5, count=40):
    """A finished benchmark of made-up numbers: folders, manifest and results.json."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    files = root.with_name(f"{root.name}-suites")
    files.mkdir()
    for suite in suites:
        values = {"id": TASK, "instances": "mixed" if suite == "mixed" else "unknown-scale"}
        (files / f"{suite}.yaml").write_text(yaml.safe_dump(values))
    benchmark = Benchmark(
        BenchmarkSettings(
            suites=[str(files / f"{suite}.yaml") for suite in suites],
            agents={name: {"agent": name} for name, kind in kinds.items() if kind == "agent"},
            baselines=[name for name, kind in kinds.items() if kind != "agent"],
            episodes=960,
            seeds=seeds,
            test_instances=count,
        )
    )
    results = []
    for suite in suites:
        for method, kind in kinds.items():
            for seed in range(seeds if kind in ("agent", "search") else 1):
                folder = root / suite / method / f"seed-{seed}"
                folder.mkdir(parents=True)
                if kind == "agent":
                    write_metrics(folder, generator)
                    config = {"env": {"id": TASK, "optimizer": "sgd"}}
                    (root / suite / method / "config.yaml").write_text(yaml.safe_dump(config))
                values = (0.5 + SKILL.get(method, 0) + generator.normal(0, 0.01, 16)).tolist()
                (folder / "selection.json").write_text(json.dumps({"outer_valid": values}))
                for tested in suites:
                    judged = {
                        "suite": suite,
                        "suite_version": "0123456789ab",
                        "tested_on": tested,
                        "tested_version": "0123456789ab",
                        "layer_groups": GROUPS,
                        "method": method,
                        "kind": kind,
                        "training_seed": seed,
                        "setting": "0.03" if kind == "rule" else "",
                        "cost": {"episodes": 960, "inner_steps": 143000, "validation_images": 10},
                        "refused": "",
                        "results": [
                            made_up_episode(method, i, count, generator, mixed=tested == "mixed")
                            for i in range(count)
                        ],
                    }
                    (folder / f"test-{tested}.json").write_text(json.dumps(judged))
                    results.append(judged)
    summary = summarise_benchmark(results, benchmark, root)
    (root / "results.json").write_text(json.dumps(summary))
    write_manifest(benchmark, dict.fromkeys(suites, "0123456789ab"), root)
    manifest = json.loads((root / MANIFEST).read_text())
    packages = {"torch": "2.15.0", "asg-env": "0.1.0"}
    manifest["provenance"] = {"packages": packages, "commit": "0a1b2c3"}
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def result_row(name, generator, seeds=2, count=6, primary=False, setting=""):
    scores = generator.uniform(0.4, 0.6, (seeds, count))
    row = {
        "name": name,
        "setting": setting,
        "reference": False,
        "accuracy": {"iqm": 0.5, "low": 0.45, "high": 0.55, "seeds": seeds, "instances": count},
        "mean": float(scores.mean()),
        "std_over_instances": 0.03,
        "retention": None,
        "diverged": 0.0,
        "cost": {"episodes": 960, "inner_steps": 143000, "validation_images": 10},
        "per_instance": scores.tolist(),
    }
    if not primary:
        row["controller_minus_this"] = {"iqm": 0.02, "low": 0.01, "high": 0.03}
    return row


def _write_run(root, names=("controller (greedy)", "controller (sampled)", "static search")):
    """A finished run of made-up numbers; as older versions wrote them, but for episodes.json."""
    generator = np.random.default_rng(0)
    root.mkdir(parents=True)
    env = {"id": TASK, "instances": "unknown-scale", "optimizer": "sgd", "observation": "scaled"}
    config = {"env": env, "agent": {"kind": "reinforce"}, "train": {}, "seed": 0}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    (root / "provenance.json").write_text(json.dumps({"packages": {"torch": "2.15.0"}}))
    for seed in range(2):
        write_metrics(root / f"seed-{seed}", generator, updates=5)
    summary = {
        "protocol": {
            "primary": names[0],
            "statistic": "interquartile mean",
            "interval": "95 %",
            "instances": [{}] * 6,
            "training_seeds": 2,
            "test_images": 1500,
            "reward": "1 x gain",
        },
        "rows": [
            result_row(name, generator, primary=place == 0) for place, name in enumerate(names)
        ],
    }
    (root / "results.json").write_text(json.dumps(summary))
    rows = [
        {
            "name": name,
            "results": [
                [made_up_episode(name, i, 6, generator, steps=4) for i in range(6)]
                for _ in range(2)
            ],
        }
        for name in names
    ]
    (root / EPISODES).write_text(json.dumps({"layer_groups": GROUPS, "rows": rows}))
    return root


FEW_KINDS = {name: KINDS[name] for name in ("reinforce", "es", "cosine", "static-search")}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        return _write_benchmark(
            tmp_path_factory.mktemp("report") / "bench", FEW_KINDS, seeds=2, count=6
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return _write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def pages(benchmark, run):
    return {"benchmark": report_html(benchmark), "run": report_html(run)}


@pytest.fixture(scope="module")
def small_benchmark(tmp_path_factory):
    kinds = {name: KINDS[name] for name in ("es", "cosine")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        root = tmp_path_factory.mktemp("report") / "small"
        return _write_benchmark(root, kinds, ("scale",), seeds=2, count=3)


@pytest.fixture
def own_benchmark(small_benchmark, tmp_path):
    return Path(shutil.copytree(small_benchmark, tmp_path / "small"))


@pytest.fixture
def own_run(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


class _Reader(HTMLParser):
    """Tags, ids, links and text of a page; text of figures too, styles apart."""

    VOID = ("meta", "input", "br", "hr", "img", "link")

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.links, self.text, self.styles = [], [], [], [], []
        self.figures = []  # id that a figure is named by, and the first element in it
        self.open = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if self.open and self.open[-1] == "svg" and self.figures[-1][1] is None:
            self.figures[-1][1] = (tag, given.get("id"))
        if tag == "svg":
            self.figures.append([given["aria-labelledby"], None])
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.links.append(value)
            elif name in ("clip-path", "style", "fill", "mask", "filter"):
                self.styles.append(value)
            assert not name.startswith("on")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if "style" in self.open else self.text).append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def reader():
    return _Reader


@pytest.fixture
def write_benchmark():
    return _write_benchmark


@pytest.fixture
def write_run():
    return _write_run
