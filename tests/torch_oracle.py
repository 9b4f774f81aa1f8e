"""The torch side of tests/torch_oracle.rs: reads cases as JSON from stdin, steps them with torch.optim, writes the parameters.

A case has `optimizer` (a class of torch.optim), `options` (its keyword arguments) and `groups`, each with `options`, `start`
(n numbers) and `gradients` (steps x n). The answer is, for each case, steps x groups x n parameters.
"""

import json
import sys

import torch

answers = []
for case in json.load(sys.stdin):
    tensors = [torch.tensor(group["start"], dtype=torch.float32) for group in case["groups"]]
    groups = [{"params": [tensor], **group["options"]} for tensor, group in zip(tensors, case["groups"])]
    optimizer = getattr(torch.optim, case["optimizer"])(groups, **case["options"])
    steps = []
    for step in range(len(case["groups"][0]["gradients"])):
        for tensor, group in zip(tensors, case["groups"]):
            tensor.grad = torch.tensor(group["gradients"][step], dtype=torch.float32)
        optimizer.step()
        steps.append([tensor.tolist() for tensor in tensors])
    answers.append(steps)
json.dump(answers, sys.stdout)
