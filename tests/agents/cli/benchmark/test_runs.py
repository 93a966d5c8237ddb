"""`asg benchmark` on suites of two env steps: what it writes, in this process and in others."""

import csv
import json
import traceback
from pathlib import Path

import pytest

import agents.cli.benchmark
import agents.cli.main
from agents.benchmark import executors, trials
from agents.benchmark.plan import Trial, load_benchmark
from agents.benchmark.table import COLUMNS, read_results
from agents.run_folder import RunFolder
from agents.train import load_policies


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def results(out: Path) -> dict[str, list]:
    """Every judged trial's results, by file."""
    return {
        str(path.relative_to(out)): json.loads(path.read_text(encoding="utf-8"))["results"]
        for path in sorted(out.glob("*/*/*/test-*.json"))
    }


def test_table_has_a_line_for_every_network_that_was_judged(finished):
    _, out = finished
    lines = table(out)

    assert list(lines[0]) == list(COLUMNS)
    # Two agents and the search with two seeds each, cosine and random; two suites, two instances.
    assert len(lines) == (3 * 2 + 2) * 2 * 2
    assert {line["kind"] for line in lines} == {"agent", "search", "rule", "random"}
    of_agents = [line for line in lines if line["method"] == "gradient"]
    assert {line["training_seed"] for line in of_agents} == {"0", "1"}
    assert {line["setting"] for line in of_agents} <= {"greedy", "sampled"}
    assert {line["episodes"] for line in of_agents} == {"6"}  # 4 of training, 2 of choosing
    assert {line["episodes"] for line in lines if line["method"] == "random"} == {"0"}
    assert all(0 <= float(line["accuracy"]) <= 1 for line in lines)


def test_summary_compares_on_every_suite_and_chooses_by_train_instances(finished):
    _, out = finished
    summary = json.loads((out / "results.json").read_text(encoding="utf-8"))

    pairs = [(c["suite"], c["tested_on"]) for c in summary["comparisons"]]
    assert pairs == [("scale", "scale"), ("scale", "still")]
    for comparison in summary["comparisons"]:
        methods = {entry["method"]: entry for entry in comparison["methods"]}
        assert set(methods) == {"gradient", "evolved", "cosine", "static-search", "random"}
        chosen = comparison["best"]
        scores = {name: entry["on_train_instances"] for name, entry in methods.items()}
        assert scores[chosen["agent"]] == max(scores["gradient"], scores["evolved"])
        assert scores[chosen["baseline"]] == max(scores["cosine"], scores["static-search"])
        assert "best_agent_minus_this" not in methods[chosen["agent"]]
        assert "best_agent_minus_this" in methods[chosen["baseline"]]
    text = (out / "results.md").read_text(encoding="utf-8")
    assert "n = 2 units" in text
    assert "below 20 the interval is a rough one" in text
    assert "2 training seed(s) say little" in text
    assert "gradient" in (out / "report.html").read_text(encoding="utf-8")
    figures = {path.stem for path in (out / "figures").iterdir()}
    assert {"scale-iqm", "scale-profiles", "scale-improvement", "scale-gap"} <= figures
    assert {"scale-efficiency", "scale-to-still-iqm", "transfer"} <= figures


def test_an_agents_trials_are_one_run_folder(finished):
    _, out = finished
    run = RunFolder.open(out / "scale" / "gradient")

    assert run.experiment.train.seeds == 2
    assert run.experiment.agent.episodes == 4
    assert len(load_policies(run)) == 2


def judged(folder: Path) -> list:
    """What a trial's files hold, but for when and where it was finished."""
    found = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        found.append({k: v for k, v in values.items() if k not in ("finished", "provenance")})
    return found


