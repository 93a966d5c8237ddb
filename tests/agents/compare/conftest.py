import pytest

from asg_env.validation import ConfigError


@pytest.fixture
def refused(make_plan):
    """Return the sentence that rows are refused with."""

    def refuse(rows, **others):
        with pytest.raises(ConfigError) as error:
            make_plan(rows, **others)
        return str(error.value)

    return refuse
