import pytest

from plan.devices import Devices
from plan.kinds.device import Device

CPU = Devices("cpu", 1)


def test_a_copy_is_told_in_bytes_read_and_written() -> None:
    figures = Device("copy", copy_bytes=4_000, in_flight=3, repeats=2).measure(CPU, None).figures
    assert figures["bytes_per_s"] * figures["call_s"] == pytest.approx(8_000)
    assert figures["bytes_low_per_s"] <= figures["bytes_per_s"] <= figures["bytes_high_per_s"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_a_product_is_told_in_operations(dtype) -> None:
    device = Device("product", dtype=dtype, size=16, in_flight=2, repeats=2)
    figures = device.measure(CPU, None).figures
    assert figures["flops_per_s"] * figures["call_s"] == pytest.approx(2 * 16**3)


def test_devices_that_are_not_there_have_no_rates() -> None:
    with pytest.raises(ValueError, match="h200:1 is described"):
        Device("copy").measure(Devices("h200", 1), None)


def test_a_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0; it must be 1 or more"):
        Device("product", size=0)
