"""What calibration needs to know of a model's cache: its vectors, and how much each one matters.

For a text split into context and continuation, the KV of the context is taken as it is, and the
gradient of the log-probability of a continuation sampled from the model itself is taken with
respect to every cached K and V vector. Its mean outer product is the Fisher metric of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.engine.model import Model
from kvstrata.methods.profile import SideTables
from kvstrata.methods.profile_fit import SideMoments, fit_side, frame_metric
from kvstrata.protos.identity import BLOCK_TOKENS

SKIPPED_TOKENS = 4  # sinks: always stored as escapes, and far from everything else
PREFILL_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Segment:
    """One calibration text: the context whose cache is studied, and what follows it.

    Attributes:
        context: Token ids.
        continuation: Token ids.
        weight: Of its gradients in the metric, against those of other segments.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    weight: float = 1.0


class CacheStatistics:
    """Running statistics of one model's cache over calibration segments.

    Attributes:
        sides: By name, ``key_pre``, ``key_frame`` (only of models that rotate keys), ``value``.
        num_segments: Segments counted so far.
    """

    def __init__(self, model: Model, first_layer: int) -> None:
        self._model = model
        self._first_layer = first_layer
        spec = model.spec
        names = ["key_pre", "key_frame", "value"] if spec.rope == "pre" else ["key_pre", "value"]
        self.sides = {
            name: SideMoments(spec.num_layers - first_layer, spec.num_kv_heads, spec.head_dim)
            for name in names
        }
        self.num_segments = 0

    def add(self, segment: Segment, generator: torch.Generator, num_samples: int = 1) -> None:
        """Count one segment: a prefill, and a forward and backward pass per sample."""
        model, first = self._model, self._first_layer
        cache = model.new_cache(len(segment.context))
        for begin in range(0, len(segment.context), PREFILL_CHUNK):
            model.forward(cache, segment.context[begin : begin + PREFILL_CHUNK])
        keys, values = cache.read(0, cache.length)
        key_gradients, value_gradients = self._gradients(
            keys, values, segment.continuation, generator, num_samples
        )
        key_gradients, value_gradients = (
            part * segment.weight**0.5 for part in (key_gradients, value_gradients)
        )
        kept = slice(SKIPPED_TOKENS, None)
        counted = (torch.arange(len(segment.context)) >= SKIPPED_TOKENS).repeat(num_samples)
        self.sides["value"].add_vectors(values[first:, :, kept].cpu())
        self.sides["value"].add_gradients(value_gradients[:, :, counted])
        keys = keys[first:].cpu()
        if model.spec.rope == "pre":
            positions = torch.arange(len(segment.context))
            starts = positions // BLOCK_TOKENS * BLOCK_TOKENS
            in_frame = model.rotate(keys, starts, inverse=True)
            self.sides["key_frame"].add_vectors(in_frame[:, :, kept])
            keys = model.rotate(keys, 0, inverse=True)
            key_gradients = self._before_rotation(key_gradients, positions.repeat(num_samples))
        self.sides["key_pre"].add_vectors(keys[:, :, kept])
        self.sides["key_pre"].add_gradients(key_gradients[:, :, counted])
        self.num_segments += 1

    def fit(self) -> tuple[dict[str, SideTables], SideTables]:
        """Return the transforms of K by form, and of V."""
        keys = {"pre": fit_side(self.sides["key_pre"])}
        if "key_frame" in self.sides:
            pre = self.sides["key_pre"]
            metric = frame_metric(pre.metric / pre.num_gradients, self._turns())
            frame = self.sides["key_frame"]
            frame.num_gradients = pre.num_gradients
            keys["frame"] = fit_side(frame, metric)
        return keys, fit_side(self.sides["value"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything, to be saved and given to ``restore``."""
        arrays = {"num_segments": np.array(self.num_segments)}
        for side, moments in self.sides.items():
            arrays |= {f"{side}.{name}": a for name, a in moments.arrays().items()}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from what ``arrays`` returned.

        Raises:
            KeyError, ValueError: They are of another model.
        """
        for side, moments in self.sides.items():
            prefix = f"{side}."
            moments.restore(
                {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
            )
        self.num_segments = int(arrays["num_segments"])

    def _gradients(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        continuation: Sequence[int],
        generator: torch.Generator,
        num_samples: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradients, float32 (L, H, num_samples * n, D), on the CPU."""
        leaves = [k.clone().requires_grad_() for k in keys]
        leaves += [v.clone().requires_grad_() for v in values]
        half = len(leaves) // 2
        with torch.enable_grad():
            logits = self._model.continue_over(leaves[:half], leaves[half:], continuation)
            log_p = logits.float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().cpu(), num_samples, generator=generator)
        parts = []
        for sample in drawn.T.to(log_p.device):
            total = log_p.gather(-1, sample[:, None]).sum()
            parts.append(torch.autograd.grad(total, leaves, retain_graph=True))
        first = self._first_layer
        return (
            torch.cat([torch.stack(g[first:half]).float().cpu() for g in parts], 2),
            torch.cat([torch.stack(g[half + first :]).float().cpu() for g in parts], 2),
        )

    def _before_rotation(self, gradients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # The transpose of the rotation: with YaRN's scaling it is not the inverse.
        squared_scaling = self._model.cos_sin(0, 1)[0][0, 0].item() ** 2
        return self._model.rotate(gradients, positions, inverse=True) * squared_scaling

    def _turns(self) -> torch.Tensor:
        """Return how a block's offsets turn keys, without YaRN's scaling, (64, D, D)."""
        dim = self._model.spec.head_dim
        axes = torch.eye(dim)[:, None].expand(dim, BLOCK_TOKENS, dim)
        at_start = torch.zeros(BLOCK_TOKENS, dtype=torch.int64)
        turned = self._model.rotate(self._model.rotate(axes, 0), at_start, inverse=True)
        return turned.double().permute(1, 2, 0)
