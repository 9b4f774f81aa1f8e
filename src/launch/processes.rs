//! The processes of a job on one host: starting them, reading what they write, signalling their groups.
//!
//! Invariant: a process group is signalled only while its number cannot belong to anybody else: until its leader is reaped.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    process::{Child, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use nix::{
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use super::{
    cause::Exit,
    cores,
    crew::{Crew, Prepared},
    directory::JobDirectory,
    output::Stream,
    pipes::{SharedSink, Source, lock, read_all},
    spawn,
};
use crate::{Error, Result, types::Rank};

/// Is told on a thread of its own how a rank's process ended.
pub(super) type OnExit = Arc<dyn Fn(Rank, Exit) + Send + Sync>;

struct Process {
    child: Child,
    group: Pid,
    exit: Option<Exit>,
}

pub(super) struct Processes {
    mark: String,
    on_exit: OnExit,
    sink: SharedSink,
    /// What was started, to start one of it again.
    crew: Option<Crew>,
    ranks: BTreeMap<Rank, Process>,
    readers: Vec<JoinHandle<()>>,
    /// Tells readers that whoever still holds the other end of their pipe is none of ours.
    stop_reading: Arc<AtomicBool>,
}

impl Processes {
    pub fn new(mark: String, on_exit: OnExit, sink: SharedSink) -> Processes {
        Processes {
            mark,
            on_exit,
            sink,
            crew: None,
            ranks: BTreeMap::new(),
            readers: Vec::new(),
            stop_reading: Arc::default(),
        }
    }

    /// By what every process of the job is known.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Starts a host's ranks, but for those that the job begins without.
    pub fn start(&mut self, crew: &Crew, directory: &JobDirectory) -> Result<()> {
        let (prepared, cores) = crew.prepare(directory, &self.mark)?;
        directory.write("cores", &cores::text(&cores).replace(',', " "))?;
        self.crew = Some(crew.clone());
        for prepared in prepared.into_iter().filter(|prepared| !crew.config.is_vacant(prepared.rank)) {
            self.start_one(prepared, crew.pass_output)?;
        }
        self.write_pids(directory)
    }

    /// Starts a rank again whose process has been reaped, or one that has had none.
    ///
    /// # Errors
    ///
    /// As [`Processes::start`].
    pub fn restart(&mut self, rank: Rank, directory: &JobDirectory) -> Result<()> {
        let has_ended = self.ranks.get(&rank).is_none_or(|process| process.exit.is_some());
        let Some(crew) = self.crew.as_mut().filter(|_| has_ended) else { return Ok(()) };
        if !crew.ranks.contains(&rank) {
            crew.ranks.push(rank);
        }
        let (pass_output, (prepared, _)) = (crew.pass_output, crew.prepare(directory, &self.mark)?);
        for prepared in prepared.into_iter().filter(|prepared| prepared.rank == rank) {
            self.start_one(prepared, pass_output)?;
        }
        self.write_pids(directory)
    }

    fn start_one(&mut self, Prepared { rank, mut command, bound }: Prepared, pass_output: bool) -> Result<()> {
        command.stdin(Stdio::null());
        if !pass_output {
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
        }
        let child = spawn::supervised(&mut command, bound.as_deref())?;
        self.watch(rank, child)
    }

    fn write_pids(&self, directory: &JobDirectory) -> Result<()> {
        let pids = self.ranks.iter().map(|(rank, process)| format!("{} {rank}\n", process.group));
        directory.write("pids", &pids.collect::<String>())
    }

    /// Takes charge of a started process.
    fn watch(&mut self, rank: Rank, mut child: Child) -> Result<()> {
        let group = Pid::from_raw(i32::try_from(child.id()).expect("a process number is an i32"));
        let (out, err) = (child.stdout.take(), child.stderr.take());
        // Entered before anything can fail, so that it is cleared up whatever happens.
        self.ranks.insert(rank, Process { child, group, exit: None });
        let (sink, stop) = (Arc::clone(&self.sink), Arc::clone(&self.stop_reading));
        let named = |name: String| std::thread::Builder::new().name(name);
        let failed = |e| Error::os("pthread_create", format!("the watch over {rank}"), e);
        let reader = named(format!("output {rank}")).spawn(move || {
            let mut sources = Vec::new();
            sources.extend(out.map(|pipe| Source::new(Stream::Out, pipe)));
            sources.extend(err.map(|pipe| Source::new(Stream::Err, pipe)));
            read_all(rank, sources, &sink, &stop);
        });
        self.readers.push(reader.map_err(failed)?);
        let on_exit = Arc::clone(&self.on_exit);
        let waiter = named(format!("wait {rank}")).spawn(move || {
            on_exit(rank, wait_for(group));
        });
        waiter.map(drop).map_err(failed)
    }

    /// A process has ended: what it left in its group is told to end too, then it is reaped.
    pub fn reap(&mut self, rank: Rank, exit: Exit) {
        if let Some(process) = self.ranks.get_mut(&rank) {
            let _ = killpg(process.group, Signal::SIGTERM);
            let _ = process.child.wait();
            process.exit = Some(exit);
        }
    }

    pub fn alive(&self) -> impl Iterator<Item = Rank> + '_ {
        self.ranks.iter().filter(|(_, process)| process.exit.is_none()).map(|(rank, _)| *rank)
    }

    pub fn signal(&self, rank: Rank, signal: Signal) {
        if let Some(process) = self.ranks.get(&rank).filter(|process| process.exit.is_none()) {
            let _ = killpg(process.group, signal);
        }
    }

    pub fn signal_all(&self, signal: Signal) {
        self.alive().for_each(|rank| self.signal(rank, signal));
    }

    /// Prints what is still in the pipes. Nobody of ours holds their other ends any more.
    pub fn finish_output(&mut self) {
        self.stop_reading.store(true, Ordering::Relaxed);
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        lock(&self.sink).finish();
    }
}

/// Waits for a process to end and leaves it unreaped, so that its number stays its own.
fn wait_for(pid: Pid) -> Exit {
    loop {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Ok(WaitStatus::Exited(_, code)) => return Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Exit::Signal(signal as i32),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            // Somebody else in this process has reaped it: how it ended is not to be had any more.
            Err(_) => return Exit::Code(1),
        }
    }
}
