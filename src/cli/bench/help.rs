//! What `--help` teaches about the benchmarks.
//!
//! Invariant: every text begins with examples that run as they stand.

pub(super) const ALL: &str = "Examples:
  gradwire bench push-pull --bytes 64..64M                 64, 256, 1024 ... 67108864 bytes over tcp
  gradwire bench push-pull --bytes 64..64M --transport shm --plot shm.svg
  gradwire bench latency --transport shm --json            an object a line
  gradwire bench optimizer --optimizer adamw --dtype bf16 --threads 2
  gradwire bench checkpoint --bytes 1G --dir /mnt/checkpoints
  gradwire bench end-to-end --bytes 256M --backward-ms 150 --workers 2

Every benchmark measures its ceiling in the same run, repetition by repetition in turn: what the machine itself reaches with the
same bytes by the plainest means, as processes of their own. `share` is the rate over the ceiling's rate (for latency its speed),
`x ceiling` the median of a round over the ceiling's. Figures are medians over the repetitions. docs/performance.md defines every
one of them. Build with --release before you believe a figure.

The objects of --json have the fields benchmark, transport, bytes, workers, servers, goodput_bytes_per_s, latency_us_p50,
latency_us_p99, latency_us_p999, ceiling_bytes_per_s, ceiling_latency_us, cpu_s, bytes_copied_per_byte_sent (null where one has no
meaning), and then what is the benchmark's own.";

pub(super) const PUSH_PULL: &str = "Examples:
  gradwire bench push-pull                                 1 MiB, one worker, one server
  gradwire bench push-pull --bytes 64..64M --json          64, 256, 1024 ... 67108864 bytes, an object a line
  gradwire bench push-pull --bytes 16M --optimizer adamw --workers 2 --consistency ssp:2

--bytes is what a worker pushes and pulls in a round. For each size a job is started (real servers, real workers, the real fabric)
and, in turn with it, the fabric's ceiling: a raw echo, as many processes that send the same bytes by the means that the fabric
stands on and get them back. Over tcp these are plain sockets, over shm copies into memory that both sides map, with buffers that
rotate as the job's do (hot ones are in --json as ceiling_hot_*), over soft datagrams of 4096 bytes. Over verbs there is none yet:
compare with ib_write_bw. The rate counts payload in both directions; a round is over when all new parameters are in the worker's
memory.

The echo comes back whole or, above a chunk, also piece by piece as push-pull does; the faster of the two is the ceiling. Its
processes wait as gradwire's own threads do. Notes and headers carry their checksums as always; payloads carry none, on either
side.

--optimizer none (the default): a server always takes a step; this is the cheapest there is, plain SGD, which reads the gradient, and
reads and writes the master parameters (and, but in f32, writes the wire copy).";

pub(super) const PUSH: &str = "Examples:
  gradwire bench push --bytes 1M..64M --transport shm
  gradwire bench push --bytes 4M --consistency asp --workers 2

--bytes is what a worker pushes in a round. A round is over when the gradient has left the worker's memory, so rounds overlap as far
as the window of landing slots allows; the rate counts the payload of all rounds until a last push-pull has shown that everything is
applied. The ceiling streams the same messages with as many of them unanswered.";

pub(super) const PULL: &str = "Examples:
  gradwire bench pull --bytes 64..64M
  gradwire bench pull --bytes 16M --transport shm --workers 2

--bytes is what a worker pulls in a round. The parameters do not change, so servers send the same wire copy again and again. The
ceiling asks for each message with 64 bytes, as a pull does, and gets as many bytes back.";

pub(super) const LATENCY: &str = "Examples:
  gradwire bench latency                                   push-pull of 64 bytes over tcp
  gradwire bench latency --bytes 64,4K --transport shm --json

--bytes is what a worker pushes and pulls in a round. The rounds are those of push-pull; what counts are their times: the median,
and what 1 in 100 and 1 in 1,000 exceed. The ceiling is a raw ping-pong of as many bytes by processes that wait by the same policy.
Over shm there is also one of a count alone, which is one cache line each way (--json: ceiling_cache_line_us).";

