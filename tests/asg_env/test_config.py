import math
import re

import pytest

from asg_env.config import EnvSettings
from asg_env.validation import ConfigError, validate
from asg_env.yaml_files import parse_yaml, read_yaml


def settings(**values):
    return validate(EnvSettings, values, "")


def refusal(where="", **values):
    with pytest.raises(ConfigError, match="`") as caught:
        validate(EnvSettings, values, where)
    return str(caught.value)


def test_settings_have_the_documented_defaults():
    default = settings()

    assert default.windows() == (10,) * 15
    assert weights() == {"kl": 0.1}
    assert default.reward == {"gain": 1.0}
    assert (default.action, default.grid, default.start_multiplier) == ("relative", "log", 0.01)
    assert (default.instances, default.split, default.observation) == ("fixed", "train", "scaled")
    trainer = default.trainer_settings()
    assert (trainer.optimizer, trainer.momentum, trainer.momentum_form) == ("sgd", 0.9, "pytorch")
    assert trainer.total_steps == 150


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"horizon": 0}, "`horizon` must be >= 1, got 0; set horizon to such a value"),
        ({"horizon": -3}, "`horizon` must be >= 1, got -3; set horizon to such a value"),
        ({"horizon": True}, "`horizon` must be an integer, got True; set horizon to such a value"),
        ({"horizon": 1.5}, "`horizon` must be an integer, got 1.5; set horizon to such a value"),
        ({"horizon": "3"}, "`horizon` must be an integer, got '3'; set horizon to such a value"),
        (
            {"base_lr": math.nan},
            "`base_lr` must be a finite number, got nan; set base_lr to such a value",
        ),
        (
            {"base_lr": math.inf},
            "`base_lr` must be a finite number, got inf; set base_lr to such a value",
        ),
        ({"base_lr": 0}, "`base_lr` must be > 0.0, got 0; set base_lr to such a value"),
        (
            {"base_lr": "1e-3"},
            "`base_lr` must be a number, got '1e-3'; set base_lr to such a value",
        ),
        ({"momentum": 1.0}, "`momentum` must be < 1.0, got 1.0; set momentum to such a value"),
        (
            {"start_multiplier": 2.0},
            "`start_multiplier` must be <= 1.0, got 2.0; set start_multiplier to such a value",
        ),
        (
            {"batch_size": 0},
            "`batch_size` must be >= 1, got 0; set batch_size to such a value",
        ),
        ({"device": 3}, "`device` must be text, got 3; set device to such a value"),
        (
            {"action": "jump"},
            "`action` must be one of 'grid', 'relative' or 'box', got 'jump'; "
            "set action to such a value",
        ),
        (
            {"inner_steps": "often"},
            "`inner_steps` must be an integer >= 1, 'asg-as-coded' or 'asg-intended', "
            "got 'often'; set inner_steps to such a value",
        ),
        (
            {"kl_weight": 0.1, "guidance": {"kl": 0.1}},
            "`kl_weight` is short for guidance={'kl': x}, got both; give one",
        ),
        (
            {"start_multiplier": 0.02},
            "`start_multiplier` must be a level of the log grid "
            "[0.0, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0] with relative actions, got 0.02; "
            "set one of these",
        ),
        (
            {"inner_steps": "asg-as-coded", "epochs": 2},
            "`steps_per_epoch` must be given with inner_steps=asg-as-coded",
        ),
        (
            {"inner_steps": "asg-as-coded", "epochs": 2, "steps_per_epoch": 9, "horizon": 3},
            "`horizon` follows from steps_per_epoch and epochs with inner_steps=asg-as-coded, "
            "got 3; leave it out",
        ),
        (
            {"epochs": 2},
            "`epochs` is used by growing windows only, got inner_steps=10; leave it out",
        ),
        (
            {"optimizer": "adam", "momentum": 0.5},
            "`momentum` is used by sgd and schedule-free only, got optimizer adam; leave it out",
        ),
        (
            {"optimizer": "adamw", "momentum_form": "scaled-velocity"},
            "`momentum_form` must be pytorch with optimizer adamw, got scaled-velocity; "
            "scaled velocity is a form of SGD",
        ),
    ],
)
def test_settings_refuse_in_one_sentence(values, sentence):
    assert refusal(**values) == sentence


