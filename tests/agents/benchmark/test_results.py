"""Numbers and tables of a benchmark, from made-up trials."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from agents import statistics
from agents.benchmark.figures import figures
from agents.benchmark.presentation import results_markdown, terminal_table, write_results
from agents.benchmark.results import summarise_benchmark
from agents.benchmark.wording import kinds_table, metric_in_words, warnings, without_curve
from agents.statistics import interquartile_mean
from asg_env.validation import ConfigError

COUNT = 8  # test instances
TRANSFER = ({"width": 2.0}, {"optimizer": "adam"}, {"classes": [0, 1, 2, 3, 4]}, {})


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)


def records(level=0.5, kinds=({},), **changes):
    """Records of test instances whose kinds take turns."""
    return [
        {
            "instance": {"task": "T", "head_seed": i, "data_seed": i, **kinds[i % len(kinds)]},
            "accuracy": level + i / 100,
            "mean_recall": level / 2 + i / 100,
            "retention": 0.9,
            "diverged": False,
            **changes,
        }
        for i in range(COUNT)
    ]


def write_metrics(folder, accuracies=(0.2, 0.3, 0.4), steps=100):
    lines = [json.dumps({"inner_steps": steps, "accuracy": one}) + "\n" for one in accuracies]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")


def write_trial(root, method, seed=0, suite="scale", tested=("scale",), rows=None, **values):
    """Write what a finished trial leaves; return what it wrote of every suite it is judged on."""
    folder = root / suite / method / f"seed-{seed}"
    folder.mkdir(parents=True)
    (folder / "selection.json").write_text('{"outer_valid": [0.5]}', encoding="utf-8")
    write_metrics(folder)
    judged = {
        "suite": suite,
        "suite_version": "1",
        "tested_version": "1",
        "method": method,
        "kind": "agent" if method in ("mine", "yours") else "rule",
        "setting": "",
        "cost": {},
        "results": records() if rows is None else rows,
        **values,
    }
    return [{**judged, "tested_on": name} for name in tested]


def benchmark_of(agents=("mine", "yours"), trained=("scale",), tested=(), **settings):
    common = {"episodes": 4, "seeds": 2, "test_instances": COUNT, "baselines": ["cosine"]}
    return SimpleNamespace(
        settings=SimpleNamespace(**{**common, "agents": dict.fromkeys(agents), **settings}),
        trained=list(trained),
        suites=dict.fromkeys([*trained, *tested]),
    )


def methods(comparison):
    return {entry["method"]: entry for entry in comparison["methods"]}


# Sample efficiency


def two_seeds(root):
    return [one for seed in range(2) for one in write_trial(root, "mine", seed)]


def test_updates_without_a_finished_episode_are_left_out_of_a_curve(tmp_path):
    results = two_seeds(tmp_path)
    write_metrics(tmp_path / "scale/mine/seed-0", [np.nan, 0.2, np.nan, 0.4])
    write_metrics(tmp_path / "scale/mine/seed-1", [0.1, 0.2, 0.3, 0.4])
    curve = summarise_benchmark(results, benchmark_of(["mine"]), tmp_path)["sample_efficiency"]
    assert curve["scale"]["mine"]["at"] == [200, 300, 400]
    np.testing.assert_allclose(curve["scale"]["mine"]["value"], [0.2, 0.25, 0.4])


def test_trainings_that_are_not_finished_are_no_part_of_a_curve(tmp_path):
    results = two_seeds(tmp_path)
    unfinished = tmp_path / "scale/mine/seed-1"
    (unfinished / "selection.json").unlink()
    write_metrics(unfinished, [0.9])
    curve = summarise_benchmark(results, benchmark_of(["mine"]), tmp_path)["sample_efficiency"]
    assert curve["scale"]["mine"]["value"] == [0.2, 0.3, 0.4]


def test_agents_without_a_curve_are_named_with_the_reason(tmp_path):
    results = [*two_seeds(tmp_path), *write_trial(tmp_path, "yours")]
    for seed in range(2):  # one update each, of other lengths
        write_metrics(tmp_path / f"scale/mine/seed-{seed}", [0.5], steps=100 + seed)
    write_metrics(tmp_path / "scale/yours/seed-0", [np.nan, np.nan])
    benchmark = benchmark_of(["mine", "yours", "later"])

    summary = summarise_benchmark(results, benchmark, tmp_path)

    assert summary["sample_efficiency"] == {"scale": {}}
    said = without_curve(summary)
    assert said == (
        "Without a curve of sample efficiency: mine on scale (seeds have no budget in common: one "
        "begins at 101, another ends at 100); yours on scale (nothing was measured); later on "
        "scale (no training is finished)."
    )
    assert results_markdown(summary).rstrip().endswith(said)
    assert "scale-efficiency" not in figures(summary)
    json.dumps(summary, allow_nan=False)


def test_nothing_is_said_of_curves_where_all_agents_have_one(tmp_path):
    summary = summarise_benchmark(two_seeds(tmp_path), benchmark_of(["mine"]), tmp_path)
    assert without_curve(summary) == ""
    assert "curve" not in results_markdown(summary)


# Several files, one table


def test_suites_and_methods_of_an_earlier_file_stay(tmp_path):
    earlier = [
        one
        for method in ("mine", "cosine")
        for one in write_trial(tmp_path, method, suite="old", tested=("old", "far"))
    ]
    results = [
        *earlier,
        *write_trial(tmp_path, "another", tested=("scale", "old"), kind="agent"),
        *write_trial(tmp_path, "mine", tested=("scale", "old")),
        *write_trial(tmp_path, "cosine", tested=("scale", "old")),
    ]
    benchmark = benchmark_of(["mine"], tested=["old"])

    summary = summarise_benchmark(results, benchmark, tmp_path)

    pairs = [(one["suite"], one["tested_on"]) for one in summary["comparisons"]]
    assert pairs == [("scale", "scale"), ("scale", "old"), ("old", "old"), ("old", "far")]
    assert list(methods(summary["comparisons"][0])) == ["mine", "cosine", "another"]
    assert {suite: list(curves) for suite, curves in summary["sample_efficiency"].items()} == {
        "scale": ["mine", "another"],
        "old": ["mine"],
    }
    drawn = figures(summary)
    assert {"old-iqm", "old-to-far-gap", "old-efficiency", "scale-to-old-iqm"} <= set(drawn)


def test_figures_of_earlier_results_are_removed_and_others_are_left(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("gone-iqm", "gone-to-far-profiles", "gone-efficiency", "transfer", "my-photo"):
        (folder / f"{name}.png").touch()
    summary = summarise_benchmark(two_seeds(tmp_path), benchmark_of(["mine"]), tmp_path)

    write_results(summary, tmp_path)

    names = {path.stem for path in folder.iterdir()}
    assert names == {"scale-iqm", "scale-gap", "scale-profiles", "scale-efficiency", "my-photo"}


def test_a_damaged_selection_is_named(tmp_path):
    results = two_seeds(tmp_path)
    path = tmp_path / "scale/mine/seed-1/selection.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{path} is damaged"):
        summarise_benchmark(results, benchmark_of(["mine"]), tmp_path)


# The metric


def test_methods_are_compared_by_the_metric_of_the_suite(tmp_path):
    lost = records(0.8)
    lost[0] |= {"diverged": True, "mean_recall": 0.9}
    results = [
        *write_trial(tmp_path, "mine", tested=("scale", "far"), rows=lost, metric="mean_recall"),
        *write_trial(tmp_path, "cosine", tested=("scale", "far"), metric="mean_recall"),
    ]
    for judged in results:
        if judged["tested_on"] == "far":
            del judged["metric"]  # as older versions wrote it

    summary = summarise_benchmark(results, benchmark_of(["mine"], tested=["far"]), tmp_path)

    own, far = summary["comparisons"]
    assert (own["metric"], far["metric"]) == ("mean_recall", "accuracy")
    recalls = [0.0, *(0.4 + i / 100 for i in range(1, COUNT))]
    assert methods(own)["mine"]["mean"] == pytest.approx(np.mean(recalls))
    assert methods(own)["cosine"]["mean"] == pytest.approx(0.25 + 0.035)
    assert methods(far)["cosine"]["mean"] == pytest.approx(0.5 + 0.035)
    text = results_markdown(summary)
    assert "test mean per-class recall (IQM)" in text
    assert "test accuracy (IQM)" in text
    titles = list(terminal_table(summary).columns[0].cells)
    assert "scale, test mean per-class recall" in titles
    assert "trained on scale, tested on far, test accuracy" in titles


def test_figures_name_the_metric(tmp_path):
    results = [
        *write_trial(tmp_path, "mine", tested=("scale", "far"), metric="mean_recall"),
        *write_trial(tmp_path, "cosine", tested=("scale", "far"), metric="mean_recall"),
    ]
    results[1]["metric"] = results[3]["metric"] = "accuracy"
    summary = summarise_benchmark(results, benchmark_of(["mine"], tested=["far"]), tmp_path)

    drawn = figures(summary)

    def says(name):
        figure = drawn[name]
        own = figure.axes[0]
        common = f"{figure.get_supxlabel()} {figure.get_supylabel()}"
        return " ".join(f"{own.get_xlabel()} {own.get_ylabel()} {common}".split())

    assert "of test mean per-class recall" in says("scale-iqm")
    assert "with test mean per-class recall above" in says("scale-profiles")
    assert "outer_valid mean per-class recall of training" in says("scale-efficiency")
    assert "of test accuracy" in says("scale-to-far-iqm")
    assert drawn["transfer"].get_supxlabel() == (
        "interquartile mean of test mean per-class recall or accuracy"
    )


def test_results_of_older_versions_are_of_accuracy():
    assert metric_in_words([{}]) == metric_in_words([]) == "accuracy"


# Kinds of instance


def test_a_failure_on_one_kind_shows_though_the_iqm_of_all_hides_it(tmp_path):
    fails = records(0.6, TRANSFER)
    for one in fails[1::4]:  # Adam
        one |= {"accuracy": 0.0, "diverged": True}
    results = [
        *write_trial(tmp_path, "mine", rows=fails),
        *write_trial(tmp_path, "cosine", rows=records(0.5, TRANSFER)),
    ]
    summary = summarise_benchmark(results, benchmark_of(["mine"]), tmp_path)

    entry = methods(summary["comparisons"][0])["mine"]

    assert entry["iqm"]["value"] > 0.6
    assert list(entry["by_kind"]) == ["classes 01234", "optimizer adam", "plain", "width 2.0"]
    assert entry["by_kind"]["optimizer adam"] == {
        "iqm": 0.0,
        "mean": 0.0,
        "diverged": 1.0,
        "instances": 2,
    }
    values = [fails[0]["accuracy"], fails[4]["accuracy"]]
    assert entry["by_kind"]["width 2.0"]["iqm"] == interquartile_mean(np.array(values))
    heads, cells = kinds_table(summary["comparisons"][0])
    assert heads[2:] == ["optimizer adam (2)", "plain (2)", "width 2.0 (2)"]
    assert cells["mine"][1:] == ["0.000, 100% diverged", "0.650", "0.620"]
    text = results_markdown(summary)
    assert "| optimizer adam (2) | plain (2) | width 2.0 (2) |" in text
    assert "| 0.000, 100% diverged | 0.650 | 0.620 |" in text


@pytest.mark.parametrize(
    ("kinds", "drawn_too"),
    [(TRANSFER, False), (({}, {"optimizer": "adam", "width": 2.0}), True)],
    ids=["one kind each", "several kinds each"],
)
def test_intervals_do_not_hold_what_kinds_differ_by(tmp_path, kinds, drawn_too):
    rows = records(kinds=kinds)
    for place, one in enumerate(rows):
        one["accuracy"] = 0.2 + 0.1 * (place % len(kinds))
    (entry,) = summarise_benchmark(
        write_trial(tmp_path, "mine", rows=rows), benchmark_of(["mine"]), tmp_path
    )["comparisons"][0]["methods"]
    assert (entry["iqm"]["high"] - entry["iqm"]["low"] > 0.01) == drawn_too


def test_instances_of_several_settings_are_of_a_kind_by_each(tmp_path):
    mixed = [{"optimizer": o, "horizon": h} for o in ("adam", "sgd") for h in (10, 20)]
    summary = summarise_benchmark(
        write_trial(tmp_path, "mine", rows=records(kinds=mixed)), benchmark_of(["mine"]), tmp_path
    )
    (entry,) = summary["comparisons"][0]["methods"]
    assert {kind: found["instances"] for kind, found in entry["by_kind"].items()} == dict.fromkeys(
        ("horizon 10", "horizon 20", "optimizer adam", "optimizer sgd"), COUNT // 2
    )


@pytest.mark.parametrize(
    "rows",
    [
        records(),
        records(kinds=({"optimizer": "adam"},)),
        [{k: v for k, v in one.items() if k != "instance"} for one in records()],
        records(kinds=({}, {"surprise": 1})),
    ],
    ids=["no kind", "one kind", "no instance", "unknown setting"],
)
def test_there_is_no_table_of_kinds_where_there_are_not_several(tmp_path, rows):
    summary = summarise_benchmark(
        write_trial(tmp_path, "mine", rows=rows), benchmark_of(["mine"]), tmp_path
    )
    assert "by_kind" not in summary["comparisons"][0]["methods"][0]
    assert kinds_table(summary["comparisons"][0]) == ([], {})
    assert "kind of instance" not in results_markdown(summary)


# Sample sizes


def test_few_units_are_counted_and_make_a_rough_interval():
    agent = {"seeds": 5, "instances": 10, "kind": "agent"}
    rule = {"seeds": 1, "instances": 10, "kind": "rule"}
    rough = "n = 10 units (training seeds x instances): below 20 the interval is a rough one."
    assert warnings({"methods": [agent, rule]}) == [rough]
    assert warnings({"methods": [agent]}) == []
    assert warnings({"methods": [{**rule, "instances": 40}]}) == []
    assert warnings({"methods": [{**agent, "seeds": 2}, rule]}) == [
        rough,
        "2 training seed(s) say little about another training.",
    ]


def test_seeds_are_those_of_the_table_where_the_last_command_asked_for_fewer(tmp_path):
    results = [one for seed in range(3) for one in write_trial(tmp_path, "mine", seed)]
    for asked, said in ((2, 3), (4, 4)):
        summary = summarise_benchmark(results, benchmark_of(["mine"], seeds=asked), tmp_path)
        assert summary["seeds"] == said


def test_rules_alone_have_a_table_without_a_difference(tmp_path):
    summary = summarise_benchmark(write_trial(tmp_path, "cosine"), benchmark_of([]), tmp_path)
    text = results_markdown(summary)
    assert "minus this" not in text
    assert "None" not in text
    heads, _, line = (part for part in text.splitlines() if part.startswith("|"))
    assert heads.count("|") == line.count("|")
