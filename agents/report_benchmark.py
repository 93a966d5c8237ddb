"""A benchmark folder as a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.benchmark_results import figures, ordered, title, verdict, warnings
from agents.benchmark_table import MANIFEST
from agents.report_controllers import Judged, controller_section
from agents.report_files import provenance_facts, read_json, whole
from agents.report_page import (
    Page,
    Picture,
    Section,
    Table,
    TableRow,
    difference,
    interval,
    number,
)
from agents.trials import test_file
from asg_env.validation import ConfigError
from asg_env.yaml_files import read_yaml

KEYS = ("suites", "comparisons", "sample_efficiency", "episodes", "seeds", "test_instances")
# Of a comparison, by the end of its file's name: title and caption.
PICTURES = {
    "iqm": ("Test accuracy", "Interquartile mean and 95 % interval."),
    "profiles": (
        "Performance profiles",
        "Share of runs above each accuracy: learned agents and the three best others.",
    ),
    "improvement": (
        "Probability of improvement",
        "Chance that the best learned agent does better than each other method on an instance; at "
        "one half neither is better.",
    ),
    "gap": (
        "Optimality gap",
        "How far runs fall short of every image right, on average; lower is better.",
    ),
}


def benchmark_page(root: Path, name: str) -> Page:
    """Collect the report of a finished benchmark.

    Args:
        root: Its folder.
        name: What to call it.

    Raises:
        ConfigError: It is not finished, or a file is damaged.
    """
    path = root / "results.json"
    again = f"repeat it with `asg benchmark` --out {root} --resume"
    if not path.is_file():
        raise ConfigError(f"{root} holds a benchmark that is not finished; {again}")
    manifest = read_json(root / MANIFEST, (), "restore it from a copy")
    summary = read_json(path, KEYS, again)
    with whole(path, again):
        if not summary["comparisons"]:
            raise ConfigError(f"{root} holds a benchmark without results; {again}")
        drawn = figures(summary)
        sections = [_comparison(one, summary, drawn) for one in summary["comparisons"]]
        sections += _others(summary, drawn)
        sections += [
            _controllers(root, one)
            for one in summary["comparisons"]
            if one["suite"] == one["tested_on"] and one["best"]["agent"] is not None
        ]
        facts = [
            ("Training", f"{summary['episodes']} episodes, {summary['seeds']} training seed(s)"),
            ("Judged on", f"{summary['test_instances']} unseen test instances of each suite"),
            ("Suites", ", ".join(f"{k} (version {v})" for k, v in summary["suites"].items())),
            ("Statistic", str(summary.get("statistic", ""))),
            ("Interval", str(summary.get("interval", ""))),
            *provenance_facts(manifest.get("provenance")),
        ]
    about = "Learned learning-rate controllers beside tuned baselines, with equal budgets."
    return Page(name, about, [(key, value) for key, value in facts if value], sections)


def _comparison(
    comparison: Mapping[str, Any], summary: Mapping[str, Any], drawn: Mapping[str, Any]
) -> Section:
    name = title(dict(comparison))
    own = comparison["suite"] == comparison["tested_on"]
    heading = f"Results on {name}" if own else f"{name[0].upper()}{name[1:]}"
    section = Section(heading, [verdict(dict(comparison))])
    section.warnings = [
        *warnings(dict(comparison), summary["seeds"]),
        *_missing(comparison, summary["seeds"]),
    ]
    section.table = _table(comparison)
    where = comparison["suite"]
    if comparison["tested_on"] != where:
        where += f"-to-{comparison['tested_on']}"
    for kind, (shows, caption) in PICTURES.items():
        if f"{where}-{kind}" in drawn:
            figure = drawn[f"{where}-{kind}"]
            section.pictures.append(Picture(figure, shows, caption, f"{shows}, {name}"))
    return section


def _missing(comparison: Mapping[str, Any], seeds: int) -> list[str]:
    """Methods that were not judged for every training seed."""
    return [
        f"{entry['method']} has {entry['seeds']} of {seeds} training seeds: the others failed or "
        "are still to be done"
        for entry in comparison["methods"]
        if entry["kind"] in ("agent", "search") and entry["seeds"] < seeds
    ]


def _table(comparison: Mapping[str, Any]) -> Table:
    best = comparison["best"]["agent"]
    heads = ["method", "test accuracy (IQM)", "95 % interval"]
    if best is not None:
        heads += [f"{best} minus this", f"chance that {best} is better"]
    heads += ["mean", "diverged", "n (seeds × instances)", "retention", "optimality gap"]
    heads += ["episodes", "inner steps", "on train instances", "setting"]
    rows = []
    for entry in ordered(dict(comparison)):
        seeds, instances, cost = entry["seeds"], entry["instances"], entry["cost"]
        cells = [number(entry["iqm"]["value"]), interval(entry["iqm"])]
        if best is not None:
            minus = entry.get("best_agent_minus_this")
            chance = entry.get("chance_that_best_agent_is_better")
            cells += ["" if minus is None else difference(minus)]
            cells += ["" if chance is None else number(chance["value"], ".2f")]
        cells += [
            number(entry["mean"]),
            number(entry["diverged"], ".0%"),
            f"{seeds * instances} ({seeds} × {instances})",
            number(entry["retention"]),
            number(entry["optimality_gap"]["value"]),
            number(cost["episodes"], ",.0f"),
            number(cost["inner_steps"], ",.0f"),
            number(entry["on_train_instances"]),
            "; ".join(entry["settings"]),
        ]
        rows.append(TableRow(entry["method"], entry["kind"] == "agent", cells))
    return Table(f"Methods, {title(dict(comparison))}; the best first", heads, rows)


def _others(summary: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[Section]:
    """Sample efficiency and transfer."""
    learning = Section(
        "Sample efficiency",
        [
            "Accuracy on real validation images at the end of training episodes, against the inner "
            "steps spent on training: the interquartile mean over training seeds with its interval."
        ],
    )
    for suite in summary["sample_efficiency"]:
        if f"{suite}-efficiency" in drawn:
            figure = drawn[f"{suite}-efficiency"]
            learning.pictures.append(Picture(figure, f"Sample efficiency on {suite}"))
    transfer = Section("Transfer", ["Agents on suites that they were not trained on."])
    if "transfer" in drawn:
        caption = "A dash: an agent that cannot act there."
        transfer.pictures.append(Picture(drawn["transfer"], "Transfer matrix", caption))
    return [section for section in (learning, transfer) if section.pictures]


def _controllers(root: Path, comparison: Mapping[str, Any]) -> Section:
    """What every learned agent does on the suite it was trained on, the best one first."""
    suite, best = comparison["suite"], comparison["best"]
    section = Section(
        f"What the agents do on {suite}",
        [f"{best['agent']} is the best learned agent by train instances."],
    )
    rival = None
    if best["baseline"] is not None:
        rival, _ = _judged(root, suite, best["baseline"])
        section.text.append(f"Dashed curves: {rival.name}, the best baseline by train instances.")
    learned = [e["method"] for e in ordered(dict(comparison)) if e["kind"] == "agent"]
    for method in sorted(learned, key=lambda name: name != best["agent"]):
        shown, groups = _judged(root, suite, method)
        if not shown.episodes:
            continue
        env = read_yaml(root / suite / method / "config.yaml").get("env", {})
        of = str(env.get("optimizer", "sgd"))
        with whole(root / suite / method, "repeat the benchmark"):
            part = controller_section(shown, f"{method} on {suite}", groups, rival, of)
        part.folded = method != best["agent"]
        section.sections.append(part)
    return section


def _judged(root: Path, suite: str, method: str) -> tuple[Judged, list[str]]:
    """Read a method's episodes on its own suite, and the names of the layer groups."""
    again = "delete it, and repeat the benchmark with --resume"
    episodes: list[Mapping[str, Any]] = []
    groups: list[str] = []
    seeds = 0
    for folder in sorted((root / suite / method).glob("seed-*")):
        path = test_file(folder, suite)
        if path.is_file():
            values = read_json(path, ("results",), again)
            episodes += values["results"]
            groups = values.get("layer_groups", [])
            seeds += 1
    return Judged(method, episodes, seeds), groups
