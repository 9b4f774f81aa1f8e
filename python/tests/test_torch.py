"""``gradwire.torch.Optimizer`` in jobs of two workers, beside one process of torch with twice the batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import gpt2  # noqa: E402
from gpt2 import BEGIN, INITIAL, NO_DECAY, far  # noqa: E402

STEPS = 50

GPT2 = (
    BEGIN
    + """
rank = int(os.environ["GRADWIRE_RANK"])
model = gpt2.Gpt2(7 + rank)
with Optimizer(gpt2.groups(model)) as optimizer:
    assert optimizer.worker.rank == rank
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model.loss(gpt2.batch(step)[rank::2])
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
torch.save((losses, model.state_dict()), f"rank{rank}.pt")
"""
).replace("STEPS", str(STEPS))


def alone(optimizer: Any, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses and parameters of one process with the whole batch."""
    torch.set_num_threads(1)
    model = gpt2.Gpt2(7)
    decay, keep = gpt2.groups(model)
    stepper = optimizer([decay, keep | {"weight_decay": 0.0}], **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: 1 / (1 + step / 4))
    losses = []
    for step in range(STEPS):
        stepper.zero_grad()
        loss = model.loss(gpt2.batch(step))
        loss.backward()
        stepper.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, model.state_dict()


SGD = ("sgd", torch.optim.SGD, 0.5, {"weight_decay": 0.01}, ("optimizer.weight_decay=0.01",))
MOMENTUM = ("sgd", torch.optim.SGD, 0.1, {"momentum": 0.9}, ("optimizer.momentum=0.9",))
ADAM = ("adam", torch.optim.Adam, 3e-3, {"weight_decay": 0.0}, ())
ADAMW = (
    "adamw",
    torch.optim.AdamW,
    3e-3,
    {"weight_decay": 0.1, "betas": (0.9, 0.95)},
    ("optimizer.weight_decay=0.1", "optimizer.beta2=0.95"),
)


def case(name: str, values: Any, long: bool = False) -> Any:
    """A parameter set of a test; a long one is left to scripts/test --all."""
    return pytest.param(*values, id=name, marks=[pytest.mark.long] if long else [])


KINDS = [case("sgd", SGD, long=True), case("momentum", MOMENTUM), case("adamw", ADAMW), case("adam", ADAM, long=True)]


@pytest.mark.parametrize(("kind", "optimizer", "rate", "options", "settings"), KINDS)
def test_two_workers_train_what_one_process_trains(
    run: Any, tmp_path: Path, kind: str, optimizer: Any, rate: float, options: dict[str, Any], settings: tuple[str, ...]
) -> None:
    """A GPT-2 with a tied weight, two parameter groups and a schedule; worker 0's first values become worker 1's."""
    flags = [flag for setting in settings for flag in ("--set", setting)]
    run(GPT2, "--optimizer", kind, "--lr", str(rate), *flags, *NO_DECAY, *INITIAL, "--set", "chunk_bytes=4096")
    (losses_0, ours), (losses_1, other) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    assert ours["head.weight"].data_ptr() == ours["tokens.weight"].data_ptr()
    losses, theirs = alone(optimizer, lr=rate, **options)
    moved = far(gpt2.Gpt2(7).state_dict(), theirs)
    assert moved["tokens.weight"] > 1e-2 and moved["blocks.0.attend.weight"] > 1e-3, moved
    for step, (one, two, whole) in enumerate(zip(losses_0, losses_1, losses)):
        assert abs((one + two) / 2 - whole) < 1e-4, f"step {step}"
    if kind == "sgd":
        assert max(far(ours, theirs).values()) < 1e-5, far(ours, theirs)


DDP = """
import os, sys, torch
import gpt2
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")

class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.loss(batch)

model = gpt2.Gpt2(7 + rank)
whole = torch.nn.parallel.DistributedDataParallel(Loss(model))
decay, keep = gpt2.groups(model)
optimizer = torch.optim.OPTIMIZER([decay, keep | {"weight_decay": 0.0}], **OPTIONS)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))
losses = []
for step in range(STEPS):
    optimizer.zero_grad()
    loss = whole(gpt2.batch(step)[rank::2])
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
torch.save((losses, model.state_dict()), f"ddp{rank}.pt")
torch.distributed.destroy_process_group()
""".replace("STEPS", str(STEPS))