def test_settings_name_the_known_keys_when_one_is_unknown():
    message = refusal(horizont=3)

    assert message.startswith("`horizont` is unknown; known keys are action, augmentation, ")
    assert ", horizon, " in message


def test_settings_name_the_known_rewards_when_one_is_unknown():
    for reward in ("gains", {"gain": 1.0, "gains": 1.0}):
        message = refusal(reward=reward)
        assert message.startswith("`reward` must name a reward term of gain, level, terminal, ")
        assert "got 'gains'" in message


@pytest.mark.parametrize("guidance", ["l2", {"l2": 0.1}])
def test_settings_name_the_known_guidance_when_one_is_unknown(guidance):
    assert (
        "`guidance` must name guidance terms of kl, weight_l2, l2_sp, feature_l2, si, ewc, or "
        "FILE.py:NAME, got 'l2'"
    ) in refusal(guidance=guidance)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"reward": {}}, "`reward` must hold at least one reward term, got none"),
        ({"reward": None}, "`reward` must be a name or a mapping of names to weights, got None"),
        ({"reward": {"gain": "1"}}, "`reward` must map 'gain' to a number, got '1'"),
        ({"reward": {"gain": True}}, "`reward` must map 'gain' to a number, got True"),
        ({"reward": {"gain": math.nan}}, "`reward` must map 'gain' to a finite number, got nan"),
        ({"guidance": {"kl": -1}}, "`guidance` must map 'kl' to a weight >= 0, got -1"),
        ({"guidance": {"kl": math.inf}}, "`guidance` must map 'kl' to a finite weight, got inf"),
        ({"guidance": {"si": True}}, "`guidance` must map 'si' to a weight that is a number, got"),
        ({"guidance": {"kl": {"cap": 9}}}, "`guidance` must give 'kl' a weight, got {'cap': 9}"),
        (
            {"guidance": {"kl": {"weight": 1, "cap": 0}}},
            "`guidance` must map 'kl' to a cap > 0, got 0",
        ),
        (
            {"guidance": {"kl": {"weight": 1, "layer": "a"}}},
            "`guidance` must give 'kl' keys of weight, cap, temperature, got 'layer'",
        ),
        (
            {"guidance": {"kl": {"weight": 1, "temperature": "hot"}}},
            "`guidance` must give 'kl' a `temperature` of the kind of 1.0, got 'hot'",
        ),
        (
            {"guidance": {"kl": {"weight": 1, "temperature": True}}},
            "`guidance` must give 'kl' a `temperature` of the kind of 1.0, got True",
        ),
        ({"guidance": {"no.py:X": 1}}, "`guidance` must name an existing file, got "),
    ],
)
def test_settings_refuse_weights(values, part):
    assert part in refusal(**values)


def test_refusals_carry_the_place_of_the_setting():
    assert refusal(where="env", horizon=0).startswith("`env.horizon` must be >= 1, got 0; set env.")


def test_settings_refuse_keys_that_are_not_text():
    with pytest.raises(ConfigError, match="`env` must have text keys"):
        validate(EnvSettings, {3: 1}, "env")


def test_settings_accept_a_reward_name_or_weights():
    assert settings(reward="level").reward == {"level": 1.0}
    assert settings(reward={"gain": 1, "retention": 0.5}).reward == {"gain": 1.0, "retention": 0.5}


def weights(**values):
    return {name: term.weight for name, term in settings(**values).guidance_terms().items()}


def test_settings_accept_guidance_in_four_ways():
    assert weights(guidance={"kl": 2}) == {"kl": 2.0}
    assert weights(kl_weight=2) == {"kl": 2.0}
    assert weights(guidance={}) == {}
    assert weights(kl_weight=0) == {"kl": 0.0}
    capped = settings(guidance={"kl": {"weight": 75, "cap": 9, "temperature": 2}, "ewc": 1})
    assert capped.guidance == {"kl": {"weight": 75.0, "cap": 9.0, "temperature": 2}, "ewc": 1.0}
    term = capped.guidance_terms()["kl"]
    assert (term.weight, term.cap, term.options) == (75.0, 9.0, {"temperature": 2})


