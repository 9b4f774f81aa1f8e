"""Parameters on a GPU: gradients come off it while `backward` goes on and leave by `step`, and the model trains as one on one
process does. Skipped where torch sees no GPU."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

import gpt2  # noqa: E402
from gpt2 import BEGIN, INITIAL, MOMENTUM, NO_DECAY, STEPS, alone, far  # noqa: E402

TRAIN = (
    BEGIN
    + """
rank = int(os.environ["GRADWIRE_RANK"])
model = gpt2.Gpt2(7 + rank).cuda()
with Optimizer(gpt2.groups(model)) as optimizer:
    for step in range(STEPS):
        optimizer.zero_grad()
        PASSES
        # Writes on the program's stream behind a copy must not reach what leaves.
        junk = torch.full((1 << 20,), float("nan"), device="cuda")
        optimizer.step()
torch.cuda.synchronize()
torch.save({name: value.cpu() for name, value in model.state_dict().items()}, f"rank{rank}.pt")
"""
).replace("STEPS", str(STEPS))


@pytest.mark.parametrize(
    "passes",
    [
        "model.loss(gpt2.batch(step)[rank::2].cuda()).backward()",
        "with optimizer.no_sync():\n            (model.loss(gpt2.batch(step)[rank:rank + 1].cuda()) / 2).backward()\n"
        "        (model.loss(gpt2.batch(step)[rank + 2:rank + 3].cuda()) / 2).backward()",
    ],
    ids=["once", "accumulated"],
)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_model_on_a_gpu_trains_as_alone(run: Any, tmp_path: Path, passes: str, device: str) -> None:
    """With servers on the processor and on the GPU."""
    run(TRAIN.replace("PASSES", passes), *MOMENTUM, *NO_DECAY, *INITIAL, "--device", device, "--set", "chunk_bytes=4096")
    ours, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours[name], other[name]) for name in ours), "both workers have the servers' parameters"
    theirs, _ = alone(lambda model, batch: model.loss(batch), device="cuda")
    assert far(gpt2.Gpt2(7).state_dict(), theirs)["tokens.weight"] > 1e-2
    assert max(far(ours, theirs).values()) < 1e-5, far(ours, theirs)


def test_bf16_parameters_on_a_gpu(run: Any) -> None:
    """Steps too small for bf16 add up on the servers."""
    program = (
        BEGIN
        + """
parameter = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16, device="cuda"))
with Optimizer([("w", parameter)]) as optimizer:
    for step in range(32):
        optimizer.zero_grad()
        parameter.sum().backward()
        optimizer.step()
        assert (parameter - (1 - (step + 1) / 1024)).abs().max() <= 2 ** -9, (step, parameter[0])
assert parameter[0] == 1 - 32 / 1024
"""
    )
    for formats in ((), ("--gradient-dtype", "bf16", "--parameter-dtype", "bf16")):
        run(program, "--optimizer", "sgd", "--lr", str(2**-10), *INITIAL, *formats)


def test_a_gradient_waits_for_what_writes_it(run: Any) -> None:
    """Backward only queues work; what leaves is its result, although the GPU is busy for long before it."""
    run(
        BEGIN
        + """
parameter = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
big = torch.randn(4096, 4096, device="cuda")
with Optimizer([("w", parameter)]) as optimizer:
    for step in range(5):
        optimizer.zero_grad()
        loss = (parameter * (step + 1)).sum()
        for _ in range(20):
            big = torch.tanh(big @ big)
        (loss + 0 * big.sum()).backward()
        assert not torch.cuda.current_stream().query() or step == 0, "the GPU was done at once: the test shows nothing"
        optimizer.step()
    assert bool((parameter == -15).all()), parameter
""",
        *("--optimizer", "sgd", "--lr", "1", "--gradient-dtype", "f32"),
        *INITIAL,
        workers=1,
        servers=1,
    )
