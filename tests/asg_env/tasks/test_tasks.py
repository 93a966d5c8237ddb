import pytest

from asg_env.tasks import SUMMARIES, TASK_MODULES, load_task


def test_load_task_refuses_an_unknown_id():
    with pytest.raises(ValueError, match=r"`task` must be one of ASG/Digits-v0.*, got 'ASG/X-v0'"):
        load_task("ASG/X-v0")


@pytest.mark.parametrize("task_id", ["ASG/Digits-v0", "ASG/DigitsImageNet-v0"])
def test_load_task_gives_what_the_env_needs(task_id):
    task = load_task(task_id)

    assert task.id == task_id
    assert {"train", "inner_valid", "outer_valid", "test"} <= set(task.splits)
    assert task.layer_groups
    assert task.summary
    assert len(task.digest) == 64
    assert task.digest == task.reference_digest


def test_every_task_has_a_summary():
    assert list(SUMMARIES) == list(TASK_MODULES)
