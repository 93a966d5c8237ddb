import pytest

from agents.compare.plan import CONTROLLER
from agents.rules import RULES
from asg_env.core.guidance import TERMS
from asg_env.validation import ConfigError

TASK = "ASG/Digits-v0"
SHARING = {"name": "sharing", "share_rate": True, "tune": {"rate": [0.3, 0.1]}}


def row(**changes):
    """A row of the file; a change of None takes the key away."""
    values = {"name": "a", "rate": 0.1, **changes}
    return {key: value for key, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row(rule="magic")],
            f"`rows.a.rule` must be one of {', '.join(RULES)}, or FILE.py:NAME, got 'magic'; set "
            "it so",
        ),
        (
            [row(), row(rule="cosine")],
            "`rows` must have names that differ in letters or digits, and none is 'controller', "
            "got 'a' and 'a'; rename one",
        ),
        (
            [SHARING, {**SHARING, "name": "b"}],
            "`rows` must have at most one with share_rate, which tunes `rate`; mend the file",
        ),
        (
            [row(share_rate=True)],
            "`rows` must have at most one with share_rate, which tunes `rate`; mend the file",
        ),
        (
            [row(share_rate=True, tune={"kl": [0.1, 1]})],
            "`rows` must have at most one with share_rate, which tunes `rate`; mend the file",
        ),
        (
            [row(rate="shared"), row(name="b", tune={"rate": [1, 0.1]}, rate=None)],
            "`rows` with rate: shared need a row with share_rate; add it",
        ),
        ([row(rate=None)], "`rows.a.rate` must be given or tuned, and not both; mend it"),
        (
            [row(tune={"rate": [1, 0.1]})],
            "`rows.a.rate` must be given or tuned, and not both; mend it",
        ),
        (
            [SHARING, row(rate="shared", tune={"rate": [1, 0.1]})],
            "`rows.a.rate` must be given or tuned, and not both; mend it",
        ),
        (
            [row(rate=None, tune={"kl": [0.1, 1]})],
            "`rows.a.rate` must be given or tuned, and not both; mend it",
        ),
        (
            [row(tune={"kl": [0.1], "ewc": [1]})],
            "`rows.a.tune` must hold one coefficient with candidates; mend it",
        ),
        (
            [row(tune={"kl": []})],
            "`rows.a.tune` must hold one coefficient with candidates; mend it",
        ),
        (
            [row(guidance={"magic": 1})],
            f"`rows.a.guidance` must name guidance terms of {', '.join(TERMS)}, or FILE.py:NAME, "
            "got 'magic'; set rows.a.guidance to such a value",
        ),
        (
            [row(tune={"magic": [1, 2]})],
            f"`rows.a.guidance` must name guidance terms of {', '.join(TERMS)}, or FILE.py:NAME, "
            "got 'magic'; set rows.a.guidance to such a value",
        ),
        (
            [row(guidance={"kl": -1})],
            "`rows.a.guidance` must map 'kl' to a weight >= 0, got -1; set rows.a.guidance to such "
            "a value",
        ),
        (
            [row(guidance={"kl": {"weight": 1, "layer": "x"}})],
            "`rows.a.guidance` must give 'kl' keys of weight, cap, temperature, got 'layer'; set "
            "rows.a.guidance to such a value",
        ),
        (
            [row(env={"base_lr": 0})],
            "`rows.a.base_lr` must be > 0.0, got 0; set rows.a.base_lr to such a value",
        ),
    ],
    ids=[
        "unknown-rule",
        "name-twice",
        "two-share",
        "share-of-a-fixed-rate",
        "share-without-tuning-rate",
        "shared-of-nobody",
        "no-rate",
        "rate-given-and-tuned",
        "rate-shared-and-tuned",
        "weight-tuned-without-rate",
        "two-coefficients",
        "no-candidates",
        "unknown-term",
        "unknown-term-tuned",
        "negative-weight",
        "unknown-option-of-a-term",
        "env-out-of-bounds",
    ],
)
def test_plan_refuses_rows_in_a_sentence(refused, rows, message):
    assert refused(rows) == message


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([row(name="a + b"), row(name="A - b")], "got 'a + b' and 'A - b'; rename one"),
        ([row(name="Controller")], "got 'controller' and 'Controller'; rename one"),
        (
            [row(env={"horizon": 9})],
            "got 'horizon'; give what is the same for all rows with --set",
        ),
        ([row(tune={"kl": [0.1, -1]}, rate=0.1)], "rows.0.tune.kl.1` must be >= 0.0, got -1"),
        ([row(tune={"kl": [0.1, 0.1]}, rate=0.1)], "`rows.a.tune` must hold different candidates"),
        ([row(rule="pilot-search")], "`rows.a.rate` is not used by pilot-search; leave it out"),
        ([row(speed=3)], "rows.0.speed` is unknown; take it out"),
        ([], "rows` must hold at least 1 entry, got none"),
    ],
    ids=[
        "names-of-one-file",
        "name-of-the-controllers-row",
        "setting-of-all-rows",
        "negative-candidate",
        "candidate-twice",
        "rate-of-pilot-search",
        "unknown-key",
        "no-rows",
    ],
)
def test_plan_refuses_rows_and_names_the_entry(refused, rows, part):
    assert part in refused(rows)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"tune": {"kl": [0.1, -1]}}, "got -1"),
        ({"rate": -0.5}, "got -0.5"),
        ({"rate": "large"}, "got 'large'"),
        ({"speed": 3}, "unknown"),
        ({"name": None}, "missing"),
    ],
)
def test_file_refuses_values_of_a_row_that_make_no_sense(refused, changes, got):
    assert got in refused([row(**changes)])


