//! The settings of the job that a training run needs, as a file for `gradwire run --config`.
//!
//! Invariant: they follow from the run's configuration alone, by the same functions that check them when a worker joins. The
//! files decoder.toml and lstm.toml beside this package are what this prints for the tuned runs.

use crate::gradwire_home::optimizer;
use crate::order::Order;
use crate::train::TrainConfig;
use anyhow::Result;
use gradwire::OptimizerConfig;
use serde::Serialize;

#[derive(Serialize)]
struct Job {
    servers: u16,
    workers: u16,
    seed: u64,
    optimizer: OptimizerConfig,
}

/// The file's text, for a run on `rows` training rows.
pub fn job_file(config: &TrainConfig, rows: usize, servers: u16, workers: u16) -> Result<String> {
    let order = Order::new(rows, config.seed, (0, workers.into()), config.batch, config.sharding);
    let clocks = order.clocks(config.epochs);
    let job = Job { servers, workers, seed: config.seed, optimizer: optimizer(&config.hyper(clocks)) };
    let what = config.model.name();
    Ok(format!(
        "# The job of `news train --model {what}`: {clocks} clocks, {workers} workers with {} rows each a clock.\n\
         # Printed by `news settings`; matrices decay, biases and gains (the group \"steady\") do not.\n{}",
        config.batch,
        toml::to_string(&job)?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::defaults;
    use crate::data::training_rows;
    use crate::train::Model;
    use gradwire::session::gather;
    use std::path::Path;

    #[test]
    fn the_files_beside_this_package_are_the_tuned_runs() {
        for model in [Model::Decoder, Model::Lstm] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{}.toml", model.name()));
            let text = job_file(&defaults(model), training_rows(None), 2, 2).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "print it anew with `news settings`");
            let job = gather(std::iter::empty(), Some(&path), &[("seed".to_string(), "7".to_string())]).unwrap();
            assert_eq!((job.servers, job.workers, job.seed), (2, 2, 7));
            // 8 passes over 8,000 rows, 64 of them a clock, a tenth of the clocks to warm up.
            assert_eq!(job.optimizer, optimizer(&defaults(model).hyper(1_000)));
        }
    }
}
