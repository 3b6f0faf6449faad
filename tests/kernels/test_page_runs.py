"""Blocks expanded into pages: there is what expanding and writing leaves, and nothing else."""

from dataclasses import replace

import pytest
import torch

from kvstrata.kernels.block_planes import encode_block_planes
from kvstrata.kernels.component_basis import encode_tokens
from kvstrata.kernels.escape_rows import pack_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.page_runs import (
    PageRun,
    StoredTokens,
    expand_to_pages,
    expand_to_pages_reference,
)
from kvstrata.kernels.row_pages import PAGE_TOKENS
from kvstrata.kernels.value_bias import encode_value_bias
from tests.kernels.calibrated_layer import DIMS, make_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FIRST = 2 * PAGE_TOKENS


def stored(
    heads: int, blocks: int, dim: int, dtype: torch.dtype, *, seed: int, whole: bool
) -> StoredTokens:
    """Return tokens of all classes, or only what their planes tell."""
    layer = make_layer(heads, blocks, dim, dtype, seed=seed)
    layout, classes = layer.basis.layout, layer.classes
    y, words, _ = encode_tokens(layer.tokens, layer.basis, layer.weights)
    if not whole:
        return StoredTokens(words, layer.basis, classes)
    return StoredTokens(
        words,
        layer.basis,
        classes,
        mid=pack_mid_rows(y, classes.mid, layout),
        bias=encode_value_bias(
            y,
            words,
            layout,
            weights=torch.rand(y.shape[:3]),
            base=classes.base,
            deviation=layer.basis.deviation,
        ),
        escapes=pack_escape_rows(layer.tokens, classes.escape),
    )


def sides(
    heads: int, blocks: int, dim: int, dtype: torch.dtype, *, whole: bool = True
) -> tuple[StoredTokens, StoredTokens]:
    keys = stored(heads, blocks, dim, dtype, seed=1, whole=whole)
    return replace(keys, bias=None), stored(heads, blocks, dim, dtype, seed=2, whole=whole)


def pages(heads: int, blocks: int, dim: int, dtype: torch.dtype, *, turned: bool) -> PageRun:
    """Return pages in any order, with some before and behind that are others'."""
    width = FIRST // PAGE_TOKENS + blocks * 4 + 1
    tables = torch.randperm(heads * width).to(torch.int32).view(heads, width)
    memory = torch.full((heads * width, 2, PAGE_TOKENS * dim), 7.0, dtype=dtype)
    angles = torch.rand(blocks * 64, dim // 2).repeat(1, 2)
    return PageRun(memory, tables, FIRST, (angles.cos(), angles.sin()) if turned else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "blocks", "dim"), [(1, 1, dim) for dim in DIMS] + [(3, 5, 64)], ids=str
)
def test_pages_hold_what_expanding_and_writing_leaves(
    heads: int, blocks: int, dim: int, dtype: torch.dtype
) -> None:
    for turned in (False, True):
        for whole in (False, True):
            run = pages(heads, blocks, dim, dtype, turned=turned)
            same = replace(run, memory=run.memory.clone())
            both = sides(heads, blocks, dim, dtype, whole=whole)
            expand_to_pages(*both, run)
            expand_to_pages_reference(*both, same)
            assert torch.equal(run.memory, same.memory)
            others = torch.ones(len(run.memory), dtype=torch.bool)
            others[run.tables[:, 2:-1].flatten().long()] = False
            assert (run.memory[others] == 7).all()
            assert run.memory[~others].isfinite().all()


def test_a_block_reads_the_same_among_others() -> None:
    keys, values = sides(3, 5, 64, torch.bfloat16, whole=False)
    run = pages(3, 5, 64, torch.bfloat16, turned=True)
    expand_to_pages(keys, values, run)
    again = replace(run, memory=torch.zeros_like(run.memory))
    assert run.rotation is not None
    for n in range(5):
        own = slice(n, n + 1)
        alone = [
            StoredTokens(
                side.words[own],
                side.basis,
                type(side.classes)(*(mask[:, own].contiguous() for mask in side.classes)),
            )
            for side in (keys, values)
        ]
        turns = (run.rotation[0][64 * n : 64 * n + 64], run.rotation[1][64 * n : 64 * n + 64])
        expand_to_pages(*alone, replace(again, first=FIRST + 64 * n, rotation=turns))
    held = run.tables[:, 2:-1].flatten().long()
    assert torch.equal(run.memory[held], again.memory[held])


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    keys, values = sides(2, 1, 64, torch.bfloat16)
    run = pages(2, 1, 64, torch.bfloat16, turned=True)
    layer = make_layer(2, 2, 64, torch.bfloat16)
    words, _ = encode_block_planes(layer.tokens.float(), layer.basis.layout, layer.weights)
    more = StoredTokens(words, layer.basis, layer.classes)
    assert run.rotation is not None
    bad = {
        "whole pages": replace(run, first=FIRST + 1),
        "no whole pages": replace(run, first=FIRST + 64),
        "int32": replace(run, tables=run.tables.long()),
        "not there": replace(run, tables=run.tables + 1000),
        "pages must be": replace(run, memory=run.memory[:, :1]),
        "cos and sin": replace(run, rotation=(run.rotation[0][1:], run.rotation[1])),
    }
    for message, wrong in bad.items():
        with pytest.raises(ValueError, match=message):
            expand_to_pages(keys, values, wrong)
    with pytest.raises(ValueError, match="as many"):
        expand_to_pages(keys, more, replace(run, rotation=None))
    with pytest.raises(ValueError, match="mid rows"):
        expand_to_pages(replace(keys, classes=values.classes), values, run)
    assert (run.memory == 7).all()
