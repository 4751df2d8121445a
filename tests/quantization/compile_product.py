"""Make machine code for an H100 from the kernel for bytes, which needs no GPU; print how it multiplies and loads."""

import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from largebatch.quantization.engines.kernels import integer_product

AXES = ("HEIGHT", "WIDTH")
POINTERS = {"x": "*u8", "weight": "*i8", "bias": "*i32", "multiplier": "*fp32", "residual": "*u8", "y": "*u8"}
CONSTANTS = {f"{name}_{axis}": value for axis in AXES for name, value in {"KERNEL": 3, "PADDING": 1}.items()}
CONSTANTS |= {f"{name}_{axis}": 1 for axis in AXES for name in ("STRIDE", "DILATION")}
CONSTANTS |= {"RESIDUAL": True, "REAL": False, "ROWS": 128, "OUTPUTS": 64, "INPUTS": 64}

names = [parameter.name for parameter in integer_product.params]
kinds = {**POINTERS, **dict.fromkeys(CONSTANTS, "constexpr"), "multiplier_r": "fp32"}
signature = {name: kinds.get(name, "i32") for name in names}
# What a launch finds out for itself: memory that begins at, and sizes that are, multiples of 16.
sixteen = {*POINTERS, "inputs", "outputs"}
aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in sixteen}
source = ASTSource(integer_product, signature, CONSTANTS, aligned)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
assert made.asm["cubin"]
print("\n".join(sorted(set(re.findall(r"(?:wgmma\.mma_async|cp\.async|st\.global)\.\S+", made.asm["ptx"])))))
