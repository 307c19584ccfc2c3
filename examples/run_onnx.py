"""Runs an exported file on a photograph: python run_onnx.py FILE.onnx photo.jpg

It needs numpy, pillow and onnxruntime, and nothing else. The file must take images of any size.
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
scale = min(resize["short"] / min(photo.size), resize["longest"] / max(photo.size))
size = round(photo.width * scale), round(photo.height * scale)
images = np.asarray(photo.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None]
outputs = [output.name for output in session.get_outputs()]
found = dict(zip(outputs, session.run(outputs, {"images": images})))
for label, pixels in zip(*np.unique(found.get("semantic", []), return_counts=True)):
    print(f"{pixels / found['semantic'].size:.3f} of the pixels: {names[int(label)]}")
for box, score, label in zip(*(found.get(key, [[]])[0] for key in ("boxes", "scores", "labels"))):
    if score > 0.3:
        print(f"{score:.3f} {names[label]}", (box * (photo.size * 2) / (size * 2)).round())
