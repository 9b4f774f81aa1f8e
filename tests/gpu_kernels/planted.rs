//! Tests of the tests: one fault at a time is planted in the PTX, and the interpreter or the comparison must catch it.
//!
//! Invariant: where a fault can stand in several places of a kernel, it is planted in each of them; one that nothing catches
//! fails the test by its line.

use std::sync::Arc;

use gradwire::{
    optim::{
        NORM_TILE, OptimizerKind, StepScalars,
        gpu::{Batch, ChunkAddresses, GpuKernel, PTX},
        squared_norm,
    },
    types::Dtype,
};
use gradwire_ptx::{Function, Module};

use crate::{
    case::{Case, Random, bytes_of},
    device::Device,
};

/// The text of one kernel with what every module begins with.
fn text_of(name: &str) -> String {
    let entry = |name: &str| PTX.find(&format!(".visible .entry {name}("));
    let start = entry(name).expect("the PTX has the kernel");
    let end = PTX[start..].find("\n}").expect("it ends") + start + 3;
    format!(".version 7.0\n.target sm_70\n.address_size 64\n{}", &PTX[start..end])
}

/// The text with `change` made to each line that it changes, one at a time.
fn mutants(text: &str, change: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut mutants = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        if let Some(instead) = change(line) {
            let mut lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            lines[index] = instead;
            mutants.push((format!("line {}: {}", index + 1, line.trim()), lines.join("\n")));
        }
    }
    mutants
}

fn replaced(from: &'static str, to: &'static str) -> impl Fn(&str) -> Option<String> {
    move |line| line.contains(from).then(|| line.replacen(from, to, 1))
}

/// The function of a text; `None` if the interpreter already refuses the text.
fn function(text: &str, name: &str) -> Option<Arc<Function>> {
    Module::parse(text).ok()?.function(name).cloned()
}

/// Runs that between them pass through every instruction of an update: five contributions and more for the loop in fours, one
/// and none, heads and tails, a chunk in one piece and element by element, gradients that are not clipped.
fn cases(kind: &OptimizerKind, dtype: Dtype, wire: Option<Dtype>) -> Vec<Case> {
    let make = |seed: u64, len: usize, count: usize, start: usize| {
        let mut case = Case::aligned(seed, kind, dtype, wire, len, count);
        case.start = start;
        // Of magnitudes so far apart that their sums have to be rounded.
        let random = &mut Random(seed);
        let mut wide = || random.plain() * 0.5f32.powi(random.below(26) as i32);
        for bytes in &mut case.contributions {
            *bytes = bytes_of(dtype, &(0..len).map(|_| wide()).collect::<Vec<_>>());
        }
        // States in which such a sum's last bit still shows.
        for slot in &mut case.state[1..] {
            slot.iter_mut().for_each(|value| *value = value.abs() * 1e-20);
        }
        case.plan.clip_value = None;
        (case.plan.mean, case.plan.scale) = (1.0 / 3.0, 0.7);
        case
    };
    let mut cases = vec![make(1, 800, 8, 0), make(2, 700, 6, 3), make(3, 40, 0, 0), make(4, 61, 3, 0)];
    cases.extend([make(5, 70, 7, 0).skewed(5), make(6, 30, 9, 0).skewed(6)]);
    let mut decayed = make(7, 100, 4, 1);
    decayed.plan.scalars = StepScalars::new(kind, 9, 0.3, 0.25);
    let mut clipped = decayed.clone();
    clipped.plan.clip_value = Some(0.5);
    // An epsilon that changes the denominator, and a decay of AdamW's kind.
    let mut coarse = make(10, 800, 2, 0);
    match &mut coarse.plan.scalars {
        StepScalars::Adam { epsilon, shrink, .. } => (*epsilon, *shrink) = (0.03, 0.987),
        StepScalars::Adagrad { epsilon, .. } => *epsilon = 0.03,
        _ => {}
    }
    let decayed_one_by_one = decayed.clone().skewed(8);
    cases.extend([decayed_one_by_one, decayed, clipped.clone().skewed(9), clipped, coarse.clone().skewed(10), coarse]);
    cases
}

