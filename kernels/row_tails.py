"""The newest rows of sequences, fewer than a page has, token after token in pages of all heads.

A last page of each head would be half empty on average, in every layer. So what does not fill one
lies in a tail: the rows of one token, layer by layer and head by head, then those of the next. 16
rows take a page, whosever they are. Attention reads pages of one head, so a layer's tail is brought
into such pages just before (``stage_rows``): each sequence has one per KV head, used by one layer
after another, and the tables of all layers name it.

Legend: S sequences held, R sequences of a step, L layers, H KV heads, D head_dim, n tokens.
"""

from dataclasses import dataclass

import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowStep, write_rows


@dataclass(frozen=True, eq=False)
class RowTails:
    """Where the tails of all sequences lie, in the memory of their ``RowPages``.

    Attributes:
        firsts: int32 (S,), the first token of each sequence that lies in its tail, a multiple of
            the page size. Tokens before it are in pages of their heads.
        pages: int32 (S, L * H), the pages of each tail. The row of token t, layer l and head h is
            number (t - first) * L * H + l * H + h of them, a key and a value, 16 to a page.
    """

    firsts: torch.Tensor
    pages: torch.Tensor

    @classmethod
    def empty(cls, num_sequences: int, num_rows: int) -> "RowTails":
        """Return tails without pages, for tokens of ``num_rows`` rows."""
        counts = (num_sequences, num_rows)
        firsts = torch.zeros(num_sequences, dtype=torch.int32)
        return cls(firsts, torch.zeros(counts, dtype=torch.int32))


def stage_rows(
    tails: RowTails,
    step: RowStep,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Bring a layer's tails into the pages that attention reads; first append new rows to them.

    Whoever attends, or asks for saliency, does so before another layer is staged.

    Args:
        tails: Of all sequences.
        step: Which of them. Their tables name a page for the tail, and the tails have pages for the
            new rows. A sequence whose rows, new ones included, are all in pages is left as it is.
        layer: Which layer.
        new: Keys and values (R, H, D) of ``step_rows``, which counts them as held when the caller
            says so; None if there are none.
    """
    backend = backend_of(step.pages.memory, *(new or ()))
    if backend == "triton":
        from kvstrata.kernels.row_tails_triton import stage_rows_triton

        stage_rows_triton(tails, step, layer, new)
    elif backend == "numba" and step.pages.head_dim % PAGE_TOKENS == 0:
        from kvstrata.kernels.row_tails_numba import stage_rows_numba

        stage_rows_numba(tails, step, layer, new)
    else:
        stage_rows_reference(tails, step, layer, new)


def stage_rows_reference(
    tails: RowTails,
    step: RowStep,
    layer: int,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Do what ``stage_rows`` does, one head after another; the definition."""
    memory, (_, num_layers, num_heads, _) = step.pages.memory, step.pages.tables.shape
    for i, slot in enumerate(step.slots.tolist()):
        first, pages = int(tails.firsts[slot]), tails.pages[slot]
        for head in range(num_heads):
            place = num_layers * num_heads, torch.tensor(layer * num_heads + head)
            count = int(step.lengths[i, layer, head]) + (new is not None) - first
            if count <= 0:
                continue
            if new is not None:
                last = tail_rows(pages, *place, count - 1, count).to(memory.device)
                rows_of(memory)[last] = torch.stack([part[i, head] for part in new])
            rows = rows_of(memory)[tail_rows(pages, *place, 0, count).to(memory.device)]
            table = step.pages.tables[slot, layer, head][None]
            write_rows(memory, table, first, *rows.transpose(0, 1)[:, None])


def rows_of(memory: torch.Tensor) -> torch.Tensor:
    """Return the memory of ``RowPages`` as rows of tails: keys and values (16 * P, 2, D)."""
    return memory.view(-1, 2, memory.shape[2] // PAGE_TOKENS)


def tail_rows(
    pages: torch.Tensor, rows_per_token: int, numbers: torch.Tensor, first: int, last: int
) -> torch.Tensor:
    """Return which of ``rows_of`` some rows of tokens ``first`` to ``last`` - 1 of a tail are.

    Args:
        pages: int32 (L * H,), of the tail.
        rows_per_token: L * H.
        numbers: int64, which rows of each token, l * H + h.
        first: Counted from the tail's first token.
        last: Behind the last token.

    Returns:
        int64 (last - first, *numbers.shape).
    """
    tokens = torch.arange(first, last).view(-1, *[1] * numbers.ndim)
    rows = tokens * rows_per_token + numbers
    return pages[rows // PAGE_TOKENS].long() * PAGE_TOKENS + rows % PAGE_TOKENS
