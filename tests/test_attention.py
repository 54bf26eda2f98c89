"""Plain attention equals the fused one, in every form that models call it."""

import pytest
import torch
import torch.nn.functional as F

from autolora_hf.attention import _PlainAttention, plain_attention


BOOLEAN = torch.ones(5, 7, dtype=torch.bool).tril(1)
CALLS = {
    "plain": {},
    "scaled": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": BOOLEAN},
    "added mask": {"attn_mask": torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_same_values_and_gradients(call):
    generator = torch.Generator().manual_seed(1)
    heads = 2 if call == "grouped" else 4
    shapes = [(2, 4, 5, 8), (2, heads, 7, 8), (2, heads, 7, 6)]
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = F.scaled_dot_product_attention(*given, **CALLS[call])
    with _PlainAttention():
        found = F.scaled_dot_product_attention(*given, **CALLS[call])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), given) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_row_without_anything_to_attend_to_is_zero():
    query = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    expected = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    with _PlainAttention():
        found = F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found[0, 0, 1] == 0).all()


def test_dropout_is_applied():
    query = torch.randn(1, 1, 4, 8)
    with _PlainAttention():
        dropped = F.scaled_dot_product_attention(query, query, torch.ones(1, 1, 4, 8), dropout_p=0.5)
    # Rows of weights sum to one, unless some of them were dropped.
    assert (dropped - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("device", "dtype", "replaced"),
    [("cpu", torch.bfloat16, True), ("cpu", torch.float32, False), ("cuda", torch.bfloat16, False)],
)
def test_only_where_it_is_faster(device, dtype, replaced, monkeypatch):
    seen = []
    monkeypatch.setattr("autolora_hf.attention._attention", lambda query, *_: seen.append(1) or query)
    query = torch.randn(1, 1, 4, 8, dtype=dtype)
    with plain_attention(torch.device(device), dtype):
        F.scaled_dot_product_attention(query, query, query)
    F.scaled_dot_product_attention(query, query, query)
    assert len(seen) == replaced
