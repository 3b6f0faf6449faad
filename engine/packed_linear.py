"""A matrix product with its weight in the layout that the processor likes best.

On a CPU that is oneDNN's blocked layout, which torch.compile uses too: with few rows a product is
bound by reading the weight, and reads it up to twice as fast so. Measured on two cores, all
products of SmolLM2 (425 MB in float32, 212 MB in bf16), ms: 1 row 34 plain, 20 packed; 8 rows 41
and 21; 256 rows 332 and 254; in bf16 16 and 13; 19 and 12; 145 and 134.

oneDNN compiles a product anew for each number of rows, and keeps the newest 1,024; torch keeps as
many beside it. Passes over prompts have any number, so that took 820 MB after 300 numbers of rows
of four weights. Importing this module bounds both, unless the environment does.
"""

import os

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own convention)

from kvstrata.kernels.few_rows import BlockedWeight, blocked_weight

_ROWS = 8  # what the layout is chosen for; it serves all sizes alike
_KEPT = 64  # compiled products, some .7 MB each; a pass over another number of rows takes 2 to 4 ms
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first one
    os.environ.setdefault(_name, str(_KEPT))


class PackedLinear:
    """``x @ weight.T + bias``.

    Attributes:
        num_outputs: Rows of the weight.
        blocked: The weight as compiled code reads it; None where it does not lie so.
    """

    def __init__(self, weights: list[torch.Tensor], biases: list[torch.Tensor | None]) -> None:
        """Put weights (outputs, inputs) under each other, and copy them into the layout."""
        weight = torch.cat([part.detach() for part in weights])
        self.num_outputs = weight.shape[0]
        self._bias = None
        if any(bias is not None for bias in biases):
            parts = [
                weight.new_zeros(len(part)) if bias is None else bias.detach()
                for part, bias in zip(weights, biases, strict=True)
            ]
            self._bias = torch.cat(parts)
        self._is_packed = False
        self.blocked: BlockedWeight | None = None
        if weight.device.type == "cpu" and _takes(weight.dtype):
            plain, weight = weight, torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            self._is_packed = True
            self.blocked = blocked_weight(plain, weight, self._bias)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return (rows, outputs) of (rows, inputs)."""
        if self._is_packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._weight, self._bias, "none", [], ""
            )
            return product
        return F.linear(x, self._weight, self._bias)


def _takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has the layout, and this processor the dtype."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported())
