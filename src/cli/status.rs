//! `gradwire status`: looking at a running job, and asking something of it.
//!
//! Invariant: a job is found by its name through its directory, and spoken to over its rendezvous with its token.
#![forbid(unsafe_code)]

use std::{process::ExitCode, time::Duration};

use clap::Args;

use crate::{
    Error, Result,
    launch::JobDirectory,
    session::{Control, ControlAnswer, PathCounts, ShardStatus, Status, control},
};

/// How long a launcher may take to say how things stand.
const STATUS_TIME: Duration = Duration::from_secs(10);

#[derive(Args)]
pub(super) struct StatusArguments {
    /// The job's name; without one, the running jobs are listed.
    name: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks something of a running job.
pub(super) fn ask(name: &str, order: Control, time: Duration) -> Result<ControlAnswer> {
    let directory = JobDirectory::open(name)?;
    control(&directory.address()?, &directory.token()?, order, time)
}

/// The error of an answer that does not fit what was asked.
pub(super) fn unexpected() -> Error {
    Error::JobFailed("the launcher answered something else than was asked".into())
}

/// Says how a job stands.
pub(super) fn status(arguments: &StatusArguments) -> Result<ExitCode> {
    let Some(name) = &arguments.name else {
        let running = JobDirectory::running();
        if arguments.json {
            println!("{}", serde_json::json!(running));
        } else if running.is_empty() {
            eprintln!("no job is running here");
        }
        if !arguments.json {
            running.iter().for_each(|name| println!("{name}"));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let ControlAnswer::Status(status) = ask(name, Control::Status, STATUS_TIME)? else { return Err(unexpected()) };
    if arguments.json {
        println!("{}", serde_json::to_string(&status).expect("a status has text keys"));
    } else {
        print!("{}", table(&status));
    }
    Ok(ExitCode::SUCCESS)
}

/// Who serves which shard, and whether the other copy may take over; nothing where shards have one copy.
fn redundancy(status: &Status) -> String {
    let mut text = String::new();
    for shard in &status.shards {
        let ShardStatus { epoch, primary, backup, backup_state, moves, .. } = shard;
        let other = match backup {
            Some(to) if *moves => format!(", moves to {to}: {backup_state}"),
            Some(backup) => format!(", backup {backup}: {backup_state}"),
            None => String::new(),
        };
        text += &format!("shard {}: {primary} serves since epoch {epoch}{other}\n", shard.shard.0);
    }
    let without = status.shards_without_backup();
    text += &match (status.shards.iter().all(|shard| shard.moves), without.is_empty()) {
        (true, _) => String::new(),
        (_, true) => "redundancy: full\n".into(),
        _ => format!("shards without a backup: {}\n", without.join(", ")),
    };
    text
}

fn table(status: &Status) -> String {
    let checkpoint = status.checkpoint.map_or("none yet".into(), |clock| format!("clock {clock}"));
    let mut text = format!("job {}, last checkpoint: {checkpoint}\n", status.name);
    text += &format!("{:<12} {:<11} {:>9} {:>9}  {}\n", "rank", "state", "clock", "process", "host");
    for rank in &status.ranks {
        let clock = rank.clock.map_or("-".into(), |clock| clock.to_string());
        let pid = if rank.pid == 0 { "-".into() } else { rank.pid.to_string() };
        text += &format!("{:<12} {:<11} {clock:>9} {pid:>9}  {}\n", rank.rank.to_string(), rank.state, rank.host);
    }
    text += &redundancy(status);
    for turn in &status.turns {
        text += &format!("{turn}\n");
    }
    if status.lacked > 0 {
        text += &format!("steps of a chunk without what a lost worker had not given in whole: {}\n", status.lacked);
    }
    if status.not_finite > 0 {
        text += &format!("gradients that were not finite at {} clocks\n", status.not_finite);
    }
    for rank in &status.ranks {
        let PathCounts { rebuilt, corrupt } = rank.path_counts;
        if rebuilt + corrupt > 0 {
            text += &format!("{}: {rebuilt} ends of broken paths rebuilt, {corrupt} damaged payloads\n", rank.rank);
        }
    }
    if let Some(verdict) = &status.verdict {
        text += &format!("waiting: {verdict}\n");
    }
    let metrics = status.ranks.iter().filter_map(|rank| Some((rank.rank.to_string(), rank.metrics?)));
    for (who, address) in status.metrics.map(|address| ("launcher".into(), address)).into_iter().chain(metrics) {
        text += &format!("metrics of {who}: http://{address}/metrics\n");
    }
    for rank in &status.ranks {
        for path in &rank.paths {
            text += &format!("{} reaches {} over {}: {}\n", rank.rank, path.peer, path.fabric, path.reason);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Rank, ShardId};

    #[test]
    fn shards_without_a_backup_are_named() {
        let shard = |shard, state: &str| ShardStatus {
            shard: ShardId(shard),
            epoch: 3,
            primary: Rank::server(1),
            backup: Some(Rank::server(0)),
            moves: false,
            backup_state: state.into(),
        };
        let status = |states: &[&str]| Status {
            name: "job".into(),
            instance: 0,
            ranks: Vec::new(),
            shards: states.iter().zip(0..).map(|(state, index)| shard(index, state)).collect(),
            turns: Vec::new(),
            lacked: 0,
            checkpoint: None,
            not_finite: 0,
            verdict: None,
            metrics: None,
        };
        assert_eq!(redundancy(&status(&[])), "", "each shard has one copy");
        assert!(redundancy(&status(&["complete", "complete"])).ends_with("redundancy: full\n"));
        let text = redundancy(&status(&["catching up", "complete", "gone"]));
        assert!(text.starts_with("shard 0: server 1 serves since epoch 3, backup server 0: catching up\n"), "{text}");
        assert!(text.ends_with("shards without a backup: 0, 2\n"), "{text}");
    }
}
