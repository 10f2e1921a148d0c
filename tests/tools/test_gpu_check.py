from dataclasses import replace

import pytest

from plan.compiled import Kind, Operation, Program
from plan.described import CompilerMissing
from tools import gpu_check
from tools.budgets import read_budgets, write_budgets
from tools.gpu_check import BUDGETS, CASES, FEW, LARGE, MORE, cost_of, judge, listing, main, row

CASE = ("llama-3.1-8b", "tensor=8", "decode 64")


def operation(kind=Kind.FUSION, what="add", num_bytes=64, runs=1, depth=0, optional=False):
    return Operation(kind, what, "model/decoder.py:9", num_bytes, runs, depth, optional)


BEFORE = [operation(what="embed"), operation(Kind.COLLECTIVE, "all-reduce", 100)]
LAYER = [
    operation(Kind.PRODUCT, "qkv"),
    operation(Kind.KERNEL, "paged_decode"),
    operation(Kind.LOOP, "while"),
    operation(what="turn", depth=1),
    operation(Kind.COLLECTIVE, "all-reduce", 1000),
]
AFTER = [
    operation(Kind.BRANCH, "cond"),
    operation(Kind.SORT, "top_k", depth=1, optional=True),
    operation(Kind.COPY, "copy", 3 * LARGE, runs=2),
    operation(Kind.COPY, "copy", LARGE),
    operation(Kind.SLICE, "slice", 2 * LARGE),
]


def program(layers, before=BEFORE):
    return Program(
        operations=(*before, *LAYER * layers, *AFTER),
        argument_bytes=10,
        output_bytes=10,
        donated_bytes=8,
        aliased_bytes=8,
        temp_bytes=1000 * layers,
        flops=None,
        accessed_bytes=None,
    )


COST = cost_of(program(FEW), program(MORE))


def test_what_one_more_layer_costs_is_told_from_the_rest():
    assert (COST.layer_launches, COST.launches) == (4, 6)
    assert (COST.layer_loops, COST.loops) == (1, 1)
    assert COST.layer_collectives == {"all-reduce": (1, 1000)}
    assert COST.collectives == {"all-reduce": (1, 100)}


def test_sizes_are_those_of_the_larger_program():
    assert COST.temp_bytes == 1000 * MORE
    assert COST.copy_bytes == 6 * LARGE
    assert COST.slice_bytes == 2 * LARGE
    assert COST.sorts == 1


def test_part_of_a_launch_per_layer_counts_as_a_whole_one():
    one_more = program(MORE, [*BEFORE, operation(what="odd")])
    assert cost_of(program(FEW), one_more).layer_launches == COST.layer_launches + 1


def test_a_lost_donation_is_wrong_whatever_the_budget_says():
    lost = replace(COST, lost_bytes=4096)
    complaints, _ = judge({CASE: lost}, {CASE: lost})
    assert complaints == [
        "llama-3.1-8b, tensor=8, decode 64: 4,096 donated bytes are not taken over by an output"
    ]


def test_a_step_above_its_budget_is_wrong():
    budget = replace(COST, layer_launches=3, temp_bytes=0)
    complaints, remarks = judge({CASE: COST}, {CASE: budget})
    assert complaints == [
        f"llama-3.1-8b, tensor=8, decode 64: {part}"
        for part in (
            "layer_launches is 4, 1 above the budget of 3",
            "temp_bytes is 4,000, 4,000 above the budget of 0",
        )
    ]
    assert remarks == []


def test_a_step_without_a_budget_is_wrong_and_told_how_to_get_one():
    complaints, _ = judge({CASE: COST}, {})
    (complaint,) = complaints
    assert "has no budget; add it by make gpu-check ARGS=" in complaint
    options = ("--update", "--model llama-3.1-8b", "--mesh tensor=8", "decode 64")
    assert all(option in complaint for option in options)


def test_a_budget_above_what_is_needed_is_remarked_on():
    complaints, remarks = judge({CASE: COST}, {CASE: replace(COST, launches=99)})
    assert complaints == []
    assert len(remarks) == 1
    assert "could be lower" in remarks[0]


