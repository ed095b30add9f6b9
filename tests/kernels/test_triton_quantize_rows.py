"""quantize_rows on Triton: offsets."""

import pytest
from checks import assert_equal_everywhere
from miniplm.kernels import quantize_rows


@pytest.mark.usefixtures("triton_ops")
def test_offsets_beyond_int32(far_apart):
    x = far_apart(3, 32)
    rows, scale = quantize_rows(x)
    expected_rows, expected_scale = quantize_rows(x.contiguous())
    assert_equal_everywhere((rows.float(), scale), (expected_rows.float(), expected_scale))
