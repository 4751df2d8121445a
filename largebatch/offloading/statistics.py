"""Count the bytes that were moved, and those on the device at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """Figures of one :func:`largebatch.offloading.offload`, current at any time.

    Attributes:
        mode: none, submodule or model.
        groups: Groups of weights, or models, that travel.
        weight_bytes: All weights and buffers, once each, in the host's flat buffers.
        kept_bytes: Of them, those that stay on the device.
        planned_peak_bytes: What weights take on the device at most, by plan.
        peak_bytes: What they took at most.
        uploads: Groups that were brought to the device. A pass over G groups makes G; with ``prefetch``, the first
            one of a pass that never came is included.
        bytes_to_device: What uploads and kept weights moved.
        bytes_from_device: Weights and buffers that were copied back: 0 where the model writes into none.
        passes: Calls of the model, or of all models.
        departures: Times that something else was needed than the first batch had shown.
    """

    mode: str
    groups: int = 0
    weight_bytes: int = 0
    kept_bytes: int = 0
    planned_peak_bytes: int = 0
    peak_bytes: int = 0
    uploads: int = 0
    bytes_to_device: int = 0
    bytes_from_device: int = 0
    passes: int = 0
    departures: int = 0
