"""UniDetector without its decoupling: localizer and classifier are one network, trained at once.

    python -m benchmarks.claims.unidetector_coupled --datasets coco,o365 --tiny

The flags are those of unidetector.py, with a timm model as --classifier-backbone and no second
stage. Each of the --steps trains all losses. The classifier reads the feature maps of the
localizer, so that both shape them, and learns from the localizer's current proposals.

Note: as in the first stage of unidetector.py, gradients are not clipped. In its second stage they
  are. The proposals are those of the augmented image. There, they are those of the original one.
Note: the end-to-end baseline of the official code has a plain RPN, and neither objectness nor
  calibration in its scores (zhenyuw16/UniDetector:configs/*/clip_end2end*). This one is scored as
  unidetector.py is.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

import unidetector
from common.backbone import Backbone
from common.clip_resnet import FPNRegions
from common.command import run_command
from common.errors import InputError
from common.labels import LabelSpace
from common.targets import Targets

Args, METHOD, MODEL_FIELDS = unidetector.Args, unidetector.METHOD, unidetector.MODEL_FIELDS
# as many steps as the classifier of unidetector.py has; its localizer has 250
TINY = unidetector.TINY | {"steps": 450, "classifier_steps": 0}


class SharedMaps:
    """P3 to P5 of the localizer, for a classifier.

    It is no module, so that the weights are counted and saved once.
    """

    def __init__(self, backbone: Backbone):
        """backbone: of the localizer, with P2 to P6"""
        self.backbone = backbone
        self.normalise = backbone.normalise

    def __call__(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images)[1:4]


class Coupled(unidetector.Model):
    """The classifiers read the feature maps of the localizer. Its forward pass has all losses."""

    def __init__(self, args: Args, label_space: LabelSpace, *given, **settings):
        """Raises InputError for another stage, and for a CLIP ResNet as classifier."""
        if args.stage != "both" or args.classifier_steps != 0:
            raise InputError("one stage trains everything: --stage both --classifier-steps 0")
        super().__init__(args, label_space, *given, **settings)
        for classifier in self.classifiers:
            if not isinstance(classifier.regions, FPNRegions):
                raise InputError("--classifier-backbone must be a timm model, as --backbone is")
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
        """Returns the classifier's outputs on the current proposals, and the localizer's losses."""
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
        train_stage(args, model, "everything", *given)

    unidetector.Model = Coupled
    unidetector.train_stage = train_everything
    unidetector.TINY = TINY
    unidetector.main()


if __name__ == "__main__":
    run_command(main)
