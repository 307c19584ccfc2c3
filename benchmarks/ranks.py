"""Two ranks of two images each, against one rank of four: losses and gradients of the first step.

Initial weights and images are the same. Random numbers are a function of their shape, so that an
image has the same ones on any rank. The models are those of --tiny, on generated images of 96
pixels, on a CPU with gloo. A difference is |x2 - x1| / |x1|: x1 is a loss of one rank or its
gradient by all parameters, x2 the mean of the losses of two ranks or of their gradients.

    python benchmarks/ranks.py

It writes benchmarks/ranks-<device>.json. docs/ranks.md says why terms differ.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
SIDE, PADDED, IMAGES = 96, 128, 4
FEW_BOXES = {"dataset_ratios": "in21k=16384", "dataset_batches": f"in21k={IMAGES}"}
# the method file, what it is trained on, and settings
CASES = [
    ("scaledet", "boxes", {"datasets": "coco,o365"}),
    ("detic", "boxes and masks", {"datasets": "coco-base"}),
    ("detic", "image labels", {"datasets": "coco-base,in21k"} | FEW_BOXES),
    ("unidet", "boxes of a dataset", {"datasets": "oid"}),
    ("domain_attention", "boxes of a dataset", {"datasets": "oid", "adapters": 3}),
    ("plaindet", "boxes of a dataset", {"datasets": "oid"}),
    ("metr", "boxes of a dataset", {"datasets": "oid"}),
    ("omdet", "boxes of a dataset", {"datasets": "oid", "task_size": 300}),
    ("category_extended", "boxes", {"datasets": "coco,o365"}),
    ("groupsoftmax", "boxes", {"datasets": "coco,oid"}),
    ("unidetector", "localizer", {"datasets": "coco,o365", "stage": "localizer"}),
    ("unidetector", "classifier", {"datasets": "coco,o365", "steps": 0}),
    ("lmseg", "semantic maps", {"datasets": "ade20k"}),
    ("dataseg", "panoptic maps", {"datasets": "coco-panoptic"}),
    ("dataseg", "semantic maps", {"datasets": "ade20k"}),
    ("dataseg", "boxes", {"datasets": "o365"}),
    ("oneformer", "panoptic maps", {"datasets": "coco-panoptic"}),
]


def by_shape(draw):
    """Returns `draw`, a function of torch, with the same random numbers in each call."""

    def fixed(*given, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return draw(*given, **settings)

    return fixed


def settings(module, changes: dict, root: Path, folder: Path):
    """Returns the Args of --tiny, with small images and the changes of a case."""
    args = module.Args(**module.TINY)
    sizes = {name for name in module.TINY if name.endswith("_size") and "batch" not in name}
    small = dict.fromkeys(sizes, SIDE) | {"batch_size": IMAGES, "amp": "off", "device": "cpu"}
    places = {"data_root": str(root), "output": str(folder)}
    return replace(args, **small, **places, **changes)


class Recorder:
    """Records the first step of a training in this process, and then ends the process."""

    def __init__(self, module, file: Path):
        self.file = file
        self.record = {}
        self.compute_losses = module.compute_losses

    def started(self, log, args, folder, steps, start, model, *others) -> None:
        """Takes the place of `RunLog.__init__`."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def losses(self, *given) -> dict[str, Tensor]:
        """Takes the place of `compute_losses`. Records each loss and its gradient."""
        losses = self.compute_losses(*given)
        for term, value in losses.items():
            if term != "loss":
                kept = {"retain_graph": True, "allow_unused": True}
                gradients = torch.autograd.grad(value, self.parameters, **kept)
                self.record[term] = value.item(), self.flat(gradients)
        return losses

    def finished(self, log, losses, step, batch) -> None:
        """Takes the place of `RunLog.check_finite`, which follows the backward pass."""
        gradients = [parameter.grad for parameter in self.parameters]
        self.record["loss"] = losses["loss"].item(), self.flat(gradients)
        images = [(s.dataset, s.image_id, s.draw, *batch.images.shape[1:]) for s in batch.samples]
        torch.save({"terms": self.record, "images": images}, self.file)
        os._exit(0)

    def flat(self, gradients) -> Tensor:
        """Returns all gradients as one vector; None counts as zeros."""
        parts = []
        for gradient, parameter in zip(gradients, self.parameters):
            parts.append((torch.zeros_like(parameter) if gradient is None else gradient).flatten())
        return torch.cat(parts)


