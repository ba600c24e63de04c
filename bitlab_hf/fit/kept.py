"""A folder that keeps what calibration has found, layer by layer, so that it can go on from there.

``calibration.json`` says of what samples and settings it is; ``NAME.safetensors`` holds a layer's
packed codes and its scales, and says of which weight and beside which others. So calls for other
blocks keep theirs in one folder. Each file is written in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bitcore.errors import ArgumentError, CheckpointError
from bitcore.packing import pack_codes, unpack_ternary
from bitlab_hf.checkpoint.atomic import (
    check_place,
    naming_full_disk,
    put_in_place,
    staged_beside,
    write_atomically,
)
from bitlab_hf.fit.matrix import Matrix
from bitlab_hf.fit.solve import Scales
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts

_SETTINGS = "calibration.json"
_OP = "calibrate"
# Counts what changed the layers that the same samples and settings give, or what is kept of them:
# they do not mix.
_SOLVER = 4


class OtherFitError(ArgumentError):
    """A folder keeps what was found with other settings, samples or weights."""


@dataclass(frozen=True)
class LayerReport:
    """What calibration did to a layer, or to an expert's matrix.

    Attributes:
        name: Of the layer; of an expert ``MODULE.NUMBER.TENSOR``.
        rounding_error: ``|Y - Y_t|^2 / |Y|^2`` over the calibration tokens if its weight were
            rounded: Y the wanted outputs, Y_t the ternary ones.
        error: The same, calibrated.
        zeros: Share of codes 0.
    """

    name: str
    rounding_error: float
    error: float
    zeros: float


def settings_of(ids: list[Tensor], numbers: Mapping[str, float]) -> dict[str, Any]:
    """Returns what a folder's layers depend on beside the model.

    Args:
        ids: Token ids [B, L] of each batch.
        numbers: The arguments of `calibrate`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in ids:
        digest.update(repr(tuple(part.shape)).encode())
        digest.update(part.cpu().numpy().tobytes())
    kind = ids[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return {
        **numbers,
        "autocast": str(dtype),
        "samples": digest.hexdigest(),
        "solver": _SOLVER,
    }


def fit_of(model: nn.Module, wanted: Container[nn.Module], blocks: range | None) -> dict[str, Any]:
    """Returns what a layer depends on beside the settings, its own weight and the wanted ones
    before it, which are kept themselves.

    Args:
        model: The latent model, as yet unchanged.
        wanted: The modules that are calibrated.
        blocks: Which decoder layers they are of; None for all of the model.

    Returns:
        ``blocks``, and ``rest``: a checksum of which other layers are ternary, and of all weights
        but the wanted layers' latent ones; the same on every device and in every process.
    """
    layers: list[Found[Any]] = [*find_modules(model, BitLayerBase), *expert_modules(model)]
    own, check = set[int](), 0
    for found in layers:
        module = found.module
        if module in wanted:
            names = module.stacks if isinstance(module, BitExperts) else ("weight",)
            own |= {id(module._parameters[name]) for name in names}
        else:
            check = zlib.crc32(f"{found.names[0]} {module.quant_strength == 1}".encode(), check)
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) in own:
            continue
        check = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), check)
        # Offloaded or quantized ones of other libraries have no bytes of their own.
        if type(value.data) is Tensor and not value.is_meta:
            check = zlib.crc32(bytes_of(value), check)
    return {"blocks": None if blocks is None else [blocks.start, blocks.stop], "rest": check}


