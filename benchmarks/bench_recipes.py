"""The same YAML file trained by TRL and by lorasweep: losses of 10 steps, layers and factors of LoRA.

    python benchmarks/bench_recipes.py [--model FOLDER] [--rate 1e-4] [--threads 2] [--files texts chats ...]

`trl sft|dpo --config FILE` reads each file by its own parser and trains it by its own script (`trl_file.py`). Here
`lorasweep new --like FILE` drafts a sweep, whose arm `present` has the settings of the file. Both train in fp32 with
the same initial adapter and the same order, which TRL is given. Everything else comes from the file, except the
template, which is typed here (`data.template`). TRL is no dependency: `pip install trl`.

    texts   prompts and completions as texts, every linear layer, rsLoRA, a linear schedule, weight decay
    chats   the same as messages with the template of a file, two layers in each block, two micro-batches, a cosine
    pairs   preferences (DPO), with a factor β
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_preferences import make_pairs, run_process

TRL_SCRIPT = Path(__file__).parent / "trl_file.py"
NUM_STEPS, BATCH_SIZE, NUM_OTHERS = 10, 4, 8
# no text follows the end of a turn: TRL scores such text as part of the answer, and lorasweep does not
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# what TRL makes of texts: it joins them, without the begin-of-text token of `data.template=plain`
JOINED = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
COMMON = """\
model_name_or_path: {model}
dataset_name: {data}
use_peft: true
lora_dropout: 0.0
max_steps: {steps}
max_length: 512
bf16: false
use_cpu: true
report_to: none
save_strategy: "no"
disable_tqdm: true
output_dir: {output}
"""
FILES = {
    "texts": """\
lora_r: 4
lora_alpha: 8
use_rslora: true
lora_target_modules: all-linear
learning_rate: 1e-3
weight_decay: 0.1
per_device_train_batch_size: 4
""",
    "chats": """\
chat_template_path: {template}
lora_r: 8
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-3
lr_scheduler_type: cosine
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_grad_norm: 0.3
""",
    "pairs": """\
lora_r: 8
lora_alpha: 16
lora_target_modules: all-linear
learning_rate: 5.0e-4
beta: 0.3
per_device_train_batch_size: 4
""",
}


def make_rows(name: str, number: int) -> list[dict[str, Any]]:
    pairs = make_pairs(number)
    if name == "pairs":
        return pairs
    if name == "texts":
        return [{"prompt": pair["prompt"] + " ", "completion": pair["chosen"]} for pair in pairs]
    return [
        {
            "prompt": [{"role": "user", "content": pair["prompt"]}],
            "completion": [{"role": "assistant", "content": pair["chosen"]}],
        }
        for pair in pairs
    ]


def write_files(name: str, model: str, folder: Path, *, rate: float | None) -> Path:
    """Writes data, template and the YAML file, perhaps with another learning rate, and returns the last."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = make_rows(name, NUM_STEPS * BATCH_SIZE + 2 * NUM_OTHERS)
    for split, count in {"train": NUM_STEPS * BATCH_SIZE, "validation": NUM_OTHERS, "test": NUM_OTHERS}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        rows = rows[count:]
    (folder / "template.jinja").write_text(TEMPLATE if name == "chats" else JOINED)
    file = folder / "theirs.yaml"
    places = {"model": model, "data": data, "template": folder / "template.jinja", "output": folder / "trl"}
    text = (COMMON + FILES[name]).format(**places, steps=NUM_STEPS)
    file.write_text(text if rate is None else re.sub("learning_rate: .*", f"learning_rate: {rate}", text))
    return file


