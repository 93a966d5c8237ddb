import csv
import io
import json

import numpy as np
import pytest

from agents.compare import figure as compare_figure
from agents.compare.figure import OTHER, PAPER, draw_comparison
from agents.compare.plan import ClaimSettings
from agents.compare.results import COLUMNS, markdown, summarise, table_csv
from agents.figures import HIGHLIGHT
from agents.statistics import Estimate

LABELS = np.array([0, 0, 1, 1])
ABOUT = {
    "task": "ASG/Digits-v0",
    "seeds": 4,
    "test_images": 4,
    "tune_on": "outer_valid",
    "tuning_instances": 3,
}
SPREAD = np.array([0.1, 0.5, 0.7, 0.9])  # interquartile mean .6


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 200)
        yield


def diverged(result):
    """What a diverged training is kept as."""
    return result | {
        "correct": "0" * len(result["correct"]),
        "confusion": np.zeros((2, 2), dtype=int).tolist(),
        "retention": 0.0,
        "energies": None,
        "calibration_error": None,
        "drifts": [None, None],
        "diverged": True,
    }


def make_row(name="a", bad=(), labels=LABELS, **changes):
    """A finished row: four instances, or four for each training seed.

    `correct`, `retention`, `hse` and `drift` are of shape (I,) or (S, I); the energies are hse,
    hse + 1 and hse + 2. The trainings of the instances in `bad` diverged.
    """
    correct = np.atleast_2d(changes.pop("correct", ["1100", "1110", "1111", "1000"]))
    figures = {
        figure: np.broadcast_to(np.atleast_2d(changes.pop(figure, default)), correct.shape)
        for figure, default in (("retention", 0.9), ("hse", 0.0), ("drift", 0.1))
    }

    def result(seed, index):
        text = str(correct[seed, index])
        confusion = np.zeros((2, 2), dtype=int)
        for c, label in zip(text, labels, strict=True):
            confusion[label, label if c == "1" else 1 - label] += 1
        hse, drift, retention = (
            float(figures[figure][seed, index]) for figure in ("hse", "drift", "retention")
        )
        one = {
            "instance": {},
            "correct": text,
            "confusion": confusion.tolist(),
            "calibration_error": 0.1,
            "energies": [hse, hse + 1, hse + 2],
            "retention": retention,
            "inner_steps": 6 + index,
            "seconds": 1.0 + seed,
            "drifts": [drift, 2 * drift],
            "diverged": False,
        }
        return diverged(one) if index in bad else one

    seeds, instances = correct.shape
    return {
        "name": name,
        "paper": None,
        "setting": "rate 0.1",
        "rate": 0.1,
        "guidance": {},
        "controller": False,
        "reads_real_labels": False,
        "tuning": {},
        "results": [[result(s, i) for i in range(instances)] for s in range(seeds)],
        **changes,
    }


def summary_of(*rows, claims=(), metric="accuracy", labels=LABELS, count=2):
    claims = [ClaimSettings(**claim) for claim in claims]
    return summarise(rows, claims, metric, labels, count)


def claim(better="a", worse="b", figure="retention", text="a beats b"):
    return {"claim": text, "figure": figure, "better": better, "worse": worse}


def the_claim(better, worse, figure="retention", swap=False):
    """The one tested claim that `better` is above `worse`, or the other way round."""
    names = (worse["name"], better["name"]) if swap else (better["name"], worse["name"])
    summary = summary_of(better, worse, claims=[claim(*names, figure=figure)])
    (found,) = summary["claims"]
    assert summary["claims_not_tested"] == []
    return found


# Estimates of a row


