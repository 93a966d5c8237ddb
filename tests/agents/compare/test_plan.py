import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agents.baselines import uniform
from agents.compare.plan import CONTROLLER, ComparisonSettings, Plan
from agents.experiment import config_path
from agents.fit import LiveController
from agents.recurrent_policy import RecurrentPolicy
from agents.run_folder import RunFolder
from asg_env.task_settings import settings_class
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import read_yaml

TASK = "ASG/Digits-v0"
SHARING = {"name": "sharing", "share_rate": True, "tune": {"rate": [0.3, 0.1]}}


def row(**changes):
    """A row of the file; a change of None takes the key away."""
    values = {"name": "a", "rate": 0.1, **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.fixture
def methods(make_plan):
    """Return a row's candidates, by what they are called."""

    def candidates(shared=0.7, others=(), env=None, **changes):
        plan = make_plan([row(**changes), *others], **(env or {}))
        return dict(plan.row(plan.wanted.rows[0], shared).candidates)

    return candidates


def weights(method):
    return {name: term.weight for name, term in method.settings.guidance_terms().items()}


# What rows become


def test_ordered_puts_the_row_first_that_shares_its_rate(make_plan):
    rows = [row(name="a", rate="shared"), row(name="b"), SHARING, row(name="c", rate="shared")]
    plan = make_plan(rows)
    assert [wanted.name for wanted in plan.ordered()] == ["sharing", "a", "b", "c"]
    assert [wanted.name for wanted in plan.wanted.rows] == ["a", "b", "sharing", "c"]


def test_row_without_tuning_has_one_candidate(methods, make_settings):
    found = methods(rule="layer-decay", options={"decay": 0.5}, paper=3)
    assert list(found) == ["rate 0.1"]
    method = found["rate 0.1"]
    assert (method.rule, method.rate, method.options) == ("layer-decay", 0.1, {"decay": 0.5})
    assert method.settings == make_settings()


def test_row_tunes_the_rate(methods, make_settings):
    found = methods(rate=None, tune={"rate": [1, 0.03]})
    assert list(found) == ["rate 1", "rate 0.03"]
    assert [method.rate for method in found.values()] == [1.0, 0.03]
    assert all(method.settings == make_settings() for method in found.values())


def test_row_tunes_a_weight_at_its_own_rate(methods):
    found = methods(tune={"kl": [0.01, 3]})
    assert list(found) == ["kl 0.01", "kl 3"]
    assert [weights(method) for method in found.values()] == [{"kl": 0.01}, {"kl": 3.0}]
    assert [method.rate for method in found.values()] == [0.1, 0.1]


def test_row_tunes_a_weight_at_the_shared_rate(methods):
    found = methods(rate="shared", tune={"ewc": [1, 10]}, others=[SHARING])
    assert list(found) == ["ewc 1, rate 0.7", "ewc 10, rate 0.7"]
    assert [weights(method) for method in found.values()] == [{"ewc": 1.0}, {"ewc": 10.0}]
    assert [method.rate for method in found.values()] == [0.7, 0.7]
    assert list(methods(rate="shared", others=[SHARING])) == ["rate 0.7"]


def test_row_keeps_options_and_other_terms_beside_the_one_it_tunes(methods):
    guidance = {"kl": {"weight": 1, "temperature": 2.0, "cap": 9}, "ewc": 0.5}
    (method,) = methods(guidance=guidance, tune={"kl": [3]}).values()
    assert weights(method) == {"kl": 3.0, "ewc": 0.5}
    term = method.settings.guidance_terms()["kl"]
    assert (term.options, term.cap) == ({"temperature": 2.0}, 9.0)
    (method,) = methods(guidance={"kl": 1, "ewc": 0.5}, tune={"kl": [3]}).values()
    assert weights(method) == {"kl": 3.0, "ewc": 0.5}


def test_row_has_the_guidance_of_the_environment_unless_it_says_otherwise(methods):
    (own,) = methods(env={"guidance": {"ewc": 2}}).values()
    (none,) = methods(guidance={}, env={"guidance": {"ewc": 2}}).values()
    (tuned,) = methods(tune={"kl": [1]}, env={"guidance": {"ewc": 2}}).values()
    assert [weights(m) for m in (own, none, tuned)] == [{"ewc": 2.0}, {}, {"kl": 1.0}]


def test_row_may_say_guidance_where_the_environment_has_a_kl_weight(methods):
    env = {"kl_weight": 0.5}
    (own,) = methods(env=env).values()
    (given,) = methods(guidance={"ewc": 1}, env=env).values()
    (tuned,) = methods(tune={"kl": [3]}, env=env).values()
    (further,) = methods(env={"kl_weight": 0.5}, tune={"l2_sp": [2]}, guidance={"kl": 1}).values()
    assert weights(own) == {"kl": 0.5}
    assert weights(given) == {"ewc": 1.0}
    assert weights(tuned) == {"kl": 3.0}
    assert weights(further) == {"kl": 1.0, "l2_sp": 2.0}


def test_row_has_settings_of_its_own(make_plan):
    plan = make_plan([row(env={"optimizer": "adam", "base_lr": 0.01}), row(name="b")])
    ours, theirs = (
        next(iter(plan.row(wanted, 1.0).candidates.values())).settings
        for wanted in plan.wanted.rows
    )
    assert (ours.optimizer, ours.base_lr, ours.windows()) == ("adam", 0.01, (2, 2, 2))
    assert theirs == plan.env


def test_pilot_search_needs_no_rate(methods):
    found = methods(rule="pilot-search", rate=None, tune={"kl": [1, 3]}, options={"steps": 2})
    assert list(found) == ["kl 1", "kl 3"]
    controller = next(iter(found.values())).controller(SimpleNamespace(layer_groups=("a", "b")))
    assert controller.steps == 2


def test_method_builds_its_rule_for_the_layer_groups(methods):
    (method,) = methods(rate=0.3).values()
    assert method.controller(SimpleNamespace(layer_groups=("a", "b"))) == uniform(0.3, 2)


def test_rows_use_a_term_and_a_rule_in_a_file_of_ones_own(methods, user_code):
    found = methods(
        rule=f"{user_code}:Share", options={"share": 0.5}, tune={f"{user_code}:Anchor": [1, 2]}
    )
    assert [weights(method) for method in found.values()] == [{"Anchor": 1.0}, {"Anchor": 2.0}]
    controller = next(iter(found.values())).controller(SimpleNamespace(layer_groups=("a", "b")))
    assert controller.multipliers(0.0, None) == [0.05, 0.05]


def test_method_refuses_options_that_a_rule_of_ones_own_does_not_take(methods, user_code):
    (method,) = methods(rule=f"{user_code}:Share", options={"size": 2}).values()
    with pytest.raises(ConfigError, match=r"`options` must fit the rule .*mine\.py:Share, got"):
        method.controller(SimpleNamespace(layer_groups=("a", "b")))


# The shipped rows


@pytest.fixture(scope="module")
def shipped():
    values = read_yaml(config_path("compare", "ablation"))
    settings = validate(settings_class(TASK), {}, "env")
    return Plan(TASK, settings, validate(ComparisonSettings, values, "ablation"), ())


def test_shipped_rows_hold_the_originals_table_with_equal_budgets(shipped):
    papers = [wanted.paper for wanted in shipped.wanted.rows]
    assert [paper for paper in papers if paper is not None] == list(range(1, 9))
    assert shipped.ordered()[0].share_rate
    tuned = {
        wanted.name: len(shipped.row(wanted, 0.1).candidates) for wanted in shipped.wanted.rows
    }
    assert tuned.pop("large rate") == 1  # it has the shared rate and nothing to tune
    assert set(tuned.values()) == {6}


def test_shipped_rows_stand_for_what_their_names_say(shipped):
    by_name = {wanted.name: shipped.row(wanted, 0.1) for wanted in shipped.wanted.rows}
    terms = {
        name: {term for method in found.candidates.values() for term in weights(method)}
        for name, found in by_name.items()
    }
    for name in ("large rate", "small backbone, large head", "frozen backbone"):
        assert terms[name] == set()
    assert terms["large rate + guidance"] == {"kl"}
    assert terms["small backbone, large head + guidance"] == {"kl"}
    assert terms["feature L2"] == {"feature_l2"}
    assert terms["weight L2"] == {"weight_l2"}
    assert terms["synaptic intelligence"] == {"si"}
    for found in by_name.values():
        for method in found.candidates.values():
            method.controller(SimpleNamespace(layer_groups=("a", "b", "c")))


# Controllers


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A trained run of one's own."""
    shutil.copytree(trained_run.path, tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, **sections) -> Path:
    """Change values in a run's settings; those of the digits go with another task."""
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if sections.get("env", {}).get("id", TASK) != TASK:
        for name in ("classes", "width", "target"):
            del values["env"][name]
    for name, section in sections.items():
        values[name].update(section)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return run


def test_plan_reads_controllers(make_plan, run, tmp_path):
    other = change(Path(shutil.copytree(run, tmp_path / "other")), env={"reward": "train_loss"})
    plan = make_plan([row()], runs=[run, other])
    first, second = plan.controllers
    assert (first.name, first.paper, second.name, second.paper) == (
        CONTROLLER,
        9,
        "controller 2",
        None,
    )
    assert first.reward == "run, greedy, reward 1 x gain"
    assert second.reward == "other, greedy, reward 1 x train_loss"
    assert (first.real_labels, second.real_labels) == (True, False)
    assert first.candidates == {}
    (method,) = first.seeds
    assert isinstance(method.policy, RecurrentPolicy)
    assert method.settings == RunFolder.open(run).experiment.env
    assert method.greedy


def test_plan_lets_a_controller_act_as_its_comparison_chose(make_plan, run):
    (run / "results.json").write_text('{"protocol": {"primary": "controller (sampled)"}}')
    (controller,) = make_plan([row()], runs=[run]).controllers
    assert controller.reward == "run, sampled, reward 1 x gain"
    assert [method.greedy for method in controller.seeds] == [False]


def test_plan_has_a_method_for_each_training_seed(make_plan, run, env):
    shutil.copytree(run / "seed-0", run / "seed-1")
    change(run, train={"seeds": 2})
    (controller,) = make_plan([row()], runs=[run]).controllers
    assert len(controller.seeds) == 2
    for method in controller.seeds:
        assert isinstance(method.controller(env.trainer), LiveController)


def test_plan_refuses_what_is_no_run(refused, tmp_path):
    assert refused([row()], runs=[tmp_path]) == (
        f"{tmp_path} is not a run folder (no config.yaml in it); give the --out of an earlier "
        "`asg train`"
    )


def test_plan_refuses_a_run_that_was_not_finished(refused, run):
    shutil.rmtree(run / "seed-0" / "checkpoints")
    assert f"{run} has no checkpoint of training seed 0" in refused([row()], runs=[run])


def test_plan_refuses_a_controller_of_another_task(refused, run):
    change(run, env={"id": "ASG/DigitsImageNet-v0"})
    assert refused([row()], runs=[run]) == (
        f"--controller {run} was trained on ASG/DigitsImageNet-v0, got {TASK}; give one that was "
        "trained on this task"
    )


def test_plan_refuses_a_controller_of_other_images(run):
    task, folders = "ASG/ImageFolder-v0", {"source": "renders", "target": "photographs"}
    change(run, env={"id": task, **folders})
    settings = validate(settings_class(task), {**folders, "source": "drawings"}, "env")
    wanted = validate(ComparisonSettings, {"rows": [row()]}, "file")
    with pytest.raises(ConfigError) as error:
        Plan(task, settings, wanted, [run])
    assert str(error.value) == (
        f"--controller {run} is on other images or another network than what it stands "
        "beside; set the same"
    )


def test_plan_refuses_a_controller_of_other_inner_steps(refused, run):
    assert refused([row()], runs=[run], horizon=5) == (
        f"--controller {run} trains with inner steps 6, what it stands beside with 10; set the same"
    )


# The digest, by which a finished row is known again


def test_digest_differs_with_rows_and_settings(make_plan):
    plans = [
        make_plan([row()]),
        make_plan([row(rate=0.3)]),
        make_plan([row(rule="cosine")]),
        make_plan([row(), row(name="b")]),
        make_plan([row()], base_lr=0.2),
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert make_plan([row()]).digest() == plans[0].digest()


def test_digest_stays_when_claims_change(make_plan):
    claim = {"claim": "c", "figure": "accuracy", "better": "a", "worse": "a"}
    assert make_plan([row()], claims=[claim]).digest() == make_plan([row()]).digest()


def test_digest_knows_a_controllers_checkpoint(make_plan, run):
    alone, before = make_plan([row()]).digest(), make_plan([row()], runs=[run]).digest()
    assert make_plan([row()], runs=[run]).digest() == before != alone
    path = run / "seed-0" / "checkpoints" / "last.safetensors"
    tensors = load_file(str(path))
    next(t for t in tensors.values() if t.is_floating_point()).add_(1e-3)
    with safe_open(str(path), framework="pt") as file:
        save_file(tensors, str(path), file.metadata())
    assert make_plan([row()], runs=[run]).digest() != before


@pytest.mark.parametrize(
    ("rule", "options"),
    [("uniform", {"decay": 0.5}), ("layer-decay", {"share": 1}), ("pilot-search", {"top": 1})],
)
def test_method_refuses_options_that_its_rule_does_not_take(methods, rule, options):
    rate = None if rule == "pilot-search" else 0.1
    (method,) = methods(rule=rule, rate=rate, options=options).values()
    with pytest.raises(ConfigError) as error:
        method.controller(SimpleNamespace(layer_groups=("a", "b")))
    assert str(error.value).startswith(f"`options` must fit the rule {rule}, got {options}: ")
