"""Changes to a model from outside: hooks, adapters, replaced layers, sharding. None of them may be
bypassed."""

import copy
import warnings

import pytest
import torch
import torch.nn as nn
from util import DEVICE, launches

from gpt2 import Config, Model, kernels
from gpt2.generate.decoding import decode_layers
from gpt2.generate.quantize import quantize_int8
from gpt2.layers import Int8Linear, is_hooked, is_stock

CONFIG = Config(block_size=8, vocab_size=20, n_layer=4, n_head=2, n_embd=16)
CALLED = 41  # of 43 modules; ModuleDict and ModuleList have no forward


def model_and_ids(fast=True, config=CONFIG):
    model = Model(config, fast=fast).to(DEVICE)
    return model, torch.randint(config.vocab_size, (2, 8), device=DEVICE)


KINDS = {
    "forward": lambda module, hook: module.register_forward_hook(lambda *args: hook()),
    "pre-forward": lambda module, hook: module.register_forward_pre_hook(lambda *args: hook()),
    "backward": lambda module, hook: module.register_full_backward_hook(lambda *args: hook()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fast", [False, True])
def test_every_hook_fires(fast, kind):
    """Only 15 of 43 fired once."""
    model, idx = model_and_ids(fast)
    fired = set()
    for name, module in model.named_modules():
        KINDS[kind](module, lambda name=name: fired.add(name))
    _, loss = model(idx, idx, return_logits=True)
    loss.backward()
    assert len(list(model.modules())) == 43
    missing = {name for name, _ in model.named_modules()} - fired
    # The embeddings' input and the model's input are ids, which have no gradient and no hook.
    expected = {"transformer", "transformer.h"}
    if kind == "backward":
        expected |= missing & {"", "transformer.wte", "transformer.wpe"}
    assert missing == expected and len(fired) >= CALLED - 3


@pytest.mark.parametrize("T", [1, 5, 8])
def test_positions_are_rows_of_their_table(T):
    """The same bits as by the module, whose options count."""
    model, idx = model_and_ids()
    found = []
    for change in ("none", "hook", "padding"):
        if change == "hook":  # the module is called
            model.transformer.wpe.register_forward_hook(lambda *args: None)
        if change == "padding":
            model.transformer.wpe.padding_idx = 0
        model.zero_grad()
        _, loss = model(idx[:, :T], idx[:, :T])
        loss.backward()
        found.append((loss.detach(), model.transformer.wpe.weight.grad))
    for ours, module in zip(*found[:2], strict=True):
        assert torch.equal(ours, module)
    assert found[0][1][0].any() and not found[2][1][0].any()


@pytest.mark.parametrize("fast", [False, True])
def test_hooks_change_nothing_but_what_they_return(fast):
    model, idx = model_and_ids(fast)
    plain = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda *args: None)
    (_, loss), (_, want) = model(idx, idx), plain(idx, idx)
    assert torch.allclose(loss, want, atol=1e-6)
    loss.backward(), want.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)


def test_a_hook_on_every_module_of_the_process(accelerated):
    """With torch.nn.modules.module.register_module_forward_hook, as profilers do."""
    model, idx = model_and_ids()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: called.append(m))
    try:
        model(idx)
    finally:
        handle.remove()
    assert len(set(called)) == CALLED
    assert not is_hooked(model.lm_head)


@pytest.mark.parametrize("way", ["forward", "parametrized", "compiled", "subclass", "hook"])
def test_what_is_not_stock(way):
    layer = nn.Linear(4, 4)
    assert is_stock(layer, nn.Linear)
    if way == "forward":
        layer.forward = lambda x: x
    elif way == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    elif way == "compiled":
        layer.compile()
    elif way == "subclass":
        layer = type("Other", (nn.Linear,), {})(4, 4)
    else:
        layer.register_forward_hook(lambda *args: None)
    assert not is_stock(layer, nn.Linear)


