"""One trace from the client's call to the store's reads, over real connections."""

from kvstrata.client import AsyncClient
from tests.cluster.local_workers import Cluster
from tests.prefill_node.nodes import prompt_of
from tests.spans import Recorder, recorder

__all__ = ["recorder"]

PROMPT = prompt_of(400)  # long enough for a prefill node


async def test_a_cold_and_a_warm_request_are_one_trace_each(
    recorder: Recorder, cluster: Cluster
) -> None:
    async with AsyncClient(cluster.server.address) as client:
        await client.generate(PROMPT, max_tokens=4)
        (cold,) = recorder.tree().values()
        assert set(recorder.tree()) == {"client.generate"}
        request = cold["Inference/Generate"]
        assert set(request) == {"gateway.route", "gateway.prefill", "gateway.decode"}
        assert set(request["gateway.route"]) == {"KVStore/Lookup"}
        prefill = request["gateway.prefill"]["prefill"]
        assert {"prefill.prefill", "prefill.compress", "prefill.ship"} <= set(prefill)
        assert set(prefill["prefill.ship"]) <= {"KVStore/Put", "KVStore/Write"}
        decode = request["gateway.decode"]["decode"]
        assert {"decode.fetch", "decode.decompress", "decode.decode"} <= set(decode)
        assert "KVStore/Get" in decode["decode.fetch"] or "KVStore/Attach" in decode["decode.fetch"]
        assert recorder.num_traces() == 1
        await client.generate(PROMPT, max_tokens=4)
    assert recorder.num_traces() == 2
    ids = {
        span.attributes["kvstrata.request_id"]
        for span in recorder.finished()
        if span.attributes and "kvstrata.request_id" in span.attributes
    }
    assert len(ids) == 2
    finished = recorder.spans("client.generate")
    cached = [span.attributes["kvstrata.cached_tokens"] for span in finished if span.attributes]
    assert cached == [0, 384]
    told = "".join(span.to_json() for span in recorder.finished())
    assert str(list(PROMPT[:8]))[1:-1] not in told
    assert "tenant" in told


async def test_the_store_logs_and_traces_under_the_gateways_request(
    recorder: Recorder, cluster: Cluster
) -> None:
    async with AsyncClient(cluster.server.address) as client:
        await client.generate(PROMPT[:80], max_tokens=1)
    server = recorder.span("Inference/Generate")
    lookup = recorder.span("KVStore/Lookup")
    assert server.context.trace_id == lookup.context.trace_id
    assert lookup.attributes is not None
    request_id = lookup.attributes["kvstrata.request_id"]
    decode = recorder.span("decode")
    assert decode.attributes is not None
    assert decode.attributes["kvstrata.request_id"] == request_id