def test_file_refuses_no_rows_and_figures_that_nobody_measures(refused):
    assert "`file.rows`" in refused([])
    claim = {"claim": "c", "figure": "speed", "better": "a", "worse": "a"}
    assert "got 'speed'" in refused([row()], claims=[claim])


@pytest.mark.parametrize("name", ["speed", "batch_size", "kl_weight", "guidance", "metric"])
def test_plan_refuses_settings_that_are_not_a_rows_own(refused, name):
    message = refused([row(env={name: 1})])
    assert message.startswith("`rows.a.env` must hold settings of optimizer, momentum, ")
    assert f"got '{name}'; give what is the same for all rows with --set" in message


def test_plan_reserves_the_names_of_the_controllers(make_plan, trained_run):
    make_plan([row(name="controller 2")])
    with pytest.raises(ConfigError, match="got 'controller 2' and 'controller 2'; rename one"):
        make_plan([row(name="controller 2")], runs=[trained_run.path, trained_run.path])


@pytest.mark.parametrize(("name", "value"), [("batch_size", 4), ("flip_average", True)])
def test_plan_refuses_a_controller_of_another_protocol(make_plan, trained_run, name, value):
    with pytest.raises(ConfigError, match=f"trains with env.{name} .*, what it stands beside with"):
        make_plan([row()], runs=[trained_run.path], **{name: value})


def test_tuned_terms_keep_the_options_of_the_environment(make_plan):
    plan = make_plan([row(tune={"kl": [1, 2]})], guidance={"kl": {"weight": 75, "cap": 9}})
    methods = plan.row(plan.wanted.rows[0], 1.0).candidates.values()
    terms = [method.settings.guidance_terms()["kl"] for method in methods]
    assert [(term.weight, term.cap) for term in terms] == [(1.0, 9.0), (2.0, 9.0)]


@pytest.mark.parametrize("key", ["rule", "guidance", "tune"])
def test_plan_refuses_a_users_file_that_cannot_be_used(refused, user_code, tmp_path, key):
    def message(name):
        value = {"rule": name, "guidance": {name: 1.0}, "tune": {name: [1.0, 2.0]}}[key]
        return refused([row(**{key: value})])

    field = "rule" if key == "rule" else "guidance"
    gone, broken = tmp_path / "gone.py", tmp_path / "broken.py"
    broken.write_text("1 / 0\n", encoding="utf-8")
    assert message(f"{gone}:Share").startswith(
        f"`rows.a.{field}` must name an existing file, got {gone};"
    )
    assert message(f"{broken}:Share").startswith(
        f"`rows.a.{field}` must name a file that runs, {broken} ends in ZeroDivisionError: "
        "division by zero;"
    )
    assert message(f"{user_code}:Other").startswith(
        f"`rows.a.{field}` must name something that can be called, {user_code} has no such 'Other';"
    )


def test_plan_refuses_claims_about_rows_that_are_not_there(refused, make_plan):
    claim = {"claim": "c", "figure": "accuracy", "better": "a", "worse": "b"}
    assert refused([row()], claims=[claim]) == (
        "`claims` must name rows of the file, got 'b'; add it"
    )
    assert "got 'b'" in refused([row()], claims=[{**claim, "better": "b", "worse": "a"}])
    # A controller may not have been given.
    make_plan([row()], claims=[{**claim, "worse": CONTROLLER}])
