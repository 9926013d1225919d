"""What the name of a timm model says about its batch norm, without building the model."""

import re

# timm models without batch norm, tried on all 1,371 of timm 1.0.31; tests build one of each kind. A model that does not
# match can have batch norm or not.
_WITHOUT_BATCHNORM = re.compile(
    r"(aimv2|beit|caformer|cait|coat_|coatnext|convformer|convit|convnext|crossvit|davit|deit|dm_nfnet|eca_nfnet"
    r"|edgenext|eva|flexivit|focalnet|gcvit|gmixer|gmlp|hiera|mambaout|maxxvit|mixer|mvitv2|naflexvit|nest|nf_|nfnet"
    r"|pit_|poolformer|pvt|rdnet|resmlp|samvit|sequencer2d|swin|test_(convnext|mambaout|nfnet|vit)|tnt|twins"
    r"|vit(?!.*(mci|resnet)))\w*|\w*_(bit|gn)|vgg\d\d"
)


def trains_no_batchnorm(name: str, freeze: str) -> bool:
    """Whether a timm model, with or without a tag, is known to train no batch norm under ``recipe.model.freeze``."""
    return freeze == "backbone" or _WITHOUT_BATCHNORM.fullmatch(name.partition(".")[0]) is not None
