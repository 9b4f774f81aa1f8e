//! The optimizers' fused step on every instruction set of this machine, over a chunk that stays in the cache and over one that does
//! not.
//!
//! Invariant: the bytes that a rate counts are those that a step must move, as `gradwire bench optimizer` counts them.

use criterion::{BenchmarkId, Criterion, Throughput};
use gradwire::{
    optim::{Gradients, Isa, Kernels, OptimizerConfig, OptimizerKind, StateMut, Wire},
    types::Dtype,
};

pub fn all(criterion: &mut Criterion) {
    let kinds = [("sgd", OptimizerKind::SGD), ("adagrad", OptimizerKind::ADAGRAD), ("adamw", OptimizerKind::ADAMW)];
    let mut group = criterion.benchmark_group("kernels");
    for (name, kind) in kinds {
        for (dtype, elements) in [(Dtype::F32, 1 << 12), (Dtype::F32, 1 << 22), (Dtype::Bf16, 1 << 12)] {
            let size = dtype.size();
            let bytes = elements * (2 * size + 8 * (1 + kind.state_slots()));
            group.throughput(Throughput::Bytes(bytes as u64));
            let contributions = [vec![0u8; elements * size]];
            let mut arrays = [(); 3].map(|()| vec![0.01f32; elements]);
            let mut wire = vec![0u8; elements * size];
            let plan = OptimizerConfig::new(kind, 1e-3).span_step(0, 10, 1e-3, 1.0);
            for isa in Isa::available() {
                let id = BenchmarkId::new(format!("{name} {dtype} {}", isa.name()), elements);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        let [master, first, second] = &mut arrays;
                        let state = StateMut { master, first, second };
                        let gradients = Gradients { dtype, contributions: &&contributions[..], start: 0 };
                        let wire = Wire { bytes: &mut wire, dtype };
                        Kernels::on(*isa).fused(&plan, gradients, state, Some(wire));
                    });
                });
            }
        }
    }
    group.finish();
}
