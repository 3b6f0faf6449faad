"""Low-rank adapters (LoRA): made for tuning, saved, and merged into a model's weights at load.

The folder of an adapter is what peft writes: ``adapter_config.json`` and
``adapter_model.safetensors``. Others, which hold pickles, are refused.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from kvstrata.engine.errors import ModelNotFoundError, UnsupportedModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NEEDS_PEFT = "adapters need peft: pip install 'kvstrata[tune]'"


def adapter_files(folder: str) -> list[Path]:
    """Return the files that make an adapter what it is, in a fixed order.

    Raises:
        ModelNotFoundError: The folder holds none.
        UnsupportedModelError: It is not a LoRA.
    """
    files = [Path(folder).expanduser() / name for name in (CONFIG, WEIGHTS)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelNotFoundError(
            f"{folder}: no adapter, {' and '.join(missing)} missing; name the folder that "
            "`kvstrata tune` wrote"
        )
    try:
        kind = json.loads(files[0].read_text())["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(f"{folder}: its {CONFIG} is damaged: {error}") from error
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder}: an adapter of type {kind!r}; only LORA is merged")
    return files


def merge_adapter(hf_model: Any, folder: str) -> Any:
    """Return the model with the adapter's weights added to its own.

    Raises:
        ModelNotFoundError: As for ``adapter_files``.
        UnsupportedModelError: Not a LoRA, of another model, or peft is not installed.
    """
    adapter_files(folder)
    peft = _peft()
    path = str(Path(folder).expanduser())
    try:
        with _unwarned():
            adapted = peft.PeftModel.from_pretrained(hf_model, path)
        return adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModelError(f"{folder}: does not fit this model: {error}"[:500]) from error


def add_adapter(hf_model: Any, rank: int) -> Any:
    """Return the model with a new adapter on every linear layer but the head; changes nothing yet.

    Args:
        hf_model: A transformers model; its own weights stay frozen.
        rank: Of the updates.

    Raises:
        UnsupportedModelError: peft is not installed.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear"
    )
    with _unwarned():
        return peft.get_peft_model(hf_model, config)


def adapter_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    """Return what training changes, by name."""
    return {name: p for name, p in peft_model.named_parameters() if p.requires_grad}


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write the adapter as bfloat16, without the path of the model that it is for."""
    state = {
        name: value.to(torch.bfloat16)
        for name, value in _peft().get_peft_model_state_dict(peft_model).items()
    }
    peft_model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": None}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def without_adapter(peft_model: Any) -> Iterator[None]:
    """Let the model be what it was before, for a while; nothing to do for one without adapter."""
    disabled = getattr(peft_model, "disable_adapter", nullcontext)
    with disabled():
        yield


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep quiet that peft asks transformers by a name that is going out of use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UnsupportedModelError(_NEEDS_PEFT) from error
    return peft
