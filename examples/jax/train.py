"""Characters of this project's documentation, each foretold from the eight before it by a perceptron in JAX.

    python train.py --alone adamw        one process, the whole batch, optax's own optimizer
    gradwire run … -- python train.py    a worker, its part of each batch (examples/jax/run)

Prints the loss of each 50th step and of text that was kept back; --save keeps losses and parameters.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

CONTEXT, WIDTH, HIDDEN, BATCH = 8, 16, 128, 64
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(3e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01),
}


def text() -> tuple[np.ndarray, np.ndarray, int]:
    """Characters by number: to train on, kept back, and how many there are."""
    documents = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    characters, numbers = np.unique(list("".join(path.read_text() for path in documents)), return_inverse=True)
    kept = len(numbers) // 10
    return numbers[:-kept], numbers[-kept:], len(characters)


def first(seed: int, count: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 3)
    draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[0])
    return {"embed": draw(keys[0], count, WIDTH) * np.sqrt(count),
            "hidden": {"w": draw(keys[1], CONTEXT * WIDTH, HIDDEN), "b": jnp.zeros(HIDDEN)},
            "out": {"w": draw(keys[2], HIDDEN, count), "b": jnp.zeros(count)}}


def loss_of(params: dict, rows: jax.Array) -> jax.Array:
    """Mean cross entropy of the last character of each row."""
    x = params["embed"][rows[:, :-1]].reshape(len(rows), -1)
    x = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    scores = x @ params["out"]["w"] + params["out"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, rows[:, -1]).mean()


def batch(characters: np.ndarray, step: int) -> np.ndarray:
    starts = np.random.default_rng(step).integers(len(characters) - CONTEXT, size=BATCH)
    return characters[starts[:, None] + np.arange(CONTEXT + 1)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--first", default="first.safetensors", help="the job's init_from")
    parser.add_argument("--save", help="PREFIX of files")
    options = parser.parse_args()
    characters, kept, count = text()
    if options.alone:
        params, optimizer, worker, rank, workers = first(1, count), OPTIMIZERS[options.alone](), None, 0, 1
    else:
        from gradwire_optax import connect

        params, optimizer, worker = connect(first(1, count), options.first)
        rank, workers = worker.rank, worker.workers
    state, gradient, losses = optimizer.init(params), jax.jit(jax.value_and_grad(loss_of)), []
    for step in range(options.steps):
        loss, gradients = gradient(params, batch(characters, step)[rank::workers])
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: {np.mean(losses[-50:]):.3f}")
    rows = np.lib.stride_tricks.sliding_window_view(kept, CONTEXT + 1)[::7]
    print(f"kept back: {float(loss_of(params, rows)):.3f} (by chance {np.log(count):.3f})")
    if worker:
        worker.finish()
    if options.save:
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        np.savez(f"{options.save}{rank}.npz", losses=losses, **leaves)


if __name__ == "__main__":
    main()
