"""UniDetector without its decoupling: localizer and classifier are one network, trained at once.

    python -m benchmarks.claims.unidetector_coupled --datasets coco,o365 --tiny

The flags are those of unidetector.py, with a timm model as --classifier-backbone and no
--classifier-steps. Each of the --steps trains all losses. The classifier learns from the proposals
of that step, and reads the feature maps of the localizer, so that both shape them.

Note: the end-to-end baseline of the official code has a plain RPN and no objectness in its scores
  (zhenyuw16/UniDetector:configs/*/clip_end2end*). This one has those of the localizer, so that
  only the coupling differs.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

import unidetector
from common.backbone import Backbone
from common.command import run_command
from common.errors import InputError
from common.targets import Targets

Args, METHOD, MODEL_FIELDS = unidetector.Args, unidetector.METHOD, unidetector.MODEL_FIELDS
# as many steps as both stages of unidetector.py have
TINY = unidetector.TINY | {"steps": 700, "classifier_steps": 0}


class SharedMaps:
    """The backbone of a classifier: P3 to P5 of the localizer. It is no module of its own."""

    def __init__(self, backbone: Backbone):
        """backbone: of the localizer, with P2 to P6"""
        self.backbone = backbone
        self.normalise = backbone.normalise

    def __call__(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images)[1:4]


class Coupled(unidetector.Model):
    """The classifiers read the feature maps of the localizer. Its forward pass has all losses."""

    def __init__(self, *given, **settings):
        super().__init__(*given, **settings)
        for classifier in self.classifiers:
            del classifier.regions.backbone
            classifier.regions.backbone = SharedMaps(self.localizer.backbone)

    @property
    def everything(self) -> nn.Module:
        """What the only stage trains, as an attribute for `unidetector.train_stage`."""
        return self

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Targets],
        text: Tensor,
        proposals: None,
        owners: list[int],
    ) -> tuple[unidetector.RegionOutput, dict[str, Tensor]]:
        """Returns the classifier's outputs on the proposals of now, and the localizer's losses."""
        _, losses = super().forward(images, sizes, targets, text)
        with torch.no_grad():
            batch = SimpleNamespace(images=images, sizes=sizes)
            proposals = [boxes for boxes, _ in unidetector.propose(self, batch)]
        outputs, _ = super().forward(images, sizes, targets, text, proposals, owners)
        return outputs, losses


def main() -> None:
    """Runs unidetector.py with this model, whose first stage trains everything."""
    train_stage = unidetector.train_stage

    def train_everything(args: Args, model: Coupled, part: str, *given) -> None:
        if part == "classifiers":
            raise InputError("--classifier-steps is 0 here: --steps train everything")
        train_stage(args, model, "everything", *given)

    unidetector.Model = Coupled
    unidetector.train_stage = train_everything
    unidetector.TINY = TINY
    unidetector.main()


if __name__ == "__main__":
    run_command(main)
