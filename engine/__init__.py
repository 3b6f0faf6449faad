"""The model side of KVStrata: load a transformers model, run it over a KV cache of our own.

Start with ``Model.load()``; ``model.py`` is the file to read first.
"""

from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.chat import encode_text, render_chat
from kvstrata.engine.detokenizer import Detokenizer
from kvstrata.engine.errors import ModelNotFoundError, UnsupportedModelError
from kvstrata.engine.model import Model
from kvstrata.engine.sampling import SamplingParams, sample
from kvstrata.engine.spec import KVSpec

__all__ = [
    "Detokenizer",
    "KVSpec",
    "Model",
    "ModelNotFoundError",
    "SamplingParams",
    "SequenceCache",
    "UnsupportedModelError",
    "encode_text",
    "render_chat",
    "sample",
]
