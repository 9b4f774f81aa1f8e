"""A small GPT-2 (Radford et al. 2019) in torch.nn: pre-norm blocks, learned positions, the output tied to the embedding; and its
batches, which are the same for whoever asks. How programs of jobs with torch begin, and what their tests share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NO_DECAY = ("--set", 'optimizer.groups=[{name = "no_decay", weight_decay = 0.0}]')
INITIAL = ("--set", "init_from=first.safetensors")

BEGIN = """
import gpt2, torch
from gradwire.torch import Optimizer
torch.set_num_threads(1)

def refused(kind, text, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        assert text in str(error), error
        return
    raise AssertionError(f"{call} went well")
"""

STEPS = 10
"""Of the jobs that :func:`alone` repeats."""
MOMENTUM = ("--optimizer", "sgd", "--lr", "0.1", "--set", "optimizer.momentum=0.9")

VOCABULARY, CONTEXT, WIDTH, HEADS, BATCH = 61, 16, 32, 4, 4


class Block(nn.Module):
    """Attention and a perceptron, each on a normalised input and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.attend(self.norm_1(x)).chunk(3, dim=-1)]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norm_2(x))


class Gpt2(nn.Module):
    """Two blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross entropy of the next token; ``batch`` has CONTEXT + 1 tokens a row."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(inputs) + self.positions.weight
        return functional.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), targets.flatten())


def batch(step: int) -> Tensor:
    """The step's tokens: runs that a model can learn."""
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    stride = torch.randint(1, 4, (BATCH, 1), generator=generator)
    return (first + stride * torch.arange(CONTEXT + 1)) % VOCABULARY


def groups(model: nn.Module) -> list[dict[str, object]]:
    """Matrices decay, vectors do not."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, parameter) for name, parameter in named if parameter.dim() > 1]},
        {"params": [(name, parameter) for name, parameter in named if parameter.dim() == 1]},
    ]


def alone(loss_of: Any, clip: float | None = None, device: str = "cpu") -> tuple[dict[str, Any], list[float]]:
    """Parameters, on the host, of one process that adds up the halves of each batch that two workers have under MOMENTUM; and the norms
    of its gradients."""
    torch.set_num_threads(1)
    model = Gpt2(7).to(device)
    stepper = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    norms = []
    for step in range(STEPS):
        stepper.zero_grad()
        for rank in range(2):
            (loss_of(model, batch(step)[rank::2].to(device)) / 2).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        stepper.step()
    return {name: value.cpu() for name, value in model.state_dict().items()}, norms


def far(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """By tensor: how far ours is from theirs, in terms of its norm."""
    assert list(ours) == list(theirs)
    return {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs}
