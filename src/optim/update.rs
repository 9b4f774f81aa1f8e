//! The update of a run of elements, from the summed gradient to the new parameters and their copy for the wire, in one loop.
//!
//! Invariant: element by element what [`super::oracle::gradient`] and [`super::oracle::update`] do; an element's wire copy is made of
//! its new value; state that a rule does not have is not looked at.
#![forbid(unsafe_code)]

use super::{SpanStep, StateMut, StepScalars};

/// Steps `state` on `gradient`, the sum of the contributions, and writes `encode` of every new parameter to `wire` (of `()`, if
/// nobody wants it).
///
/// # Panics
///
/// If lengths differ, or the state lacks an array that the rule has.
#[inline(always)]
pub(super) fn run<E>(
    plan: &SpanStep,
    gradient: &[f32],
    state: StateMut<'_>,
    wire: &mut [E],
    encode: impl Fn(f32) -> E,
) {
    let prepare = Prepare::of(plan);
    let StateMut { master, first, second } = state;
    match plan.scalars {
        StepScalars::Sgd { rate, .. } => without_state(prepare, gradient, master, wire, encode, |g, p| p - rate * g),
        StepScalars::Momentum { rate, momentum, .. } => {
            with_one(prepare, gradient, (master, first), wire, encode, |g, p, a| {
                let a = momentum * a + g;
                (p - rate * a, a)
            });
        }
        StepScalars::Nesterov { rate, momentum, .. } => {
            with_one(prepare, gradient, (master, first), wire, encode, |g, p, a| {
                let a = momentum * a + g;
                (p - rate * (g + momentum * a), a)
            });
        }
        StepScalars::Adam { shrink, beta1, alpha1, beta2, alpha2, step_size, root_scale, epsilon, .. } => {
            with_two(prepare, gradient, (master, first, second), wire, encode, |g, p, a, b| {
                let a = beta1 * a + alpha1 * g;
                let b = beta2 * b + alpha2 * g * g;
                (shrink * p - step_size * a / (b.sqrt() * root_scale + epsilon), a, b)
            });
        }
        StepScalars::Adagrad { rate, epsilon, .. } => {
            with_one(prepare, gradient, (master, first), wire, encode, |g, p, a| {
                let a = a + g * g;
                (p - rate * g / (a.sqrt() + epsilon), a)
            });
        }
    }
}

/// What is done to a sum before the update sees it: mean, scale, clip and coupled weight decay.
#[derive(Clone, Copy)]
struct Prepare {
    mean: f32,
    scale: f32,
    limit: f32,
    decay: f32,
}

impl Prepare {
    #[inline(always)]
    fn of(plan: &SpanStep) -> Prepare {
        let limit = plan.clip_value.unwrap_or(f32::INFINITY);
        Prepare { mean: plan.mean, scale: plan.scale, limit, decay: plan.scalars.decay() }
    }

    /// Multiplying by 1 and clipping at infinity change nothing; adding 0 times a parameter might (an infinite one, a zero's sign).
    #[inline(always)]
    fn gradient(self, sum: f32, master: f32) -> f32 {
        let scaled = sum * self.mean * self.scale;
        // Two comparisons that are false for NaN, so that NaN stays.
        let below = if scaled > self.limit { self.limit } else { scaled };
        let clipped = if below < -self.limit { -self.limit } else { below };
        if self.decay == 0.0 { clipped } else { clipped + self.decay * master }
    }
}

// The loops take every array as an argument of its own: only then does the compiler know that they do not overlap.

#[inline(always)]
fn without_state<E>(
    prepare: Prepare,
    gradient: &[f32],
    master: &mut [f32],
    wire: &mut [E],
    encode: impl Fn(f32) -> E,
    step: impl Fn(f32, f32) -> f32,
) {
    let len = gradient.len();
    let (master, wire) = (&mut master[..len], &mut wire[..len]);
    for i in 0..len {
        let p = step(prepare.gradient(gradient[i], master[i]), master[i]);
        master[i] = p;
        wire[i] = encode(p);
    }
}

#[inline(always)]
fn with_one<E>(
    prepare: Prepare,
    gradient: &[f32],
    (master, first): (&mut [f32], &mut [f32]),
    wire: &mut [E],
    encode: impl Fn(f32) -> E,
    step: impl Fn(f32, f32, f32) -> (f32, f32),
) {
    let len = gradient.len();
    let (master, first, wire) = (&mut master[..len], &mut first[..len], &mut wire[..len]);
    for i in 0..len {
        let (p, a) = step(prepare.gradient(gradient[i], master[i]), master[i], first[i]);
        (master[i], first[i]) = (p, a);
        wire[i] = encode(p);
    }
}

#[inline(always)]
fn with_two<E>(
    prepare: Prepare,
    gradient: &[f32],
    (master, first, second): (&mut [f32], &mut [f32], &mut [f32]),
    wire: &mut [E],
    encode: impl Fn(f32) -> E,
    step: impl Fn(f32, f32, f32, f32) -> (f32, f32, f32),
) {
    let len = gradient.len();
    let (master, first, second) = (&mut master[..len], &mut first[..len], &mut second[..len]);
    let wire = &mut wire[..len];
    for i in 0..len {
        let (p, a, b) = step(prepare.gradient(gradient[i], master[i]), master[i], first[i], second[i]);
        (master[i], first[i], second[i]) = (p, a, b);
        wire[i] = encode(p);
    }
}
