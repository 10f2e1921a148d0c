import pytest

from plan.kernel_choice import OPERATIONS, asked_kernels


def test_a_choice_is_for_all_operations_for_some_or_for_none() -> None:
    assert asked_kernels("auto") == {}
    assert asked_kernels("xla") == dict.fromkeys(OPERATIONS, "xla")
    two = {"small_matmul": "pallas", "decode_attention": "xla"}
    assert asked_kernels("small_matmul=pallas,decode_attention=xla") == two


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("palas", "it must be auto, one of xla"),
        ("small_matmull=xla", "did you mean small_matmul?"),
        ("small_matmul=cublas", "OPERATION=KERNEL"),
        ("small_matmul=xla,small_matmul=pallas", "each once"),
        ("", "it must be auto"),
    ],
)
def test_what_names_no_kernel_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="kernels is") as refused:
        asked_kernels(text)
    assert said in str(refused.value)
