"""Large steps as anyone would write them with PyTorch: k processes of n samples. Uses nothing of largebatch."""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18


def main(rank: int, size: int, port: int, source: str, target: str, steps: int, rate: float) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    tensors = load_file(source)
    model = resnet18(num_classes=10).double()
    model.load_state_dict({name[6:]: value for name, value in tensors.items() if name.startswith("model.")})
    model.train()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    ids = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": others, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    network = DistributedDataParallel(model)
    for step in range(steps):
        images, labels = tensors[f"images.{step}"][rank], tensors[f"labels.{step}"][rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    if rank == 0:
        save_file(model.state_dict(), target)
    dist.destroy_process_group()


if __name__ == "__main__":
    source, target, port, steps, rate = sys.argv[1:]
    size = 2
    torch.multiprocessing.spawn(main, (size, int(port), source, target, int(steps), float(rate)), nprocs=size)