/// Whether some case ends in a fault or in other bits than the oracle's.
fn is_caught(function: &Arc<Function>, cases: &[Case]) -> bool {
    cases.iter().any(|case| match case.fused(Some(function), 1) {
        Err(_) => true,
        Ok(outcome) => outcome.difference(&case.by_oracle()).is_some(),
    })
}

/// Plants a fault everywhere and returns how many there were and which of them nothing caught.
fn plant(
    kind: &OptimizerKind,
    dtype: Dtype,
    name: &str,
    change: impl Fn(&str) -> Option<String>,
) -> (usize, Vec<String>) {
    let cases = cases(kind, dtype, Some(Dtype::Bf16));
    let text = text_of(name);
    let sound = function(&text, name).expect("the kernel alone is a module");
    assert!(!is_caught(&sound, &cases), "{name} without a fault");
    let mutants = mutants(&text, change);
    let count = mutants.len();
    let survives = |text: &str| function(text, name).is_some_and(|function| !is_caught(&function, &cases));
    (count, mutants.into_iter().filter(|(_, text)| survives(text)).map(|(place, _)| place).collect())
}

#[test]
fn wrong_rounding_is_caught_wherever_it_is() {
    for (from, to) in [("add.rn.f32", "add.rz.f32"), ("mul.rn.f32", "mul.rz.f32")] {
        let (count, missed) = plant(&OptimizerKind::ADAM, Dtype::Bf16, "gradwire_adam_bf16", replaced(from, to));
        assert!(count >= 80, "only {count} {from}");
        assert!(missed.is_empty(), "{from} -> {to} not caught: {missed:#?}");
    }
}

/// What divides is not what is divided, and what is taken away is not what it is taken from.
#[test]
fn swapped_operands_are_caught() {
    let swap = |opcode: &'static str| {
        move |line: &str| {
            let (head, operands) = line.trim().trim_end_matches(';').split_once(char::is_whitespace)?;
            let [target, a, b] = operands.split(',').map(str::trim).collect::<Vec<_>>().try_into().ok()?;
            (head == opcode).then(|| format!("{head} {target}, {b}, {a};"))
        }
    };
    for (kind, name) in [(OptimizerKind::ADAM, "gradwire_adam_f16"), (OptimizerKind::ADAGRAD, "gradwire_adagrad_f16")] {
        let (count, missed) = plant(&kind, Dtype::F16, name, swap("div.rn.f32"));
        assert!(count == 9 && missed.is_empty(), "{name}: {count} divisions, not caught: {missed:#?}");
    }
}

#[test]
fn bounds_off_by_one_are_caught() {
    let nudge = |name: &'static str| {
        // A tile too many does no harm, for what a tile holds is bounded again: comparisons with their number are left out.
        let text = text_of(name);
        let line = text.lines().find(|line| line.contains("ld.param.u32") && line.contains("_param_2")).unwrap();
        let tiles =
            line.split_whitespace().find(|word| word.starts_with("%r")).unwrap().trim_end_matches(',').to_owned();
        move |line: &str| {
            let pairs =
                [(".lt.u32", ".le.u32"), (".ge.u32", ".gt.u32"), (".lt.u64", ".le.u64"), (".ge.u64", ".gt.u64")];
            let mut operands = line.trim().trim_end_matches(';').split(',').skip(1).map(str::trim);
            let compares = line.contains("setp") && operands.all(|name| name.starts_with("%r") && name != tiles);
            let (from, to) = pairs.into_iter().find(|(from, _)| compares && line.contains(from))?;
            Some(line.replacen(from, to, 1))
        }
    };
    for (kind, dtype, name) in
        [(OptimizerKind::ADAM, Dtype::F32, "gradwire_adam_f32"), (OptimizerKind::SGD, Dtype::Bf16, "gradwire_sgd_bf16")]
    {
        let (count, missed) = plant(&kind, dtype, name, nudge(name));
        assert!(count >= 4 && missed.is_empty(), "{name}: {count} bounds, not caught: {missed:#?}");
    }
}

