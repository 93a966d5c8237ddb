"""`asg compare`, the results: estimates, tested claims, tables."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.compare.plan import ClaimSettings
from agents.results import IN_WORDS
from agents.statistics import Estimate, bootstrap_iqm, bootstrap_values, score
from asg_env.core.evaluation import Metric
from asg_env.core.seeding import numpy_generator

SUMMARY_SEED = 0  # of resamples
FEW_UNITS = 20  # below it an interval is a rough one
# Key of a row and heading in the Markdown.
COLUMNS = (
    ("accuracy", "target {metric}"),
    ("retention", "retention"),
    ("hse_0", "HSE 0"),
    ("hse_1", "HSE 1"),
    ("hse_2", "HSE 2"),
    ("calibration_error", "ECE"),
)
Rows = Sequence[Mapping[str, Any]]


def correct_of(row: Mapping[str, Any]) -> np.ndarray:
    """Which test images are right, bool, (S, I, N)."""
    return np.array([[[c == "1" for c in r["correct"]] for r in seed] for seed in row["results"]])


def values_of(row: Mapping[str, Any], figure: str) -> np.ndarray:
    """A figure of each training, (S, I); NaN where it could not be measured."""

    def one(result: Mapping[str, Any]) -> float:
        if figure.startswith("hse_"):
            energies = result["energies"]
            return np.nan if energies is None else energies[int(figure[-1])]
        value = result[figure]
        return np.nan if value is None else float(value)

    return np.array([[one(result) for result in seed] for seed in row["results"]])


def estimate(
    row: Mapping[str, Any],
    figure: str,
    classes: tuple[np.ndarray, int] | None,
    minus: Mapping[str, Any] | None = None,
) -> Estimate | None:
    """Interquartile mean of a figure, or of its paired difference from another row.

    Args:
        row: A finished row.
        figure: `accuracy`, `retention`, `hse_0` to `hse_2`, `calibration_error`.
        classes: Each test image's class, and how many there are, if `accuracy` is to mean the mean
            per-class recall.
        minus: The row that is taken off.
    """
    other = "" if minus is None else str(minus["name"])
    generator = numpy_generator(SUMMARY_SEED, figure, row["name"], other)
    if figure == "accuracy":
        taken = None if minus is None else correct_of(minus)
        by_class, count = classes or (None, None)
        return bootstrap_iqm(correct_of(row), generator, taken, by_class, count)
    return bootstrap_values(
        values_of(row, figure),
        generator,
        None if minus is None else values_of(minus, figure),
        (-np.inf, np.inf) if figure.startswith("hse_") else (0.0, 1.0),
    )


def summarise(
    rows: Rows, claims: Sequence[ClaimSettings], metric: Metric, labels: np.ndarray, count: int
) -> dict[str, Any]:
    """Reduce finished rows to the numbers of `compare.json`.

    Args:
        rows: Finished rows.
        claims: What is tested; those about a row that is not there are left out, and listed.
        metric: What `accuracy` counts.
        labels: Each test image's class, (N,).
        count: Number of classes.
    """
    classes = (labels, count) if metric == "mean_recall" else None
    table = []
    for row in rows:
        flat = [result for seed in row["results"] for result in seed]
        correct = correct_of(row)
        entry: dict[str, Any] = {
            key: row[key]
            for key in ("name", "paper", "setting", "guidance", "controller", "reads_real_labels")
        }
        for figure, _ in COLUMNS:
            found = estimate(row, figure, classes)
            entry[figure] = None if found is None else found.to_dict()
        confusion = np.sum([result["confusion"] for result in flat], axis=0)
        entry |= {
            "overall_accuracy": float(correct.mean()),
            "mean_recall": float(score(correct, labels, count).mean()),
            "inner_steps": float(np.mean([result["inner_steps"] for result in flat])),
            "seconds": float(np.mean([result["seconds"] for result in flat])),
            "diverged": float(np.mean([result["diverged"] for result in flat])),
            "tuning": row["tuning"],
            "drifts": _mean_drifts(flat),
            "per_class_recall": [
                float(correct[..., labels == label].mean()) if (labels == label).any() else None
                for label in range(count)
            ],
            "confusion": confusion.tolist(),
            "per_instance": score(correct, *(classes or (None, None))).round(6).tolist(),
        }
        table.append(entry)
    by_name = {row["name"]: row for row in rows}
    tested, untested = [], []
    for claim in claims:
        if claim.better not in by_name or claim.worse not in by_name:
            untested.append(claim.claim)
            continue
        better, worse = by_name[claim.better], by_name[claim.worse]
        lower_is_better = claim.figure.startswith("hse_")
        ends = (worse, better) if lower_is_better else (better, worse)
        difference = _difference(ends[0], ends[1], claim.figure, classes)
        if difference is None:  # nothing to measure, or different numbers of training seeds
            untested.append(claim.claim)
            continue
        tested.append(
            {**claim.model_dump(), **difference.to_dict(), "verdict": _verdict(difference)}
        )
    return {"rows": table, "claims": tested, "claims_not_tested": untested, "metric": metric}


def _difference(
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    figure: str,
    classes: tuple[np.ndarray, int] | None,
) -> Estimate | None:
    seeds, others = len(left["results"]), len(right["results"])
    if others in (1, seeds):
        return estimate(left, figure, classes, minus=right)
    if seeds > 1:
        return None
    found = estimate(right, figure, classes, minus=left)
    return (
        None
        if found is None
        else Estimate(-found.value, -found.high, -found.low, found.seeds, found.instances)
    )


def _mean_drifts(results: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Mean over the trainings that ended finite, per layer group."""
    kept = [result["drifts"] for result in results if None not in result["drifts"]]
    if not kept:
        return [None] * len(results[0]["drifts"])
    means: list[float | None] = np.mean(kept, axis=0).tolist()
    return means


