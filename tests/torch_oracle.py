"""The torch side of tests/torch_oracle.rs: reads requests as JSON from stdin, has torch answer them, writes the answers.

The kind of a request says what it is:

`optimizer`: steps with torch.optim. It has `optimizer` (a class of torch.optim), `options` (its keyword arguments) and `groups`,
each with `options`, `start` (n numbers) and `gradients` (steps x n). The answer is steps x groups x n parameters.

`clip`: torch.nn.utils.clip_grad_norm_ over `gradients` (tensors x n) to `limit`. The answer is the norm and the clipped gradients.

`scaler`: torch.amp.GradScaler with `options` over `gradients` (steps x n; null is infinity, and "nan" not a number), each
multiplied by the scale, with plain SGD of rate 1 from zero. The answer is, for each step, whether it was skipped, the scale after
it, and the parameters.
"""

import json
import math
import sys

import torch


def optimizer(case):
    tensors = [torch.tensor(group["start"], dtype=torch.float32) for group in case["groups"]]
    groups = [{"params": [tensor], **group["options"]} for tensor, group in zip(tensors, case["groups"])]
    optimizer = getattr(torch.optim, case["optimizer"])(groups, **case["options"])
    steps = []
    for step in range(len(case["groups"][0]["gradients"])):
        for tensor, group in zip(tensors, case["groups"]):
            tensor.grad = torch.tensor(group["gradients"][step], dtype=torch.float32)
        optimizer.step()
        steps.append([tensor.tolist() for tensor in tensors])
    return steps


def clip(case):
    parameters = []
    for gradient in case["gradients"]:
        parameter = torch.nn.Parameter(torch.zeros(len(gradient)))
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        parameters.append(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, case["limit"])
    return {"norm": norm.item(), "gradients": [parameter.grad.tolist() for parameter in parameters]}


def scaler(case):
    special = {None: math.inf, "nan": math.nan}
    parameter = torch.nn.Parameter(torch.zeros(len(case["gradients"][0])))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", **case["options"])
    scaler.scale(torch.zeros(1))  # it makes its tensors when it is used first
    steps = []
    for gradient in case["gradients"]:
        values = [special[value] if value in (None, "nan") else value for value in gradient]
        before = parameter.detach().clone()
        parameter.grad = torch.tensor(values, dtype=torch.float32) * torch.tensor(scaler.get_scale(), dtype=torch.float32)
        scaler.step(optimizer)
        scaler.update()
        skipped = torch.equal(before, parameter.detach())
        steps.append({"skipped": skipped, "scale": scaler.get_scale(), "parameters": parameter.tolist()})
    return steps


json.dump([globals()[case["kind"]](case) for case in json.load(sys.stdin)], sys.stdout)
