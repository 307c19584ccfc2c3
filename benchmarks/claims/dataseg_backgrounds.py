"""DaTaSeg with a learned background for each dataset, in place of the one that all share.

    python -m benchmarks.claims.dataseg_backgrounds --datasets ade20k,coco-panoptic,o365 --tiny

The flags are those of dataseg.py. Classes are compared beside the background of the dataset whose
names they have; other classes, beside that of the dataset whose names are closest.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dataseg
from common.command import run_command
from common.labels import LabelSpace

Args, METHOD, MODEL_FIELDS = dataseg.Args, dataseg.METHOD, dataseg.MODEL_FIELDS
TINY = dataseg.TINY


class Model(dataseg.Model):
    """Classifies queries by text, and by the background of a dataset."""

    def __init__(self, args: Args, label_space: LabelSpace, pretrained: bool = True):
        super().__init__(args, label_space, pretrained)
        self.texts = [label_space.part(name).text for name in label_space.datasets]
        self.backgrounds = nn.ParameterList(
            0.02 * torch.randn(label_space.width) for _ in self.texts
        )
        del self.background

    def classify(self, z: Tensor, text: Tensor) -> Tensor:
        """Returns logits s cos(e, t) (..., K + 1); the last column is the dataset's background.

        z: queries (..., C); text: (K, D)
        """
        closeness = torch.stack([(text @ own.T.to(text)).amax(1).mean() for own in self.texts])
        background = self.backgrounds[closeness.argmax()]
        e = F.normalize(self.class_embed(z), dim=-1)
        rows = torch.cat([text, F.normalize(background, dim=0)[None]])  # (K + 1, D)
        return self.logit_scale.exp() * e @ rows.T


def main() -> None:
    """Runs dataseg.py with this model."""
    dataseg.Model = Model
    dataseg.main()


if __name__ == "__main__":
    run_command(main)
