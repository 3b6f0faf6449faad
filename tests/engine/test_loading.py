"""Which models load, which are refused by name, and what identifies them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from kvstrata.engine import Model, ModelNotFoundError, UnsupportedModelError
from kvstrata.engine.compatibility import check_config
from kvstrata.engine.fingerprint import compute_fingerprint, hash_file
from kvstrata.engine.loading import check_round_trip, load_pretrained
from kvstrata.engine.storage import build_folder
from tests.engine.families import FAMILIES

_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

REFUSED = {
    "sliding window of 4096": lambda: transformers.MistralConfig(),
    "holds sliding_attention": lambda: transformers.Qwen2Config(
        use_sliding_window=True, max_window_layers=2
    ),
    "attn_logit_softcapping": lambda: transformers.Gemma2Config(),
    r"recurrent .*mamba": lambda: transformers.JambaConfig(),
    "recurrent": lambda: transformers.MambaConfig(),
    "encoder-decoder": lambda: transformers.T5Config(),
    "latent attention": lambda: transformers.DeepseekV3Config(),
    "attention sinks": lambda: transformers.GptOssConfig(),
    "ALiBi": lambda: transformers.BloomConfig(),
    "'dynamic' changes its frequencies": lambda: transformers.LlamaConfig(rope_parameters=_DYNAMIC),
    "partial rotary": lambda: transformers.LlamaConfig(rope_parameters=_PARTIAL),
    "'gpt2'.*not verified": lambda: transformers.GPT2Config(),
    "quantised": lambda: transformers.LlamaConfig(quantization_config={"quant_method": "awq"}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_be_served_are_refused_by_name(reason: str) -> None:
    config = REFUSED[reason]()
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        check_config(config, "some/model")
    assert "some/model" in str(refusal.value)
    assert repr(config.model_type) in str(refusal.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_verified_families_are_accepted(family: str) -> None:
    check_config(FAMILIES[family](), family)


def test_a_refused_model_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.Gemma2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="gemma2"):
        Model.load(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "novel"}, "does not know it"), ({}, "names no model_type")],
)
def test_unknown_configs_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Model.load(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("nowhere", "no such folder"),
        ("/no/such/model.gguf", "no such file"),
        ("./here", "no such folder"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        Model.load(source)


def test_a_hub_id_that_cannot_be_fetched_names_the_remedy(tmp_path: Path) -> None:
    code = (
        "from kvstrata.engine import Model, ModelNotFoundError\n"
        "try: Model.load('nobody/no-such-model')\n"
        "except ModelNotFoundError as error: assert 'HF_HUB_OFFLINE' in str(error), error\n"
        "else: raise SystemExit('loaded')\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=240)


def test_an_empty_folder_and_missing_weights_are_named(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config.json and 0 GGUF"):
        Model.load(str(tmp_path))
    copy = shutil.copytree(model_folders["llama"], tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="cannot load weights"):
        Model.load(str(copy))


def test_a_folder_with_an_adapter_is_refused(
    tmp_path: Path, model_folders: dict[str, Path]
) -> None:
    copy = shutil.copytree(model_folders["llama"], tmp_path / "copy")
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="adapter"):
        Model.load(str(copy))


def test_the_fingerprint_follows_weights_config_and_dtype_but_not_the_path(
    tmp_path: Path, model_folders: dict[str, Path], models: dict[str, Model]
) -> None:
    original = models["llama"].fingerprint
    assert len(original) == 16
    copy = shutil.copytree(model_folders["llama"], tmp_path / "copy")
    assert load_pretrained(str(copy), torch.float32)[2] == original
    assert load_pretrained(str(copy), torch.bfloat16)[2] != original
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20000.0
    (copy / "config.json").write_text(json.dumps(config))
    assert load_pretrained(str(copy), torch.float32)[2] != original
    fingerprints = {model.fingerprint for model in models.values()}
    assert len(fingerprints) == len(models)


def test_the_fingerprint_of_known_bytes_never_changes(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    rope = {"rope_type": "default", "rope_theta": 10000}
    config = SimpleNamespace(model_type="llama", rms_norm_eps=1e-6, rope_parameters=rope)
    fingerprint = compute_fingerprint([weights], config, torch.float32)
    config.rope_parameters = {"partial_rotary_factor": 1.0, "factor": None} | rope
    assert compute_fingerprint([weights], config, torch.float32) == fingerprint
    assert fingerprint.hex() == "227c1c7bbc08f1e7494daacbc37cf441"


def test_a_changed_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = hash_file(file)
    assert hash_file(file) == first
    file.write_bytes(b"three")
    assert hash_file(file) != first


def test_an_unwritable_cache_folder_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVSTRATA_CACHE", str(tmp_path / "file" / "cache"))
    assert len(hash_file(tmp_path / "file")) == 64
    assert not build_folder(tmp_path / "file" / "cache" / "model", lambda folder: None)


def test_a_folder_is_visible_only_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "models" / "one"

    def fill(folder: Path) -> None:
        assert not target.exists()
        (folder / "weights").write_text("ours")

    assert build_folder(target, fill)
    assert [p.name for p in target.parent.iterdir()] == ["one"]

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_folder(tmp_path / "models" / "two", fail)
    assert [p.name for p in target.parent.iterdir()] == ["one"]


def test_a_tokenizer_that_loses_spaces_is_refused(smollm2: Model) -> None:
    check_round_trip(smollm2.tokenizer, "smollm2")

    class LosesSpaces:
        def encode(self, text: str, **_: Any) -> list[int]:
            return [ord(c) for c in text if c != " "]

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    with pytest.raises(UnsupportedModelError, match="LosesSpaces"):
        check_round_trip(LosesSpaces(), "some/model")


def test_the_default_model_has_the_expected_spec(smollm2: Model) -> None:
    spec = smollm2.spec
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.rope, spec.max_positions, spec.vocab_size) == ("pre", 8192, 49152)
    assert spec.eos_token_ids == {2}
    assert spec.kv_bytes_per_token_bf16 == 23040
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1"


def test_bfloat16_loads_and_runs(model_folders: dict[str, Path]) -> None:
    model = Model.load(str(model_folders["qwen2"]), dtype="bfloat16", device="cpu")
    cache = model.new_cache(8)
    assert model.forward(cache, [5, 6, 7]).dtype == torch.float32
    assert cache.keys.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        Model.load(str(model_folders["qwen2"]), dtype="int8")
