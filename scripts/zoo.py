"""Try real networks of torchvision and timm, with random weights: do they quantize, are they right when offloaded?

    nice -n 19 python scripts/zoo.py quantize
    nice -n 19 python scripts/zoo.py offload --minutes 30
    python scripts/zoo.py table

Each network is tried in a process of its own, on one thread, with small images where it takes them. A line of JSON a
network is appended to results/zoo/PART.jsonl; a network that has one is not tried again, so that an interrupted table
goes on. Names behind the part are tried alone, and again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results/zoo"
PATIENCE = 1800  # seconds a network
# Without those that take minutes or more than 16 GB.
LARGE = """
    vit_h_14 vit_l_16 vit_l_32 regnet_y_128gf regnet_x_32gf regnet_y_32gf regnet_x_16gf regnet_y_16gf convnext_base
    convnext_large efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_m efficientnet_v2_l
    resnext101_64x4d wide_resnet101_2 swin_v2_b
"""
# The smallest of each family, with its images' height and width where it takes no others than one size.
TIMM = """
    beit_base_patch16_224@224 halonet_h1@256 mobileone_s1 cait_xxs24_224@224 coat_tiny@224 convit_tiny@224
    convmixer_768_32 convnext_atto cpubone_nano crossvit_tiny_240@240 csatv2@512 cs3darknet_focus_s cspnext_tiny
    davit_tiny deit_tiny_patch16_224@224 densenetblur121d dla46x_c dpn48b edgenext_xx_small efficientformer_l1@224
    efficientformerv2_s0@224 tf_efficientnet_lite0 mixnet_s efficientvim_m1 efficientvit_b0 efficientvit_m0@224
    eva02_tiny_patch14_224@224 vit_tiny_patch16_dinov3_qkvb@256 fasternet_t0 fastvit_t8@128 focalnet_tiny_srf
    gcvit_xxtiny@224 ghostnet_050 ghostnetv3_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224@224 hrnet_w18_small
    iformer_t inception_next_atto inception_resnet_v2@96 inception_v4@96 lcnetv2_small levit_128s@224
    levit_conv_128s@224 lowformer_b0 mambaout_femto coatnet_rmlp_nano_rw_224@224 maxxvit_rmlp_nano_rw_256@256
    poolformer_s12 caformer_s18 mixer_s32_224@224 resmlp_12_224@224 lcnet_035 mobilenetv3_small_050 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny@224 nest_tiny@224 nextvit_small dm_nfnet_f0 nf_ecaresnet26 pit_ti_224@224
    pvt_v2_b0@224 rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest14d ecaresnet26t
    resnetv2_50x1_bit resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224@224 swinv2_tiny_window8_256@256 swinv2_cr_tiny_ns_224@224
    tiny_vit_5m_224@224 tresnet_m twins_pcpvt_small@224 visformer_tiny@224 vit_tiny_r_s16_p8_224@224
    vit_srelpos_small_patch16_224@224 xcit_nano_12_p16_224@224
"""


def networks() -> dict[str, int]:
    """Return the names of the networks and the height and width of their images, pixels."""
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    others = {"vit_b_16": 224, "vit_b_32": 224, "maxvit_t": 224, "inception_v3": 96}
    entries = (entry.partition("@") for entry in TIMM.split())
    of_timm = {f"timm/{name}": int(size or 64) for name, _, size in entries}
    return of_timm | {f"torchvision/{name}": others.get(name, 64) for name in names if name not in LARGE.split()}


def build(network: str, size: int) -> Any:
    """Return a network with random weights, in evaluation mode."""
    import timm
    import torch
    import torchvision

    torch.manual_seed(0)
    library, _, name = network.partition("/")
    if library == "timm":
        model = timm.create_model(name)
    else:
        without = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **without)
    return model.eval().requires_grad_(False)


def quantize(network: str, size: int) -> dict[str, Any]:
    """Return how a network quantizes: ``outcome`` is integers, mostly floats, or the kind of its refusal."""
    import torch

    from largebatch.base.errors import Fault, UserError
    from largebatch.quantization import pipeline
    from largebatch.quantization.choose import choose
    from largebatch.quantization.layers import decibels

    model = build(network, size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    try:
        quantized = pipeline.quantize(model, (3, size, size), [images])
    except UserError as error:
        return {"outcome": "refused", "cause": str(error)}
    except Fault as error:
        return {"outcome": "fault", "cause": str(error)}
    share, size_ratio, lowered = quantized.integer_share(), quantized.size_ratio(), quantized.network
    engine = choose("auto", "cpu")
    with torch.inference_mode():
        expected = model(images)
        noise = decibels(expected, engine.load(lowered)(images))
    mostly = share >= 0.5 >= size_ratio  # where `largebatch quantize` draws the line
    return {
        "outcome": "integers" if mostly else "mostly floats",
        "integer_share": round(share, 4),
        "size_ratio": round(size_ratio, 4),
        "decibels": round(noise, 2),
        "round_trips": sum(node.operator == "quantize" for node in lowered),
        "integer_operators": len(lowered.integer_operators),
        "in_floats": dict(Counter(node.attributes["target"] for node in lowered if node.operator == "float")),
    }


def offload(network: str, size: int) -> dict[str, Any]:
    """Return whether a network computes the same in every mode of offloading: ``outcome`` is equal, or another."""
    import zoo_offload

    return zoo_offload.offload(build(network, size), size)


PARTS = {"quantize": quantize, "offload": offload}
MEMORY = 12 * 2**30  # bytes a network's process may have


def limited_memory() -> None:
    """Let this process end with an error before it takes the machine's memory from others."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def networks_of(part: str) -> dict[str, int]:
    """Return the networks that a part tries, with their sizes."""
    import zoo_offload

    sizes = networks()
    return {name: sizes[name] for name in zoo_offload.NETWORKS.split()} if part == "offload" else sizes


