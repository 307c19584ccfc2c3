"""torch.hub: `model, label_space = torch.hub.load(REPO, METHOD, weights)`.

Each method file is an entry, which calls the `load` of the file. `weights` is a run folder or a
weights file.
"""

import importlib
from pathlib import Path as _Path  # torch.hub takes every other name for an entry


def _entry(method: str):
    def load(weights: str, device: str = "cpu"):
        return importlib.import_module(method).load(weights, device=device)

    load.__name__ = method
    load.__doc__ = f"Returns the model and the label space of weights trained by {method}.py."
    return load


for _file in _Path(__file__).parent.glob("*.py"):
    if "\nclass Args:" in _file.read_text():
        globals()[_file.stem] = _entry(_file.stem)
