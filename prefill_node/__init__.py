"""The prefill worker, and the steps from tokens to published blocks that decode workers share."""

from kvstrata.prefill_node.node import PrefillNode
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker, WorkerConfig, WorkerInfo

__all__ = ["PrefillNode", "Task", "Worker", "WorkerConfig", "WorkerInfo"]
