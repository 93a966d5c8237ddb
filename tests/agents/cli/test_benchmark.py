"""`asg benchmark` on suites of two env steps, in worker processes and in this one."""

import csv
import json
import shutil
import traceback
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

import agents.cli.benchmark
import agents.cli.main
from agents.benchmark import executors, trials
from agents.benchmark.plan import Trial, load_benchmark
from agents.benchmark.table import COLUMNS, read_results
from agents.run_folder import RunFolder
from agents.train import load_policies
from asg_env.instances import kind_of
from asg_env.validation import ConfigError

SUITES = {
    "scale": {"id": "ASG/Digits-v0", "instances": "unknown-scale"},
    "still": {"id": "ASG/Digits-v0", "instances": "fixed"},
}
TINY = {"horizon": 2, "inner_steps": 1, "outer_valid_size": 50}
BENCHMARK = {
    "agents": {
        "gradient": {
            "agent": {"kind": "reinforce", "instances_per_update": 1, "rollouts_per_instance": 2}
        },
        "evolved": {"agent": {"kind": "es", "population": 2, "instances_per_update": 1}},
    },
    "baselines": ["cosine", "static-search", "random"],
    "episodes": 4,
    "seeds": 2,
    "test_instances": 2,
    "tuning_instances": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agents.statistics.RESAMPLES", 50)
        patch.setattr("agents.benchmark.trials.SELECTION_INSTANCES", 2)
        patch.setattr("agents.benchmark.trials.MODE_INSTANCES", 1)
        yield


def write_files(folder, files=SUITES, **changes):
    """Write suites and the benchmark; return the path of the benchmark."""
    folder.mkdir(exist_ok=True)
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **values}), encoding="utf-8")
    values = {"suites": [str(folder / "scale.yaml")], "test": [str(folder / "still.yaml")]}
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump({**values, **BENCHMARK, **changes}), encoding="utf-8")
    return path


def in_this_process(benchmark, waiting, root, workers, tick):
    """Stands in for `run_in_pool`."""
    for trial in waiting:
        error = None
        try:
            trials.run_trial(benchmark, trial, root)
        except Exception as failed:
            error = failed
        tick()
        yield trial, error


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(agents.cli.benchmark, "run_in_pool", in_this_process)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished benchmark and its file, which tests only read."""
    folder = tmp_path_factory.mktemp("benchmark")
    path = write_files(folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agents.cli.benchmark, "run_in_pool", in_this_process)
        patch.setattr("sys.argv", ["asg", "benchmark", str(path), "--out", str(folder / "out")])
        with pytest.raises(SystemExit) as stop:
            agents.cli.main.main()
    assert stop.value.code == 0
    return path, folder / "out"


@pytest.fixture
def done(finished, tmp_path):
    """A finished benchmark of one's own."""
    path, out = finished
    shutil.copytree(out, tmp_path / "out")
    return path, tmp_path / "out"


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
def test_worker_processes_give_the_results_of_a_run_that_was_cut_off(tmp_path, monkeypatch):
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
def test_ray_tasks_give_the_results_of_this_process(tmp_path, monkeypatch):
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


def test_another_agent_is_added_to_the_table(done, asg, inline, tmp_path):
    path, out = done
    more = {"newcomer": {"agent": {"kind": "es", "population": 4, "instances_per_update": 1}}}
    mine = write_files(path.parent, agents=more, baselines=[])
    mine = mine.rename(tmp_path / "mine.yaml")
    write_files(path.parent)  # the file that others read

    assert asg("benchmark", mine, "--out", out, "--resume").status == 0

    assert {line["method"] for line in table(out)} == {
        *("gradient", "evolved", "cosine", "static-search", "random", "newcomer")
    }


def test_a_trial_that_fails_is_noted_tried_again_and_named(tmp_path, asg, inline, monkeypatch):
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