def with_ddp(place: Path, optimizer: Any, **options: Any) -> None:
    """The same training by two processes of DistributedDataParallel over gloo; they leave their outcome in `place`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = place / "ddp.py"
    program.write_text(DDP.replace("OPTIMIZER", optimizer.__name__).replace("OPTIONS", repr(options)))
    found = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": found}
    ranks = [
        subprocess.Popen([sys.executable, str(program)], cwd=place, env=os.environ | meet | {"RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(("kind", "optimizer", "rate", "options", "settings"), [case("momentum", MOMENTUM, long=True), case("adamw", ADAMW)])
def test_two_workers_train_what_ddp_trains(
    run: Any, tmp_path: Path, kind: str, optimizer: Any, rate: float, options: dict[str, Any], settings: tuple[str, ...]
) -> None:
    """Two workers here and two processes of DDP, each with the same half of every batch."""
    flags = [flag for setting in settings for flag in ("--set", setting)]
    run(GPT2, "--optimizer", kind, "--lr", str(rate), *flags, *NO_DECAY, *INITIAL, "--set", "chunk_bytes=4096")
    with_ddp(tmp_path, optimizer, lr=rate, **options)
    for rank in range(2):
        (losses, ours), (theirs, state) = (torch.load(tmp_path / f"{kind}{rank}.pt") for kind in ("rank", "ddp"))
        for step, (one, other) in enumerate(zip(losses, theirs, strict=True)):
            assert abs(one - other) < 1e-4, f"rank {rank}, step {step}"
        if kind == "sgd":
            assert max(far(ours, state).values()) < 1e-5, far(ours, state)


def test_accumulation_unused_and_frozen_parameters(run: Any, tmp_path: Path) -> None:
    """Two backward passes a step, the last one or none of them pushing; a layer that is used in odd steps only; a frozen one.
    Chunks of a tensor each, so that an absent tensor takes no step, as in torch."""
    program = """
class Model(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.odd, self.last = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
        self.fixed = torch.nn.Linear(64, 64).requires_grad_(False)

    def loss(self, x, step):
        x = self.fixed(self.first(x).tanh())
        return (self.last(self.odd(x) if step % 2 else x) ** 2).mean()

def inputs(step, part):
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(step * 2 + part))
"""
    scope: dict[str, Any] = {"torch": torch}
    exec(program, scope)
    run(
        BEGIN
        + program
        + """
rank = int(os.environ["GRADWIRE_RANK"])
model = Model(3)
fixed = model.fixed.weight.clone()
with Optimizer(model.parameters(), lr=0.3, momentum=0.9) as optimizer:
    for step in range(8):
        optimizer.zero_grad(set_to_none=step % 3 != 0)
        halves = [inputs(step, part)[rank * 4:rank * 4 + 4] for part in range(2)]
        with optimizer.no_sync():
            (model.loss(halves[0], step) / 2).backward()
        if step % 4 < 2:
            (model.loss(halves[1], step) / 2).backward()
        else:
            with optimizer.no_sync():
                (model.loss(halves[1], step) / 2).backward()
        optimizer.step()
assert torch.equal(model.fixed.weight, fixed)
torch.save(model.state_dict(), f"rank{rank}.pt")
""",
        *("--optimizer", "sgd", "--lr", "0.1", "--set", "optimizer.momentum=0.9", "--set", "chunk_bytes=16384"),
        *INITIAL,
    )
    model = scope["Model"](3)
    stepper = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.3, momentum=0.9)
    for step in range(8):
        stepper.zero_grad(set_to_none=step % 3 != 0)
        for part in range(2):
            (model.loss(scope["inputs"](step, part), step) / 2).backward()
        stepper.step()
    ours = torch.load(tmp_path / "rank0.pt")
    assert max(far(ours, model.state_dict()).values()) < 1e-5, far(ours, model.state_dict())


@pytest.mark.parametrize(
    "formats", [("--gradient-dtype", "bf16", "--parameter-dtype", "bf16"), pytest.param((), marks=pytest.mark.long)], ids=["views", "copies"]
)
def test_bf16_parameters_with_f32_master_state(run: Any, formats: tuple[str, ...]) -> None:
    """Steps too small for bf16 add up on the servers; gradients and parameters are views of the same format, or are copied in a
    job of f32."""
    program = (
        BEGIN
        + """
parameter = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
with Optimizer([("w", parameter)]) as optimizer:
    for step in range(32):
        optimizer.zero_grad()
        parameter.sum().backward()
        optimizer.step()
        assert parameter.dtype == torch.bfloat16
        # 2 ** -10 is an eighth of what bf16 can tell from 1 downwards, by which torch's own bf16 SGD would never get anywhere.
        assert (parameter - (1 - (step + 1) / 1024)).abs().max() <= 2 ** -9, (step, parameter[0])
