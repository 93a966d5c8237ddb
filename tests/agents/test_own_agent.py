"""An agent in a file of the user's own: docs/examples/own_agent.py, and files that are none."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from agents.benchmark.plan import AgentEntry
from agents.experiment import AGENT_PARTS, SETTINGS_PARTS, Experiment, load_experiment
from agents.export import export_schedule
from agents.rollout import RolloutPool, run_policy
from agents.run_folder import RunFolder, read_metrics
from agents.train import load_policies, train
from asg_env.schedule import LearnedSchedule
from asg_env.user_code import load_module
from asg_env.validation import ConfigError, validate

TASK = "ASG/Digits-v0"
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAME = "CrossEntropySettings"
TINY = {"updates": 3, "population": 4, "elites": 2, "instances_per_update": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A copy of the example in a stranger's folder."""
    return shutil.copy(EXAMPLES / "own_agent.py", tmp_path_factory.mktemp("theirs") / "mine.py")


@pytest.fixture(scope="module")
def make_own(make_values, file):
    """Tiny experiments of the example."""

    def make(kind=f"{file}:{NAME}", seed=3, **env):
        train = {"workers": 2, "search_episodes": 0}
        values = make_values(env={"action": "box", **env}, seed=seed, train=train)
        return Experiment({**values, "agent": {"kind": kind, **TINY}})

    return make


class StopHere(Exception):
    pass


def stop_after_first(seed, update, values):
    if update == 0:
        raise StopHere


@pytest.fixture(scope="module")
def resumed(make_own, tmp_path_factory):
    """A run by two workers, which was stopped after an update and then resumed."""
    path = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.raises(StopHere):
        train(RunFolder.create(path, make_own(), False, False), stop_after_first)
    assert len(read_metrics(path / "seed-0")) == 1
    train(RunFolder.create(path, make_own(), resume=True, overwrite=False), lambda *_: None)
    return path