@pytest.mark.slow
def test_worker_processes_give_the_results_of_a_run_that_was_cut_off(
    tmp_path, monkeypatch, write_files
):
    monkeypatch.setattr(trials, "MODE_INSTANCES", 8)  # workers import the modules anew
    monkeypatch.setattr(trials, "SELECTION_INSTANCES", 16)
    benchmark = load_benchmark(str(write_files(tmp_path / "files")))
    trial = Trial("scale", "gradient", "agent", 1)
    roots = [tmp_path / "processes", tmp_path / "here"]
    for root in roots:
        trials.start_run_folder(benchmark, "scale", "gradient", root)

    (outcome,) = executors.run_in_pool(benchmark, [trial], roots[0], 2, lambda: None)

    assert outcome == (trial, None)
    train_seed = trials.train_seed

    def cut_off(run, index, progress, workers):
        def stop(*_):
            raise KeyboardInterrupt

        train_seed(run, index, stop, workers)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "train_seed", cut_off)
        with pytest.raises(KeyboardInterrupt):
            trials.run_trial(benchmark, trial, roots[1])
    metrics = trial.folder(roots[1]) / "metrics.jsonl"
    assert len(metrics.read_text(encoding="utf-8").splitlines()) == 1
    trials.run_trial(benchmark, trial, roots[1])
    assert judged(trial.folder(roots[0])) == judged(trial.folder(roots[1]))
    assert len(judged(trial.folder(roots[0]))) == 4  # two suites, the mode, the selection


@pytest.mark.slow
def test_ray_tasks_give_the_results_of_this_process(tmp_path, monkeypatch, write_files):
    pytest.importorskip("ray")
    monkeypatch.setattr(trials, "MODE_INSTANCES", 8)  # tasks import the modules anew
    monkeypatch.setattr(trials, "SELECTION_INSTANCES", 16)
    benchmark = load_benchmark(str(write_files(tmp_path / "files")))
    work = [Trial("scale", "gradient", "agent", 0), Trial("scale", "random", "random", 0)]
    broken = Trial("scale", "nobody", "rule", 0)
    roots = [tmp_path / "ray", tmp_path / "here"]
    for root in roots:
        trials.start_run_folder(benchmark, "scale", "gradient", root)
    ticks = []

    outcomes = executors.run_on_ray(
        benchmark, [*work, broken], roots[0], 0, lambda: ticks.append(1)
    )
    errors = dict(outcomes)

    assert ticks
    error = errors.pop(broken)
    assert isinstance(error, KeyError)
    assert "in run_trial" in "".join(traceback.format_exception(error))
    assert errors == dict.fromkeys(work)
    for trial in work:
        trials.run_trial(benchmark, trial, roots[1])
        assert judged(trial.folder(roots[0])) == judged(trial.folder(roots[1]))


def test_resume_does_nothing_again_and_adds_what_is_missing(done, asg, inline, monkeypatch):
    path, out = done
    before = results(out)
    ran = []
    run_trial = trials.run_trial

    def spy(benchmark, trial, root):
        ran.append(trial.name)
        run_trial(benchmark, trial, root)

    monkeypatch.setattr(trials, "run_trial", spy)
    assert asg("benchmark", path, "--out", out, "--resume").status == 0
    assert ran == []
    (out / "scale" / "gradient" / "seed-1" / "test-still.json").unlink()
    assert asg("benchmark", path, "--out", out, "--resume").status == 0
    assert ran == ["gradient on scale seed 1"]
    assert results(out) == before


def test_another_agent_is_added_to_the_table(done, asg, inline, tmp_path, write_files):
    path, out = done
    more = {"newcomer": {"agent": {"kind": "es", "population": 4, "instances_per_update": 1}}}
    mine = write_files(path.parent, agents=more, baselines=[])
    mine = mine.rename(tmp_path / "mine.yaml")
    write_files(path.parent)  # the file that others read

    assert asg("benchmark", mine, "--out", out, "--resume").status == 0

    assert {line["method"] for line in table(out)} == {
        *("gradient", "evolved", "cosine", "static-search", "random", "newcomer")
    }