def _verdict(difference: Estimate) -> str:
    if difference.low > 0:
        return "holds"
    return "reversed" if difference.high < 0 else "not told apart"


def markdown(summary: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """The table, the claims and the recall of each class, as Markdown."""
    metric = IN_WORDS[summary["metric"]]
    headings = ["", "method", *(h.format(metric=metric) for _, h in COLUMNS)]
    headings += ["inner steps", "seconds", "diverged"]
    cells = []
    for number, row in enumerate(summary["rows"], start=1):
        name = f"{row['name']} ({row['setting']})"
        if row["controller"] and not row["reads_real_labels"]:
            name += " [no real label]"
        line = [str(number), name]
        for figure, _ in COLUMNS:
            digits = 4 if figure.startswith("hse_") else 3
            interval = figure in ("accuracy", "retention")
            line.append(_cell(row[figure], digits, interval, about["seeds"]))
        line += [f"{row['inner_steps']:.0f}", f"{row['seconds']:.2f}", f"{row['diverged']:.0%}"]
        cells.append(line)
    parts = [_caption(about), "", *_table(headings, cells), ""]
    if not any(row["controller"] for row in summary["rows"]):
        parts += ["No row of a learned controller: none was given (`--controller RUN`).", ""]
    claims = [
        [
            claim["claim"] + (" [original]" if claim["original"] else ""),
            claim["figure"].replace("_", " "),
            f"{claim['iqm']:+.3f} ({claim['low']:+.3f} to {claim['high']:+.3f})",
            claim["verdict"],
        ]
        for claim in summary["claims"]
    ]
    if claims:
        parts += ["Claims, as paired differences over the same instances; [original]: its table's."]
        parts += ["", *_table(["claim", "figure", "difference", "here"], claims), ""]
    if summary["claims_not_tested"]:
        parts += [f"Not tested: {'; '.join(summary['claims_not_tested'])}.", ""]
    count = len(summary["rows"][0]["per_class_recall"])
    recalls = [
        [row["name"], *("–" if r is None else f"{r:.2f}" for r in row["per_class_recall"])]
        for row in summary["rows"]
    ]
    parts += ["Share of each class's test images that is right:", ""]
    parts += [*_table(["method", *(str(c) for c in range(count))], recalls), ""]
    return "\n".join(parts)


def table_csv(summary: Mapping[str, Any]) -> str:
    """The table as CSV: a line a row, each estimate with its bounds."""
    out = io.StringIO()
    bounds = [f"{figure}{end}" for figure, _ in COLUMNS for end in ("", "_low", "_high")]
    plain = ("overall_accuracy", "mean_recall", "inner_steps", "seconds", "diverged")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "paper", "setting", *bounds, *plain])
    for row in summary["rows"]:
        figures = []
        for figure, _ in COLUMNS:
            found = row[figure] or {}
            figures += [found.get(end, "") for end in ("iqm", "low", "high")]
        writer.writerow(
            [row["name"], row["paper"], row["setting"], *figures, *(row[key] for key in plain)]
        )
    return out.getvalue()


def _caption(about: Mapping[str, Any]) -> str:
    text = (
        f"{about['task']}: {about['seeds']} unseen instances, {about['test_images']} test images. "
        "Interquartile means and, in brackets, 95 % intervals over instances (of a "
        "controller, training seeds too; of accuracy, test images too). What is in brackets behind "
        f"a name was chosen among candidates by {about['tune_on']} on {about['tuning_instances']} "
        "train instance(s); a rate beside a guidance weight is what the row that shares its rate "
        "was tuned to. HSE is the hyperspherical energy of test features (lower: more diverse), "
        "ECE the expected calibration error; both leave out instances where a training diverged: "
        "[n ...] are left. Seconds are of one training on one thread."
    )
    if about["seeds"] < FEW_UNITS:
        text += f" With {about['seeds']} instances the intervals are rough ones."
    return text


def _cell(found: Mapping[str, float] | None, digits: int, interval: bool, count: int) -> str:
    if found is None:
        return "–"
    text = f"{found['iqm']:.{digits}f}"
    if found["instances"] < count:
        text += f" [n {found['instances']}]"
    if not interval:
        return text
    return f"{text} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
