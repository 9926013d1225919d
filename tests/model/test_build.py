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


def test_resnet50_has_the_papers_parameters(resnet50: nn.Module) -> None:
    """He et al. (2016), Table 1, counted by hand: weights of convolutions and classifier; γ, β and the biases."""
    assert parameter_counts(resnet50) == (25_502_912, 2 * 26_560 + 1000)


def test_resnet50_is_initialised_as_in_the_paper(resnet50: nn.Module) -> None:
    for name, module in resnet50.named_modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            # The standard errors of a sample's std and mean are std / √(2n) and std / √n; allow five of them.
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
def test_zero_init_last_decides_only_the_last_gammas_of_the_blocks(name: str) -> None:
    zeros, ones = (
        build_model(name, num_classes=4, seed=0, statistics="local", zero_init_last=zero) for zero in (True, False)
    )
    blocks = [block for block in zeros.modules() if hasattr(block, "zero_init_last")]
    for block in blocks:
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        assert torch.all(last.weight == 0)
    assert all(torch.all(module.weight == 1) for module in ones.modules() if isinstance(module, BatchNorm))
    differing = [key for key, value in zeros.state_dict().items() if not torch.equal(value, ones.state_dict()[key])]
    assert len(differing) == len(blocks) > 0


def test_zero_init_last_false_is_refused_for_other_architectures() -> None:
    with pytest.raises(ValueError, match=r"recipe\.model\.zero_init_last = false: test_vit is not a ResNet"):
        build_model("test_vit", num_classes=4, seed=0, statistics="local", zero_init_last=False)


def test_other_architectures_keep_timms_initialisation() -> None:
    built = build_model("test_efficientnet", num_classes=4, seed=3, statistics="local")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = timm.create_model("test_efficientnet", num_classes=4)
    torch.testing.assert_close(built.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_weights_depend_on_the_seed_and_the_global_generator_is_unchanged() -> None:
    state = torch.get_rng_state()
    first, again, other = (
        build_model("test_resnet", num_classes=4, seed=seed, statistics="global").state_dict() for seed in (7, 7, 8)
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_efficientnet", "vit_tiny_patch16_224"])
def test_groups_hold_each_parameter_once_in_order(name: str) -> None:
    model = build_model(name, num_classes=4, seed=0, statistics="global")
    decayed, undecayed = parameter_groups(model, weight_decay=1e-4)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (1e-4, 0.0)
    # In these models all matrices are kernels, except for tokens and embeddings.
    names: tuple[list[str], list[str]] = ([], [])
    for parameter_name, parameter in model.named_parameters():
        names[parameter.ndim < 2 or parameter_name in ("pos_embed", "cls_token", "reg_token")].append(parameter_name)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    assert tuple([by_id[id(parameter)] for parameter in group["params"]] for group in (decayed, undecayed)) == names


def test_groups_skip_frozen_and_count_shared_parameters_once() -> None:
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
        ("resnet50.", 'recipe.model.name = "resnet50.": timm has no such model'),
        ("resnet50.a1_in1", 'timm has no such model; did you mean "resnet50.a1_in1k"?'),
        # A known name, but tests do not download weights.
        ("resnet50.a1_in1k", "the weights resnet50.a1_in1k cannot be fetched: .*; name a file or folder on this "),
        ("hf-hub:timm/resnet50.a1_in1k", 'goes into recipe.model.weights; did you mean "resnet50.a1_in1k"?'),
        ("timm/resnet18", 'goes into recipe.model.weights; did you mean "resnet18"?'),
        ("local-dir:weights/resnet50", 'goes into recipe.model.weights; did you mean "resnet50"?'),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_model(name, num_classes=10, seed=0, statistics="global")


def test_a_model_that_is_not_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match='"qwen3_vit_88m_enc": timm cannot build a classifier from it'):
        build_model("qwen3_vit_88m_enc", num_classes=10, seed=0, statistics="global")


@pytest.mark.slow
def test_models_listed_without_batch_norm_have_none() -> None:
    """Builds the model with the shortest name, usually a small one, of each of timm's files."""
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
