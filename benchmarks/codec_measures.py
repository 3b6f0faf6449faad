"""What a stored cache costs: divergence along a continuation, and recall of planted facts.

One ``Sample`` is one scheme on one context; ``rows`` sums samples up for the tables.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from codec_branches import forward_branches
from codec_schemes import Prefilled, Scheme
from codec_texts import Context

from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.kept_cache import KeptCache
from kvstrata.engine.model import Model

ALL = "all"


@dataclass(frozen=True, slots=True)
class Answer:
    """Log P of an answer, in nats, and whether greedy decoding would give all of it."""

    log_p: float
    right: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """What the uncompressed cache predicts.

    Attributes:
        log_probs: float32, (n, vocab), after each token of the continuation but the last.
        answers: In the order of the context's questions.
    """

    log_probs: torch.Tensor
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Sample:
    """One scheme on one context.

    Attributes:
        scheme: Its name.
        peer: Whether it is not ours.
        text: Name of the text.
        num_prompt: Tokens compressed.
        num_elements: Numbers in their K and V.
        num_bits: Stored for them.
        kl: KL(uncompressed || compressed) per token of the continuation, nats.
        nll: -log P of each token of the continuation, nats.
        agreed: Per token, whether the likeliest next token is the same.
        answers: On the compressed cache.
        reference_answers: On the uncompressed one.
        encode_s: Seconds to encode the prompt.
        decode_s: Seconds to read it back.
    """

    scheme: str
    peer: bool
    text: str
    num_prompt: int
    num_elements: int
    num_bits: int
    kl: list[float]
    nll: list[float]
    agreed: list[bool]
    answers: list[Answer]
    reference_answers: list[Answer]
    encode_s: float
    decode_s: float

    @property
    def changes(self) -> list[float]:
        """By how much log P of each answer changed, nats."""
        pairs = zip(self.answers, self.reference_answers, strict=True)
        return [after.log_p - before.log_p for after, before in pairs]


def refer(prompt: Prefilled, context: Context) -> Reference:
    """Return what the uncompressed cache predicts; leaves the cache as it is."""
    return Reference(*_predict(prompt.model, prompt.cache, context))


def measure(
    scheme: Scheme, prompt: Prefilled, context: Context, reference: Reference, repeats: int = 1
) -> Sample:
    """Store the prompt's KV by ``scheme`` and measure what it reads back.

    Times are the medians of ``repeats``.
    """
    times = []
    for _ in range(repeats):
        stored = scheme.store(prompt)
        times.append((stored.encode_s, stored.decode_s))
    encode_s, decode_s = map(statistics.median, zip(*times, strict=True))
    log_probs, answers = _predict(prompt.model, stored.cache, context)
    wanted = torch.tensor(context.rest[1:], device=log_probs.device)
    kl = (reference.log_probs.exp() * (reference.log_probs - log_probs)).sum(-1)
    return Sample(
        scheme=scheme.name,
        peer=scheme.peer,
        text=context.text,
        num_prompt=len(context.prompt),
        num_elements=prompt.num_elements,
        num_bits=stored.num_bits,
        kl=kl.tolist(),
        nll=(-log_probs.gather(-1, wanted[:, None])).flatten().tolist(),
        agreed=(log_probs.argmax(-1) == reference.log_probs.argmax(-1)).tolist(),
        answers=answers,
        reference_answers=reference.answers,
        encode_s=encode_s,
        decode_s=decode_s,
    )


def _predict(
    model: Model, cache: SequenceCache | KeptCache, context: Context
) -> tuple[torch.Tensor, list[Answer]]:
    """Return the log-probabilities along the continuation and the answers, teacher-forced."""
    encode = model.tokenizer.encode
    wanted = [encode(q.answer, add_special_tokens=False) for q in context.questions]
    asked = [
        [*encode(question.cue, add_special_tokens=False), *answer[:-1]]
        for question, answer in zip(context.questions, wanted, strict=True)
    ]
    logits = forward_branches(model, cache, [context.rest[:-1], *asked])
    answers = [
        _answer(rows[-len(answer) :].log_softmax(-1), answer)
        for rows, answer in zip(logits[1:], wanted, strict=True)
    ]
    return logits[0].log_softmax(-1), answers


def _answer(log_probs: torch.Tensor, answer: list[int]) -> Answer:
    wanted = torch.tensor(answer, device=log_probs.device)
    log_p = log_probs.gather(-1, wanted[:, None]).sum().item()
    return Answer(log_p, bool((log_probs.argmax(-1) == wanted).all()))


def rows(samples: Sequence[Sample], timed_threads: int | None = None) -> list[dict[str, Any]]:
    """Return one row per scheme, text and context.

    Args:
        samples: At least one of each.
        timed_threads: Threads that their times are of; None leaves times out.
    """
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.scheme, sample.text, sample.num_prompt), []).append(sample)
    return [_row(group, timed_threads) for group in groups.values()]


def _row(samples: Sequence[Sample], timed_threads: int | None) -> dict[str, Any]:
    """Return the figures of one scheme, text and context; null where nothing was measured."""
    first = samples[0]
    kl, agreed = _join(s.kl for s in samples), _join(s.agreed for s in samples)
    changed = [s.changes for s in samples if s.answers]
    changes = _join(changed)
    bits = sum(s.num_bits for s in samples) / sum(s.num_elements for s in samples)
    is_timed = timed_threads is not None
    return {
        "bench": "codec",
        "scheme": first.scheme,
        "peer": first.peer,
        "bits": round(bits, 4),
        "ratio": round(16 / bits, 3),
        "kl": _mean(kl, 6),
        "kl_se": _standard_error([s.kl for s in samples]),
        "perplexity": round(math.exp(_mean(_join(s.nll for s in samples), 9)), 4),
        "top1": _mean(agreed, 4),
        "recall": _mean(changes, 4) if changes else None,
        "recall_se": _standard_error(changed) if changes else None,
        "encode_s": _mean([s.encode_s for s in samples], 4) if is_timed else None,
        "decode_s": _mean([s.decode_s for s in samples], 4) if is_timed else None,
        "timed_threads": timed_threads,
        "text": first.text,
        "context": first.num_prompt,
        "contexts": len(samples),
        "tokens": len(kl),
        "facts": len(changes),
        "facts_right": sum(a.right for s in samples for a in s.answers),
        "facts_right_reference": sum(a.right for s in samples for a in s.reference_answers),
    }


def totals(of_texts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows per scheme and context, then per scheme, of rows per scheme, text and context.

    Those over all texts have the text "all", those over all contexts the context 0; a scheme that
    was not measured everywhere has none of the latter. Times are the means of the timed rows.
    """
    places: dict[str, set[tuple[str, int]]] = {}
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in of_texts:
        places.setdefault(row["scheme"], set()).add((row["text"], row["context"]))
        groups.setdefault((row["scheme"], row["context"]), []).append(row)
    everywhere = set().union(*places.values())
    whole = [scheme for scheme, there in places.items() if there == everywhere]
    return [_total(group, context) for (_, context), group in groups.items()] + [
        _total([row for row in of_texts if row["scheme"] == scheme], 0) for scheme in whole
    ]


