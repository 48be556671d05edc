"""Compilation of a generator by torch.compile."""

from __future__ import annotations

import torch

from hpcres.errors import InputError
from hpcres.networks.superres import SuperResGenerator


def compile_generator(generator: SuperResGenerator, device: torch.device) -> None:
    """Have the generator's forward compiled when it first runs; weights and their names stay as they are.

    The critics are not compiled: torch.compile refuses a double backward (2.13: "does not currently support double
    backward"), which a critic's gradient penalty needs. InputError is raised if nothing can be compiled on this
    machine, which a trial shows.
    """
    _add_cpu_to_cache_key()
    try:
        torch.compile(lambda x: x * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # the tool chain's own, of many kinds
        reason = str(error).strip().splitlines()
        raise InputError(
            f"training.compile: torch.compile does not work on this machine "
            f"({reason[0] if reason else type(error).__name__}); install a C++ compiler (g++, or name one in CXX), or "
            "set training.compile=false"
        ) from None
    generator.compile(dynamic=False)


def _add_cpu_to_cache_key() -> None:
    """Make torch's cache of compiled code depend on the CPU's vector registers (from torch 2.7 on).

    The key of this cache holds the GPU but not the CPU. A CPU without AVX-512 that shares the cache folder with one
    that has it would run code made for registers of 16 floats. torch 2.13 then returns wrong values or crashes. A tag
    that the user has set in TORCH_COMPILE_CACHE_KEY_TAG stays.
    """
    config = getattr(torch.compiler, "config", None)
    if config is not None and not config.cache_key_tag:
        config.cache_key_tag = torch.backends.cpu.get_cpu_capability()
