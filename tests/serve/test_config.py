from pathlib import Path

import pytest

from serve.config import ConfigError, load_config, make_config

ROOT = Path(__file__).parents[2]
MINIMAL = '[model]\npath = "m"\n'
STORE = '[[tiers.stores]]\nname = "disk"\nurl = "pages"\ngib = 1\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return str(caught.value)


def test_only_the_model_must_be_named(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.model.served_name == "m"
    assert (config.mesh.data, config.mesh.stage, config.mesh.tensor) == (1, 1, 1)
    assert (config.listen.grpc, config.listen.http) == ("127.0.0.1:8500", "127.0.0.1:8000")
    assert (config.schedule.max_batch, config.schedule.max_queue) == (64, 1024)


def test_a_path_is_relative_to_its_file_and_on_the_command_line_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(tmp_path, '[model]\npath = "../models/demo"\n')
    monkeypatch.chdir(elsewhere)
    assert load_config(path).model.path == str(tmp_path.parent / "models" / "demo")
    assert load_config(path, ["model.path=x"]).model.path == str(elsewhere / "x")
    assert load_config(path, ["model.path=/x", "mesh.tensor=2"]).model.path == "/x"


def test_so_is_the_folder_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, f"{MINIMAL}[tiers]\nhost_gib = 1\n{STORE}")
    assert load_config(path).tiers.stores[0].url == f"file://{tmp_path}/pages"
    monkeypatch.chdir("/")
    given = 'tiers.stores=[{name="a", url="b", gib=1}, {name="c", url="s3://bucket", gib=1}]'
    stores = load_config(path, [given]).tiers.stores
    assert [store.url for store in stores] == ["file:///b", "s3://bucket"]


def test_set_reads_toml_values_and_falls_back_to_text(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL),
        [
            "mesh.tensor=2",
            "model.dtype=bfloat16",
            'model.name="a=b"',
            "cache.memory_fraction = 0.5",
        ],
    )
    assert config.mesh.tensor == 2
    assert config.model.dtype == "bfloat16"
    assert config.model.name == "a=b"
    assert config.cache.memory_fraction == 0.5


def test_the_last_set_of_a_key_wins(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["mesh.stage=2", "mesh.stage=4"])
    assert config.mesh.stage == 4


def test_set_of_one_cache_budget_takes_back_the_other(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL + "[cache]\npages = 9\n"), ["cache.pages=7"])
    assert config.cache.pages == 7
    config = load_config(
        write(tmp_path, MINIMAL + "[cache]\npages = 9\n"), ["cache.memory_fraction=1"]
    )
    assert (config.cache.pages, config.cache.memory_fraction) == (None, 1.0)


def test_a_misspelt_key_names_the_file_the_nearest_key_and_the_valid_ones(tmp_path: Path) -> None:
    text = problem(tmp_path, MINIMAL + "[schedule]\nmax_bacth = 8\n")
    assert text.startswith(f"{tmp_path / 'serve.toml'}: schedule.max_bacth is not a known key")
    assert "did you mean max_batch? [schedule] has max_batch, token_budget" in text


def test_a_misspelt_section_names_the_nearest(tmp_path: Path) -> None:
    text = problem(tmp_path, MINIMAL + "[mehs]\ntensor = 2\n")
    assert "mehs is not a known key; did you mean mesh? the sections are model, mesh" in text


def test_a_key_of_another_section_is_pointed_to(tmp_path: Path) -> None:
    assert "did you mean mesh.tensor?" in problem(tmp_path, MINIMAL + "[cache]\ntensor = 2\n")
    assert "did you mean schedule.seed?" in problem(tmp_path, "seed = 2\n" + MINIMAL)