def _total(parts: Sequence[dict[str, Any]], context: int) -> dict[str, Any]:
    """Return one row for several, weighted by what each was measured on."""
    size = [row["context"] * row["contexts"] for row in parts]
    tokens, facts = [row["tokens"] for row in parts], [row["facts"] for row in parts]
    bits = _weighted([row["bits"] for row in parts], size)
    log_perplexity = _weighted([math.log(row["perplexity"]) for row in parts], tokens)
    asked = [row for row in parts if row["facts"]]
    counts = [row["facts"] for row in asked]
    recall = [row["recall"] for row in asked]
    timed = [row for row in parts if row["timed_threads"] is not None]
    return {
        **parts[0],
        "bits": round(bits, 4),
        "ratio": round(16 / bits, 3),
        "kl": round(_weighted([row["kl"] for row in parts], tokens), 6),
        "kl_se": _error_of_weighted(parts, "kl", tokens),
        "perplexity": round(math.exp(log_perplexity), 4),
        "top1": round(_weighted([row["top1"] for row in parts], tokens), 4),
        "recall": round(_weighted(recall, counts), 4) if asked else None,
        "recall_se": _error_of_weighted(asked, "recall", counts) if asked else None,
        "encode_s": _mean([row["encode_s"] for row in timed], 4) if timed else None,
        "decode_s": _mean([row["decode_s"] for row in timed], 4) if timed else None,
        "timed_threads": timed[0]["timed_threads"] if timed else None,
        "text": ALL,
        "context": context,
        "contexts": sum(row["contexts"] for row in parts),
        "tokens": sum(tokens),
        "facts": sum(facts),
        "facts_right": sum(row["facts_right"] for row in parts),
        "facts_right_reference": sum(row["facts_right_reference"] for row in parts),
    }


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _error_of_weighted(parts: Sequence[dict[str, Any]], key: str, counts: Sequence[int]) -> float:
    """Return the standard error of the mean over all values, as ``_standard_error`` does.

    Texts are what is drawn; of a single one, the error that it has.
    """
    if len(parts) == 1:
        error: float = parts[0][f"{key}_se"]
        return error
    mean = _weighted([row[key] for row in parts], counts)
    squares = sum((n * (row[key] - mean)) ** 2 for row, n in zip(parts, counts, strict=True))
    return round(math.sqrt(squares * len(parts) / (len(parts) - 1)) / sum(counts), 6)


def beaten_by(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence for each peer, no larger than ours, with a lower KL or a better recall.

    Compares rows of equal text and context.
    """
    sentences = []
    for ours in found:
        for theirs in found:
            place = (ours["text"], ours["context"])
            if ours["peer"] or not theirs["peer"] or place != (theirs["text"], theirs["context"]):
                continue
            if theirs["bits"] > ours["bits"]:
                continue
            for key, sign in (("kl", -1), ("recall", 1)):
                if theirs[key] is not None and sign * (theirs[key] - ours[key]) > 0:
                    sentences.append(
                        f"{theirs['scheme']} beats {ours['scheme']} on {place[0]} at {place[1]}: "
                        f"{key} {theirs[key]} at {theirs['bits']} bits against "
                        f"{ours[key]} at {ours['bits']}"
                    )
    return sentences


def _join(parts: Iterable[list[Any]]) -> list[Any]:
    return [item for part in parts for item in part]


def _mean(values: Sequence[float], digits: int) -> float:
    return round(sum(values) / len(values), digits)


def _standard_error(contexts: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the mean over all values.

    Values of one context are not independent, so contexts are what is drawn; of a single context,
    for want of others, its values.
    """
    if len(contexts) == 1:
        contexts = [[value] for value in contexts[0]]
    if len(contexts) < 2:
        return 0.0
    count = sum(map(len, contexts))
    mean = sum(map(sum, contexts)) / count
    squares = sum((sum(values) - mean * len(values)) ** 2 for values in contexts)
    return round(math.sqrt(squares * len(contexts) / (len(contexts) - 1)) / count, 6)
