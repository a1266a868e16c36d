"""What a process of the tests of fake CUDA tensors runs; not a test.

Tensors of `cuda:0` are fake: they have shapes and dtypes, but no values. Tensors on the CPU are real, so batches,
layouts and random streams are those of a run. Transfers between both are noted, with the line that asks for them.
"""

import collections
import copy
import functools
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
import transformers.modeling_flash_attention_utils as flash_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lorasweep.config.compose import compose_run
from lorasweep.training.inputs import load_inputs
from lorasweep.training.open_run import RunFolder, RunRequest
from lorasweep.training.run import train_alone, train_runs

CUDA = torch.device("cuda:0")
PACKAGES = ("lorasweep", "transformers", "lightning", "bitsandbytes", "torchmetrics")
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_, aten._foreach_copy_)
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten.is_nonzero)
"""Operations for which the CPU needs a value of the GPU: `item` and `bool`, and those whose shape depends on values."""


class FakeCuda(TorchDispatchMode):
    """Computes with CUDA tensors without values, and notes what lets the CPU wait for a GPU.

    - `read`: a value comes to the CPU.
    - `copy`: values go to the GPU from memory that is not pinned, so the CPU may wait.
    - `pinned`: values go to the GPU from pinned memory, and the CPU does not wait.
    - `mixed`: an operation gets tensors of both devices, perhaps scalars.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode()
        self.phase = None
        self.notes = collections.Counter()
        self.seeds = set()

    def note_phase(self, phase, step, num_steps):
        self.phase = phase

    def note(self, kind):
        self.notes[self.phase, kind, find_lines()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        if packet is aten.is_pinned:
            return hasattr(args[0], "is_fake_pinned")
        if packet is aten._pin_memory:
            pinned = args[0].clone()
            pinned.is_fake_pinned = True
            return pinned
        if packet is aten.random_ and isinstance(args[0], FakeTensor):
            self.seeds.add(kwargs["generator"].initial_seed())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reals = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        device = kwargs.get("device")
        is_to_cuda = device is not None and torch.device(device).type == "cuda"
        if len(reals) == len(tensors) and not is_to_cuda:
            return func(*args, **kwargs)
        is_to_cpu = packet is aten._to_copy and device is not None and not is_to_cuda
        is_into_cpu = packet is aten.copy_ and not isinstance(args[0], FakeTensor)
        is_mask = packet in (aten.index, aten.index_put_) and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in READS or is_to_cpu or is_into_cpu or is_mask:
            self.note("read")
        if packet in READS or is_to_cpu or is_into_cpu:
            return self.invent(packet, args, kwargs)
        if reals:
            is_pinned = kwargs.get("non_blocking") and all(hasattr(real, "is_fake_pinned") for real in reals)
            self.note("mixed" if packet not in COPIES else "pinned" if is_pinned else "copy")
            args, kwargs = tree_map_only(Tensor, self.convert, (args, kwargs))
        with self.fake:
            return func(*args, **kwargs)

    def invent(self, packet, args, kwargs):
        """Returns values on the CPU in place of those that a GPU would have."""
        if packet is aten.copy_:
            return args[0]
        if packet is aten._to_copy:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet is aten.nonzero:
            with self.fake:
                return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        assert packet is aten._local_scalar_dense, packet
        return False if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 1

    def convert(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor, static_shapes=True)

    def move_model(self, model):
        """Replaces the parameters and buffers of a model by fake ones on the GPU; tied ones stay tied."""
        moved = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if id(tensor) not in moved:
                            moved[id(tensor)] = self._move(tensor)
                        tensors[name] = moved[id(tensor)]

    def _move(self, tensor):
        plain = self.convert(tensor.detach().as_subclass(Tensor))
        with self.fake:
            moved = plain.to(CUDA)
        if isinstance(tensor, nn.Parameter):
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        if (state := getattr(tensor, "quant_state", None)) is not None:
            moved.quant_state = copy.deepcopy(state)
            with self:
                moved.quant_state.to(CUDA)
        return moved


def find_lines():
    """Returns the three innermost lines of lorasweep and the libraries around it that run now."""
    names, frame = [], sys._getframe(2)
    while frame is not None and len(names) < 3:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        package = next((name for name in PACKAGES if f"/{name}/" in path), None)
        if package and function != "__torch_function__":
            names.append(f"{package}/{path.rpartition(f'/{package}/')[2]}:{frame.f_lineno} {function}")
        frame = frame.f_back
    return " < ".join(names)


def pretend_cuda():
    """Lets torch answer as with one GPU. Returns a list of the states that its random stream is set to."""
    _ = transformers.get_scheduler  # its imports ask torch.cuda for more than is pretended here
    answers = {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": "fake",
        "max_memory_allocated": 0,
        "get_rng_state": torch.arange(16, dtype=torch.uint8),
    }
    nothing = ("set_device", "empty_cache", "reset_peak_memory_stats", "synchronize", "manual_seed", "_lazy_init")
    for name, answer in {**answers, **dict.fromkeys(nothing)}.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    restored = []
    torch.cuda.set_rng_state = lambda state, *_: restored.append(state.tolist())
    torch.backends.cudnn.version = lambda: 0
    os.fsync = lambda handle: None  # no test cuts the power
    torch._C._set_only_lift_cpu_tensors(True)  # so that a mode sees the copy in `torch.tensor(values, device=...)`
    save, apply = torch.save, nn.Module._apply
    torch.save = lambda content, *more, **named: save(
        tree_map_only(FakeTensor, lambda tensor: tensor.cpu(), content), *more, **named
    )
    # torch can't change the data of fake parameters, so a model stays where `move_model` puts it
    nn.Module._apply = lambda module, *arguments, **named: (
        module if any(isinstance(p, FakeTensor) for p in module.parameters()) else apply(module, *arguments, **named)
    )
    # transformers does not read from fake tensors, which it takes for those of a compiler
    transformers.masking_utils.is_tracing = lambda tensor=None: False
    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # a copied buffer stays in its mode
    return restored


def attend_flash(q, k, v, causal=False, softmax_scale=None):
    """Returns a tensor like the result of flash-attn's function for rows of one length."""
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    return q * (k.sum() + v.sum())