def test_an_unknown_key_on_the_command_line_names_the_option(tmp_path: Path) -> None:
    text = problem(tmp_path, MINIMAL, "mesh.tensr=2")
    assert text.startswith(
        "--set mesh.tensr=2: mesh.tensr is not a known key; did you mean tensor?"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('[schedule]\nmax_batch = "8"', "schedule.max_batch is '8'; it must be a valid integer"),
        ("[schedule]\nmax_batch = 8.0", "schedule.max_batch is 8.0; it must be a valid integer"),
        ("[mesh]\ntensor = true", "mesh.tensor is True; it must be a valid integer"),
        ("[mesh]\ntensor = 0", "mesh.tensor is 0; it must be greater than or equal to 1"),
        ("[cache]\nmemory_fraction = 1.5", "is 1.5; it must be less than or equal to 1"),
        ("[cache]\nmemory_fraction = nan", "cache.memory_fraction is nan; it must be"),
        ("[cache]\npage_size = 24", "cache.page_size is 24; it must be a power of two"),
        ('[cache]\ndtype = "int4"', "cache.dtype is 'int4'; it must be 'auto', 'float32'"),
        ("[cache]\npages = 8\nmemory_fraction = 0.5", "[cache] must be set with either pages or"),
        ("[schedule]\ntoken_budget = 32", "such that token_budget (32) is above max_batch"),
        ("[schedule]\nchunk = 600", "and at least chunk (600)"),
        ('[listen]\ngrpc = "8500"', "listen.grpc is '8500'; it must be \"host:port\""),
        ('[listen]\ngrpc = ""', "gRPC cannot be turned off"),
        ('[listen]\nhttp = "0.0.0.0:99999"', "listen.http is '0.0.0.0:99999'; it must be"),
        ("[tiers]\nhost_gib = inf", "tiers.host_gib is inf; it must be a finite number"),
        (
            "[cache]\nprefix_caching = false\n[tiers]\nhost_gib = 1",
            "the configuration must be such that",
        ),
        ("[tiers]\nhost_gib = -1", "tiers.host_gib is -1; it must be greater than or equal to 0"),
        (f"[tiers]\n{STORE}", "[tiers] must be given host_gib, some GiB of host memory"),
        (f"[tiers]\nhost_gib = 1\n{STORE}{STORE}", "must be given names that differ"),
        (
            '[tiers]\nhost_gib = 1\n[[tiers.stores]]\nname = "device"\nurl = "a"\ngib = 1',
            'names that differ, and from "host" and "device", too',
        ),
        ('[split]\nrole = "both"', "split.role is 'both'; it must be 'all', 'prefill' or 'decode'"),
        ('[split]\nrole = "decode"', "given either peers or prefill_tensor"),
        (
            '[split]\nrole = "decode"\npeers = ["a:1"]\nprefill_tensor = 1',
            "given either peers or prefill_tensor",
        ),
        ('[split]\npeers = ["a:1"]', "of role decode, not all"),
        ('[split]\nrole = "prefill"\nprefill_tensor = 1', "of role decode, not prefill"),
        (
            '[split]\nrole = "decode"\npeers = ["a:1"]\nprefill_pages = 5',
            "given prefill_tensor, too, where prefill_stage or prefill_pages is",
        ),
        ('[split]\ncarrier = "jax"', "between processes, of role prefill or with peers"),
        ('[split]\nrole = "decode"\npeers = ["a"]', 'must be addresses "host:port"'),
        ('[split]\nrole = "decode"\npeers = ["a:0"]', 'must be addresses "host:port"'),
        ('[split]\nrole = "decode"\npeers = ["a:1", "a:1"]', "must be addresses that differ"),
        ("[split]\nlease_s = 0", "split.lease_s is 0; it must be greater than 0"),
        ("[split]\nlease_s = inf", "split.lease_s is inf"),
        ("[split]\npeer = 1", "split.peer is not a known key; did you mean peers?"),
        (
            '[cache]\nprefix_caching = false\n[split]\nrole = "prefill"',
            "cache.prefix_caching is true where split.role is set",
        ),
        (f"[tiers]\nhost_gib = 1\n{STORE}size = 2", "0.size is not a known key; a store has name"),
        ('[[tiers.stores]]\nname = "a"', "tiers.stores.0.url is missing; a store has name, url"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_expected(
    tmp_path: Path, line: str, expected: str
) -> None:
    assert expected in problem(tmp_path, f"{MINIMAL}{line}\n")


def test_a_section_that_is_a_value_is_refused(tmp_path: Path) -> None:
    assert "mesh is 2; it must be a section, [mesh]" in problem(tmp_path, "mesh = 2\n" + MINIMAL)
    text = problem(tmp_path, "mesh = 2\n" + MINIMAL, "mesh.tensor=2")
    assert "--set mesh.tensor=2: mesh is 2 in the file, not a section" in text


def test_a_file_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "model is missing" in problem(tmp_path, "")
    assert "model.path is missing" in problem(tmp_path, "[model]\n")
    assert "model.path is ''" in problem(tmp_path, '[model]\npath = ""\n')


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = problem(tmp_path, MINIMAL + "[mesh]\ntensor = 0\nstages = 2\n")
    assert len(text.splitlines()) == 2


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    text = problem(tmp_path, MINIMAL + "[mesh]\ntensor = = 2\n")
    assert text.startswith(f"{tmp_path / 'serve.toml'}:4: ")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load_config(path)


@pytest.mark.parametrize("override", ["mesh.tensor", "tensor=2", ".tensor=2", "mesh.=2"])
def test_set_without_section_key_and_value_is_refused(tmp_path: Path, override: str) -> None:
    assert "write section.key=value" in problem(tmp_path, MINIMAL, override)


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = make_config({"model": {"path": "m"}}, "test")
    with pytest.raises(ValueError, match="frozen"):
        config.mesh.tensor = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_the_machine_decides_what_is_left_out() -> None:
    cache = make_config({"model": {"path": "m"}}, "test").cache
    assert (cache.tokens_per_page("cpu"), cache.tokens_per_page("gpu")) == (16, 64)
    assert cache.memory_share("cpu") < cache.memory_share("gpu") < 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "serve").glob("*.toml")), ids=str)
def test_every_config_of_the_repository_loads_and_opens_with_its_command(path: Path) -> None:
    load_config(path)
    opening = path.read_text().partition("[model]")[0]
    assert f"weft serve configs/serve/{path.name}" in opening.splitlines()[0]
    for word in ("hardware:", "expect:"):
        assert word in opening
