"""Step time of gradwire.torch.Optimizer beside DistributedDataParallel over gloo with AdamW, in turn, on one model and machine.

Two workers with one thread each. A step is forward, backward and step(); gradwire's backward pushes while it computes and its
step() waits for the servers, DDP's backward ends when gloo has summed and its step() computes AdamW. So the parts of a step are not
alike, and only its whole is compared: all that gradwire's step() does is wait, and DDP waits in backward. `alone` is one process
without anybody else: what the computation itself takes.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

VOCABULARY, LENGTH = 512, 64
RATE, DECAY = 1e-3, 0.1


class Model(nn.Module):
    """A decoder of pre-norm blocks in the shape of GPT-2."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.tokens(tokens) + self.positions.weight, mask=self.mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def work(kind: str, options: argparse.Namespace) -> None:
    """One worker's steps; rank 0 prints what each took, in milliseconds: forward, backward, step()."""
    torch.set_num_threads(1)
    model: nn.Module = Model(options.width, options.layers).to(options.device)
    if kind == "gradwire":
        import gradwire.torch

        optimizer = gradwire.torch.Optimizer(model.named_parameters(), lr=RATE, weight_decay=DECAY)
        rank, finish = optimizer.worker.rank, optimizer.finish
    else:
        rank, finish = int(os.environ.get("RANK", "0")), lambda: None
        if kind == "ddp":
            torch.distributed.init_process_group("gloo")
            model = nn.parallel.DistributedDataParallel(model)
            finish = torch.distributed.destroy_process_group
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    times, marks, loss = [], [], None

    def mark() -> None:
        if options.device != "cpu":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    for step in range(options.warm + options.steps):
        generator = torch.Generator().manual_seed(2 * step + rank)
        tokens = torch.randint(VOCABULARY, (options.batch, LENGTH), generator=generator).to(options.device)
        marks.clear()
        mark()
        optimizer.zero_grad()
        loss = model(tokens)
        mark()
        loss.backward()
        mark()
        optimizer.step()
        mark()
        if step >= options.warm:
            times.append([1e3 * (after - before) for before, after in zip(marks, marks[1:])])
    if rank == 0:
        print("RESULT", json.dumps({"times": times, "loss": loss.item()}), flush=True)
    finish()


def measure(kind: str, options: argparse.Namespace, home: Path) -> dict:
    """What rank 0 of one run has measured."""
    kind, _, servers = kind.partition(" ")
    worker = [sys.executable, __file__, "--work", kind, "--width", str(options.width), "--layers", str(options.layers)]
    worker += ["--device", options.device, "--batch", str(options.batch), "--steps", str(options.steps), "--warm", str(options.warm)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if kind == "gradwire":
        flags = ["-s", servers, "-n", "2", "--optimizer", "adamw", "--lr", str(RATE), "--set", f"optimizer.weight_decay={DECAY}"]
        flags += ["--set", f"device={options.server_device}", "--set", f"init_from={home / 'first.safetensors'}"]
        command = shutil.which("gradwire") or sys.exit("no gradwire on PATH")
        processes = [subprocess.Popen([command, "run", *flags, "--", *worker], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)]
    elif kind == "ddp":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [environment | place | {"RANK": str(rank)} for rank in range(2)]
        processes = [subprocess.Popen(worker, env=rank, stdout=subprocess.PIPE, text=True) for rank in ranks]
    else:
        processes = [subprocess.Popen(worker, env=environment, stdout=subprocess.PIPE, text=True)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"{kind} failed:\n{''.join(outputs)}")
    lines = "".join(outputs).splitlines()
    result = json.loads(next(line for line in lines if "RESULT " in line).split("RESULT ")[1])
    fabrics = [line.split("shards: ")[1] for line in lines if "paths between workers and shards: " in line]
    return result | {"fabric": f"{kind}: {servers} servers, paths: {fabrics[0]}" if fabrics else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences of each worker and step")
    parser.add_argument("--steps", type=int, default=30, help="that count, in a round")
    parser.add_argument("--warm", type=int, default=5, help="before them")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turn")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 2], help="of gradwire; each number has a row")
    parser.add_argument("--device", default="cpu", help="of the model; with `cuda` all ranks share one GPU")
    parser.add_argument("--server-device", default="cpu", help="of gradwire's servers: cpu, or gpu:0")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options)
    kinds = [*(f"gradwire {servers}" for servers in options.servers), "ddp", "alone"]
    steps: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    losses: dict[str, float] = {}
    fabrics: dict[str, None] = {}
    with tempfile.TemporaryDirectory() as home:
        for _ in range(options.rounds):
            for kind in kinds:
                result = measure(kind, options, Path(home))
                steps[kind] += result["times"]
                losses[kind] = result["loss"]
                fabrics |= {result["fabric"]: None} if result["fabric"] else {}
    # They train the same: one that is faster and wrong would be no news.
    if any(abs(losses[kind] - losses["ddp"]) > 1e-3 for kind in kinds if kind != "alone"):
        sys.exit(f"the losses differ: {losses}")
    parameters = sum(p.numel() for p in Model(options.width, options.layers).parameters())
    rows = []
    for kind in kinds:
        parts = [statistics.median(part) for part in zip(*steps[kind])]
        whole = sorted(sum(step) for step in steps[kind])
        quarter = len(whole) // 4
        spread = whole[quarter], whole[-1 - quarter]
        rows.append({"kind": kind, "step_ms": statistics.median(whole), "quartiles_ms": spread, "forward_ms": parts[0],
                     "backward_ms": parts[1], "step_call_ms": parts[2]})
    if options.json:
        return print(json.dumps({"parameters": parameters, "steps": options.rounds * options.steps, "fabrics": list(fabrics), "rows": rows}))
    print(f"{parameters} parameters, 2 workers, {os.cpu_count()} cores; {'; '.join(fabrics)}; medians of {options.rounds} x "
          f"{options.steps} steps\n")
    print("| | step, ms | quartiles | forward | backward | step() |\n|---|---:|---:|---:|---:|---:|")
    for row in rows:
        low, high = row["quartiles_ms"]
        print(f"| {row['kind']} | {row['step_ms']:.1f} | {low:.1f} to {high:.1f} | {row['forward_ms']:.1f} | "
              f"{row['backward_ms']:.1f} | {row['step_call_ms']:.1f} |")


if __name__ == "__main__":
    main()