def attend_flash_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None
):
    """Returns a tensor like the result of flash-attn's function for sequences of several lengths."""
    for limits, longest in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert (limits.device, limits.dtype, type(longest)) == (CUDA, torch.int32, int)
    return attend_flash(q, k, v)


def check_modes(gpu):
    """Does one thing of each kind, so that the tests see that each is noted."""
    value = torch.ones(3, device=CUDA)
    for action in (
        lambda: value.sum().item(),
        lambda: bool(value.any()),
        lambda: value.tolist(),
        lambda: value.cpu().numpy(),
        lambda: value[value > 0],
        lambda: value.nonzero(),
        lambda: torch.tensor([1.0, 2.0], device=CUDA),
        lambda: torch.tensor(1.0, device=CUDA),
        lambda: torch.ones(3).to(CUDA, non_blocking=True),
        lambda: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
        lambda: value + torch.tensor(1.0),
        lambda: value[torch.tensor([0])],
    ):
        gpu.notes.clear()
        try:
            action()
        except Exception:
            assert gpu.notes
        yield sorted({kind for _, kind, _ in gpu.notes})


def run_case(gpu, folder, settings):
    """Trains a pack of two, and a run alone that is killed and resumes. Returns what was noted."""
    has_flash = settings.get("model.attention") == "flash_attention_2"
    config = compose_run({**settings, "model.attention": "sdpa"} if has_flash else settings)
    inputs = load_inputs(config)
    if has_flash:
        inputs.base.model.config._attn_implementation = "flash_attention_2"
    gpu.phase = None
    gpu.move_model(inputs.base.model)
    ended = []

    def request(name, own):
        run_folder = RunFolder(path=folder / name)
        own_config = compose_run({**settings, "model.attention": config.model.attention, **own})
        return RunRequest(config=own_config, run_folder=run_folder)

    notes, seeds = {}, {}
    if config.method.packs:
        with gpu:
            train_runs(
                # two groups of ranks, and other rates of dropout and learning
                [
                    request("a", {}),
                    request("b", {"method.rank": 20, "method.dropout": 0.2, "optim.clip_norm": 2, "seed": 9}),
                ],
                inputs=inputs,
                on_evaluation=lambda evaluated: [None] * len(evaluated),
                on_end=lambda request, end: ended.append(request.run_folder.path.name),
                checkpoint_file=folder / "pack.ckpt",
                on_phase=gpu.note_phase,
            )
        notes["pack"], seeds["pack"] = take_notes(gpu)
    asked = iter([False, True])  # stops after the first of several steps
    with gpu:
        run_folder = RunFolder(path=folder / "alone")
        train = functools.partial(train_alone, config, run_folder, inputs=inputs, on_phase=gpu.note_phase)
        record = train(stop_requested=lambda: next(asked, False))
        if record.status == "interrupted":
            gpu.phase = None
            record = train(resume=True)
    notes["alone"], seeds["alone"] = take_notes(gpu)
    return {"notes": notes, "seeds": seeds, "steps": record.steps_done, "ended": sorted(ended)}


def take_notes(gpu):
    """Returns what lets the CPU wait, and the seeds of masks."""
    notes, seeds = [[*key, count] for key, count in gpu.notes.items()], sorted(gpu.seeds)
    gpu.notes.clear()
    gpu.seeds.clear()
    return notes, seeds


def main(file):
    task = json.loads(file.read_text())
    restored = pretend_cuda()
    functions = (attend_flash, attend_flash_varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    flash_utils._lazy_imports = lambda *_, **__: functions
    gpu = FakeCuda()
    with gpu:
        results = {"modes": list(check_modes(gpu))}
    gpu.notes.clear()
    for name, settings in task["cases"].items():
        try:
            results[name] = run_case(gpu, file.parent / name, settings)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            gpu.notes.clear()
    results["restored"] = restored
    file.with_name("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
