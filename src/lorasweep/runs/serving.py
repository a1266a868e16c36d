"""Says whether vLLM and llama.cpp take an exported model, and how to start them.

The rules are read from the source of vLLM (`PEFTHelper`, `LoRAModel`, `LoRAConfig`) and of llama.cpp
(`convert_lora_to_gguf.py`, `llama_adapter_lora_weight`). Neither program is run here.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open

from lorasweep.config.method import WEIGHT_SUFFIX
from lorasweep.config.run import ModelConfig
from lorasweep.lora.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_peft_settings
from lorasweep.models.load import find_local_path
from lorasweep.wording import join_words

VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""
TEMPLATE_FILE = "chat_template.jinja"
"""Name under which transformers saves the chat template of a tokenizer."""
MERGE = "Export with `--format merged`."


def describe_serving(folder: Path, config: ModelConfig, *, out: Path, has_template: bool) -> tuple[str, ...]:
    """Returns a sentence on vLLM and one on llama.cpp, for a causal model or its adapter.

    `folder` has the exported files, and `out` is its name in the commands. `has_template` says whether it has a chat
    template that the base model does not have.
    """
    template = str(out / TEMPLATE_FILE)
    vllm = ["--chat-template", template] if has_template else []
    llama = ["--jinja", "--chat-template-file", template] if has_template else []
    if not (folder / CONFIG_FILE).exists():
        return (
            f"vLLM: {_quote('vllm', 'serve', str(out), *vllm)}",
            f"llama.cpp: {_quote('python', 'convert_hf_to_gguf.py', str(out), '--outfile', 'model.gguf')}, then "
            f"{_quote('llama-server', '-m', 'model.gguf', *llama)}",
        )
    peft = read_peft_settings(folder / CONFIG_FILE)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        names = list(file.keys())
    base, rank = str(peft["base_model_name_or_path"]), int(peft.get("r") or 0)
    revision = ["--revision", str(config.revision)] if config.revision else []
    if reasons := list(_list_obstacles(peft, names)) + list(_list_vllm_obstacles(peft, names, config)):
        first = f"vLLM does not take this adapter, because {join_words(reasons)}. {MERGE}"
    else:
        limit = str(next(size for size in VLLM_MAX_RANKS if size >= rank))
        command = ["vllm", "serve", base, *revision, "--enable-lora", "--max-lora-rank", limit]
        first = f"vLLM: {_quote(*command, '--lora-modules', f'{out.name}={out}', *vllm)}"
    if reasons := list(_list_obstacles(peft, names)) + list(_list_llama_obstacles(peft)):
        return first, f"llama.cpp does not take this adapter, because {join_words(reasons)}. {MERGE}"
    source = ["--base-model-id", base] if find_local_path(config) is None else ["--base", base]
    convert = _quote("python", "convert_lora_to_gguf.py", *source, str(out), "--outfile", "adapter.gguf")
    # llama.cpp multiplies by α / rank, rsLoRA by α / √rank
    scaled = ["--lora-scaled", f"adapter.gguf:{math.sqrt(rank):.6g}"]
    lora = scaled if peft.get("use_rslora") else ["--lora", "adapter.gguf"]
    return first, f"llama.cpp: {convert}, then {_quote('llama-server', '-m', 'BASE.gguf', *lora, *llama)}"


def _quote(*words: str) -> str:
    return f"`{shlex.join(words)}`"


def _list_obstacles(peft: Mapping[str, Any], names: list[str]) -> Iterator[str]:
    """Yields what both programs refuse, or would compute wrongly."""
    if peft["peft_type"] != "LORA":
        yield f"it is a {peft['peft_type']}"
    if peft.get("use_dora"):
        yield "it is a DoRA"
    if trained := peft.get("modules_to_save"):
        yield f"it has modules that trained in full ({', '.join(trained)})"
    if peft.get("alpha_pattern"):
        yield "its layers have different α"
    if any(".lm_head." in name for name in names) and not trained:
        yield "it adapts the head"


def _list_vllm_obstacles(peft: Mapping[str, Any], names: list[str], config: ModelConfig) -> Iterator[str]:
    if peft.get("rank_pattern"):
        yield "its layers have different ranks"
    if (peft.get("r") or 0) > VLLM_MAX_RANKS[-1]:
        yield f"its rank is above {VLLM_MAX_RANKS[-1]}"
    if any(".lora_embedding_A" in name for name in names):
        yield "it adapts the embedding"
    local = find_local_path(config)
    with suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # any file may be there, or none
        name, revision = "config.json", config.revision
        path = local / name if local else try_to_load_from_cache(config.path, name, revision=revision)
        architecture = str(json.loads(Path(str(path)).read_text(encoding="utf-8"))["architectures"][0])
        if architecture.endswith("ForConditionalGeneration"):
            yield f"layers have other names in {architecture}, which vLLM loads, than in its text model"


def _list_llama_obstacles(peft: Mapping[str, Any]) -> Iterator[str]:
    if peft.get("use_rslora") and peft.get("rank_pattern"):
        yield "it is an rsLoRA with different ranks"
    if not all(name.endswith(WEIGHT_SUFFIX) for name in peft.get("target_parameters") or ()):
        yield "it adapts fused experts"
