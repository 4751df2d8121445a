"""A real diffusion pipeline, unchanged, its components taking turns; needs the dependency group ``bench``."""

import numpy
import pytest
import torch

from largebatch.offloading import offload

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: uv sync --group bench")


def tiny_pipeline():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    pipeline = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.filterwarnings("default")  # of diffusers and what it imports
def test_a_diffusion_pipeline_gives_the_same_images(transport):
    pipeline = tiny_pipeline()

    def images():
        generator = torch.Generator().manual_seed(1)
        return pipeline([1, 2], generator=generator, num_inference_steps=3, output_type="np").images

    components = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    with offload(components, transport.device, mode="none"):
        expected = images()
    with offload(components, transport.device, mode="model", transport=transport) as statistics:
        result = images()
    assert numpy.array_equal(result, expected)
    assert numpy.isfinite(result).all()
    assert statistics.uploads == 2
    assert statistics.bytes_from_device == 0
    with offload(components, transport.device, mode="submodule", groups="leaf") as statistics:
        assert numpy.array_equal(images(), expected)
    assert statistics.peak_bytes < statistics.weight_bytes / 2
    assert statistics.departures == 0
