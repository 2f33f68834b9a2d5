import pytest

from mmfusion.retrieval.files import file_path, replaced


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file"
    with replaced(path) as beside:
        beside.write_text("one")
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError), replaced(path) as beside:
        beside.write_text("half" * 10_000 + "\ud800", encoding="utf-8")
    assert path.read_text() == "one"
    with replaced(path) as beside:
        beside.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; expected the name of a file"):
        file_path(tmp_path)
    with pytest.raises(ValueError, match="is a folder"), replaced(tmp_path):
        pass
    assert file_path(tmp_path / "new.html") == tmp_path / "new.html"