def test_results_of_another_version_of_a_suite_are_refused(done, fails, tmp_path):
    path, out = done
    others = write_files(tmp_path / "files", {**SUITES, "scale": {**SUITES["scale"], "horizon": 3}})

    said = fails("benchmark", others, "--out", out, "--resume")

    assert "holds results of suite scale in version " in said
    assert fails("benchmark", others, "--out", out, "--resume", "--dry-run") == said
    assert "results of two versions are not compared: choose another --out" in said


def test_an_agent_with_other_settings_under_the_same_name_is_refused(done, fails, tmp_path):
    path, out = done
    agent = {"kind": "es", "population": 4, "instances_per_update": 1}
    others = write_files(tmp_path / "files", agents={"evolved": {"agent": agent}})
    assert "holds trainings of agent evolved with other settings" in fails(
        "benchmark", others, "--out", out, "--resume"
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"suites": ["digits-unheard"]}, "env 'digits-unheard' is none of the shipped ones ("),
        ({"suites": []}, "`suites` must hold at least 1 entry, got none"),
        ({"baselines": ["cosine", "random", "cosine"]}, "must name each once, got 'cosine' again"),
        (
            {"agents": {"mine": {"agent": {"kind": "es", "updates": 2}}}},
            "`updates` of agent mine follows from the benchmark's `episodes`, got 2; leave it out",
        ),
        ({"baselines": ["luck"]}, "`baselines` must be of uniform, small-backbone,"),
        (
            {"baselines": ["pilot-search"]},
            "hypergradient, gradual-unfreezing, early-stopping, stat",
        ),
        ({"episodes": 5}, "`episodes` must be a multiple of 2, the episodes of an update of agent"),
        ({"episodes": 2}, "`episodes` must be >= 4, got 2"),
        (
            {"env": {"instances": "fixed"}},
            "`env` may hold action, grid, start_multiplier,",
        ),
        ({"agents": {"cosine": {"agent": "es"}}}, "`agents` must have names of letters, digits"),
        (
            {"agents": {"soft": {"agent": "sac", "env": {"action": "grid"}}}, "episodes": 32},
            "`env.action` must be box for the agent sac, got grid",
        ),
        ({"surprise": 1}, "`surprise` is unknown; known keys are agents, baselines,"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_refused(fails, tmp_path, changes, sentence):
    path = write_files(tmp_path / "files", **changes)
    assert sentence in fails("benchmark", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--executor", "slurm"], "--executor must be pool or ray, got 'slurm'"),
        (["--gpus", "1"], "--gpus is used with --executor ray only, got 1; leave it out"),
        (["--executor", "ray", "--workers", "3"], "with --executor pool only, got 3; leave it out"),
        (["--resume"], "holds no benchmark to resume; leave --resume out to start one"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other; give one"),
    ],
)
def test_options_that_cannot_be_used_are_refused(fails, tmp_path, words, sentence):
    path = write_files(tmp_path / "files")
    assert sentence in fails("benchmark", path, "--out", tmp_path / "out", *words)


def test_what_is_given_on_the_command_line_is_put_into_the_file(tmp_path):
    path = write_files(tmp_path / "files", env={"observation": "normalised"})
    overrides = ["env.grid=linear", "env.start_multiplier=0.1", "agents.evolved.agent.population=4"]
    benchmark = load_benchmark(str(path), [*overrides, "episodes=8"])
    own = {"observation": "normalised", "grid": "linear", "start_multiplier": 0.1}
    assert benchmark.settings.env == own
    assert set(benchmark.settings.agents) == {"gradient", "evolved"}
    assert benchmark.experiment("scale", "evolved").agent.population == 4
    assert benchmark.experiment("scale", "evolved").agent.updates == 2


def test_settings_of_an_agent_that_is_a_files_name_are_put_into_a_copy(tmp_path):
    path = write_files(tmp_path / "files", agents={"named": {"agent": "reinforce"}}, episodes=96)
    named = load_benchmark(str(path)).experiment("scale", "named").agent
    rate = "agents.named.agent.policy_lr=0.5"
    changed = load_benchmark(str(path), [rate]).experiment("scale", "named").agent
    assert changed == named.model_copy(update={"policy_lr": 0.5})
    with pytest.raises(ConfigError, match="`updates` of agent named follows from the benchmark's"):
        load_benchmark(str(path), ["agents.named.agent.updates=3"])
    # In the order in which they are given.
    other = load_benchmark(str(path), ["agents.named.agent=ppo", rate]).experiment("scale", "named")
    assert other.agent.kind == "ppo"
    assert other.agent.policy_lr == 0.5


def test_an_agent_sees_every_suite_as_in_its_training(tmp_path):
    seen = {**SUITES, "still": {**SUITES["still"], "observation": "extended", "grid": "linear"}}
    benchmark = load_benchmark(str(write_files(tmp_path / "files", seen)))
    there = benchmark.seen_by("scale", "gradient", "still").env
    assert there.instances == "fixed"
    assert (there.observation, there.grid) == ("scaled", "log")


@pytest.mark.parametrize(("name", "before", "now"), [("episodes", 4, 8), ("test_instances", 2, 3)])
def test_results_of_another_budget_or_on_other_instances_are_refused(
    done, fails, name, before, now
):
    path, out = done
    said = fails("benchmark", path, "--out", out, "--resume", "--set", f"{name}={now}")
    assert f"`{name}` must be {before} as in the other results in " in said
    assert f"which would not be comparable, got {now}; set it so, or choose another --out" in said
    assert json.loads((out / "manifest.json").read_text())["settings"][name] == before


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


def test_two_commands_at_work_in_one_folder_are_refused(done, fails):
    path, out = done
    with FileLock(out / ".lock"):
        said = fails("benchmark", path, "--out", out, "--resume")
    assert "another `asg benchmark` is at work in " in said


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


def test_a_folder_of_something_else_is_left_alone(fails, finished, tmp_path):
    path, out = finished
    assert "already holds a benchmark; add --resume" in fails("benchmark", path, "--out", out)
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    for words in ([], ["--overwrite"]):
        assert "is not empty and holds no benchmark" in fails(
            "benchmark", path, "--out", tmp_path, *words
        )
    theirs = '{"format": 1, "name": "my web app"}'
    (tmp_path / "manifest.json").write_text(theirs, encoding="utf-8")
    for words in (["--resume"], ["--overwrite"]):
        said = fails("benchmark", path, "--out", tmp_path, *words)
        assert "is no manifest of a benchmark; restore it, or choose another --out" in said
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "manifest.json").read_text(encoding="utf-8") == theirs


