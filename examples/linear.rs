//! The smallest example: two workers learn a 10 x 10 matrix; the servers run SGD.
//!
//!     cargo build --examples && gradwire run -s 1 -n 2 --optimizer sgd --lr 0.1 -- target/debug/examples/linear
use gradwire::{Init, Result, TensorSpec, Worker};

const N: usize = 10;

/// Joins the job that the environment names and learns until the loss is small.
pub fn main() -> Result<()> {
    let steps = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1000);
    let mut worker = Worker::join(vec![TensorSpec::new("w", [N as u64, N as u64]).init(Init::Normal(1.0))])?;
    let (mut w, mut loss) = (vec![0.0; N * N], 0.0);
    for step in worker.clock()..steps {
        worker.parameters(0, &mut w)?;
        // y = x a, where a is the matrix to be found; each worker has its own inputs.
        let x: Vec<f32> = (0..N).map(|i| ((step as usize * 7 + i * 3 + worker.rank() * 5) as f32).sin()).collect();
        let mut gradient = vec![0.0; N * N];
        loss = 0.0;
        for column in 0..N {
            let error: f32 = (0..N).map(|row| x[row] * (w[row * N + column] - (row + column) as f32 * 0.1)).sum();
            loss += error * error / N as f32;
            (0..N).for_each(|row| gradient[row * N + column] = 2.0 * error * x[row] / N as f32);
        }
        worker.push_pull(0, &gradient)?;
        worker.wait()?;
        if step % 200 == 0 {
            println!("step {step}: loss {loss:.6}");
        }
    }
    println!("the loss went to {loss:.9}");
    worker.finish()
}
