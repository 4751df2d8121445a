"""Quantize a run by onnxruntime's own means, on the images that ours was calibrated on, and compare their top-1.

    python scripts/peers/integers_error.py RUN [IMAGES]

RUN has been quantized by `largebatch quantize run=RUN images=IMAGES` (512). The peer: static, by channel, 8-bit
unsigned activations, its defaults else. It prints one JSON object: errors in % and what both lose, in points, on the
same images.
"""

import json
import sys
import warnings

import torch
from integers import onnxruntime_sides

from largebatch.cli.compose import configuration_directory
from largebatch.inference.config import EvalConfig
from largebatch.inference.session import open_session
from largebatch.quantization.degradation import answers, compare
from largebatch.quantization.pipeline import calibration_images


def main(run: str, images: int) -> None:
    """Print the comparison."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(version_base="1.3", config_dir=str(configuration_directory())):
        values = OmegaConf.to_container(compose("train", overrides=["device=cpu"]), resolve=True)
    values.pop("experiment", None)
    asked = EvalConfig.of(run, None, "last")
    floats = open_session(asked, values, ["device"])
    integers = open_session(type(asked)(**{**vars(asked), "quantized": True}), values, ["device"])
    (subject,), (model,), (ours,) = floats.subjects, floats.models.values(), integers.models.values()
    calibration = torch.cat(list(calibration_images(floats.source, subject.config.seed, images)))
    static = onnxruntime_sides(model, calibration)["onnxruntime_static"]
    sides = {"floats": model, "ours": ours, "peer": lambda images: torch.from_numpy(static(images)[0])}
    said = {name: answers(program, floats.source.validation(floats.cuts)) for name, program in sides.items()}
    lost = {name: compare(said["floats"], said[name]) for name in ("ours", "peer")}
    print(json.dumps({"run": run, "images": images, **lost}, indent=2))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 512)