/// Whether the norms of many chunks come out as the CPU's, with one of the two kernels in its own's place.
fn norms_are_right(kernel: GpuKernel, instead: &Arc<Function>) -> bool {
    // The last element of some chunk is in each of the rows that the compiler has unrolled.
    let lens = [6_000, 1, 2049].into_iter().chain((0..16).map(|row| 32 * row + 5)).chain([10; 50]);
    let chunks: Vec<Vec<f32>> = lens.map(|len| (0..len).map(|seed| Random(seed).plain()).collect()).collect();
    let mut device = Device::default();
    let mut batches =
        [GpuKernel::SquaredNorm, GpuKernel::FoldNorm].map(|kernel| (kernel, Batch::new(kernel, chunks.len(), 0)));
    let results = chunks.iter().map(|values| {
        let (sums, result) = (device.upload_f32(values, 0), device.reserve(8, 0));
        let partials = device.reserve(values.len().div_ceil(NORM_TILE) * 8, 0);
        let (sums, partials) = (sums.address, partials.address);
        let chunk = ChunkAddresses { sums, partials, result: result.address, ..ChunkAddresses::default() };
        for (_, batch) in &mut batches {
            batch.push(&chunk, 0, values.len() as u32, None).unwrap();
        }
        result
    });
    let results: Vec<_> = results.collect();
    // Blocks go on to a second piece of work in both.
    assert_eq!(batches.each_ref().map(|(_, batch)| batch.launch(0, 1).grid), [8, 8]);
    let mut run = |(own, batch): &(GpuKernel, Batch)| match *own == kernel {
        true => device.run_function(instead, batch, 1).is_ok(),
        false => device.run(batch, 1).is_ok(),
    };
    batches.iter().all(&mut run)
        && results.iter().zip(&chunks).all(|(result, values)| {
            device.read(*result).is_ok_and(|bytes| bytes == squared_norm(values).to_bits().to_le_bytes())
        })
}

#[test]
fn a_wrong_norm_is_seen() {
    for kernel in [GpuKernel::SquaredNorm, GpuKernel::FoldNorm] {
        let name = kernel.name();
        let text = text_of(name);
        assert!(norms_are_right(kernel, &function(&text, name).unwrap()));
        let distances = mutants(&text, |line| line.contains("shfl").then(|| line.replacen(", 31", ", 30", 1)));
        assert_eq!(distances.len(), 10, "two for each halving of 32 lanes");
        let sums = mutants(&text, |line| line.contains("add.rn.f64").then(|| line.replacen("add", "mul", 1)));
        let bounds = mutants(&text, |line| line.contains("setp.ge.u64").then(|| line.replacen(".ge", ".gt", 1)));
        assert_eq!(bounds.len(), if kernel == GpuKernel::SquaredNorm { 16 } else { 0 });
        assert!(sums.len() > 5, "{} sums", sums.len());
        for (place, text) in distances.iter().chain(&sums).chain(&bounds) {
            let function = function(text, name);
            assert!(function.is_none_or(|function| !norms_are_right(kernel, &function)), "{name}: {place} not caught");
        }
    }
}

#[test]
fn an_opcode_that_is_unknown_is_named_with_its_line() {
    let text = text_of("gradwire_sgd_f32").replacen("add.rn.f32", "add.ftz.f32", 1);
    let line = text.lines().position(|line| line.contains("add.ftz.f32")).unwrap() as u32 + 1;
    let error = Module::parse(&text).unwrap_err();
    assert_eq!((error.line, error.to_string().contains("add.ftz.f32")), (line, true), "{error}");
}
