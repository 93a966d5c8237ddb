"""A benchmark folder as a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.benchmark.figures import TRANSFER, figures
from agents.benchmark.plan import Benchmark, BenchmarkSettings
from agents.benchmark.presentation import RESULTS
from agents.benchmark.results import summarise_benchmark
from agents.benchmark.table import MANIFEST, SELECTION, TABLE, read_manifest, read_results
from agents.benchmark.trials import is_done, test_file
from agents.benchmark.wording import (
    figure_prefix,
    kinds_table,
    metric_in_words,
    ordered,
    title,
    verdict,
    warnings,
    without_curve,
)
from agents.report.controllers import Judged, controller_section
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
from agents.result_files import read_json, whole
from agents.results import percent
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import read_yaml

KEYS = ("suites", "comparisons", "sample_efficiency", "episodes", "seeds", "test_instances")
# Of a comparison, by the end of its file's name: title and caption.
PICTURES = {
    "iqm": ("Test {metric}", "Interquartile mean and 95 % interval."),
    "profiles": (
        "Performance profiles",
        "Share of runs above each {metric}: learned agents and the three best others.",
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
    """Collect the report of a benchmark; of one that was interrupted, what there is.

    Args:
        root: Its folder.
        name: What to call it.

    Raises:
        ConfigError: Nothing is judged yet, or a file is damaged.
    """
    path = root / RESULTS
    again = f"repeat it with `asg benchmark` --out {root} --resume"
    manifest = read_manifest(root)
    about = "Learned learning-rate controllers beside tuned baselines, with equal budgets."
    if path.is_file():
        summary = read_json(path, KEYS, again)
    else:
        benchmark = _benchmark(root, manifest)
        with whole(root, again):
            summary = summarise_benchmark(read_results(root), benchmark, root)
        trials = benchmark.trials()
        done = sum(is_done(benchmark, trial, root) for trial in trials)
        about += f" {done} of {len(trials)} trials are finished; the numbers are of what is there."
        path = root
    with whole(path, again):
        if not summary["comparisons"]:
            table = root / TABLE
            if table.is_file() and len(table.read_text(encoding="utf-8").splitlines()) > 1:
                raise ConfigError(
                    f"{root} holds the table of a benchmark without the files of its trials, of "
                    "which the page is made; give the folder that `asg benchmark` wrote"
                )
            raise ConfigError(
                f"{root} holds a benchmark of which nothing is judged yet; go on with "
                f"`asg benchmark NAME --out {root} --resume`"
            )
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
    return Page(name, about, [(key, value) for key, value in facts if value], sections)


def _benchmark(root: Path, manifest: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark that a folder was last worked at with."""
    try:
        return Benchmark(validate(BenchmarkSettings, manifest["settings"], "settings"))
    except ConfigError as error:
        raise ConfigError(
            f"{root / MANIFEST} holds settings that cannot be used: {error}"
        ) from None


def _comparison(
    comparison: Mapping[str, Any], summary: Mapping[str, Any], drawn: Mapping[str, Any]
) -> Section:
    name, metric = title(comparison), metric_in_words([comparison])
    own = comparison["suite"] == comparison["tested_on"]
    heading = f"Results on {name}" if own else f"{name[0].upper()}{name[1:]}"
    section = Section(heading, [verdict(comparison)])
    section.warnings = [
        *warnings(comparison),
        *_missing(comparison, summary["seeds"]),
    ]
    section.table = _table(comparison, metric)
    for kind, texts in PICTURES.items():
        figure = drawn.get(f"{figure_prefix(comparison)}-{kind}")
        if figure is not None:
            shows, caption = (text.format(metric=metric) for text in texts)
            section.pictures.append(Picture(figure, shows, caption, f"{shows}, {name}"))
    heads, cells = kinds_table(comparison)
    if heads:
        text = (
            f"Test {metric} (IQM) of each kind of instance alone, in brackets how many there are. "
            "The IQM of all drops the worst quarter, so a failure on one kind can hide in it."
        )
        rows = [_row(entry, cells[entry["method"]]) for entry in ordered(comparison)]
        table = Table(f"Kinds of instance, {name}; the best method first", heads, rows)
        section.sections.append(Section("By kind of instance", [text], table=table))
    return section


