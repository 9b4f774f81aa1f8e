//! `gradwire top`: a running job in the terminal, looked at each second.
//!
//! Invariant: it asks the job's launcher alone, with the job's token, and changes nothing.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;

use super::status::{ask, unexpected};
use crate::{
    Error, Result,
    session::{Control, ControlAnswer, Status},
    tools::top::{Figures, ceilings},
};

/// How long a launcher may take to say how things stand.
const STATUS_TIME: Duration = Duration::from_secs(10);

/// Clears the terminal and puts the cursor into its corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire top myjob
  gradwire bench push-pull --transport tcp --bytes 1M --json > ceiling.json
  gradwire top myjob --ceiling ceiling.json
  gradwire top myjob --once --json

Rates are of payload bytes that ranks sent, over the time between their reports (about five a second while the job gets on).")]
pub(super) struct TopArguments {
    /// The job's name.
    name: String,
    /// Show one look and end.
    #[arg(long)]
    once: bool,
    /// Print one JSON object a look instead of a screen.
    #[arg(long)]
    json: bool,
    /// What `gradwire bench … --json` has written: fabrics are shown beside its ceilings.
    #[arg(long, value_name = "FILE")]
    ceiling: Option<PathBuf>,
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
}

/// Shows a job until it ends.
pub(super) fn top(arguments: &TopArguments) -> Result<ExitCode> {
    if !(0.1..=3600.0).contains(&arguments.every) {
        return Err(Error::Config(format!("--every is {}; it must be from 0.1 to 3600 seconds", arguments.every)));
    }
    let ceilings = match &arguments.ceiling {
        Some(path) => ceilings(&std::fs::read_to_string(path).map_err(|error| Error::file("read", path, error))?)?,
        None => BTreeMap::new(),
    };
    let every = Duration::from_secs_f64(arguments.every);
    let mut before = look(&arguments.name)?;
    loop {
        let until = Instant::now() + every;
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        let now = match look(&arguments.name) {
            Ok(now) => now,
            // It has ended between two looks.
            Err(Error::Config(_) | Error::JobFailed(_) | Error::Os { .. }) if !arguments.once => {
                eprintln!("gradwire: job {} has ended", arguments.name);
                return Ok(ExitCode::SUCCESS);
            }
            Err(error) => return Err(error),
        };
        let figures = Figures::between(&before, &now, &ceilings);
        match (arguments.json, arguments.once) {
            (true, _) => println!("{}", serde_json::to_string(&figures).expect("figures have text keys")),
            (false, true) => print!("{}", figures.text()),
            (false, false) => print!("{CLEAR}{}", figures.text()),
        }
        use std::io::Write;
        if arguments.once || std::io::stdout().flush().is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        before = now;
    }
}

fn look(name: &str) -> Result<Box<Status>> {
    match ask(name, Control::Status, STATUS_TIME)? {
        ControlAnswer::Status(status) => Ok(status),
        _ => Err(unexpected()),
    }
}