def test_a_trial_that_fails_is_noted_tried_again_and_named(
    tmp_path, asg, inline, monkeypatch, write_files
):
    path = write_files(tmp_path / "files", agents={}, seeds=1)
    run_trial, broken = trials.run_trial, []

    def fail(benchmark, trial, root):
        if trial.method == "cosine" and len(broken) < 2:
            broken.append(trial)
            raise RuntimeError("no room")
        run_trial(benchmark, trial, root)

    monkeypatch.setattr(trials, "run_trial", fail)
    out = tmp_path / "out"
    result = asg("benchmark", path, "--out", out)
    assert result.status == 1
    assert "1 trials failed and are not in the table: cosine on scale" in " ".join(
        result.out.split()
    )
    lines = (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["attempt"] for line in lines] == [1, 2]
    assert json.loads(lines[0])["error"] == "RuntimeError: no room"
    assert {line["method"] for line in table(out)} == {"static-search", "random"}

    assert asg("benchmark", path, "--out", out, "--resume").status == 0
    assert {line["method"] for line in table(out)} == {"cosine", "static-search", "random"}


def test_training_seeds_are_added(done, asg, inline):
    path, out = done
    before = results(out)
    assert asg("benchmark", path, "--out", out, "--resume", "--set", "seeds=3").status == 0
    now = results(out)
    assert {name: now[name] for name in before} == before
    assert {name.split("/")[2] for name in now if "/gradient/" in name} == {
        *("seed-0", "seed-1", "seed-2")
    }
    assert RunFolder.open(out / "scale" / "gradient").experiment.train.seeds == 3
    assert asg("benchmark", path, "--out", out, "--resume").status == 0  # fewer are fine too
    assert RunFolder.open(out / "scale" / "gradient").experiment.train.seeds == 3


def test_overwriting_keeps_the_lock(done, asg, fails, monkeypatch):
    path, out = done

    def look(*_):
        said.append(fails("benchmark", path, "--out", out, "--resume"))
        return iter(())

    said = []
    monkeypatch.setattr(agents.cli.benchmark, "run_in_pool", look)
    asg("benchmark", path, "--out", out, "--overwrite")
    assert "another `asg benchmark` is at work in " in said[0]


def test_numbers_of_before_are_gone_once_more_is_to_be_done(done, asg, monkeypatch):
    path, out = done

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(agents.cli.benchmark, "run_in_pool", stop)
    assert asg("benchmark", path, "--out", out, "--resume", "--set", "seeds=3").status != 0
    assert not (out / "results.json").exists()
    assert asg("report", out).status == 0
    assert "trials are finished; the numbers are of what is there" in (
        (out / "report.html").read_text(encoding="utf-8")
    )


def test_what_a_failed_trial_has_written_does_not_count(done, asg, inline):
    path, out = done
    (out / "scale" / "cosine" / "seed-0" / "selection.json").unlink()
    assert "cosine" not in {judged["method"] for judged in read_results(out)}


@pytest.mark.slow
def test_a_coordinate_wise_controller_drives_a_network_of_more_layer_groups(
    tmp_path, asg, inline, write_files, suites
):
    pytest.importorskip("timm")
    larger = {"id": "ASG/DigitsImageNet-v0", "batch_size": 2, "outer_valid_size": 10}
    kinds = {
        "shared": {"network": "coordinate-wise"},
        "own": {"network": "per-feature"},
    }
    common = {"kind": "reinforce", "instances_per_update": 1, "rollouts_per_instance": 2}
    path = write_files(
        tmp_path / "files",
        {**suites, "still": {**suites["still"], **larger, "horizon": 1}},
        agents={name: {"agent": {**common, **own}} for name, own in kinds.items()},
        env={"observation": "normalised"},
        baselines=["static-search"],
        seeds=1,
        test_instances=1,
    )
    out = tmp_path / "out"

    assert asg("benchmark", path, "--out", out).status == 0

    lines = [line for line in table(out) if line["tested_on"] == "still"]
    assert [line["method"] for line in lines] == ["shared"]
    refused = {
        name: json.loads((out / "scale" / name / "seed-0" / "test-still.json").read_text())[
            "refused"
        ]
        for name in ("shared", "own", "static-search")
    }
    assert refused["shared"] == ""
    assert "is no whole checkpoint of this agent" in refused["own"]
    assert refused["static-search"] == "a vector of 5 layer groups, still has 7"