assert parameter[0] == 1 - 32 / 1024
"""
    )
    run(program, "--optimizer", "sgd", "--lr", str(2**-10), *INITIAL, *formats)


def test_gradients_leave_and_parameters_land_without_copies(run: Any) -> None:
    """p.grad and p.data are the registered memory, and gradients leave while backward is still going on."""
    run(
        BEGIN
        + """
import threading
model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False))
with Optimizer(model.named_parameters()) as optimizer:
    first, last = (optimizer._trained[layer.weight] for layer in model)
    inner = optimizer._inner
    before = {p.name: (p.values.data_ptr(), p.gradient.data_ptr()) for p in (first, last)}
    pushed_at_first_layer = []
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()
        @staticmethod
        def backward(context, gradient):
            pushed_at_first_layer.append((first.pushed is None, last.pushed is not None))
            return gradient
    for step in range(3):
        optimizer.zero_grad()
        (model[1](Probe.apply(model[0](torch.ones(2, 64)))) ** 2).mean().backward()
        for p in (first, last):
            assert (p.tensor.data_ptr(), p.tensor.grad.data_ptr()) == before[p.name], p.name
            buffer = torch.frombuffer(inner.gradient_buffer(p.index), dtype=torch.float32)
            assert buffer.data_ptr() == p.tensor.grad.data_ptr()
        optimizer.step()
        assert (model[0].weight == torch.frombuffer(inner.parameter_buffer(0), dtype=torch.float32).view(64, 64)).all()
    assert pushed_at_first_layer == [(True, True)] * 3, pushed_at_first_layer
    loss = (model(torch.ones(2, 64)) ** 2).mean()
    with optimizer.no_sync():
        loss.backward(retain_graph=True)
    optimizer.step()
    refused(RuntimeError, "modified by an inplace operation", loss.backward)
assert model[0].weight.isfinite().all(), "the model keeps its parameters"
""",
        *("--optimizer", "sgd", "--lr", "0.1", "--set", "chunk_bytes=16384"),
        *INITIAL,
    )


def test_what_cannot_be_done_is_refused_by_name(run: Any) -> None:
    """Each would give wrong parameters in silence."""
    run(
        BEGIN
        + """
