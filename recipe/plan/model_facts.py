"""What a plan knows of a model without building it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model.

    ``saved_bytes`` is what a forward pass keeps for the backward pass, a precision and image of ``image_size`` pixels
    a side: the distinct storages among the tensors that autograd saves, without the parameters. ``largest_parameter``
    counts values, as ``decayed_parameters`` and ``undecayed_parameters`` do.
    """

    decayed_parameters: int
    undecayed_parameters: int
    largest_parameter: int
    batchnorm_layers: int
    batchnorm_channels: int
    image_size: int
    saved_bytes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """Values that are trained."""
        return self.decayed_parameters + self.undecayed_parameters

    def saved_bytes_at(self, precision: str, image_size: int) -> float:
        """Bytes an image of another size: feature maps grow with the area."""
        return self.saved_bytes[precision] * (image_size / self.image_size) ** 2


# The shipped configs' models, by name and classes; tests hold them against the models themselves. Any other is
# inspected: ``python -m recipe plan --inspect``.
SHIPPED: Mapping[tuple[str, int], ModelFacts] = {
    ("resnet50", 1000): ModelFacts(
        decayed_parameters=25_502_912,
        undecayed_parameters=54_120,
        largest_parameter=2_359_296,
        batchnorm_layers=53,
        batchnorm_channels=26_560,
        image_size=224,
        saved_bytes={"fp32": 85_913_512, "fp16": 43_761_576, "bf16": 43_761_576, "fp64": 170_221_384},
    ),
    ("resnet18", 10): ModelFacts(
        decayed_parameters=11_172_032,
        undecayed_parameters=9_610,
        largest_parameter=2_359_296,
        batchnorm_layers=20,
        batchnorm_channels=4_800,
        image_size=64,
        saved_bytes={"fp32": 1_812_528, "fp16": 971_824, "bf16": 971_824, "fp64": 3_493_976},
    ),
    ("test_resnet", 10): ModelFacts(
        decayed_parameters=371_568,
        undecayed_parameters=2_090,
        largest_parameter=165_888,
        batchnorm_layers=15,
        batchnorm_channels=1_040,
        image_size=32,
        saved_bytes={"fp32": 238_896, "fp16": 127_664, "bf16": 127_664, "fp64": 461_400},
    ),
}
