"""LoRA layers under what torch does to a model: autocast, checkpointing, compilation, inference mode."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lorasweep.lora import LoraConfig, inject_lora


@pytest.fixture
def adapted(make_model, fill_b):
    model = make_model()
    inject_lora(model, LoraConfig(rank=2, dropout=0.5), generator=torch.Generator().manual_seed(0))
    fill_b(model)
    return model


def gradients(model, output):
    return list(torch.autograd.grad(output.pow(2).sum(), [p for p in model.parameters() if p.requires_grad]))


def test_activation_checkpointing_gives_the_same_gradients(adapted, tokens):
    torch.manual_seed(1)
    plain = gradients(adapted, adapted(tokens))
    torch.manual_seed(1)  # dropout's masks are drawn again in the recomputed forward
    recomputed = gradients(adapted, checkpoint(adapted, tokens, use_reentrant=False))
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_without_a_graph_break(adapted, tokens, monkeypatch):
    torch._dynamo.reset()  # code compiled for the models before this one counts towards its limit
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # compiled code draws masks by torch alone
        plain = adapted(tokens)
    torch.manual_seed(1)
    output = compiled(tokens)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(gradients(adapted, output), gradients(adapted, plain), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        assert torch.isfinite(compiled(tokens)).all()


def test_autocast_stays_near_fp32_and_gives_fp32_gradients(adapted, tokens):
    torch.manual_seed(1)
    exact = adapted(tokens)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted(tokens)
    assert output.dtype is torch.bfloat16
    assert (output - exact).norm() <= 0.05 * exact.norm()  # a few roundings of 2^-9 per layer, over seven layers
    assert {gradient.dtype for gradient in gradients(adapted, output.float())} == {torch.float32}