def one(part: str, network: str, size: int) -> dict[str, Any]:
    """Return the row of a network, whatever it ends in."""
    started = time.process_time()
    limited_memory()
    try:
        facts = PARTS[part](network, size)
    except Exception as error:  # the row says so: an error of this kind is what the table is to find
        facts = {"outcome": "traceback", "cause": repr(error)[:500], "traceback": traceback.format_exc()[-3000:]}
    return {"network": network, "size": size, **facts, "cpu_seconds": round(time.process_time() - started, 1)}


def tried(part: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a part by network; of several, the last."""
    path = RESULTS / f"{part}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["network"]: row for row in map(json.loads, lines)}


def keep(part: str, row: dict[str, Any]) -> None:
    """Append a row."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{part}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def apart(part: str, network: str, size: int) -> dict[str, Any]:
    """Return the row of a network, from a process of its own that may fail in any way."""
    context = multiprocessing.get_context("fork")  # what is imported here is imported once for all of them
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(one(part, network, size)))
    process.start()
    sender.close()
    row: dict[str, Any] | None = None
    cause = f"not done after {PATIENCE} s"
    try:
        if receiver.poll(PATIENCE):
            row = receiver.recv()
    except EOFError:
        process.join()
        cause = f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row or {"network": network, "size": size, "outcome": "killed", "cause": cause}


def run(part: str, only: list[str], minutes: float) -> None:
    """Try the networks that have no row yet, or the named ones, for so many minutes."""
    import timm
    import torch

    torch.set_num_threads(1)
    if part == "quantize":  # what the first network has loaded need not be loaded again for each of the others
        from largebatch.quantization import pipeline

        small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten())
        pipeline.quantize(small.eval().requires_grad_(False), (3, 8, 8), [torch.randn(2, 3, 8, 8)])
    ends = time.monotonic() + 60 * minutes
    sizes = networks_of(part)
    done = tried(part)
    print(
        f"{part}: {len(done)} of {len(sizes)} networks have a row; timm {timm.__version__}, PyTorch {torch.__version__}"
    )
    for network in only or [name for name in sizes if name not in done]:
        if time.monotonic() > ends:
            print("time is up: the same command goes on")
            break
        row = apart(part, network, sizes[network])
        keep(part, row)
        print(network, row["outcome"], row.get("cause", "")[:200], flush=True)


def table() -> str:
    """Return the outcomes of every part, counted, and the causes of all that is not as it should be."""
    lines = []
    for part in PARTS:
        rows = tried(part).values()
        counts = Counter(row["outcome"] for row in rows)
        lines += [
            f"## {part}",
            "",
            f"{len(rows)} networks: {', '.join(f'{n} {what}' for what, n in counts.most_common())}",
        ]
        lines += ["", *(f"- {row['network']}: {row['outcome']}: {row['cause']}" for row in rows if "cause" in row), ""]
    return "\n".join(lines)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    if given.part == "table":
        print(table())
    else:
        run(given.part, given.networks, given.minutes)


if __name__ == "__main__":
    main()
