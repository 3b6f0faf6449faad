"""Loading a model once in the process that starts the workers: bad models are told here."""

from kvstrata.engine.errors import ModelNotFoundError, UnsupportedModelError
from kvstrata.engine.model import Model
from kvstrata.methods.gate_weights import GateError
from kvstrata.methods.profile import ProfileError
from kvstrata.protos.errors import ConfigurationError, UnknownModelError


def load_model(source: str | None, dtype: str, adapter: str | None = None) -> Model:
    """Return a model, for its tokenizer and fingerprint; a GGUF is converted on the way.

    Raises:
        UnknownModelError: Nothing at ``source`` or ``adapter``.
        ConfigurationError: The model cannot be served, or ``dtype`` is none.
    """
    try:
        return Model.load(source, adapter=adapter, dtype=dtype)
    except ModelNotFoundError as error:
        remedy = "give --model a folder or a hub id, --adapter what `kvstrata tune` made"
        raise UnknownModelError(str(error), remedy) from error
    except (UnsupportedModelError, ValueError) as error:
        raise ConfigurationError(str(error), "choose another model or dtype") from error


def load_served_model(source: str | None, dtype: str, adapter: str | None = None) -> Model:
    """Return a model whose profile and gates, if it has some, can be used and are known here.

    Raises:
        UnknownModelError: Nothing at ``source`` or ``adapter``.
        ConfigurationError: As of ``load_model``, or profile or gates are damaged.
    """
    model = load_model(source, dtype, adapter)
    try:
        _ = model.profile
    except ProfileError as error:
        raise ConfigurationError(str(error), "remove it, or run `kvstrata calibrate`") from error
    try:
        _ = model.gates
    except GateError as error:
        raise ConfigurationError(str(error), "remove them, or run `kvstrata tune gate`") from error
    return model
