//! `gradwire node` within somebody else's launcher: rank 0 keeps the job, as `gradwire run` does, with a rank of its own; the others
//! find it and take their seats.
//!
//! Invariant: every process reads the same flags, so all agree on who is who without a word between them.
#![forbid(unsafe_code)]

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use super::{
    node::{NodeArguments, become_worker, pass_over_preemption, serve},
    run::{block_signals, forward_signals, tell},
};
use crate::{
    Error, Result,
    launch::{Foreign, Job, JobOptions, Meeting, OutputTo},
    session::{Address, JobConfig, token_from_environment},
    types::{Rank, Role},
    wire::JobToken,
};

/// How the processes meet.
enum Place {
    /// At an address that all were told, with a token that all were told.
    Told(Address, JobToken),
    /// By a file.
    Shared(Meeting),
}

/// Takes this process' part.
pub(super) fn run(arguments: NodeArguments, foreign: &Foreign) -> Result<ExitCode> {
    let config = arguments.settings.gather_with(Some(foreign.size))?;
    let rank = foreign.role(&config)?;
    let place = place(&arguments, foreign)?;
    if foreign.rank == 0 {
        return lead(arguments, foreign, config, rank, place);
    }
    if config.checkpoint.dir.is_some() {
        pass_over_preemption()?;
    }
    let (address, token, token_file) = match &place {
        Place::Told(address, token) => {
            address.wait_for(Duration::from_millis(config.join_ms))?;
            (address.clone(), token.clone(), None)
        }
        Place::Shared(meeting) => {
            let who = |e| Error::JobFailed(format!("{rank} (rank {} of {}): {e}", foreign.rank, foreign.launcher));
            let address = meeting.find(foreign.size, Duration::from_millis(config.join_ms)).map_err(who)?;
            let text = std::fs::read_to_string(meeting.token_file());
            let text = text.map_err(|e| Error::file("read", meeting.token_file(), e))?;
            (address, JobToken::from_hex(&text)?, Some(meeting.token_file()))
        }
    };
    if rank.role == Role::Server {
        return serve(&address, &token, Some(rank.index));
    }
    let mut variables = vec![
        ("GRADWIRE_RENDEZVOUS", address.to_string()),
        ("GRADWIRE_RANK", rank.index.to_string()),
        ("GRADWIRE_LOCAL_RANK", foreign.local_rank.to_string()),
        ("GRADWIRE_WORKERS", config.workers.to_string()),
        ("GRADWIRE_SERVERS", config.servers.to_string()),
    ];
    variables.extend(token_file.map(|file| ("GRADWIRE_TOKEN_FILE", file.display().to_string())));
    Err(become_worker(&arguments.command, variables))
}

fn place(arguments: &NodeArguments, foreign: &Foreign) -> Result<Place> {
    let told = ["GRADWIRE_TOKEN", "GRADWIRE_TOKEN_FILE"].iter().any(|name| std::env::var_os(name).is_some());
    // torchrun's own store has its port; ours is the next one.
    let master = foreign.master.as_ref().filter(|_| told && arguments.rendezvous_dir.is_none());
    let master = master.map(|(host, port)| format!("{host}:{}", port.saturating_add(1)).parse()).transpose()?;
    match arguments.rendezvous.clone().or(master) {
        Some(_) if !told => Err(Error::Config(
            "with --rendezvous every process needs the same token: put 64 hexadecimal digits into a file of your own (openssl rand \
             -hex 32), and name it by GRADWIRE_TOKEN_FILE"
                .into(),
        )),
        Some(address) => Ok(Place::Told(address, token_from_environment()?)),
        None => {
            Ok(Place::Shared(Meeting::new(arguments.rendezvous_dir.as_deref(), foreign.run.as_deref().unwrap_or("run"))?))
        }
    }
}

/// Rank 0: the launcher of the job, as far as one is needed, and one rank.
fn lead(arguments: NodeArguments, foreign: &Foreign, config: JobConfig, rank: Rank, place: Place) -> Result<ExitCode> {
    let (name, skips) = (config.name.clone(), config.skips_nonfinite());
    let executable = std::env::current_exe().map_err(|e| Error::os("readlink", "/proc/self/exe", e))?;
    let interface = config.interface.clone();
    let mut options = JobOptions::new(config, arguments.command, executable);
    options.by_hand = options.config.ranks().filter(|other| *other != rank).collect();
    options.timeline = arguments.settings.timeline;
    options.output = OutputTo::Pass;
    if options.config.checkpoint.dir.is_some() {
        options.server_command.push("--deaf".into());
    }
    options.environment = vec![("GRADWIRE_LOCAL_RANK".into(), foreign.local_rank.to_string())];
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    options.listen = if foreign.one_host { SocketAddr::from((Ipv4Addr::LOCALHOST, 0)) } else { everywhere };
    let mut meeting = None;
    match place {
        Place::Told(address, token) => {
            options.listen = address.listen_at();
            options.token = Some(token);
        }
        Place::Shared(place) => meeting = Some(place),
    }
    let signals = block_signals()?;
    let mut job = Job::start(options)?;
    if let Some(meeting) = &mut meeting {
        meeting.open(job.listening(), interface.as_deref(), job.token(), foreign.size)?;
    }
    forward_signals(signals, job.signaller())?;
    let outcome = job.wait();
    tell(&name, skips, &outcome);
    Ok(ExitCode::from(outcome.code))
}
