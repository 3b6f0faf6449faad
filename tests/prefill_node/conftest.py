"""The fixtures of ``nodes``."""

from tests.prefill_node.nodes import config, load_once, model, model_folder

__all__ = ["config", "load_once", "model", "model_folder"]
