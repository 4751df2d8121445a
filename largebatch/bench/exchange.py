"""One step's exchange of gradients between P processes: by DDP, and in the fixed tree of exact=true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from largebatch.base.errors import UserError
from largebatch.bench.compare import Side, Spread, Timings, spread, take_turns
from largebatch.config.run import Config
from largebatch.models import build_model
from largebatch.runtime.placement import Placement, place
from largebatch.runtime.processes import launch
from largebatch.runtime.world import World, hardware, leave, started_outside
from largebatch.training.exchange import Averaging, Exchange, Tree
from largebatch.training.learner import DTYPES, start

PROCESSES = 2
KINDS = ("ddp", "tree")


def make_placement(config: Config) -> Placement:
    """Place a worker in each of the processes, ``PROCESSES`` where no number is given.

    Raises:
        UserError: a number without an exchange, or that the tree does not take; a launcher outside.
    """
    if started_outside() != (None, None):
        raise UserError("bench exchange starts its own processes: run it without torchrun.")
    processes = config.processes or PROCESSES
    if processes == 1 or processes & (processes - 1):
        raise UserError(
            f"processes={processes} cannot be compared: the fixed tree takes a power of two, and an exchange takes "
            "two or more. Use processes=2, 4, 8 …"
        )
    return place(replace(config, k=processes, processes=processes, workers_per_pass=1), hardware())


class Either(nn.Module):
    """A network whose gradients come from a back-propagation, or from next to no arithmetic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor | None) -> Tensor:
        """Return a sum to differentiate: of the network's output, or without images of its parameters alone."""
        if images is None:
            return torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum()
        output: Tensor = self.model(images)
        return output.sum()


@dataclass
class Pass:
    """A back-propagation with what its exchange does meanwhile, again and again."""

    exchange: Exchange
    world: World
    precision: str
    images: Tensor | None
    _loss: Tensor | None = None

    def prepare(self) -> None:
        """Go forward, and wait for the other processes."""
        for parameter in self.exchange.net.parameters():
            parameter.grad = None
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            self._loss = self.exchange.net(self.images)
        self.world.barrier()
        self._synchronise()

    def turn(self) -> None:
        """Go back, until all gradients are there."""
        assert self._loss is not None
        with self.exchange.passing(last=True):
            self._loss.backward()  # type: ignore[no-untyped-call]
        self.exchange.finish()
        self._synchronise()

    def _synchronise(self) -> None:
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize()


def time_exchange(config: Config, placement: Placement, repeats: int) -> tuple[Timings, int]:
    """Time the exchanges in turn, in processes of their own.

    Returns:
        Sides ``backward`` (a back-propagation over n images, no exchange), and for both kinds ``exchange_ddp``
        (all gradients at once) and ``both_ddp`` (over n images, with the exchange); the gradients' bytes.
    """
    return launch(_time_exchange, (config, placement, repeats), placement.processes, placement.threads)


def _time_exchange(config: Config, placement: Placement, repeats: int) -> tuple[Timings, int]:
    world = start(config, placement)
    data, dtype = config.dataset, DTYPES[placement.precision]

    def network() -> Either:
        torch.manual_seed(config.seed)
        model = build_model(config.model, data.classes or 1000, data.channels).to(world.device, dtype).train()
        return Either(model.to(memory_format=torch.channels_last) if placement.channels_last else model)

    images = torch.randn(config.n, data.channels, data.height, data.width, dtype=dtype, device=world.device)
    if placement.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    options = config.exchange
    exchanges: dict[str, Exchange] = {"ddp": Averaging(network(), world, options)}
    exchanges["tree"] = Tree(network(), world, options.bucket_bytes)
    alone = Averaging(network(), World(0, 1, world.device), options)
    # With images first: DDP cuts its buckets in the order in which the first gradients arrive.
    passes = {f"both_{kind}": Pass(exchanges[kind], world, placement.precision, images) for kind in KINDS}
    passes |= {f"exchange_{kind}": Pass(exchanges[kind], world, placement.precision, None) for kind in KINDS}
    passes["backward"] = Pass(alone, world, placement.precision, images)
    sides = {name: Side(one.turn, config.n * world.size, one.prepare) for name, one in passes.items()}
    timings = take_turns(sides, repeats, "exchange by DDP and in a tree", shown=world.main)
    size = sum(parameter.numel() * parameter.element_size() for parameter in alone.net.parameters())
    leave()
    return timings, size


def overlap(seconds: Mapping[str, Sequence[float]], kind: str) -> Spread:
    """Return which share of the shorter one, exchange or back-propagation, passes during the other.

    1 − (both − max) / min, round by round: 1 where the two together take as long as the longer one, 0 where they
    take as long as one after the other.
    """
    rounds = zip(seconds["backward"], seconds[f"exchange_{kind}"], seconds[f"both_{kind}"], strict=True)
    return spread([1 - (both - max(back, exchange)) / min(back, exchange) for back, exchange, both in rounds])
