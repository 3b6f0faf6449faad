"""vLLM's engine on CPU, as ``ttft_vllm.py`` runs it.

    .venv-vllm/bin/python peer_vllm.py '{"model": FOLDER, "dtype": "bfloat16", "lmcache_port": 0}'

Answers ``{"op": "ttft", "prompt": [...]}`` with seconds, cached tokens and the first token, and
``{"op": "decode", "prompt": [...], "batch": 8, "tokens": 33}`` with the times of steps. With the
port of an LMCache server, KV comes from there and vLLM's own prefix cache is off. On CPU its blocks
are 128 tokens, so a hit of its own cache computes up to 128 tokens of the prompt again.
"""

import json
import os
import sys
import time
from typing import Any

SETTINGS = json.loads(sys.argv[1])
CORES = os.cpu_count() or 1
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="3",
    VLLM_CPU_OMP_THREADS_BIND=f"0-{CORES - 1}",
    VLLM_CPU_NUM_OF_RESERVED_CPU="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_HOST_IP="127.0.0.1",
    GLOO_SOCKET_IFNAME="lo",
    HF_HUB_OFFLINE="1",
    LMCACHE_TRACK_USAGE="false",
    LMCACHE_LOG_LEVEL="WARNING",
)
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402


def answer(**found: Any) -> None:
    print(json.dumps(found), file=ANSWERS, flush=True)


def engine() -> Any:
    options: dict[str, Any] = {"enable_prefix_caching": True}
    if port := SETTINGS["lmcache_port"]:
        options = {
            "enable_prefix_caching": False,
            "disable_hybrid_kv_cache_manager": True,
            "kv_transfer_config": KVTransferConfig(
                kv_connector="LMCacheMPConnector",
                kv_role="kv_both",
                kv_connector_extra_config={
                    "lmcache.mp.host": "tcp://127.0.0.1",
                    "lmcache.mp.port": port,
                },
            ),
        }
    return LLM(
        model=SETTINGS["model"],
        dtype=SETTINGS["dtype"],
        max_model_len=8192,
        max_num_seqs=16,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        disable_log_stats=True,
        seed=0,
        **options,
    )


def sampling(tokens: int) -> Any:
    return SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0, ignore_eos=True)


def ttft(llm: Any, task: dict[str, Any]) -> dict[str, Any]:
    prompt = [{"prompt_token_ids": task["prompt"]}]
    start = time.perf_counter()
    done = llm.generate(prompt, sampling(1), use_tqdm=False)[0]
    seconds = time.perf_counter() - start
    cached = getattr(done, "num_cached_tokens", None) or 0
    return {"seconds": seconds, "cached": cached, "token": done.outputs[0].token_ids[0]}


def settle(llm: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Let a connector finish what it does between steps: its stores are asynchronous."""
    for number in range(task["steps"]):
        time.sleep(0.1)
        llm.generate([{"prompt_token_ids": [1, 2, 3 + number]}], sampling(1), use_tqdm=False)
    return {}


def decode(llm: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Time the steps in which all requests generate, as ``generate`` of ours and transformers'."""
    core, steps, seen = llm.llm_engine, [], set()
    prompt = {"prompt_token_ids": task["prompt"]}
    llm.generate([prompt], sampling(1), use_tqdm=False)  # the prompt is cached from here on
    for number in range(task["batch"]):
        core.add_request(f"{time.time()}-{number}", prompt, sampling(task["tokens"]))
    while core.has_unfinished_requests():
        outputs = core.step()
        seen |= {output.request_id for output in outputs}
        if len(seen) == task["batch"]:
            steps.append(time.perf_counter())
    return {"steps": steps}


OPS = {"ttft": ttft, "settle": settle, "decode": decode}


def main() -> None:
    llm = engine()
    llm.generate([{"prompt_token_ids": list(range(3, 600))}], sampling(2), use_tqdm=False)
    answer(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        answer(**OPS[task["op"]](llm, task))
    os._exit(0)


if __name__ == "__main__":
    main()