def test_summary_holds_interquartile_means():
    (entry,) = summary_of(make_row(retention=SPREAD, hse=[0, 1, 2, 100]))["rows"]
    assert entry["accuracy"]["iqm"] == pytest.approx((0.5 + 0.75) / 2)
    assert entry["retention"]["iqm"] == pytest.approx(0.6)
    assert [entry[f"hse_{s}"]["iqm"] for s in (0, 1, 2)] == pytest.approx([1.5, 2.5, 3.5])
    assert entry["calibration_error"]["iqm"] == pytest.approx(0.1)
    for figure, _ in COLUMNS:
        found = entry[figure]
        assert found["low"] <= found["iqm"] + 1e-9
        assert found["iqm"] <= found["high"] + 1e-9
    assert entry["retention"]["low"] < 0.6 < entry["retention"]["high"]


def test_summary_holds_plain_means_and_sums():
    (entry,) = summary_of(make_row(drift=[0.1, 0.2, 0.3, 0.4], tuning={"rate 0.1": 0.5}))["rows"]
    assert entry["overall_accuracy"] == pytest.approx(10 / 16)
    assert entry["mean_recall"] == pytest.approx(10 / 16)
    # Class 0: 2 of 2, 2, 2 and 1; class 1: 0 of 2, 1, 2 and 0.
    assert entry["per_class_recall"] == pytest.approx([7 / 8, 3 / 8])
    assert entry["confusion"] == [[7, 1], [5, 3]]
    assert entry["inner_steps"] == pytest.approx(7.5)
    assert entry["seconds"] == pytest.approx(1.0)
    assert entry["diverged"] == 0
    assert entry["drifts"] == pytest.approx([0.25, 0.5])
    assert entry["per_instance"] == [[0.5, 0.75, 1.0, 0.25]]
    assert entry["tuning"] == {"rate 0.1": 0.5}


def test_summary_counts_mean_recall_where_it_is_the_metric():
    labels = np.array([0, 0, 0, 1])
    row = make_row(correct=["1110", "0001", "1111", "0000"], labels=labels)
    recall = summary_of(row, metric="mean_recall", labels=labels)
    accuracy = summary_of(row, labels=labels)
    assert recall["rows"][0]["per_instance"] == [[0.5, 0.5, 1.0, 0.0]]
    assert recall["rows"][0]["accuracy"]["iqm"] == pytest.approx(0.5)
    assert accuracy["rows"][0]["per_instance"] == [[0.75, 0.25, 1.0, 0.0]]
    assert accuracy["rows"][0]["mean_recall"] == recall["rows"][0]["mean_recall"] == 0.5
    assert "| target mean per-class recall |" in markdown(recall, ABOUT)
    assert "| target accuracy |" in markdown(accuracy, ABOUT)


def test_summary_takes_all_training_seeds_together():
    retention = SPREAD + np.array([[-0.05], [0.0], [0.05]])
    row = make_row(correct=np.full((3, 4), "1100"), retention=retention)
    (entry,) = summary_of(row)["rows"]
    assert entry["retention"]["iqm"] == pytest.approx(np.sort(retention.ravel())[3:9].mean())
    assert entry["seconds"] == pytest.approx(2.0)
    assert np.shape(entry["per_instance"]) == (3, 4)


def test_summary_counts_diverged_trainings_as_wrong_and_without_features():
    row = make_row(correct=["1111"] * 4, hse=[5, 1, 2, 3], drift=[9, 0.1, 0.2, 0.3], bad=[0])
    (entry,) = summary_of(row)["rows"]
    assert entry["diverged"] == 0.25
    assert entry["per_instance"] == [[0.0, 1.0, 1.0, 1.0]]
    assert entry["overall_accuracy"] == 0.75
    assert entry["retention"]["low"] < 0.9
    assert entry["hse_0"]["iqm"] == pytest.approx(2)
    assert entry["calibration_error"]["iqm"] == pytest.approx(0.1)
    assert entry["drifts"] == pytest.approx([0.2, 0.4])
    json.dumps(summary_of(row), allow_nan=False)


def test_summary_has_nothing_to_say_of_features_where_all_diverged():
    summary = summary_of(make_row(bad=range(4)))
    (entry,) = summary["rows"]
    assert entry["accuracy"] == Estimate(0.0, 0.0, 0.0, 1, 4).to_dict()
    assert entry["retention"] == Estimate(0.0, 0.0, 0.0, 1, 4).to_dict()
    for figure in ("hse_0", "hse_1", "hse_2", "calibration_error"):
        assert entry[figure] is None
    assert entry["drifts"] == [None, None]
    json.dumps(summary, allow_nan=False)


