"""dropout and its gradient on every instruction set against float64, and its draws against Philox's known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsebert.errors import InputError
from sparsebert.ops.dropout import draws, dropout, dropout_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 17, 127, 128, 129, 1000, 40000])
def test_dropout_and_its_gradient_match_the_reference(isa, n, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype).requires_grad_()
    wanted = dropout_ref(x, 0.3, 77)
    y = dropout(x, 0.3, 77, isa=isa)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, wanted != 0)
    assert (n < 40000) or abs(float((y == 0).float().mean()) - 0.3) < 0.01
    assert torch.equal(dropout(x, 0.3, 77, threads=2), y)


def test_draws_are_those_of_philox():
    """The known answers for 7 rounds are from Random123, by the authors of Philox."""
    zeros = draws(0, np.zeros(4, np.uint32)).view("<u4")
    ones = draws(2**64 - 1, np.full(4, 2**32 - 1, np.uint32)).view("<u4")
    pi = draws(0x299F31D0A4093822, np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint32)).view("<u4")
    assert [f"{word:08x}" for word in zeros] == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    assert [f"{word:08x}" for word in ones] == ["5207ddc2", "45165e59", "4d8ee751", "8c52f662"]
    assert [f"{word:08x}" for word in pi] == ["4dfccaba", "190a87f0", "c47362ba", "b6b5242a"]


def test_nothing_is_dropped_with_p_0():
    x = torch.randn(5)
    assert dropout(x, 0.0, 1) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan"), 0.999999])
def test_bad_dropout_is_refused(p):
    with pytest.raises(InputError, match="dropout must be from 0 to below 1"):
        dropout(torch.zeros(3), p, 1)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64), torch.zeros(3, device="meta")]
)
def test_bad_values_are_refused(x):
    with pytest.raises(InputError, match="x must be float32 or bfloat16 on the CPU"):
        dropout(x, 0.1, 1)