def test_a_layers_work_is_listed_in_order_and_the_rest_after_it():
    lines = listing(program(FEW), program(MORE))
    rest = next(i for i, line in enumerate(lines) if line.startswith("the rest"))
    assert [line.split()[1] for line in lines[1 : rest - 1]] == [op.what for op in LAYER]
    assert [line.split()[1] for line in lines[rest + 1 :]] == [op.what for op in BEFORE + AFTER]
    assert lines[0].endswith(": 4 launches")
    assert lines[4].startswith("  fusion")  # it stands in a loop


def test_a_step_in_which_nothing_repeats_is_listed_whole():
    different = tuple(operation(what=f"op{i}") for i in range(9))
    lines = listing(replace(program(0), operations=()), replace(program(0), operations=different))
    assert lines[0].startswith("no stretch of 4 operations repeats")
    assert len(lines) == 1 + len(different)


def test_a_line_of_the_table_shows_what_is_budgeted():
    line = row(CASE, COST)
    assert line.startswith(f"{CASE[0]:26} tensor=8          decode 64        4+1         6+1")
    assert line.endswith("   1 all-reduce of 1.0 kB; 1 all-reduce of 0.1 kB")
    assert line.split()[6:13] == ["0.4", "MB", "0.1", "MB", "1", "4.0", "kB"]


def test_every_step_that_is_compiled_has_a_committed_budget():
    assert list(read_budgets(BUDGETS)) == CASES
    assert BUDGETS.read_text().startswith("# make gpu-check")
    assert not any(budget.lost_bytes for budget in read_budgets(BUDGETS).values())


@pytest.mark.parametrize(
    ("model", "form"),
    [
        ("llama-3.1-8b", (None, "xla")),
        ("llama-3.1-8b int8", ("int8", "xla")),
        ("llama-3.1-8b fp8 xla_8bit", ("fp8", "xla_8bit")),
    ],
)
def test_a_models_name_says_what_its_weights_and_products_are(monkeypatch, model, form):
    found = []

    def programs(partition, *_, asked_kernels, **__):
        found.append((partition.config.quantization, asked_kernels.small_matmul))
        raise CompilerMissing

    monkeypatch.setattr(gpu_check, "Programs", programs)
    monkeypatch.setattr(gpu_check, "described_mesh", lambda shape: None)
    with pytest.raises(CompilerMissing):
        gpu_check.compile_case((model, "one device", "decode 64"), FEW)
    assert found == [form]


class InProcess:
    """Stands for the pool of processes, which couldn't see a test's programs."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    map = staticmethod(map)


@pytest.fixture
def budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr(gpu_check, "compile_case", lambda case, layers: program(layers))
    monkeypatch.setattr(gpu_check, "BUDGETS", tmp_path / "h200.toml")
    return tmp_path / "h200.toml"


ONE = ["--model", "llama-3.1-8b", "--mesh", "tensor=8", "--step", "decode 64"]


def test_without_budgets_the_check_fails_and_an_update_makes_them(budgets, capsys):
    assert main(ONE) == 1
    assert "has no budget" in capsys.readouterr().out
    assert main([*ONE, "--update"]) == 0
    assert read_budgets(budgets) == {CASE: COST}
    assert main(ONE) == 0
    assert "each within its budget" in capsys.readouterr().out


def test_an_update_of_some_keeps_the_others_and_drops_those_that_are_no_more(budgets):
    other, gone = CASES[0], ("gpt-2", "one device", "decode 1")
    write_budgets(budgets, {gone: COST, CASE: replace(COST, sorts=9), other: COST})
    assert main([*ONE, "--update"]) == 0
    assert read_budgets(budgets) == {other: COST, CASE: COST}


def test_a_broken_budget_file_is_refused_before_anything_is_compiled(budgets, capsys):
    budgets.write_text("[a")
    assert main(ONE) == 1
    assert "gpu-check: " in capsys.readouterr().err


def test_steps_that_are_not_checked_are_refused(budgets, capsys):
    assert main(["--mesh", "tensor=8", "--step", "loop 64"]) == 1
    assert "none is checked of the steps asked for" in capsys.readouterr().err


def test_a_missing_compiler_is_told_in_one_line(monkeypatch, capsys):
    def missing(case, layers):
        raise CompilerMissing("install it")

    monkeypatch.setattr(gpu_check, "compile_case", missing)
    assert main(["--list", "prefill"]) == 1
    assert capsys.readouterr().err == "gpu-check: install it\n"
