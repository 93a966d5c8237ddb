import pytest

from benchmarks.timing import interleave


def recorder(log, name, parts):
    def run():
        for part in range(parts):
            log.append((name, part))
            yield

    return run


def test_interleave_takes_turns_part_by_part_and_changes_who_begins():
    log = []
    times = interleave([recorder(log, "a", 2), recorder(log, "b", 2)], repeats=2)
    assert [len(t) for t in times] == [2, 2]  # the warm-up is not kept
    assert [log[i : i + 2] for i in range(0, len(log), 2)] == [
        [("a", 0), ("b", 0)],
        [("b", 1), ("a", 1)],
        [("b", 0), ("a", 0)],
        [("a", 1), ("b", 1)],
        [("a", 0), ("b", 0)],
        [("b", 1), ("a", 1)],
    ]


def test_interleave_refuses_unequal_work():
    with pytest.raises(ValueError, match="as many parts"):
        interleave([recorder([], "a", 2), recorder([], "b", 3)], repeats=1)
