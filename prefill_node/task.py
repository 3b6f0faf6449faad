"""What the gateway asks of a node."""

import math
import time
from dataclasses import dataclass, field

from kvstrata.engine.images import Image
from kvstrata.engine.sampling import SamplingParams
from kvstrata.methods.presets import Method
from kvstrata.prefill_node.read_plan import StoredBlock
from kvstrata.protos.errors import DeadlineError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.retention import Retention


@dataclass(frozen=True, slots=True)
class Task:
    """One request, or what is left of it after a worker died.

    Attributes:
        request_id: For logs.
        prompt_ids: The prompt.
        method: What happens to its KV.
        sampling: How to go on; unused by a prefill node.
        session_id: The conversation's name, for logs; never part of identity.
        tenant: Whose turn is counted, among those that wait for this node.
        salt: The tenant's secret part of the cache scope.
        expected_blocks: Blocks that are in the store by all the gateway knows; a miss among them is
            counted with its reason, computing the others is plain work.
        stored: These blocks, as far as more is known of them.
        ask_store: False when the gateway found the store unreachable: do not wait for it again.
        generated_ids: Tokens already delivered; they are replayed, not delivered again.
        deadline_unix_s: Wall-clock time after which nobody waits for the answer.
        traceparent: The span that this is part of; empty where tracing is off.
        images: Those that the prompt's tokens stand for, each once.
        coarsest: The coarsest stratum that may be read alone where more would be late; None reads
            what the method says, however long it takes.
        retention: How dear prompt and answer are to their session; None for no hint.
        first_token_unix_s: Wall-clock time until which the first token is wanted.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    method: Method
    sampling: SamplingParams
    deadline_unix_s: float
    session_id: str = ""
    tenant: str = ""
    salt: bytes = field(default=b"", repr=False)
    expected_blocks: int = 0
    stored: tuple[StoredBlock, ...] = ()
    ask_store: bool = True
    generated_ids: tuple[int, ...] = ()
    traceparent: str = ""
    images: tuple[Image, ...] = field(default=(), repr=False)
    coarsest: Stratum | None = None
    retention: Retention | None = None
    first_token_unix_s: float = math.inf

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline.

        Raises:
            DeadlineError: It is over.
        """
        remaining = self.deadline_unix_s - time.time()
        if remaining <= 0:
            raise DeadlineError(
                "the request's deadline is over", "raise the timeout or ask for fewer tokens"
            )
        return remaining
