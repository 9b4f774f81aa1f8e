//! The parameters on gradwire's servers: this process is one worker of a job.
//!
//! The servers hold the optimizer, its groups and its schedule, and they take them from the job's settings, which the
//! launcher hands to every rank. What a model's run wants is therefore written twice, in the job's file and in the defaults
//! of the command line; [`Seat::open`] compares the two before the first step.
//!
//! Invariant: no step is taken under settings that are not the ones this run was planned with.

use crate::home::{Home, Hyper, Opened, Rule, Schedule};
use crate::tensors::{Init, TensorDecl};
use anyhow::{Result, bail};
use gradwire::optim::{GroupConfig, Schedule as ServerSchedule};
use gradwire::session::{Member, Report};
use gradwire::{OptimizerConfig, OptimizerKind, TensorSpec, Worker};

/// The parameter group of the tensors that do not decay; all others are in the default group.
const STEADY: (&str, u16) = ("steady", 1);

/// A worker's place in a job, before its tensors are known.
pub struct Seat(Member);

impl Seat {
    /// Takes the place that the environment names; `None` if this process was not started by a job.
    pub fn take() -> Result<Option<Self>> {
        if std::env::var_os("GRADWIRE_RENDEZVOUS").is_none() {
            return Ok(None);
        }
        Ok(Some(Self(Member::from_environment()?)))
    }

    /// How many workers the job has.
    pub fn workers(&self) -> usize {
        self.0.config().workers.into()
    }

    /// The job's seed, from which the servers draw the first parameters.
    pub fn seed(&self) -> u64 {
        self.0.config().seed
    }

    /// Tells the launcher why this worker cannot take part, so that it is named as the reason of the job's end.
    pub fn refuse(&self, why: &str) {
        let error = gradwire::Error::Config(why.to_string());
        // If the launcher is gone, nobody is left to be told.
        let _ = self.0.reporter().report(Report::failure(&error));
    }

    /// Declares the tensors and fetches what the servers start with, or where they were stopped.
    pub fn open(self, tensors: &[TensorDecl], hyper: &Hyper) -> Result<Opened> {
        let config = self.0.config();
        let mut differences = differences(&config.optimizer, &optimizer(hyper));
        if config.seed != hyper.seed {
            differences.push(format!("seed = {} instead of {}", config.seed, hyper.seed));
        }
        if !differences.is_empty() {
            let text = format!(
                "the job's settings are not those of this run: {}; `news settings` with the options of `news train` prints \
                 a file for `gradwire run --config`",
                differences.join(", ")
            );
            self.refuse(&text);
            bail!(text);
        }
        let worker = Worker::with_member(self.0, tensors.iter().map(spec).collect())?;
        let clock = worker.clock();
        let mut parameters: Vec<Vec<f32>> = tensors.iter().map(|tensor| vec![0.0; tensor.elements()]).collect();
        read(&worker, &mut parameters)?;
        Ok(Opened { home: Box::new(GradwireHome(worker)), parameters, clock })
    }
}

struct GradwireHome(Worker);

impl Home for GradwireHome {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn workers(&self) -> usize {
        self.0.workers()
    }

    fn push(&mut self, tensor: usize, gradient: Vec<f32>) -> Result<()> {
        Ok(self.0.push_pull(tensor, &gradient)?)
    }

    fn wait(&mut self, parameters: &mut [Vec<f32>]) -> Result<()> {
        self.0.wait()?;
        read(&self.0, parameters)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        Ok(self.0.finish()?)
    }
}

fn read(worker: &Worker, parameters: &mut [Vec<f32>]) -> Result<()> {
    for (tensor, values) in parameters.iter_mut().enumerate() {
        worker.parameters(tensor, values)?;
    }
    Ok(())
}

fn spec(tensor: &TensorDecl) -> TensorSpec {
    let init = match (tensor.init, tensor.shape.as_slice()) {
        (Init::Zeros, _) => gradwire::Init::Zeros,
        (Init::Constant(value), _) => gradwire::Init::Constant(value),
        (Init::Normal(deviation), _) => gradwire::Init::Normal(deviation),
        (Init::Xavier, _) => gradwire::Init::XavierUniform,
        // The servers count fans as PyTorch does, (outputs, inputs); matrices here are (inputs, outputs). Xavier's rule does not
        // see the difference, Kaiming's does.
        (Init::Kaiming, [inputs, ..]) => gradwire::Init::Normal((2.0 / *inputs as f32).sqrt()),
        (Init::Kaiming, []) => gradwire::Init::Zeros,
    };
    let shape: Vec<u64> = tensor.shape.iter().map(|n| *n as u64).collect();
    TensorSpec::new(&tensor.name, shape).init(init).group(if tensor.decay { 0 } else { STEADY.1 })
}

