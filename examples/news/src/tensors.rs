//! The declared parameters of a model: names, shapes, initialisation, decay groups.
//!
//! Invariant: a model's declarations come in one fixed order, and that order is the order of the
//! gradients and of the parameters everywhere. A declaration says how a tensor starts, it does not
//! hold values: a parameter server draws them on its own side.

use crate::streams::stream;
use rand::Rng;

/// How a tensor starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All the same value.
    Constant(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Uniform, variance 2 / (fan in + fan out).
    Xavier,
    /// Normal, variance 2 / fan in.
    Kaiming,
}

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDecl {
    /// Unique in the model.
    pub name: String,
    /// Row major; matrices are (inputs, outputs).
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl TensorDecl {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The starting values: a pure function of the declaration and the seed.
    pub fn draw(&self, seed: u64) -> Vec<f32> {
        let mut rng = stream(&format!("init {}", self.name), &[seed]);
        let (inputs, outputs) = match self.shape.as_slice() {
            [inputs, outputs] => (*inputs as f32, *outputs as f32),
            _ => (self.elements() as f32, self.elements() as f32),
        };
        let mut normal = |std: f32| (0..self.elements()).map(|_| std * gauss(&mut rng)).collect();
        match self.init {
            Init::Zeros => vec![0.0; self.elements()],
            Init::Constant(value) => vec![value; self.elements()],
            Init::Normal(std) => normal(std),
            Init::Kaiming => normal((2.0 / inputs).sqrt()),
            Init::Xavier => {
                let bound = (6.0 / (inputs + outputs)).sqrt();
                (0..self.elements()).map(|_| rng.random_range(-bound..bound)).collect()
            }
        }
    }
}

/// One draw from the standard normal distribution (Box and Muller's cosine branch).
fn gauss(rng: &mut impl Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

/// A tensor's place in the declarations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub usize);

/// Collects declarations while a model is put together.
#[derive(Debug, Default)]
pub struct Declarations(pub Vec<TensorDecl>);

impl Declarations {
    /// Declares a matrix that weight decay applies to.
    pub fn matrix(&mut self, name: &str, shape: [usize; 2], init: Init) -> Slot {
        self.add(name, shape.to_vec(), init, true)
    }

    /// Declares a bias or a gain: no weight decay.
    pub fn vector(&mut self, name: &str, length: usize, init: Init) -> Slot {
        self.add(name, vec![length], init, false)
    }

    fn add(&mut self, name: &str, shape: Vec<usize>, init: Init, decay: bool) -> Slot {
        self.0.push(TensorDecl { name: name.to_string(), shape, init, decay });
        Slot(self.0.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decl(name: &str, init: Init) -> TensorDecl {
        TensorDecl { name: name.to_string(), shape: vec![200, 100], init, decay: true }
    }

    fn deviation(values: &[f32]) -> f32 {
        let n = values.len() as f32;
        let mean = values.iter().sum::<f32>() / n;
        (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / n).sqrt()
    }

    #[test]
    fn draws_have_the_declared_spread() {
        let cases = [
            (Init::Normal(0.02), 0.02),
            (Init::Kaiming, (2.0f32 / 200.0).sqrt()),
            (Init::Xavier, (2.0f32 / 300.0).sqrt()),
        ];
        for (init, expected) in cases {
            let found = deviation(&decl("w", init).draw(1));
            assert!((found / expected - 1.0).abs() < 0.03, "{init:?}: {found}");
        }
        assert_eq!(decl("w", Init::Constant(0.5)).draw(1), vec![0.5; 20_000]);
    }

    #[test]
    fn a_draw_depends_on_the_name_and_the_seed_alone() {
        let draw = |name: &str, seed: u64| decl(name, Init::Xavier).draw(seed);
        assert_eq!(draw("a", 1), draw("a", 1));
        assert_ne!(draw("a", 1), draw("a", 2));
        assert_ne!(draw("a", 1), draw("b", 1));
    }
}
