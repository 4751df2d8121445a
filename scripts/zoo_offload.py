"""The part of the zoo's table about offloading: outputs of every mode against those of weights that never move.

Device memory is host memory here, and what may no longer be read in it is overwritten: a weight that is read too early
or too late changes the outputs.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from largebatch.base.errors import UserError
from largebatch.offloading import offload as offloaded
from largebatch.offloading.plan import Bus, make_plans
from largebatch.offloading.transport import CpuTransport, Slot

PASSES = 3
SHARE = 0.7  # of all weights: a budget between the least and all
WAYS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "model": {"mode": "model"},
    "submodule": {"mode": "submodule"},
    "submodule, leaf": {"mode": "submodule", "groups": "leaf"},
    "submodule, blocks": {"mode": "submodule", "groups": "blocks"},
    "submodule, budget": {"mode": "submodule"},
}
# One or two of each family, those first whose modules read weights of others or write into buffers.
NETWORKS = """
    timm/swin_tiny_patch4_window7_224 timm/swinv2_tiny_window8_256 timm/swinv2_cr_tiny_ns_224 torchvision/swin_t
    torchvision/swin_v2_t timm/beit_base_patch16_224 timm/eva02_tiny_patch14_224 timm/vit_tiny_patch16_dinov3_qkvb
    torchvision/vit_b_16 torchvision/vit_b_32 timm/deit_tiny_patch16_224 timm/cait_xxs24_224 timm/convit_tiny
    timm/crossvit_tiny_240 timm/xcit_nano_12_p16_224 timm/hiera_tiny_224 timm/levit_128s timm/mvitv2_tiny
    timm/nest_tiny timm/pit_ti_224 timm/pvt_v2_b0 timm/twins_pcpvt_small timm/vit_srelpos_small_patch16_224
    timm/coatnet_rmlp_nano_rw_224 timm/maxxvit_rmlp_nano_rw_256 timm/mixer_s32_224 timm/resmlp_12_224
    timm/poolformer_s12 timm/convnext_atto torchvision/convnext_tiny timm/mobilevit_xxs timm/edgenext_xx_small
    timm/efficientformer_l1 timm/fastvit_t8 timm/nf_ecaresnet26 timm/resnetv2_50x1_bit timm/resnest14d
    timm/res2net50_26w_4s timm/mixnet_s timm/hrnet_w18_small timm/ghostnet_050 timm/gcvit_xxtiny
    torchvision/resnet50 torchvision/densenet121 torchvision/googlenet torchvision/mobilenet_v3_large
    torchvision/efficientnet_b0 torchvision/regnet_y_400mf torchvision/shufflenet_v2_x1_0
"""


class _Overwriting(CpuTransport):
    """Puts NaN wherever weights were, when they may not be read any more."""

    def record(self, slot: Slot) -> None:
        slot.memory.fill_(0xFF)

    def release(self, slot: Slot) -> None:
        slot.memory.fill_(0xFF)
        super().release(slot)


def offload(model: nn.Module, size: int) -> dict[str, Any]:
    """Return how a network offloads: ``outcome`` is equal, or the worst of its ways.

    Args:
        model: In evaluation mode.
        size: Height and width of its images, pixels.
    """
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 3, size, size, generator=generator) for _ in range(PASSES)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    ways, facts = {}, {}
    for name, how in WAYS.items():
        how = dict(how)
        if name == "submodule, budget":
            # Where one layer is most of the weights, the least is more.
            how["budget"] = max(int(SHARE * facts["weight_bytes"]), facts.get("peak_bytes", 0))
        ways[name] = _try(model, batches, expected, how, facts)
        state = model.state_dict()
        if any(not torch.equal(state[key], before[key]) for key in before):
            ways[name] = "differs: the model is not what it was"
    worst = [kind for kind in ("traceback", "differs", "refused") if any(way.startswith(kind) for way in ways.values())]
    causes = {name: way for name, way in ways.items() if way != "equal"}
    return {
        "outcome": worst[0] if worst else "equal",
        **({"cause": "; ".join(f"{name}: {way}" for name, way in causes.items())} if causes else {}),
        "ways": ways,
        **facts,
    }


def _try(
    model: nn.Module, batches: list[Tensor], expected: list[Any], how: dict[str, Any], facts: dict[str, Any]
) -> str:
    try:
        plan = None
        if how == WAYS["submodule"]:
            plan = make_plans({"": model}, len(batches), Bus(1e9, 1e-6), examples={"": batches[0][:1]})[1]
        with offloaded(model, "cpu", transport=_Overwriting(), **how) as statistics:
            outputs = [model(batch) for batch in batches]
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:  # the row says so: an error of this kind is what the table is to find
        return f"traceback: {error!r:.300} {traceback.format_exc()[-1500:]}"
    facts["weight_bytes"] = statistics.weight_bytes
    if plan is not None:
        facts |= {"peak_bytes": statistics.peak_bytes, "groups": statistics.groups, "kept_bytes": statistics.kept_bytes}
        if plan.peak_bytes != statistics.peak_bytes:
            return f"differs: planned are {plan.peak_bytes:,} bytes on the device"
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True)
    same = all(torch.equal(one, other) if isinstance(one, Tensor) else one == other for one, other in pairs)
    return "equal" if same else "differs: outputs"
