"""What people train with beside plain f32: autocast, torch.compile, clipping by global norm, a loss scale; and a weight that is tied.
Each in a job of two workers, beside one process of torch that does the same."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import gpt2  # noqa: E402
from gpt2 import BEGIN, INITIAL, MOMENTUM, NO_DECAY, STEPS, alone, far  # noqa: E402

TRAIN = (
    BEGIN
    + """
rank = int(os.environ["GRADWIRE_RANK"])
model = gpt2.Gpt2(7 + rank)
with Optimizer(gpt2.groups(model)) as optimizer:
    LOSS
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(gpt2.batch(step)[rank::2]).backward()
        optimizer.step()
torch.save(model.state_dict(), f"rank{rank}.pt")
"""
).replace("STEPS", str(STEPS))


def moved(state: dict[str, Any]) -> float:
    """How far the embedding has come from its first values."""
    return far(gpt2.Gpt2(7).state_dict(), state)["tokens.weight"]


def test_autocast(run: Any, tmp_path: Path) -> None:
    """Products in bf16, parameters and gradients in f32. Ten times nearer to autocast in one process than to training without."""
    loss = """
    def loss(batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.loss(batch)
    """
    run(TRAIN.replace("    LOSS", loss), *MOMENTUM, *NO_DECAY, *INITIAL)

    def cast(model: Any, batch: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model.loss(batch)

    ours, (theirs, _), (plain, _) = torch.load(tmp_path / "rank0.pt"), alone(cast), alone(lambda model, batch: model.loss(batch))
    assert moved(theirs) > 1e-2
    near, away = (far(ours, other)["tokens.weight"] for other in (theirs, plain))
    assert near < 1e-4 and near * 10 < away, (near, away)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compile(run: Any, tmp_path: Path, backend: str) -> None:
    """The compiled loss runs as one graph, and pushes as the plain one does."""
    loss = f"loss = torch.compile(model.loss, backend='{backend}', fullgraph=True)"
    check = 'from torch._dynamo.utils import counters\nassert counters["stats"]["unique_graphs"] == 1, counters\n'
    run(TRAIN.replace("LOSS", loss) + check, *MOMENTUM, *NO_DECAY, *INITIAL, "--set", "chunk_bytes=4096")
    theirs, _ = alone(lambda model, batch: model.loss(batch))
    ours = torch.load(tmp_path / "rank0.pt")
    assert moved(theirs) > 1e-2
    assert max(far(ours, theirs).values()) < 1e-5, far(ours, theirs)


def test_clipping_by_global_norm(run: Any, tmp_path: Path) -> None:
    """The servers clip by the norm over all tensors, shards and workers, as `clip_grad_norm_` does to the whole batch's gradient."""
    unclipped = sorted(alone(lambda model, batch: model.loss(batch))[1])
    limit = unclipped[STEPS // 2]
    theirs, norms = alone(lambda model, batch: model.loss(batch), limit)
    # Some steps are clipped, and some are not.
    assert min(norms) < limit < max(norms), norms
    run(TRAIN.replace("LOSS", "loss = model.loss"), *MOMENTUM, *NO_DECAY, *INITIAL, "--clip-norm", str(limit))
    ours = torch.load(tmp_path / "rank0.pt")
    assert max(far(ours, theirs).values()) < 1e-5, far(ours, theirs)


def test_a_loss_scale_takes_the_place_of_a_grad_scaler(run: Any, tmp_path: Path) -> None:
    """Gradients travel in f16. A step that is not finite at one worker is skipped by all, and the scale goes the way of torch's."""
    program = TRAIN.replace("LOSS", "scales, loss = [], None").replace(
        "loss(gpt2.batch(step)[rank::2]).backward()",
        """scales.append(optimizer.worker.loss_scale)
        scaled = model.loss(gpt2.batch(step)[rank::2]) * scales[-1]
        (scaled * 1e30 if (step, rank) == (4, 1) else scaled).backward()""",
    )
    save = 'torch.save(scales, f"scales{rank}.pt")\n'
    dynamic = ("--loss-scale", "dynamic", "--set", "loss_scale.initial=1024", "--set", "loss_scale.growth_interval=2")
    run(program + save, *MOMENTUM, *NO_DECAY, *INITIAL, "--gradient-dtype", "f16", *dynamic)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    model = gpt2.Gpt2(7)
    stepper = torch.optim.SGD(gpt2.groups(model), lr=0.1, momentum=0.9)
    scales = []
    for step in range(STEPS):
        stepper.zero_grad()
        scales.append(scaler.get_scale())
        loss = scaler.scale(model.loss(gpt2.batch(step)))
        (loss * 1e38 if step == 4 else loss).backward()
        scaler.step(stepper)
        scaler.update()
    assert len(set(scales)) > 2 and min(scales[5:]) < scales[4], scales
    assert [torch.load(tmp_path / f"scales{rank}.pt") for rank in range(2)] == [scales, scales]
    ours = torch.load(tmp_path / "rank0.pt")
    # f16 keeps 11 bits of a gradient.
    assert moved(model.state_dict()) > 1e-2
    assert max(far(ours, model.state_dict()).values()) < 1e-3, far(ours, model.state_dict())


def test_a_tied_weight_leaves_once_when_its_last_use_has_been_added(run: Any) -> None:
    """What leaves is the sum over both uses, and it leaves after the embedding's, at the very end of backward."""
    run(
        BEGIN
        + """
model = gpt2.Gpt2(7)
with Optimizer(model.named_parameters()) as optimizer:
    order, push = [], optimizer._push
    def watch(parameter):
        order.append((parameter.name, parameter.tensor.grad.clone()))
        push(parameter)
    optimizer._push = watch
    for step in range(2):
        optimizer.zero_grad()
        order.clear()
        whole, = torch.autograd.grad(model.loss(gpt2.batch(step)), model.tokens.weight)
        model.loss(gpt2.batch(step)).backward()
        names = [name for name, _ in order]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters()) and len(set(names)) == len(names)
        at = names.index("tokens.weight")
        assert at > names.index("blocks.0.norm_1.weight"), names
        sent = order[at][1]
        assert torch.allclose(sent, whole, atol=1e-6) and sent.norm() > 1e-2, (step, sent.norm(), (sent - whole).norm())
        # It adds to no gradient, so it is no second backward.
        torch.autograd.grad(model.loss(gpt2.batch(step)), model.tokens.weight)
        optimizer.step()
""",
        *("--optimizer", "sgd", "--lr", "0.1", *INITIAL),
        workers=1,
    )


def test_registered_memory_as_torch_tensors(run: Any) -> None:
    """By DLPack, without a copy, in bf16 too, which NumPy does not have."""
    run(
        """
import torch
with gradwire.join([gradwire.Tensor("w", (2, 4), init=("constant", 1.0))]) as worker:
    gradient = torch.from_dlpack(worker.gradient_buffer("w")).view(2, 4)
    landed = torch.from_dlpack(worker.parameter_buffer("w")).view(2, 4)
    assert gradient.dtype == landed.dtype == torch.bfloat16 and bool((landed == 1).all())
    gradient.copy_(torch.arange(8.0).view(2, 4))
    worker.push_pull("w")
    worker.wait()
    assert bool((landed == 1 - torch.arange(8.0).view(2, 4)).all()), landed
""",
        *("--optimizer", "sgd", "--lr", "1", "--gradient-dtype", "bf16", "--parameter-dtype", "bf16"),
    )
