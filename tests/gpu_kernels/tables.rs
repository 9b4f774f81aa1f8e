//! Whole chunks through batches: spans of several groups, norm clipping, full batches.

use gradwire::{
    layout::Span,
    optim::{
        ChunkParts, ChunkStep, Gradients, GroupConfig, Kernels, NORM_TILE, OptimizerConfig, OptimizerKind, Pass,
        Reduction, StateMut, StepArguments, Wire, clipped_scale,
        gpu::{Batch, ChunkAddresses, GpuKernel, Rule, ShortTable},
        squared_norm,
    },
    types::Dtype,
};

use crate::{
    case::{Random, bytes_of},
    device::{Device, classes, f32_of},
};

const ELEMENTS: usize = 3000;

fn arguments(pass: Pass) -> StepArguments {
    StepArguments { pass, step: 4, clock: 3, total_weight: 2, reduction: Reduction::Mean, scale: 0.5, measures: false }
}

fn config() -> OptimizerConfig {
    let group = GroupConfig { name: "no decay".into(), learning_rate: Some(0.5), weight_decay: Some(0.0) };
    OptimizerConfig { weight_decay: 0.1, groups: vec![group], ..OptimizerConfig::new(OptimizerKind::ADAMW, 0.01) }
}

/// Seven spans, four runs of one group each.
fn spans() -> Vec<Span> {
    let cuts = [(0, 100, 0), (100, 1, 0), (101, 7, 1), (108, 2000, 0), (2108, 2, 0), (2110, 5, 1), (2115, 885, 1)];
    cuts.map(|(start, len, group)| Span { start, len, group }).into()
}

struct Chunk {
    state: [Vec<f32>; 3],
    gradients: Vec<Vec<u8>>,
}

impl Chunk {
    fn new() -> Chunk {
        let random = &mut Random(11);
        let mut plain = || (0..ELEMENTS).map(|_| random.plain()).collect::<Vec<f32>>();
        let [master, first, second] = [plain(), plain(), plain()];
        let second = second.into_iter().map(f32::abs).collect();
        let gradients = [plain(), plain()].map(|values| bytes_of(Dtype::Bf16, &values)).into();
        Chunk { state: [master, first, second], gradients }
    }

    /// State and wire copy after the CPU's own step.
    fn by_cpu(&self, config: &OptimizerConfig) -> ([Vec<f32>; 3], Vec<u8>) {
        let (mut state, mut wire, mut sums) = (self.state.clone(), vec![0; 2 * ELEMENTS], vec![0.0; ELEMENTS]);
        let [master, first, second] = &mut state;
        let mut parts = ChunkParts {
            config,
            rates: &config.learning_rates(),
            spans: &spans(),
            gradients: Gradients { dtype: Dtype::Bf16, contributions: &self.gradients, start: 0 },
            accumulator: &mut sums,
            state: StateMut { master, first, second },
            wire: Some(Wire { bytes: &mut wire, dtype: Dtype::Bf16 }),
        };
        let mut step = ChunkStep::new(Kernels::best(), config, arguments(Pass::Fused));
        while !step.advance(&mut parts, 1000) {}
        (state, wire)
    }

