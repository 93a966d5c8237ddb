"""What `asg benchmark` is asked to do, and what it refuses."""

import json

import pytest
from filelock import FileLock

from agents.benchmark.plan import load_benchmark
from asg_env.instances import kind_of
from asg_env.validation import ConfigError


def test_results_of_another_version_of_a_suite_are_refused(
    done, fails, tmp_path, write_files, suites
):
    path, out = done
    others = write_files(tmp_path / "files", {**suites, "scale": {**suites["scale"], "horizon": 3}})

    said = fails("benchmark", others, "--out", out, "--resume")

    assert "holds results of suite scale in version " in said
    assert fails("benchmark", others, "--out", out, "--resume", "--dry-run") == said
    assert "results of two versions are not compared: choose another --out" in said


def test_an_agent_with_other_settings_under_the_same_name_is_refused(
    done, fails, tmp_path, write_files
):
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
def test_a_benchmark_that_cannot_be_run_is_refused(fails, tmp_path, changes, sentence, write_files):
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
def test_options_that_cannot_be_used_are_refused(fails, tmp_path, words, sentence, write_files):
    path = write_files(tmp_path / "files")
    assert sentence in fails("benchmark", path, "--out", tmp_path / "out", *words)


def test_what_is_given_on_the_command_line_is_put_into_the_file(tmp_path, write_files):
    path = write_files(tmp_path / "files", env={"observation": "normalised"})
    overrides = ["env.grid=linear", "env.start_multiplier=0.1", "agents.evolved.agent.population=4"]
    benchmark = load_benchmark(str(path), [*overrides, "episodes=8"])
    own = {"observation": "normalised", "grid": "linear", "start_multiplier": 0.1}
    assert benchmark.settings.env == own
    assert set(benchmark.settings.agents) == {"gradient", "evolved"}
    assert benchmark.experiment("scale", "evolved").agent.population == 4
    assert benchmark.experiment("scale", "evolved").agent.updates == 2


def test_settings_of_an_agent_that_is_a_files_name_are_put_into_a_copy(tmp_path, write_files):
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


def test_an_agent_sees_every_suite_as_in_its_training(tmp_path, write_files, suites):
    seen = {**suites, "still": {**suites["still"], "observation": "extended", "grid": "linear"}}
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


def test_two_commands_at_work_in_one_folder_are_refused(done, fails):
    path, out = done
    with FileLock(out / ".lock"):
        said = fails("benchmark", path, "--out", out, "--resume")
    assert "another `asg benchmark` is at work in " in said


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
    fails, image_folders, tmp_path, write_files, suites
):
    source, target = image_folders
    folders = {"id": "ASG/ImageFolder-v0", "source": str(source), "target": str(target)}
    network = {"backbone": "torchvision:resnet18", "weights": "random", "image_size": 32}
    unlabelled = {**folders, **network, "target_labels": False, "reward": "train_loss"}
    path = write_files(tmp_path / "files", {**suites, "still": unlabelled})
    text = path.with_name("still.yaml").read_text(encoding="utf-8")
    path.with_name("still.yaml").write_text(text.replace("outer_valid_size: 50\n", ""))
    said = fails("benchmark", path, "--out", tmp_path / "out")
    assert "suite still has no labelled images of outer_valid, so there is nothing" in said
    assert not (tmp_path / "out").exists()


def test_kinds_of_test_instances_take_turns():
    benchmark = load_benchmark("digits-quick")
    kinds = [kind_of(instance) for instance in benchmark.suites["digits-transfer"].tests(20)]
    assert {kind: kinds.count(kind) for kind in kinds[:4]} == dict.fromkeys(kinds[:4], 5)
    assert len(set(kinds)) == 4


def test_dry_run_names_every_trial_and_writes_nothing(asg, tmp_path, write_files):
    path = write_files(tmp_path / "files")
    result = asg("benchmark", path, "--out", tmp_path / "out", "--dry-run")
    assert result.status == 0
    assert "evolved on scale seed 1" in result.out
    # Four trainings of 4 episodes, two searches; 4 test instances for each of the 8 trials.
    assert "8 trials, about 64 episodes; at " in result.out
    assert "minutes with 2 at a time" in result.out
    assert not (tmp_path / "out").exists()


def test_dry_run_refuses_what_the_run_would_refuse(fails, tmp_path, write_files, suites):
    files = {"scale": suites["scale"], "still": {**suites["still"], "outer_valid_size": 10**6}}
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


def test_suites_refuse_values_that_are_not_theirs(tmp_path, write_files, suites):
    path = write_files(tmp_path / "files", {**suites, "scale": {"id": "ASG/None-v0"}})
    with pytest.raises(ConfigError, match=r"`id` must be one of ASG/Digits-v0"):
        load_benchmark(str(path))
