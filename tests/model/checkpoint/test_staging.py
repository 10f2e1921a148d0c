import pytest

from model.checkpoint.source import CheckpointError
from model.checkpoint.staging import staged


def test_a_directory_appears_whole_when_its_block_ends(tmp_path):
    with staged(tmp_path / "deep" / "new") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "sub" / "file").read_text() == "x"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_remains_of_a_block_that_failed(tmp_path, error):
    def write_and_fail() -> None:
        with staged(tmp_path / "new") as directory:
            (directory / "file").write_text("x")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "new.incomplete-0123").mkdir()
    (tmp_path / "new.incomplete-0123" / "file").write_text("x")
    (tmp_path / "newer.incomplete-0123").mkdir()
    with staged(tmp_path / "new"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "newer.incomplete-0123"]


def test_a_destination_that_another_writes_is_refused_and_left_alone(tmp_path):
    with staged(tmp_path / "new") as directory:
        with (
            pytest.raises(CheckpointError, match="is being written by another process"),
            staged(tmp_path / "new"),
        ):
            pass
        assert directory.is_dir()


def test_an_existing_destination_is_refused(tmp_path):
    (tmp_path / "new").mkdir()
    with (
        pytest.raises(CheckpointError, match="new exists; remove it or choose another"),
        staged(tmp_path / "new"),
    ):
        pass


def test_a_name_with_glob_characters_removes_only_its_own(tmp_path):
    (tmp_path / "a.incomplete-1").mkdir()
    with staged(tmp_path / "[a]*"):
        pass
    assert (tmp_path / "a.incomplete-1").is_dir()
