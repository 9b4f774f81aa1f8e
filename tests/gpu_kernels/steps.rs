//! Steps, whole and in two halves, against the oracle.

use gradwire::{
    optim::{
        OptimizerKind,
        gpu::{Batch, ChunkAddresses, GpuKernel, PTX, Rule},
        oracle,
    },
    types::Dtype,
};

use crate::{
    case::{Case, DTYPES, KINDS, Random, WIRES, bytes_of},
    device::{Device, MODULE, classes},
};

#[test]
fn the_ptx_has_the_kernels_that_are_named_and_no_others() {
    let mut names: Vec<&str> = GpuKernel::all().map(GpuKernel::name).collect();
    names.sort_unstable();
    assert_eq!(MODULE.names(), names);
    assert_eq!(names.len(), 22);
    for name in names {
        assert_eq!(MODULE.function(name).unwrap().parameter_sizes(), [8, 4, 4], "{name}");
    }
    assert!(
        PTX.contains(".target sm_70") && !PTX.contains(".ftz") && !PTX.contains("fma"),
        "one rounding an operation"
    );
}

/// Every rule, gradient format and wire format: fused and in two, 16 bytes at a time and one by one, around the sizes at which
/// a block and a tile end.
#[test]
fn every_combination_equals_the_oracle() {
    let mut combinations = 0;
    for kind in &KINDS {
        for dtype in DTYPES {
            for wire in WIRES {
                combinations += 1;
                let len = 2048 + [0, 1, 7, 300][combinations % 4];
                let case = Case::aligned(combinations as u64, kind, dtype, wire, len, 1 + combinations % 6);
                case.demand(&case.fused(None, 1).unwrap(), "fused, aligned");
                case.demand(&case.in_two(1).unwrap(), "in two, aligned");
                let case = Case::aligned(!combinations as u64, kind, dtype, wire, 300, 2).skewed(combinations as u64);
                case.demand(&case.fused(None, 1).unwrap(), "fused, skewed");
                case.demand(&case.in_two(1).unwrap(), "in two, skewed");
            }
        }
    }
    assert_eq!(combinations, 6 * 3 * 4);
}

/// Sizes, alignments, contributors (none included) and grids at random.
#[test]
fn random_steps_equal_the_oracle() {
    for seed in 0..150 {
        let random = &mut Random(1000 + seed);
        let len = match random.below(4) {
            0 => random.below(20),
            1 => random.below(300),
            2 => 2040 + random.below(16),
            _ => random.below(3 * 2048),
        };
        let count = random.below(7);
        let (kind, dtype, wire) = (random.pick(&KINDS), random.pick(&DTYPES), random.pick(&WIRES));
        let mut case = Case::aligned(seed, &kind, dtype, wire, len, count);
        if random.below(3) == 0 {
            case = case.skewed(seed);
        }
        case.demand(&case.fused(None, 1 + random.below(2) as u32).unwrap(), &format!("seed {seed}, fused"));
        case.demand(&case.in_two(1).unwrap(), &format!("seed {seed}, in two"));
    }
}

/// Where everything is aligned, an element costs a fraction of what it costs one by one: the 16-byte path is the one taken.
#[test]
fn aligned_arrays_are_taken_sixteen_bytes_at_a_time() {
    let instructions = |case: &Case| {
        let mut device = Device::default();
        let uploaded = case.upload(&mut device);
        let mut batch = Batch::new(GpuKernel::Update(Rule::Adam, case.dtype), 1, 4);
        case.push(&mut batch, &uploaded, false);
        device.run(&batch, 1).unwrap()
    };
    for dtype in DTYPES {
        let aligned = Case::aligned(3, &OptimizerKind::ADAMW, dtype, Some(Dtype::Bf16), 4096, 4);
        for start in [0, 1, 8] {
            let aligned = Case { start, ..aligned.clone() };
            let skewed = Case { skew: [0, 1, 2], ..aligned.clone() };
            let [fast, slow] = [instructions(&aligned), instructions(&skewed)];
            assert!(fast * 3 < slow * 2, "{dtype} from {start}: {fast} instructions aligned, {slow} not");
        }
    }
}

