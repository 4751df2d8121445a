"""Make machine code for an H100 from every BatchNorm kernel, which needs no GPU; print what each loads."""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from largebatch.models import batchnorm_kernels as fused

SWITCHES = {"WIDE": triton.language.float32, "EPS": 1e-5, "RESIDUAL": True, "RELU": True}
LAYOUTS = {
    "channels_last": {"CHANNELS": 64, "ROWS": 32, "stride_channel": 1},
    "contiguous": {"CHANNELS": 1, "ROWS": 2048, "stride_position": 1},
}
POINTERS = dict.fromkeys(("x", "y", "dy", "residual", "dx", "dz_out"), "*bf16")
POINTERS |= dict.fromkeys(("weight", "bias", "sums", "statistics"), "*fp32")


def loads(kernel: triton.JITFunction, layout: str) -> list[str]:
    names = [parameter.name for parameter in kernel.params]
    constants = {name: value for name, value in (SWITCHES | LAYOUTS[layout]).items() if name in names}
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    # What a launch finds out for itself: memory that begins at, and sizes that are, multiples of 16.
    sixteen = {name for name in names if name in POINTERS or name in ("rows", "channels") or name.startswith("stride")}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in sixteen - set(constants)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    assert made.asm["cubin"]
    return sorted(set(re.findall(r"ld\.global\.\S+", made.asm["ptx"])))


if __name__ == "__main__":
    kernels = {name: value for name, value in vars(fused).items() if name.endswith("_kernel")}
    print(json.dumps({layout: {name: loads(one, layout) for name, one in kernels.items()} for layout in LAYOUTS}))
