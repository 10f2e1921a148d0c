"""Imports flow one way, host-side code imports no JAX, and every dependency is declared."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "sharding": set[str](),
    "cache": set[str](),
    "model": {"sharding"},
    "serve": {"model", "sharding", "cache"},
    "plan": {"model", "sharding", "cache", "serve"},
}
"""What each package stands on, itself aside. Those that aren't here stand on all."""

COMMAND_LINE = ("serve/cli.py", "serve/commands/")
"""It starts whatever a user may ask for, so it stands above all packages."""

OTHER_ENVIRONMENTS = ("bench/peers/", "plan/pictures.py", "tools/comparators/export_fa4.py")
"""Run where there is more than pyproject.toml declares: a peer's packages, matplotlib, CuTe."""

PACKAGES = sorted({path.parent.name for path in ROOT.glob("[!.]*/*.py")})

HOST_SIDE = [
    *sorted(ROOT.glob("cache/**/*.py")),
    *(
        path
        for name in (
            "scheduler",
            "limits",
            "waiting",
            "prefixes",
            "sends",
            "contexts",
            "pins",
            "pace",
            "plan",
            "profile",
            "request",
            "telemetry",
            "config",
            "front",
            "bridge",
            "cli",
        )
        if (path := ROOT / "serve" / f"{name}.py").is_file()
    ),
    *sorted(ROOT.glob("serve/client/*.py")),
    *sorted(ROOT.glob("model/tokenizer/*.py")),
    *(ROOT / "model" / f"{name}.py" for name in ("chat", "detokenizer")),
]


def sources(package: str) -> Iterator[Path]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if "pb" not in path.parts:
            yield path


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that `path` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield node.lineno, node.module or ""


def declared(extra: str | None = None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {normal(re.split(r"[\[<>=~! ;]", name, maxsplit=1)[0]) for name in asked}


def normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_flow_one_way(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}; {package} may import {sorted(allowed)}"
        for path in sources(package)
        if not path.relative_to(ROOT).as_posix().startswith(COMMAND_LINE)
        for line, name in imported(path)
        if name.partition(".")[0] in PACKAGES and name.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_host_side_code_imports_no_jax_even_through_others() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in HOST_SIDE]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    assert 'jax' not in sys.modules, f'{name} imports jax'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_ours_the_standard_librarys_or_declared(package: str) -> None:
    of_module = packages_distributions()
    known = declared()
    if package not in MAY_IMPORT:
        known |= declared("dev")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}, which pyproject.toml does not declare"
        for path in sources(package)
        if not path.relative_to(ROOT).as_posix().startswith(OTHER_ENVIRONMENTS)
        for line, name in imported(path)
        if (top := name.partition(".")[0]) not in PACKAGES
        and top not in sys.stdlib_module_names
        and not known & set(map(normal, of_module.get(top, [top])))
    ]
    assert not wrong, "\n".join(wrong)