/// A block that goes on from tile to tile, and from chunk to chunk, does what a block for each would do.
#[test]
fn many_chunks_in_one_launch_equal_the_oracle_on_any_grid() {
    for multiprocessors in [1, 2, 100] {
        let random = &mut Random(7);
        let lens = [1, 2047, 2048, 2049, 5, 6000, 3, 4096, 17, 2500, 30, 8];
        let rule = |seed: usize| if seed.is_multiple_of(2) { OptimizerKind::ADAM } else { OptimizerKind::ADAMW };
        let make = |(seed, len): (usize, &usize)| {
            Case::aligned(seed as u64, &rule(seed), Dtype::Bf16, WIRES[seed % 4], *len, random.below(4))
        };
        let cases: Vec<Case> = lens.iter().enumerate().map(make).collect();
        let mut device = Device::default();
        let mut batch = Batch::new(GpuKernel::Update(Rule::Adam, Dtype::Bf16), cases.len(), 4 * cases.len());
        let uploaded: Vec<_> = cases.iter().map(|case| case.upload(&mut device)).collect();
        for (case, uploaded) in cases.iter().zip(&uploaded) {
            case.push(&mut batch, uploaded, false);
        }
        let launch = batch.launch(0, multiprocessors);
        assert_eq!((launch.segments, launch.tiles), (12, 17));
        assert_eq!(launch.grid, 17.min(8 * multiprocessors));
        device.run(&batch, multiprocessors).unwrap();
        for (case, uploaded) in cases.iter().zip(&uploaded) {
            case.demand(&uploaded.outcome(&device, case.wire).unwrap(), "in a batch");
        }
    }
}

/// (1e8 + -1e8) + 1 is 1, while 1e8 + (-1e8 + 1) is 0.
#[test]
fn contributions_are_summed_in_rank_order() {
    for (order, expected) in [([1e8f32, -1e8, 1.0], 1.0f32), ([1.0, -1e8, 1e8], 0.0)] {
        let mut case = Case::aligned(1, &OptimizerKind::SGD, Dtype::F32, None, 40, 0);
        case.contributions = order.map(|value| bytes_of(Dtype::F32, &[value; 40])).into();
        assert_eq!(case.in_two(1).unwrap().sums, [expected.to_bits(); 40]);
    }
}

/// Every f16 and bf16 pattern through a reduction; every upper half of an f32, with lower halves around the ties, through the
/// wire copy.
#[test]
fn every_number_of_sixteen_bits_is_converted_as_the_oracle_does() {
    let patterns: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let mut device = Device::default();
        let (source, sums) = (device.upload(&patterns, 0), device.reserve(4 << 16, 0));
        let chunk = ChunkAddresses { contributions: &[source.address], sums: sums.address, ..Default::default() };
        let mut batch = Batch::new(GpuKernel::Reduce(dtype), 1, 1);
        batch.push(&chunk, 0, 1 << 16, None).unwrap();
        device.run(&batch, 1).unwrap();
        assert_eq!(classes(Dtype::F32, &device.download(sums)), classes(dtype, &patterns), "{dtype}");
    }
}

#[test]
fn the_wire_copy_rounds_as_the_oracle_does() {
    const LOW: [u32; 12] = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF];
    // Every 7th upper half: with the lower ones that is every exponent many times, of both signs.
    let upper = (0..=u32::from(u16::MAX)).step_by(7);
    let values: Vec<f32> = upper.flat_map(|high| LOW.map(|low| f32::from_bits(high << 16 | low))).collect();
    for dtype in DTYPES {
        let mut device = Device::default();
        let master = device.upload_f32(&values, 0);
        let wire = device.reserve(values.len() * dtype.size(), 0);
        let chunk =
            ChunkAddresses { master: master.address, wire: Some((wire.address, dtype)), ..ChunkAddresses::default() };
        let mut batch = Batch::new(GpuKernel::Encode, 1, 0);
        batch.push(&chunk, 0, values.len() as u32, None).unwrap();
        device.run(&batch, 1).unwrap();
        let mut expected = vec![0; wire.bytes];
        for (index, value) in values.iter().enumerate() {
            oracle::encode(dtype, *value, &mut expected, index);
        }
        assert_eq!(classes(dtype, &device.download(wire)), classes(dtype, &expected), "{dtype}");
    }
}
