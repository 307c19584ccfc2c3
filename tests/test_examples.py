"""The demonstration in a browser, called as a browser calls it; and its one line without gradio."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
from conftest import REPO
from PIL import Image
from test_readme import ARGS

import scaledet
from common.checkpoint import save_weights
from common.labels import Vocabulary

DEMO = REPO / "examples" / "demo.py"
WITHOUT = "import runpy, sys; sys.modules['gradio'] = None; "
WITHOUT += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    label_space = scaledet.build_label_space(ARGS, [Vocabulary("coco", ("person", "dog"))])
    model = scaledet.Model(ARGS, label_space, pretrained=False)
    file = tmp_path_factory.mktemp("run") / "weights.safetensors"
    save_weights(file, model, label_space, {"method": "scaledet", "args": asdict(ARGS)})
    return file


def test_a_missing_gradio_is_told_in_one_line(weights):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, DEMO, "--weights", weights],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the demo needs gradio (")
    assert done.stderr.endswith("): pip install gradio\n")


def test_a_photograph_is_drawn(weights, tmp_path):
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    Image.new("RGB", (120, 90), "white").save(tmp_path / "photo.jpg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, DEMO, "--weights", weights, "--port", str(port)]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        for _ in range(240):
            if "Running on local URL" in log.read_text() or process.poll() is not None:
                break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()
        browser = client.Client(f"http://127.0.0.1:{port}", verbose=False)
        photo = client.handle_file(tmp_path / "photo.jpg")
        drawn = browser.predict(photo, "cat, traffic cone", 0.0, api_name="/find")
        assert Image.open(drawn).size[0] % 120 == 0  # small photographs are drawn enlarged
        for given, said in (
            ((None, "cat"), "choose a photo"),
            ((photo, "a,,b"), "has an empty class name"),
        ):
            with pytest.raises(Exception, match=said):
                browser.predict(*given, 0.3, api_name="/find")
    finally:
        process.terminate()
        process.wait(60)
