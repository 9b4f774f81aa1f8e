//! `gradwire run`: from flags to a job, and from the job's end to an exit code.
//!
//! Invariant: what the job ends with is what this process ends with.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, ffi::OsString, net::SocketAddr, process::ExitCode, time::Duration};

use clap::Args;
use nix::sys::signal::{SigSet, Signal as OsSignal};

use super::{hosts::HostArguments, settings::SettingArguments};
use crate::{
    Error, Result,
    launch::{Job, JobOptions, Outcome, Signal},
    types::Rank,
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire run -s 2 -n 2 -- python3 train.py --epochs 3
  gradwire run -n 4 --optimizer sgd --learning-rate 0.1 --set optimizer.momentum=0.9 -- ./train
  gradwire run --config job.toml --checkpoint-dir ckpt --checkpoint-every 100 -- ./train
  gradwire run --config job.toml --resume ckpt -- ./train
  gradwire run --hosts node1,node2:4 -s 2 -n 8 -- python3 train.py
  gradwire run --hostfile hosts -s 4 -n 16 --map-by numa --bind-to core -x OMP_NUM_THREADS=4 -- python3 train.py
  gradwire run -s 1 -n 2 --by-hand w1 --listen 10.0.0.1:7000 -- ./train
      worker 1 is started elsewhere, with `gradwire node --role worker --rank 1 --rendezvous 10.0.0.1:7000 -- ./train`

Settings come from flags, then from --config (or GRADWIRE_CONFIG), then from variables: seed is --seed, `seed = 1` in the file,
or GRADWIRE_SEED; checkpoint.every is --checkpoint-every, `every = 5` under [checkpoint], or GRADWIRE_CHECKPOINT_EVERY.

Signals: INT ends the job. TERM and USR1 write a checkpoint at the next clock and end the job with exit code 75 (\"preempted,
requeue me\"); where no checkpoint can be written they are passed on. A second signal ends the job at once.

Exit codes: 0 all went well; 3 all went well with fewer workers than it began with (--on-worker-loss); 75 preempted; 128 + n ended by signal n; else the code of the rank that failed first.")]
pub(super) struct RunArguments {
    #[command(flatten)]
    settings: SettingArguments,
    /// Where the rendezvous listens; for ranks on other hosts give an address that they can reach.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Ranks that are started by hand, such as w1,s0.
    #[arg(long, value_name = "RANKS", value_delimiter = ',')]
    by_hand: Vec<String>,
    #[command(flatten)]
    hosts: HostArguments,
    /// How long a rank that was told to end may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    grace: u64,
    /// What each worker runs.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs a job.
pub(super) fn run(arguments: RunArguments) -> Result<ExitCode> {
    let config = arguments.settings.gather()?;
    let timeline = arguments.settings.timeline;
    let (name, skips) = (config.name.clone(), config.skips_nonfinite());
    let by_hand = arguments.by_hand.iter().map(|text| rank(text)).collect::<Result<BTreeSet<Rank>>>()?;
    if let Some(stranger) = by_hand.iter().find(|rank| rank.index >= config.ranks_of(rank.role)) {
        return Err(Error::Config(format!("--by-hand names {stranger}, but the job has no such rank")));
    }
    let executable = std::env::current_exe().map_err(|e| Error::os("readlink", "/proc/self/exe", e))?;
    let mut options = JobOptions::new(config, arguments.command, executable);
    options.timeline = timeline;
    options.by_hand = by_hand;
    options.listen = arguments.listen;
    arguments.hosts.apply(&mut options)?;
    options.grace = Duration::from_secs(arguments.grace);
    // Before any thread is started: all of them inherit the mask, and one of them waits for these signals.
    let signals = block_signals()?;
    let mut job = Job::start(options)?;
    eprintln!("gradwire: job {name}, directory {}", job.directory().display());
    for text in &arguments.by_hand {
        let rank = rank(text)?;
        let role = rank.to_string().replace(' ', " --rank ");
        eprintln!("gradwire: waiting for {rank}: gradwire node --rendezvous {} --role {role}", job.address());
    }
    forward_signals(signals, job.signaller())?;
    let outcome = job.wait();
    tell(&name, skips, &outcome);
    Ok(ExitCode::from(outcome.code))
}

/// Says how a job has ended.
pub(super) fn tell(name: &str, skips: bool, outcome: &Outcome) {
    if let Some(reason) = &outcome.reason {
        eprintln!("gradwire: job {name}: {reason}");
    }
    for (rank, clock) in &outcome.missing {
        eprintln!("gradwire: job {name}: {rank} was lost; from clock {clock} on the job went on without it");
    }
    if let (count @ 1.., _) = outcome.not_finite {
        let what =
            if skips { "steps were skipped: a gradient was" } else { "steps were taken with a gradient that was" };
        eprintln!("gradwire: job {name}: {count} {what} not finite");
    }
    if !outcome.paths.is_empty() {
        let paths: Vec<String> = outcome.paths.iter().map(|(fabric, count)| format!("{count} over {fabric}")).collect();
        eprintln!("gradwire: job {name}: paths between workers and shards: {}", paths.join(", "));
    }
}

/// "w1", "worker:1" or "s0".
fn rank(text: &str) -> Result<Rank> {
    let digits = text.trim_start_matches(|c: char| c.is_ascii_alphabetic() || c == ':');
    let role = text[..text.len() - digits.len()].trim_end_matches(':');
    match (role, digits.parse()) {
        ("w" | "worker", Ok(index)) => Ok(Rank::worker(index)),
        ("s" | "server", Ok(index)) => Ok(Rank::server(index)),
        _ => Err(Error::Config(format!("`{text}` names no rank; write w1 for worker 1, s0 for server 0"))),
    }
}

pub(super) fn block_signals() -> Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in [OsSignal::SIGINT, OsSignal::SIGTERM, OsSignal::SIGUSR1, OsSignal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().map_err(|e| Error::os("pthread_sigmask", "the launcher's signals", e))?;
    Ok(signals)
}

pub(super) fn forward_signals(signals: SigSet, send: impl Fn(Signal) + Send + 'static) -> Result<()> {
    let forward = move || {
        while let Ok(signal) = signals.wait() {
            send(match signal {
                OsSignal::SIGTERM | OsSignal::SIGUSR1 => Signal::Preempt(signal as i32),
                _ => Signal::Interrupt,
            });
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(forward);
    thread.map(drop).map_err(|e| Error::os("pthread_create", "the signal thread", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_short_names() {
        assert_eq!(rank("w1").unwrap(), Rank::worker(1));
        assert_eq!(rank("server:12").unwrap(), Rank::server(12));
        for wrong in ["", "1", "x1", "w", "w-1", "w99999"] {
            assert!(rank(wrong).is_err(), "{wrong}");
        }
    }
}
