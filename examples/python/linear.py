"""The smallest example: two workers learn a 10 x 10 matrix; the servers run SGD.

    gradwire run -s 1 -n 2 --optimizer sgd --lr 0.1 -- python examples/python/linear.py
"""

import numpy as np

import gradwire

N = 10
TARGET = (np.arange(N)[:, None] + np.arange(N)) * np.float32(0.1)


def main() -> None:
    worker = gradwire.join([gradwire.Tensor("w", (N, N), init=("normal", 1.0))])
    loss = 0.0
    while worker.clock < 1000:
        w = worker.parameters("w")
        # y = x a, where a is the matrix to be found; each worker has its own inputs.
        x = np.sin(worker.clock * 7 + np.arange(N) * 3 + worker.rank * 5).astype(np.float32)
        error = x @ (w - TARGET)
        loss = float(error @ error) / N
        worker.push_pull("w", np.outer(x, 2 * error / N))
        worker.wait(timeout=60)
    print(f"the loss went to {loss:.9f}")
    worker.finish()


if __name__ == "__main__":
    main()