/// What the servers are to run.
pub fn optimizer(hyper: &Hyper) -> OptimizerConfig {
    let kind = match hyper.rule {
        Rule::Sgd => OptimizerKind::SGD,
        Rule::Momentum(momentum) => OptimizerKind::Sgd { momentum, nesterov: false },
        Rule::AdamW { beta1, beta2, eps } => OptimizerKind::AdamW { beta1, beta2, epsilon: eps },
    };
    let mut optimizer = OptimizerConfig::new(kind, hyper.learning_rate);
    optimizer.weight_decay = hyper.weight_decay;
    optimizer.groups = vec![GroupConfig { name: STEADY.0.to_string(), learning_rate: None, weight_decay: Some(0.0) }];
    optimizer.schedule = match hyper.schedule {
        Schedule::Constant => ServerSchedule::Constant,
        Schedule::Step { every, factor } => ServerSchedule::Step { every, factor },
        Schedule::WarmupCosine { warmup, total } => {
            ServerSchedule::WarmupCosine { warmup_steps: warmup, total_steps: total, final_factor: 0.0 }
        }
    };
    optimizer
}

/// Each setting of the optimizer in which the job is not as planned, in words.
fn differences(found: &OptimizerConfig, planned: &OptimizerConfig) -> Vec<String> {
    let pairs = [
        ("kind", format!("{:?}", found.kind), format!("{:?}", planned.kind)),
        ("learning_rate", found.learning_rate.to_string(), planned.learning_rate.to_string()),
        ("weight_decay", found.weight_decay.to_string(), planned.weight_decay.to_string()),
        ("groups", format!("{:?}", found.groups), format!("{:?}", planned.groups)),
        ("schedule", format!("{:?}", found.schedule), format!("{:?}", planned.schedule)),
    ];
    let differs = pairs.into_iter().filter(|(_, found, planned)| found != planned);
    differs.map(|(key, found, planned)| format!("optimizer.{key} = {found} instead of {planned}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hyper(clocks: u64) -> Hyper {
        Hyper {
            seed: 3,
            rule: Rule::AdamW { beta1: 0.9, beta2: 0.98, eps: 1e-8 },
            learning_rate: 0.1,
            weight_decay: 0.2,
            schedule: Schedule::WarmupCosine { warmup: 5, total: clocks },
        }
    }

    #[test]
    fn only_matrices_decay_on_the_servers() {
        let settings = optimizer(&hyper(10));
        settings.validate().unwrap();
        for (decay, expected) in [(true, 0.2), (false, 0.0)] {
            let tensor = TensorDecl { name: "w".to_string(), shape: vec![2, 3], init: Init::Xavier, decay };
            assert_eq!(settings.weight_decay(spec(&tensor).group), expected);
        }
        assert_eq!(settings.group_index(STEADY.0), Some(STEADY.1));
    }

    #[test]
    fn a_schedule_of_another_length_is_noticed_and_named() {
        let planned = optimizer(&hyper(10));
        assert!(differences(&planned, &planned).is_empty());
        let found = differences(&optimizer(&hyper(20)), &planned);
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("optimizer.schedule") && found[0].contains("total_steps: 20"), "{found:?}");
    }

    #[test]
    fn the_servers_schedule_is_the_local_one() {
        for schedule in [
            Schedule::Constant,
            Schedule::Step { every: 7, factor: 0.5 },
            Schedule::WarmupCosine { warmup: 5, total: 40 },
        ] {
            let there = optimizer(&Hyper { schedule, ..hyper(40) }).schedule;
            for clock in 0..60 {
                let gap = there.factor(clock) - schedule.factor(clock);
                assert!(gap.abs() < 1e-12, "{schedule:?} at {clock}");
            }
        }
    }

    #[test]
    fn a_start_has_the_declared_spread_whichever_way_fans_are_counted() {
        let tensor = TensorDecl { name: "w".to_string(), shape: vec![200, 50], init: Init::Kaiming, decay: true };
        let mut values = vec![0.0; 10_000];
        spec(&tensor).init.fill(1, "w", &[200, 50], 0, &mut values);
        let variance = values.iter().map(|v| v * v).sum::<f32>() / 10_000.0;
        assert!((variance * 200.0 / 2.0 - 1.0).abs() < 0.1, "{variance}");
    }
}
