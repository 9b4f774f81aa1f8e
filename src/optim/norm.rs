//! The squared Euclidean norm of a chunk, tile by tile.
//!
//! Invariant: element i is always added to lane i mod 16 and the lanes are folded in one order, so the result depends on the
//! elements alone, never on vector width or on where the tiles are cut.
#![forbid(unsafe_code)]

const LANES: usize = 16;

/// A running sum of squares in f64. (The square of an f32 is exact in f64, and f32::MAX squared does not overflow it.)
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SquaredNorm {
    lanes: [f64; LANES],
    /// Elements seen, modulo [`LANES`].
    position: usize,
}

impl SquaredNorm {
    /// Adds the next elements.
    pub fn add(&mut self, values: &[f32]) {
        let lead = ((LANES - self.position) % LANES).min(values.len());
        let (lead, rest) = values.split_at(lead);
        let (rows, tail) = rest.as_chunks::<LANES>();
        self.add_few(lead);
        for row in rows {
            for (lane, value) in self.lanes.iter_mut().zip(row) {
                let value = f64::from(*value);
                *lane += value * value;
            }
        }
        self.add_few(tail);
    }

    fn add_few(&mut self, values: &[f32]) {
        for value in values {
            let value = f64::from(*value);
            self.lanes[self.position] += value * value;
            self.position = (self.position + 1) % LANES;
        }
    }

    /// The sum of the squares of all elements added so far.
    pub fn total(&self) -> f64 {
        let mut lanes = self.lanes;
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        lanes[0]
    }
}

/// The sum of squares of `values`, in the fixed order of [`SquaredNorm`].
pub fn squared_norm(values: &[f32]) -> f64 {
    let mut norm = SquaredNorm::default();
    norm.add(values);
    norm.total()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn cuts_do_not_matter(values in prop::collection::vec(-1e6f32..1e6, 0..200), cuts in prop::collection::vec(0usize..200, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(values.len())).chain([0, values.len()]).collect();
            cuts.sort_unstable();
            let mut norm = SquaredNorm::default();
            for pair in cuts.windows(2) {
                norm.add(&values[pair[0]..pair[1]]);
            }
            prop_assert_eq!(norm.total().to_bits(), squared_norm(&values).to_bits());
            let exact: f64 = values.iter().map(|&x| f64::from(x).powi(2)).sum();
            prop_assert!((norm.total() - exact).abs() <= 1e-12 * exact);
        }
    }

    #[test]
    fn large_values_do_not_overflow_and_nan_shows() {
        assert!(squared_norm(&[f32::MAX; 3]).is_finite());
        assert!(squared_norm(&[1.0, f32::NAN]).is_nan());
    }
}
