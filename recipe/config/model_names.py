"""What timm's name of a model tells, without building it."""

import re

# Names of timm's models that have no batch norm, tried on all 1,371 of timm 1.0.31; tests build one of each kind. Of
# other names nothing is known here: their models may have some or not.
_WITHOUT_BATCHNORM = re.compile(
    r"(aimv2|beit|caformer|cait|coat_|coatnext|convformer|convit|convnext|crossvit|davit|deit|dm_nfnet|eca_nfnet"
    r"|edgenext|eva|flexivit|focalnet|gcvit|gmixer|gmlp|hiera|mambaout|maxxvit|mixer|mvitv2|naflexvit|nest|nf_|nfnet"
    r"|pit_|poolformer|pvt|rdnet|resmlp|samvit|sequencer2d|swin|test_(convnext|mambaout|nfnet|vit)|tnt|twins"
    r"|vit(?!.*(mci|resnet)))\w*|\w*_(bit|gn)|vgg\d\d"
)


def lacks_batchnorm(name: str) -> bool:
    """Whether timm's model of this name, with a tag or without, is known to have no batch norm, without building it."""
    return _WITHOUT_BATCHNORM.fullmatch(name.partition(".")[0]) is not None


def trains_no_batchnorm(name: str, freeze: str) -> bool:
    """Whether a model of timm's ``name`` has no batch norm, or none that is trained with what ``freeze`` leaves."""
    return freeze == "backbone" or lacks_batchnorm(name)