def prepare(file: Path, *, command: str) -> dict[str, Any]:
    """Returns the settings of the arm `present` of the drafted sweep, with the order and the adapter of its run."""
    from lorasweep.config.build import as_settings  # noqa: PLC0415 (torch reads OMP_NUM_THREADS at its import)
    from lorasweep.data.batching import StepBatchSampler  # noqa: PLC0415
    from lorasweep.methods import bind  # noqa: PLC0415
    from lorasweep.recipes.read import read_recipe  # noqa: PLC0415
    from lorasweep.sweep.draft import draft_sweep  # noqa: PLC0415
    from lorasweep.training.inputs import InputsCache  # noqa: PLC0415
    from lorasweep.training.prepare import prepare_model  # noqa: PLC0415

    cache = InputsCache()
    typed = {f"data.{split}": split for split in ("validation", "test")}  # else parts of the training data
    typed["data.template"] = str(file.parent / "template.jinja")
    draft = draft_sweep(file.parent / "mine.yaml", typed, cache, recipe=read_recipe(file))
    config = draft.definition.find_arm("present").base
    inputs = cache.load(config)
    train = inputs.data.train
    assert len(train) == NUM_STEPS * BATCH_SIZE, len(train)
    sampler = StepBatchSampler(
        train, batch_size=BATCH_SIZE, num_steps=NUM_STEPS, seed=config.seeds.data_order, group_by_length=True
    )
    model = prepare_model(config, inputs.base)
    bind(config.method).save(model, file.parent / "adapter", base=inputs.base)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_a")}
    return {
        "command": command,
        "file": str(file),
        "config": as_settings(config),
        "adapter": str(file.parent / "adapter"),
        "order": [row for step in range(NUM_STEPS) for row in sampler.get_step_indices(step)],
        "accumulate": config.trainer.accumulate,
        "layers": {name: {"rank": layer.rank, "scaling": layer.scaling} for name, layer in layers.items()},
        "trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def train(work: Mapping[str, Any]) -> list[float]:
    """Returns the losses of our run."""
    from lorasweep.config.compose import build_run  # noqa: PLC0415
    from lorasweep.record import read_steps  # noqa: PLC0415
    from lorasweep.training.inputs import load_inputs  # noqa: PLC0415
    from lorasweep.training.open_run import RunFolder  # noqa: PLC0415
    from lorasweep.training.run import train_alone  # noqa: PLC0415

    config = build_run(work["config"])
    folder = Path(work["file"]).parent / "ours"
    inputs = load_inputs(config).prepare(config, folder=folder.parent)
    train_alone(config, RunFolder(path=folder), inputs=inputs, stop_requested=lambda: False)
    return [row["loss"] for row in read_steps(folder, having='"loss"') if "validation" not in row]


def compare(name: str, model: str, folder: Path, *, rate: float | None) -> None:
    from side_by_side import print_row  # noqa: PLC0415

    theirs_yaml = write_files(name, model, folder, rate=rate)
    work = prepare(theirs_yaml, command="dpo" if name == "pairs" else "sft")
    own = train(work)
    file, output = folder / "work.json", folder / "result.json"
    file.write_text(json.dumps(work, default=str))
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    run_process([str(TRL_SCRIPT), str(file), "--output", str(output)], log=folder / "log.txt", environment=environment)
    theirs = json.loads(output.read_text())
    error = max(abs(one - other) / abs(other) for one, other in zip(own, theirs["losses"], strict=True))
    layers = "equal" if theirs["layers"] == work["layers"] else "different"
    params = "equal" if theirs["trainable_params"] == work["trainable_params"] else "different"
    print_row(
        name,
        len(own),
        own[0],
        own[-1],
        error,
        f"{layers} ({len(work['layers'])})",
        f"{params} ({work['trainable_params']:,})",
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: the embedded model")
    parser.add_argument("--rate", type=float, help="learning rate; default: that of each file, made for that model")
    parser.add_argument("--files", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(words)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    from machine import measure_machine  # noqa: PLC0415
    from side_by_side import print_head  # noqa: PLC0415 (imports torch)
    from trl_dpo import import_trl  # noqa: PLC0415

    import lorasweep.models.tiny  # noqa: PLC0415

    import_trl()
    model = arguments.model or str(Path(lorasweep.models.tiny.__file__).parent)
    print(f"\n{measure_machine()}\n\nfp32, {NUM_STEPS} steps of {BATCH_SIZE}\n")
    print_head("file", "steps", "first loss", "last loss", "loss, relative", "layers and factors", "trained parameters")
    with tempfile.TemporaryDirectory() as name:
        for file in arguments.files:
            compare(file, model, Path(name) / file, rate=arguments.rate)


if __name__ == "__main__":
    main()