def test_a_suite_without_labels_to_judge_by_is_refused_before_any_training(
    fails, image_folders, tmp_path
):
    source, target = image_folders
    folders = {"id": "ASG/ImageFolder-v0", "source": str(source), "target": str(target)}
    network = {"backbone": "torchvision:resnet18", "weights": "random", "image_size": 32}
    unlabelled = {**folders, **network, "target_labels": False, "reward": "train_loss"}
    path = write_files(tmp_path / "files", {**SUITES, "still": unlabelled})
    text = path.with_name("still.yaml").read_text(encoding="utf-8")
    path.with_name("still.yaml").write_text(text.replace("outer_valid_size: 50\n", ""))
    said = fails("benchmark", path, "--out", tmp_path / "out")
    assert "suite still has no labelled images of outer_valid, so there is nothing" in said
    assert not (tmp_path / "out").exists()


def test_what_a_failed_trial_has_written_does_not_count(done, asg, inline):
    path, out = done
    (out / "scale" / "cosine" / "seed-0" / "selection.json").unlink()
    assert "cosine" not in {judged["method"] for judged in read_results(out)}


def test_kinds_of_test_instances_take_turns():
    benchmark = load_benchmark("digits-quick")
    kinds = [kind_of(instance) for instance in benchmark.suites["digits-transfer"].tests(20)]
    assert {kind: kinds.count(kind) for kind in kinds[:4]} == dict.fromkeys(kinds[:4], 5)
    assert len(set(kinds)) == 4