@pytest.fixture
def run(resumed, tmp_path):
    """A run of one's own, opened from another folder than it was started in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        return RunFolder.open(Path(shutil.copytree(resumed, tmp_path / "run")))


@pytest.fixture
def inline(monkeypatch, file, inline_pool, no_workers):
    """Everything runs in this process."""
    monkeypatch.setattr(load_module(f"{file}:{NAME}"), "RolloutPool", inline_pool)
    monkeypatch.setattr("agents.evaluate.RolloutPool", inline_pool)
    monkeypatch.setattr("agents.cli.export.RolloutPool", inline_pool)


# Runs


def test_it_resumes_to_the_bits_of_a_run_that_was_not_stopped(resumed, make_own, inline, tmp_path):
    whole = RunFolder.create(tmp_path / "run", make_own(), False, False)
    train(whole, lambda *_: None)

    checkpoint = "seed-0/checkpoints/last.json"
    assert (whole.path / checkpoint).read_bytes() == (resumed / checkpoint).read_bytes()
    lines = [read_metrics(path / "seed-0") for path in (whole.path, resumed)]
    for line in sum(lines, []):
        del line["seconds"]
    assert lines[0] == lines[1]
    assert [line["episodes"] for line in lines[0]] == [4, 8, 12]


def test_another_seed_gives_another_policy(resumed, make_own, inline, tmp_path):
    other = RunFolder.create(tmp_path / "run", make_own(seed=4), False, False)
    train(other, lambda *_: None)
    (policy,), (before,) = load_policies(other), load_policies(RunFolder.open(resumed))
    assert not np.array_equal(policy.mean, before.mean)


def test_its_settings_hold_the_whole_path(make_own, file, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(file).parent)
    experiment = make_own(kind=f"mine.py:{NAME}")
    assert experiment.agent.kind == f"{Path(file).resolve()}:{NAME}"
    assert experiment.digest() == make_own().digest()
    monkeypatch.chdir(tmp_path)
    assert Experiment(experiment.to_dict()).digest() == experiment.digest()


def test_its_policy_acts_in_workers_as_it_does_here(run, inline_pool, instance):
    (policy,) = load_policies(run)
    jobs = [(policy, instance, 5, greedy) for greedy in (False, True)]
    experiment = run.experiment
    here = list(inline_pool(TASK, experiment.env).map(run_policy, jobs))
    with RolloutPool(TASK, experiment.env, 1) as pool:
        there = list(pool.map(run_policy, jobs))
    for left, right in zip(here, there, strict=True):
        np.testing.assert_array_equal(left.actions, right.actions)
        np.testing.assert_array_equal(left.rewards, right.rewards)
    assert not np.array_equal(here[0].actions, here[1].actions)


def test_it_is_exported(run, inline_pool):
    (policy,) = load_policies(run)
    pool = inline_pool(TASK, run.experiment.env)
    schedule = export_schedule(run, policy, pool, episodes=2, deterministic=True)
    assert np.shape(schedule.multipliers) == (3, 5)


def test_commands_take_it_like_any_other(asg, run, inline, monkeypatch, tmp_path):
    monkeypatch.setattr("agents.statistics.RESAMPLES", 50)
    path = run.path
    assert asg("evaluate", path, "--instances", "1").status == 0
    first = json.loads((path / "results.json").read_text(encoding="utf-8"))["rows"][0]
    assert first["name"].startswith("controller")
    assert first["cost"]["episodes"] == 12 + 16  # of training, and of choosing how to act
    out = tmp_path / "schedule.json"
    assert asg("export", path, "--out", out, "--episodes", "1").status == 0
    assert LearnedSchedule.load(out).task == TASK
    assert asg("fit", TASK, "--controller", path, "--out", tmp_path / "fit").status == 0


@pytest.mark.slow
def test_a_benchmark_trains_and_judges_it_in_worker_processes(asg, file, monkeypatch, tmp_path):
    monkeypatch.setattr("agents.statistics.RESAMPLES", 50)
    suite = {"id": TASK, "horizon": 2, "inner_steps": 1, "outer_valid_size": 50}
    (tmp_path / "still.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    small = {key: value for key, value in TINY.items() if key != "updates"}
    agent = {"agent": {"kind": f"{file}:{NAME}", **small}, "env": {"action": "box"}}
    values = {
        "suites": [str(tmp_path / "still.yaml")],
        "agents": {"mine": agent},
        "baselines": ["random"],
        "episodes": 8,
        "seeds": 2,
        "test_instances": 1,
    }
    path, out = tmp_path / "bench.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = asg("benchmark", path, "--out", out, "--workers", "1")
    assert result.status == 0, result.out + result.err
    run = RunFolder.open(out / "still" / "mine")
    assert [policy.mean.shape for policy in load_policies(run)] == [(5, 10)] * 2
    judged = json.loads((out / "still" / "mine" / "seed-1" / "test-still.json").read_text())
    assert (len(judged["results"]), judged["cost"]["episodes"]) == (1, 8 + 16)


# The example's own checks


def test_example_refuses_what_it_cannot_use(make_own, file):
    with pytest.raises(ConfigError, match="`env.action` must be box, got grid"):
        make_own(action="grid").check()
    values = make_own().to_dict()
    values["agent"]["elites"] = 5
    with pytest.raises(ConfigError, match="`elites` must be <= population, 4, got 5"):
        Experiment(values)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"updates": 1}', '{"mean": 1, "deviation": 1}'])
def test_example_refuses_a_damaged_checkpoint(run, text):
    path = run.path / "seed-0" / "checkpoints" / "last.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"last\.json is no whole checkpoint"):
        load_policies(run)


def test_example_refuses_weights_for_other_observations(run):
    values = run.experiment.to_dict()
    values["env"]["observation"] = "extended"
    elsewhere = RunFolder(run.path, Experiment(values))
    with pytest.raises(ConfigError, match=r"weights of shape \(5, 10\), here .* \(5, 26\)"):
        load_policies(elsewhere)


def test_example_moves_to_the_best_candidates(make_own, file, make_episode):
    module = load_module(f"{file}:{NAME}")
    experiment = make_own()
    learner = module.Learner(TASK, experiment.env, experiment.agent, 0, 0)
    before, drawn = learner.policy, []

    class Pool:
        def map(self, function, jobs):
            for number, (policy, _, seed, _) in enumerate(jobs):
                policy.seed(seed)
                drawn.append(policy.drawn)
                yield make_episode([[3.0], [1.0], [2.0], [0.0]][number])

    metrics = learner._update(Pool(), 0)
    np.testing.assert_array_equal(learner.policy.mean, (drawn[0] + drawn[2]) / 2)
    spread = np.abs(drawn[0] - drawn[2]) / 2
    np.testing.assert_allclose(learner.policy.deviation, np.maximum(spread, 0.1))
    assert (before.mean == 0).all()
    assert (metrics["episodes"], metrics["return"]) == (4, 1.5)


# Files that hold no agent

WHOLE = """
from asg_env.validation import Settings