pub(super) const MESSAGE_RATE: &str = "Examples:
  gradwire bench message-rate                              64 messages of 256 bytes under way, over tcp
  gradwire bench message-rate --bytes 256..16K --window 256 --transport shm

--bytes is the size of a message: a chunk of the model, so a multiple of 64 elements. A round pushes --window of them and gets as
many back; --json has messages_per_s, which counts both directions, and the ceiling's. The ceiling is an echo of as many whole
messages with as many under way; both its ends may take and give many messages in one call.";

pub(super) const OPTIMIZER: &str = "Examples:
  gradwire bench optimizer                                 AdamW over 64 MiB of gradients in f32
  gradwire bench optimizer --optimizer sgd --bytes 1M..256M --dtype bf16
  gradwire bench optimizer --workers 4 --threads 2         four gradients summed, two threads

--bytes is the size of a gradient in the wire's format, so the number of parameters is that over 4 (f32) or 2 (bf16, f16). A round
steps all of them, tile by tile as a server does. The rate counts the bytes that a step must move: it reads one gradient of each
worker, reads and writes the master parameters and each array of state (none for plain SGD, one for Adagrad, two for Adam and AdamW),
and writes the wire copy (not in f32, which servers send from where the parameters lie); --json has bytes_per_parameter and parameters_per_s. The ceiling is a plain loop over the same arrays in a
process of its own, with as many threads.";

pub(super) const CHECKPOINT: &str = "Examples:
  gradwire bench checkpoint --bytes 1G --dir /mnt/checkpoints
  gradwire bench checkpoint --bytes 256M --servers 4 --optimizer sgd

--bytes is the state: master parameters and the optimizer's arrays in f32, shared by --servers threads that each write a file as a
server does. A repetition writes one whole checkpoint: files, checksums, manifest, names, and everything synced; what was written is
removed again. The ceiling writes as many bytes in as many files in the same folder, from one end to the other, and syncs them: once
through the page cache and once past it, where the file system can; the faster is taken.";

pub(super) const END_TO_END: &str = "Examples:
  gradwire bench end-to-end                                64 MiB in 16 layers, 20 ms of backward
  gradwire bench end-to-end --bytes 256M --layers 48 --backward-ms 150 --dtype bf16 --workers 2 --servers 2

--bytes is the size of the model's gradient in the wire's format. A step is a backward pass of --backward-ms, during which the
worker's processor is free as it is beside an accelerator, that hands over one layer's gradient after the other, last layer first;
then the worker waits for all new parameters. The ceiling of the step's time is the longer of the backward pass and the raw echo of
as many bytes; --json has backward_us, exposed_us (the step's median without the backward pass) and ceiling_exchange_us.";

pub(super) const ECHO: &str = "Examples:
  gradwire bench echo --bytes 64..64M
  gradwire bench echo --over shm --bytes 64..64M --wait spin
  gradwire bench echo --over tcp --flow there --window 16 --piece 256K --bytes 16M

--over tcp   loopback sockets, TCP_NODELAY, the kernel's buffer sizes; the peer sends back what it got
--over shm   two processes share a memfd: the driver copies its bytes in, the peer copies as many of its own back; whoever
             sleeps is woken by an eventfd. Nobody reads what he was sent, but for once, after the last round
--over udp   loopback datagrams of --datagram bytes, up to 32 a system call, no more under way than the sockets' buffers hold;
             the peer sends each one back at once

--flow both  bytes go there and come back (push-pull)
--flow there bytes go there and are answered by 64 bytes (push)
--flow back  bytes are asked for by 64 bytes and come back (pull)
--flow line  over shm alone: a count goes there and back and nothing else

--wait adaptive   as gradwire's threads: look again for up to 20 us if the last waits were that short, then sleep in the kernel
--wait sleep      sleep in the kernel at once
--wait spin       look again and again (for 100 ms at most, then sleep): no wake-up is paid, every process needs a core";