from gradwire import ConfigError
model = torch.nn.Linear(8, 8)
frozen = torch.nn.Parameter(torch.ones(8), requires_grad=False)
x = torch.ones(2, 8)
named = [*model.named_parameters(), ("frozen", frozen)]
with Optimizer(named, lr=0.1, weight_decay=0.0) as optimizer:
    def backward():
        model(x).pow(2).mean().backward()
    backward()
    refused(RuntimeError, "backward reached `bias` a second time before step()", backward)
    refused(RuntimeError, "zero_grad() between backward() and step()", optimizer.zero_grad)
    optimizer.step()

    optimizer.zero_grad()
    refused(ConfigError, "backward(create_graph=True) left a gradient of `", model(x).pow(2).mean().backward, None, None, True)
    optimizer.zero_grad()

    backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    refused(RuntimeError, "was changed or dropped after backward() had sent it. Clip on the servers", optimizer.step)
    for p in optimizer._trained.values():
        p.version = p.pushed._version
    optimizer.param_groups[0]["lr"] = 0.05
    refused(ConfigError, "the learning rate was changed to 0.05 after backward(), and gradients have left with 0.1", optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()

    optimizer.zero_grad()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    refused(ConfigError, "`weight_decay` is 0.1 here and 0.0 on the servers", backward)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.zero_grad()
    frozen.requires_grad_(True)
    (frozen.sum() + model(x).sum()).backward()
    refused(RuntimeError, "`frozen` has a gradient but needed none", optimizer.step)
    frozen.grad = None
    optimizer.step()

    refused(ConfigError, "a group cannot be added", optimizer.add_param_group, {"params": [torch.nn.Parameter(torch.ones(1))]})
    adam = torch.optim.Adam(torch.nn.Linear(8, 8).parameters())
    adam.param_groups[0]["params"][0].grad = torch.zeros(8, 8)
    adam.step()
    refused(ConfigError, "the state of 1 parameters cannot be loaded", optimizer.load_state_dict, adam.state_dict())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.2
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.2 and saved["state"] == {}
    optimizer.zero_grad()
    before = model.bias.clone()
    backward()
    gradient = model.bias.grad.clone()
    optimizer.step()
    assert torch.allclose(model.bias, before - 0.2 * gradient, atol=1e-6), "the rate that was loaded"
    assert optimizer.step(lambda: optimizer.zero_grad() or (backward(), 5)[1]) == 5
""",
        *("--optimizer", "sgd", "--lr", "0.1", *INITIAL),
        workers=1,
    )


REFUSED_AT_START = [
    ("[('w', w)]", {}, "start the job with `--set init_from=FILE`"),
    ("[('w', w)], betas=(0.9, 0.999)", {}, "`betas` is no option of this job's optimizer, sgd"),
    ("[('w', w)], momentum=0.9", {}, "`momentum` is 0.9 here and 0.0 on the servers"),
    ("[{'params': [w]}, {'params': [v]}]", {}, "there are 2 parameter groups and the job has 1"),
    ("[('w', w), ('w', v)]", {}, "`w` is given twice"),
    ("[('d', w.double())]", {}, "`d` is no parameter"),
    ("[torch.nn.Parameter(torch.ones(2, dtype=torch.float64))]", {}, "`parameter.0` is torch.float64"),
    ("[torch.ones(2)]", {}, "no parameter needs a gradient"),
    ("[{'params': [w]}, {'params': [v], 'lr': 5.0}]", {"groups": True}, "group 1 has learning rate 5.0 beside 0.1 of group 0"),
]


def test_what_cannot_be_started_is_refused_by_name(run: Any) -> None:
    """Before anything is sent; each attempt in a job of its own would take too long, so the seat is a stand-in."""
    import gradwire.torch as under_test
    from gradwire import ConfigError, _gradwire

    optimizer = {"kind": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False}

    class Seat:
        rank = 0
        config = ""

        @staticmethod
        def take() -> "Seat":
            return Seat()

    real, _gradwire.Seat = _gradwire.Seat, Seat  # type: ignore[misc,assignment]
    try:
        for arguments, job, text in REFUSED_AT_START:
            groups = [{"name": "other"}] if job else []
            import json

            Seat.config = json.dumps({"optimizer": optimizer | {"groups": groups}, "start_clock": 0, "resume": None, "init_from": None})
            names = {"w": torch.nn.Parameter(torch.ones(2)), "v": torch.nn.Parameter(torch.ones(2)), "torch": torch}
            with pytest.raises(ConfigError) as error:
                eval(f"Optimizer({arguments})", names | {"Optimizer": under_test.Optimizer})
            assert text in str(error.value), arguments
    finally:
        _gradwire.Seat = real  # type: ignore[misc]


@pytest.mark.long
def test_first_values_of_the_job_and_a_resumed_job(run: Any, tmp_path: Path) -> None:
    """A file of the user's is never written over; a resumed job goes on from its checkpoint, in the clock and the values."""
    program = (
        BEGIN
        + """
model = torch.nn.Linear(4, 4, bias=False)
FIRST
with Optimizer(model.named_parameters(), OPTIONS) as optimizer:
    print(f"start: {optimizer.worker.clock} {model.weight.sum().item():.1f}")
    optimizer.zero_grad()
    model.weight.sum().backward()
    optimizer.step()
    print(f"end: {optimizer.worker.clock} {model.weight.sum().item():.1f}")
"""
    )
    sgd = ("--optimizer", "sgd", "--lr", "0.5", "--checkpoint-dir", "checkpoints")
    ones = program.replace("FIRST", "torch.nn.init.ones_(model.weight)")
    outcome = run(ones.replace("OPTIONS", ""), *sgd, *INITIAL, workers=1, servers=1)
    assert (outcome.values("start"), outcome.values("end")) == (["0 16.0"], ["1 8.0"])
    outcome = run(ones.replace("OPTIONS", ""), *sgd, *INITIAL, "--resume", "checkpoints", workers=1, servers=1)
    assert (outcome.values("start"), outcome.values("end")) == (["1 8.0"], ["2 0.0"])
    # Another program's file: the same without our mark.
    file = tmp_path / "first.safetensors"
    file.write_bytes(file.read_bytes().replace(b"gradwire-job", b"another-mark"))
    outcome = run(program.replace("FIRST", "").replace("OPTIONS", ""), *sgd[:4], *INITIAL, workers=1, code=1)
    assert "was not written by this optimizer" in outcome.output
    outcome = run(program.replace("FIRST", "").replace("OPTIONS", "initial='job'"), *sgd[:4], *INITIAL, workers=1)
    assert outcome.values("start") == ["0 16.0"]
