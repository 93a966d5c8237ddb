import pytest

from asg_env.config import EnvSettings
from asg_env.task_settings import TASK_SETTINGS, settings_class
from asg_env.tasks import TASK_MODULES
from asg_env.validation import ConfigError, validate

DIGITS, IMAGENET = "ASG/Digits-v0", "ASG/DigitsImageNet-v0"
VISDA, FOLDERS = "ASG/VisDA17-v0", "ASG/ImageFolder-v0"
MINIMAL = {VISDA: {"root": "/data"}, FOLDERS: {"source": "/a", "target": "/b"}}
IMAGE_DEFAULTS = {
    "store": None,
    "image_size": 224,
    "backbone": "torchvision:resnet101",
    "head": "mlp",
    "layer_groups": None,
    "inner_valid_fraction": 0.02,
    "outer_valid_fraction": 0.2,
    "split_seed": 0,
    "base_lr": 0.01,
    "batch_size": 32,
}


def settings(task, **values):
    return validate(settings_class(task), MINIMAL.get(task, {}) | values, "env")


@pytest.mark.parametrize("task", TASK_MODULES)
def test_every_task_has_settings_with_a_common_part(task):
    assert isinstance(settings(task), EnvSettings)
    assert set(TASK_SETTINGS) == set(TASK_MODULES)


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (DIGITS, {"base_lr": 0.3, "inner_steps": 10, "metric": "accuracy", "flip_average": False}),
        (IMAGENET, {"base_lr": 0.01, "inner_steps": 10, "metric": "accuracy"}),
        (
            VISDA,
            IMAGE_DEFAULTS
            | {"inner_steps": 100, "metric": "mean_recall", "flip_average": True}
            | {"weights": "pretrained", "augmentation": "none", "precision": "float32"},
        ),
        (
            FOLDERS,
            IMAGE_DEFAULTS
            | {"inner_steps": 20, "metric": "accuracy", "flip_average": False}
            | {"weights": "pretrained", "target_labels": True},
        ),
    ],
)
def test_defaults_of_each_task(task, expected):
    values = settings(task).model_dump()

    assert {name: values[name] for name in expected} == expected
    assert values["reward"] == {"gain": 1.0}
    assert values["device"] == "cpu"


@pytest.mark.parametrize(
    ("task", "own"),
    [
        (DIGITS, {"classes", "width", "target"}),
        (IMAGENET, set()),
        (VISDA, {*IMAGE_DEFAULTS, "weights", "root"} - {"base_lr", "batch_size"}),
        (
            FOLDERS,
            {*IMAGE_DEFAULTS, "weights", "source", "target", "target_labels"}
            - {"base_lr", "batch_size"},
        ),
    ],
)
def test_task_arguments_are_the_settings_that_are_the_tasks_own(task, own):
    arguments = settings(task).task_arguments()

    assert set(arguments) == own
    assert all(arguments[name] == getattr(settings(task), name) for name in own)


