"""GGUF files, converted once to safetensors in the cache folder.

Transformers takes about 25 s to read the tokenizer and dequantise the weights of SmolLM2-135M; the
converted folder loads in under 2 s. Its name holds the file's SHA-256, the transformers version and
the dtype, so it is never stale. The tokenizer is converted too, and for the same reason only read
by the version that wrote it: another version may pick a class that maps every space to id 0.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from kvstrata.engine.fingerprint import hash_file
from kvstrata.engine.storage import build_folder, cache_folder


def converted_folder(gguf: Path, dtype: torch.dtype) -> Path:
    """Return where the converted form of ``gguf`` is or would be."""
    name = f"{hash_file(gguf)[:32]}-tf{transformers.__version__}-{str(dtype).split('.')[-1]}"
    return cache_folder() / "models" / name


def convert(gguf: Path, dtype: torch.dtype) -> bool:
    """Write model and tokenizer of ``gguf`` to its ``converted_folder``; slow.

    Args:
        gguf: An existing GGUF file.
        dtype: Of the converted weights.

    Returns:
        Whether the folder exists now, complete; False if the cache folder cannot be written.
    """

    def fill(temporary: Path) -> None:
        read_tokenizer(gguf).save_pretrained(temporary)
        _plain(read_model(gguf, dtype)).save_pretrained(temporary)

    return build_folder(converted_folder(gguf, dtype), fill)


def read_model(gguf: Path, dtype: torch.dtype) -> Any:
    """Return the model of ``gguf``, dequantised to ``dtype``; slow."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=dtype, local_files_only=True
    )


def read_config(gguf: Path) -> Any:
    """Return the config of ``gguf``."""
    return transformers.AutoConfig.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )


def read_tokenizer(gguf: Path) -> Any:
    """Return the tokenizer of ``gguf``; slow."""
    return transformers.AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, local_files_only=True
    )


def _plain(model: Any) -> Any:
    """Return the same weights in a model that does not remember the GGUF file.

    Transformers refuses to save a model marked as quantised, though these weights no longer are.
    """
    config = type(model.config)(**_without_quantization(model.config.to_dict()))
    with torch.device("meta"):
        plain: Any = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}
