"""Samples of a model's cache on disk, layer by layer, so that one layer at a time can be fitted.

A folder holds one file of float16 per stored layer, a row per token: V of all heads, then K before
RoPE. Beside them ``done.npz`` says whose they are and how many tokens are whole, so that sampling
goes on where it stopped.
"""

import shutil
from pathlib import Path

import numpy as np
import torch

from kvstrata.engine.cache_statistics import SKIPPED_TOKENS, Segment
from kvstrata.engine.model import Model
from kvstrata.methods.profile import read_arrays, write_arrays

_MAX_STATE_BYTES = 1 << 16


class LayerSamples:
    """The samples of one calibration run.

    Attributes:
        num_segments: Segments sampled so far.
        num_tokens: Rows of each file.
    """

    def __init__(self, model: Model, first_layer: int, folder: Path, identity: str) -> None:
        """Go on with what ``folder`` holds if it is of the same ``identity``, else start anew."""
        spec = model.spec
        self._model, self._first_layer = model, first_layer
        self._folder, self._identity = folder, identity
        self._num_layers = spec.num_layers - first_layer
        self._channels = 2 * spec.num_kv_heads * spec.head_dim
        self.num_segments, self.num_tokens = 0, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def add(self, segment: Segment) -> None:
        """Run the model over a segment and write what its cache holds but for sinks."""
        ids = (*segment.context, *segment.continuation)
        cache = self._model.new_cache(len(ids))
        self._model.forward(cache, ids)
        keys, values = cache.read(0, cache.length)
        if self._model.spec.rope == "pre":
            keys = self._model.rotate(keys, 0, inverse=True)
        both = torch.cat([values, keys], 1)[self._first_layer :, :, SKIPPED_TOKENS:]
        rows = both.transpose(1, 2).flatten(2).half().cpu().contiguous().numpy()
        begin = self.num_tokens * self._channels * rows.itemsize
        for layer, own in enumerate(rows):
            path = self._path(layer)
            with path.open("r+b" if path.exists() else "wb") as file:
                file.truncate(begin)
                file.seek(begin)
                file.write(own.tobytes())
        self.num_segments += 1
        self.num_tokens += rows.shape[1]
        counts = np.array([self.num_segments, self.num_tokens])
        write_arrays(self._state, {"identity": np.array(self._identity), "counts": counts})

    def read(self, layer: int) -> torch.Tensor:
        """Return the samples of a stored layer, float32 (num_tokens, 2 H D)."""
        rows = np.fromfile(self._path(layer), np.float16, self.num_tokens * self._channels)
        return torch.from_numpy(rows.reshape(-1, self._channels)).float()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self._folder)

    @property
    def _state(self) -> Path:
        return self._folder / "done.npz"

    def _path(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:03}.f16"

    def _resume(self) -> None:
        try:
            arrays = read_arrays(self._state, _MAX_STATE_BYTES)
            counts, same = arrays["counts"].tolist(), str(arrays["identity"]) == self._identity
            size = counts[1] * self._channels * 2
            whole = all(
                self._path(layer).stat().st_size >= size for layer in range(self._num_layers)
            )
        except (OSError, KeyError, ValueError):  # none yet, or damaged: start anew
            return
        if same and whole:
            self.num_segments, self.num_tokens = counts
