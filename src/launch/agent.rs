//! The agent: the launcher's hand on another host, started there by ssh. It starts its ranks, sends on what they write and how they
//! end, and clears up.
//!
//! Its standard input is the launcher. When that ends or is silent for too long, everything that the agent has started is killed;
//! a keeper does the same should the agent itself be killed.
//!
//! Invariant: a thread that never writes to the launcher watches its words, so that an agent whose output is stuck ends all the same.
#![forbid(unsafe_code)]

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use super::{
    cause::Exit,
    crew::Crew,
    directory::JobDirectory,
    keeper::Keeper,
    message::{BEAT, FromAgent, LINE_BYTES_MAX, ToAgent, line},
    output::{Piece, Stream},
    pipes::{SharedSink, Sink},
    processes::Processes,
    sweep,
};
use crate::{
    Error, Result,
    mem::Topology,
    session::{LineBuffer, VERSION},
    types::Rank,
    wire::JobToken,
};

/// How long one address of the rendezvous is tried.
const REACH_TIME: Duration = Duration::from_secs(3);

/// How long the launcher may be silent before it has said how long it may be.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How long what the ranks leave behind is looked for.
const SWEEP_TIME: Duration = Duration::from_secs(5);

/// What the agent hears.
enum Event {
    Order(ToAgent),
    Exited(Rank, Exit),
}

/// What must be cleared up whatever happens, as the watching thread knows it.
#[derive(Default)]
struct Charge {
    mark: Option<String>,
    directory: Option<PathBuf>,
    silence: Option<Duration>,
    /// Everything is being killed, which is no rank's own end.
    abandoned: bool,
}

/// What the agent's process does (`gradwire agent`, started through ssh only).
///
/// # Errors
///
/// What kept it from beginning; later failures are told to the launcher.
pub fn agent() -> Result<()> {
    let (events_out, events) = channel();
    let charge = Arc::new(Mutex::new(Charge::default()));
    let (for_watch, orders) = (Arc::clone(&charge), events_out.clone());
    let watch = move || {
        let why = hear(&orders, &for_watch);
        abandon(&for_watch, &why);
    };
    let thread = std::thread::Builder::new().name("launcher".into()).spawn(watch);
    thread.map_err(|e| Error::os("pthread_create", "the watch over the launcher", e))?;
    let cores = Topology::discover().cores.len();
    tell(&FromAgent::Hello { version: VERSION.into(), cores });
    Agent { events_out, charge, running: None }.run(&events);
    Ok(())
}

/// Reads the launcher's words until it is gone, silent or has said something strange; gives which.
fn hear(orders: &Sender<Event>, charge: &Mutex<Charge>) -> String {
    let mut stdin = std::io::stdin();
    let (mut buffer, mut bytes) = (LineBuffer::default(), vec![0; 64 << 10]);
    loop {
        while let Ok(Some(line)) = buffer.next_line(LINE_BYTES_MAX) {
            match serde_json::from_slice(&line) {
                Ok(ToAgent::Beat) => {}
                Ok(order) => {
                    if let ToAgent::Start { silence_ms, .. } = &order {
                        lock(charge).silence = Some(Duration::from_millis(*silence_ms));
                    }
                    let _ = orders.send(Event::Order(order));
                }
                Err(e) => return format!("the launcher broke the agent's protocol: {e}"),
            }
        }
        let silence = lock(charge).silence.unwrap_or(SILENCE_MAX);
        let time = PollTimeout::try_from(silence).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], time);
        if ready == Ok(0) {
            return format!("the launcher was silent for {} s: it, or the way to it, is gone", silence.as_secs_f64());
        }
        match stdin.read(&mut bytes) {
            Ok(n) if n > 0 => buffer.extend(&bytes[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            _ => return "the launcher hung up".into(),
        }
    }
}

/// The launcher is gone: nobody is left behind.
fn abandon(charge: &Mutex<Charge>, why: &str) {
    let (mark, directory) = {
        let mut charge = lock(charge);
        charge.abandoned = true;
        (charge.mark.clone(), charge.directory.clone())
    };
    if mark.is_some() {
        say(&format!("gradwire: {why}"));
    }
    if let Some(mark) = mark {
        sweep::sweep(&mark, SWEEP_TIME);
    }
    if let Some(directory) = directory {
        let _ = std::fs::remove_dir_all(directory);
    }
    std::process::exit(1);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Says something to the launcher. If it cannot be said the launcher is gone, which the watching thread notices.
fn tell(message: &FromAgent) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(&line(message)).and_then(|()| stdout.flush());
}

/// The same in words, on standard error, where there may be nobody any more: `eprintln` would panic then.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Sends output on.
struct Forward;

impl Sink for Forward {
    fn print(&mut self, rank: Rank, stream: Stream, piece: Piece, _: Instant) {
        tell(&FromAgent::Output { rank, stream, piece });
    }

    fn say(&mut self, text: &str) {
        say(text);
    }

    fn finish(&mut self) {}
}

/// What runs once the ranks have been started.
struct Running {
    processes: Processes,
    directory: JobDirectory,
    keeper: Keeper,
}