def test_dry_run_names_every_trial_and_writes_nothing(asg, tmp_path):
    path = write_files(tmp_path / "files")
    result = asg("benchmark", path, "--out", tmp_path / "out", "--dry-run")
    assert result.status == 0
    assert "evolved on scale seed 1" in result.out
    # Four trainings of 4 episodes, two searches; 4 test instances for each of the 8 trials.
    assert "8 trials, about 64 episodes; at " in result.out
    assert "minutes with 2 at a time" in result.out
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_what_the_run_would_refuse(fails, tmp_path):
    files = {"scale": SUITES["scale"], "still": {**SUITES["still"], "outer_valid_size": 10**6}}
    path = write_files(tmp_path / "files", files)
    said = fails("benchmark", path, "--out", tmp_path / "out", "--dry-run")
    assert "`outer_valid_size` must be <= " in said


def test_a_run_that_is_a_benchmark_is_said_to_be_one(done, fails):
    _, out = done
    said = fails("evaluate", out)
    assert f"{out} holds a benchmark; give a run folder in it, such as {out}/SUITE/AGENT" in said
    assert "'digits-quick' is one of the shipped benchmarks, no experiment; give it to `asg b" in (
        fails("train", "digits-quick", "--out", out / "new")
    )
    assert "'digits-ppo' is one of the shipped experiments, no benchmark; give it to `asg tr" in (
        fails("benchmark", "digits-ppo", "--out", out / "new")
    )


def test_dry_run_of_a_resumed_benchmark_names_what_is_missing(done, asg):
    path, out = done
    (out / "scale" / "cosine" / "seed-0" / "test-still.json").unlink()
    result = asg("benchmark", path, "--out", out, "--resume", "--dry-run")
    assert result.status == 0
    assert result.out.splitlines()[0] == "cosine on scale"
    assert "\n1 trials, about 12 episodes; at " in result.out


def test_ray_that_is_not_installed_is_named_with_its_command(done, fails, monkeypatch):
    path, out = done
    (out / "scale" / "cosine" / "seed-0" / "test-still.json").unlink()
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    said = fails("benchmark", path, "--out", out, "--resume", "--executor", "ray")
    assert said == "asg: --executor ray needs Ray; pip install 'asg-env[ray]'\n"


def test_a_damaged_manifest_is_refused(done, fails):
    path, out = done
    (out / "manifest.json").write_text("{", encoding="utf-8")
    assert "is no manifest of a benchmark; restore it" in fails(
        "benchmark", path, "--out", out, "--resume"
    )


@pytest.mark.parametrize("name", ["digits-quick", "digits-unknown-scale", "digits-mixed"])
def test_shipped_benchmarks_fit_their_suites(name):
    benchmark = load_benchmark(name)

    assert benchmark.trials()
    if name != "digits-quick":
        assert benchmark.settings.seeds >= 5
        assert benchmark.settings.test_instances == 40


def test_suites_refuse_values_that_are_not_theirs(tmp_path):
    path = write_files(tmp_path / "files", {**SUITES, "scale": {"id": "ASG/None-v0"}})
    with pytest.raises(ConfigError, match=r"`id` must be one of ASG/Digits-v0"):
        load_benchmark(str(path))


@pytest.mark.slow
def test_a_coordinate_wise_controller_drives_a_network_of_more_layer_groups(tmp_path, asg, inline):
    pytest.importorskip("timm")
    larger = {"id": "ASG/DigitsImageNet-v0", "batch_size": 2, "outer_valid_size": 10}
    kinds = {
        "shared": {"network": "coordinate-wise"},
        "own": {"network": "per-feature"},
    }
    common = {"kind": "reinforce", "instances_per_update": 1, "rollouts_per_instance": 2}
    path = write_files(
        tmp_path / "files",
        {**SUITES, "still": {**SUITES["still"], **larger, "horizon": 1}},
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
