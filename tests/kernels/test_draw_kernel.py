"""The kernel that draws, against the reference, which sorts: the same token of every row, whatever is beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_kernels import counter_uniform, draw_triton
from loramux_kernels.draw import ONE, apply_filters, draw_tokens_reference, token_weights

DEVICES = [
    *([] if torch.cuda.is_available() else ["cpu"]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
BLOCK, CAPACITY = 32, 64
VOCABULARIES = (1, 2, 17, 33, 100)  # with those sizes: less than a block, one more than a block, more than candidates
NEVER = float("-inf")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vocabularies meet every path, and the interpreter is slow."""
    monkeypatch.setattr(draw_triton, "_BLOCK", BLOCK)
    monkeypatch.setattr(draw_triton, "_SEARCHED", BLOCK)
    monkeypatch.setattr(draw_triton, "_CAPACITY", CAPACITY)


Arguments = tuple[torch.Tensor, ...]  # logits, temperature, uniform, top_k, top_p, min_p


def kernel(arguments: Arguments, device: str) -> torch.Tensor:
    rows = len(arguments[0])
    out = torch.full((rows + 1,), -7, device=device)
    draw_triton.launch(*(t.contiguous().to(device) for t in arguments), out[:rows])
    assert out[-1] == -7, "nothing beyond its rows is written"
    return out[:rows].cpu()


def same_for_all(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 3,
) -> Arguments:
    rows = len(logits)
    uniform = counter_uniform(torch.full((rows,), seed), torch.arange(rows))
    floats = (torch.full((rows,), x, dtype=torch.float64) for x in (temperature, top_p, min_p))
    temperatures, top_ps, min_ps = floats
    return logits, temperatures, uniform, torch.full((rows,), top_k), top_ps, min_ps


def kept_weights(arguments: Arguments) -> torch.Tensor:
    """What the filters leave after a stable sort, in the order of the vocabulary."""
    logits, temperature, _, *filters = arguments
    ordered, token_ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = token_weights(ordered, temperature[:, None])
    kept = apply_filters(weights, *(f[:, None] for f in filters))
    return torch.zeros_like(kept).scatter(-1, token_ids, kept)


def middles(row: Arguments) -> tuple[Arguments, list[int]]:
    """The row once for each of some tokens that its filters leave, with the number that is to draw just that token.

    The first and the last are among them: were one token more or one less left, one of them would not be drawn.
    """
    (kept,) = kept_weights(row)
    cumulative, expected = kept.cumsum(-1), kept.nonzero()[:, 0]
    expected = expected[torch.linspace(0, len(expected) - 1, 4).round().long().unique()]
    uniform = (cumulative - kept / 2)[expected] / cumulative[-1]
    rows = [t.expand(len(expected), *t.shape[1:]) for t in row]
    rows[2] = uniform
    return tuple(rows), expected.tolist()


LOGITS = {
    "coarse": lambda g, v: torch.randint(-4, 4, (v,), generator=g) * 0.5,
    "bfloat16": lambda g, v: (torch.randn(v, generator=g) * 3).bfloat16().float(),
    "peaked": lambda g, v: torch.randn(v, generator=g) * 12,
    "equal": lambda g, v: torch.full((v,), -2.5),
    "two of many": lambda g, v: torch.full((v,), -100.0).index_fill(0, torch.randint(v, (2,), generator=g), 5.0),
    "forbidden": lambda g, v: torch.randn(v, generator=g).masked_fill(torch.arange(v) % 3 > 0, NEVER),
    "zeros": lambda g, v: torch.where(torch.rand(v, generator=g) < 0.5, 0.0, -0.0),
    "falling": lambda g, v: torch.linspace(5, -5, v),
    "in lanes": lambda g, v: torch.arange(v) % BLOCK * 0.25,  # as many candidates as there are, or too many
}


