def known_names() -> list[str]:
    """All folded names of data/vocabularies/*.json and of the free label space of data/tiny/emoji.csv, sorted.

    And the words for what is of no class: segmenters name it, too.
    """
    names = ["background", "unlabeled"]
    names += [
        n
        for file in (DATA / "vocabularies").glob("*.json")
        for n in json.loads(file.read_text())["names"]
    ]
    emoji = DATA / "tiny" / "emoji.csv"
    if emoji.is_file():
        names += [
            row["lineart"]
            for row in csv.DictReader(emoji.read_text("utf-8").splitlines())
            if row["lineart"]
        ]
    return sorted({fold(name) for name in names})


def build_table(path: Path) -> None:
    """Writes `path`: fp16 rows of all known names, with the names, their encoder and its licence as metadata."""
    names = known_names()
    origin = f"sentence-transformers/all-MiniLM-L6-v2, Apache-2.0, mean pooling, from the pip package {PACKAGE}"
    about = {"encoder": origin, "prompts": "{}", "names": names}
    rows = prompt_ensemble(names, templates("name"), _minilm_encoder()).half()
    with atomic_path(
        path
    ) as temporary:  # one metadata key: safetensors does not keep the order of several
        save_file({"embeddings": rows}, temporary, {"table": json.dumps(about, ensure_ascii=False)})
    print(f"{path}: {len(names)} names, {Path(path).stat().st_size / 1e6:.2f} MB")
