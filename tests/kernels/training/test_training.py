"""Half layers for training against the model's own modules, run in float64 by autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from elastic_moe_kernels import native, training
from elastic_moe_kernels.errors import KernelError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_moe.model.config import ModelConfig
from elastic_moe.model.reference.transformer import DecoderLayer
from elastic_moe.model.rotary import rotary_angles
from elastic_moe.routing import Subnet, resolve
from elastic_moe.train.step.optim import Muon
from tests.conftest import TINY
from tests.kernels.step.steps import table_of

# Sizes that are no power of two, and granules of 12 channels.
CONFIG = replace(
    TINY,
    vocab_size=32,
    hidden_size=48,
    num_layers=1,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    num_experts=7,
    max_top_k=3,
    expert_hidden=48,
)
levels = pytest.mark.parametrize("level", native.levels())


def make_layer(config: ModelConfig, seed: int = 0) -> DecoderLayer:
    torch.manual_seed(seed)
    layer = DecoderLayer(config, dense=False).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.ndim == 1))
    return layer


def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().float().requires_grad_() for name, t in tensors.items()}


def assert_close(found: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Error against float64 at most twice that of the same arithmetic in plain float32."""
    scale = float(exact.abs().max())
    ours = float((found.double() - exact).abs().max())
    theirs = float((plain.double() - exact).abs().max())
    assert ours <= 2 * theirs + 4e-6 * scale, f"{what}: {ours} against {theirs}, of {scale}"
    assert scale > 0, what


