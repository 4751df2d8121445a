"""Run by a test in a process of its own, since oneDNN reads ONEDNN_MAX_CPU_ISA once."""

from test_saturation import adversarial

from largebatch.base.errors import UserError
from largebatch.quantization.engines import x86
from largebatch.quantization.reference import Reference

print(f"overflows={x86.overflows()}")
try:
    x86.X86().load(adversarial(safe=False)[0])
except UserError as error:
    print(f"refused={error}")
for name in ("unsafe", "safe"):
    network, images = adversarial(safe=name == "safe")
    units = (x86.load_unchecked(network)(images) - Reference().load(network)(images)).abs().max() / 0.25
    print(f"{name}_difference={units}")
