from dataclasses import fields, replace

import pytest

from tools.budgets import BudgetError, Cost, could_shrink, exceeded, read_budgets, write_budgets

COST = Cost(
    layer_launches=11,
    layer_loops=0,
    layer_collectives={"all-reduce": (2, 1_048_576)},
    launches=20,
    loops=2,
    collectives={"all-gather": (1, 4096)},
    copy_bytes=0,
    slice_bytes=0,
    sorts=1,
    callbacks=0,
    temp_bytes=197_013_400,
    lost_bytes=0,
)
CASE = ("llama-3.1-8b", "stage=2,tensor=4", "decode 64")


def test_a_step_at_its_budget_is_within_it():
    assert exceeded(COST, COST) == []
    assert not could_shrink(COST, COST)


@pytest.mark.parametrize("part", [part.name for part in fields(Cost) if part.type is int])
def test_each_number_is_held_to_its_budget(part):
    above = replace(COST, **{part: getattr(COST, part) + 1500})
    (complaint,) = exceeded(above, COST)
    assert complaint.startswith(f"{part} is ")
    assert "1,500 above the budget of" in complaint
    assert could_shrink(COST, above)
    assert exceeded(COST, above) == []


@pytest.mark.parametrize("part", ["layer_collectives", "collectives"])
@pytest.mark.parametrize(
    ("traffic", "complaints"),
    [
        ({"all-reduce": (3, 1_048_576)}, ["all-reduce runs is 3, 1 above the budget of 2"]),
        ({"all-reduce": (2, 1_048_577)}, ["all-reduce bytes is 1,048,577, 1 above"]),
        ({"all-to-all": (1, 8)}, ["all-to-all runs is 1, 1", "all-to-all bytes is 8, 8"]),
    ],
)
def test_each_collective_is_held_to_its_budget(part, traffic, complaints):
    budget = replace(COST, **{part: {"all-reduce": (2, 1_048_576)}})
    found = exceeded(replace(COST, **{part: traffic}), budget)
    assert len(found) == len(complaints)
    for line, complaint in zip(found, complaints, strict=True):
        assert line.startswith(f"{part}.{complaint}")


def test_what_is_written_is_read_again_and_the_opening_comment_stays(tmp_path):
    path = tmp_path / "budgets" / "h200.toml"
    budgets = {CASE: COST, ("tiny", "one device", "mixed"): replace(COST, collectives={})}
    write_budgets(path, budgets)
    assert read_budgets(path) == budgets

    path.write_text(f"# what this is\n# and why\n\n{path.read_text()}")
    write_budgets(path, {CASE: COST})
    assert path.read_text().startswith("# what this is\n# and why\n\n[")
    assert read_budgets(path) == {CASE: COST}


def test_no_file_is_no_budgets(tmp_path):
    assert read_budgets(tmp_path / "h200.toml") == {}


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("sorts", "sort", r"decode 64: there is no key sort; did you mean sorts\?"),
        ("sorts = 1", "", "decode 64 has no sorts"),
        ("sorts = 1", "sorts = -1", "sorts is -1; it must be a number of 0 or more"),
        ("sorts = 1", "sorts = true", "sorts is True; it must be a number"),
        ("[2, 1_048_576]", "2", r"layer_collectives\.all-reduce is 2; it must be \[runs, bytes\]"),
        ("{ all-reduce = [2, 1_048_576] }", "7", "layer_collectives is 7; it must be a table"),
        ('["llama-3.1-8b"."stage=2,tensor=4"."decode 64"]', "[a]", "a, .* must be a table"),
        ("sorts = 1", "sorts = ", "Invalid value"),
    ],
)
def test_a_budget_file_with_a_mistake_is_refused(tmp_path, good, bad, complaint):
    path = tmp_path / "h200.toml"
    write_budgets(path, {CASE: COST})
    assert good in path.read_text()
    path.write_text(path.read_text().replace(good, bad))
    with pytest.raises(BudgetError, match=complaint):
        read_budgets(path)
