"""What can be held against the CUDA transport without a device."""

from types import SimpleNamespace

import pytest
import torch

from largebatch.base.errors import Fault
from largebatch.offloading.transport import CudaTransport


@pytest.mark.parametrize("code", [0, 1])
def test_memory_that_cannot_be_pinned_is_told_in_a_sentence(monkeypatch, code):
    calls = []

    def register(*call):
        calls.append(call)
        return code

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    memory, transport = torch.empty(4096, dtype=torch.uint8), object.__new__(CudaTransport)
    if code:
        with pytest.raises(Fault, match=r"^4,096 bytes of host memory could not be pinned \(CUDA error 1\).*ulimit -l"):
            transport.pin(memory)
    else:
        transport.pin(memory)
    assert calls == [(memory.data_ptr(), 4096, 1)]
