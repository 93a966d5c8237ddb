import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agents import statistics
from agents.benchmark.table import MANIFEST, read_results, write_table
from agents.benchmark.wording import warnings
from agents.records import EPISODES
from agents.report.document import report_html

# The page as a whole


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_page_refers_to_nothing_outside_itself(pages, kind, reader):
    page = reader(pages[kind])
    assert not {"link", "script", "img", "image", "iframe", "object", "base"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    styles = " ".join(page.styles)
    assert "@import" not in styles
    assert all(re.fullmatch(r"url\(#[^)]+\)", url) for url in re.findall(r"url\([^)]*\)", styles))
    assert set(re.findall(r"url\(#([^)]+)\)", styles)) <= set(page.ids)
    assert "default-src 'none'" in pages[kind]


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_every_id_is_there_once_and_every_figure_is_named(pages, kind, reader):
    page = reader(pages[kind])
    assert len(page.ids) == len(set(page.ids))
    assert len(page.figures) > 5
    assert all(first == ("title", named_by) for named_by, first in page.figures)
    assert page.tags.count("figcaption") == len(page.figures)
    assert page.tags.count("h1") == page.tags.count("main") == 1


@pytest.mark.parametrize("kind", ["benchmark", "run"])
def test_no_word_of_the_page_is_a_missing_number(pages, kind, reader):
    words = re.findall(r"[\w.]+", reader(pages[kind]).words().lower())
    assert not {"nan", "inf", "none", "null"} & set(words)


def test_same_results_give_the_same_bytes(asg, own_benchmark, own_run, tmp_path):
    for folder in (own_benchmark, own_run):
        assert asg("report", folder).status == 0
        again = asg("report", folder, "--out", tmp_path / "again.html")
        assert (again.status, again.err) == (0, "")
        written = (folder / "report.html").read_text(encoding="utf-8")
        assert written == (tmp_path / "again.html").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"again.html", "small", "run"}


# Of a benchmark


def test_benchmark_page_holds_methods_numbers_and_warnings(benchmark, pages, reader):
    words = reader(pages["benchmark"]).words()
    summary = json.loads((benchmark / "results.json").read_text())
    assert len(summary["comparisons"]) == 4
    for comparison in summary["comparisons"]:
        said = warnings(comparison)
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


def test_benchmark_page_holds_every_kind_of_figure(pages, reader):
    words = reader(pages["benchmark"]).words()
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


def test_benchmark_page_unfolds_the_best_agent_alone(pages, reader):
    folded = re.findall(r"<summary><h\d>(.*?)</h\d></summary>", pages["benchmark"])
    assert folded == ["es on scale", "es on mixed"]
    assert "reinforce on scale" in reader(pages["benchmark"]).words()


def test_benchmark_page_names_what_is_missing(own_benchmark, reader):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    for entry in summary["comparisons"][0]["methods"]:
        entry["seeds"] = 1
    path.write_text(json.dumps(summary))
    assert "es has 1 of 2 training seeds" in reader(report_html(own_benchmark)).words()


def test_benchmark_page_holds_kinds_of_instances_where_there_are_several(pages, reader):
    words = reader(pages["benchmark"]).words()
    assert words.count("By kind of instance Test accuracy (IQM) of each kind") == 2
    assert "method optimizer adam (3) optimizer sgd (3)" in words


def test_benchmark_page_names_the_metric(own_benchmark, reader):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    for comparison in summary["comparisons"]:
        comparison["metric"] = "mean_recall"
    path.write_text(json.dumps(summary))
    words = reader(report_html(own_benchmark)).words()
    assert "test mean per-class recall (IQM)" in words
    assert "Test mean per-class recall." in words
    assert "Share of runs above each mean per-class recall" in words
    assert "Mean per-class recall on real validation images at the end of training" in words
    assert "accuracy" not in words.replace("loss and accuracy over", "").lower()


def test_benchmark_page_says_which_agents_have_no_curve(own_benchmark, reader):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    summary["sample_efficiency"]["scale"] = {}
    summary["without_curve"] = {"scale": {"es": "nothing was measured"}}
    path.write_text(json.dumps(summary))
    words = reader(report_html(own_benchmark)).words()
    assert "Without a curve of sample efficiency: es on scale (nothing was measured)." in words
    assert "Sample efficiency on scale." not in words