class Doubled(nn.Module):
    """A layer whose output is twice that of another layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("part", [*(f"transformer.h.1.{part}" for part in PARTS),
                                  "transformer.ln_f", "lm_head"])  # fmt: skip
def test_a_replaced_layer_is_called(part):
    """In both modes, in training, evaluation and generation."""
    model, idx = model_and_ids(fast=True)
    _, stock = model(idx, idx)
    path, _, name = part.rpartition(".")
    parent = model.get_submodule(path)
    setattr(parent, name, Doubled(getattr(parent, name)))
    losses = []
    for fast in (True, False):
        model.fast = fast
        losses.append(model(idx, idx)[1])
    assert torch.allclose(*losses, atol=1e-5) and not torch.allclose(losses[0], stock, atol=1e-6)
    model.eval()
    tokens = []
    for fast in (True, False):
        model.fast = fast
        tokens.append(model.generate(idx[:1, :3], 4, temperature=0.0))
    assert torch.equal(*tokens)


@pytest.mark.cpu_kernels
def test_generation_asks_before_it_passes_layers_by():
    """On a CPU one call computes all blocks of a step, without hooks, so layers must be checked
    first."""
    model, _ = model_and_ids()
    model.cpu().eval()
    weight = model.transformer.wte.weight
    with torch.no_grad(), kernels.use("cpu"):
        assert decode_layers(model, weight, 1) is not None
        assert decode_layers(quantize_int8(copy.deepcopy(model)), weight, 1) is not None
        parts = (f"transformer.h.2.{part}" for part in ("attn", "mlp", *PARTS))
        for name in ("transformer.ln_f", "transformer.h.2", *parts):
            handle = model.get_submodule(name).register_forward_hook(lambda *args: None)
            assert decode_layers(model, weight, 1) is None, name
            handle.remove()
        assert decode_layers(model, weight, 1) is not None


def test_hooks_fire_in_each_step_of_generation():
    model, idx = model_and_ids()
    model.eval()
    calls = []
    model.transformer.h[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    model.generate(idx[:, :2], 5, temperature=0.0)
    assert len(calls) == 5


def test_an_int8_layer_is_a_module():
    """Its forward computes the same as the model."""
    layer, x = nn.Linear(16, 8).to(DEVICE), torch.randn(3, 16, device=DEVICE)
    packed = Int8Linear(layer)
    assert torch.allclose(packed(x), layer(x), atol=0.05)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_trains_and_merges(fast):
    """PEFT's LoRA on all linear layers of the blocks raised AttributeError."""
    peft = pytest.importorskip("peft")
    model, idx = model_and_ids(fast)
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["c_attn", "c_fc", "c_proj"])
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 4 * 4
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(10):
        _, loss = adapted(idx, idx)
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    with torch.no_grad():
        logits, _ = adapted(idx)
        merged = adapted.merge_and_unload()
        assert type(merged) is Model and not any("lora" in n for n in merged.state_dict())
        assert torch.allclose(merged(idx)[0], logits, atol=1e-4)
        assert not torch.allclose(plain.eval()(idx)[0], logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("fast", [False, True])
def test_fully_sharded(fast, tmp_path):
    """FSDP2 warned that each Block returned a view, so that its hooks might be lost."""
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or DEVICE != "cpu":
        pytest.skip("needs torch.distributed's gloo, on a CPU")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, idx = model_and_ids(fast)
    whole = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            fully_shard(block.attn, mesh=mesh)
            fully_shard(block.mlp, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            _, loss = model(idx, idx)
        loss.backward()
        _, want = whole(idx, idx)
        want.backward()
        assert torch.allclose(loss, want)
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_the_kernels_serve_a_stock_model(accelerated):
    """The checks of every layer must not prevent kernels for unmodified layers."""
    model, idx = model_and_ids(config=Config(8, 20, 1, 1, 16))
    with launches() as launched:
        model(idx, idx)[1].backward()
    assert len(launched) >= 8
