import math
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import nn

from largebatch.base.errors import UserError
from largebatch.config.groups import ModelConfig
from largebatch.models import build_model, initialise
from largebatch.models.build import build_on_meta, check_shapes, residual_batchnorms

RESNET50 = ModelConfig(name="resnet50", source="torchvision", init="auto", zero_gamma=True, stem_stride=1)
SMALL = replace(RESNET50, name="resnet8", source="own")


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    model = build_model(RESNET50, 1000, 3)
    assert initialise(model, RESNET50) == []
    return model


def test_resnet50_has_the_papers_parameters_and_torchvisions_names(resnet50):
    assert sum(p.numel() for p in resnet50.parameters()) == 25_557_032
    assert list(resnet50.state_dict()) == list(torchvision.models.resnet50().state_dict())


def test_downsampling_bottlenecks_stride_on_the_3x3_convolution(resnet50):
    strided = {name for name, m in resnet50.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    blocks = ("layer2.0", "layer3.0", "layer4.0")
    assert strided == {"conv1", *(f"{b}.conv2" for b in blocks), *(f"{b}.downsample.0" for b in blocks)}
    assert all(resnet50.get_submodule(f"{block}.conv2").kernel_size == (3, 3) for block in blocks)


def test_convolutions_are_hes_and_the_linear_layer_is_narrow(resnet50):
    drawn = {name: module for name, module in resnet50.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert len(drawn) == 54
    for name, module in drawn.items():
        weight = module.weight.double()
        std = 0.01 if name == "fc" else math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
        count = weight.numel()
        # Five standard errors of a normal sample's mean and standard deviation.
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), name
        assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * count), name
        kurtosis = ((weight / std) ** 4).mean().item()
        assert abs(kurtosis - 3) < 5 * math.sqrt(96 / count), name  # normal: a uniform draw has 1.8
    assert not resnet50.fc.bias.any()


def test_gamma_is_zero_in_the_last_batchnorm_of_every_block_alone(resnet50):
    norms = {name: module for name, module in resnet50.named_modules() if isinstance(module, nn.BatchNorm2d)}
    zero = {name for name, norm in norms.items() if not norm.weight.any()}
    blocks = {1: 3, 2: 4, 3: 6, 4: 3}
    assert zero == {f"layer{stage}.{block}.bn3" for stage, count in blocks.items() for block in range(count)}
    assert all(norm.weight.eq(1).all() for name, norm in norms.items() if name not in zero)
    assert not any(norm.bias.any() for norm in norms.values())


@pytest.mark.parametrize(
    ("source", "name", "last", "count"),
    [
        ("torchvision", "resnet18", "bn2", 8),
        ("torchvision", "resnext50_32x4d", "bn3", 16),
        ("timm", "resnet26", "bn3", 8),
        ("timm", "resnet10t", "bn2", 4),
        ("own", "resnet20", "bn2", 9),
    ],
)
def test_residual_blocks_are_known_by_type(source, name, last, count):
    model = build_on_meta(replace(RESNET50, source=source, name=name), 10, 3)
    norms = residual_batchnorms(model)
    assert len(norms) == count
    assert all(norm is getattr(model.get_submodule(block), last) for block, norm in norms.items())


def test_gamma_of_one_is_a_choice():
    model = build_model(SMALL, 10, 1)
    initialise(model, replace(SMALL, zero_gamma=False))
    assert all(module.weight.eq(1).all() for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_a_models_own_initialisation_stays_where_the_papers_does_not_apply():
    config = replace(RESNET50, source="timm", name="vit_tiny_patch16_224")
    model = build_model(config, 10, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert initialise(model, config) == ["initialisation is timm's own (not a residual network whose blocks are known)"]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    notes = initialise(model, replace(config, init="paper"))
    assert any("no block of a known kind" in note for note in notes)
    assert any("LayerNorm" in note for note in notes)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_own_initialisation_can_be_asked_for():
    config = replace(RESNET50, name="resnet18", init="own")
    model = build_model(config, 10, 3)
    assert initialise(model, config) == ["initialisation is torchvision's own (requested)"]
    assert model.layer1[0].bn2.weight.eq(1).all()


@pytest.mark.parametrize("name", ["resnet50", "regnetx_002", "efficientnet_b0", "mobilenetv3_small_100"])
def test_timms_models_have_timms_parameters(name):
    count = sum(p.numel() for p in build_on_meta(replace(RESNET50, source="timm", name=name), 7, 1).parameters())
    assert count == sum(p.numel() for p in timm.create_model(name, num_classes=7, in_chans=1).parameters())


@pytest.mark.parametrize(
    ("config", "channels", "words"),
    [
        (replace(RESNET50, name="resnet5"), 3, r"resnet5 is not a torchvision classifier\. Did you mean 'resnet50'\?"),
        (replace(RESNET50, name="fasterrcnn_resnet50_fpn"), 3, "is not a torchvision classifier"),
        (replace(RESNET50, name="null"), 3, "model=torchvision needs model.name"),
        (RESNET50, 1, "takes images of 3 channels, these have 1: use one of our own"),
        (replace(RESNET50, source="timm", name="resnet50x"), 3, r"not a timm model\. Did you mean 'resnet50\w?'\?"),
        (replace(SMALL, name="resnet9"), 3, "resnet9 is not one of our small networks: resnet8, resnet14, resnet20"),
        (replace(SMALL, name="vgg"), 3, "not one of our small networks"),
    ],
)
def test_a_name_or_shape_that_a_source_does_not_have_is_refused(config, channels, words):
    with pytest.raises(UserError, match=words):
        build_on_meta(config, 10, channels)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    ("config", "images", "words"),
    [
        (replace(RESNET50, name="resnet18"), (1, 3, 32, 32), "n=1 leaves a BatchNorm .* a single value .* Use n ≥ 2"),
        (replace(RESNET50, name="alexnet"), (4, 3, 8, 8), "alexnet does not take images of 3×8×8"),
        (
            replace(RESNET50, name="vit_b_16"),
            (4, 3, 64, 64),
            "vit_b_16 does not take .*: Wrong image height.* 224 but got",
        ),
        (
            replace(RESNET50, name="vit_tiny_patch16_224", source="timm"),
            (4, 3, 64, 64),
            r"3×64×64: Input height \(64\) doesn't match model \(224\)\. model.kwargs={img_size: 64} makes",
        ),
        (replace(RESNET50, name="inception_v3"), (4, 3, 299, 299), "auxiliary outputs are not supported"),
    ],
)
def test_images_that_a_network_cannot_train_on_are_refused(config, images, words):
    with pytest.raises(UserError, match=words):
        check_shapes(config, 10, images)


def test_one_sample_is_enough_where_the_map_is_larger():
    check_shapes(SMALL, 10, (1, 1, 8, 8))
    check_shapes(RESNET50, 10, (1, 3, 64, 64))
