import math

import pytest
import timm
import torch
from torch import nn

from recipe.config import trains_no_batchnorm
from recipe.model.batchnorm import BatchNorm
from recipe.model.build import build_model, parameter_counts, parameter_groups


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return build_model("resnet50", num_classes=1000, seed=0, statistics="global")


def hand_counted_resnet50() -> tuple[int, int]:
    """Weights of convolutions and classifier; γ, β and the classifier's bias (He et al. 2016, Table 1)."""
    weights, channels = 3 * 7 * 7 * 64, 64
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        weights += inputs * 4 * width  # the projection on the first block's shortcut
        channels += 4 * width
        for _ in range(blocks):
            weights += inputs * width + 3 * 3 * width * width + width * 4 * width
            channels += width + width + 4 * width
            inputs = 4 * width
    return weights + 2048 * 1000, 2 * channels + 1000


def test_resnet50_has_the_papers_parameters(resnet50: nn.Module) -> None:
    assert hand_counted_resnet50() == (25_502_912, 2 * 26_560 + 1000)
    assert parameter_counts(resnet50) == hand_counted_resnet50()
    assert sum(parameter.numel() for parameter in resnet50.parameters()) == 25_557_032


def test_resnet50_strides_on_the_3x3_convolution(resnet50: nn.Module) -> None:
    strided = [
        (name.split(".")[-1], module.kernel_size)
        for name, module in resnet50.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2) and "downsample" not in name
    ]
    assert strided == [("conv1", (7, 7))] + 3 * [("conv2", (3, 3))]


def test_resnet50_is_initialised_as_in_the_paper(resnet50: nn.Module) -> None:
    for name, module in resnet50.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            # The sample's std errs by std / √(2n), its mean by std / √n: five of those for each of 53 layers.
            n = module.weight.numel()
            assert abs(module.weight.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(n), name
        elif isinstance(module, BatchNorm):
            assert torch.all(module.weight == (0 if name.endswith("bn3") else 1)), name
            assert torch.all(module.bias == 0), name
    assert sum(name.endswith("bn3") for name, _ in resnet50.named_modules()) == 16
    assert resnet50.fc.weight.std().item() == pytest.approx(0.01, rel=5 / math.sqrt(2 * 2_048_000))
    assert torch.all(resnet50.fc.bias == 0)


@pytest.mark.parametrize("name", ["resnet18", "seresnext26d_32x4d", "test_resnet"])
def test_every_resnet_ends_its_blocks_with_zeros(name: str) -> None:
    model = build_model(name, num_classes=4, seed=0, statistics="local")
    blocks = [block for block in model.modules() if hasattr(block, "zero_init_last")]
    for block in blocks:
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        assert torch.all(last.weight == 0)
    zeros = sum(bool(torch.all(m.weight == 0)) for m in model.modules() if isinstance(m, BatchNorm))
    assert zeros == len(blocks) > 0


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "test_resnet"])
def test_blocks_end_with_ones_where_that_is_asked_for_and_all_else_is_the_same(name: str) -> None:
    zeros, ones = (
        build_model(name, num_classes=4, seed=0, statistics="local", zero_init_last=zero) for zero in (True, False)
    )
    norms = [module for module in ones.modules() if isinstance(module, BatchNorm)]
    assert all(torch.all(norm.weight == 1) for norm in norms)
    differing = [key for key, value in zeros.state_dict().items() if not torch.equal(value, ones.state_dict()[key])]
    blocks = sum(hasattr(module, "zero_init_last") for module in ones.modules())
    assert len(differing) == blocks > 0


def test_ones_at_the_blocks_ends_are_refused_for_other_architectures() -> None:
    with pytest.raises(ValueError, match=r"recipe\.model\.zero_init_last = false: test_vit is no ResNet"):
        build_model("test_vit", num_classes=4, seed=0, statistics="local", zero_init_last=False)


def test_other_architectures_keep_timms_initialisation() -> None:
    built = build_model("test_efficientnet", num_classes=4, seed=3, statistics="local")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = timm.create_model("test_efficientnet", num_classes=4)
    torch.testing.assert_close(built.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_the_seed_decides_the_weights_and_no_other_generator_moves() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        build_model("test_resnet", num_classes=4, seed=seed, statistics="global").state_dict() for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_a_built_model_classifies() -> None:
    model = build_model("test_resnet", num_classes=7, seed=0, statistics="global")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_efficientnet", "vit_tiny_patch16_224"])
def test_groups_hold_each_parameter_once_in_order(name: str) -> None:
    model = build_model(name, num_classes=4, seed=0, statistics="global")
    decayed, undecayed = parameter_groups(model, weight_decay=1e-4)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (1e-4, 0.0)
    position = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    for group in (decayed, undecayed):
        places = [position[id(parameter)] for parameter in group["params"]]
        assert places == sorted(places)
    places = [position[id(parameter)] for group in (decayed, undecayed) for parameter in group["params"]]
    assert sorted(places) == list(range(len(position)))
    # These four have no matrix that is not a kernel, other than the tokens and embeddings.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert {names[id(p)] for p in undecayed["params"] if p.ndim > 1} <= {
        "pos_embed",
        "cls_token",
        "reg_token",
    }
    assert ("pos_embed" in names.values()) == ("vit" in name)


def test_groups_leave_out_the_frozen_and_count_the_shared_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    decayed, undecayed = parameter_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert [id(p) for p in undecayed["params"]] == [id(p) for p in (model[1].bias, *model[2].parameters())]
    assert parameter_counts(model) == (9, 9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt50", 'recipe.model.name = "resnt50": timm has no such model; did you mean "resnet50"?'),
        ("?", 'recipe.model.name = "?": timm has no such model'),
        ("", 'recipe.model.name = "": timm has no such model'),
        ("resnet50.a1_in1", 'timm has no such model; did you mean "resnet50.a1_in1k"?'),
        # Known, and not at hand: tests fetch nothing.
        ("resnet50.a1_in1k", "the weights resnet50.a1_in1k cannot be fetched: .*; write a file or folder on this "),
        ("hf-hub:timm/resnet50.a1_in1k", 'goes into recipe.model.weights; did you mean "resnet50.a1_in1k"?'),
        ("timm/resnet18", 'goes into recipe.model.weights; did you mean "resnet18"?'),
        ("local-dir:weights/resnet50", 'goes into recipe.model.weights; did you mean "resnet50"?'),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_model(name, num_classes=10, seed=0, statistics="global")


def test_what_cannot_classify_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe\.model\.num_classes = 0: a classifier needs at least 1"):
        build_model("resnet18", num_classes=0, seed=0, statistics="global")
    with pytest.raises(ValueError, match='"qwen3_vit_88m_enc": timm makes no classifier of it'):
        build_model("qwen3_vit_88m_enc", num_classes=10, seed=0, statistics="global")


@pytest.mark.slow
def test_what_is_said_to_lack_batch_norm_has_none() -> None:
    """Of each of timm's files the model with the shortest name, which is a small one."""
    shortest: dict[str, str] = {}
    known = [name for name in timm.list_models() if trains_no_batchnorm(name, "none")]
    for name in sorted(known, key=len, reverse=True):
        shortest[timm.model_entrypoint(name).__module__] = name
    assert len(shortest) > 30
    for name in shortest.values():
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        assert not [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)], name
    for name in ("resnet50", "vit_base_resnet26d_224", "coatnet_0_224", "xcit_tiny_24_p16_384", "vgg16_bn"):
        assert not trains_no_batchnorm(name, "none")
