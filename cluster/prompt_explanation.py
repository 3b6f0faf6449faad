"""Why a prompt hits or misses: the gateway knows its tokens and scopes, the store its blocks."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from kvstrata.cluster.admission import Admission
from kvstrata.cluster.router import cache_scope
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.methods.presets import PRESETS
from kvstrata.prefill_node.prefill import num_prompt_blocks
from kvstrata.prefill_node.task import Task
from kvstrata.protos.admin_pb2 import ExplainReply, ExplainRequest
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.identity import BLOCK_TOKENS, ScopeDigest, block_hashes
from kvstrata.protos.inference_pb2 import GenerateRequest

AskStore = Callable[[ExplainRequest], Awaitable[ExplainReply]]


async def explain_prompt(
    admission: Admission, asked: GenerateRequest, tenant: Tenant, ask_store: AskStore
) -> ExplainReply:
    """Return what the store says of a prompt's blocks, and how much other presets have of it.

    Args:
        admission: Knows tokenizer and model.
        asked: The prompt and its method, as ``Generate`` takes them.
        tenant: Whose prompt it is.
        ask_store: Sends the store one question.
    """
    task = await asyncio.to_thread(admission.admit, asked, None)
    task = replace(task, salt=tenant.scope_salt(task.salt))
    scope = cache_scope(task, admission.info).digest()
    first = list(task.prompt_ids[:BLOCK_TOKENS]) if _num_shareable(task) else []
    reply = await ask_store(_question(task, scope, first))
    reply.prompt_tokens = len(task.prompt_ids)
    reply.scope = scope
    reply.preset = asked.preset
    reply.codec = f"{task.method.codec.name}/{task.method.codec.version}"
    reply.settings = task.method.codec.settings()
    reply.kv_dtype = admission.info.kv_dtype
    seen = {scope}
    for preset in PRESETS:
        try:
            other = replace(task, method=admission.preset(preset))
        except KVStrataError:
            continue  # not for this model
        other_scope = cache_scope(other, admission.info).digest()
        if other_scope not in seen:
            seen.add(other_scope)
            found = await ask_store(_question(other, other_scope, []))
            if found.run:
                told = next((o for o in reply.others if o.scope == other_scope), None)
                told = told or reply.others.add(scope=other_scope)
                told.preset, told.run = preset, found.run
    return reply


def _question(task: Task, scope: ScopeDigest, first_tokens: list[int]) -> ExplainRequest:
    hashes = block_hashes(scope, task.prompt_ids[: _num_shareable(task)])
    return ExplainRequest(
        scope=scope, block_hashes=b"".join(hashes), token_ids=first_tokens, own_keys=True
    )


def _num_shareable(task: Task) -> int:
    return num_prompt_blocks(len(task.prompt_ids), task.method) * BLOCK_TOKENS
