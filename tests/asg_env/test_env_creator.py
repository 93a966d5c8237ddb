import pytest

from asg_env import env_creator
from asg_env.validation import ConfigError

DIGITS = "ASG/Digits-v0"


class EnvContext(dict):
    """What RLlib passes: a dict with attributes of its own."""

    worker_index = 1


def test_env_creator_makes_the_environment_of_gym_make(make_env, identical):
    settings = {"observation": "extended", "inner_steps": 2, "outer_valid_size": 50}
    created = env_creator(EnvContext(id=DIGITS, horizon=3, **settings))
    made = make_env(horizon=3, **settings)

    assert created.settings == made.settings
    assert identical(created.reset(seed=5), made.reset(seed=5))
    assert identical(created.step([2] * 5), made.step([2] * 5))


def test_env_creator_leaves_its_mapping_as_it_was():
    config = EnvContext(id=DIGITS, render_mode="ansi", horizon=2)
    env = env_creator(config)

    assert config == {"id": DIGITS, "render_mode": "ansi", "horizon": 2}
    assert env.render_mode == "ansi"
    assert env.horizon == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"^`id` must be an environment id such as ASG/Digits-v0, got None"),
        ({"id": [7]}, r"^`id` must be an environment id such as ASG/Digits-v0, got \[7\]"),
        ({"id": "ASG/Digit-v0"}, r"^`task` must be one of ASG/Digits-v0, .*, got 'ASG/Digit-v0'"),
        ({"id": DIGITS, "horizont": 2}, r"^`horizont` is unknown; known keys are action, "),
        ({"id": DIGITS, "task": DIGITS}, r"^`task` is unknown; known keys are action, "),
        ({"id": DIGITS, "horizon": 0}, r"^`horizon` must be >= 1, got 0"),
        ({"id": DIGITS, "render_mode": "human"}, r"^`render_mode` must be one of .*, got 'human'"),
        ({"id": DIGITS, 3: 4}, r"must have text keys"),
    ],
)
def test_env_creator_names_what_is_wrong(config, message):
    with pytest.raises(ConfigError, match=message):
        env_creator(config)
