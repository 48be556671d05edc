"""Labels of many windows by an engine in torch, as many windows at a time as memory holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hpcres.errors import InputError
from hpcres.geometry import Box, triple

Crop = tuple[slice, slice, slice]


class TorchEngine(Protocol):
    """A list of stages on a torch device: windows in, labels out."""

    device: torch.device
    dtype: torch.dtype

    def labels(self, windows: Tensor, crop: Crop | None = None) -> Tensor:
        """Compute the uint8 labels (batch, z, y, x) of windows (batch, channels, z, y, x)."""
        ...

    def batch_bytes(self, window: Sequence[int], batch: int = 1, crop: Crop | None = None) -> int:
        """Estimate the peak bytes of the tensors for `batch` windows of (z, y, x) voxels."""
        ...


def box_of(crop: Crop | None, whole: Box) -> Box:
    """Return the output voxels that a crop asks for.

    Parameters
    ----------
    crop
        Slices of the output along z, y, x, as of an array; None for all.
    whole
        All output voxels.

    Returns
    -------
    Box
        The voxels, at least one.
    """
    if crop is None:
        return whole
    bounds = [part.indices(n) for part, n in zip(crop, whole.shape, strict=True)]
    box = Box(triple([start for start, _, _ in bounds]), triple([stop for _, stop, _ in bounds]))
    assert box.voxels, (crop, whole)
    return box


def refuse_not_finite(finite: Tensor, dtype: torch.dtype) -> None:
    """Raise InputError where `finite`, a tensor of one boolean, is False; `dtype` is named in the message."""
    if not finite:
        raise InputError(
            f"the network's output is not finite in {_name(dtype)}, labels would mean nothing; use "
            + ("an earlier checkpoint" if dtype == torch.float32 else "float32, or an earlier checkpoint")
        )


def paint_batches(
    network: TorchEngine, windows: Sequence[np.ndarray], crops: Sequence[Crop], batch: int
) -> tuple[list[np.ndarray], int]:
    """Compute the labels of windows in batches.

    Windows of one shape and crop go through the network `batch` at a time, half as many where memory runs out.

    Parameters
    ----------
    network
        Engine that computes the labels.
    windows
        Floats (channels + 1, z, y, x) each.
    crops
        High-res voxels of each window to compute.
    batch
        Number of windows at a time to begin with.

    Returns
    -------
    labels : list of numpy.ndarray
        uint8 (z, y, x) of each window's crop, in their order.
    batch : int
        Number of windows at a time that fitted.

    Raises
    ------
    InputError
        Where the memory does not suffice for one window, or the logits are not finite.
    """
    painted: list[np.ndarray] = [np.empty(0, np.uint8)] * len(windows)
    alike: dict[object, list[int]] = {}
    for i, (window, crop) in enumerate(zip(windows, crops, strict=True)):
        alike.setdefault((window.shape, tuple((part.start, part.stop) for part in crop)), []).append(i)
    for group in alike.values():
        while group:
            part = group[:batch]
            labels = _paint_if_it_fits(network, [windows[i] for i in part], crops[part[0]])
            if labels is not None:
                for i, of_window in zip(part, labels, strict=True):
                    painted[i] = of_window
                group = group[batch:]
            elif len(part) > 1:
                batch = len(part) // 2
            else:
                shape = windows[part[0]].shape[1:]
                raise InputError(
                    f"a window of {'x'.join(map(str, shape))} low-res voxels needs about "
                    f"{network.batch_bytes(shape, 1, crops[part[0]]) / 1e9:.1f} GB in {_name(network.dtype)}, which "
                    f"{network.device} does not have free; use smaller blocks or a device with more memory"
                )
    return painted, batch


def _paint_if_it_fits(network: TorchEngine, windows: list[np.ndarray], crop: Crop) -> np.ndarray | None:
    try:
        return network.labels(torch.from_numpy(np.stack(windows)), crop).cpu().numpy()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:  # how torch's CPU allocator and NVIDIA's libraries say it
        if not any(words in str(error) for words in ("allocate memory", "not enough memory", "ALLOC_FAILED")):
            raise
    # Only here, with the exception gone, are the tensors of the attempt gone too.
    if network.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
