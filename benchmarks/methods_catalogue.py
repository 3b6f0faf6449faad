"""Which schemes ``bench_methods.py`` compares: ours, alone and composed, and peers."""

from collections.abc import Sequence

from codec_caches import cache_peers
from codec_peers import paper_peers
from codec_schemes import PeerScheme
from methods_kvpress import PRESSES
from methods_schemes import (
    SINKS,
    Coded,
    Evicted,
    Gated,
    MethodScheme,
    Unbudgeted,
    by_chance,
    by_gate,
    by_peer,
    evenly,
    everything,
    h2o,
    sparse,
)

from kvstrata.methods.gate_weights import GateWeights
from kvstrata.methods.h2o import H2O
from kvstrata.methods.pipeline import Pipeline
from kvstrata.methods.presets import Method, from_preset, from_settings
from kvstrata.methods.profile import Profile
from kvstrata.methods.zipcache import ZipCache
from kvstrata.methods.zipcache_codec import ZipCacheCodec
from kvstrata.protos.inference_pb2 import MethodSettings

BUDGETS = (0.8, 0.65, 0.5, 0.35, 0.3, 0.2, 0.1)
TAUS = (0.99, 0.975, 0.96, 0.9)
SHORT_BUDGETS = (0.5, 0.3, 0.2)
SHORT_TAUS = (0.975, 0.9)
CACHE_PEERS = ("quanto-4", "quanto-2", "hqq-4", "zipcache", "kivi-4", "kivi-2")


def halved(budget: float) -> H2O:
    """Return H2O as published: half of the budget heavy, half recent."""
    return H2O(heavy=budget / 2, recent=budget / 2)


def eviction(budgets: Sequence[float], seed: int, *, has_kvpress: bool) -> list[MethodScheme]:
    """Return what keeps some tokens as they are, at every budget."""
    schemes: list[MethodScheme] = []
    for budget in budgets:
        stage = halved(budget)
        sinking = H2O(stage.heavy, stage.recent, sinks=SINKS)
        schemes += [
            Evicted("h2o", budget, h2o(stage), peer=False),
            Evicted("h2o-sinks", budget, h2o(sinking), peer=False),
            Evicted("random", budget, by_chance(budget, seed)),
            Evicted("uniform", budget, evenly(budget)),
        ]
        if has_kvpress:
            schemes += [Evicted(name, budget, by_peer(name, budget)) for name in PRESSES]
    return schemes


def whole() -> MethodScheme:
    """Return what all others are measured against: every token, as it is."""
    return Evicted("uncompressed", 1.0, everything)


def gated(
    gates: GateWeights | None, profile: Profile | None, budgets: Sequence[float]
) -> list[MethodScheme]:
    """Return trained gates as they are served, and as an order of tokens at every budget."""
    if gates is None:
        return []
    ordered = [
        Evicted("attention-gate order", budget, by_gate(budget), peer=False) for budget in budgets
    ]
    served = from_preset("attention-gate", profile, gates)
    return [Gated(served, gates.keep_rate), *ordered]


def coded(profile: Profile | None, budgets: Sequence[float]) -> list[MethodScheme]:
    """Return codecs on all tokens, and on what H2O leaves."""
    published = ZipCache(quantiser="published")
    shared = ZipCache(quantiser="published", share_heads=True)
    schemes: list[MethodScheme] = [
        Coded(
            "zipcache blocks",
            1.0,
            Method(ZipCacheCodec(published), pipeline=Pipeline.of(published)),
        ),
        Coded(
            "zipcache blocks shared",
            1.0,
            Method(ZipCacheCodec(shared), pipeline=Pipeline.of(shared)),
        ),
        Coded("fallback", 1.0, from_settings(MethodSettings(codec="fallback"))),
    ]
    if profile is None:
        return schemes
    presets = ("near-lossless", "balanced", "small", "zipcache")
    schemes += [
        Coded("zipcache strata" if name == "zipcache" else name, 1.0, from_preset(name, profile))
        for name in presets
    ]
    for budget in budgets:
        for name in ("near-lossless", "balanced", "small"):
            scheme = f"h2o + {name}"
            schemes.append(Coded(scheme, budget, from_preset(name, profile), h2o(halved(budget))))
    return schemes


def zipvl(taus: Sequence[float]) -> list[MethodScheme]:
    """Return ZipVL's sparse prefill, the rest kept or evicted."""
    return [sparse(tau, rest) for tau in taus for rest in ("low_bit", "evict")]  # type: ignore[arg-type]


def is_short(scheme: MethodScheme) -> bool:
    """Return whether a scheme is measured without ``--full``."""
    if scheme.name in ("h2o-sinks", "uniform", "h2o + small", "zipcache blocks shared"):
        return False
    return not (scheme.peer and scheme.budget == 0.3)


def other_codecs(seed: int) -> tuple[list[MethodScheme], dict[str, str]]:
    """Return peers that store all tokens, and why others cannot run here."""
    found, missing = cache_peers()
    found |= paper_peers(seed)
    chosen = {name: found[name] for name in CACHE_PEERS if name in found}
    names = {"zipcache": "zipcache published"}
    return [
        Unbudgeted(PeerScheme(names.get(name, name), encode)) for name, encode in chosen.items()
    ], missing
