"""The processes of one training run: where each computes, what they share, and batch norm over all of them.

N processes with 1/N of the batch each compute what one process computes with the whole batch. Three things ensure this.
DistributedDataParallel averages gradients, with every term of a loss in one backward pass. Batch norm takes its
statistics from the global batch. Decisions (stop, voxel threshold) are taken on global values.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from hpcres.cores import cores
from hpcres.errors import InputError
from hpcres.memory import keep_freed_memory

_LEFT: list[Any] = []
"""Process groups that were left. They are kept until the process ends."""

_HELD: deque[Any] = deque(maxlen=256)
"""The last collectives of gloo. They are also kept until the process ends; `_collective` says why."""


@dataclass(frozen=True)
class Processes:
    """One process among all processes of a run, as torchrun numbers them.

    A process that runs alone has rank 0 and size 1.

    Attributes
    ----------
    rank : int
        Number of this process, from 0.
    size : int
        Number of processes.
    local_size : int
        Number of processes on this node.
    device : torch.device
        Where this process computes.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    def share(self, count: int) -> range:
        """Return the part of `count` things that belongs to this rank.

        Parameters
        ----------
        count : int
            Number of things, such as training.cubes.

        Returns
        -------
        range
            Numbers of the things of this rank.

        Raises
        ------
        InputError
            `count` is not a multiple of the number of processes.
        """
        if count % self.size:
            raise InputError(
                f"training.cubes: {count} cubes cannot be shared by {self.size} processes; "
                f"use a multiple of {self.size}"
            )
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over all processes, without gradient."""
        value = value.detach().clone()
        if self.size > 1:
            _collective(dist.all_reduce, value)
            value /= self.size
        return value

    def largest(self, *values: float) -> list[float]:
        """Return the largest of each value over all processes, the same on every one."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        _collective(dist.all_reduce, shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def parallel(self, module: nn.Module) -> nn.Module:
        """Return the module with gradients averaged over all processes, or the module itself if there is only one."""
        if self.size == 1:
            return module
        # `static_graph` must stay off: with a gradient penalty it silently averages the wrong gradients.
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)

    def synchronise_batch_norm(self, module: nn.Module) -> nn.Module:
        """Replace every BatchNorm3d in place by one over the global batch, if there is more than one process.

        Parameters
        ----------
        module : torch.nn.Module
            Module whose descendants are replaced.

        Returns
        -------
        torch.nn.Module
            The same module.
        """
        if self.size > 1:
            for name, child in module.named_children():
                if type(child) is nn.BatchNorm3d:
                    setattr(module, name, GlobalBatchNorm3d.like(child))
                else:
                    self.synchronise_batch_norm(child)
        return module


