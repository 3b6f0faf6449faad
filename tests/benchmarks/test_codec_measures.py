from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_codec
import pytest
import torch
import transformers
from codec_branches import forward_branches
from codec_measures import ALL, Answer, Sample, beaten_by, measure, refer, rows, totals
from codec_peers import paper_peers
from codec_plot import draw
from codec_schemes import OurScheme, PeerScheme, Prefilled, Scheme, Stored, choose, our_schemes
from codec_texts import Context, Text

from kvstrata.engine import Model
from kvstrata.methods.presets import from_preset
from tests.engine.conftest import build_tokenizer
from tests.engine.families import build_reference

TEXT = "\n\n".join(f"Paragraph {i} of a text." for i in range(200))
KEYS = {
    "bench", "scheme", "peer", "bits", "ratio", "kl", "kl_se", "perplexity", "top1", "recall",
    "encode_s", "decode_s", "text", "context", "facts", "facts_right", "facts_right_reference",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A tiny model with room for facts at one token a byte."""
    folder = tmp_path_factory.mktemp("codec-model")
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    build_reference(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return Model.load(str(folder))


@pytest.fixture(scope="module")
def context(model: Model) -> Context:
    text = Text("t", TEXT, planted=True)
    return text.context(model.tokenizer, 1024, 32, segment=0, seed=0)


@pytest.fixture(scope="module")
def prompt(model: Model, context: Context) -> Iterator[Prefilled]:
    prompt = Prefilled.of(model, context.prompt, 0)
    before = [x.clone() for x in prompt.cache.read(0, len(prompt.ids))]
    yield prompt
    assert prompt.cache.length == len(prompt.ids)
    assert all(map(torch.equal, before, prompt.cache.read(0, len(prompt.ids))))


def test_branches_predict_what_each_predicts_alone(prompt: Prefilled) -> None:
    branches = [[5, 6, 7, 8], [9], [10, 11]]
    together = forward_branches(prompt.model, prompt.cache, branches)
    for branch, logits in zip(branches, together, strict=True):
        alone = prompt.model.forward_all(prompt.cache, branch)
        prompt.cache.truncate(len(prompt.ids))
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-3)


def test_the_probed_queries_are_those_of_the_chosen_rows(model: Model) -> None:
    ids = [5 + i % 200 for i in range(128)]
    prompt = Prefilled.of(model, ids, 1)
    rows_of_layer_0 = prompt.cache.queries[0]
    whole = model.new_cache(128, probe_tokens=128)
    whole.expect_probes(0, 128)
    model.forward(whole, ids)
    torch.testing.assert_close(rows_of_layer_0, whole.probes()[0][0, :, prompt.cache.positions])


def test_a_lossless_scheme_changes_nothing(prompt: Prefilled, context: Context) -> None:
    reference = refer(prompt, context)
    sample = measure(OurScheme("exact", from_preset("exact")), prompt, context, reference)
    assert sample.answers == reference.answers
    assert len(sample.answers) == 8
    assert sample.kl == [0.0] * 32
    assert all(sample.agreed)
    assert sample.num_bits > 0


def every_scheme() -> list[Scheme]:
    peers = [PeerScheme(*item) for item in paper_peers(0).items()]
    return [*our_schemes(None), *peers]


def test_every_scheme_gives_a_row_with_all_keys(
    prompt: Prefilled, context: Context, tmp_path: Path
) -> None:
    reference = refer(prompt, context)
    schemes = every_scheme()
    samples = [measure(scheme, prompt, context, reference) for scheme in schemes]
    of_texts = rows(samples, 2)
    found = of_texts + totals(of_texts)
    assert [row["scheme"] for row in found[: len(schemes)]] == [s.name for s in schemes]
    assert {(row["text"], row["context"]) for row in found} == {("t", 1024), (ALL, 1024), (ALL, 0)}
    for row in found:
        assert set(row) >= KEYS
        assert row["kl"] >= 0
        assert row["bits"] * row["ratio"] == pytest.approx(16, rel=1e-3)
    draw([row for row in found if row["context"] == 0], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def sample(scheme: str, *, peer: bool, bits: int, kl: float, log_p: float) -> Sample:
    return Sample(
        scheme=scheme, peer=peer, text="t", num_prompt=64, num_elements=100, num_bits=100 * bits,
        kl=[kl, kl], nll=[0.0, 0.0], agreed=[True, False], answers=[Answer(log_p, right=False)],
        reference_answers=[Answer(-1.0, right=True)], encode_s=1.0, decode_s=2.0,
    )  # fmt: skip


def test_rows_sum_samples_up() -> None:
    first = sample("a", peer=False, bits=2, kl=0.1, log_p=-1.5)
    second = sample("a", peer=False, bits=4, kl=0.3, log_p=-2.0)
    row: dict[str, Any] = rows([first, second])[0]
    assert (row["bits"], row["kl"], row["recall"], row["top1"]) == (3, 0.2, -0.75, 0.5)
    # Two contexts, whatever their number of equal tokens: the deviation of .1 and .3 over sqrt(2).
    assert row["kl_se"] == pytest.approx(0.02**0.5 / 2**0.5, abs=1e-6)
    assert row["recall_se"] == pytest.approx(0.125**0.5 / 2**0.5, abs=1e-6)
    assert (row["facts"], row["facts_right"], row["facts_right_reference"]) == (2, 0, 2)
    assert row["perplexity"] == 1.0


def test_totals_are_what_the_texts_together_say() -> None:
    """Rows joined from several runs give what one run would: two texts as two contexts of one."""
    first = sample("a", peer=False, bits=2, kl=0.1, log_p=-1.5)
    second = replace(sample("a", peer=False, bits=4, kl=0.3, log_p=-2.0), nll=[1.0, 2.0])
    (wanted,) = rows([first, second], 2)
    longer = totals(rows([first, replace(second, text="u")], 2))
    assert [(row["text"], row["context"]) for row in longer] == [(ALL, 64), (ALL, 0)]
    for row in longer:
        assert row | {"text": "t", "context": 64} == wanted
    untimed = rows([replace(second, text="u")]) + rows([first], 2)
    (total, _) = totals(untimed)
    assert untimed[0]["encode_s"] is untimed[0]["timed_threads"] is None
    assert (total["encode_s"], total["timed_threads"]) == (1.0, 2)


def test_parts_of_the_run_plant_the_facts_of_the_whole(model: Model) -> None:
    texts = [Text(name, "A sentence of some words. " * 700, planted=True) for name in "abc"]

    def questions(arguments: str) -> dict[tuple[str, int], object]:
        options = bench_codec.parse(arguments.split())
        contexts, _ = bench_codec.plan(model, texts, options)
        return {(c.text, len(c.prompt)): c.questions for c in contexts}

    whole, part = questions(""), questions("--texts c")
    assert set(part) == {("c", 1536)}
    assert part.items() < whole.items()
    assert len({str(q) for q in whole.values()}) == 3


def test_a_single_context_has_the_error_of_its_tokens() -> None:
    one = replace(sample("a", peer=False, bits=2, kl=0.1, log_p=-1.5), kl=[0.1, 0.2, 0.6])
    row: dict[str, Any] = rows([one])[0]
    assert row["kl_se"] == pytest.approx((0.14 / 2 / 3) ** 0.5, abs=1e-6)
    assert row["recall_se"] == 0  # of one fact nothing is known


def test_a_peer_beats_ours_only_at_no_larger_size() -> None:
    ours = sample("ours", peer=False, bits=3, kl=0.2, log_p=-1.5)
    larger = sample("larger", peer=True, bits=4, kl=0.1, log_p=-1.0)
    better = sample("better", peer=True, bits=3, kl=0.1, log_p=-2.0)
    found = rows([ours, larger, better])
    (sentence,) = beaten_by(found)
    assert sentence.startswith("better beats ours on t at 64: kl 0.1")


def test_schemes_are_chosen_by_name_and_an_unknown_one_is_named() -> None:
    schemes = every_scheme()
    assert [s.name for s in choose(schemes, ["fp8", "exact"])] == ["fp8", "exact"]
    assert choose(schemes, []) == schemes
    with pytest.raises(ValueError, match="no scheme nothing; there are exact, fallback"):
        choose(schemes, ["nothing"])


def test_only_the_whole_run_and_parts_of_it_are_saved_and_say_which_schemes_they_have_not() -> None:
    for options in ("--quick", "--context 64", "--segments 2", "--text a.md", "--seed 1"):
        assert bench_codec.parse(options.split()).no_save, options
    for options in ("--untimed --repeats 3", "--context 1536 --texts source", "--context 4096"):
        assert not bench_codec.parse(options.split()).no_save, options
    options = bench_codec.parse(["--json", "--schemes", "fallback,fp8"])
    assert not options.no_save
    chosen, missing = bench_codec.schemes_here(options, None)
    assert [scheme.name for scheme in chosen] == ["fallback", "fp8"]
    assert missing["kivi-2"] == "not asked for"
    assert not {"fallback", "fp8"} & set(missing)


def test_lengths_that_nobody_asked_for_are_measured_with_few_peers(context: Context) -> None:
    chosen, _ = bench_codec.schemes_here(bench_codec.parse([]), None)

    def measured(*arguments: str) -> set[str]:
        ((_, schemes),) = bench_codec.jobs_of([context], chosen, bench_codec.parse(arguments))
        return {scheme.name for scheme in schemes}

    every = {scheme.name for scheme in chosen}
    assert measured("--context", "1024") == every
    ours = {scheme.name for scheme in chosen if not scheme.peer}
    assert measured() == ours | {*bench_codec.FEW_PEERS} < every


def test_a_scheme_that_was_not_measured_everywhere_has_no_row_over_all_lengths(
    prompt: Prefilled, context: Context
) -> None:
    reference = refer(prompt, context)
    one, other = (measure(s, prompt, context, reference) for s in every_scheme()[:2])
    found = totals(rows([one, other, replace(one, num_prompt=2048)]))
    assert {row["scheme"] for row in found if row["context"] == 0} == {one.scheme}
    assert {row["scheme"] for row in found if row["context"] == 1024} == {one.scheme, other.scheme}


def test_schemes_are_stored_once_before_they_are_timed(model: Model, context: Context) -> None:
    lengths = []

    class Counting(PeerScheme):
        def store(self, prompt: Prefilled) -> Stored:
            lengths.append(len(prompt.ids))
            return super().store(prompt)

    scheme = Counting("fp8", paper_peers(0)["fp8"])
    assert len(list(bench_codec.run(model, [(context, [scheme])], 0, quiet=True))) == 1
    assert lengths == [128, 1024]
