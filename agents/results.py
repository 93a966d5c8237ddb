"""The comparison as a table: in the terminal and in Markdown."""

from typing import Any

from rich.table import Table

from agents.baselines import FAMILIES
from agents.experiment import Experiment
from agents.protocol import MODE_INSTANCES, reads_real_labels

IN_WORDS = {"accuracy": "accuracy", "mean_recall": "mean per-class recall"}  # metrics
HEADINGS = (
    "method",
    "test {metric} (IQM)",
    "95 % interval",
    "mean ± std",
    "overall accuracy",
    "retention",
    "diverged",
    "tuning episodes",
    "controller minus this",
)
FEW_SEEDS = 5  # below this the footnote warns


def episodes_of_comparison(experiment: Experiment, groups: int) -> int:
    """Training runs that tuning, searches and the final comparison take."""
    train = experiment.train
    tuning = sum(len(family(groups)) for family in FAMILIES.values()) * train.tuning_instances
    searching = experiment.search_episodes > 0
    unknown = train.reference and experiment.env.instances == "unknown-scale"
    searches = (train.seeds + unknown) * experiment.search_episodes if searching else 0
    tuning += 2 * train.seeds * MODE_INSTANCES * reads_real_labels(experiment)
    rows = 2 * train.seeds + len(FAMILIES) + 1 + searching * (train.seeds + 2 * unknown)
    return tuning + searches + rows * train.test_instances


def percent(share: float) -> str:
    """A share in whole per cent; what is less than one, but there, is not called 0."""
    text = f"{share:.0%}"
    return "<1%" if share > 0 and text == "0%" else text


def _cells(entry: dict[str, Any]) -> list[str]:
    estimate = entry["accuracy"]
    difference = entry.get("controller_minus_this")
    name = entry["name"] + (f" {entry['setting']}" if entry["setting"] else "")
    return [
        name + (" [reference]" if entry["reference"] else ""),
        f"{estimate['iqm']:.3f}",
        f"{estimate['low']:.3f} to {estimate['high']:.3f}",
        f"{entry['mean']:.3f} ± {entry['std_over_instances']:.3f}",
        f"{entry['overall_accuracy']:.3f}",
        "–" if entry["retention"] is None else f"{entry['retention']:.3f}",
        percent(entry["diverged"]),
        str(entry["cost"]["episodes"]),
        ""
        if difference is None
        else f"{difference['iqm']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})",
    ]


def comparison_table(summary: dict[str, Any]) -> Table:
    """The comparison for a terminal of 100 columns, best first; references have a star.

    What each family was tuned to stands in the Markdown.
    """
    table = Table(title=_caption(summary), caption=footnote(summary))
    for index, heading in enumerate(("method", "IQM [95 %]", "mean", "div.", "controller - this")):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for entry in _ordered(summary):
        accuracy, difference = entry["accuracy"], entry.get("controller_minus_this")
        table.add_row(
            entry["name"] + ("*" if entry["reference"] else ""),
            f"{accuracy['iqm']:.3f} [{accuracy['low']:.3f} {accuracy['high']:.3f}]",
            f"{entry['mean']:.3f}",
            percent(entry["diverged"]),
            ""
            if difference is None
            else f"{difference['iqm']:+.3f} [{difference['low']:+.3f} {difference['high']:+.3f}]",
            style="bold" if entry["name"].startswith("controller") else None,
        )
    return table


def results_markdown(summary: dict[str, Any]) -> str:
    """The same as Markdown; overall accuracy has a column where it is not the metric itself."""
    metric = summary["protocol"]["metric"]
    rows = [[heading.format(metric=IN_WORDS[metric]) for heading in HEADINGS]]
    rows += [_cells(entry) for entry in _ordered(summary)]
    if metric == "accuracy":
        rows = [
            [cell for h, cell in zip(HEADINGS, row, strict=True) if h != "overall accuracy"]
            for row in rows
        ]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    table.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    lines = [_caption(summary), "", *table]
    return "\n".join([*lines, "", footnote(summary), ""])


def _ordered(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(summary["rows"], key=lambda entry: -entry["accuracy"]["iqm"])


def _caption(summary: dict[str, Any]) -> str:
    protocol = summary["protocol"]
    return (
        f"{len(protocol['instances'])} unseen instances, {protocol['training_seeds']} training "
        f"seed(s), {protocol['test_images']} test images; {IN_WORDS[protocol['metric']]}; "
        f"reward: {protocol['reward']}"
    )


def footnote(summary: dict[str, Any]) -> str:
    """Return in words what the table says, and how far to trust it."""
    verdicts: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for entry in summary["rows"]:
        difference = entry.get("controller_minus_this")
        if difference is None or entry["name"].startswith("controller"):
            continue
        key = (
            "above"
            if difference["low"] > 0
            else "below"
            if difference["high"] < 0
            else "not told apart from"
        )
        verdicts[key].append(entry["name"])
    parts = [f"{key} {', '.join(names)}" for key, names in verdicts.items() if names]
    primary, seeds = summary["protocol"]["primary"], summary["protocol"]["training_seeds"]
    text = (
        f"By the interval of the paired difference, {primary} is {'; '.join(parts)}. The "
        "interquartile mean drops the worst quarter of the runs: read the mean and the share that "
        "diverged beside it. A difference is the interquartile mean of paired differences."
    )
    if seeds < FEW_SEEDS:
        text += f" {seeds} training seed(s) say little about another training."
    return text
