"""A worker of a gradwire job: push gradients, pull parameters; the servers hold the model and run the optimizer.

    worker = gradwire.join([gradwire.Tensor("w", (10, 10), init="xavier_uniform")])
    while worker.clock < 1000:
        w = worker.parameters("w")                  # copy the parameters out
        worker.push_pull("w", gradient_of(w))       # start: this worker's gradient
        worker.wait(timeout=60)                     # the servers have stepped: the new parameters are here
    worker.finish()

Start it with two servers and two workers on this machine:

    gradwire run -s 2 -n 2 --optimizer adamw --lr 1e-3 -- python train.py

:mod:`gradwire.torch` has the optimizer for PyTorch; it alone imports torch.
"""

from ._gradwire import __version__
from .errors import (
    EXIT_PREEMPTED,
    BusyError,
    ClosedError,
    ConfigError,
    DeadlineError,
    Error,
    ForkedError,
    JobFailed,
    Left,
    Preempted,
    RefusedError,
    SystemFailure,
)
from .worker import Tensor, Worker, join

__all__ = [
    "EXIT_PREEMPTED",
    "BusyError",
    "ClosedError",
    "ConfigError",
    "DeadlineError",
    "Error",
    "ForkedError",
    "JobFailed",
    "Left",
    "Preempted",
    "RefusedError",
    "SystemFailure",
    "Tensor",
    "Worker",
    "__version__",
    "join",
]
