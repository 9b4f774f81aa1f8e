"""The measuring half of scripts/bench-peers: runs peers and gradwire in turn, and prints medians.

A repetition of a peer and one of gradwire follow each other, each as fresh processes with a warm-up of their own. A peer that
is not installed is named, with what would install it, and left out.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time

SECONDS = 0.5


def timed(round_, seconds):
    """Median and count of rounds of `round_`, after a warm-up of a tenth of the time."""
    end = time.perf_counter() + seconds / 10
    warm = 0
    while warm < 3 or time.perf_counter() < end:
        round_()
        warm += 1
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        round_()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rounds_of(round_, count):
    """The median of `count` rounds: what ranks that wait for each other must agree on."""
    for _ in range(max(3, count // 10)):
        round_()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        round_()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- what a peer's own process does ------------------------------------------------------------------------------------------


def adamw(elements, threads):
    import torch

    torch.set_num_threads(threads)
    parameter = torch.full((elements,), 0.01, dtype=torch.float32, requires_grad=True)
    parameter.grad = torch.full((elements,), 1e-3, dtype=torch.float32)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    return timed(optimizer.step, SECONDS)


def adamw_bf16(elements, threads):
    """Gradients come in bf16 and parameters leave in bf16: the fused step, and the casts that it needs around it."""
    import torch

    torch.set_num_threads(threads)
    parameter = torch.full((elements,), 0.01, dtype=torch.float32, requires_grad=True)
    parameter.grad = torch.empty_like(parameter)
    gradient = torch.full((elements,), 1e-3, dtype=torch.bfloat16)
    wire = torch.empty((elements,), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

    def round_():
        parameter.grad.copy_(gradient)
        optimizer.step()
        with torch.no_grad():
            wire.copy_(parameter)

    return timed(round_, SECONDS)


def deepspeed_adam(elements, threads):
    import torch

    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(torch.full((elements,), 0.01, dtype=torch.float32))
    parameter.grad = torch.full((elements,), 1e-3, dtype=torch.float32)
    optimizer = DeepSpeedCPUAdam([parameter], lr=1e-3, adamw_mode=True, fp32_optimizer_states=True)
    return timed(optimizer.step, SECONDS)


def tensorflow_cluster(ports):
    return {job: [f"127.0.0.1:{port}"] for job, port in zip(("chief", "ps", "worker"), ports, strict=True)}


def tensorflow_server(job, *ports):
    import tensorflow as tf

    job = ("chief", "ps", "worker")[job]
    tf.distribute.Server(tensorflow_cluster(ports), job_name=job, task_index=0, protocol="grpc").join()


def tensorflow_chief(elements, *ports):
    """Rounds of one worker: a plain SGD step on a variable that lies on the parameter server, then its new value."""
    import tensorflow as tf

    os.environ["GRPC_FAIL_FAST"] = "use_caller"
    spec = tf.train.ClusterSpec(tensorflow_cluster(ports))
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(spec, task_type="chief", task_id=0, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    with strategy.scope():
        variable = tf.Variable(tf.fill([elements], 0.01))

    @tf.function
    def push_pull():
        gradient = tf.fill([elements], 1e-3)
        with tf.control_dependencies([variable.assign_sub(gradient)]):
            return tf.reduce_sum(tf.identity(variable.read_value())[:1])

    def round_():
        coordinator.schedule(push_pull)
        coordinator.join()

    return timed(round_, SECONDS)


def gloo_rank(rank, world, port, elements, steps, rounds):
    import torch
    import torch.distributed as dist

    # As many threads as there are cores for each rank.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    parameter = torch.full((elements,), 0.01, dtype=torch.float32, requires_grad=True)
    parameter.grad = torch.full((elements,), 1e-3, dtype=torch.float32)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

    def round_():
        dist.all_reduce(parameter.grad)
        if steps:
            optimizer.step()

    median = rounds_of(round_, rounds)
    dist.barrier()
    dist.destroy_process_group()
    return median


def redis_exchange(port, size):
    import redis

    client = redis.Redis(port=port)
    value = b"x" * size

    def round_():
        client.set("k", value)
        if len(client.get("k")) != size:
            raise SystemExit("redis gave back another number of bytes")

    return timed(round_, SECONDS)


# ---- starting them -----------------------------------------------------------------------------------------------------------


def child(*arguments, python=sys.executable, **more):
    return subprocess.Popen([python, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **more)


def answer(process):
    out, _ = process.communicate(timeout=600)
    if process.returncode != 0:
        raise SystemExit(f"a peer's process ended with {process.returncode}")
    # The figure is what it says last: libraries print lines of their own.
    return float(out.split()[-1])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def part(name):
    """Runs that part in a process of its own, with these numbers, and gives its figure."""
    return lambda *numbers: answer(child(name, *numbers))


def run_gloo(world, elements, steps, rounds):
    port = free_port()
    ranks = [child("gloo-part", rank, world, port, elements, int(steps), rounds) for rank in range(world)]
    return max([answer(rank) for rank in ranks])


def run_tensorflow(python, elements):
    ports = [free_port() for _ in range(3)]
    environment = dict(os.environ, TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="")
    quiet = {"python": python, "env": environment, "stderr": subprocess.DEVNULL}
    servers = [child("tensorflow-server", job, *ports, **quiet) for job in (1, 2)]
    try:
        return answer(child("tensorflow-part", elements, *ports, **quiet))
    finally:
        for server in servers:
            server.kill()
            server.wait(timeout=10)


class Redis:
    """A redis server of our own on a free port, without persistence."""

    def __init__(self):
        self.port = free_port()
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > end:
                    self.stop()
                    raise SystemExit("redis-server does not listen")
                time.sleep(0.05)

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=10)


def run_ucx(test, transports, size, count):
    """ucx_perftest between two processes; the figure is bytes a second (bandwidth) or seconds of a round trip (latency)."""
    port = free_port()
    environment = dict(os.environ, UCX_TLS=transports, UCX_NET_DEVICES="lo", UCX_WARN_UNUSED_ENV_VARS="n")
    if "tcp" not in transports:
        del environment["UCX_NET_DEVICES"]
    base = ["ucx_perftest", "-p", str(port), "-t", test, "-s", str(size), "-n", str(count), "-f"]
    server = subprocess.Popen(base, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            client = subprocess.run(base + ["127.0.0.1"], env=environment, capture_output=True, text=True, timeout=120)
            lines = [line.split() for line in client.stdout.splitlines() if line.strip()[:1].isdigit() or "Final:" in line]
            if client.returncode == 0 and lines:
                numbers = [float(word) for word in lines[-1] if word.replace(".", "", 1).isdigit()]
                # iterations, then latency typical, average, overall in us, then MB/s average, overall (MB are 2^20 bytes).
                return numbers[5] * 2**20 if test.endswith("_bw") else 2 * numbers[2] / 1e6
            time.sleep(0.1)
        raise SystemExit(f"ucx_perftest gave no figure: {client.stderr.strip()}")
    finally:
        server.terminate()
        server.wait(timeout=10)


def ours(gradwire, *arguments):
    command = [gradwire, "bench", *map(str, arguments), "--json", "--repetitions", "1", "--seconds", str(SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# ---- the table ---------------------------------------------------------------------------------------------------------------


class Table:
    def __init__(self, options):
        self.options = options
        if not options.json:
            print("| what | bytes | peer | peer's figure | gradwire | gradwire / peer | gradwire's ceiling |")
            print("|---|---:|---|---:|---:|---:|---:|")

    def compare(self, what, size, peer, unit, run_peer, run_ours, figure, ceiling, prepare=lambda: None):
        """In turn, so that whatever else the machine does disturbs both."""
        context = prepare()
        theirs, own, ceilings = [], [], []
        for _ in range(self.options.repetitions):
            theirs.append(run_peer(context))
            row = run_ours()
            own.append(figure(row))
            ceilings.append(ceiling(row))
        theirs, own, best = (statistics.median(all) for all in (theirs, own, ceilings))
        row = {"what": what, "bytes": size, "peer": peer, "unit": unit, "theirs": theirs, "gradwire": own,
               "ratio": own / theirs, "ceiling": best, "repetitions": self.options.repetitions}
        if self.options.json:
            print(json.dumps(row), flush=True)
            return

        def show(x):
            if unit == "s":
                return f"{x * 1e6:.1f} us"
            return f"{x / 1e9:.2f} G{unit}" if x >= 1e9 else f"{x / 1e6:.1f} M{unit}"

        print(f"| {what} | {size} | {peer} | {show(theirs)} | {show(own)} | {own / theirs:.2f} | {show(best)} |", flush=True)


def median_s(row):
    return row["latency_us_p50"] / 1e6


def ceiling_s(row):
    return row["ceiling_latency_us"] / 1e6


def rate(row):
    return row["goodput_bytes_per_s"]


def ceiling_rate(row):
    return row["ceiling_bytes_per_s"]


def compare_adamw(table, options, size, peer, run_peer, dtype="f32"):
    """A peer's step of AdamW beside ours, by parameters a second, with one thread and with two. `run_peer(elements, threads)` is the
    median time of a step in seconds. In f32 neither writes a copy of the parameters; in bf16 both do."""
    elements = size // (4 if dtype == "f32" else 2)
    what = "f32" if dtype == "f32" else f"gradients and parameters {dtype}"
    for threads in (1, 2):
        table.compare(
            f"AdamW, {what}, {threads} threads, parameters a second", size, peer, "parameters/s",
            lambda _: elements / run_peer(elements, threads),
            lambda: ours(options.gradwire, "optimizer", "--bytes", size, "--dtype", dtype, "--threads", threads),
            lambda row: row["parameters_per_s"],
            lambda row: row["ceiling_bytes_per_s"] / row["bytes_per_parameter"],
        )


def with_torch(table, options):
    import torch

    name = f"torch {torch.__version__}"
    for size in options.bytes:
        elements = size // 4
        compare_adamw(table, options, size, f"{name} AdamW(fused=True)", part("adamw-part"))
        for steps, optimizer in ((False, "none"), (True, "adamw")):
            # About as long as everything else here takes.
            rounds = max(10, min(2000, int(SECONDS * 5e8 / max(size, 65536))))
            what = "all-reduce and AdamW" if steps else "all-reduce"
            table.compare(
                f"{what} of 2 ranks; push-pull of 2 workers, 1 server, {optimizer}, tcp", size, f"{name} gloo", "s",
                lambda _: run_gloo(2, elements, steps, rounds),
                lambda: ours(options.gradwire, "push-pull", "--bytes", size, "--workers", 2, "--optimizer", optimizer),
                median_s, ceiling_s,
            )


def with_torch_bf16(table, options):
    import torch

    peer = f"torch {torch.__version__} AdamW(fused=True) and two casts"
    for size in options.bytes:
        compare_adamw(table, options, size, peer, part("adamw-bf16-part"), "bf16")


def with_deepspeed(table, options):
    try:
        # Importing it would print.
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return print("not compared: deepspeed is not installed", file=sys.stderr)
    for size in options.bytes:
        compare_adamw(table, options, size, f"DeepSpeed {version} CPUAdam", part("deepspeed-part"))


def with_tensorflow(table, options):
    if not options.tensorflow:
        return print("not compared: tensorflow is not installed", file=sys.stderr)
    for size in options.bytes:
        table.compare(
            "step and read of a variable on the parameter server; push-pull, 1 worker, 1 server, none, tcp", size,
            "TensorFlow ParameterServerStrategy", "s",
            lambda _: run_tensorflow(options.tensorflow, size // 4),
            lambda: ours(options.gradwire, "push-pull", "--bytes", size), median_s, ceiling_s,
        )


def with_redis(table, options):
    if not shutil.which("redis-server"):
        return print("not compared: redis-server is not installed (Debian: apt install redis-server)", file=sys.stderr)
    server = Redis()
    try:
        for size in options.bytes:
            table.compare(
                "SET and GET; push-pull, 1 worker, 1 server, none, tcp", size, "Redis", "s",
                lambda _: part("redis-part")(server.port, size),
                lambda: ours(options.gradwire, "push-pull", "--bytes", size), median_s, ceiling_s,
            )
    finally:
        server.stop()


def with_ucx(table, options):
    if not shutil.which("ucx_perftest"):
        return print("not compared: ucx_perftest is not installed (Debian: apt install ucx-utils)", file=sys.stderr)
    for transport, transports in (("tcp", "tcp,self"), ("shm", "sm,self")):
        for size in options.bytes:
            count = max(100, min(100_000, 2_000_000_000 // size))
            table.compare(
                f"one-sided put; push, {transport}", size, "UCX ucp_put_bw", "B/s",
                lambda _: run_ucx("ucp_put_bw", transports, size, count),
                lambda: ours(options.gradwire, "push", "--bytes", size, "--transport", transport), rate, ceiling_rate,
            )
        table.compare(
            f"round trip of 64 bytes; latency, {transport}", 64, "UCX tag_lat", "s",
            lambda _: run_ucx("tag_lat", transports, 64, 20_000),
            lambda: ours(options.gradwire, "latency", "--transport", transport), median_s, ceiling_s,
        )


PEERS = {
    "torch": with_torch,
    "torch-bf16": with_torch_bf16,
    "deepspeed": with_deepspeed,
    "tensorflow": with_tensorflow,
    "redis": with_redis,
    "ucx": with_ucx,
}


def main():
    parts = {
        "adamw-part": lambda elements, threads: adamw(elements, threads),
        "gloo-part": lambda rank, world, port, elements, steps, rounds: gloo_rank(rank, world, port, elements, steps, rounds),
        "adamw-bf16-part": adamw_bf16,
        "deepspeed-part": deepspeed_adam,
        "tensorflow-part": tensorflow_chief,
        "tensorflow-server": tensorflow_server,
        "redis-part": redis_exchange,
    }
    if len(sys.argv) > 1 and sys.argv[1] in parts:
        figure = parts[sys.argv[1]](*map(int, sys.argv[2:]))
        print(figure, flush=True)
        # TensorFlow's and DeepSpeed's threads need not end in order.
        os._exit(0)
    parser = argparse.ArgumentParser(prog="scripts/bench-peers", description="gradwire beside its peers, in turn in one run.")
    parser.add_argument("--gradwire", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, nargs="+", default=[65536, 1 << 20, 16 << 20], help="sizes, multiples of 64")
    parser.add_argument("--repetitions", type=int, default=7, help="of each comparison; medians are printed")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter that has tensorflow")
    parser.add_argument("--json", action="store_true", help="an object a line instead of a table")
    options = parser.parse_args()
    if any(size <= 0 or size % 64 for size in options.bytes):
        parser.error("--bytes: every size is a multiple of 64")
    table = Table(options)
    for name in options.only:
        PEERS[name](table, options)


main()
