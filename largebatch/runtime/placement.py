"""Place a run's workers from the configuration and the hardware; no result depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from largebatch.base.errors import UserError
from largebatch.base.numbers import divisors, listed
from largebatch.config.groups import CertifyConfig
from largebatch.config.run import Config

# Of a pass on a GPU, where workers_per_pass is not given. Activations of ResNet-50 in bf16 take about 44 MB a sample:
# 8 workers of 256 samples would take 90 GB, and 512 samples take 22 GB.
MOST_WORKERS, MOST_SAMPLES = 8, 512


@dataclass(frozen=True)
class Hardware:
    """Hardware of this machine. ``bf16``: whether its accelerator (or processor) multiplies in bf16."""

    cores: int
    gpus: int
    mps: bool
    bf16: bool


@dataclass(frozen=True)
class Placement:
    """Placement of k workers: changes the time of a run, never its result.

    ``processes`` is P; a process owns ``workers`` = k/P consecutive workers and computes ``workers_per_pass`` of
    them in one forward pass. ``threads`` are a process's CPU threads, ``cores`` its share of the machine's.
    ``precision`` is fp32, tf32, bf16 or fp64; ``channels_last`` is the memory format of images and convolutions.
    """

    processes: int
    workers: int
    workers_per_pass: int
    threads: int
    cores: int
    device: str
    precision: str
    channels_last: bool


def place(
    config: Config, hardware: Hardware, world_size: int | None = None, local_world_size: int | None = None
) -> Placement:
    """Decide where the k workers of ``config`` run.

    Args:
        config: The run.
        hardware: What this machine offers.
        world_size: Number of processes where a launcher outside has started them already.
        local_world_size: How many of them share this machine's cores; all, where it is not given.

    Raises:
        UserError: a device, precision or number of processes that cannot be had here.
    """
    device = config.device
    if device == "auto":
        single = (config.processes or world_size or 1) == 1
        device = "cuda" if hardware.gpus else "mps" if hardware.mps and single and config.precision != "fp64" else "cpu"
    if device == "cuda" and not hardware.gpus:
        raise UserError("device=cuda was given, but this machine has no usable CUDA GPU: use device=cpu or auto.")
    if device == "mps" and not hardware.mps:
        raise UserError("device=mps was given, but this machine has no Apple GPU: use device=cpu or device=auto.")

    processes = _processes(config, hardware, device, world_size)
    if config.cuda_graphs and (device != "cuda" or processes > 1):
        raise UserError(
            f"cuda_graphs=true records a whole step on one GPU, and this run has device={device}, "
            f"processes={processes}: use processes=1 on a GPU, or cuda_graphs=false."
        )
    workers = config.k // processes
    per_pass = config.workers_per_pass
    if config.pitfall.one_pass:
        if processes > 1 or per_pass not in (None, config.k):
            raise UserError(
                f"pitfall={config.pitfall.name} computes all kn samples in one pass, to take statistics over them: it "
                f"goes with processes=1 and workers_per_pass={config.k} alone."
            )
        per_pass = config.k
    if per_pass is None:
        most = min(MOST_WORKERS, max(1, MOST_SAMPLES // config.n))
        limit = most if device == "cuda" and not config.exact else 1
        per_pass = max(d for d in divisors(workers) if d <= limit)
    elif workers % per_pass:
        raise UserError(
            f"workers_per_pass={per_pass} does not divide the {workers} workers of a process (k={config.k} on "
            f"{processes}). These do: {', '.join(map(str, divisors(workers)))}."
        )
    cores = max(1, hardware.cores // (local_world_size or processes))
    return Placement(
        processes=processes,
        workers=workers,
        workers_per_pass=per_pass,
        # Float32 sums depend on the number of threads: exact=true has one number for any number of processes.
        threads=config.threads or (1 if config.exact else cores),
        cores=cores,
        device=device,
        precision=_precision(config, hardware, device),
        channels_last=device == "cuda" if config.channels_last is None else config.channels_last,
    )


def _processes(config: Config, hardware: Hardware, device: str, world_size: int | None) -> int:
    if world_size is not None:
        if config.processes not in (None, world_size):
            raise UserError(
                f"processes={config.processes} was given, but this process was started as one of {world_size} "
                "(WORLD_SIZE): leave processes out."
            )
        if config.k % world_size:
            raise UserError(
                f"{world_size} processes were started (WORLD_SIZE), which does not divide k={config.k}. These do: "
                f"{', '.join(map(str, divisors(config.k)))}."
            )
        return world_size
    if config.processes is not None:
        if device == "cuda" and config.processes > hardware.gpus:
            raise UserError(
                f"processes={config.processes} is more than the {hardware.gpus} GPUs here: a process takes a GPU. "
                "Leave it out (the workers are shared out), or use device=cpu."
            )
        if device == "mps" and config.processes > 1:
            raise UserError("device=mps runs one process: use processes=1, or device=cpu.")
        return config.processes
    return max(d for d in divisors(config.k) if d <= hardware.gpus) if device == "cuda" else 1


def _precision(config: Config, hardware: Hardware, device: str) -> str:
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if device == "cuda" and hardware.bf16 else "fp32"
    if precision == "bf16" and not hardware.bf16:
        raise UserError(
            f"precision=bf16 was given, but device={device} has no bf16 arithmetic on this machine: use precision=fp32."
        )
    if precision == "fp64" and device == "mps":
        raise UserError("precision=fp64 does not exist on Apple's GPU: use device=cpu.")
    return "tf32" if precision == "fp32" and config.tf32 and device == "cuda" else precision


def processes_for(asked: CertifyConfig, k: int, hardware: Hardware, device: str) -> list[int]:
    """Return the numbers of processes to certify on: those asked for, or all that divide k and fit the machine.

    Raises:
        UserError: one that does not divide k, or more than there are GPUs.
    """
    most = hardware.gpus if device == "cuda" else 1 if device == "mps" else max(4, hardware.cores)
    if asked.processes is None:
        return [d for d in divisors(k) if d <= most]
    for processes in asked.processes:
        if processes < 1 or k % processes:
            raise UserError(f"certify.processes: {processes} does not divide k={k}. These do: {listed(divisors(k))}.")
        if processes > most and device != "cpu":
            raise UserError(f"certify.processes: {processes} is more than the {most} devices here.")
    return sorted(set(asked.processes))
