//! `gradwire node`: one process of a job, started by our launcher, by another one, or by hand.
//!
//! Invariant: whatever ends a server is reported to the launcher before this process ends.
#![forbid(unsafe_code)]

use std::{
    ffi::OsString,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command as Process, ExitCode},
};

use clap::{Args, ValueEnum};
use nix::sys::signal::Signal;

use super::{group, settings::SettingArguments};
use crate::{
    Error, Result,
    launch::{EXIT_PREEMPTED, ignore, surroundings},
    session::{Address, Command, Commands, Member, Report, token_from_environment},
    types::Role,
    wire::JobToken,
};

#[derive(Args)]
#[command(after_help = "Examples:
  mpirun -n 6 gradwire node -s 2 -- python3 train.py         two servers and four workers, of Open MPI or MPICH
  srun -n 6 --kill-on-bad-exit=1 gradwire node -s 2 -- python3 train.py
  torchrun --nproc-per-node 6 --no-python gradwire node -s 2 -- python3 train.py
  gradwire node --rendezvous 10.0.0.1:7000 --role server --rank 1
  gradwire node --rendezvous 10.0.0.1:7000 --role worker -- python3 train.py

Within another launcher, all processes are given the same flags. Its first ranks are the servers, rank 0 keeps the rendezvous, and the
others find it by a file in --rendezvous-dir, which all hosts must share; or at --rendezvous, an address of rank 0's host, if all
have the same GRADWIRE_TOKEN_FILE (or GRADWIRE_TOKEN): 64 hexadecimal digits that nobody else knows.

With --role, one process joins a job that `gradwire run` has started. The token is taken from GRADWIRE_TOKEN, or from the file that
GRADWIRE_TOKEN_FILE names: the file `token` in the job's directory, which `gradwire run` prints at its start. It is never given on
the command line, where every user of the machine could read it.")]
pub(super) struct NodeArguments {
    /// The job's rendezvous, as `gradwire run` and the job's directory tell it; within another launcher, where rank 0 is to keep it.
    #[arg(long, value_name = "HOST:PORT", env = "GRADWIRE_RENDEZVOUS")]
    pub rendezvous: Option<Address>,
    /// What this process is to be in a running job.
    #[arg(long)]
    role: Option<RoleArgument>,
    /// Its number within the role [default: any that is free].
    #[arg(long, requires = "role")]
    rank: Option<u16>,
    /// Where the processes of another launcher find each other [default: ~/.gradwire/rendezvous].
    #[arg(long, value_name = "DIR", env = "GRADWIRE_RENDEZVOUS_DIR")]
    pub rendezvous_dir: Option<PathBuf>,
    /// Pass over TERM and USR1, which rank 0 of another launcher sees to.
    #[arg(long, hide = true)]
    deaf: bool,
    #[command(flatten)]
    pub settings: SettingArguments,
    /// What a worker runs.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum RoleArgument {
    Server,
    Worker,
}

/// Joins a job, or begins one together with the other processes of another launcher.
pub(super) fn run(arguments: NodeArguments) -> Result<ExitCode> {
    let Some(role) = arguments.role else {
        let Some(foreign) = surroundings()? else {
            return Err(Error::Config(
                "this process is in no mpirun, srun or torchrun that tells it its rank: start it there, or say --role and \
                 --rendezvous to join a running job"
                    .into(),
            ));
        };
        return group::run(arguments, &foreign);
    };
    let Some(rendezvous) = &arguments.rendezvous else {
        return Err(Error::Config("--role joins a running job: say where it is with --rendezvous HOST:PORT".into()));
    };
    match role {
        RoleArgument::Worker => {
            token_from_environment()?;
            let mut variables = vec![("GRADWIRE_RENDEZVOUS", rendezvous.to_string())];
            variables.extend(arguments.rank.map(|rank| ("GRADWIRE_RANK", rank.to_string())));
            Err(become_worker(&arguments.command, variables))
        }
        RoleArgument::Server if !arguments.command.is_empty() => {
            Err(Error::Config("a server takes no command; leave out what stands after `--`".into()))
        }
        RoleArgument::Server => {
            if arguments.deaf {
                pass_over_preemption()?;
            }
            serve(rendezvous, &token_from_environment()?, arguments.rank)
        }
    }
}

/// Slurm and others send these to every process of a job; where there are checkpoints they mean "write one and end", which one
/// process sees to.
pub(super) fn pass_over_preemption() -> Result<()> {
    ignore(Signal::SIGUSR1)?;
    ignore(Signal::SIGTERM)
}

/// Turns this process into a worker's command, which finds these variables; gives the error that prevented it.
pub(super) fn become_worker(command: &[OsString], variables: Vec<(&str, String)>) -> Error {
    let [program, rest @ ..] = command else {
        return Error::Config("a worker needs a command: give it after `--`".into());
    };
    let mut process = Process::new(program);
    process.args(rest).env_remove("GRADWIRE_RANK").env("GRADWIRE_ROLE", "worker").envs(variables);
    Error::os("execve", format!("the command `{}`", program.to_string_lossy()), process.exec())
}

/// Is a server until the job ends.
pub(super) fn serve(rendezvous: &Address, token: &JobToken, rank: Option<u16>) -> Result<ExitCode> {
    let member = Member::join(rendezvous, token, Role::Server, rank)?;
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
