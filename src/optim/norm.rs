//! The squared Euclidean norm of a chunk, piece by piece.
//!
//! Invariant: element i of a tile of 2048 is always added to lane i mod 32, tile t's sum to the second level's lane t mod 32, and
//! lanes are folded in one order, so the result depends on the elements alone: never on vector width, on where the pieces are cut,
//! or on how many of a GPU's warps share the tiles.
#![forbid(unsafe_code)]

/// Lanes of both levels: the threads of a GPU's warp.
const LANES: usize = 32;

/// Elements of a tile.
pub const NORM_TILE: usize = 2048;

/// A running sum of squares in f64. (The square of an f32 is exact in f64, and f32::MAX squared does not overflow it.)
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SquaredNorm {
    /// The present tile's.
    lanes: [f64; LANES],
    /// Elements of the present tile that have been seen, less than [`NORM_TILE`].
    position: usize,
    /// The second level.
    tiles: [f64; LANES],
    /// Whole tiles, modulo [`LANES`].
    tile: usize,
}

impl SquaredNorm {
    /// Adds the next elements.
    pub fn add(&mut self, mut values: &[f32]) {
        while !values.is_empty() {
            let (now, later) = values.split_at(values.len().min(NORM_TILE - self.position));
            self.add_to_tile(now);
            values = later;
            if self.position == NORM_TILE {
                self.tiles[self.tile] += fold(self.lanes);
                (self.lanes, self.position, self.tile) = ([0.0; LANES], 0, (self.tile + 1) % LANES);
            }
        }
    }

    fn add_to_tile(&mut self, values: &[f32]) {
        let lead = ((LANES - self.position % LANES) % LANES).min(values.len());
        let (lead, rest) = values.split_at(lead);
        let (rows, tail) = rest.as_chunks::<LANES>();
        self.add_few(lead);
        for row in rows {
            for (lane, value) in self.lanes.iter_mut().zip(row) {
                let value = f64::from(*value);
                *lane += value * value;
            }
        }
        self.position += rows.len() * LANES;
        self.add_few(tail);
    }

    fn add_few(&mut self, values: &[f32]) {
        for value in values {
            let value = f64::from(*value);
            self.lanes[self.position % LANES] += value * value;
            self.position += 1;
        }
    }

    /// The sum of the squares of all elements added so far.
    pub fn total(&self) -> f64 {
        let mut tiles = self.tiles;
        tiles[self.tile] += fold(self.lanes);
        fold(tiles)
    }
}

/// The upper half onto the lower, until there is one.
fn fold(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
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
        fn cuts_do_not_matter(values in prop::collection::vec(-1e6f32..1e6, 0..5000), cuts in prop::collection::vec(0usize..5000, 0..6)) {
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
    fn the_order_is_by_tile_and_lane() {
        // A value that hides small ones added to it one by one: which of them meet it depends on the order.
        let values: Vec<f32> =
            (0..70 * NORM_TILE).map(|i| if i % 7919 == 5 { 1e8 } else { 1.0 + (i % 13) as f32 }).collect();
        let square = |value: f32| f64::from(value) * f64::from(value);
        let mut second = [0.0; LANES];
        for (t, tile) in values.chunks(NORM_TILE).enumerate() {
            let lane = |lane: usize| tile.iter().skip(lane).step_by(LANES).fold(0.0, |sum, value| sum + square(*value));
            second[t % LANES] += fold(std::array::from_fn(lane));
        }
        assert_eq!(squared_norm(&values).to_bits(), fold(second).to_bits());
        let in_turn = values.iter().fold(0.0, |sum, value| sum + square(*value));
        assert_ne!(squared_norm(&values).to_bits(), in_turn.to_bits(), "a test that any order passes");
    }

    #[test]
    fn large_values_do_not_overflow_and_nan_shows() {
        assert!(squared_norm(&[f32::MAX; 3]).is_finite());
        assert!(squared_norm(&[1.0, f32::NAN]).is_nan());
    }
}