def attention_by(
    layer: DecoderLayer, config: ModelConfig, x: Tensor, grad: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients of the module in a dtype."""
    layer.to(dtype)
    layer.zero_grad()
    x = x.to(dtype).detach().requires_grad_()
    angles = map(torch.tensor, rotary_angles(x.shape[1], config.head_dim, config.rope_theta))
    cos, sin = (angle.to(dtype) for angle in angles)
    out = x + layer.self_attn(layer.input_layernorm(x), cos, sin)
    out.backward(grad.to(dtype))
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **{n: g.clone() for n, g in grads.items()}}


@levels
@pytest.mark.parametrize(
    ("length", "change"),
    [
        (1, {}),
        (65, {}),  # one row more than a block
        (150, {"num_kv_heads": 6}),
        (64, {"num_kv_heads": 1, "head_dim": 32}),
        (70, {"qk_norm": "none"}),
        (40, {"rope": "interleaved"}),
        (33, {"hidden_size": 16, "num_heads": 1, "num_kv_heads": 1}),
    ],
    ids=["one-token", "block-and-one", "no-groups", "one-group", "no-norms", "interleaved", "tiny"],
)
def test_attention_and_its_gradients_are_those_of_the_module(
    level: str, length: int, change: dict
) -> None:
    config = replace(CONFIG, **change)
    layer = make_layer(config)
    x = torch.randn(3, length, config.hidden_size, dtype=torch.float64)
    grad = torch.randn_like(x)
    exact = attention_by(layer, config, x, grad, torch.float64)
    plain = attention_by(layer, config, x, grad, torch.float32)
    names = {
        "norm": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "o": "self_attn.o_proj.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
    }
    known = dict(layer.named_parameters())
    names = {short: name for short, name in names.items() if name in known}
    given = single({"x": x} | {short: known[name] for short, name in names.items()})
    angles = list(map(torch.tensor, rotary_angles(length, config.head_dim, config.rope_theta)))
    norms = {"q_norm": None, "k_norm": None} if config.qk_norm == "none" else {}
    out = training.attention_block(
        **given,
        **norms,
        cos=angles[0],
        sin=angles[1],
        shape=training.AttentionShape(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.rms_norm_eps,
            config.rope == "interleaved",
        ),
        level=level,
    )
    out.backward(grad.float())
    assert_close(out.detach(), plain["out"], exact["out"], "out")
    for short, tensor in given.items():
        name = names.get(short, short)
        if length == 1 and short in ("q", "k", "q_norm", "k_norm"):
            assert float(tensor.grad.abs().max()) < 1e-4  # one key: nothing to choose between
            continue
        assert_close(tensor.grad, plain[name], exact[name], short)


def experts_by(
    layer: DecoderLayer,
    subnet: Subnet,
    x: Tensor,
    grads: tuple[Tensor, float],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    layer.to(dtype)
    layer.zero_grad()
    x = x.to(dtype).detach().requires_grad_()
    table = table_of([subnet]).layer(0)
    rows = torch.zeros(len(x), dtype=torch.long)
    y, router_logits, topk_ids = layer.mlp(layer.post_attention_layernorm(x), table, rows)
    # P sum_e (share of the choices) (mean probability), over the pool
    pool = list(subnet.layers[0].expert_pool)
    share = torch.stack([(topk_ids == e).sum() for e in pool]) / (topk_ids >= 0).sum()
    mean = torch.softmax(router_logits[:, pool], dim=-1).mean(0)
    balance = len(pool) * (share * mean).sum()
    out = x + y
    (out * grads[0].to(dtype)).sum().add(balance * grads[1]).backward()
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    rest = {"out": out, "balance": balance, "logits": router_logits, "ids": topk_ids, "x": x.grad}
    return {n: t.detach().clone() for n, t in (rest | found).items()}


def choice_of(config: ModelConfig, subnet: Subnet, slots: int) -> training.ExpertsChoice:
    layer = subnet.layers[0]
    pool = torch.zeros(config.num_experts, dtype=torch.bool)
    pool[list(layer.expert_pool)] = True
    return training.ExpertsChoice(
        top_k=layer.top_k,
        min_experts=layer.min_experts,
        threshold=layer.sparsity_threshold,
        width=layer.expert_width * config.shape.channels_per_granule,
        pool=pool,
        slots=slots,
        renormalize=config.renormalize,
        epsilon=config.routing_epsilon,
    )


@levels
@pytest.mark.parametrize(
    ("tokens", "axes", "change"),
    [
        (150, {}, {}),
        (1, {}, {}),
        (90, {"top_k": 1}, {}),
        (90, {"expert_width": 3}, {}),  # 36 channels: no whole vectors
        (90, {"expert_width": 1, "top_k": 2}, {"renormalize": False}),
        (130, {"expert_pool": [1, 4, 6], "top_k": 2}, {}),
        (130, {"sparsity_threshold": 0.6, "min_experts": 2}, {}),
        (130, {"sparsity_threshold": 0.9, "expert_pool": 4}, {"renormalize": False}),
        (80, {"top_k": 2}, {"selection_bias": True, "routing_epsilon": 1e-12}),
    ],
    ids=[
        "full",
        "one-token",
        "one-expert",
        "narrow",
        "plain-weights",
        "pool-with-holes",
        "threshold",
        "all-axes",
        "bias",
    ],
)
def test_experts_and_their_gradients_are_those_of_the_module(
    level: str, tokens: int, axes: dict, change: dict
) -> None:
    config = replace(CONFIG, **change)
    layer = make_layer(config)
    subnet = resolve(config.shape, **axes)
    x = torch.randn(tokens, config.hidden_size, dtype=torch.float64)
    grads = torch.randn_like(x), 0.7
    exact = experts_by(layer, subnet, x, grads, torch.float64)
    plain = experts_by(layer, subnet, x, grads, torch.float32)
    names = {
        "norm": "post_attention_layernorm.weight",
        "router": "mlp.gate.weight",
        "gate": "mlp.experts.gate_proj",
        "up": "mlp.experts.up_proj",
        "down": "mlp.experts.down_proj",
    }
    known = dict(layer.named_parameters())
    given = single({"x": x} | {short: known[name] for short, name in names.items()})
    bias = layer.mlp.correction_bias
    out, balance, routed = training.experts_block(
        **given,
        correction_bias=None if bias is None else bias.detach().float(),
        choice=choice_of(config, subnet, config.max_top_k),
        eps=config.rms_norm_eps,
        level=level,
    )
    (out * grads[0].float()).sum().add(balance * grads[1]).backward()
    slots = exact["ids"].shape[1]
    assert torch.equal(routed.topk_ids[:, :slots], exact["ids"].to(torch.int32))
    assert bool((routed.topk_ids[:, slots:] == -1).all())
    if "threshold" in str(axes):
        assert bool((routed.topk_ids[:, :slots] == -1).any())
    assert_close(out.detach(), plain["out"], exact["out"], "out")
    assert_close(balance.detach(), plain["balance"], exact["balance"], "balance")
    assert_close(routed.router_logits, plain["logits"], exact["logits"], "logits")
    for short, tensor in given.items():
        name = names.get(short, short)
        if short == "router" and axes == {"top_k": 1}:
            continue  # one weight of 1: only the balance pulls, which is looked at elsewhere
        assert_close(tensor.grad, plain[name], exact[name], short)


def block_inputs(tokens: int = 200) -> dict[str, Tensor]:
    layer = make_layer(CONFIG)
    known = single(dict(layer.named_parameters()))
    return {
        "x": torch.randn(tokens, CONFIG.hidden_size),
        "norm": known["post_attention_layernorm.weight"],
        "router": known["mlp.gate.weight"],
        "gate": known["mlp.experts.gate_proj"],
        "up": known["mlp.experts.up_proj"],
        "down": known["mlp.experts.down_proj"],
        "correction_bias": None,
    }


@levels
@pytest.mark.usefixtures("threads")
def test_gradients_have_the_same_bits_on_any_number_of_threads(level: str) -> None:
    given = block_inputs()
    choice = choice_of(CONFIG, resolve(CONFIG.shape), 3)
    layer = single(dict(make_layer(CONFIG).self_attn.named_parameters()))
    cos, sin = map(torch.tensor, rotary_angles(100, CONFIG.head_dim, 1e4))
    shape = training.AttentionShape(6, 3, 16, 1e-6)

    def once() -> list[Tensor]:
        x = given["x"].clone().requires_grad_()
        out, balance, _ = training.experts_block(
            **{**given, "x": x}, choice=choice, eps=1e-6, level=level
        )
        weights = [layer[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        norms = [layer["q_norm.weight"], layer["k_norm.weight"]]
        out = training.attention_block(
            out.view(2, 100, -1), given["norm"], *weights, *norms, cos, sin, shape, level=level
        )
        tensors = [x, *(t for t in given.values() if t is not None and t.requires_grad)]
        grads = torch.autograd.grad(out.square().sum() + balance, [*tensors, *weights, *norms])
        return [out.detach(), balance.detach(), *grads]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = once()
        torch.set_num_threads(2)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(alone, once(), strict=True))
    finally:
        torch.set_num_threads(before)


@contextmanager
def moved_and_poisoned() -> Iterator[Callable[[], None]]:
    """Saved tensors come back as copies; the call given spoils everything that was saved."""
    originals: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        originals.append(tensor)
        return tensor.clone()

    def poison() -> None:
        with torch.no_grad():
            for tensor in originals:  # ids stay in range: garbage in the result, not a crash
                tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        yield poison


@contextmanager
def saved_on_cpu() -> Iterator[Callable[[], None]]:
    with torch.autograd.graph.save_on_cpu():
        yield lambda: None


@levels
@pytest.mark.parametrize("saving", [moved_and_poisoned, saved_on_cpu])
@pytest.mark.parametrize("block", ["attention", "experts", "head"])
def test_the_backward_pass_reads_what_autograd_saved(
    level: str, block: str, saving: Callable[[], AbstractContextManager[Callable[[], None]]]
) -> None:
    run, given = differentiable(block, level)
    loss = run(given)
    want = [loss.detach(), *torch.autograd.grad(loss, given)]
    given = [t.detach().clone().requires_grad_() for t in given]
    with saving() as poison:
        loss = run(given)
    poison()
    got = [loss.detach(), *torch.autograd.grad(loss, given)]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@levels
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("block", ["attention", "experts", "head"])
def test_activation_checkpointing_gives_the_same_bits(
    level: str, block: str, use_reentrant: bool
) -> None:
    run, given = differentiable(block, level)
    want = torch.autograd.grad(run(given), given)
    given = [t.detach().clone().requires_grad_() for t in given]
    loss = checkpoint(lambda *tensors: run(list(tensors)), *given, use_reentrant=use_reentrant)
    # What the forward pass freed is given out again, and spoiled.
    waste = [torch.full((200, size), torch.nan) for size in (3, 7, 48, 96, 192) for _ in range(20)]
    loss.backward()
    assert len(waste) == 100
    assert all(torch.equal(a, b.grad) for a, b in zip(want, given, strict=True))


def test_saved_tensors_of_another_kind_are_refused() -> None:
    run, given = differentiable("attention", None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.bfloat16()):
        loss = run(given)
    with pytest.raises(KernelError, match=r"saved tensor x must come back as torch\.float32"):
        loss.backward()


def differentiable(
    block: str, level: str | None
) -> tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]:
    """A function to a scalar, and what it is differentiable in."""
    inputs = block_inputs()
    x = inputs["x"].clone().requires_grad_()
    # The gradient of a mean would be one number, which is as right after a mix-up.
    scales = torch.randn_like(x)
    if block == "head":
        targets = torch.arange(len(x)) % CONFIG.vocab_size
        head = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, requires_grad=True)
        return lambda t: training.head_loss(*t, targets, level=level), [x, head]
    if block == "experts":
        names = ("norm", "router", "gate", "up", "down")
        choice = choice_of(CONFIG, resolve(CONFIG.shape, expert_width=3), 3)

        def experts(t: list[Tensor]) -> Tensor:
            out, balance, _ = training.experts_block(*t, None, choice, 1e-6, level=level)
            return (out * scales).sum() + balance

        return experts, [x, *(inputs[name] for name in names)]
    layer = single(dict(make_layer(CONFIG).self_attn.named_parameters()))
    cos, sin = map(torch.tensor, rotary_angles(100, CONFIG.head_dim, 1e4))
    shape = training.AttentionShape(6, 3, 16, 1e-6)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")

    def attention(t: list[Tensor]) -> Tensor:
        first, *rest = t
        # Angles of this call alone: only autograd keeps them.
        out = training.attention_block(
            first.view(2, 100, -1), *rest, cos.clone(), sin.clone(), shape, level=level
        )
        return (out.flatten(0, 1) * scales).sum()

    return attention, [x, inputs["norm"], *(layer[f"{name}.weight"] for name in names)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g.update(x=g["x"].double()), "x must be contiguous float32 \\(200, 48\\)"),
        (lambda g: g.update(gate=g["gate"].mT), "router|gate must be contiguous"),
        (lambda g: g.update(down=g["down"][:5]), "down must be contiguous float32 \\(7, 48, 48\\)"),
        (lambda g: g.update(up=nn.functional.pad(g["up"], (0, 0, 0, 16))), "up must be"),
        (lambda g: g.update(x=g["x"][:, :40]), "hidden size must be a multiple of 16, got 40"),
    ],
)
def test_tensors_of_another_kind_are_refused(spoil: Callable[[dict], None], message: str) -> None:
    given = block_inputs()
    spoil(given)
    choice = choice_of(CONFIG, resolve(CONFIG.shape), 3)
    with pytest.raises(KernelError, match=message):
        training.experts_block(**given, choice=choice, eps=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 49}, r"width must be in \[1, 48\], got 49"),
        ({"top_k": 4}, "got 1, 4, 3 and 7"),
        ({"min_experts": 0}, "got 0, 3, 3 and 7"),
        ({"pool": torch.zeros(7, dtype=torch.bool)}, "got 1, 3, 3 and 0"),
        ({"pool": torch.ones(8, dtype=torch.bool)}, r"pool must be \(7,\) bool"),
    ],
)
def test_a_choice_out_of_range_is_refused(change: dict, message: str) -> None:
    choice = replace(choice_of(CONFIG, resolve(CONFIG.shape), 3), **change)
    with pytest.raises(KernelError, match=message):
        training.experts_block(**block_inputs(), choice=choice, eps=1e-6)


@levels
@pytest.mark.parametrize(("rows", "vocab"), [(1, 32), (130, 70), (300, 515)])
def test_the_head_loss_and_its_gradients_are_those_of_pytorch(
    level: str, rows: int, vocab: int
) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 48).double(), torch.randn(vocab, 48).double()
    targets = torch.randint(vocab, (rows,))

    def plain(dtype: torch.dtype) -> list[Tensor]:
        a, b = (t.to(dtype).requires_grad_() for t in (x.detach(), weight.detach()))
        loss = nn.functional.cross_entropy(a @ b.T, targets)
        return [loss.detach(), *torch.autograd.grad(loss * 3, [a, b])]

    a, b = x.float().requires_grad_(), weight.float().requires_grad_()
    loss = training.head_loss(a, b, targets, level=level)
    found = [loss.detach(), *torch.autograd.grad(loss * 3, [a, b])]
    exact, single = plain(torch.float64), plain(torch.float32)
    for name, *three in zip(("loss", "x", "weight"), found, single, exact, strict=True):
        assert_close(*three, name)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 32, 1]), r"targets must be in \[0, 32\), got 0 to 32"),
        (torch.tensor([0, -1, 1]), r"targets must be in \[0, 32\), got -1 to 1"),
        (torch.zeros(3, dtype=torch.int32), r"contiguous int64 \(3,\), got torch.int32"),
        (torch.zeros(4, dtype=torch.int64), r"contiguous int64 \(3,\), got torch.int64 \(4,\)"),
    ],
)
def test_targets_of_another_kind_are_refused(targets: Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        training.head_loss(torch.randn(3, 48), torch.randn(32, 48), targets)


@levels
@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 16), (3, 16, 32), (2, 64, 16)])
def test_a_step_of_muon_is_that_of_pytorch(level: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(len(shape))
    start, momentum = torch.randn(shape).double(), torch.randn(shape).double()
    grads = [torch.randn(shape).double() for _ in range(3)]

    def plain(dtype: torch.dtype) -> Tensor:
        p = nn.Parameter(start.to(dtype))
        muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0.2)
        muon.state[p] = {"momentum": momentum.to(dtype).clone()}
        for grad in grads:
            p.grad = grad.to(dtype)
            muon.step()
        return p.detach()

    p, m = nn.Parameter(start.float()), momentum.float()
    for grad in grads:
        p.grad = grad.float()
        training.muon_step([p], [m], lr=0.1, beta=0.9, weight_decay=0.2, level=level)
    assert_close(p.detach(), plain(torch.float32), plain(torch.float64), "parameter")


def test_muon_steps_many_parameters_as_one_by_one() -> None:
    shapes = [(5, 16, 32), (32, 32), (2, 48, 16), (32, 32)]
    torch.manual_seed(0)
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    kwargs = {"lr": 0.1, "beta": 0.95, "weight_decay": 0.01}
    training.muon_step(together, [torch.zeros_like(p) for p in together], **kwargs)
    for q in alone:
        training.muon_step([q], [torch.zeros_like(q)], **kwargs)
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


def test_muon_refuses_what_it_cannot_step() -> None:
    p = nn.Parameter(torch.randn(32, 20))
    with pytest.raises(KernelError, match="has no gradient"):
        training.muon_step([p], [torch.zeros(32, 20)], lr=1.0, beta=0.9, weight_decay=0.0)
    p.grad = torch.randn(32, 20)
    with pytest.raises(KernelError, match=r"sides of multiples of 16, got \(32, 20\)"):
        training.muon_step([p], [torch.zeros(32, 20)], lr=1.0, beta=0.9, weight_decay=0.0)