def test_trainer_settings_carry_what_is_said_of_images():
    given = settings(
        VISDA, augmentation="randaugment", precision="bfloat16", compile=True, deterministic=True
    )

    trainer = given.trainer_settings()

    assert (trainer.augmentation, trainer.precision) == ("randaugment", "bfloat16")
    assert trainer.flip_average
    assert trainer.compile
    assert trainer.deterministic
    assert trainer.total_steps == 15 * 100


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (
            VISDA,
            {},
            r"^`root` must name the folder that holds train/ and validation/, or `store` one made "
            r"by asg prepare, got neither; set env.root$",
        ),
        (
            FOLDERS,
            {},
            r"^`source` and `target` must name folders of images, or `store` one made by asg "
            r"prepare, got neither; set env.source and env.target$",
        ),
        (
            FOLDERS,
            {"source": "/a"},
            r"`source` and `target` must be given together, got source=/a and target=None; set b",
        ),
        (
            FOLDERS,
            {"target": "/b", "store": "/s"},
            r"`source` and `target` must be given together, got source=None and target=/b; set b",
        ),
        (
            FOLDERS,
            {"store": "/s", "target_labels": False},
            r"^`target_labels` is used with source and target only, a store knows what it holds; ",
        ),
    ],
)
def test_images_must_be_named(task, values, message):
    with pytest.raises(ConfigError, match=message):
        validate(settings_class(task), values, "env")


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (VISDA, {"store": "/s"}),
        (VISDA, {"root": "/r", "store": "/s"}),
        (FOLDERS, {"store": "/s"}),
        (FOLDERS, {"source": "/a", "target": "/b", "store": "/s"}),
        (FOLDERS, {"source": "/a", "target": "/b", "target_labels": False}),
    ],
)
def test_a_store_or_folders_or_both_are_enough(task, values):
    assert validate(settings_class(task), values, "env").task_arguments().items() >= values.items()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"layer_groups": {"low": "conv1(", "head": "head"}},
            r"^`env.layer_groups` must map 'low' to a regular expression, got 'conv1\(' \(.+\); se",
        ),
        ({"layer_groups": {}}, r"`env.layer_groups` must map group names to regular expre.*\{\}"),
        ({"layer_groups": "head"}, r"must map group names to regular expressions, got 'head'"),
        ({"layer_groups": {"head": 3}}, r"`env.layer_groups` must map names to text, .*'head': 3"),
        ({"layer_groups": {3: "head"}}, r"`env.layer_groups` must map names to text, got 3: "),
        (
            {"speed": 1},
            r"`env.speed` is unknown; known keys are .*backbone,.*image_size,.* weights",
        ),
        ({"image_size": 15}, r"`env.image_size` must be >= 16, got 15; set env.image_size to such"),
        ({"image_size": 32.5}, r"`env.image_size` must be an integer, got 32.5"),
        ({"inner_valid_fraction": 1.0}, r"`env.inner_valid_fraction` must be < 1.0, got 1.0"),
        ({"outer_valid_fraction": -0.1}, r"`env.outer_valid_fraction` must be >= 0.0, got -0.1"),
        ({"split_seed": -1}, r"`env.split_seed` must be >= 0, got -1"),
        ({"head": "big"}, r"`env.head` must be one of 'mlp' or 'linear', got 'big'"),
        ({"metric": "f1"}, r"`env.metric` must be one of 'accuracy' or 'mean_recall', got 'f1'"),
        ({"augmentation": "cutmix"}, r"`env.augmentation` must be one of 'none', 'flip-crop' or"),
        ({"precision": "float16"}, r"`env.precision` must be one of 'float32' or 'bfloat16', got"),
        ({"weights": 3}, r"`env.weights` must be text, got 3"),
        ({"base_lr": 0.0}, r"`env.base_lr` must be > 0.0, got 0.0"),
    ],
)
@pytest.mark.parametrize("task", [VISDA, FOLDERS])
def test_settings_out_of_bounds_are_refused(task, values, message):
    with pytest.raises(ConfigError, match=message):
        settings(task, **values)


@pytest.mark.parametrize("task", [DIGITS, IMAGENET])
@pytest.mark.parametrize("name", ["root", "backbone", "store", "layer_groups"])
def test_digits_have_no_settings_of_images(task, name):
    with pytest.raises(ConfigError, match=rf"`env.{name}` is unknown; known keys are"):
        settings(task, **{name: "x"})


def test_source_is_no_setting_of_visda_nor_root_of_folders():
    with pytest.raises(ConfigError, match=r"`env.source` is unknown"):
        settings(VISDA, source="/a")
    with pytest.raises(ConfigError, match=r"`env.root` is unknown"):
        settings(FOLDERS, root="/a")


def test_layer_groups_keep_the_order_that_was_given():
    groups = {"late": "z", "early": "a", "middle": "m"}

    assert list(settings(VISDA, layer_groups=groups).layer_groups) == ["late", "early", "middle"]
