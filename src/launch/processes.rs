//! The processes of a job: starting them with what they need to know, reading what they write, signalling their groups.
//!
//! Invariant: a process group is signalled only while its number cannot belong to anybody else: until its leader is reaped.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    io::Read,
    os::fd::{AsFd, BorrowedFd},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread::JoinHandle,
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, poll},
    sys::{
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};

use super::{
    cause::Exit,
    cores,
    directory::JobDirectory,
    job::JobOptions,
    output::{Piece, Printer, Splitter, Stream},
    spawn,
    supervisor::Event,
    sweep::MARK_VARIABLE,
};
use crate::{
    Error, Result,
    mem::Topology,
    session::Address,
    types::{Rank, Role},
};

/// After so long without more bytes a line that is not whole is shown.
const IDLE_MS: u16 = 200;

struct Process {
    child: Child,
    group: Pid,
    exit: Option<Exit>,
}

pub(super) struct Processes {
    mark: String,
    events: Sender<Event>,
    printer: Arc<Mutex<Printer>>,
    ranks: BTreeMap<Rank, Process>,
    readers: Vec<JoinHandle<()>>,
    /// Tells readers that whoever still holds the other end of their pipe is none of ours.
    stop_reading: Arc<AtomicBool>,
}

impl Processes {
    pub fn new(mark: String, events: Sender<Event>, printer: Printer) -> Processes {
        Processes {
            mark,
            events,
            printer: Arc::new(Mutex::new(printer)),
            ranks: BTreeMap::new(),
            readers: Vec::new(),
            stop_reading: Arc::default(),
        }
    }

    /// By what every process of the job is known.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// Starts every rank that is not started by hand: servers first, so that workers find them waiting.
    pub fn start(&mut self, options: &JobOptions, directory: &JobDirectory, address: &Address) -> Result<()> {
        let dealt = cores::deal(&options.config, &Topology::discover(), &directory.cores_of_others());
        let all: Vec<usize> = dealt.values().flatten().copied().collect();
        directory.write("cores", &cores::text(&all).replace(',', " "))?;
        for rank in options.config.ranks().filter(|rank| !options.by_hand.contains(rank)) {
            let program = if rank.role == Role::Server { &options.server_command } else { &options.command };
            let mut command = Command::new(&program[0]);
            command.args(&program[1..]);
            if rank.role == Role::Server {
                command.args(["--role", "server", "--rank"]).arg(rank.index.to_string());
                command.arg("--rendezvous").arg(address.to_string());
            }
            let role = if rank.role == Role::Server { "server" } else { "worker" };
            let hint = dealt.get(&rank).cloned().unwrap_or_default();
            command
                .env("GRADWIRE_RENDEZVOUS", address.to_string())
                .env("GRADWIRE_ROLE", role)
                .env("GRADWIRE_RANK", rank.index.to_string())
                .env("GRADWIRE_WORKERS", options.config.workers.to_string())
                .env("GRADWIRE_SERVERS", options.config.servers.to_string())
                .env("GRADWIRE_TOKEN_FILE", directory.token_file())
                .env_remove("GRADWIRE_TOKEN")
                .env("GRADWIRE_CORES", cores::text(&hint))
                .env(MARK_VARIABLE, &self.mark)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let bound = (options.bind && rank.role == Role::Worker).then_some(hint.as_slice());
            let child = spawn::supervised(&mut command, bound)?;
            self.watch(rank, child)?;
        }
        let pids = self.ranks.iter().map(|(rank, process)| format!("{} {rank}\n", process.group));
        directory.write("pids", &pids.collect::<String>())
    }

