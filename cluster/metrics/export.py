"""Chooses where the metrics of a driver go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engine_args import EngineArgs
from .instruments import GuardedInstruments, Instruments
from .meter import RequestMeter


def make_meter(
    args: EngineArgs, *, on_ray: bool, model_name: str | None = None, instruments: Sequence[Instruments] = ()
) -> RequestMeter:
    """A meter for `instruments`, and for Ray's exporter where the engines run on Ray, which must have started.

    model_name: a label of every metric; None: the name of the model directory.
    """
    if on_ray:
        from .ray_metrics import RayInstruments  # Ray is not needed for one process

        instruments = (*instruments, RayInstruments(args.metrics_prefix))
    guarded = [GuardedInstruments(one) for one in instruments]
    return RequestMeter(guarded, model_name=model_name or Path(args.model).resolve().name)
