"""The static tables of one model that the calibrated codec needs: a profile, one file.

A profile is made once by ``kvstrata calibrate`` and named by the hash of its numbers, which goes
into the cache scope: blocks of another profile are never read with it. Profiles are looked for
among those that come with the package, then in the cache folder.

Legend: L stored layers, H KV heads, D head_dim.

Source:
    Water-filling over a Fisher-weighted transform: docs in ``profile_fit.py``.
"""

import hashlib
import io
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kvstrata.methods.table_store import TableStore

PROFILE_VERSION = 1  # without tables for predicting
PREDICTING_VERSION = 2
PROFILE_ID_BYTES = 16
MAX_PROFILE_BYTES = 1 << 30
SHIPPED = Path(__file__).parent / "profiles"
SUFFIX = ".profile.npz"
KEY_FORMS = ("pre", "frame")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What reading a damaged or hostile file of arrays raises.
_DAMAGED = (
    OSError, ValueError, TypeError, OverflowError,  # any parser
    EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,  # zipfile: cut, encrypted, inflating
    SyntaxError, MemoryError, tokenize.TokenError,  # numpy: a header is a Python literal
)  # fmt: skip


class ProfileError(ValueError):
    """A file that is no profile, or one that does not fit the model."""


@dataclass(frozen=True, slots=True, eq=False)
class SideTables:
    """The transform of K or of V.

    ``x = y @ basis + mean`` per layer and head, where the components y have unit variance.

    Attributes:
        mean: float32 (L, H, D).
        basis: float16 (L, H, D, D); row c is what one unit of component c adds to x.
        variance: float32 (L, H, D), descending: what leaving a component out costs, in nats per
            token of context and 256 tokens of continuation; one scale for the whole model.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variance: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What the predicted codec needs beside a profile's other tables; see ``prediction.py``.

    C = 2 H D are the channels of a layer: V's heads, then K's before RoPE.

    Attributes:
        across: float16 (L, C, C): from the layer before, rows, to this one, columns.
        within: float16 (L, C, C): inside the layer; zeros but where the row's head precedes the
            column's.
        keys: The transform of what is left of K; its mean completes the prediction.
        values: The same of V.
        rates: As in ``Profile``, of the predicted codec.
    """

    across: torch.Tensor
    within: torch.Tensor
    keys: SideTables
    values: SideTables
    rates: np.ndarray


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything static that the calibrated codec knows of a model.

    Attributes:
        model_id: Of the weights and config, dtype left out.
        keys: By form: ``"pre"`` for keys before RoPE, ``"frame"`` for keys rotated by their offset
            in the block; only ``"pre"`` for models that do not rotate keys.
        values: The transform of V.
        first_layer: Layers before it are not stored.
        rates: float64 (R, 3), ascending in the first column: threshold, bits per element (all
            stored bytes counted), mean KL divergence in nats, as measured on calibration text.
        note: For people: the model's name and what it was calibrated on.
        prediction: None if the predicted codec cannot be used.
    """

    model_id: bytes
    keys: Mapping[str, SideTables]
    values: SideTables
    first_layer: int
    rates: np.ndarray
    note: str = ""
    prediction: Prediction | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (L, H, D)."""
        layers, heads, dim = self.values.mean.shape
        return layers, heads, dim

    @cached_property
    def profile_id(self) -> str:
        """Return the hash of all numbers, in hex; the note does not count."""
        return _hash(self.arrays())

    @cached_property
    def transform_id(self) -> str:
        """Return the hash of all numbers but those of the prediction.

        What is stored without prediction is named by it, and so outlives a new prediction.
        """
        return _hash(self._transform_arrays())

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all numbers by name, as they are stored."""
        arrays = self._transform_arrays()
        if (found := self.prediction) is not None:
            arrays["version"] = np.array(PREDICTING_VERSION, np.int64)
            arrays["across"], arrays["within"] = found.across.numpy(), found.within.numpy()
            arrays["rest_rates"] = found.rates
            arrays |= _side_arrays("rest_key", found.keys)
            arrays |= _side_arrays("rest_value", found.values)
        return arrays

    def _transform_arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {
            "version": np.array(PROFILE_VERSION, np.int64),
            "model_id": np.frombuffer(self.model_id, np.uint8),
            "first_layer": np.array(self.first_layer, np.int64),
            "rates": self.rates,
        }
        for form, tables in self.keys.items():
            arrays |= _side_arrays(f"key_{form}", tables)
        return arrays | _side_arrays("value", self.values)

    def save(self, path: Path) -> None:
        """Write the profile to ``path``, whole or not at all.

        Raises:
            ProfileError: It is larger than a profile may be; what is at ``path`` stays.
        """
        if sum(array.nbytes for array in self.arrays().values()) > MAX_PROFILE_BYTES:
            raise ProfileError("it is larger than any profile may be")
        write_arrays(path, {"note": np.array(self.note), **self.arrays()}, pack=True)

    def threshold_for_bits(self, bits: float) -> float:
        """Return the threshold whose stored size is nearest to ``bits`` per element."""
        return threshold_for_bits(self.rates, bits)

    def threshold_for_kl(self, max_kl: float) -> float:
        """Return the threshold whose mean KL on calibration text was ``max_kl``."""
        return threshold_for_kl(self.rates, max_kl)


def threshold_for_bits(rates: np.ndarray, bits: float) -> float:
    """Return the threshold whose stored size is nearest to ``bits`` per element.

    Where sizes do not fall steadily, the finest such threshold. Interpolated in the logarithm
    and rounded to three digits, so that it is the same number everywhere. Beyond the measured
    range the end of it is returned.

    Args:
        rates: Of a profile, or of its prediction.
        bits: Stored bits per element.
    """
    sizes = rates[:, 1]
    fits = sizes <= bits
    if not fits.any():
        return _interpolated(1, bits, rates[[sizes.argmin()]])
    row = int(fits.argmax())
    return _interpolated(1, bits, rates[max(0, row - 1) : row + 1])


def threshold_for_kl(rates: np.ndarray, max_kl: float) -> float:
    """Return the threshold whose mean KL on calibration text was ``max_kl``; see above.

    No measured threshold below it had a larger KL.
    """
    exceeds = rates[:, 2] > max_kl
    if not exceeds.any():
        return _interpolated(2, max_kl, rates[-1:])
    row = int(exceeds.argmax())
    return _interpolated(2, max_kl, rates[max(0, row - 1) : row + 1])


def _interpolated(column: int, target: float, rows: np.ndarray) -> float:
    """Return the threshold between one or two neighbouring rows, their own at the ends."""
    known = np.log(np.maximum(rows[:, column], 1e-12))
    order = np.argsort(known, kind="stable")
    value = np.interp(np.log(target), known[order], np.log(rows[:, 0])[order])
    return float(f"{np.exp(value):.2e}")


def load_profile(path: Path) -> Profile:
    """Return the profile in a file.

    Raises:
        ProfileError: Not a profile, damaged, of another version, or with values that are no
            numbers; the message names the file.
    """
    try:
        return _from_arrays(read_arrays(path, MAX_PROFILE_BYTES))
    except ProfileError as error:
        raise ProfileError(f"{path} is not a usable profile: {error}") from error


def read_arrays(path: Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Return the arrays of a file that ``write_arrays`` wrote; nothing in it is unpickled.

    Args:
        path: Of the file.
        max_bytes: Most that it may unpack to; checked before anything is allocated.

    Raises:
        ProfileError: Damaged, too large, or with other things than arrays of numbers.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > max_bytes:
                raise ProfileError("it is larger than any profile")
            # A reader allocates what an entry says that it takes in the file.
            if sum(entry.compress_size for entry in entries) > path.stat().st_size:
                raise ProfileError("its entries take more than the file has")
            if any(entry.compress_type not in _METHODS for entry in entries):
                raise ProfileError("it is compressed by an unknown method")
            return {e.filename.removesuffix(".npy"): _read_array(archive.read(e)) for e in entries}
    except _DAMAGED as error:
        raise ProfileError(str(error) or type(error).__name__) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, pack: bool = False) -> None:
    """Write arrays to ``path``, whole or not at all, also where two processes do it at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            (np.savez_compressed if pack else np.savez)(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_array(data: bytes) -> np.ndarray:
    """Return one array of an .npz, allocating no more than ``data`` has."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ProfileError("an array is in another format than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ProfileError("an array holds objects, or another number of bytes than it tells")
    flat = np.frombuffer(bytearray(data), dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _from_arrays(arrays: dict[str, np.ndarray]) -> Profile:
    try:
        return _checked(arrays)
    except (KeyError, TypeError, ValueError) as error:
        missing = isinstance(error, KeyError)
        raise ProfileError(f"{error} is missing" if missing else str(error)) from error


def _checked(arrays: dict[str, np.ndarray]) -> Profile:
    version = int(arrays["version"])
    if version not in (PROFILE_VERSION, PREDICTING_VERSION):
        raise ProfileError(
            f"version {version}, this release reads {PROFILE_VERSION} and {PREDICTING_VERSION}"
        )
    layers, heads, dim = shape = arrays["value_mean"].shape
    keys = {
        form: _side(arrays, f"key_{form}", shape)
        for form in KEY_FORMS
        if f"key_{form}_mean" in arrays
    }
    if min(layers, heads, dim) < 1 or int(arrays["first_layer"]) < 0:
        raise ProfileError("there must be layers, heads and components, and a first layer")
    if "pre" not in keys:
        raise ProfileError("tables of keys are missing")
    return Profile(
        model_id=arrays["model_id"].tobytes(),
        keys=keys,
        values=_side(arrays, "value", shape),
        first_layer=int(arrays["first_layer"]),
        rates=_rates(arrays["rates"]),
        note=str(arrays["note"]),
        prediction=_prediction(arrays, shape) if version == PREDICTING_VERSION else None,
    )


def _rates(array: np.ndarray) -> np.ndarray:
    rates = array.astype(np.float64)
    if rates.ndim != 2 or rates.shape[1] != 3 or not rates.size:
        raise ProfileError(f"rates have shape {rates.shape}")
    if not (np.isfinite(rates) & (rates > 0)).all():
        raise ProfileError("rates must be finite and positive")
    if (np.diff(rates[:, 0]) < 0).any():
        raise ProfileError("thresholds of rates must ascend")
    return rates


def _prediction(arrays: dict[str, np.ndarray], shape: tuple[int, int, int]) -> Prediction:
    layers, heads, dim = shape
    channels = 2 * heads * dim
    head = np.arange(channels) // dim
    for name in ("across", "within"):
        array, size = arrays[name], (layers, channels, channels)
        if array.dtype != np.float16 or array.shape != size or not np.isfinite(array).all():
            raise ProfileError(f"{name} must be finite float16 {size}")
    if arrays["within"][:, head[:, None] >= head].any():
        raise ProfileError("within predicts a head from one that does not precede it")
    return Prediction(
        across=torch.from_numpy(arrays["across"]),
        within=torch.from_numpy(arrays["within"]),
        keys=_side(arrays, "rest_key", shape),
        values=_side(arrays, "rest_value", shape),
        rates=_rates(arrays["rest_rates"]),
    )


def _side(arrays: dict[str, np.ndarray], side: str, shape: tuple[int, int, int]) -> SideTables:
    wanted = {
        "mean": (np.float32, shape),
        "basis": (np.float16, (*shape, shape[-1])),
        "variance": (np.float32, shape),
    }
    tensors = {}
    for name, (dtype, size) in wanted.items():
        array = arrays[f"{side}_{name}"]
        if array.dtype != dtype or array.shape != size or not np.isfinite(array).all():
            raise ProfileError(f"{side}_{name} must be finite {np.dtype(dtype)} {size}")
        tensors[name] = torch.from_numpy(array)
    variance = tensors["variance"]
    if not (variance > 0).all() or (variance[..., 1:] > variance[..., :-1]).any():
        raise ProfileError(f"{side}_variance must be positive and descending")
    inverse, failed = torch.linalg.inv_ex(tensors["basis"].double())
    if failed.any() or not inverse.float().isfinite().all():
        raise ProfileError(f"{side}_basis has no inverse")
    return SideTables(**tensors)


def _side_arrays(side: str, tables: SideTables) -> dict[str, np.ndarray]:
    return {
        f"{side}_mean": tables.mean.numpy(),
        f"{side}_basis": tables.basis.numpy(),
        f"{side}_variance": tables.variance.numpy(),
    }


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(f"profile/{PROFILE_VERSION}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[: 2 * PROFILE_ID_BYTES]


class ProfileStore(TableStore[Profile]):
    """The profiles that this process can use: shipped ones, and those in further folders."""

    kind = "profile"
    suffix = SUFFIX
    error = ProfileError

    def __init__(self, folders: Iterable[Path] = ()) -> None:
        """Look into the shipped ones and ``folders``, later ones first."""
        super().__init__([SHIPPED, *folders])

    def load(self, path: Path) -> Profile:
        """Return the profile in a file; see ``load_profile``."""
        return load_profile(path)

    def id_of(self, tables: Profile) -> str:
        """Return its hash."""
        return tables.profile_id

    def model_of(self, tables: Profile) -> bytes:
        """Return the id of its model."""
        return tables.model_id


PROFILES = ProfileStore()
