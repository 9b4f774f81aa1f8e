//! `gradwire node`: one process of a job, started by the launcher or by hand.
//!
//! Invariant: whatever ends a server is reported to the launcher before this process ends.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    process::{Command as Process, ExitCode},
};

use clap::{Args, ValueEnum};

use crate::{
    Error, Result,
    launch::EXIT_PREEMPTED,
    session::{Address, Command, Commands, Member, Report, token_from_environment},
    types::Role,
};

#[derive(Args)]
#[command(after_help = "Examples:
  gradwire node --rendezvous 10.0.0.1:7000 --role server --rank 1
  gradwire node --rendezvous 10.0.0.1:7000 --role worker -- python3 train.py

The token is taken from GRADWIRE_TOKEN, or from the file that GRADWIRE_TOKEN_FILE names: the file `token` in the job's directory,
which `gradwire run` prints at its start. It is never given on the command line, where every user of the machine could read it.")]
pub(super) struct NodeArguments {
    /// The job's rendezvous, as `gradwire run` and the job's directory tell it.
    #[arg(long, value_name = "HOST:PORT", env = "GRADWIRE_RENDEZVOUS")]
    rendezvous: Address,
    /// What this process is to be.
    #[arg(long)]
    role: RoleArgument,
    /// Its number within the role [default: any that is free].
    #[arg(long)]
    rank: Option<u16>,
    /// What a worker runs.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArgument {
    Server,
    Worker,
}

/// Joins a job.
pub(super) fn run(arguments: NodeArguments) -> Result<ExitCode> {
    match arguments.role {
        RoleArgument::Worker => Err(become_worker(&arguments)),
        RoleArgument::Server if !arguments.command.is_empty() => {
            Err(Error::Config("a server takes no command; leave out what stands after `--`".into()))
        }
        RoleArgument::Server => serve(&arguments),
    }
}

/// Turns this process into the worker's command; gives the error that prevented it.
fn become_worker(arguments: &NodeArguments) -> Error {
    let [program, rest @ ..] = arguments.command.as_slice() else {
        return Error::Config("a worker needs a command: give it after `--`".into());
    };
    if let Err(e) = token_from_environment() {
        return e;
    }
    let mut process = Process::new(program);
    process.args(rest).env("GRADWIRE_RENDEZVOUS", arguments.rendezvous.to_string()).env("GRADWIRE_ROLE", "worker");
    match arguments.rank {
        Some(rank) => process.env("GRADWIRE_RANK", rank.to_string()),
        None => process.env_remove("GRADWIRE_RANK"),
    };
    Error::os("execve", format!("the command `{}`", program.to_string_lossy()), process.exec())
}

fn serve(arguments: &NodeArguments) -> Result<ExitCode> {
    let member = Member::join(&arguments.rendezvous, &token_from_environment()?, Role::Server, arguments.rank)?;
    let (reporter, commands, rank) = (member.reporter(), member.commands()?, member.rank());
    let outcome = crate::server::run(member);
    match outcome {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(Error::Preempted { .. }) => Ok(ExitCode::from(EXIT_PREEMPTED)),
        // A server that was told to stop while it still waited for the job to begin has not failed.
        Err(_) if was_stopped(&commands) => Ok(ExitCode::SUCCESS),
        Err(e) => {
            // If the launcher is gone, nobody is left to be told.
            let _ = reporter.report(Report::failure(&e));
            eprintln!("gradwire: {rank}: {e}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn was_stopped(commands: &Commands) -> bool {
    std::iter::from_fn(|| commands.poll().ok().flatten()).any(|command| matches!(command, Command::Stop { .. }))
}
