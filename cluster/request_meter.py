"""What a gateway counts of its requests: tokens, bytes, and how long they took."""

import time

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.counters import Counters
from kvstrata.protos.inference_pb2 import CacheReport


class RequestMeter:
    """Times of one request, from its arrival on.

    Attributes:
        cached: How much of the prompt's blocks the store had: "all", "some" or "none".
        num_tokens: Tokens delivered.
    """

    def __init__(self, counters: Counters) -> None:
        self.cached = "none"
        self.num_tokens = 0
        self._counters = counters
        self._begin_s = time.perf_counter()
        self._first_s = self._last_s = 0.0

    def found(self, cached_blocks: int, num_blocks: int) -> None:
        """Note how many of the prompt's full blocks are cached."""
        self.cached = "all" if cached_blocks == num_blocks else "some" if cached_blocks else "none"

    def delivered(self, num_tokens: int) -> None:
        """Count tokens that go to the client now."""
        if not num_tokens:
            return
        self._last_s = time.perf_counter()
        if not self.num_tokens:
            self._first_s = self._last_s
            ttft_s = self._first_s - self._begin_s
            self._counters.observe(names.TTFT_SECONDS, ttft_s, cached=self.cached)
        self.num_tokens += num_tokens

    def end(self, outcome: str) -> None:
        """Count the request."""
        self._counters.add(names.REQUESTS, outcome=outcome)
        self._counters.add(names.GENERATED_TOKENS, self.num_tokens)
        if self.num_tokens > 1:
            mean_s = (self._last_s - self._first_s) / (self.num_tokens - 1)
            self._counters.observe(names.TPOT_SECONDS, mean_s)


def count_report(counters: Counters, report: CacheReport) -> None:
    """Count what a request's report tells, once."""
    counters.add(names.PROMPT_TOKENS, report.prompt_tokens)
    counters.add(names.CACHED_TOKENS, report.cached_tokens)
    theirs = report.coalesced_tokens
    counters.add(names.COALESCED_TOKENS, theirs)
    counters.add(names.COALESCED_REQUESTS, int(theirs > 0))
    counters.add(names.COMPUTED_TOKENS, report.prompt_tokens - report.cached_tokens - theirs)
    counters.add(names.FETCHED_BYTES, report.bytes_fetched)
    counters.add(names.PUBLISHED_BYTES, report.bytes_published)
    counters.add(names.COMMITTED_BLOCKS, report.committed_blocks)
    counters.add(names.REPLAYS, report.replays)
    for recompute in report.recomputes:
        counters.add(names.RECOMPUTES, reason=recompute.reason)
        counters.add(names.RECOMPUTED_TOKENS, recompute.tokens, reason=recompute.reason)
    for stage in report.stages:
        counters.observe(names.STAGE_SECONDS, stage.seconds, node=stage.node, stage=stage.stage)
    counters.add(names.LAYER_EXECUTIONS, report.layer_executions)
    for plan in report.read_plans:
        counters.add(names.READ_PLANS, node=plan.node, choice=plan.choice)
        counters.add(names.REFINED_BLOCKS, plan.refined_blocks)
        if plan.predicted_s and plan.seconds:
            ratio = plan.predicted_s / plan.seconds
            counters.observe(names.READ_PLAN_RATIO, ratio, node=plan.node, choice=plan.choice)