@contextmanager
def processes(device: str, threads: int | None) -> Iterator[Processes]:
    """Join the other processes that torchrun started, if any, and leave them at the end.

    Parameters
    ----------
    device : {"auto", "cpu", "cuda"}
        Where to compute. Each process has a GPU of its own, by its local rank.
    threads : int or None
        CPU threads of each process. By default the cores of the node are divided by the number of its processes.

    Yields
    ------
    Processes
        This process among all of them.

    Raises
    ------
    InputError
        torch finds no GPU for `device` cuda, or the node has fewer GPUs than processes.
    """
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    place = _device(device, local_rank, local_size)
    with _denormals_as_zero():  # before torch starts its threads, which inherit this
        torch.set_num_threads(threads or max(1, cores() // local_size))
        keep_freed_memory()
        if size == 1:
            yield Processes(rank, size, local_size, place)
        else:
            with _group(place):
                yield Processes(rank, size, local_size, place)


@contextmanager
def _denormals_as_zero() -> Iterator[None]:
    """Treat numbers below 1.2e-38 as 0 on the CPU, until the end of the block.

    This holds in the calling thread and in the threads that it starts. The gradient of a softmax whose probabilities
    are close to 0 and 1 holds such numbers. If one value in thirty is such a number, the gradient of a convolution
    takes five times as long (docs/training.md, Speed). These numbers are too small to change a sum or a weight.
    """
    before = (torch.tensor([1e-40]) * 1).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def _group(place: torch.device) -> Iterator[None]:
    """Set up torch's default process group over the processes that torchrun started, and leave it at the end."""
    if place.type == "cuda":
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", device_id=place)
    else:
        dist.init_process_group("gloo")
    # DistributedDataParallel would free the group after us, holding Python's lock while it waits for gloo's threads,
    # one of which may wait for that lock to free a tensor: so something else holds it to the end.
    _LEFT.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _collective(collective: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Run a collective of torch.distributed, and return when it is done.

    A thread of gloo releases the tensors some time after they are done. If this thread holds the last reference to
    them, it needs Python's lock to free them. If Python is about to end, the thread aborts the process instead. The
    collectives are therefore held longer.

    torch.compile cannot trace async_op: it would split the network at every batch norm. Compiled collectives are
    therefore not held. Collectives that are not compiled, and are held, follow those of a compiled network.
    """
    if torch.compiler.is_compiling() or dist.get_backend() != "gloo":
        collective(*tensors, **options)
        return
    work = collective(*tensors, **options, async_op=True)
    work.wait()
    _HELD.append(work)


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("device: cuda, but torch finds no GPU here; use auto or cpu, or a CUDA build of torch")
    if local_size > torch.cuda.device_count():
        raise InputError(
            f"device: {local_size} processes on this node but {torch.cuda.device_count()} GPUs, each needs one; "
            f"use --nproc-per-node {torch.cuda.device_count()} or device: cpu"
        )
    return torch.device("cuda", local_rank)


class GlobalBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm3d over the batch of all processes, each with an equal share, on any device.

    torch's SyncBatchNorm works on GPUs only. State and evaluation are those of BatchNorm3d.
    """

    @classmethod
    def like(cls, norm: nn.BatchNorm3d) -> GlobalBatchNorm3d:
        """Return a GlobalBatchNorm3d with the settings and the state of `norm`."""
        ours = cls(norm.num_features, norm.eps, norm.momentum)
        ours.load_state_dict(norm.state_dict())
        return ours

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x`, during training by the statistics of all processes, else as BatchNorm3d does."""
        if not self.training:
            return super().forward(x)
        # torch.autograd.Function.apply has no types.
        apply: Any = _GlobalNormalisation.apply
        normalised, mean, variance = apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return normalised


class _GlobalNormalisation(torch.autograd.Function):
    """Batch norm (x − μ) · w / √(σ² + ε) + b with μ and σ² over the x of all processes.

    The gradient takes into account that the losses of all processes depend on μ and σ². The passes over voxels are
    torch's kernels for given statistics. Only sums over voxels are communicated.
    """

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        # torch has no kernel for the statistics alone on every device; this one's are as exact as batch norm's own.
        _, own_mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ours = torch.stack([inverse.double().pow(-2) - eps, own_mean.double()])
        every = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
        _collective(dist.all_gather, every, ours)
        variances, means = torch.stack(every).unbind(1)
        mean = means.mean(0).float()
        variance = (variances.mean(0) + means.var(0, correction=0)).clamp(min=0).float()
        context.save_for_backward(x, weight, mean, variance)
        context.eps = eps
        context.mark_non_differentiable(mean, variance)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(context: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = context.saved_tensors
        direct, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            slope, x, weight, mean, variance, None, None, False, context.eps, [True, True, True]
        )
        # With x̂ = (x − μ)/σ over N values: dx = w/σ · (g − Σg/N − x̂ Σg x̂/N), both sums over all processes.
        sums = torch.stack([to_weight, to_bias]) / (x.numel() // x.shape[1] * dist.get_world_size())
        _collective(dist.all_reduce, sums)
        inverse = torch.rsqrt(variance + context.eps)
        per_value = -weight * inverse * inverse * sums[0]
        constant = -weight * inverse * sums[1] - per_value * mean
        # x · per_value + constant, by the kernel that is fastest at it.
        spread = functional.batch_norm(x, torch.zeros_like(mean), torch.ones_like(mean), per_value, constant, eps=0.0)
        return direct.add_(spread), to_weight, to_bias, None
