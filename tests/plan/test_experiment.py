"""Matrices become points, and what is no experiment is refused with what would be."""

import itertools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plan.experiment import (
    ExperimentError,
    find_experiments,
    make_experiment,
    make_point,
    read_experiment,
)
from plan.machine import ROOT

STEP = {"kind": "step", "model": "tiny", "context": 100}


def make(*matrices: Mapping[str, Any], **changes: Any):
    values = {"title": "t", "devices": "cpu:8", "matrix": list(matrices or [STEP])}
    return make_experiment("test", values | changes)


def test_keys_with_several_values_multiply_out_the_last_fastest():
    meshes, batches, phases = ["", "tensor=2"], [1, 4, 8], ["decode", "loop"]
    made = make(STEP | {"mesh": meshes, "batch": batches, "phase": phases})
    found = [point.to_dict()["settings"] for point in made.points]
    assert [(some["mesh"], some["batch"], some["phase"]) for some in found] == list(
        itertools.product(meshes, batches, phases)
    )


def test_points_of_several_matrices_are_there_once():
    made = make(STEP | {"batch": [1, 2]}, STEP | {"batch": [2, 3]})
    assert [point.to_dict()["settings"]["batch"] for point in made.points] == [1, 2, 3]


def test_a_points_key_says_what_is_not_default_whatever_the_order_it_was_given_in():
    point = make_point("step", {"context": 100, "mesh": "stage=2,tensor=4", "model": "tiny"})
    same = make_point("step", {"model": "tiny", "mesh": "stage=2,tensor=4", "context": 100})
    assert point.key == same.key == "step model=tiny mesh=stage=2,tensor=4 context=100"
    assert make_point("step", {**same.to_dict()["settings"]}) == point


def test_keys_of_different_points_differ():
    some = STEP | {"mesh": ["", "tensor=2"], "batch": [1, 12], "page_size": [16, 64]}
    points = make(some, some | {"phase": "prefill", "prompt": [1, 11]}).points
    assert len(points) == 8 + 16


@pytest.mark.parametrize("file", find_experiments(ROOT / "configs" / "experiments"))
def test_every_experiment_of_ours_can_be_read_and_opens_with_its_command(file: Path):
    assert read_experiment(file).points
    assert f"weft mesh {file.relative_to(ROOT)}" in file.read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "t"}, "no key titel; did you mean title"),
        ({"hardware": "h20"}, "no hardware h20; did you mean h200"),
        ({"devices": "tpu:8"}, "devices is 'tpu:8'; it must be cpu:N"),
        ({"devices": "cpu:0"}, "devices is 'cpu:0'"),
        ({"matrix": STEP}, r"write \[\[matrix\]\]"),
        ({"matrix": []}, "has no point"),
        ({"matrix": [STEP, 5]}, "matrix 2: it is 5; it must be a table"),
        ({"point_limit_s": 0}, "point_limit_s is 0; it must be seconds"),
        ({"title": 3}, "title is 3; it must be of type str"),
    ],
)
def test_a_wrong_key_of_an_experiment_is_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "setp"}, "matrix 1: there is no kind setp; did you mean step"),
        ({"kind": [["step"]]}, r"kind is \['step'\]; it must be of type str"),
        ({"model": "tinny"}, "there is no model tinny.*did you mean tiny"),
        ({"batches": 3}, r"no key step\.batches; did you mean step\.batch"),
        ({"phase": "decod"}, "no phase decod; did you mean decode"),
        ({"batch": "4"}, "batch is '4'; it must be of type int"),
        ({"batch": True}, "batch is True; it must be of type int"),
        ({"batch": []}, "batch is an empty list"),
        ({"batch": 0}, "batch is 0; it must be 1 or more"),
        ({"mesh": "tensr=2"}, "mesh is 'tensr=2'; it must be stage=N"),
        ({"mesh": "data=2"}, "mesh is 'data=2'"),
        ({"mesh": "stage=4,tensor=4"}, "takes 16 devices, cpu:8 has 8"),
        ({"prompt": 5}, "prompt is 5 with phase decode; it must be 0"),
        ({"phase": "mixed"}, "prompt is 0 with phase mixed; it must be 1 or more"),
        ({"context": 1024}, "context is 1024; beside 1 new tokens it must be 1 to 1023"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_would_be_right(changes, message):
    with pytest.raises(ValueError, match=message):
        make(STEP | changes)


def test_a_matrix_without_a_kind_or_a_needed_setting_is_refused():
    with pytest.raises(ValueError, match=r"kind is missing; there are .*step"):
        make({"model": "tiny"})
    with pytest.raises(ValueError, match="step needs model"):
        make({"kind": "step"})


@pytest.mark.parametrize("key", ["title", "devices", "matrix"])
def test_an_experiment_without_one_of_its_keys_is_refused(key: str):
    values = {"title": "t", "devices": "cpu:8", "matrix": [STEP]}
    del values[key]
    with pytest.raises(ValueError, match=f"{key} is missing"):
        make_experiment("test", values)


def test_a_file_that_is_no_experiment_is_named(tmp_path: Path):
    with pytest.raises(ExperimentError, match=r"none\.toml cannot be read: No such file"):
        read_experiment(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("title = \n")
    with pytest.raises(ExperimentError, match=r"broken\.toml: Invalid value"):
        read_experiment(broken)
    broken.write_text('titel = "t"\n')
    with pytest.raises(ExperimentError, match=r"broken\.toml: there is no key titel"):
        read_experiment(broken)


def test_a_folder_without_experiments_is_refused(tmp_path: Path):
    with pytest.raises(ExperimentError, match=r"has no \.toml file"):
        find_experiments(tmp_path)


def test_whoever_drives_and_reports_imports_neither_jax_nor_pydantic():
    modules = ("plan.drive", "plan.experiment", "plan.report", "serve.commands.mesh")
    code = f"import sys, {', '.join(modules)}\nassert not {{'jax', 'pydantic'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