# Claims


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        (0.1, "holds"),
        (-0.1, "reversed"),
        (np.array([0.1, -0.1, 0.1, -0.1]), "not told apart"),
        (0.0, "not told apart"),
    ],
)
def test_claim_is_judged_by_paired_differences(shift, verdict):
    found = the_claim(make_row(retention=SPREAD + shift), make_row("b", retention=SPREAD))
    assert found["verdict"] == verdict
    assert found["iqm"] == pytest.approx(np.mean(shift))
    if np.ndim(shift) == 0:  # though the instances differ widely
        assert (found["low"], found["high"]) == (pytest.approx(shift), pytest.approx(shift))
    else:
        assert found["low"] < 0 < found["high"]
    assert {key: found[key] for key in claim()} == claim()


def test_claim_about_accuracy_is_paired_by_image():
    better = make_row(correct=["1100", "1110", "1111", "1000"])
    worse = make_row("b", correct=["1000", "1100", "1110", "0000"])
    found = the_claim(better, worse, "accuracy")
    assert found["iqm"] == pytest.approx(0.25)
    itself = the_claim(better, {**better, "name": "b"}, "accuracy")
    assert (itself["iqm"], itself["low"], itself["high"]) == (0.0, 0.0, 0.0)
    assert itself["verdict"] == "not told apart"


@pytest.mark.parametrize("figure", ["hse_0", "hse_1", "hse_2"])
@pytest.mark.parametrize(("shift", "verdict"), [(-0.5, "holds"), (0.5, "reversed")])
def test_claim_about_energy_holds_where_it_is_lower(figure, shift, verdict):
    found = the_claim(make_row(hse=SPREAD + shift), make_row("b", hse=SPREAD), figure)
    assert found["verdict"] == verdict
    assert found["iqm"] == pytest.approx(-shift)


GAIN = np.array([[0.18], [0.2], [0.22]])  # of three training seeds: interquartile mean .2


@pytest.mark.parametrize("figure", ["retention", "hse_0", "accuracy"])
def test_claim_compares_three_training_seeds_with_one_on_either_side(figure):
    ours = make_row(
        "controller",
        correct=[["1111"] * 4, ["1111"] * 4, ["1111"] * 4],
        retention=SPREAD / 2 + GAIN,
        hse=SPREAD - GAIN,
    )
    theirs = make_row("b", correct=["0000"] * 4, retention=SPREAD / 2, hse=SPREAD)
    gain = {"retention": 0.2, "hse_0": 0.2, "accuracy": 1.0}[figure]

    forward, backward = the_claim(ours, theirs, figure), the_claim(ours, theirs, figure, swap=True)

    assert forward["iqm"] == pytest.approx(gain)
    assert (forward["verdict"], backward["verdict"]) == ("holds", "reversed")
    assert 0 < forward["low"] <= forward["iqm"] <= forward["high"]
    for key, opposite in (("iqm", "iqm"), ("low", "high"), ("high", "low")):
        assert backward[key] == -forward[opposite]


@pytest.mark.parametrize("figure", ["accuracy", "retention"])
def test_claim_about_controllers_of_different_numbers_of_seeds_does_not_end_the_summary(figure):
    rows = [
        make_row(name, correct=[["1100"] * 4] * seeds, controller=True)
        for name, seeds in (("a", 3), ("b", 2))
    ]
    summary = summary_of(*rows, claims=[claim(figure=figure)])
    assert len(summary["claims"]) + len(summary["claims_not_tested"]) == 1


