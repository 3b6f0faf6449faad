"""Scores of kvpress's presses, by kvpress's own code, on the prompt that everybody gets.

Each press scores a layer from its hidden states, keys, values and attention; that is one pass of
the same weights in eager attention, during which every press is asked. kvpress 0.5.5 asks for
transformers below 5.3 but runs with what is installed here; ``make peers-methods`` installs it.
"""

import importlib.util
from typing import Any

import torch

from kvstrata.engine.loading import load_pretrained

# By the names in the tables: class and settings, which are kvpress's defaults.
PRESSES = {
    "kvpress-observed": "ObservedAttentionPress",
    "kvpress-expected": "ExpectedAttentionPress",
    "kvpress-snapkv": "SnapKVPress",
    "kvpress-knorm": "KnormPress",
    "kvpress-streaming": "StreamingLLMPress",
}
INSTALL = "make peers-methods"


def is_installed() -> bool:
    """Return whether kvpress is there."""
    return importlib.util.find_spec("kvpress") is not None


class PressScores:
    """Scores prompts by all presses. Holds a second copy of the model, with eager attention."""

    def __init__(self, source: str | None) -> None:
        """Load the model ``source``, as ``Model.load`` does, in float32."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

        before = dict(FUNCTIONS.items())
        import kvpress

        for name, function in before.items():  # it wraps them all, for presses not used here
            FUNCTIONS[name] = function
        self._presses = {name: getattr(kvpress, kind)() for name, kind in PRESSES.items()}
        self._model = load_pretrained(source, torch.float32, None)[0]
        self._model.set_attn_implementation("eager")
        for press in self._presses.values():
            press.post_init_from_model(self._model)

    @torch.inference_mode()
    def of(self, ids: list[int]) -> dict[str, torch.Tensor]:
        """Return the scores of every press, float32 (L, H, n), larger is kept."""
        from transformers import DynamicCache

        found: dict[str, list[torch.Tensor]] = {name: [] for name in self._presses}
        cache = DynamicCache()

        def score(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            held = cache.layers[module.layer_idx]
            given = (kwargs["hidden_states"], held.keys, held.values, output[1], kwargs)
            for name, press in self._presses.items():
                scores = press.score(module, *given)[0].float()
                if name == "kvpress-streaming":
                    # Its scores are 0 and 1 by the budget; the order that gives all budgets.
                    scores = torch.arange(scores.shape[-1]).float().repeat(len(scores), 1)
                    scores[:, : press.n_sink] = torch.inf
                found[name].append(scores)

        hooks = []
        try:
            for layer in self._model.model.layers:
                layer.self_attn.rotary_emb = self._model.model.rotary_emb
                hooks.append(layer.self_attn.register_forward_hook(score, with_kwargs=True))
            self._model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return {name: torch.stack(layers) for name, layers in found.items()}
