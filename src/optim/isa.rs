//! Which instruction set the kernels run on, and how one body of code is compiled for each.
//!
//! Invariant: an [`Isa`] value other than the baseline exists only on a machine that has it. No instruction set changes a bit of
//! any result: Rust never contracts a multiply and an add, whatever the target.
#![forbid(unsafe_code)]

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use multiversion::multiversion;

/// An instruction set for which the kernels are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Level {
    Baseline,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

static AVAILABLE: LazyLock<Vec<Isa>> = LazyLock::new(detect);

impl Isa {
    /// What every machine of this architecture has (SSE2 on x86-64, NEON on aarch64).
    pub const BASELINE: Isa = Isa(Level::Baseline);

    /// The instruction sets of this machine that the kernels can use, the widest last.
    pub fn available() -> &'static [Isa] {
        &AVAILABLE
    }

    /// The widest instruction set of this machine.
    pub fn best() -> Isa {
        AVAILABLE[AVAILABLE.len() - 1]
    }

    /// Its name: "avx512", "avx2", "sse2", "neon", or "scalar" on other architectures.
    pub const fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            Level::Baseline if cfg!(target_arch = "x86_64") => "sse2",
            Level::Baseline if cfg!(target_arch = "aarch64") => "neon",
            Level::Baseline => "scalar",
        }
    }

    /// Runs `work` as compiled for this instruction set.
    #[inline]
    pub(super) fn run<W: Work>(self, work: W) {
        match self.0 {
            Level::Baseline => work.run(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => run_avx2(work),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => run_avx512(work),
        }
    }
}

/// The name of the instruction set that [`super::Kernels::best`] uses on this machine.
pub fn isa() -> &'static str {
    Isa::best().name()
}

/// A kernel with its arguments. `run` must be `#[inline(always)]`, and so must all that it calls: code that is inlined into the
/// functions below is compiled with their instruction set, code that is called is not.
pub(super) trait Work {
    fn run(self);
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Vec<Isa> {
    vec![Isa::BASELINE]
}

/// The lists of features are those that `multiversion` checks before it enters the functions below. It asks of AVX-512 what came
/// with Ice Lake, since the generations before lower their clock for it; they get AVX2.
#[cfg(target_arch = "x86_64")]
fn detect() -> Vec<Isa> {
    macro_rules! all {
        ($($feature:tt)*) => { true $(&& std::arch::is_x86_feature_detected!($feature))* };
    }
    let mut available = vec![Isa::BASELINE];
    if all!("avx2") {
        available.push(Isa(Level::Avx2));
    }
    if all!("avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512ifma" "avx512vbmi" "avx512vbmi2")
        && all!("avx512bitalg" "avx512vnni" "avx512vpopcntdq" "gfni" "vaes" "vpclmulqdq")
    {
        available.push(Isa(Level::Avx512));
    }
    available
}

#[cfg(target_arch = "x86_64")]
#[multiversion(targets("x86_64+avx2"), dispatcher = "direct")]
fn run_avx2<W: Work>(work: W) {
    work.run();
}

#[cfg(target_arch = "x86_64")]
#[multiversion(targets("x86_64+avx512f"), dispatcher = "direct")]
fn run_avx512<W: Work>(work: W) {
    work.run();
}