def test_claims_that_cannot_be_tested_are_listed():
    claims = [
        claim(text="the controller wins", better="controller"),
        claim(text="nobody wins", worse="controller"),
        claim(text="features spread", figure="hse_0"),
        claim(text="a keeps more"),
    ]
    rows = make_row(retention=SPREAD), make_row("b", retention=SPREAD - 0.1, bad=range(4))
    summary = summary_of(*rows, claims=claims)
    assert summary["claims_not_tested"] == [
        "the controller wins",
        "nobody wins",
        "features spread",
    ]
    assert [found["claim"] for found in summary["claims"]] == ["a keeps more"]
    text = markdown(summary, ABOUT)
    assert "Not tested: the controller wins; nobody wins; features spread." in text


def test_claim_about_retention_is_not_tested_where_nobody_can_measure_it():
    rows = [make_row("a"), make_row("b")]
    for result in rows[1]["results"][0]:
        result["retention"] = None
    summary = summary_of(*rows, claims=[claim()])
    assert summary["rows"][1]["retention"] is None
    assert summary["claims_not_tested"] == ["a beats b"]


# Tables


def table_under(text: str, heading: str) -> list[dict[str, str]]:
    """The Markdown table whose second column is called so, as a mapping for each row."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    headings, ruler, *rows = cells
    assert set("".join(ruler)) == {"-"}
    return [dict(zip(headings, row, strict=True)) for row in rows]


def test_markdown_shows_each_row():
    rows = make_row(retention=SPREAD, hse=[0, 1, 2, 100]), make_row("b", bad=range(4))
    first, second = table_under(markdown(summary_of(*rows), ABOUT), "|  | method |")
    assert (first[""], first["method"]) == ("1", "a (rate 0.1)")
    assert first["target accuracy"].startswith("0.625 (")
    assert first["retention"].startswith("0.600 (")
    assert (first["HSE 0"], first["HSE 1"], first["HSE 2"]) == ("1.5000", "2.5000", "3.5000")
    assert (first["ECE"], first["inner steps"]) == ("0.100", "8")
    assert (first["seconds"], first["diverged"]) == ("1.00", "0%")
    assert (second["HSE 0"], second["ECE"], second["diverged"]) == ("–", "–", "100%")
    assert second["target accuracy"] == "0.000 (0.000 to 0.000)"


def test_markdown_shows_claims_with_their_sign():
    rows = make_row(retention=SPREAD - 0.1, hse=-1), make_row("b", retention=SPREAD)
    claims = [
        {**claim(text="a keeps more"), "original": True},
        claim(text="a spreads", figure="hse_0"),
    ]
    found = table_under(markdown(summary_of(*rows, claims=claims), ABOUT), "| claim |")
    assert found == [
        {
            "claim": "a keeps more [original]",
            "figure": "retention",
            "difference": "-0.100 (-0.100 to -0.100)",
            "here": "reversed",
        },
        {
            "claim": "a spreads",
            "figure": "hse 0",
            "difference": "+1.000 (+1.000 to +1.000)",
            "here": "holds",
        },
    ]


def test_markdown_shows_the_share_of_each_class():
    (found,) = table_under(markdown(summary_of(make_row()), ABOUT), "| method |")
    assert found == {"method": "a", "0": "0.88", "1": "0.38"}


def test_markdown_names_classes_rightly_where_one_has_no_test_image():
    labels = np.array([1, 1, 1, 1])
    summary = summary_of(make_row(labels=labels), labels=labels)
    (found,) = table_under(markdown(summary, ABOUT), "| method |")
    assert found["1"] == "0.62"


def test_markdown_without_claims_has_no_table_of_them():
    text = markdown(summary_of(make_row()), ABOUT)
    assert "| claim |" not in text
    assert "Not tested" not in text


def test_markdown_says_where_no_controller_is_compared():
    note = "No row of a learned controller: none was given (`--controller RUN`)."
    controller = make_row("controller", controller=True)
    assert note in markdown(summary_of(make_row()), ABOUT)
    assert note not in markdown(summary_of(make_row(), controller), ABOUT)


@pytest.mark.parametrize(("seeds", "few"), [(2, True), (19, True), (20, False)])
def test_markdown_warns_of_few_instances(seeds, few):
    text = markdown(summary_of(make_row()), {**ABOUT, "seeds": seeds})
    warning = f"With {seeds} instances the intervals are rough ones."
    assert (warning in text) is few


def test_markdown_says_what_was_compared():
    text = markdown(summary_of(make_row()), ABOUT)
    assert text.startswith("ASG/Digits-v0: 4 unseen instances, 4 test images.")
    assert "chosen among candidates by outer_valid on 3 train instance(s)" in text


@pytest.mark.parametrize(
    ("controller", "reads", "marked"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_markdown_marks_controllers_that_read_no_real_label(controller, reads, marked):
    row = make_row(controller=controller, reads_real_labels=reads)
    (found,) = table_under(markdown(summary_of(row), ABOUT), "|  | method |")
    assert found["method"] == "a (rate 0.1)" + " [no real label]" * marked


def test_csv_has_each_estimate_with_its_bounds():
    rows = make_row('a, "b"', retention=SPREAD, paper=3), make_row("b", bad=range(4))
    summary = summary_of(*rows)
    first, second = csv.DictReader(io.StringIO(table_csv(summary)))
    assert (first["name"], first["paper"], first["setting"]) == ('a, "b"', "3", "rate 0.1")
    for figure, _ in COLUMNS:
        found = summary["rows"][0][figure]
        assert float(first[figure]) == found["iqm"]
        assert float(first[f"{figure}_low"]) == found["low"]
        assert float(first[f"{figure}_high"]) == found["high"]
    assert float(first["overall_accuracy"]) == 10 / 16
    assert (float(first["inner_steps"]), float(first["diverged"])) == (7.5, 0.0)
    assert (second["paper"], second["hse_0"], second["hse_0_low"]) == ("", "", "")
    assert float(second["retention"]) == 0.0
    assert None not in first  # no more cells than headings
    assert None not in first.values()


# The figure


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw, and return the figure's two panels and the file."""

    def draw(summary):
        figures = []
        save = compare_figure.save_figure

        def keep(figure, path):
            figures.append(figure)
            save(figure, path)

        monkeypatch.setattr(compare_figure, "save_figure", keep)
        draw_comparison(summary, ("conv", "head"), tmp_path / "figure.png")
        points, heat = figures[0].axes[:2]
        return points, heat, tmp_path / "figure.png"

    return draw


