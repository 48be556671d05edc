"""The average of a generator's weights over the steps of its training."""

from __future__ import annotations


def average_decay(ema: float, growth: float, step: int) -> float:
    """Return the decay of the averaged weights at `step`.

    The decay is the share of itself that the averaged generator keeps in a step. Until the decay reaches `ema`, the
    weight of a step in the average grows as the number of the step to the power of `growth` (Karras 2024). The
    generator of a shorter average makes teeth of single voxels, which come and go during adversarial training. A longer
    average still holds the first weights.

    Parameters
    ----------
    ema : float
        Largest decay.
    growth : float
        Exponent of the growth of a step's weight.
    step : int
        Number of the step, from 0.

    Returns
    -------
    float
        The decay, at most `ema`.
    """
    return min(ema, (1 + step) / (2 + growth + step))
