"""Runs an exported file on a photograph: python run_onnx.py FILE.onnx photo.jpg

It needs numpy, pillow and onnxruntime, and nothing else of this project.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map
names, resize = json.loads(about["class_names"]), json.loads(about["resize"])
photo = Image.open(sys.argv[2]).convert("RGB")
if "short" in resize:  # any size fits: that of the training's tests
    scale = min(resize["short"] / min(photo.size), resize["longest"] / max(photo.size))
    resize = {"width": round(photo.width * scale), "height": round(photo.height * scale)}
resized = photo.resize((resize["width"], resize["height"]), Image.Resampling.BILINEAR)
images = np.asarray(resized).transpose(2, 0, 1)[None]
outputs = {output.name: output for output in session.get_outputs()}
found = dict(zip(outputs, session.run(list(outputs), {"images": images})))
if "semantic" in found:
    for label, pixels in zip(*np.unique(found["semantic"], return_counts=True)):
        print(f"{pixels / found['semantic'].size:.3f} of the pixels: {names[label]}")
for box, score, label in zip(*(found.get(key, [[]])[0] for key in ("boxes", "scores", "labels"))):
    if score > 0.3:
        print(f"{score:.4f} {names[label]}", (box * (photo.width / resized.width)).round(2))