    /// The same in launches: reduction, norm and update where the norm is clipped, else the fused kernel alone.
    fn by_launches(&self, config: &OptimizerConfig) -> ([Vec<f32>; 3], Vec<u8>) {
        let mut device = Device::default();
        let state = [0, 1, 2].map(|slot| device.upload_f32(&self.state[slot], 0));
        let gradients: Vec<u64> = self.gradients.iter().map(|bytes| device.upload(bytes, 0).address).collect();
        let (sums, wire) = (device.reserve(4 * ELEMENTS, 0), device.reserve(2 * ELEMENTS, 0));
        let result = device.reserve(8, 0);
        let chunk = ChunkAddresses {
            contributions: &gradients,
            sums: sums.address,
            master: state[0].address,
            first: state[1].address,
            second: state[2].address,
            wire: Some((wire.address, Dtype::Bf16)),
            partials: device.reserve(8 * ELEMENTS.div_ceil(NORM_TILE), 0).address,
            result: result.address,
        };
        let (spans, rates, arguments) = (spans(), config.learning_rates(), arguments(Pass::Fused));
        let mut scale = arguments.scale;
        let mut launch = |kernel, chunk: &ChunkAddresses<'_>, scale, segments| {
            let mut batch = Batch::new(kernel, 8, 16);
            batch.push_chunk(chunk, &spans, config, &rates, &arguments, scale).unwrap();
            assert_eq!(batch.launch(0, 1).segments, segments);
            device.run(&batch, 1).unwrap();
            let is_norm = kernel == GpuKernel::FoldNorm;
            is_norm.then(|| f64::from_le_bytes(device.download(result).try_into().unwrap()))
        };
        if let Some(limit) = config.clip.per_chunk_norm {
            launch(GpuKernel::Reduce(Dtype::Bf16), &chunk, 1.0, 1);
            launch(GpuKernel::SquaredNorm, &chunk, 1.0, 1);
            let norm = launch(GpuKernel::FoldNorm, &chunk, 1.0, 1).unwrap();
            scale = clipped_scale(limit, &arguments, norm);
            let chunk = ChunkAddresses { contributions: &[sums.address], ..chunk };
            launch(GpuKernel::Update(Rule::of(&config.kind), Dtype::F32), &chunk, scale, 4);
            assert_eq!(norm.to_bits(), squared_norm(&f32_of(&device.download(sums))).to_bits());
        } else {
            launch(GpuKernel::Update(Rule::of(&config.kind), Dtype::Bf16), &chunk, scale, 4);
        }
        (state.map(|array| f32_of(&device.download(array))), device.download(wire))
    }
}

#[test]
fn a_chunk_of_many_spans_equals_the_step_of_the_cpu() {
    let chunk = Chunk::new();
    for per_chunk_norm in [None, Some(1.5), Some(1e6)] {
        let mut config = config();
        config.clip.per_chunk_norm = per_chunk_norm;
        let (state, wire) = chunk.by_launches(&config);
        let (expected, expected_wire) = chunk.by_cpu(&config);
        for (got, expected) in state.iter().zip(&expected) {
            let bits = |values: &[f32]| classes(Dtype::F32, &bytes_of(Dtype::F32, values));
            assert_eq!(bits(got), bits(expected), "{per_chunk_norm:?}");
        }
        assert_eq!(wire, expected_wire, "{per_chunk_norm:?}");
        assert_ne!(state[0], chunk.state[0]);
    }
}

#[test]
fn a_full_batch_says_so_and_stays_as_it_was() {
    let config = config();
    let (rates, arguments) = (config.learning_rates(), arguments(Pass::Fused));
    let chunk = ChunkAddresses {
        contributions: &[64, 128],
        master: 256,
        first: 512,
        second: 1024,
        ..ChunkAddresses::default()
    };
    for (segments_max, contributions_max) in [(6, 100), (100, 13)] {
        let mut batch = Batch::new(GpuKernel::Update(Rule::Adam, Dtype::Bf16), segments_max, contributions_max);
        let push = |batch: &mut Batch| batch.push_chunk(&chunk, &spans(), &config, &rates, &arguments, 1.0);
        push(&mut batch).unwrap();
        let (len, launch) = (batch.table_len(), batch.launch(0, 4));
        assert_eq!(push(&mut batch), Err(ShortTable { segments_max, contributions_max }));
        assert_eq!((batch.table_len(), batch.launch(0, 4)), (len, launch));
        assert!(len == 4 * 128 + 8 * 8 && len <= batch.table_len_max());
        batch.clear(GpuKernel::Update(Rule::Adam, Dtype::F32));
        assert!(batch.is_empty() && push(&mut batch).is_ok());
    }
}

#[test]
#[should_panic(expected = "no multiple of 4")]
fn an_address_that_no_card_could_load_from_is_refused() {
    let chunk = ChunkAddresses { contributions: &[2], sums: 256, ..ChunkAddresses::default() };
    let _ = Batch::new(GpuKernel::Reduce(Dtype::F32), 1, 1).push(&chunk, 0, 10, None);
}