class Mine(Settings):
    kind: str
    updates: int = 1

    @property
    def episodes(self):
        return self.updates

class Learner: pass
CHECKPOINT = "last.json"
def load_policy(path, experiment): pass
"""


@pytest.fixture
def refusal(make_values, tmp_path):
    """The sentence about a file of this text."""

    def refuse(text, name="Mine", **settings):
        path = tmp_path / "wrong.py"
        if text is not None:
            path.write_text(text, encoding="utf-8")
        values = {**make_values(), "agent": {"kind": f"{path}:{name}", **settings}}
        with pytest.raises(ConfigError) as caught:
            Experiment(values)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(path.resolve()), "FILE")

    return refuse


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (("class Learner: pass", ""), "FILE has no Learner, add it"),
        (("CHECKPOINT = ", "OTHER = "), "FILE has no CHECKPOINT, add it"),
        (("def load_policy", "def load"), "FILE has no load_policy, add it"),
        (("kind: str", "sort: str"), "Mine of FILE has no kind, add it"),
        (("updates: int = 1", "rounds: int = 1"), "Mine of FILE has no updates, add it"),
        (("def episodes", "def rollouts"), "Mine of FILE has no episodes, add it"),
    ],
)
def test_a_file_without_a_part_of_an_agent_is_refused(refusal, change, missing):
    assert refusal(WHOLE.replace(*change)) == (
        "`agent.kind` must name settings with kind, updates, episodes in a file with Learner, "
        f"CHECKPOINT, load_policy; {missing}"
    )


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (None, "Mine", "`agent.kind` must name an existing file, got FILE; mend it"),
        (
            "1 / 0",
            "Mine",
            "`agent.kind` must name a file that runs, FILE ends in ZeroDivisionError: division by "
            "zero; mend it",
        ),
        (
            WHOLE,
            "Yours",
            "`agent.kind` must name something that can be called, FILE has no such 'Yours'; mend "
            "it",
        ),
        *(
            (
                WHOLE,
                name,
                "`agent.kind` must name a subclass of asg_env.validation.Settings, "
                f"{name} of FILE is none; mend it",
            )
            for name in ("Learner", "load_policy")
        ),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(refusal, text, name, sentence):
    assert refusal(text, name) == sentence


def test_settings_of_ones_own_are_checked_like_ours(refusal):
    assert refusal(WHOLE, updates=1.5).startswith("`agent.updates` must be an integer, got 1.5")
    assert refusal(WHOLE, rate=1) == ("`agent.rate` is unknown; known keys are kind, updates")


def test_a_file_without_a_name_is_no_agent(make_own):
    with pytest.raises(ConfigError, match=r"must be one of reinforce, .*, or FILE\.py:NAME, got"):
        make_own(kind="mine.py")


# Documents


def test_the_example_experiment_runs_from_the_root_of_the_repository(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parents[1])
    experiment = load_experiment("docs/examples/own_agent.yaml")
    experiment.check()
    assert experiment.agent.kind == f"{EXAMPLES / 'own_agent.py'}:{NAME}"


def test_the_documents_name_what_a_file_is_checked_for():
    text = (EXAMPLES.parent / "algorithms.md").read_text(encoding="utf-8")
    section = text.partition("## An agent of your own\n")[2]
    for part in (*AGENT_PARTS, *SETTINGS_PARTS):
        assert f"`{part}" in section
    experiment, benchmark = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    (entry,) = yaml.safe_load(benchmark)["agents"].values()
    for agent in (yaml.safe_load(experiment)["agent"], entry["agent"]):
        file, _, name = agent["kind"].partition(":")
        assert (EXAMPLES.parents[1] / file, name) == (EXAMPLES / "own_agent.py", NAME)
    assert validate(AgentEntry, entry, "").env == {"action": "box"}