@st.composite
def rows_of_one_vocabulary(draw: st.DrawFn) -> Arguments:
    vocabulary, count = draw(st.sampled_from(VOCABULARIES)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.stack([LOGITS[draw(st.sampled_from(list(LOGITS)))](generator, vocabulary) for _ in range(count)])
    one = st.one_of(st.just(1.0), st.sampled_from([0.0, 1e-12, 0.25, 0.5, 0.999999]), st.floats(0, 1))
    kinds = (
        st.one_of(st.sampled_from([1e-310, 0.1, 1.0, 100.0]), st.floats(0.05, 3)),  # temperature
        st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0, 1, exclude_max=True)),  # uniform
        st.one_of(st.just(0), st.integers(1, vocabulary + 1), st.integers(1, 5)),  # top-k
        one,  # top-p
        st.one_of(st.just(0.0), one),  # min-p
    )
    columns = [[draw(kind) for _ in range(count)] for kind in kinds]
    dtypes = (torch.float64, torch.float64, torch.int64, torch.float64, torch.float64)
    return logits, *(torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80, deadline=None)
@given(arguments=rows_of_one_vocabulary())
def test_the_kernel_draws_what_the_reference_draws(device: str, arguments: Arguments) -> None:
    assert kernel(arguments, device).tolist() == draw_tokens_reference(*arguments).tolist()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(arguments=rows_of_one_vocabulary())
def test_the_kernel_keeps_what_a_stable_sort_keeps(device: str, arguments: Arguments) -> None:
    row = tuple(t[:1] for t in arguments)
    if (kept_weights(row) < ONE >> 30).logical_and(kept_weights(row) > 0).any():
        return  # tokens so unlikely that no float64 draws just them
    every, expected = middles(row)
    assert kernel(every, device).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (1, 1.0, 1),
        (5, 1.0, 5),
        (70, 1.0, 70),
        (99, 0.5, 50),
        (0, 0.25, 25),
        (0, 0.251, 26),
        (100, 1e-9, 1),
        (7, 0.9, 7),
    ],
)
def test_of_equals_the_lowest_ids_stay(device: str, top_k: int, top_p: float, expected: int) -> None:
    every, kept = middles(same_for_all(torch.zeros(1, 100), top_k=top_k, top_p=top_p))
    assert kept[-1] == expected - 1
    assert kernel(every, device).tolist() == kept


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_drawn_alike_alone_and_in_any_batch(device: str) -> None:
    g, rows = torch.Generator().manual_seed(3), 9
    arguments = (
        (torch.randn(rows, 100, generator=g) * 3).bfloat16().float(),
        torch.rand(rows, generator=g, dtype=torch.float64) + 0.3,
        torch.rand(rows, generator=g, dtype=torch.float64),
        torch.randint(0, 60, (rows,), generator=g) * (torch.arange(rows) % 2),
        torch.rand(rows, generator=g, dtype=torch.float64),
        torch.rand(rows, generator=g, dtype=torch.float64) * 0.2,
    )
    together = kernel(arguments, device)
    for size in (1, 4):
        pieces = [kernel(tuple(t[at : at + size] for t in arguments), device) for at in range(0, rows, size)]
        assert torch.equal(torch.cat(pieces), together)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (3, 1.0, 0.0), (0, 0.9, 0.1), (50, 0.5, 1.0)])
def test_logits_that_are_not_numbers_lead_nowhere_else(device: str, top_k: int, top_p: float, min_p: float) -> None:
    logits = torch.zeros(6, 100)
    logits[0] = float("nan")
    logits[1, 5:] = float("nan")
    logits[2] = NEVER
    logits[3, 7] = float("inf")
    logits[4] = -float("nan")
    logits[5, ::2], logits[5, 1::2] = float("inf"), NEVER
    drawn = kernel(same_for_all(logits, top_k=top_k, top_p=top_p, min_p=min_p), device)
    assert ((drawn >= 0) & (drawn < 100)).all()
    assert drawn[1] < 5, "they are never drawn beside numbers"
    assert drawn[3] == 7
    assert drawn[5] % 2 == 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [1000, 4097, 8192, 32_003, 128_256])
def test_the_true_blocks_draw_what_the_reference_draws(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    g, rows = torch.Generator().manual_seed(vocabulary), 48
    logits = torch.randn(rows, vocabulary, generator=g) * torch.linspace(0.1, 6, rows)[:, None]
    logits = logits.bfloat16().float().cuda()
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (0, 0.95, 0.0), (50, 1.0, 0.0), (5000, 0.9, 0.0), (0, 0.999999, 1e-4)]:
        arguments = tuple(t.cuda() for t in same_for_all(logits, 0.8, top_k, top_p, min_p))
        assert torch.equal(kernel(arguments, "cuda"), draw_tokens_reference(*arguments).cpu())
