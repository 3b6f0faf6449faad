"""One loaded model: forward passes over a ``SequenceCache``, and what its keys look like."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvstrata.engine.adapters import (
    adapter_parameters,
    add_adapter,
    save_adapter,
    without_adapter,
)
from kvstrata.engine.attention import (
    AttendOver,
    AttentionState,
    CaptureFirstLayer,
    FirstLayerCapturedError,
    LayerRows,
    alone,
    following,
)
from kvstrata.engine.batch import KVCache, Span, begin_pass
from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.compatibility import build_spec
from kvstrata.engine.held_images import HeldImages
from kvstrata.engine.layer_inputs import show_inputs_in
from kvstrata.engine.layer_rows import select_rows_in
from kvstrata.engine.loading import (
    display_name,
    eos_token_ids,
    find_default_model,
    load_pretrained,
    resolve_dtype,
)
from kvstrata.engine.model_tables import gates_of, profile_of
from kvstrata.engine.packed_decoder import PackedDecoder, can_pack
from kvstrata.engine.rotary import Rotary
from kvstrata.engine.spec import KVSpec
from kvstrata.engine.step_graphs import StepGraphs
from kvstrata.engine.vision import VisionTower
from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.profile import Profile


class Model:
    """A transformers model whose KV cache is ours. Stateless between calls but for its caches.

    Several threads may call it at once, each with its own ``SequenceCache``.

    Attributes:
        spec: Sizes, dtype and limits.
        fingerprint: 16 bytes; equal fingerprints may share stored KV.
        model_id: 16 bytes of weights and config, equal for every dtype; names the profile.
        tokenizer: The transformers tokenizer.
        name: For people: the hub id, or the folder's or file's name.
        device: Where the weights are.
        attention_scaling: Factor on q . k before the softmax, as the hook gets it; 1.0 for OPT,
            whose queries come scaled.
        vision: What sees images for it; None for a model of text alone.
        images: Those that may be in a pass now.
    """

    def __init__(
        self,
        hf_model: Any,
        tokenizer: Any,
        fingerprint: bytes,
        model_id: bytes,
        *,
        name: str,
        device: torch.device,
        vision: VisionTower | None = None,
    ) -> None:
        """Wrap a model from ``load_pretrained``; callers use ``Model.load``."""
        self.vision = None if vision is None else vision.to(device)
        self.images = HeldImages(self.vision)
        self._hf_model = hf_model.to(device).requires_grad_(False)
        select_rows_in(self._hf_model)
        show_inputs_in(self._hf_model)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.model_id = model_id
        self.name = name
        self.device = device
        self.spec: KVSpec = build_spec(
            hf_model.config, hf_model.dtype, eos_token_ids(hf_model, tokenizer)
        )
        self._decoder: PackedDecoder | None = None
        self._rotary: Rotary | None = None
        if self.spec.rope == "pre":
            rotary_module = hf_model.base_model.rotary_emb
            self._rotary = Rotary(rotary_module, self.spec.max_positions, device)
        self.attention_scaling = self._capture_first_layer([0], 0).scaling

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        adapter: str | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "auto",
    ) -> "Model":
        """Load a model.

        Args:
            source: A folder, a GGUF file, a hub id, or None for the default model.
            adapter: Folder of a LoRA to merge into its weights.
            dtype: A torch dtype or its name; ``"auto"`` is float32 on CPU, bfloat16 elsewhere.
            device: A torch device; ``"auto"`` is CUDA if there is one, else the CPU.

        Raises:
            ModelNotFoundError: Nothing at ``source``.
            UnsupportedModelError: The model cannot be served.
            ValueError: ``dtype`` names no float type.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        dtype = resolve_dtype(dtype, device)
        loaded = load_pretrained(source, dtype, adapter)
        name = Path(find_default_model()[1]).stem if source is None else display_name(source)
        return cls(*loaded[:4], name=name, device=device, vision=loaded.vision)

    def pack(self, graphs: StepGraphs | None = None) -> bool:
        """Take the weights out of transformers for faster passes, if the family allows it.

        No gradients flow then (``forward_once``). Idempotent. Few rows run by ``graphs``, if given.

        Returns:
            Whether passes run packed now.
        """
        if self._decoder is None and self._rotary is not None and can_pack(self._hf_model):
            self._decoder = PackedDecoder(self._hf_model, self._rotary, self.spec, graphs)
        return self._decoder is not None

    @cached_property
    def profile(self) -> Profile | None:
        """The model's calibrated profile, or None: then lossy presets use the fallback codec."""
        return profile_of(self.model_id, self.spec, self.name)

    @cached_property
    def gates(self) -> GateWeights | None:
        """The model's trained gates (Attention-Gate), or None."""
        return gates_of(self.model_id, self.spec, self.width, self.name)

    @property
    def width(self) -> int:
        """Channels of a token between layers."""
        return int(self._hf_model.config.hidden_size)

    def new_cache(self, capacity: int, probe_tokens: int = 64) -> SequenceCache:
        """Return an empty cache on the model's device; see ``SequenceCache``."""
        return SequenceCache(self.spec, capacity, probe_tokens, device=self.device)

    def forward(
        self, cache: KVCache, token_ids: Sequence[int], rows: LayerRows = ()
    ) -> torch.Tensor:
        """Run the next tokens of a sequence and return the logits after the last.

        On any exception ``cache.length`` is unchanged and the call may be repeated.

        Args:
            cache: Holds the tokens before; gets the new ones.
            token_ids: At least one.
            rows: Per layer, which of them run it: a run from the first on, never longer than what
                ran in the layer before; empty for all. What a layer's cache holds of the others
                means nothing, so no later token may run it.

        Returns:
            float32, (vocab_size,).

        Raises:
            ValueError: No tokens, an id outside the vocabulary, or beyond ``max_positions``.
        """
        return self.forward_batch([Span(cache, token_ids, rows=rows)])[0]

    def forward_all(
        self, cache: KVCache, token_ids: Sequence[int], rows: LayerRows = ()
    ) -> torch.Tensor:
        """As ``forward``, but return the logits after each token, float32, (n, vocab_size)."""
        return self._pass([Span(cache, token_ids, rows=rows)], all_rows=True)

    def forward_batch(self, spans: Sequence[Span]) -> torch.Tensor:
        """Run the next tokens of several sequences in one pass.

        Each sequence gets the logits that it would get alone, but for the rounding of matrix
        products, whose order of summation depends on the number of rows.

        Args:
            spans: At least one; a cache in one of them only.

        Returns:
            float32, (spans that want logits, vocab_size): after each one's last token.

        Raises:
            ValueError: As for ``forward``, of any span; then no cache has changed.
        """
        return self._pass(spans, all_rows=False)

    def forward_once(
        self, token_ids: Sequence[int], rows: LayerRows = (), *, num_logits: int = 0
    ) -> torch.Tensor:
        """Return the logits after the last tokens of a sequence; nothing is kept, gradients flow.

        Args:
            token_ids: At least one.
            rows: As for ``forward``.
            num_logits: Of so many tokens; 0 is all.

        Returns:
            ``spec.dtype``, (num_logits, vocab_size).

        Raises:
            ValueError: As for ``forward``.
        """
        return self.forward_through(AttendOver(alone, rows=rows), token_ids, num_logits=num_logits)

    def forward_through(
        self, state: AttentionState, token_ids: Sequence[int], *, num_logits: int = 0
    ) -> torch.Tensor:
        """As ``forward_once``, of a sequence that attends by ``state``."""
        self.spec.check_tokens(token_ids, 0)
        return self._call(token_ids, range(len(token_ids)), state, num_logits)

    def add_adapter(self, rank: int) -> dict[str, torch.nn.Parameter]:
        """Put a new LoRA on the linear layers, for tuning, and return what training changes.

        Raises:
            UnsupportedModelError: peft is not installed.
        """
        self._hf_model = add_adapter(self._hf_model, rank)
        return adapter_parameters(self._hf_model)

    def without_adapter(self) -> AbstractContextManager[None]:
        """Let the model be what it was before ``add_adapter``, for a while."""
        return without_adapter(self._hf_model)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter for ``load(adapter=folder)``."""
        save_adapter(self._hf_model, folder)

    def continue_over(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], token_ids: Sequence[int]
    ) -> torch.Tensor:
        """Return the logits after each token that follows on given keys and values.

        Nothing is written. Gradients flow back to ``keys`` and ``values``, unless it is packed.

        Args:
            keys: Per layer, post-RoPE, ``spec.dtype``, (num_kv_heads, cached, head_dim).
            values: As ``keys``.
            token_ids: The tokens at positions ``cached`` and on.

        Returns:
            ``spec.dtype``, (len(token_ids), vocab_size).

        Raises:
            ValueError: As for ``forward``.
        """
        if self._decoder is not None and any(k.requires_grad for k in [*keys, *values]):
            raise RuntimeError("a packed model has no gradients: load it anew")
        positions = range(keys[0].shape[1], keys[0].shape[1] + len(token_ids))
        self.spec.check_tokens(token_ids, positions.start)
        return self._call(token_ids, positions, AttendOver(following(keys, values)), 0)

    def first_layer_kv(
        self, token_ids: Sequence[int], first_position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return layer 0's K and V as a cache would hold them, without attention or other layers.

        They depend on the tokens and their positions alone, so they need not be stored.

        Args:
            token_ids: At least one.
            first_position: Of the first token.

        Returns:
            Post-RoPE keys and values, ``spec.dtype``, each (num_kv_heads, n, head_dim).

        Raises:
            ValueError: As for ``forward``.
        """
        captured = self._capture_first_layer(token_ids, first_position)
        return captured.keys.clone(), captured.values.clone()

    def first_layer_rows(self, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return layer 0's keys before RoPE, and its values, as for ``first_layer_kv``.

        Raises:
            ValueError: As for ``forward`` and ``rotate``.
        """
        positions = [0] * len(token_ids)
        captured = self._capture_first_layer(token_ids, 0, positions)
        keys = self.rotate(captured.keys, torch.tensor(positions), inverse=True)
        return keys, captured.values.clone()

    def first_layer_queries(self, token_ids: Sequence[int], first_position: int) -> torch.Tensor:
        """Return layer 0's queries, post-RoPE, (num_heads, n, head_dim); as ``first_layer_kv``."""
        return self._capture_first_layer(token_ids, first_position).queries.clone()

    def rotate(
        self, keys: torch.Tensor, first_position: int | torch.Tensor, *, inverse: bool = False
    ) -> torch.Tensor:
        """Return ``keys`` rotated by RoPE, computed in float32.

        Rotating back and forth again at the same positions returns the keys to about 1e-6.

        Args:
            keys: (..., n, head_dim), any float dtype.
            first_position: Position of row 0, the others following it; or int64, (n,).
            inverse: Undo the rotation instead.

        Returns:
            The shape and dtype of ``keys``.

        Raises:
            ValueError: The model does not rotate keys, or positions beyond ``max_positions``.
        """
        return self._require_rotary().rotate(keys, first_position, inverse=inverse)

    def cos_sin(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotary tables of positions ``first`` to ``last`` - 1.

        Returns:
            Cosines and sines, float32, (last - first, head_dim); views of a cached table.

        Raises:
            ValueError: As for ``rotate``.
        """
        return self._require_rotary().cos_sin(first, last)

    def _require_rotary(self) -> Rotary:
        if self._rotary is None:
            raise ValueError(f"{self.name} does not rotate its keys (rope is 'none')")
        return self._rotary

    def _pass(self, spans: Sequence[Span], *, all_rows: bool) -> torch.Tensor:
        if not spans:
            raise ValueError("a pass needs at least one span")
        for span in spans:
            self.spec.check_tokens(span.token_ids, span.cache.length)
        row = begin_pass(spans)
        keep = 0 if all_rows else torch.tensor(row.kept, dtype=torch.int64, device=self.device)
        logits = self._run(row.token_ids, row.positions, row.state, keep)
        for span in spans:
            span.cache.advance(len(span.token_ids))
        return logits.to(torch.float32, copy=True)

    def _capture_first_layer(
        self,
        token_ids: Sequence[int],
        first_position: int,
        positions: Sequence[int] | None = None,
    ) -> CaptureFirstLayer:
        self.spec.check_tokens(token_ids, first_position)
        state = CaptureFirstLayer()
        try:
            end = first_position + len(token_ids)
            self._run(token_ids, positions or range(first_position, end), state, 1)
        except FirstLayerCapturedError:
            return state
        raise RuntimeError(f"{self.name} did not call the attention hook")

    @torch.inference_mode()
    def _run(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        state: AttentionState,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor:
        return self._call(token_ids, positions, state, logits_to_keep)

    def _call(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        state: AttentionState,
        logits_to_keep: int | torch.Tensor,
    ) -> torch.Tensor:
        words, images = self.images.split(token_ids)
        if self._decoder is not None:
            return self._decoder(words, positions, state, logits_to_keep, images)
        given = torch.tensor([words], dtype=torch.int64, device=self.device)
        if images is not None:
            given = self._hf_model.get_input_embeddings()(given)
            given[0, images.at.to(self.device)] = images.rows
        logits: torch.Tensor = self._hf_model(
            **{"input_ids" if images is None else "inputs_embeds": given},
            position_ids=torch.tensor([positions], dtype=torch.int64, device=self.device),
            use_cache=False,
            logits_to_keep=logits_to_keep,
            kv_cache_state=state,
        ).logits[0]
        return logits
