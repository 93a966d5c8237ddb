import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from agents import evaluate, statistics
from agents.benchmark import Benchmark, BenchmarkSettings
from agents.benchmark_results import summarise_benchmark, warnings
from agents.benchmark_table import MANIFEST, write_manifest
from agents.records import EPISODES, write_episodes
from agents.report import report_html
from agents.report_controllers import split_by_kind
from agents.report_figures import behaviour, common_limits, draw_behaviour, draw_learning
from agents.report_page import Names, number
from agents.report_svg import inline_svg, page_style
from asg_env.validation import ConfigError

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


def write_benchmark(root, kinds=KINDS, suites=("scale", "mixed"), seeds=5, count=40):
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


def write_run(root, names=("controller (greedy)", "controller (sampled)", "static search")):
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
        return write_benchmark(
            tmp_path_factory.mktemp("report") / "bench", FEW_KINDS, seeds=2, count=6
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def pages(benchmark, run):
    return {"benchmark": report_html(benchmark), "run": report_html(run)}


@pytest.fixture(scope="module")
def small_benchmark(tmp_path_factory):
    kinds = {name: KINDS[name] for name in ("es", "cosine")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", 50)
        root = tmp_path_factory.mktemp("report") / "small"
        return write_benchmark(root, kinds, ("scale",), seeds=2, count=3)


@pytest.fixture
def own_benchmark(small_benchmark, tmp_path):
    return Path(shutil.copytree(small_benchmark, tmp_path / "small"))


@pytest.fixture
def own_run(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


class Reader(HTMLParser):
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


# The page as a whole


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_page_refers_to_nothing_outside_itself(pages, kind):
    page = Reader(pages[kind])
    assert not {"link", "script", "img", "image", "iframe", "object", "base"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    styles = " ".join(page.styles)
    assert "@import" not in styles
    assert all(re.fullmatch(r"url\(#[^)]+\)", url) for url in re.findall(r"url\([^)]*\)", styles))
    assert set(re.findall(r"url\(#([^)]+)\)", styles)) <= set(page.ids)
    assert "default-src 'none'" in pages[kind]


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_every_id_is_there_once_and_every_figure_is_named(pages, kind):
    page = Reader(pages[kind])
    assert len(page.ids) == len(set(page.ids))
    assert len(page.figures) > 5
    assert all(first == ("title", named_by) for named_by, first in page.figures)
    assert page.tags.count("figcaption") == len(page.figures)
    assert page.tags.count("h1") == page.tags.count("main") == 1


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_no_word_of_the_page_is_a_missing_number(pages, kind):
    words = re.findall(r"[\w.]+", Reader(pages[kind]).words().lower())
    assert not {"nan", "inf", "none", "null"} & set(words)


def test_same_results_give_the_same_bytes(asg, own_benchmark, own_run, tmp_path):
    for folder in (own_benchmark, own_run):
        assert asg("report", folder).status == 0
        again = asg("report", folder, "--out", tmp_path / "again.html")
        assert (again.status, again.err) == (0, "")
        written = (folder / "report.html").read_text(encoding="utf-8")
        assert written == (tmp_path / "again.html").read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("*.tmp"))


# Of a benchmark


def test_benchmark_page_holds_methods_numbers_and_warnings(benchmark, pages):
    words = Reader(pages["benchmark"]).words()
    summary = json.loads((benchmark / "results.json").read_text())
    assert len(summary["comparisons"]) == 4
    for comparison in summary["comparisons"]:
        said = warnings(comparison, summary["seeds"])
        assert len(said) == 2
        assert all(warning in words for warning in said)
        for entry in comparison["methods"]:
            assert f"{entry['iqm']['value']:.3f}" in words
            assert f"{entry['iqm']['low']:.3f} to {entry['iqm']['high']:.3f}" in words
            assert entry["method"] in words
    assert "12 (2 × 6)" in words
    assert "6 (1 × 6)" in words
    assert words.count("on test instances the agent") == 4
    assert "torch 2.15.0" in words


def test_benchmark_page_holds_every_kind_of_figure(pages):
    words = Reader(pages["benchmark"]).words()
    for heading in (
        "Test accuracy.",
        "Performance profiles.",
        "Probability of improvement.",
        "Optimality gap.",
        "Sample efficiency on scale.",
        "Transfer matrix.",
        "Low hidden scale (below 0.46).",
        "High hidden scale (above 2.15), adam.",
        "High hidden scale (above 2.15), sgd.",
    ):
        assert heading in words


def test_benchmark_page_unfolds_the_best_agent_alone(pages):
    folded = re.findall(r"<summary><h\d>(.*?)</h\d></summary>", pages["benchmark"])
    assert folded == ["es on scale", "es on mixed"]
    assert "reinforce on scale" in Reader(pages["benchmark"]).words()


def test_benchmark_page_names_what_is_missing(own_benchmark):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    for entry in summary["comparisons"][0]["methods"]:
        entry["seeds"] = 1
    path.write_text(json.dumps(summary))
    assert "es has 1 of 2 training seeds" in Reader(report_html(own_benchmark)).words()


def test_benchmark_page_holds_kinds_of_instances_where_there_are_several(pages):
    words = Reader(pages["benchmark"]).words()
    assert words.count("By kind of instance Test accuracy (IQM) of each kind") == 2
    assert "method optimizer adam (3) optimizer sgd (3)" in words


def test_benchmark_page_names_the_metric(own_benchmark):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    for comparison in summary["comparisons"]:
        comparison["metric"] = "mean_recall"
    path.write_text(json.dumps(summary))
    words = Reader(report_html(own_benchmark)).words()
    assert "test mean per-class recall (IQM)" in words
    assert "Test mean per-class recall." in words
    assert "Share of runs above each mean per-class recall" in words
    assert "Mean per-class recall on real validation images at the end of training" in words
    assert "accuracy" not in words.replace("loss and accuracy over", "").lower()


def test_benchmark_page_says_which_agents_have_no_curve(own_benchmark):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    summary["sample_efficiency"]["scale"] = {}
    summary["without_curve"] = {"scale": {"es": "nothing was measured"}}
    path.write_text(json.dumps(summary))
    words = Reader(report_html(own_benchmark)).words()
    assert "Without a curve of sample efficiency: es on scale (nothing was measured)." in words
    assert "Sample efficiency on scale." not in words


def test_results_of_older_versions_have_a_page(own_benchmark):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    del summary["without_curve"]
    for comparison in summary["comparisons"]:
        del comparison["metric"]
    path.write_text(json.dumps(summary))
    assert "test accuracy (IQM)" in Reader(report_html(own_benchmark)).words()


def interrupted(root):
    """A finished benchmark of two seeds, as it stood before the second seed of the agent."""
    (root / "results.json").unlink()
    (root / "scale" / "es" / "seed-1" / "selection.json").unlink()
    return root


def test_page_of_an_interrupted_benchmark_shows_what_is_finished(own_benchmark, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    assert "trials are finished" not in Reader(report_html(own_benchmark)).words()

    words = Reader(report_html(interrupted(own_benchmark))).words()

    assert "2 of 3 trials are finished; the numbers are of what is there." in words
    assert "es has 1 of 2 training seeds: the others failed or are still to be done" in words
    assert "3 (1 × 3)" in words
    assert "3 runs of 1 training seed(s)" in words
    assert "Sample efficiency on scale." in words
    assert not (own_benchmark / "results.json").exists()


def test_interrupted_benchmark_whose_suites_are_gone_gives_a_sentence(fails, own_benchmark):
    interrupted(own_benchmark)
    path = own_benchmark / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["settings"]["suites"] = ["/nowhere/scale.yaml"]
    path.write_text(json.dumps(manifest))
    message = fails("report", own_benchmark)
    assert f"{path} holds settings that cannot be used: " in message
    assert "/nowhere/scale.yaml" in message


def test_damaged_result_of_an_interrupted_benchmark_is_named(fails, own_benchmark):
    path = interrupted(own_benchmark) / "scale/cosine/seed-0/test-scale.json"
    path.write_text("{")
    assert str(path) in fails("report", own_benchmark)


def test_benchmark_of_which_nothing_is_judged_is_refused_with_a_command(fails, own_benchmark):
    for path in interrupted(own_benchmark).glob("scale/*/seed-*/selection.json"):
        path.unlink()
    message = fails("report", own_benchmark)
    assert f"{own_benchmark} holds a benchmark of which nothing is judged yet; go on " in message
    assert f"`asg benchmark NAME --out {own_benchmark} --resume`" in message


def test_older_benchmark_has_numbers_for_layer_groups(own_benchmark):
    for path in own_benchmark.glob("*/*/seed-*/test-*.json"):
        values = json.loads(path.read_text())
        del values["layer_groups"]
        path.write_text(json.dumps(values))
    words = Reader(report_html(own_benchmark)).words()
    assert "group 5" in words
    assert "conv1" not in words


def test_benchmark_without_agents_or_baselines_has_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    for kinds in ({"cosine": "rule"}, {"es": "agent"}):
        root = write_benchmark(tmp_path / next(iter(kinds)), kinds, ("scale",), seeds=1, count=3)
        words = Reader(report_html(root)).words()
        assert "There are not both learned agents and tuned baselines" in words
        assert ("What the agents do" in words) == ("es" in kinds)


# Of a run


def test_run_page_holds_table_curves_and_heat_maps(pages):
    words = Reader(pages["run"]).words()
    for part in (
        "controller (greedy)",
        "static search",
        "0.450 to 0.550",
        "+0.020 (+0.010 to +0.030)",
        "2 training seed(s) say little",
        "1 x gain",
        "Mean return.",
        "Accuracy on outer_valid at the end.",
        "Entropy [nats per group].",
        "seed 1",
        "Middle hidden scale (0.46 to 2.15).",
        "conv4",
        "Dashed curves: the static search.",
    ):
        assert part in words
    assert re.findall(r"<summary><h\d>(.*?)</h\d>", pages["run"]) == ["controller (sampled)"]


def test_older_run_has_a_page_that_says_how_to_add_heat_maps(own_run):
    (own_run / EPISODES).unlink()
    page = report_html(own_run)
    assert "<code>asg evaluate run</code> adds it" in page
    assert "hidden scale" not in Reader(page).words()


def test_run_without_labels_of_the_target_has_a_page(own_run):
    (own_run / "results.json").unlink()
    (own_run / EPISODES).unlink()
    (own_run / "schedule.json").write_text("{}")
    words = Reader(report_html(own_run)).words()
    assert "no labels to judge by" in words
    assert "Mean return." in words


def test_run_whose_reward_reads_no_label_has_a_page(own_run):
    for path in own_run.glob("seed-*/metrics.jsonl"):
        lines = [{**json.loads(line), "accuracy": 0.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = json.loads((own_run / EPISODES).read_text())
    for row in values["rows"]:
        for episode in (episode for seed in row["results"] for episode in seed):
            episode["outer_valid"] = []
    (own_run / EPISODES).write_text(json.dumps(values))
    words = Reader(report_html(own_run)).words()
    assert "The training recorded no accuracy." in words
    assert "The reward reads no real label" in words
    assert "accuracy at the end" not in words


def test_names_are_text_whatever_they_hold(tmp_path):
    name = '<b onclick="x">&amp;$a$ \x01'
    root = write_run(tmp_path / "<i>run & $x$", ("controller (greedy)", name))
    values = json.loads((root / EPISODES).read_text())
    values["layer_groups"][0] = "<u>&"
    (root / EPISODES).write_text(json.dumps(values))
    page = report_html(root)
    reader = Reader(page)
    assert not {"i", "u"} & set(reader.tags)
    assert "<i>run & $x$" in reader.words()
    assert '<b onclick="x">&amp;$a$' in reader.words()
    assert "<u>&" in reader.text


# Mistakes


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("results.json", "{"),
        ("results.json", "[1]"),
        ("results.json", "{}"),
        ("manifest.json", "["),
        ("scale/es/seed-0/test-scale.json", "{"),
        ("scale/es/seed-0/test-scale.json", '{"results": [{}]}'),
        ("scale/es/config.yaml", "["),
    ],
)
def test_damaged_benchmark_gives_a_sentence(fails, own_benchmark, file, text):
    (own_benchmark / file).write_text(text)
    message = fails("report", own_benchmark)
    assert str(own_benchmark / file.partition("/seed-0")[0]) in message
    assert not (own_benchmark / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("results.json", "{"),
        ("results.json", '{"protocol": {}, "rows": []}'),
        ("results.json", '{"protocol": 3, "rows": 4}'),
        ("config.yaml", "env: {}"),
        ("config.yaml", "3"),
        ("provenance.json", "3"),
        ("episodes.json", "{}"),
        ("episodes.json", '{"layer_groups": ["a"], "rows": [{"name": "x", "results": [[{}]]}]}'),
        ("seed-0/metrics.jsonl", "x\n"),
        ("seed-0/metrics.jsonl", "{}\n"),
    ],
)
def test_damaged_run_gives_a_sentence(fails, own_run, file, text):
    (own_run / file).write_text(text)
    assert str(own_run / file) in fails("report", own_run)


def test_wrong_folders_give_a_sentence(fails, own_run, tmp_path):
    assert "neither a run nor a benchmark" in fails("report", tmp_path)
    assert "neither a run nor a benchmark" in fails("report", tmp_path / "nowhere")
    (own_run / "results.json").unlink()
    assert "not finished" in fails("report", own_run)


def test_out_that_cannot_be_written_gives_a_sentence(fails, own_run, tmp_path):
    assert "must be a file that ends in .html" in fails(
        "report", own_run, "--out", own_run / "results.json"
    )
    (tmp_path / "folder.html").mkdir()
    assert "must be a file" in fails("report", own_run, "--out", tmp_path / "folder.html")
    assert "choose another" in fails("report", own_run, "--out", tmp_path / "none" / "a.html")


# Parts


def test_episodes_are_kept_of_controllers_and_the_static_search(make_episode, tmp_path):
    episode = make_episode([0.1] * 3, accuracy=[0.2, 0.3, 0.4], diverged=True)
    episode = dataclasses.replace(episode, ce=np.array([1.0, 2.0, np.inf]))
    result = evaluate.TestResult(episode, np.array([True, False]), recall=0.5, retention=None)
    names = ("controller (greedy)", "static search", "uniform")
    write_episodes([evaluate.Row(name, "", [[result]]) for name in names], ["head"], tmp_path)
    values = json.loads((tmp_path / EPISODES).read_text(), parse_constant=pytest.fail)
    assert [row["name"] for row in values["rows"]] == list(names[:2])
    assert values["layer_groups"] == ["head"]
    ((record,),) = values["rows"][0]["results"]
    assert record["ce"] == [1.0, 2.0, None]
    assert record["outer_valid"] == [0.2, 0.3, 0.4]
    assert (record["accuracy"], record["diverged"]) == (0.5, True)


def episode(scale=1.0, multiplier=0.1, steps=2, of=2, **changes):
    return {
        "instance": {"base_lr_scale": scale},
        "multipliers": [[multiplier, 0.0]] * steps,
        "progress": (np.arange(steps + 1) / of).tolist(),
        "ce": [1.0] * steps,
        "outer_valid": [0.5] * steps,
        "diverged": False,
        **changes,
    }


def test_behaviour_averages_logarithms_and_counts_divergence():
    left = episode(multiplier=0.01)
    lost = episode(multiplier=1.0, steps=1, diverged=True, ce=[None])
    shown = behaviour([left, left, lost])
    np.testing.assert_allclose(shown.log_multipliers, [[-4 / 3, -3], [-2, -3]])
    np.testing.assert_allclose(shown.ce.median, [1, 1])
    np.testing.assert_allclose(shown.accuracy.median, [0.5, 0.5])
    np.testing.assert_allclose(shown.accuracy.low, [0.5, 0.25])  # a diverged run scores 0
    assert (shown.runs, shown.diverged) == (3, pytest.approx(1 / 3))


def test_behaviour_puts_horizons_on_common_windows_and_thins_out_many():
    shown = behaviour([episode(steps=4, of=4), episode(multiplier=1.0)])
    assert shown.log_multipliers.shape == (4, 2)
    np.testing.assert_allclose(shown.log_multipliers[:, 0], -0.5)
    assert behaviour([episode(steps=500, of=500)]).log_multipliers.shape == (40, 2)


def test_behaviour_of_runs_that_all_diverged_is_drawn():
    lost = episode(steps=1, diverged=True, ce=[None])
    shown = behaviour([lost, lost])
    figure = draw_behaviour(shown, "agent", ["a", "head"], common_limits([shown]))
    with page_style():
        assert "nan" not in inline_svg(figure, "f", "all diverged").lower()


def test_heat_map_needs_a_name_for_each_group():
    shown = behaviour([episode()])
    with pytest.raises(ValueError, match="must be 2 names, got 1"):
        draw_behaviour(shown, "agent", ["a"], common_limits([shown]))
    with pytest.raises(ValueError, match="no episode"):
        behaviour([])


def test_instances_are_split_by_scale_and_by_optimizer():
    assert list(split_by_kind([episode()], "sgd")) == ["hidden scale 1"]
    three = [episode(scale) for scale in (0.1, 1.0, 10.0, 9.0)]
    assert [len(found) for found in split_by_kind(three, "sgd").values()] == [1, 1, 2]
    three[0]["instance"]["optimizer"] = "adam"
    assert list(split_by_kind(three, "sgd")) == [
        "low hidden scale (below 0.46), adam",
        "middle hidden scale (0.46 to 2.15), sgd",
        "high hidden scale (above 2.15), sgd",
    ]


def test_one_figure_twice_has_ids_of_its_own():
    with page_style():
        figure = draw_learning({"seed 0": (np.arange(3), np.array([0, np.nan, 1]))}, "return")
        first, second = (inline_svg(figure, name, "a < b") for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert first.replace("one-", "two-") == second
    assert '<title id="one-title">a &lt; b</title>' in first
    assert "font-family" not in first


def test_learning_curves_need_a_curve():
    with pytest.raises(ValueError, match="no curve"):
        draw_learning({}, "return")


def test_names_are_given_once():
    names = Names("top")
    given = [names.give(text) for text in ("Top", "a b", "A  b!", "a-b-2", "§")]
    assert given == ["top-2", "a-b", "a-b-2", "a-b-2-2", "part"]


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_a_number_that_is_missing_is_a_dash(value):
    assert number(value) == "–"


def test_mistakes_are_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        report_html(tmp_path)


# In a browser


def find_browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            return None
        with sync_playwright() as playwright:
            path = playwright.chromium.executable_path
        found = path if Path(path).exists() else None
    return found


def look(page, tmp_path):
    """Open a page at 360 px; return the width that it takes, and what the browser logs."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="page" src="{page.as_uri()}" width="360" height="700"></iframe><p id="width">'
        "</p><script>page.onload = () => { const inside = page.contentDocument; "
        "inside.querySelectorAll('details').forEach(part => part.open = true); "
        "width.textContent = inside.documentElement.scrollWidth }</script>"
    )
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    width = re.search(r'<p id="width">(\d+)</p>', done.stdout)
    assert width is not None, done.stderr
    return int(width[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(find_browser() is None, reason="there is no Chromium here")
def test_page_fits_a_telephone(pages, tmp_path):
    for kind, page in pages.items():
        path = tmp_path / f"{kind}.html"
        path.write_text(page, encoding="utf-8")
        assert look(path, tmp_path) == (360, [])
    wide = tmp_path / "wide.html"  # the check sees what it is to see
    page = pages["run"].replace("<main>", '<main><img src="x.png"><p style="width: 500px">wide</p>')
    wide.write_text(page, encoding="utf-8")
    width, logged = look(wide, tmp_path)
    assert width > 360
    assert len(logged) == 1
