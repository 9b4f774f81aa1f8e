//! Gradients against finite differences, padding, causality, dropout: for both models.

use super::layers::Pooling;
use super::*;
use crate::streams::stream;
use crate::text::Encoded;
use rand::Rng;

fn decoder(pooling: Pooling, next_token: f64) -> Box<dyn Net> {
    Box::new(Decoder::new(DecoderConfig {
        vocabulary: vec![9, 7],
        classes: 3,
        width: 8,
        heads: 2,
        layers: 2,
        inner: 12,
        dropout: 0.2,
        token_dropout: 0.1,
        pooling,
        next_token,
    }))
}

fn lstm(pooling: Pooling) -> Box<dyn Net> {
    Box::new(Lstm::new(LstmConfig {
        vocabulary: vec![9, 7],
        classes: 3,
        width: 6,
        hidden: 5,
        dropout: 0.2,
        token_dropout: 0.1,
        pooling,
    }))
}

fn nets() -> Vec<(&'static str, Box<dyn Net>)> {
    vec![
        ("decoder, last", decoder(Pooling::Last, 0.0)),
        ("decoder, mean and next token", decoder(Pooling::Mean, 0.3)),
        ("lstm, last", lstm(Pooling::Last)),
        ("lstm, mean", lstm(Pooling::Mean)),
    ]
}

fn row(length: usize) -> Encoded {
    // Distinct lengths and repeated tokens: shared embedding rows must add up their gradients.
    let ids = |modulus: usize, step: usize| {
        let id = |at: usize| (1 + (at * step + length) % modulus) as u32;
        (0..length).map(id).collect()
    };
    Encoded { ids: vec![ids(8, 3), ids(6, 5)] }
}

fn batch() -> Batch {
    Batch::new(&[(&row(5), 0), (&row(3), 2), (&row(4), 1)])
}

/// Starting values larger than training's, so that no gradient is lost in rounding.
fn values(decls: &[TensorDecl]) -> Vec<Vec<f32>> {
    let mut rng = stream("model tests", &[]);
    let mut draw = |decl: &TensorDecl| {
        let one = |_| rng.random_range(-0.7..0.7);
        (0..decl.elements()).map(one).collect()
    };
    decls.iter().map(&mut draw).collect()
}

fn noise() -> Noise {
    Noise::On(Box::new(stream("model test noise", &[])))
}

fn total_loss(net: &dyn Net, values: &[Vec<f32>], nudge: Option<(usize, usize, f64)>) -> f64 {
    let weights = Weights::new(net.tensors(), values, DType::F64).unwrap();
    if let Some((tensor, element, by)) = nudge {
        let variable = &weights.variables()[tensor];
        let mut flat = variable.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        flat[element] += by;
        let moved = Tensor::from_vec(flat, variable.shape(), &Device::Cpu).unwrap();
        variable.set(&moved).unwrap();
    }
    let batch = batch();
    let output = net.forward(&weights, &batch, &mut noise()).unwrap();
    let mut loss = cross_entropy(&output.logits, &batch.labels, 0.1).unwrap();
    if let Some(auxiliary) = output.auxiliary {
        loss = (loss + auxiliary).unwrap();
    }
    loss.to_scalar::<f64>().unwrap()
}

#[test]
fn every_gradient_agrees_with_a_finite_difference() {
    for (name, net) in nets() {
        let values = values(net.tensors());
        let weights = Weights::new(net.tensors(), &values, DType::F64).unwrap();
        let (_, mut found) = gradients(net.as_ref(), &weights, &batch(), &mut noise(), 0.1).unwrap();
        for (at, decl) in net.tensors().iter().enumerate() {
            let gradient = found.take(at).unwrap().unwrap_or_else(|| panic!("{name}: {decl:?}"));
            assert_eq!(gradient.len(), decl.elements());
            let mut largest = 0f64;
            for (element, value) in gradient.iter().enumerate() {
                let step = 1e-4;
                let up = total_loss(net.as_ref(), &values, Some((at, element, step)));
                let down = total_loss(net.as_ref(), &values, Some((at, element, -step)));
                let expected = (up - down) / (2.0 * step);
                let off = (f64::from(*value) - expected).abs();
                let place = format!("{name}: {}[{element}]", decl.name);
                assert!(off < 1e-6 + 1e-4 * expected.abs(), "{place}: {value} {expected}");
                largest = largest.max(expected.abs());
            }
            assert!(largest > 1e-4, "{name}: {} has no gradient to speak of", decl.name);
        }
    }
}

#[test]
fn a_row_does_not_feel_its_neighbours_or_its_padding() {
    for (name, net) in nets() {
        let weights = Weights::new(net.tensors(), &values(net.tensors()), DType::F64).unwrap();
        let logits = |batch: &Batch| {
            let output = net.forward(&weights, batch, &mut Noise::Off).unwrap();
            output.logits.to_vec2::<f64>().unwrap()
        };
        let together = logits(&batch());
        let alone = logits(&Batch::new(&[(&row(3), 2)]));
        for (a, b) in together[1].iter().zip(&alone[0]) {
            assert!((a - b).abs() < 1e-9, "{name}: {a} {b}");
        }
    }
}

#[test]
fn two_halves_average_to_the_whole_batch() {
    for (name, net) in nets() {
        let weights = Weights::new(net.tensors(), &values(net.tensors()), DType::F64).unwrap();
        let rows = [row(5), row(3), row(2), row(4)];
        let labelled: Vec<_> = rows.iter().zip([0, 2, 1, 1]).collect();
        let run = |rows: &[(&Encoded, usize)]| -> Vec<Vec<f32>> {
            let batch = Batch::new(rows);
            let (_, mut found) = gradients(net.as_ref(), &weights, &batch, &mut Noise::Off, 0.1).unwrap();
            (0..net.tensors().len()).map(|at| found.take(at).unwrap().unwrap()).collect()
        };
        let (whole, left, right) = (run(&labelled), run(&labelled[..2]), run(&labelled[2..]));
        for ((whole, left), right) in whole.iter().zip(&left).zip(&right) {
            for ((w, l), r) in whole.iter().zip(left).zip(right) {
                assert!((w - (l + r) / 2.0).abs() < 1e-5, "{name}: {w} {l} {r}");
            }
        }
    }
}

#[test]
fn names_are_unique_and_only_matrices_decay() {
    for (name, net) in nets() {
        let names: std::collections::HashSet<_> = net.tensors().iter().map(|t| &t.name).collect();
        assert_eq!(names.len(), net.tensors().len(), "{name}");
        assert!(net.tensors().iter().all(|t| t.decay == (t.shape.len() == 2)));
    }
}

#[test]
fn dropout_repeats_with_its_stream_and_keeps_the_mean() {
    let x = Tensor::ones((100, 200), DType::F32, &Device::Cpu).unwrap();
    let draw = |seed: u64| {
        let mut noise = Noise::On(Box::new(stream("d", &[seed])));
        let dropped = noise.drop(x.clone(), 0.25).unwrap();
        dropped.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let first = draw(1);
    assert_eq!(first, draw(1));
    assert_ne!(first, draw(2));
    let zeros = first.iter().filter(|v| **v == 0.0).count() as f32 / 20_000.0;
    assert!((zeros - 0.25).abs() < 0.02, "{zeros}");
    let mean = first.iter().sum::<f32>() / 20_000.0;
    assert!((mean - 1.0).abs() < 0.02, "{mean}");
}
