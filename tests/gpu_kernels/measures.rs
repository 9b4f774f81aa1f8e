//! The squared norm in the CPU's order, and the count of non-finite values.

use gradwire::optim::{
    NORM_TILE,
    gpu::{Batch, ChunkAddresses, GpuKernel},
    squared_norm,
};

use crate::{case::Random, device::Device};

/// The two halves of a norm.
const NORM: [GpuKernel; 2] = [GpuKernel::SquaredNorm, GpuKernel::FoldNorm];

/// Chunks of these sizes, each starting some elements off a boundary; what the kernels leave for each, as u64.
fn measure(kernels: &[GpuKernel], chunks: &[Vec<f32>], start: u64, multiprocessors: u32) -> Vec<u64> {
    let mut device = Device::default();
    let mut batches: Vec<_> = kernels.iter().map(|kernel| Batch::new(*kernel, chunks.len(), 0)).collect();
    let results: Vec<_> = chunks
        .iter()
        .enumerate()
        .map(|(index, values)| {
            let sums = device.upload_f32(values, index % 5 * 4);
            // A count is added to what is there.
            let result = device.upload(&start.to_le_bytes(), 8);
            let partials = device.reserve(values.len().div_ceil(NORM_TILE) * 8, 0);
            let (sums, partials) = (sums.address, partials.address);
            let chunk = ChunkAddresses { sums, partials, result: result.address, ..ChunkAddresses::default() };
            for batch in &mut batches {
                batch.push(&chunk, 0, values.len() as u32, None).unwrap();
            }
            result
        })
        .collect();
    for batch in &batches {
        device.run(batch, multiprocessors).unwrap();
    }
    results.into_iter().map(|result| u64::from_le_bytes(device.download(result).try_into().unwrap())).collect()
}

#[test]
fn the_squared_norm_has_the_bits_of_the_cpu() {
    let random = &mut Random(5);
    let lens = [0, 1, 31, 32, 33, 255, 1023, 1024, 1025, 4096, 4097, 8192, 9000, 40_000];
    let chunks: Vec<Vec<f32>> = lens.iter().map(|len| (0..*len).map(|_| random.plain() * 1e3).collect()).collect();
    for multiprocessors in [1, 100] {
        let got = measure(&NORM, &chunks, u64::MAX, multiprocessors);
        for (values, got) in chunks.iter().zip(got) {
            assert_eq!(got, squared_norm(values).to_bits(), "{} elements", values.len());
        }
    }
}

#[test]
fn a_norm_holds_large_values_and_shows_what_is_not_finite() {
    let mut small = vec![1e-40f32; 100];
    small[3] = -f32::MIN_POSITIVE;
    let chunks = [vec![f32::MAX; 50], vec![1.0, f32::NEG_INFINITY], vec![f32::NAN; 20], small];
    let got = measure(&NORM, &chunks, 0, 1).into_iter().map(f64::from_bits).collect::<Vec<_>>();
    assert_eq!((got[0], got[3]), (squared_norm(&chunks[0]), squared_norm(&chunks[3])));
    assert!(got[0].is_finite() && got[1] == f64::INFINITY && got[2].is_nan() && got[3] > 0.0);
}

#[test]
fn non_finite_values_are_counted() {
    for seed in 0..8 {
        let random = &mut Random(seed);
        let lens = [1, 31, 2048, 2049, 5000];
        let chunks: Vec<Vec<f32>> = lens.iter().map(|len| random.values(*len)).collect();
        let expected = chunks.iter().map(|values| 10 + values.iter().filter(|value| !value.is_finite()).count() as u64);
        let got = measure(&[GpuKernel::CountNonFinite], &chunks, 10, 1 + seed as u32 % 2);
        assert_eq!(got, expected.collect::<Vec<_>>(), "seed {seed}");
    }
    let all = vec![vec![f32::NAN; 5000]];
    assert_eq!(measure(&[GpuKernel::CountNonFinite], &all, 0, 4), [5000]);
}
