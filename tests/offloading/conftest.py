import pytest
import torch
from recorder import Recorder

from largebatch.offloading.transport import make_transport

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"))


@pytest.fixture(params=["cpu, copies early", "cpu, copies late", CUDA])
def transport(request):
    """A recording transport of each kind: copies of an asynchronous one happen at any time between the two."""
    kind, _, when = request.param.partition(", ")
    return Recorder(make_transport(torch.device(kind)), lazy=when == "copies late")


@pytest.fixture
def recorder():
    """A recording transport on the CPU, whose copies happen as late as they may."""
    return Recorder(make_transport(torch.device("cpu")), lazy=True)
