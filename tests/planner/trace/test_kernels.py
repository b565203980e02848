"""What kernels take from the allocator without telling."""

from chunkplan.planner.trace.kernels import attention_backward_scratch_bytes


def test_attention_scratch_holds_an_fp32_query_gradient():
    plain = attention_backward_scratch_bytes(1, 32, 32, 1024, 128, itemsize=2)
    assert plain == 32 * 1024 * (128 + 1) * 4
    grouped = attention_backward_scratch_bytes(1, 32, 8, 1024, 128, itemsize=2)
    assert grouped == plain + 2 * 32 * 1024 * 128 * 2
    assert attention_backward_scratch_bytes(1, 9, 9, 1000, 64, itemsize=2) == 9 * 1024 * 65 * 4