def test_figure_shows_every_row_in_the_colour_of_its_kind(drawn):
    rows = (
        make_row("original", paper=3, retention=0.8),
        make_row("other", retention=1.0),
        make_row("controller", paper=9, controller=True, retention=0.5),
        make_row("diverged", bad=range(4)),
    )
    points, heat, path = drawn(summary_of(*rows))
    assert path.read_bytes().startswith(b"\x89PNG")
    numbers = {text.get_text(): text for text in points.texts}
    assert set(numbers) == {"1", "2", "3", "4"}
    colours = [PAPER, OTHER, HIGHLIGHT, OTHER]
    assert [numbers[str(n)].get_color() for n in (1, 2, 3, 4)] == colours
    assert [numbers[str(n)].xy[0] for n in (1, 3, 4)] == pytest.approx([0.2, 0.5, 1.0])
    assert 0 < numbers["2"].xy[0] < 0.01  # nothing forgotten has its place on the logarithm too
    labels = heat.get_yticklabels()
    assert [label.get_text() for label in labels] == [
        "original  1",
        "other  2",
        "controller  3",
        "diverged  4",
    ]
    assert [label.get_color() for label in labels] == colours
    assert [text.get_text() for text in heat.texts] == ["0.1", "0.2"] * 3 + ["–", "–"]


def test_figure_leaves_out_points_without_retention(drawn):
    rows = [make_row("a"), make_row("b", retention=SPREAD)]
    for result in rows[0]["results"][0]:
        result["retention"] = None
    points, heat, _ = drawn(summary_of(*rows))
    assert [text.get_text() for text in points.texts] == ["2"]
    assert len(heat.get_yticklabels()) == 2