class KeptLayers:
    """The layers that a folder keeps.

    Args:
        path: The folder; made where it is missing.
        settings: `settings_of` the fit.
        fit: `fit_of` the model.
        writes: Whether this process adds to it.

    Raises:
        ArgumentError: The folder is no place for it.
        OtherFitError: It is of other settings.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        fit: Mapping[str, Any],
        writes: bool = True,
    ) -> None:
        self._folder, self._fit, self._writes = check_place(path, _OP), dict(fit), writes
        file = self._folder / _SETTINGS
        if file.exists():
            self._check(file, dict(settings))
        elif writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(settings, indent=2) + "\n")

    def has(self, matrices: Iterable[Matrix]) -> bool:
        """Tells whether all of these are kept."""
        return all(self._file(matrix).exists() for matrix in matrices)

    def check(self, matrices: Iterable[Matrix]) -> None:
        """Checks, before any work, that what is kept of these is of this fit.

        Raises:
            OtherFitError: It is of other blocks, or of another model.
            CheckpointError: A file is damaged.
        """
        for matrix in matrices:
            if self.has([matrix]):
                self._held(matrix, ())

    def read(self, matrix: Matrix) -> LayerReport | None:
        """Makes a matrix as it is kept; returns its report, None of one that keeps its rounding.

        Raises:
            OtherFitError: The weight, its configuration or what is beside it was another one.
            CheckpointError: The file is damaged.
        """
        about, tensors = self._held(matrix, ("qweight", "scales"))
        if about["of"] != _mark(matrix):
            raise OtherFitError(
                f"{_OP}: folder must be of this model, got one whose {matrix.name} had another "
                f"weight or configuration: {self._folder}\n"
                "Name another folder, or remove this one."
            )
        if not tensors:
            return None
        rows, columns = matrix.weight.shape
        device = matrix.weight.device
        matrix.set(
            unpack_ternary(tensors["qweight"].to(device), rows),
            Scales(tensors["scales"].to(device), columns, about["leveled"]),
        )
        return LayerReport(matrix.name, **about["report"])

    def write(self, matrix: Matrix, report: LayerReport | None) -> None:
        """Keeps a matrix, or that it keeps its rounding.

        Raises:
            DiskFullError: It does not fit; what is kept already stays.
        """
        codes, scales = matrix.codes, matrix.scales
        if not self._writes:
            return
        about: dict[str, Any] = {"of": _mark(matrix), "fit": self._fit, "report": None}
        tensors = {}
        if report is not None and codes is not None and scales is not None:
            values = asdict(report)
            del values["name"]
            about |= {"report": values, "leveled": scales.leveled}
            tensors = {
                "qweight": pack_codes(codes).cpu(),
                "scales": scales.values.contiguous().cpu(),
            }
        file = self._file(matrix)
        with naming_full_disk(file, _OP), staged_beside(file, _OP) as staged:
            save_file(tensors, staged, {"layer": json.dumps(about)})
            put_in_place(staged, file)

    def _held(
        self, matrix: Matrix, names: Iterable[str]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns what a file says of a matrix, and tensors of one that does not keep its rounding;
        raises what `read` does.
        """
        file, tensors = self._file(matrix), dict[str, Tensor]()
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["layer"])
                fit = dict(about["fit"])
                if about["report"] is not None:
                    tensors = {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{_OP}: {file} must hold a layer, got a file that cannot be read: {error}\n"
                "Remove it: the layer is calibrated again."
            ) from error
        if fit != self._fit:
            held, given = fit.get("blocks"), self._fit["blocks"]
            other = "beside other norms, embeddings or layers that are not calibrated"
            raise OtherFitError(
                f"{_OP}: folder must be of this fit, got one whose {matrix.name} was found "
                f"{other if held == given else f'with blocks {held} instead of {given}'}: "
                f"{self._folder}\nName another folder, or remove this one."
            )
        return about, tensors

    def _file(self, matrix: Matrix) -> Path:
        return self._folder / f"{matrix.name}.safetensors"

    def _check(self, file: Path, settings: dict[str, Any]) -> None:
        try:
            held = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{_OP}: {file} must be a JSON object, got {error}\n"
                "Remove the folder, or name another one."
            ) from error
        for name in [*settings, *held]:
            if held.get(name) != settings.get(name):
                raise OtherFitError(
                    f"{_OP}: folder must be of this fit, got one with {name} {held.get(name)!r} "
                    f"instead of {settings.get(name)!r}: {file.parent}\n"
                    "Name another folder, or remove this one."
                )


def _mark(matrix: Matrix) -> list[Any]:
    """Returns what tells a weight and its configuration from others."""
    weight = matrix.weight
    return [list(weight.shape), zlib.crc32(bytes_of(weight)), matrix.config.to_dict()]


def bytes_of(tensor: Tensor) -> Any:
    """Returns the bytes of a tensor [...] as an array on the CPU, for checksums."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
