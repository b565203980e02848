"""Times from FLOPs and bytes: limits that a user can check against published figures."""

import pytest

from chunkplan.engine.spec import Precision
from chunkplan.planner.catalog import find_gpu, gpus
from chunkplan.planner.timing.roofline import rates
from chunkplan.planner.timing.transfers import transfer_seconds


def test_a_large_product_is_bound_by_flops():
    flops, moved_bytes = 2 * 8192**3, 3 * 8192**2 * 2
    seconds = rates(Precision.BF16, find_gpu("h100-80gb")).op_seconds(flops, moved_bytes)
    assert 500e12 < flops / seconds < 792e12, "between usual shapes and the best one that was ever measured"


def test_an_addition_is_bound_by_bandwidth():
    num_elements = 2**28
    seconds = rates(Precision.BF16, find_gpu("rtx-4090")).op_seconds(num_elements, 3 * 2 * num_elements)
    assert 0.7 * 1008e9 < 6 * num_elements / seconds < 0.95 * 1008e9


def test_a_tiny_operation_costs_its_launch():
    assert rates(Precision.BF16, find_gpu("h100-80gb")).op_seconds(8, 64) == pytest.approx(4e-6)
    assert 0 < rates(Precision.FP32, find_gpu("cpu")).op_seconds(8, 64) < 4e-6


def test_fp32_is_slower_than_bf16_where_there_are_tensor_cores():
    for gpu in gpus():
        bf16, fp32 = (rates(precision, gpu).op_seconds(10**13, 1) for precision in (Precision.BF16, Precision.FP32))
        assert bf16 <= fp32 or gpu.compute_capability in {"7.0", "7.5"}, gpu.name


def test_operations_add_up():
    device = rates(Precision.BF16, find_gpu("a100-80gb"))
    ops = [(10**12, 10**8, 3), (10**6, 10**9, 2), (0, 0, 5)]
    expected = sum(device.op_seconds(flops, moved) * count for flops, moved, count in ops)
    assert device.seconds(ops) == pytest.approx(expected)
    assert device.seconds([]) == 0


def test_a_transfer_takes_the_links_time():
    assert transfer_seconds(25_000_000_000, find_gpu("rtx-4090")) == pytest.approx(1.0)
    assert transfer_seconds(25_000_000_000, find_gpu("h100-80gb")) == pytest.approx(0.5)


def test_a_dense_7b_step_on_an_a100_is_in_the_published_range():
    """6 N FLOP per token at 40 to 75 % of 312 TFLOP/s: what training reports for large dense models."""
    tokens, num_parameters = 4096, 6_738_415_616
    seconds = rates(Precision.BF16, find_gpu("a100-80gb")).op_seconds(6 * num_parameters * tokens, 10)
    assert 0.7 < seconds < 1.4