def test_settings_name_a_guidance_term_in_a_file_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "class Mine:\n    def __init__(self, pretrained, power=2):\n        pass\n"
    )
    monkeypatch.chdir(tmp_path)

    found = settings(guidance={"mine.py:Mine": {"weight": 0.5, "power": 3}})

    # The whole path: a run folder is opened from anywhere.
    assert list(found.guidance) == [f"{tmp_path}/mine.py:Mine"]
    term = found.guidance_terms()["Mine"]
    assert (term.build.__name__, term.weight, term.options) == ("Mine", 0.5, {"power": 3})
    for taken in ("ce", "kl"):
        (tmp_path / "own.py").write_text(f"class {taken}: pass\n", encoding="utf-8")
        said = refusal(guidance={f"own.py:{taken}": 1})
        assert "which are reported anyway, got '" in said
        assert f"own.py:{taken}'; call the class something else" in said
    assert "has no such 'Other'" in refusal(guidance={"mine.py:Other": 1})
    assert "keys of weight, cap, power, got 'size'" in refusal(
        guidance={"mine.py:Mine": {"weight": 1, "size": 2}}
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert "ends in ZeroDivisionError: division by zero" in refusal(guidance={"broken.py:X": 1})


def test_settings_accept_any_start_multiplier_that_is_not_stepped_from():
    assert settings(action="grid", start_multiplier=0.02).start_multiplier == 0.02
    assert settings(action="box", start_multiplier=0).start_multiplier == 0.0
    assert settings(grid="linear", start_multiplier=0.2).start_multiplier == 0.2


def test_settings_derive_windows_from_epochs():
    grown = settings(inner_steps="asg-intended", steps_per_epoch=25, epochs=2)

    assert grown.windows() == (10, 10, 5, 10, 10, 5)
    assert grown.trainer_settings().total_steps == 50


def test_parse_yaml_reads_exponents_as_numbers():
    text = "a: 1e-3\nb: 1E5\nc: -2.5e+1\nd: .5e2\ne: [1e0]\nf: 0.1\ng: 3\nh: text"

    assert parse_yaml(text) == {
        "a": 0.001, "b": 1e5, "c": -25.0, "d": 50.0, "e": [1.0], "f": 0.1, "g": 3, "h": "text",
    }  # fmt: skip
    assert type(parse_yaml("1e-3")) is float
    assert type(parse_yaml("3")) is int


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "`a` is repeated in line 3; keep one of them"),
        ("env: {a: 1, a: 1}", "`a` is repeated in line 1; keep one of them"),
        ("a: [", "the text is not YAML in line 1"),
        ("a: !!python/object:os.system {}", "the text is not YAML in line 1"),
        ("[a, b]: 1", "the key in line 1 is a list or mapping; use text"),
        ("x: 1\n? {a: 1}\n: 1", "the key in line 2 is a list or mapping; use text"),
    ],
)
def test_parse_yaml_refuses(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text)


def test_parse_yaml_merges_anchors():
    assert parse_yaml("a: &x {p: 1}\nb: {<<: *x, q: 2}")["b"] == {"p": 1, "q": 2}


@pytest.mark.parametrize(
    ("text", "kind"), [("", "NoneType"), ("- 1\n- 2", "list"), ("just text", "str"), ("3", "int")]
)
def test_read_yaml_refuses_what_is_no_mapping(tmp_path, text, kind):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=rf"settings\.yaml must hold a mapping .*, got {kind}"):
        read_yaml(path)


def test_read_yaml_names_the_file_in_every_refusal(tmp_path):
    path = tmp_path / "settings.yaml"
    with pytest.raises(ConfigError, match=r"settings\.yaml cannot be read .*; give a YAML file"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"settings\.yaml cannot be read"):
        read_yaml(path)
    path.write_text("a: 1\na: 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings\.yaml: `a` is repeated in line 2"):
        read_yaml(path)


def test_read_yaml_gives_values_that_settings_take(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("horizon: 3\nbase_lr: 1e-3\nreward: {gain: 1, retention: 5e-1}\n")

    read = settings(**read_yaml(path))

    assert (read.horizon, read.base_lr, read.reward["retention"]) == (3, 0.001, 0.5)
