//! Soft CUDA: a library with the calls of the CUDA driver that gradwire makes, whose card is the PTX interpreter. Put where the
//! loader finds it as `libcuda.so.1`, it lets the real path (load, context, memory, module, launch, streams, events, errors) run
//! where there is no card. It is never chosen by itself, and never shipped. `softcuda_launches` counts launches, for tests.
//!
//! | variable | meaning |
//! |---|---|
//! | `SOFTCUDA_DEVICES` | cards that there are; 1 if not given; with 0 `cuInit` finds none |
//! | `SOFTCUDA_MEMORY` | bytes of a card; 1 GiB if not given |
//! | `SOFTCUDA_FAIL` | `call:n=code`, separated by commas: the n-th call (from 1) of that name returns that code and does nothing; with a `!` behind the code the context is lost, and every later call on it returns the code |
//! | `SOFTCUDA_LOG` | a file to which every process adds a line for each launch (`launch NAME`) and for each copy from or to host memory that is not page-locked (`pageable BYTES`) |
//! | `SOFTCUDA_LATE` | so many milliseconds pass before each piece of work on a stream, unless somebody synchronises |
//!
//! Invariant: work on a stream is done in its order, and after the events that the stream was told to wait for; a kernel that
//! the interpreter stops poisons its context, and every later call on it says so, as on a card.

mod context;
mod kernels;
mod memory;
mod state;
mod streams;
mod virtual_memory;
