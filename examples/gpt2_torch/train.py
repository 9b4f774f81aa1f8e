"""Trains transformers' GPT-2 as a causal language model; gradwire's servers hold the parameters and run AdamW.

    gradwire run -s 2 -n 2 --optimizer adamw --lr 1e-3 --set init_from=FIRST -- python train.py CACHE --steps 200

CACHE is what data.py has made. A job that is resumed goes on at its checkpoint's step, with the same bits as one that was never
stopped.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from data import tokenizer
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import gradwire
import gradwire.torch

WARM_UP = 20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--steps", type=int, default=200, help="of the whole training, those before a resumption included")
    parser.add_argument("--until", type=int, help="end before this step, as if the time were over")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each worker and step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--weights", type=Path, help="a safetensors file to start from, instead of random values")
    parser.add_argument("--prompt", default="The kernel")
    return parser.parse_args()


def new_model(options: argparse.Namespace) -> GPT2LMHeadModel:
    """The same values in every worker; worker 0's count. Dropout would need a seed for every worker and step."""
    torch.manual_seed(1)
    config = GPT2Config(n_positions=options.length, n_embd=options.width, n_layer=options.layers, n_head=4, use_cache=False)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config)
    if options.weights:
        # The head is the embedding: a file has it once.
        missing, surplus = model.load_state_dict(load_file(options.weights), strict=False)
        assert not surplus and set(missing) <= {"lm_head.weight"}, f"{options.weights}: lacks {missing}, and has {surplus}"
    return model


def batch(tokens: np.ndarray, options: argparse.Namespace, step: int, worker: int) -> torch.Tensor:
    """The sequences of one worker and step: a function of the two numbers, so that a resumed job sees what it would have seen."""
    draw = np.random.default_rng([step, worker])
    starts = draw.integers(0, len(tokens) - options.length, size=options.batch)
    return torch.from_numpy(np.stack([tokens[start : start + options.length] for start in starts]).astype(np.int64))


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, tokens: np.ndarray, options: argparse.Namespace) -> float:
    """Of the first 64 stretches of the held-out documents."""
    count = min(64, len(tokens) // options.length)
    whole = torch.from_numpy(tokens[: count * options.length].astype(np.int64)).view(count, options.length)
    losses = [model(input_ids=part, labels=part).loss.item() for part in whole.split(options.batch)]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    options = arguments()
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    train, held_out = (np.load(options.cache / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out"))
    model = new_model(options)
    with gradwire.torch.Optimizer(model.named_parameters(), lr=options.rate) as optimizer:
        worker = optimizer.worker
        leads = worker.rank == 0
        if leads:
            count = sum(p.numel() for p in model.parameters())
            print(f"{count} parameters, {len(train)} tokens; perplexity at step {worker.clock}: {perplexity(model, held_out, options):.2f}")
        begun, first = time.monotonic(), worker.clock
        while worker.clock < (options.until or options.steps):
            step = worker.clock
            rate = options.rate * min((step + 1) / WARM_UP, 0.1 + 0.9 * (1 + math.cos(math.pi * step / options.steps)) / 2)
            optimizer.param_groups[0]["lr"] = rate
            inputs = batch(train, options, step, worker.rank)
            loss = model(input_ids=inputs, labels=inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if leads and (step % 20 == 0 or step == options.steps - 1):
                print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if leads and worker.clock > first:
            print(f"{1e3 * (time.monotonic() - begun) / (worker.clock - first):.0f} ms a step")
    # The job is over; the model keeps its parameters.
    if leads:
        print(f"perplexity at step {options.until or options.steps}: {perplexity(model, held_out, options):.2f}")
        encoding = tokenizer()
        torch.manual_seed(1)
        prompt = encoding(options.prompt, return_tensors="pt")
        room = min(60, options.length - prompt["input_ids"].shape[1])
        text = model.generate(**prompt, max_new_tokens=room, do_sample=True, top_k=40, pad_token_id=encoding.eos_token_id)
        print("text:", " ".join(encoding.decode(text[0]).split()))


if __name__ == "__main__":
    try:
        main()
    except gradwire.Preempted:
        sys.exit(gradwire.EXIT_PREEMPTED)
