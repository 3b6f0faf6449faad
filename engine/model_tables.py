"""The tables that methods need of a model, from the package or this machine's folder."""

import logging

from kvstrata.engine.spec import KVSpec
from kvstrata.engine.storage import profile_folder
from kvstrata.methods.gate_weights import GATES, GateError, GateWeights
from kvstrata.methods.presets import PREDICTED_PRESET_BITS
from kvstrata.methods.profile import PROFILES, Profile, ProfileError

logger = logging.getLogger(__name__)


def profile_of(model_id: bytes, spec: KVSpec, name: str) -> Profile | None:
    """Return the model's calibrated profile, or None.

    Args:
        model_id: Of its weights and config.
        spec: Its sizes.
        name: For messages.

    Raises:
        ProfileError: The file is damaged, or of another shape.
    """
    PROFILES.add_folder(profile_folder())
    found = PROFILES.of_model(model_id)
    if found is None:
        logger.warning(
            "no profile: lossy presets use the fallback codec; run `kvstrata calibrate`",
            extra={"model": name},
        )
    elif found.shape[1:] != (spec.num_kv_heads, spec.head_dim) or (
        found.shape[0] + found.first_layer != spec.num_layers
    ):
        raise ProfileError(f"the profile of {name} is of another shape")
    elif found.prediction is None:
        logger.warning(
            "the profile cannot predict: %s use the calibrated codec, at more bytes; "
            "run `kvstrata calibrate --extend`",
            " and ".join(sorted(PREDICTED_PRESET_BITS)),
            extra={"model": name},
        )
    return found


def gates_of(model_id: bytes, spec: KVSpec, width: int, name: str) -> GateWeights | None:
    """Return the model's trained gates, or None; arguments as for ``profile_of``.

    Raises:
        GateError: The file is damaged, or of another shape.
    """
    GATES.add_folder(profile_folder())
    found = GATES.of_model(model_id)
    if found is not None and found.shape != (spec.num_layers, spec.num_kv_heads, width):
        raise GateError(f"the gates of {name} are of another shape")
    return found
