import pytest

from asg_env.files import replacing


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".json"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_stood_there(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(FileExistsError), replacing(path) as temporary:
        temporary.mkdir(exist_ok=temporary.write_text("half") == 0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
