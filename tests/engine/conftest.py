"""Shared models: tiny ones saved in a temporary folder, and SmolLM2, converted once per machine."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from kvstrata.engine import Model
from tests.engine.families import FAMILIES, build_reference


def build_tokenizer() -> Any:
    """Return a byte-level tokenizer, so that any text round-trips; larger than the tiny vocab."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a tiny saved model per family."""
    folders = {}
    for name, make_config in FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        build_reference(make_config()).save_pretrained(folders[name])
        build_tokenizer().save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def models(model_folders: dict[str, Path]) -> dict[str, Model]:
    """The tiny models, loaded by the engine."""
    return {
        name: Model.load(str(folder), dtype=torch.float32, device="cpu")
        for name, folder in model_folders.items()
    }


@pytest.fixture(scope="session")
def references(model_folders: dict[str, Path]) -> dict[str, Any]:
    """The same weights with transformers' own attention."""
    return {
        name: transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )
        for name, folder in model_folders.items()
    }


@pytest.fixture(scope="session")
def smollm2() -> Model:
    """The default model. `make install` installs it; without it the tests fail, and say so."""
    return Model.load(dtype=torch.float32, device="cpu")
