"""Two forms of the demo model, and what is said of those that can't be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.quality import LENGTH, Quality, Scores, run
from serve.cli import main
from serve.config import ConfigError, ScheduleSection
from serve.errors import RequestError
from tests.assets import ASSETS, needs_assets

DEMO = Path(__file__).parents[2] / "models" / "demo"
NUM_POSITIONS = 300
"""More than one sequence has, and not all of the next."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text('"""Return the string, or None if there is none.\n"""\n' * 80)
    return path


def test_pages_of_another_size_are_the_same_model(text):
    found = run(DEMO, overrides=["cache.page_size=32"], text=text, num_positions=NUM_POSITIONS)
    assert found.num_positions == NUM_POSITIONS
    assert found.agreement == 1
    assert found.other_perplexity == pytest.approx(found.perplexity, rel=1e-4)
    assert 1 < found.perplexity < 100, "of 512 or more tokens, the model knows which are likely"


def test_pages_of_8_bits_move_what_the_model_writes_a_little():
    found = run(DEMO, overrides=["cache.dtype=int8"], num_positions=NUM_POSITIONS)
    assert 0.9 < found.agreement < 1
    assert found.other_perplexity != found.perplexity
    assert found.other_perplexity == pytest.approx(found.perplexity, rel=0.05)


def test_the_queue_has_room_for_all_sequences(monkeypatch):
    num_positions = (ScheduleSection().max_queue + 1) * LENGTH

    def build_engine(config, **_):
        raise RequestError(f"room for {config.schedule.max_queue}")

    monkeypatch.setattr("bench.quality.build_engine", build_engine)
    with pytest.raises(RequestError, match=f"room for {num_positions}"):
        run(DEMO, overrides=["cache.dtype=int8"], num_positions=num_positions)


def test_perplexity_is_that_of_the_tokens_that_stand_there():
    assert Scores(np.array([1, 2]), np.log([0.5, 0.125])).perplexity == pytest.approx(4)


def test_a_form_is_not_compared_with_itself():
    with pytest.raises(RequestError, match="both forms are the same"):
        run(DEMO)


def test_a_form_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"--set cache\.dtype=int4: cache\.dtype is 'int4'"):
        run(DEMO, overrides=["cache.dtype=int4"])


def test_a_text_that_is_too_short_says_how_much_is_needed(text):
    with pytest.raises(RequestError, match=r"positions need [\d,]+; give a longer text"):
        run(DEMO, overrides=["cache.dtype=fp8"], text=text, num_positions=100_000)


def test_a_text_of_as_many_tokens_as_positions_need_is_enough(tmp_path):
    short = tmp_path / "short"
    short.write_text("return None")
    assert run(DEMO, None, ["cache.page_size=32"], short, num_positions=2).num_positions == 2


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="binary is not text in UTF-8"):
        run(DEMO, overrides=["cache.dtype=fp8"], text=tmp_path / "binary")


def test_the_other_form_may_be_in_a_folder_with_a_number_for_a_name(tmp_path, monkeypatch, text):
    (tmp_path / "1").symlink_to(DEMO)
    monkeypatch.chdir(tmp_path)
    found = run(Path("1"), Path("1"), ["cache.page_size=32"], text, num_positions=2)
    assert (found.model, found.other) == ("1", "1 cache.page_size=32")


@needs_assets
def test_models_of_different_vocabularies_are_not_compared():
    with pytest.raises(RequestError, match="only models of one vocabulary can be compared"):
        run(DEMO, ASSETS / "models" / "stories260k-hf", num_positions=20)


def test_a_report_names_both_forms_and_what_was_found():
    quality = Quality("m", "cache.dtype=fp8", 2_000, 0.9, 3.5, 3.75)
    assert json.loads(quality.to_json())["agreement"] == 0.9
    assert "| 90.00% of 2,000 |" in quality.to_markdown()


def test_the_command_says_what_was_wrong_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["weft", "bench", "quality", str(DEMO), "--set", "a=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("weft: --set a=1: write section.key=value")