def _row(entry: Mapping[str, Any], cells: Sequence[str]) -> TableRow:
    return TableRow(entry["method"], entry["kind"] == "agent", cells)


def _missing(comparison: Mapping[str, Any], seeds: int) -> list[str]:
    """Methods that were not judged for every training seed."""
    return [
        f"{entry['method']} has {entry['seeds']} of {seeds} training seeds: the others failed or "
        "are still to be done"
        for entry in comparison["methods"]
        if entry["kind"] in ("agent", "search") and entry["seeds"] < seeds
    ]


def _table(comparison: Mapping[str, Any], metric: str) -> Table:
    best = comparison["best"]["agent"]
    heads = ["method", f"test {metric} (IQM)", "95 % interval"]
    if best is not None:
        heads += [f"{best} minus this", f"chance that {best} is better"]
    heads += ["mean", "diverged", "n (seeds × instances)", "retention", "optimality gap"]
    heads += ["episodes", "inner steps", "on train instances", "setting"]
    rows = []
    for entry in ordered(comparison):
        seeds, instances, cost = entry["seeds"], entry["instances"], entry["cost"]
        cells = [number(entry["iqm"]["value"]), interval(entry["iqm"])]
        if best is not None:
            minus = entry.get("best_agent_minus_this")
            chance = entry.get("chance_that_best_agent_is_better")
            cells += ["" if minus is None else difference(minus)]
            cells += ["" if chance is None else number(chance["value"], ".2f")]
        cells += [
            number(entry["mean"]),
            percent(entry["diverged"]),
            f"{seeds * instances} ({seeds} × {instances})",
            number(entry["retention"]),
            number(entry["optimality_gap"]["value"]),
            number(cost["episodes"], ",.0f"),
            number(cost["inner_steps"], ",.0f"),
            number(entry["on_train_instances"]),
            "; ".join(entry["settings"]),
        ]
        rows.append(_row(entry, cells))
    return Table(f"Methods, {title(comparison)}; the best first", heads, rows)


def _others(summary: Mapping[str, Any], drawn: Mapping[str, Any]) -> list[Section]:
    """Sample efficiency and transfer."""
    trained = summary["sample_efficiency"]
    metric = metric_in_words(c for c in summary["comparisons"] if c["tested_on"] in trained)
    learning = Section(
        "Sample efficiency",
        [
            f"{metric[0].upper()}{metric[1:]} on real validation images at the end of training "
            "episodes, against the inner steps spent on training: the interquartile mean over "
            "training seeds with its interval."
        ],
    )
    missing = without_curve(summary)
    learning.text += [missing] if missing else []
    for suite in trained:
        if f"{suite}-efficiency" in drawn:
            figure = drawn[f"{suite}-efficiency"]
            learning.pictures.append(Picture(figure, f"Sample efficiency on {suite}"))
    transfer = Section("Transfer", ["Agents on suites that they were not trained on."])
    if TRANSFER in drawn:
        caption = "A dash: an agent that cannot act there."
        transfer.pictures.append(Picture(drawn[TRANSFER], "Transfer matrix", caption))
    shown = [learning] if learning.pictures or missing else []
    return [*shown, transfer] if transfer.pictures else shown


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
    learned = [e["method"] for e in ordered(comparison) if e["kind"] == "agent"]
    for method in sorted(learned, key=lambda name: name != best["agent"]):
        shown, groups = _judged(root, suite, method)
        if not shown.episodes:
            continue
        env = read_yaml(root / suite / method / "config.yaml").get("env", {})
        of = str(env.get("optimizer", "sgd"))
        with whole(root / suite / method, "repeat the benchmark"):
            part = controller_section(
                shown, f"{method} on {suite}", groups, rival, of, metric_in_words([comparison])
            )
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
        if path.is_file() and (folder / SELECTION).is_file():  # finished, as all in the tables
            values = read_json(path, ("results",), again)
            episodes += values["results"]
            groups = values.get("layer_groups", [])
            seeds += 1
    return Judged(method, episodes, seeds), groups