struct Agent {
    events_out: Sender<Event>,
    charge: Arc<Mutex<Charge>>,
    running: Option<Running>,
}

impl Agent {
    fn run(mut self, events: &Receiver<Event>) {
        loop {
            match events.recv_timeout(BEAT) {
                Ok(Event::Order(ToAgent::End)) => return self.end(),
                Ok(Event::Order(order)) => {
                    if let Err(e) = self.obey(order) {
                        tell(&FromAgent::Failed { text: e.to_string() });
                    }
                }
                Ok(Event::Exited(rank, exit)) => {
                    if let Some(running) = &mut self.running {
                        running.processes.reap(rank, exit);
                    }
                    if !lock(&self.charge).abandoned {
                        tell(&FromAgent::Exited { rank, exit });
                    }
                }
                Err(RecvTimeoutError::Timeout) => tell(&FromAgent::Beat),
                Err(RecvTimeoutError::Disconnected) => unreachable!("we hold a sender ourselves"),
            }
        }
    }

    fn obey(&mut self, order: ToAgent) -> Result<()> {
        match order {
            ToAgent::Reach { addresses, port } => {
                tell(&FromAgent::Reached { rendezvous: reach(&candidates(addresses, port))? });
            }
            ToAgent::Start { crew, token, name, mark, home, .. } => {
                self.start(&crew, &JobToken::from_hex(&token)?, &name, mark, home)?;
            }
            ToAgent::Restart { rank } => {
                if let Some(Running { processes, directory, .. }) = &mut self.running
                    && let Err(error) = processes.restart(rank, directory)
                {
                    say(&format!("gradwire: {rank} could not be started again: {error}"));
                    tell(&FromAgent::Exited { rank, exit: Exit::Code(1) });
                }
            }
            ToAgent::Signal { rank, signal } => {
                if let (Some(running), Ok(signal)) = (&self.running, Signal::try_from(signal)) {
                    running.processes.signal(rank, signal);
                }
            }
            ToAgent::Beat | ToAgent::End => {}
        }
        Ok(())
    }

    fn start(&mut self, crew: &Crew, token: &JobToken, name: &str, mark: String, home: Option<PathBuf>) -> Result<()> {
        let directory = JobDirectory::create(home.as_deref(), name)?;
        directory.describe(&crew.rendezvous.parse()?, token, &crew.config)?;
        let executable = std::env::current_exe().map_err(|e| Error::os("readlink", "/proc/self/exe", e))?;
        {
            let mut charge = lock(&self.charge);
            charge.mark = Some(mark.clone());
            charge.directory = Some(directory.path().to_path_buf());
        }
        let keeper = Keeper::start(&executable, &mark, directory.path())?;
        let events = Mutex::new(self.events_out.clone());
        let on_exit = Arc::new(move |rank, exit| drop(lock(&events).send(Event::Exited(rank, exit))));
        let sink: SharedSink = Arc::new(Mutex::new(Forward));
        let processes = Processes::new(mark, on_exit, sink);
        let running = self.running.insert(Running { processes, directory, keeper });
        running.processes.start(crew, &running.directory)
    }

    /// Clears up and says so.
    fn end(&mut self) {
        let mut left = 0;
        if let Some(Running { mut processes, directory, keeper }) = self.running.take() {
            processes.signal_all(Signal::SIGKILL);
            left = sweep::sweep(processes.mark(), SWEEP_TIME);
            processes.finish_output();
            directory.remove();
            keeper.dismiss();
        }
        *lock(&self.charge) = Charge::default();
        tell(&FromAgent::Gone { left });
    }
}

/// Where the rendezvous may be reached: first by the address from which the launcher's ssh came, if it listens there too.
fn candidates(addresses: Vec<SocketAddr>, port: Option<u16>) -> Vec<SocketAddr> {
    let connection = std::env::var("SSH_CONNECTION").unwrap_or_default();
    let caller = connection.split(' ').next().and_then(|ip| ip.split('%').next()?.parse::<IpAddr>().ok());
    let mut all: Vec<SocketAddr> = caller.zip(port).map(SocketAddr::from).into_iter().collect();
    all.extend(addresses.into_iter().filter(|address| Some(address.ip()) != caller));
    all
}

/// The first address at which somebody answers.
fn reach(addresses: &[SocketAddr]) -> Result<SocketAddr> {
    let mut tried = Vec::new();
    for address in addresses {
        match TcpStream::connect_timeout(address, REACH_TIME) {
            Ok(_) => return Ok(*address),
            Err(e) => tried.push(format!("{address} ({e})")),
        }
    }
    Err(Error::Config(format!(
        "the launcher's rendezvous cannot be reached from there: tried {}; open that port to it, or give `gradwire run` another \
         with --listen ADDRESS:PORT",
        tried.join(", ")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_answers_is_found_and_others_are_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let open = listener.local_addr().unwrap();
        let closed: SocketAddr = {
            let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            other.local_addr().unwrap()
        };
        assert_eq!(reach(&[closed, open]).unwrap(), open);
        let text = reach(&[closed]).unwrap_err().to_string();
        assert!(text.contains(&closed.to_string()) && text.contains("--listen"), "{text}");
    }
}
