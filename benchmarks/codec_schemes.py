"""A prompt's uncompressed cache, and the schemes that replace its content: ours and peers.

Ours go the whole way of a stored block: encoded, framed, and read back from the frames' bytes by a
second sequence, which checks and decodes them. Peers replace the keys and values of all layers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from codec_peers import Encode, Prompt, probe_positions

from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.engine.model import Model
from kvstrata.engine.sequence import RunningSequence
from kvstrata.methods.exact import ExactCodec
from kvstrata.methods.presets import PRESET_BITS, Method, from_preset, from_settings
from kvstrata.methods.profile import Profile
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.inference_pb2 import MethodSettings


class ProbedCache(SequenceCache):
    """A cache that also keeps the queries of chosen rows, for peers that choose them otherwise."""

    def __init__(self, like: SequenceCache, positions: torch.Tensor) -> None:
        """Take over the size of ``like``, which is empty; keep the rows ``positions`` as well."""
        super().__init__(like.spec, like.capacity, like.probe_tokens, device=like.keys.device)
        self.positions = positions
        spec, dtype = like.spec, like.keys.dtype
        shape = (spec.num_layers, spec.num_heads, len(positions), spec.head_dim)
        self.queries = torch.zeros(shape, dtype=dtype, device=like.keys.device)

    def append(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append and keep; see ``SequenceCache.append``."""
        first = self.length
        chosen = (self.positions >= first) & (self.positions < first + queries.shape[1])
        self.queries[layer, :, chosen] = queries[:, self.positions[chosen] - first]
        return super().append(layer, queries, keys, values)


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A prompt and its uncompressed cache, which no scheme changes."""

    model: Model
    ids: list[int]
    cache: ProbedCache

    @classmethod
    def of(cls, model: Model, ids: list[int], seed: int) -> "Prefilled":
        """Run the model over ``ids``; the seed draws ZipCache's probe rows."""
        sequence = RunningSequence(model, Method(ExactCodec()), ids)
        cache = ProbedCache(sequence.cache, probe_positions(len(ids), seed).to(model.device))
        sequence.cache = cache
        for _ in sequence.compute(len(ids)):
            pass
        return cls(model, ids, cache)

    @property
    def num_elements(self) -> int:
        """Numbers in K and V, all layers."""
        spec = self.model.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * len(self.ids)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a scheme made of a prompt: a cache with what it reads back, its size and times."""

    cache: SequenceCache | KeptCache
    num_bits: int
    encode_s: float
    decode_s: float


class Scheme(Protocol):
    """A way to store a prompt's KV."""

    name: str
    peer: bool

    def store(self, prompt: Prefilled) -> Stored:
        """Encode and read back all of the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class OurScheme:
    """A method of this project, by way of the frames that a store would keep."""

    name: str
    method: Method
    peer: bool = False

    @property
    def settings(self) -> str:
        """What the figures depend on: blocks of equal settings are equal."""
        codec = self.method.codec
        return f"{codec.name}/{codec.version};{codec.settings()}"

    def store(self, prompt: Prefilled) -> Stored:
        """Seal all blocks and load them into another sequence; see ``Scheme.store``.

        Raises:
            RuntimeError: The codec refused the values, or a block could not be read back.
        """
        num_blocks = len(prompt.ids) // BLOCK_TOKENS
        writer = RunningSequence(prompt.model, self.method, prompt.ids)
        writer.cache = prompt.cache
        start = time.perf_counter()
        blocks = writer.seal(0, num_blocks)
        encode_s = time.perf_counter() - start
        reader = RunningSequence(prompt.model, self.method, prompt.ids)
        wanted = self.method.wanted
        start = time.perf_counter()
        frames = [{s: Frame.open(b.frames[s]) for s in wanted} for b in blocks]
        loaded = reader.load(frames)
        decode_s = time.perf_counter() - start
        if len(blocks) < num_blocks or loaded.num_blocks < num_blocks:
            raise RuntimeError(
                f"{self.name}: {len(blocks)} of {num_blocks} blocks encoded, "
                f"{loaded.num_blocks} read back ({loaded.reason})"
            )
        num_bytes = sum(block.num_bytes for block in blocks)
        return Stored(reader.cache, 8 * num_bytes, encode_s, decode_s)


@dataclass(frozen=True, slots=True)
class PeerScheme:
    """Somebody else's codec, on all of a prompt's post-RoPE keys and values."""

    name: str
    encode: Encode
    peer: bool = True

    def store(self, prompt: Prefilled) -> Stored:
        """Encode and decode; see ``Scheme.store``."""
        num_tokens = len(prompt.ids)
        keys, values = (x.contiguous() for x in prompt.cache.read(0, num_tokens))
        given = Prompt(
            keys,
            values,
            prompt.cache.queries,
            prompt.cache.positions,
            prompt.model.attention_scaling,
        )
        start = time.perf_counter()
        encoded = self.encode(given)
        encode_s = time.perf_counter() - start
        start = time.perf_counter()
        decoded_keys, decoded_values = encoded.decode()
        decode_s = time.perf_counter() - start
        cache = SequenceCache(prompt.model.spec, num_tokens, device=prompt.model.device)
        cache.write(0, decoded_keys, decoded_values)
        return Stored(cache, encoded.num_bits, encode_s, decode_s)


def our_schemes(profile: Profile | None) -> list[OurScheme]:
    """Return what the presets mean for a model with this profile, and the fallback codec.

    Without a profile the lossy presets are the fallback codec, which is measured once.
    """
    names = [ExactCodec.name, *(PRESET_BITS if profile is not None else ())]
    schemes = [OurScheme(name, from_preset(name, profile)) for name in names]
    return [*schemes, OurScheme("fallback", from_settings(MethodSettings(codec="fallback")))]


def choose(schemes: Sequence[Scheme], names: Sequence[str]) -> list[Scheme]:
    """Return the schemes of these names, in their order; all if there are no names.

    Raises:
        ValueError: A name is unknown.
    """
    by_name = {scheme.name: scheme for scheme in schemes}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"no scheme {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names] if names else list(schemes)
