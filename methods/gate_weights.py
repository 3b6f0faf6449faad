"""Trained gates of a model, as one file named by its hash: what Attention-Gate decides by.

A gate of a layer: a reduced attention over the layer's normalised input, within windows of the
sequence, and a linear map of what it gathers to one number per KV head. With windows of a block, a
block's flags depend on nothing behind or before it but through the input itself, so blocks can be
computed from any cached prefix on.

Legend: L layers, H KV heads, E model width, A gate heads, B gate dim, n tokens.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.methods.profile import ProfileError, read_arrays, write_arrays
from kvstrata.methods.table_store import TableStore
from kvstrata.protos.identity import BLOCK_TOKENS

VERSION = 1
SUFFIX = ".gates.npz"
SHIPPED = Path(__file__).parent / "gates"
MAX_BYTES = 1 << 30


class GateError(ValueError):
    """A file that holds no gates, or gates that do not fit the model."""


@dataclass(frozen=True, eq=False)
class GateWeights:
    """The gates of one model.

    Attributes:
        model_id: Of the weights and config, dtype left out.
        project: float16 (L, 3, A * B, E): to queries, keys and values of the reduced attention.
        gate: float16 (L, H, A * B).
        bias: float32 (L, H).
        num_heads: A.
        window: Tokens of a window, a divisor of a block's; 0 is the whole prompt.
        bidirectional: Whether a token sees all of its window, or what is before it.
        keep_rate: What it was trained for.
        note: For people: the model's name, and what it was trained on.
    """

    model_id: bytes
    project: torch.Tensor
    gate: torch.Tensor
    bias: torch.Tensor
    num_heads: int
    window: int
    bidirectional: bool
    keep_rate: float
    note: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (L, H, E)."""
        return self.bias.shape[0], self.bias.shape[1], self.project.shape[3]

    @property
    def needs_whole_prompt(self) -> bool:
        """Return whether a token's flag depends on more than its block."""
        return self.window == 0

    @cached_property
    def gates_id(self) -> str:
        """Return the hash of all numbers, in hex; the note does not count."""
        digest = hashlib.sha256(f"gates/{VERSION}".encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "version": np.array(VERSION, np.int64),
            "model_id": np.frombuffer(self.model_id, np.uint8),
            "project": self.project.numpy(),
            "gate": self.gate.numpy(),
            "bias": self.bias.numpy(),
            "num_heads": np.array(self.num_heads, np.int64),
            "window": np.array(self.window, np.int64),
            "bidirectional": np.array(self.bidirectional, np.int64),
            "keep_rate": np.array(self.keep_rate, np.float64),
        }

    def save(self, path: Path) -> None:
        """Write the gates to ``path``, whole or not at all."""
        write_arrays(path, {"note": np.array(self.note), **self._arrays()})

    def gate_of(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the gates of tokens, float32 (n, H), 0 to 1.

        Args:
            layer: Whose.
            hidden: The layer's normalised input, (n, E); its first token begins a window.
        """
        return gate_logits(
            hidden.float(),
            self.project[layer].to(hidden.device).float(),
            self.gate[layer].to(hidden.device).float(),
            self.bias[layer].to(hidden.device),
            self.num_heads,
            self.window,
            bidirectional=self.bidirectional,
        ).sigmoid()


def gate_logits(
    hidden: torch.Tensor,
    project: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    window: int,
    *,
    bidirectional: bool,
) -> torch.Tensor:
    """Return attention(hidden) gate + bias, (n, H), in the dtype of ``hidden``.

    Above 0 is above one half.

    Args:
        hidden: (n, E); differentiable, as all else.
        project: (3, A * B, E).
        gate: (H, A * B).
        bias: (H,).
        num_heads: A.
        window: Tokens that are seen together; 0 for all.
        bidirectional: Whether what follows is seen, too.
    """
    num_tokens = len(hidden)
    size = window or num_tokens
    padded = F.pad(hidden, (0, 0, 0, -num_tokens % size))
    projected = F.linear(padded, project.flatten(0, 1)).view(
        -1, size, 3, num_heads, gate.shape[1] // num_heads
    )
    queries, keys, values = projected.permute(2, 0, 3, 1, 4)  # (windows, A, size, B) each
    mask = None
    if bidirectional and len(padded) > num_tokens:
        real = torch.arange(len(padded), device=hidden.device).view(-1, size) < num_tokens
        mask = real[:, None, None]
    gathered = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=not bidirectional
    )
    context = gathered.transpose(1, 2).flatten(2).flatten(0, 1)[:num_tokens]
    return F.linear(context, gate, bias)


def load_gates(path: Path) -> GateWeights:
    """Return the gates in a file.

    Raises:
        GateError: Not gates, damaged, of another version, or with values that are no numbers; the
            message names the file.
    """
    try:
        return _checked(read_arrays(path, MAX_BYTES))
    except (ProfileError, KeyError, TypeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        reason = f"{error} is missing" if missing else error
        raise GateError(f"{path} holds no usable gates: {reason}") from error


def _checked(arrays: dict[str, np.ndarray]) -> GateWeights:
    if int(arrays["version"]) != VERSION:
        raise GateError(f"version {int(arrays['version'])}, this is {VERSION}")
    layers, heads = arrays["bias"].shape
    inner, width = arrays["project"].shape[2:]
    num_heads, window = int(arrays["num_heads"]), int(arrays["window"])
    wanted = {
        "project": (np.float16, (layers, 3, inner, width)),
        "gate": (np.float16, (layers, heads, inner)),
        "bias": (np.float32, (layers, heads)),
    }
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
            raise GateError(f"{name} must be finite {np.dtype(dtype)} {shape}")
    if min(layers, heads, inner, width, num_heads) < 1 or inner % num_heads:
        raise GateError("sizes must be positive, and heads divide their width")
    if window < 0 or (window and BLOCK_TOKENS % window):
        raise GateError(f"window is {window}, which does not divide a block")
    keep_rate = float(arrays["keep_rate"])
    if not 0 < keep_rate <= 1:
        raise GateError(f"keep_rate is {keep_rate}")
    return GateWeights(
        model_id=arrays["model_id"].tobytes(),
        project=torch.from_numpy(arrays["project"]),
        gate=torch.from_numpy(arrays["gate"]),
        bias=torch.from_numpy(arrays["bias"]),
        num_heads=num_heads,
        window=window,
        bidirectional=bool(int(arrays["bidirectional"])),
        keep_rate=keep_rate,
        note=str(arrays["note"]),
    )


class GateStore(TableStore[GateWeights]):
    """The gates that this process can use: shipped ones, and those in further folders."""

    kind = "gates"
    suffix = SUFFIX
    error = GateError

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        """Look into the shipped ones and ``folders``, later ones first."""
        super().__init__([SHIPPED, *folders])

    def load(self, path: Path) -> GateWeights:
        """Return the gates in a file; see ``load_gates``."""
        return load_gates(path)

    def id_of(self, tables: GateWeights) -> str:
        """Return their hash."""
        return tables.gates_id

    def model_of(self, tables: GateWeights) -> bytes:
        """Return the id of their model."""
        return tables.model_id


GATES = GateStore()