def test_results_of_older_versions_have_a_page(own_benchmark, reader):
    path = own_benchmark / "results.json"
    summary = json.loads(path.read_text())
    del summary["without_curve"]
    for comparison in summary["comparisons"]:
        del comparison["metric"]
    path.write_text(json.dumps(summary))
    assert "test accuracy (IQM)" in reader(report_html(own_benchmark)).words()


def interrupted(root):
    """A finished benchmark of two seeds, as it stood before the second seed of the agent."""
    (root / "results.json").unlink()
    (root / "scale" / "es" / "seed-1" / "selection.json").unlink()
    return root


def test_page_of_an_interrupted_benchmark_shows_what_is_finished(
    own_benchmark, monkeypatch, reader
):
    monkeypatch.setattr(statistics, "RESAMPLES", 50)
    assert "trials are finished" not in reader(report_html(own_benchmark)).words()

    words = reader(report_html(interrupted(own_benchmark))).words()

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
    write_table(own_benchmark, [])  # what an interrupted benchmark of no result has
    assert "of which nothing is judged yet" in fails("report", own_benchmark)


def test_published_table_without_its_trials_is_no_benchmark_to_go_on_with(fails, own_benchmark):
    write_table(interrupted(own_benchmark), read_results(own_benchmark))
    for path in own_benchmark.glob("*/*/seed-*/test-*.json"):
        path.unlink()
    message = fails("report", own_benchmark)
    assert "holds the table of a benchmark without the files of its trials" in message
    assert "--resume" not in message


def test_older_benchmark_has_numbers_for_layer_groups(own_benchmark, reader):
    for path in own_benchmark.glob("*/*/seed-*/test-*.json"):
        values = json.loads(path.read_text())
        del values["layer_groups"]
        path.write_text(json.dumps(values))
    words = reader(report_html(own_benchmark)).words()
    assert "group 5" in words
    assert "conv1" not in words


def test_benchmark_without_agents_or_baselines_has_a_page(
    tmp_path, monkeypatch, reader, write_benchmark
):
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    for kinds in ({"cosine": "rule"}, {"es": "agent"}):
        root = write_benchmark(tmp_path / next(iter(kinds)), kinds, ("scale",), seeds=1, count=3)
        words = reader(report_html(root)).words()
        assert "There are not both learned agents and tuned baselines" in words
        assert ("What the agents do" in words) == ("es" in kinds)


# Of a run


def test_run_page_holds_table_curves_and_heat_maps(pages, reader):
    words = reader(pages["run"]).words()
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


def test_older_run_has_a_page_that_says_how_to_add_heat_maps(own_run, reader):
    (own_run / EPISODES).unlink()
    page = report_html(own_run)
    assert "<code>asg evaluate run</code> adds it" in page
    assert "hidden scale" not in reader(page).words()


def test_run_without_labels_of_the_target_has_a_page(own_run, reader):
    (own_run / "results.json").unlink()
    (own_run / EPISODES).unlink()
    (own_run / "schedule.json").write_text("{}")
    words = reader(report_html(own_run)).words()
    assert "no labels to judge by" in words
    assert "Mean return." in words


def test_run_whose_reward_reads_no_label_has_a_page(own_run, reader):
    for path in own_run.glob("seed-*/metrics.jsonl"):
        lines = [{**json.loads(line), "accuracy": 0.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = json.loads((own_run / EPISODES).read_text())
    for row in values["rows"]:
        for episode in (episode for seed in row["results"] for episode in seed):
            episode["outer_valid"] = []
    (own_run / EPISODES).write_text(json.dumps(values))
    words = reader(report_html(own_run)).words()
    assert "The training recorded no accuracy." in words
    assert "The reward reads no real label" in words
    assert "accuracy at the end" not in words


def test_names_are_text_whatever_they_hold(tmp_path, reader, write_run):
    name = '<b onclick="x">&amp;$a$ \x01'
    root = write_run(tmp_path / "<i>run & $x$", ("controller (greedy)", name))
    values = json.loads((root / EPISODES).read_text())
    values["layer_groups"][0] = "<u>&"
    (root / EPISODES).write_text(json.dumps(values))
    page = report_html(root)
    read = reader(page)
    assert not {"i", "u"} & set(read.tags)
    assert "<i>run & $x$" in read.words()
    assert '<b onclick="x">&amp;$a$' in read.words()
    assert "<u>&" in read.text


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
