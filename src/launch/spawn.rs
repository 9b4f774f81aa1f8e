//! Child processes that do not outlive the launcher.
//!
//! Invariant: between fork and exec only async-signal-safe calls are made, on values prepared before the fork.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command},
};

use nix::{
    errno::Errno,
    sched::{CpuSet, sched_setaffinity},
    sys::{
        prctl::set_pdeathsig,
        signal::{SigHandler, SigSet, Signal},
    },
    unistd::{Pid, getpid, getppid, setsid},
};

use crate::{Error, Result};

/// Starts a process in a group of its own that is killed when the calling *thread* ends; with `cores`, it runs on these only. No
/// signal is blocked in it: the launcher waits for its own with them blocked, and a mask is inherited.
pub(super) fn supervised(command: &mut Command, cores: Option<&[usize]>) -> Result<Child> {
    let launcher = getpid();
    let affinity = cores.map(cpu_set).transpose()?;
    command.process_group(0);
    let before_exec = move || -> io::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        // The launcher may have died before the line above: then nobody would tell us.
        if getppid() != launcher {
            return Err(Errno::ESRCH.into());
        }
        SigSet::empty().thread_set_mask()?;
        if let Some(affinity) = &affinity {
            sched_setaffinity(Pid::from_raw(0), affinity)?;
        }
        Ok(())
    };
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed; prctl, getppid,
    // sigprocmask and sched_setaffinity are such calls, and nothing in it allocates, locks or panics (this function upholds it).
    unsafe { command.pre_exec(before_exec) };
    start(command)
}

/// Starts a process in a session of its own, which outlives the launcher and is not reached by signals of its terminal.
pub(super) fn detached(command: &mut Command) -> Result<Child> {
    let before_exec = || -> io::Result<()> {
        setsid()?;
        Ok(())
    };
    // SAFETY: as above: the closure makes one async-signal-safe call, setsid, and nothing else.
    unsafe { command.pre_exec(before_exec) };
    start(command)
}

/// Has this process, and what it becomes by exec, pass over a signal.
///
/// # Errors
///
/// [`Error::Os`] if the signal cannot be passed over.
pub fn ignore(signal: Signal) -> Result<()> {
    // SAFETY: SIG_IGN is no function that could run at a bad moment, and no handler of ours was there to be lost.
    let outcome = unsafe { nix::sys::signal::signal(signal, SigHandler::SigIgn) };
    outcome.map(drop).map_err(|e| Error::os("signal", signal.to_string(), e))
}

fn start(command: &mut Command) -> Result<Child> {
    command.spawn().map_err(|e| {
        let program = command.get_program().to_string_lossy();
        Error::os("execve", format!("the command `{program}`"), e)
    })
}

fn cpu_set(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core).map_err(|e| Error::os("CPU_SET", format!("core {core}"), e))?;
    }
    Ok(set)
}
