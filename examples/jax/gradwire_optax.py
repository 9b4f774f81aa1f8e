"""A worker of a gradwire job in the form of an optax transformation: the servers run the optimizer, and an update is what takes
this worker's parameters to theirs.

    params, servers, worker = connect(params, "first.safetensors")      # the job has init_from=first.safetensors
    state = servers.init(params)
    for batch in batches(worker.rank, worker.workers):
        updates, state = servers.update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    worker.finish()

`update` waits for the servers, so it stands outside of jax.jit, beside a jitted gradient. Kind and constants of the optimizer are
the job's (`gradwire run --optimizer adamw --lr 1e-3`).
"""

import os
from typing import Any

import gradwire
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file


def connect(params: Any, first: str) -> tuple[Any, optax.GradientTransformation, gradwire.Worker]:
    """Join the job with a tree of arrays.

    Args:
        params: float32 arrays; those of worker 0 are everybody's first values.
        first: the path of the job's init_from, to which worker 0 writes them before servers read it.

    Returns:
        The parameters that the job starts from, the transformation, and the worker.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    if os.environ["GRADWIRE_RANK"] == "0":
        save_file({name: np.array(leaf) for name, (_, leaf) in zip(names, paths)}, first)
    worker = gradwire.join([gradwire.Tensor(name, leaf.shape) for name, (_, leaf) in zip(names, paths)])

    def parameters() -> Any:
        # Copies: jax may keep what it is given, and the next step is written to registered memory.
        return jax.tree.unflatten(tree, [jnp.array(worker.parameters(name)) for name in names])

    def init(_: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(gradient: Any, state: optax.EmptyState, params: Any) -> tuple[Any, optax.EmptyState]:
        # Last layers first, as backward makes them.
        for name, leaf in reversed(list(zip(names, jax.tree.leaves(gradient)))):
            worker.push_pull(name, leaf)
        worker.wait()
        return jax.tree.map(jnp.subtract, parameters(), params), state

    return parameters(), optax.GradientTransformation(init, update), worker