def first_step(method: str, changes: dict, root: Path, folder: Path, launch: dict) -> None:
    """Runs the command of the method in this process, up to the first update of the weights.

    launch: the variables that torchrun sets. The result is written to folder/<rank>.pt.
    """
    from common import runlog, sampling

    log = os.open(folder / f"{launch['RANK']}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= launch
    torch.set_num_threads(1)
    module = importlib.import_module(method)
    recorder = Recorder(module, folder / f"{launch['RANK']}.pt")
    module.compute_losses = recorder.losses
    runlog.RunLog.__init__ = lambda *given: recorder.started(*given)
    runlog.RunLog.batches = lambda log, loader, *given: enumerate(loader, 1)
    runlog.RunLog.check_finite = lambda *given: recorder.finished(*given)
    args = settings(module, changes, root, folder / "run")
    module.parse_args = lambda *_, **__: args
    setup_device = module.setup_device

    def setup_alike(*given):  # the same initial weights on all ranks
        device = setup_device(*given)
        torch.manual_seed(0)
        return device

    module.setup_device = setup_alike
    collate, least = sampling.collate, defaultdict(lambda: (PADDED, PADDED))
    # images are padded alike, whatever else is in their batch
    sampling.collate = lambda samples, **others: collate(samples, least=least)
    for name in ("rand", "randperm", "randint", "multinomial"):
        setattr(torch, name, by_shape(getattr(torch, name)))
    torch.Tensor.bernoulli_ = lambda tensor, *given, **others: tensor.fill_(1)  # no layer drops out
    module.main()


def free_port() -> str:
    """Returns a port that nobody listens to."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def step_of_ranks(
    method: str, changes: dict, root: Path, folder: Path, ranks: int, context
) -> list[dict]:
    """Returns the record of each rank. Raises RuntimeError if one fails."""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    folder.mkdir(parents=True)
    for rank in range(ranks):
        launch = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = (method, changes, root, folder, launch)
        processes.append(context.Process(target=first_step, args=given))
        processes[-1].start()
    for rank, process in enumerate(processes):
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{method}: {(folder / f'{rank}.log').read_text()[-2000:]}")
    records = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    shutil.rmtree(folder)  # hundreds of MB
    return records


def difference(one: Tensor, other: Tensor) -> float:
    """Returns |other - one| / |one|, with two digits."""
    relative = (other - one).norm() / one.norm().clamp(min=1e-30)
    return float(f"{relative.item():.1e}")


def measure(method: str, changes: dict, root: Path, folder: Path, context) -> dict:
    """Returns {term: {"loss": difference, "gradient": difference}} of a case, "loss" for their sum.

    root: data root with the generated datasets; folder: of the two runs
    context: of multiprocessing. Raises ValueError if the images are not the same, or if the
    gradient of `DistributedDataParallel` is not the mean of those of the ranks.
    """
    [whole] = step_of_ranks(method, changes, root, folder / "one", 1, context)
    parts = step_of_ranks(method, changes, root, folder / "two", 2, context)
    if sorted(whole["images"]) != sorted(image for part in parts for image in part["images"]):
        raise ValueError(f"{method}: not the same images")
    found = {}
    total = 0
    for term, (value, gradient) in whole["terms"].items():
        values, gradients = zip(*(part["terms"][term] for part in parts))
        value, values = torch.tensor(value), torch.tensor(values)
        mean = torch.stack(gradients).mean(0)
        found[term] = {
            "loss": difference(value, values.mean()),
            "gradient": difference(gradient, mean),
        }
        if term != "loss":
            total = total + mean
        elif difference(total, gradients[0]) > 1e-5 or not torch.equal(*gradients):
            raise ValueError(f"{method}: the ranks do not have the mean of their gradients")
    return found


def main() -> None:
    from benchmarks.paired import cpu_name, record_path, write_json
    from common.datasets.tiny import generate

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks", *{method for method, *_ in CASES}])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in generate.TINY:
            root = generate.generate(name, Path(folder) / "data", size=SIDE, limit=12)
        for method, what, changes in CASES:
            case = f"{method}, {what}"
            found[case] = measure(method, changes, root, Path(folder) / case, context)
    record = {"device": cpu_name(), "torch": torch.__version__, "relative differences": found}
    print(json.dumps(record, indent=1))
    write_json(record_path("ranks", record["device"]), record)


if __name__ == "__main__":
    main()