    /// Takes charge of a started process.
    fn watch(&mut self, rank: Rank, mut child: Child) -> Result<()> {
        let group = Pid::from_raw(i32::try_from(child.id()).expect("a process number is an i32"));
        let (out, err) = (child.stdout.take(), child.stderr.take());
        // Entered before anything can fail, so that it is cleared up whatever happens.
        self.ranks.insert(rank, Process { child, group, exit: None });
        let (printer, stop) = (Arc::clone(&self.printer), Arc::clone(&self.stop_reading));
        let named = |name: String| std::thread::Builder::new().name(name);
        let failed = |e| Error::os("pthread_create", format!("the watch over {rank}"), e);
        let reader = named(format!("output {rank}")).spawn(move || {
            let mut sources = Vec::new();
            sources.extend(out.map(|pipe| Source::new(Stream::Out, pipe)));
            sources.extend(err.map(|pipe| Source::new(Stream::Err, pipe)));
            read_all(rank, sources, &printer, &stop);
        });
        self.readers.push(reader.map_err(failed)?);
        let events = self.events.clone();
        let waiter = named(format!("wait {rank}")).spawn(move || {
            let exit = wait_for(group);
            let _ = events.send(Event::Exited(rank, exit));
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

    /// How a rank's process ended, if it has.
    pub fn exit(&self, rank: Rank) -> Option<Exit> {
        self.ranks.get(&rank)?.exit
    }

    pub fn alive(&self) -> impl Iterator<Item = Rank> + '_ {
        self.ranks.iter().filter(|(_, process)| process.exit.is_none()).map(|(rank, _)| *rank)
    }

    pub fn all_exited(&self) -> bool {
        self.alive().next().is_none()
    }

    pub fn signal(&self, rank: Rank, signal: Signal) {
        if let Some(process) = self.ranks.get(&rank).filter(|process| process.exit.is_none()) {
            let _ = killpg(process.group, signal);
        }
    }

    pub fn signal_all(&self, signal: Signal) {
        self.alive().for_each(|rank| self.signal(rank, signal));
    }

    /// Prints a line of the launcher's own, beside the ranks' errors.
    pub fn say(&self, text: &str) {
        lock(&self.printer).say(text);
    }

    /// Prints what is still in the pipes. Nobody of ours holds their other ends any more.
    pub fn finish_output(&mut self) {
        self.stop_reading.store(true, Ordering::Relaxed);
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        lock(&self.printer).finish();
    }
}

fn lock(printer: &Mutex<Printer>) -> std::sync::MutexGuard<'_, Printer> {
    printer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
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

/// One pipe of a rank.
struct Source {
    stream: Stream,
    pipe: Box<dyn Pipe>,
    splitter: Splitter,
}

trait Pipe: Read + AsFd + Send {}
impl<P: Read + AsFd + Send> Pipe for P {}

impl Source {
    fn new(stream: Stream, pipe: impl Pipe + 'static) -> Source {
        Source { stream, pipe: Box::new(pipe), splitter: Splitter::default() }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Reads a rank's pipes until both have ended, or until told to stop and nothing more is in them.
fn read_all(rank: Rank, mut sources: Vec<Source>, printer: &Mutex<Printer>, stop: &AtomicBool) {
    let print = |stream, piece: Piece| lock(printer).print(rank, stream, piece, Instant::now());
    let mut bytes = vec![0; 64 << 10];
    while !sources.is_empty() {
        let stopping = stop.load(Ordering::Relaxed);
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|source| PollFd::new(source.fd(), PollFlags::POLLIN)).collect();
        let quiet = matches!(poll(&mut fds, IDLE_MS), Ok(0));
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        if quiet && stopping {
            break;
        }
        let mut ready = ready.into_iter();
        sources.retain_mut(|source| {
            if !ready.next().unwrap_or(false) {
                source.splitter.idle().filter(|_| quiet).into_iter().for_each(|piece| print(source.stream, piece));
                return true;
            }
            match source.pipe.read(&mut bytes) {
                Ok(n) if n > 0 => {
                    source.splitter.feed(&bytes[..n]).into_iter().for_each(|piece| print(source.stream, piece));
                    true
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => true,
                _ => {
                    source.splitter.end().into_iter().for_each(|piece| print(source.stream, piece));
                    false
                }
            }
        });
    }
    for mut source in sources {
        source.splitter.end().into_iter().for_each(|piece| print(source.stream, piece));
    }
}
