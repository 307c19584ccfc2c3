"""Finds what you name in a photograph, in a browser: python examples/demo.py --weights runs/x

It takes the weights of any method, and needs gradio: pip install gradio
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import run_command
from common.errors import InputError
from common.saved import own_weights, read_metadata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, help="run folder, .safetensors or hf://...")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"the demo needs gradio ({error}): pip install gradio") from None
    weights = own_weights(args.weights)
    if weights is None:
        raise InputError(f"--weights {args.weights}: give a run folder or a .safetensors file")
    from common.inference import to_sample, with_rles  # they import torch, which takes seconds
    from common.predictions import PredictionWriter

    name = str(read_metadata(weights)["method"])
    method = importlib.import_module(name)
    model, label_space = method.load(weights)

    def find(photo: Image.Image | None, vocabulary: str, threshold: float) -> Image.Image:
        if photo is None:
            raise gradio.Error("choose a photograph", print_exception=False)
        try:
            classes = label_space.swap(vocabulary).with_things()
            (found,) = method.predict_images(model, [photo], classes)
        except InputError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        with tempfile.TemporaryDirectory() as folder:
            writer = PredictionWriter(Path(folder), classes, threshold)
            writer.add("photo", None, to_sample(photo), with_rles(found))
            return Image.open(Path(folder) / "photo-0.jpg").copy()

    photo = gradio.Image(type="pil", label="photograph")
    vocabulary = gradio.Textbox(label="names, by commas; empty: all classes of the training")
    threshold = gradio.Slider(0, 1, value=0.3, label="lowest score that is drawn")
    looks = {"title": f"Concord: {name}", "flagging_mode": "never", "api_name": "find"}
    inputs = [photo, vocabulary, threshold]
    gradio.Interface(find, inputs, gradio.Image(label="found"), **looks).launch(
        server_port=args.port
    )


if __name__ == "__main__":
    run_command(main)
