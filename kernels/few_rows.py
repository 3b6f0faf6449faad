"""A decoder's layers for few rows, in compiled code: all between two attentions at once.

A step over generated tokens has a row per sequence. Its products are bound by reading the weights,
and what lies between them takes longer to call than to run. So one call to compiled code, which all
threads run together, does what is between two attentions: the product of what was attended to, the
MLP, the next layer's norm, Q, K and V and their rotation. Weights are read in oneDNN's blocked
layout, where they lie for ``PackedLinear`` anyway. Rounding is that of the single operations of
``decoder_ops``; products differ from oneDNN's in the order of their sums.

A row's numbers depend neither on how many other rows there are, nor on which.

Legend: N rows, E hidden size, Q query heads, H KV heads, D head_dim, F intermediate size, L layers.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvstrata.kernels.backend import backend_of
from kvstrata.kernels.threads import addresses, on_team

if TYPE_CHECKING:
    from kvstrata.kernels.compiled import CFunction

MAX_ROWS = 16
WIDTHS = (64, 32, 16)  # outputs of a block, of oneDNN's choice
LINE = 8  # int64 in a cache line: counters do not share one
NUM_COUNTERS = 10  # of each of five phases, what is taken and what is done
_LINE_BYTES = 64

# The fields of a call of the compiled code, all int64.
FIELDS = (
    "weights", "eps", "rows", "width", "attended_width", "inner", "outputs", "turned", "queries",
    "dim", "attended", "start", "kept", "num_kept", "hidden", "normed", "sums", "rounded", "stride",
    "added", "gated", "more", "target", "cos", "sin", "positions", "counters", "thread",
    "give_way",
)  # fmt: skip
# The addresses of a layer: each product's weight, outputs of a block, bias; and norms.
WEIGHTS = (
    "out", "out_width", "out_bias", "norm", "gate_up", "gate_up_width", "gate_up_bias",
    "down", "down_width", "down_bias", "next_norm", "into", "into_width", "into_bias",
    "query_norm", "key_norm",
)  # fmt: skip


@dataclass(frozen=True)
class BlockedWeight:
    """A product's weight in oneDNN's blocked layout, and its bias.

    A block is ``width`` outputs, input after input; bf16 inputs lie in pairs, so that its shape is
    (inputs / 2, width, 2), else (inputs, width). What the last block lacks is filled up.
    """

    packed: torch.Tensor
    width: int
    outputs: int
    inputs: int
    bias: torch.Tensor | None


def blocked_weight(
    weight: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> BlockedWeight | None:
    """Return a weight as oneDNN has packed it, if that is how compiled code reads it.

    Args:
        weight: (outputs, inputs), bf16 or float32.
        packed: What oneDNN made of it.
        bias: (outputs,).
    """
    outputs, inputs = weight.shape
    if outputs % 16 or inputs % 32 or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    for width in WIDTHS:
        if _lies_in_blocks(weight, packed, width):
            return BlockedWeight(packed, width, outputs, inputs, bias)
    return None


def _lies_in_blocks(weight: torch.Tensor, packed: torch.Tensor, width: int) -> bool:
    """Look at the first block and the last."""
    ops, (outputs, inputs) = torch.ops.mkldnn, weight.shape
    blocks, block_bytes = -(-outputs // width), width * inputs * weight.itemsize
    if ops._nbytes(packed) != blocks * block_bytes:
        return False
    for block in (0, blocks - 1):
        rows = torch.zeros(width, inputs, dtype=weight.dtype)
        own = weight[block * width : (block + 1) * width]
        rows[: len(own)] = own
        wanted = rows.view(width, -1, 4 // weight.itemsize).transpose(0, 1).contiguous()
        found = ctypes.string_at(ops.data_ptr(packed) + block * block_bytes, block_bytes)
        if found != wanted.view(torch.uint8).numpy().tobytes():
            return False
    return True


@dataclass(frozen=True)
class LayerWeights:
    """A layer, norms with their epsilons.

    Attributes:
        before_attention: (E,).
        qkv: (E) to ((Q + 2 H) D).
        head_norms: Of queries and of keys, (D,) each, for a model that has them.
        output: (Q D) to (E).
        before_mlp: (E,).
        gate_up: (E) to (2 F), gate, then up.
        down: (F) to (E).
    """

    before_attention: tuple[torch.Tensor, float]
    qkv: BlockedWeight
    head_norms: tuple[tuple[torch.Tensor, float], tuple[torch.Tensor, float]] | None
    output: BlockedWeight
    before_mlp: tuple[torch.Tensor, float]
    gate_up: BlockedWeight
    down: BlockedWeight


@dataclass(frozen=True)
class DecoderWeights:
    """All layers; the norm and the product behind the last one; and how heads are cut.

    Attributes:
        layers: In order.
        norm: (E,), with its epsilon.
        head: (E) to the vocabulary.
        num_heads: Q.
        num_kv_heads: H.
        head_dim: D.
    """

    layers: Sequence[LayerWeights]
    norm: tuple[torch.Tensor, float]
    head: BlockedWeight
    num_heads: int
    num_kv_heads: int
    head_dim: int


def can_run(weights: DecoderWeights) -> bool:
    """Tell whether this machine has the compiled code for a decoder, and its sizes are right."""
    if weights.head_dim % 32 or any(x.down.inputs % x.gate_up.width for x in weights.layers):
        return False
    return backend_of(weights.norm[0]) == "numba" and _function(weights.norm[0].dtype) is not None


def compile_for(dtype: torch.dtype) -> None:
    """Compile what runs decoders of a dtype, if anything does."""
    function = _function(dtype)
    if function is not None:
        assert function.address


def _function(dtype: torch.dtype) -> "CFunction | None":
    from kvstrata.kernels import few_rows_numba as compiled
    from kvstrata.kernels.vectors_numba import HAS_PAIRS

    if not addresses().thread:
        return None
    if dtype == torch.bfloat16:
        return compiled.run_pairs if HAS_PAIRS else None
    return compiled.run_floats if dtype == torch.float32 else None


class FewRows:
    """A decoder that runs for few rows in compiled code; any number of passes at once."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Take note of where weights lie, which ``can_run`` has said yes to."""
        self.weights = weights
        self.width = weights.head.inputs
        self.attended_width = weights.num_heads * weights.head_dim
        self.inner = weights.layers[0].down.inputs
        self.dtype = weights.norm[0].dtype
        rows = [_addresses(weights, index) for index in range(len(weights.layers) + 1)]
        self.table = torch.tensor([[row.get(name, 0) for name in WEIGHTS] for row in rows])
        self.eps = torch.tensor(
            [_epsilons(weights, i) for i in range(len(rows))], dtype=torch.float32
        )
        function = _function(self.dtype)
        assert function is not None
        self.function = function

    def tables_of(self, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return addresses and epsilons of what runs before, between and behind some layers."""
        if len(layers) == len(self.weights.layers):
            return self.table, self.eps
        behind = torch.tensor([0, *(layer + 1 for layer in layers)])  # rows with their last parts
        ahead = torch.tensor([*layers, len(self.weights.layers)])
        is_behind = torch.arange(len(WEIGHTS)) < WEIGHTS.index("next_norm")
        table = torch.where(is_behind, self.table[behind], self.table[ahead])
        return table, torch.cat([self.eps[behind, :1], self.eps[ahead, 1:]], 1)


class FewRowsPass:
    """One pass over a few rows: ``heads`` and ``attended`` layer by layer, then ``logits``."""

    def __init__(
        self,
        decoder: FewRows,
        hidden: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        layers: Sequence[int],
    ) -> None:
        """Begin with embeddings.

        Args:
            decoder: What runs.
            hidden: (N, E), contiguous; N at most ``MAX_ROWS``.
            tables: cos and sin, float32 (positions, D), contiguous.
            positions: int64 (N,).
            layers: Those that run, ascending; below, a layer is its place among them.
        """
        weights, count = decoder.weights, len(hidden)
        num_layers, item = len(layers), hidden.itemsize
        addresses_of, epsilons = decoder.tables_of(layers)
        heads, dim = weights.num_heads + 2 * weights.num_kv_heads, weights.head_dim
        self._decoder = decoder
        self._num_threads = torch.get_num_threads()
        self._heads = torch.empty(num_layers, count, heads * dim, dtype=hidden.dtype)
        parts = self._heads.view(num_layers, count, heads, dim).transpose(1, 2)
        sizes = [weights.num_heads, weights.num_kv_heads, weights.num_kv_heads]
        self._parts = [part.unbind() for part in parts.split(sizes, 1)]
        own = _offsets(
            hidden=count * decoder.width * item,
            normed=count * decoder.width * item,
            sums=count * 2 * WIDTHS[0] * 4,
            rounded=max(count * 2 * WIDTHS[0], dim) * item,
        )
        shared = _offsets(
            added=count * decoder.width * item,
            gated=count * decoder.inner * item,
            more=count * decoder.width * item,
            counters=(num_layers + 1) * NUM_COUNTERS * LINE * 8,
        )
        stride, end = own.pop(""), shared.pop("")
        memory = torch.zeros(end + stride * self._num_threads + _LINE_BYTES, dtype=torch.uint8)
        base = -(-memory.data_ptr() // _LINE_BYTES) * _LINE_BYTES
        steps = np.arange(num_layers + 1)
        self._calls = np.zeros((num_layers + 1, len(FIELDS)), np.int64)
        at = {name: self._calls[:, i] for i, name in enumerate(FIELDS)}
        for name, offset in shared.items():
            at[name][:] = base + offset
        for name, offset in own.items():
            at[name][:] = base + end + offset
        at["counters"][:] += steps * NUM_COUNTERS * LINE * 8
        at["weights"][:] = addresses_of.data_ptr() + steps * addresses_of.stride(0) * 8
        at["eps"][:] = epsilons.data_ptr() + steps * epsilons.stride(0) * 4
        at["target"][:] = self._heads.data_ptr() + steps * count * heads * dim * item
        at["cos"][:], at["sin"][:] = (table.data_ptr() for table in tables)
        fixed = {
            "rows": count,
            "width": decoder.width,
            "attended_width": decoder.attended_width,
            "inner": decoder.inner,
            "outputs": heads * dim,
            "turned": heads - weights.num_kv_heads,
            "queries": weights.num_heads,
            "dim": dim,
            "start": hidden.data_ptr(),
            "positions": positions.data_ptr(),
            "stride": stride,
        }
        for name, value in fixed.items():
            at[name][:] = value
        team = addresses()
        at["thread"][:], at["give_way"][:] = team.thread, team.give_way
        self._at = at
        self._held = (
            hidden,
            tables,
            positions,
            memory,
            addresses_of,
            epsilons,
        )  # alive as long as their addresses

    def heads(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a layer's queries (Q, N, D), keys and values (H, N, D); not contiguous."""
        self._run(layer)
        queries, keys, values = self._parts
        return queries[layer], keys[layer], values[layer]

    def attended(self, layer: int, out: torch.Tensor) -> None:
        """Take what a layer attended to, (Q, N, D)."""
        rows = out.transpose(0, 1).contiguous()
        self._at["attended"][layer + 1] = rows.data_ptr()
        self._rows = rows

    def logits(self, kept: torch.Tensor) -> torch.Tensor:
        """Return the logits (K, vocabulary) after rows int64 (K,), at least one."""
        head, last = self._decoder.weights.head, len(self._calls) - 1
        out = torch.empty(len(kept), head.outputs, dtype=self._decoder.dtype)
        fields = {"kept": kept.data_ptr(), "num_kept": len(kept), "target": out.data_ptr()}
        for name, value in {**fields, "outputs": head.outputs, "turned": 0}.items():
            self._at[name][last] = value
        self._run(last)
        return out

    def _run(self, index: int) -> None:
        on_team(self._decoder.function.address, self._calls[index].ctypes.data, self._num_threads)


def _offsets(**sizes: int) -> dict[str, int]:
    """Return where each of some pieces of memory begins, in lines; their end under ``""``."""
    found, end = {}, 0
    for name, size in sizes.items():
        found[name], end = end, end + -(-size // _LINE_BYTES) * _LINE_BYTES
    return {**found, "": end}


def _addresses(weights: DecoderWeights, index: int) -> dict[str, int]:
    """Return the addresses of what runs before a layer's attention, by name in ``WEIGHTS``."""
    found: dict[str, int] = {}

    def put(name: str, weight: BlockedWeight) -> None:
        found[name] = torch.ops.mkldnn.data_ptr(weight.packed)
        found[f"{name}_width"] = weight.width
        found[f"{name}_bias"] = 0 if weight.bias is None else weight.bias.data_ptr()

    if index:
        before = weights.layers[index - 1]
        put("out", before.output)
        put("gate_up", before.gate_up)
        put("down", before.down)
        found["norm"] = before.before_mlp[0].data_ptr()
    if index == len(weights.layers):
        put("into", weights.head)
        found["next_norm"] = weights.norm[0].data_ptr()
        return found
    layer = weights.layers[index]
    put("into", layer.qkv)
    found["next_norm"] = layer.before_attention[0].data_ptr()
    if layer.head_norms is not None:
        query, key = layer.head_norms
        found["query_norm"], found["key_norm"] = query[0].data_ptr(), key[0].data_ptr()
    return found


def _epsilons(weights: DecoderWeights, index: int) -> list[float]:
    before = weights.layers[index - 1].before_mlp[1] if index else 0.0
    if index == len(weights.layers):
        return [before, weights.norm[1], 0.0, 0.0]
    layer = weights.layers[index]
    norms = layer.head_norms
    own = [0.0, 0.0] if norms is None else [norms[0][1], norms[1][1]]
    return [before, layer.before_attention[1], *own]
