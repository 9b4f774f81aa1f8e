//! Benches of single parts, for whoever changes one: `cargo bench`, or `cargo bench -- gate` for some. What a job makes of them, and
//! what the machine could do, is `gradwire bench`'s to say.
//!
//! Invariant: a bench does what the job's hot path does with that part, through the crate's public interface.

mod framing;
mod gate;
mod kernels;
mod shm_ring;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    let criterion =
        Criterion::default().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    let mut criterion = criterion.sample_size(30).configure_from_args();
    framing::all(&mut criterion);
    gate::all(&mut criterion);
    kernels::all(&mut criterion);
    shm_ring::all(&mut criterion);
    criterion.final_summary();
}
