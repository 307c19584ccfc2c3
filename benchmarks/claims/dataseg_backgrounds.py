"""DaTaSeg with a learned background for each dataset, in place of the one that all share.

    python -m benchmarks.claims.dataseg_backgrounds --datasets ade20k,coco-panoptic,o365 --tiny

The flags are those of dataseg.py. A query is compared with the classes of a dataset and with the
background of that dataset. Other classes have the background of the dataset with the closest names.
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
        del self.background
        self.texts = [label_space.part(name).text for name in label_space.datasets]
        with torch.random.fork_rng():  # what is drawn later stays as in dataseg.py
            for i in range(len(self.texts)):
                # no ParameterList: weight decay leaves out the top-level parameters
                row = nn.Parameter(0.02 * torch.randn(label_space.width))
                self.register_parameter(f"background_{i}", row)

    def classify(self, z: Tensor, text: Tensor) -> Tensor:
        """Returns logits s cos(e, t) (..., K + 1); the last column is the dataset's background.

        z: queries (..., C); text: (K, D)
        """
        background = getattr(self, f"background_{self.dataset_of(text)}")
        e = F.normalize(self.class_embed(z), dim=-1)
        rows = torch.cat([text, F.normalize(background, dim=0)[None]])  # (K + 1, D)
        return self.logit_scale.exp() * e @ rows.T

    def dataset_of(self, text: Tensor) -> int:
        """Returns the number of the dataset with this text (K, D), or with the closest one."""
        texts = [own.to(text) for own in self.texts]
        for i, own in enumerate(texts):
            if torch.equal(own, text):
                return i
        closeness = [(text @ own.T).amax(1).mean().item() for own in texts]
        return closeness.index(max(closeness))


def main() -> None:
    """Runs dataseg.py with this model."""
    dataseg.Model = Model
    dataseg.main()


if __name__ == "__main__":
    run_command(main)
