//! The staleness gate and the window: what a shard asks for every message of every worker.
//!
//! Invariant: a clock is whole, so that the next one begins where this one began.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire::consistency::{StalenessGate, Window};

pub fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gate");
    for workers in [8usize, 512] {
        group.throughput(Throughput::Elements(workers as u64));
        // Every push is a step, and after each the shard asks for whom it may be answered.
        group.bench_function(BenchmarkId::new("a clock under ssp", workers), |bencher| {
            let (mut gate, mut clock) = (StalenessGate::new(workers, Some(2), 0), 0);
            bencher.iter(|| {
                for worker in 0..workers {
                    gate.on_applied(worker, clock);
                    black_box(gate.released(worker, clock));
                }
                clock += 1;
            });
        });
        group.bench_function(BenchmarkId::new("a position of the window", workers), |bencher| {
            let mut window = Window::new(8, workers, 0);
            bencher.iter(|| {
                let position = window.base();
                for worker in 0..workers {
                    window.record(position, worker).expect("the base is open, and each gives once");
                }
                assert!(window.finish(position));
            });
        });
    }
    group.finish();
}
