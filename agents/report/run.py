"""A run folder of `asg train` as a report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.benchmark.drawing import draw_aggregates
from agents.benchmark.statistics import Interval
from agents.benchmark.wording import warnings
from agents.records import EPISODES, RIVAL
from agents.report.controllers import Judged, controller_section
from agents.report.figures import draw_learning
from agents.report.page import (
    Page,
    Picture,
    Section,
    Table,
    TableRow,
    difference,
    interval,
    number,
    provenance_facts,
)
from agents.result_files import read_json, read_training, whole
from agents.results import FEW_SEEDS, IN_WORDS, footnote, percent
from asg_env.validation import ConfigError
from asg_env.yaml_files import read_yaml

CURVES = {  # of `metrics.jsonl`
    "return": "mean return",
    "accuracy": "{metric} on outer_valid\nat the end",
    "entropy": "entropy [nats per group]",
}


def run_page(folder: Path, name: str) -> Page:
    """Collect the report of a finished run.

    Args:
        folder: Of the run.
        name: What to call it.

    Raises:
        ConfigError: It is not finished, or a file is damaged.
    """
    config = read_yaml(folder / "config.yaml")
    judged = (folder / "results.json").is_file()
    if not judged and not (folder / "schedule.json").is_file():
        raise ConfigError(
            f"{folder} holds a run that is not finished; go on with `asg train` --resume, or judge "
            f"it as it is with `asg evaluate` {folder}"
        )
    with whole(folder / "config.yaml", "give the --out of `asg train` or `asg benchmark`"):
        env, agent = config["env"], config["agent"]
        metric = IN_WORDS[env.get("metric", "accuracy")]
        facts = [
            ("Task", f"{env['id']}, instances {env['instances']}, optimizer {env['optimizer']}"),
            ("Agent", f"{Path(agent['kind']).name}, observation {env['observation']}"),
        ]
    sections = []
    if judged:
        sections.append(_results(folder, facts))
    else:
        text = "No method was judged: the target domain has no labels to judge by."
        sections.append(Section("Results", [text]))
    sections.append(_learning(folder, metric))
    if judged:
        sections += _controllers(folder, str(env["optimizer"]), metric, name)
    if (folder / "provenance.json").is_file():
        path = folder / "provenance.json"
        facts += provenance_facts(read_json(path, (), "restore it from a copy"))
    about = "A learned learning-rate controller beside tuned baselines."
    return Page(name, about, facts, sections)


def _results(folder: Path, facts: list[tuple[str, str]]) -> Section:
    """Table, intervals and verdict of the comparison; adds its protocol to the facts."""
    path = folder / "results.json"
    again = f"repeat the comparison with `asg evaluate` {folder}"
    summary = read_json(path, ("protocol", "rows"), again)
    with whole(path, again):
        protocol = {"metric": "accuracy", **summary["protocol"]}
        metric, primary = IN_WORDS[protocol["metric"]], protocol["primary"]
        instances, seeds = len(protocol["instances"]), protocol["training_seeds"]
        facts += [
            ("Reward", str(protocol["reward"])),
            ("Judged on", f"{instances} unseen instances, {seeds} training seed(s)"),
            ("Test images", str(protocol["test_images"])),
            ("Statistic", f"{protocol['statistic']}, of test {metric}"),
            ("Interval", str(protocol["interval"])),
        ]
        rows = sorted(summary["rows"], key=lambda row: -row["accuracy"]["iqm"])
        # Few training seeds are said as a warning instead.
        said = footnote({**summary, "protocol": {**protocol, "training_seeds": FEW_SEEDS}})
        section = Section("Results", [said])
        units = [
            {
                "seeds": len(row["per_instance"]),
                "instances": instances,
                "kind": "agent" if _is_learned(row) else "rule",
            }
            for row in rows
        ]
        section.warnings = warnings({"methods": units})
        heads = ["method", f"test {metric} (IQM)", "95 % interval", "mean ± std", "diverged"]
        heads += ["n (seeds × instances)", "retention", "tuning episodes", f"{primary} minus this"]
        heads += ["setting"]
        table = [TableRow(_name(row), _is_learned(row), _cells(row)) for row in rows]
        section.table = Table("Methods; the best first", heads, table)
        names = {_name(row): Interval(*_bounds(row["accuracy"])) for row in rows}
        learned = [_name(row) for row in rows if _is_learned(row)]
        figure = draw_aggregates(names, learned, f"interquartile mean of test {metric}")
        caption = "Interquartile mean and 95 % interval."
        section.pictures = [Picture(figure, f"Test {metric} of every method", caption)]
    return section


def _name(row: Mapping[str, Any]) -> str:
    return str(row["name"]) + (" [reference]" if row["reference"] else "")


def _is_learned(row: Mapping[str, Any]) -> bool:
    return str(row["name"]).startswith("controller")


def _bounds(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    return estimate["iqm"], estimate["low"], estimate["high"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    estimate, minus = row["accuracy"], row.get("controller_minus_this")
    seeds, instances = len(row["per_instance"]), len(row["per_instance"][0])
    return [
        number(estimate["iqm"]),
        interval(estimate),
        f"{number(row['mean'])} ± {number(row['std_over_instances'])}",
        percent(row["diverged"]),
        f"{seeds * instances} ({seeds} × {instances})",
        number(row["retention"]),
        number(row["cost"]["episodes"], ",.0f"),
        "" if minus is None else difference(minus, "iqm"),
        str(row["setting"]),
    ]


def _learning(folder: Path, metric: str) -> Section:
    """Learning curves of every training seed."""
    section = Section("Learning curves")
    found = {}
    for path in sorted(folder.glob("seed-*"), key=lambda path: (len(path.name), path.name)):
        lines = read_training(path, "go on with `asg train` --resume")
        if lines:
            found[path.name.replace("-", " ")] = lines
    if not found:
        section.text.append("There is no record of a training: the policy was imported.")
    for key, label in CURVES.items():
        curves = {
            name: (
                np.array([line["episodes"] for line in lines], float),
                np.array([line[key] for line in lines], float),
            )
            for name, lines in found.items()
        }
        if any(np.nan_to_num(values).any() for _, values in curves.values()):
            words = label.format(metric=metric)
            heading = f"{words[0].upper()}{' '.join(words[1:].split())}"
            about = f"Learning curves: {heading} against episodes of training"
            section.pictures.append(Picture(draw_learning(curves, words), heading, "", about))
        elif found:  # nothing but zeros: the agent has none, or no label was read
            section.text.append(f"The training recorded no {key}.")
    return section


def _controllers(folder: Path, optimizer: str, metric: str, name: str) -> list[Section]:
    """What the controller does; the better of greedy and sampled actions first."""
    path = folder / EPISODES
    if not path.is_file():
        text = (
            "This run holds no record of what its controller did on test instances; "
            f"`asg evaluate {name}` adds it, and `asg report {name}` then draws it here."
        )
        return [Section("What the controller does", [text])]
    again = f"repeat the comparison with `asg evaluate` {folder}"
    values = read_json(path, ("layer_groups", "rows"), again)
    sections: list[Section] = []
    with whole(path, again):
        rows = {
            row["name"]: Judged(row["name"], sum(row["results"], []), len(row["results"]))
            for row in values["rows"]
        }
        rival = rows.pop(RIVAL, None)
        for judged in rows.values():
            part = controller_section(
                judged, judged.name, values["layer_groups"], rival, optimizer, metric
            )
            part.folded = bool(sections)
            sections.append(part)
    text = "Dashed curves: the static search." if rival else ""
    return [Section("What the controller does", [text] if text else [], sections=sections)]
