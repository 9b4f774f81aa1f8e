//! The ceiling of the benchmarks: drivers that send bytes by the rawest means that a fabric stands on, and peers that send as
//! many back.
//!
//! Both are processes, as workers and servers are; there is a connection from every driver to every peer. A round is over when
//! all bytes are back in the driver's memory. Memory has been touched before the first round; nothing is checked during the
//! rounds and nothing computed.
//!
//! Invariant: every wait has a deadline, and no process started here outlives the one that started it.

mod messages;
mod shm;
mod tcp;
mod udp;
mod waiting;

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::fd::AsFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use clap::ValueEnum;
pub use messages::Flow;
use messages::Messages;
use nix::sys::{prctl, signal::Signal};
pub use udp::{DATAGRAM_GRAIN, DATAGRAM_MAX};
pub use waiting::Wait;
use waiting::{await_any, readable};

use super::{Figure, Measured, Pace};
use crate::{Error, Result};

/// Most bytes in each direction in a round: both sides keep all of them in memory.
pub const BYTES_MAX: u64 = 4 << 30;

/// By what means bytes go there and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Over {
    /// Loopback sockets.
    Tcp,
    /// A copy into memory that both processes map, and an eventfd to wake a sleeper.
    Shm,
    /// Loopback datagrams, many a system call.
    Udp,
}

impl Over {
    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Over::Tcp => "tcp",
            Over::Shm => "shm",
            Over::Udp => "udp",
        }
    }
}

/// How bytes come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// When all of a round's bytes are there: only one direction is busy at a time.
    Whole,
    /// Piece by piece: one piece comes back while the next is on its way.
    Pieces,
}

impl Form {
    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Form::Whole => "whole",
            Form::Pieces => "pieces",
        }
    }
}

/// An echo to be measured.
#[derive(Clone, Debug)]
pub struct Echo {
    /// The gradwire executable, which both sides run.
    pub executable: PathBuf,
    /// By what means.
    pub over: Over,
    /// Which directions carry the bytes.
    pub flow: Flow,
    /// What its processes do while they wait.
    pub wait: Wait,
    /// Bytes of a round of each driver, in each direction that carries them.
    pub bytes: u64,
    /// Bytes of a piece; peers share the pieces.
    pub piece: u64,
    /// Bytes of a datagram, over UDP.
    pub datagram: u64,
    /// Most messages to a peer that are not answered, in the form of pieces; at least 2 where rounds overlap.
    pub window: u64,
    /// Over shared memory: whether buffers rotate as a job's do, instead of being the same ones in every round.
    pub rotate: bool,
    /// Processes that send.
    pub drivers: u16,
    /// Processes that send back.
    pub peers: u16,
    /// How long.
    pub pace: Pace,
}

/// Kills a process that is not needed any more.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It has ended by itself, or does so now.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Helper {
    fn start(executable: &PathBuf, arguments: &[String]) -> Result<Helper> {
        let mut command = Command::new(executable);
        command.arg("bench").args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        command.spawn().map(Helper).map_err(|error| Error::os("execve", executable.display().to_string(), error))
    }

    /// The only line that it writes.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let out = self.0.stdout.take().ok_or_else(|| failed("was asked twice"))?;
        BufReader::new(out).read_line(&mut line).map_err(|error| Error::os("read", "an echo's output", error))?;
        if line.is_empty() { Err(failed("ended without a word")) } else { Ok(line.trim().into()) }
    }
}

fn failed(what: &str) -> Error {
    Error::JobFailed(format!("a process of the raw echo {what}"))
}

impl Echo {
    /// The forms in which this echo differs: bytes that fit into one piece come back whole either way, and datagrams come back
    /// one by one.
    pub fn forms(&self) -> &'static [Form] {
        match (self.over, self.bytes <= self.piece, self.peers) {
            (Over::Udp, _, _) if self.bytes > self.datagram => &[Form::Pieces],
            // Nothing is gained by waiting where only one direction is busy anyway.
            (Over::Tcp | Over::Shm, false, _) if self.flow != Flow::Both => &[Form::Pieces],
            (Over::Udp, _, _) | (_, true, _) => &[Form::Whole],
            (_, false, 1) => &[Form::Whole, Form::Pieces],
            // Several peers are written to at once.
            (_, false, _) => &[Form::Pieces],
        }
    }

    /// Runs it.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] if a process of it did not do its part.
    pub fn run(&self, form: Form) -> Result<Figure> {
        let how = ["--over", self.over.name(), "--wait", self.wait.name()].map(String::from);
        let flow = ["--flow", self.flow.name()].map(String::from);
        let mut peers = Vec::new();
        let mut arguments = vec!["echo-driver".to_string(), "--form".into(), form.name().into()];
        for share in self.shares().into_iter().filter(|share| *share > 0) {
            let mut peer = vec!["echo-peer".into(), "--callers".into(), self.drivers.to_string()];
            peer.extend(how.clone());
            let mut peer = Helper::start(&self.executable, &peer)?;
            arguments.extend(["--peer".into(), format!("{}:{share}", peer.line()?)]);
            peers.push(peer);
        }
        arguments.extend(how);
        arguments.extend(flow);
        arguments.extend(["--piece".into(), self.piece.to_string(), "--datagram".into(), self.datagram.to_string()]);
        arguments.extend(["--window".into(), self.window.to_string()]);
        arguments.extend(self.rotate.then(|| "--rotate".into()));
        arguments.extend(match self.pace {
            Pace::Rounds(rounds) => ["--rounds".into(), rounds.to_string()],
            Pace::Seconds(seconds) => ["--seconds".into(), seconds.to_string()],
        });
        let drivers = (0..self.drivers).map(|_| Helper::start(&self.executable, &arguments));
        let mut drivers = drivers.collect::<Result<Vec<Helper>>>()?;
        let mut parts = Vec::new();
        for driver in &mut drivers {
            let part: Vec<Measured> =
                serde_json::from_str(&driver.line()?).map_err(|_| failed("reported no figures"))?;
            parts.extend(part);
        }
        Ok(Figure::together(&parts))
    }

    /// Bytes of each peer, piece by piece in turn.
    fn shares(&self) -> Vec<u64> {
        let mut shares = vec![0; usize::from(self.peers)];
        let (mut left, mut next) = (self.bytes, 0);
        while left > 0 {
            let piece = left.min(self.piece.max(1));
            shares[next] += piece;
            left -= piece;
            next = (next + 1) % shares.len();
        }
        shares
    }
}

/// Ends this process when the one that started it ends: what peers and drivers do first.
///
/// # Errors
///
/// [`Error::Os`] if the kernel does not know how.
pub fn end_with_parent() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| Error::os("prctl(PR_SET_PDEATHSIG)", "an echo", error))
}

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::os(call, "the raw echo", error)
}

/// What a driver says first.
struct Hello {
    messages: Messages,
    rotate: bool,
}

impl Hello {
    const SIZE: usize = 18;

    fn encode(&self) -> [u8; Hello::SIZE] {
        let mut bytes = [0; Hello::SIZE];
        bytes[..8].copy_from_slice(&self.messages.bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.messages.piece.to_le_bytes());
        bytes[16] = self.messages.flow as u8;
        bytes[17] = self.rotate.into();
        bytes
    }

    fn read(mut stream: impl Read) -> Result<Hello> {
        let mut hello = [0; Hello::SIZE];
        stream.read_exact(&mut hello).map_err(io("recv"))?;
        let number = |at: usize| u64::from_le_bytes(hello[at..at + 8].try_into().expect("eight bytes"));
        let (bytes, piece, flow) = (number(0), number(8), Flow::ALL.get(usize::from(hello[16])));
        match flow {
            Some(flow) if bytes > 0 && bytes <= BYTES_MAX && piece > 0 => {
                Ok(Hello { messages: Messages { bytes, piece: piece.min(bytes), flow: *flow }, rotate: hello[17] != 0 })
            }
            _ => Err(Error::Config(format!("an echo of {bytes} bytes in pieces of {piece}"))),
        }
    }
}

/// A peer: says on standard output how it is called, then sends back what `callers` drivers send it, until they hang up.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed.
pub fn peer(over: Over, callers: u16, wait: Wait) -> Result<()> {
    match over {
        Over::Tcp => serve(tcp::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, tcp::answer),
        Over::Shm => serve(shm::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, shm::answer),
        Over::Udp => serve(tcp::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, udp::answer),
    }
}

/// A thread for each of the callers.
fn serve<L: AsFd, S: Send + 'static>(
    (listener, address): (L, String),
    accept: impl Fn(&L) -> std::io::Result<S>,
    callers: u16,
    wait: Wait,
    answer: fn(S, Wait) -> Result<()>,
) -> Result<()> {
    println!("{address}");
    std::io::stdout().flush().map_err(io("write"))?;
    let mut threads = Vec::new();
    for _ in 0..callers {
        await_any(&mut [readable(&listener)])?;
        let stream = accept(&listener).map_err(io("accept"))?;
        let thread = std::thread::Builder::new().name("echo".into()).spawn(move || answer(stream, wait));
        threads.push(thread.map_err(io("pthread_create"))?);
    }
    for thread in threads {
        thread.join().map_err(|_| failed("panicked"))??;
    }
    Ok(())
}

/// Memory whose pages are there.
fn touched(bytes: u64) -> Vec<u8> {
    pattern(bytes, 251)
}

/// Bytes that repeat after `period` of them.
fn pattern(bytes: u64, period: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i % period) as u8 + 1).collect()
}

/// What a driver does.
#[derive(Clone, Debug)]
pub struct Drive {
    /// By what means.
    pub over: Over,
    /// Which directions carry the bytes.
    pub flow: Flow,
    /// How each peer is called, and its bytes of a round.
    pub peers: Vec<(String, u64)>,
    /// Bytes of a piece.
    pub piece: u64,
    /// Bytes of a datagram.
    pub datagram: u64,
    /// Most messages to a peer that are not answered.
    pub window: u64,
    /// Whether buffers rotate.
    pub rotate: bool,
    /// How the bytes come back.
    pub form: Form,
    /// What it does while it waits.
    pub wait: Wait,
    /// How long.
    pub pace: Pace,
}

impl Drive {
    /// The messages of a round with a peer that has `bytes` of it.
    fn messages(&self, bytes: u64) -> Messages {
        let piece = match (self.over, self.form) {
            (Over::Udp, _) => self.datagram,
            (_, Form::Whole) => bytes,
            (_, Form::Pieces) => self.piece,
        };
        Messages { bytes, piece: piece.clamp(1, bytes.max(1)), flow: self.flow }
    }

    /// Bytes that count: of a round, in all directions that carry them.
    fn load(&self) -> u64 {
        self.flow.directions() * self.peers.iter().map(|(_, bytes)| bytes).sum::<u64>()
    }

    /// The messages that may be under way to one peer.
    fn window(&self, messages: &Messages) -> u64 {
        match self.form {
            Form::Whole if self.flow == Flow::There => 2,
            Form::Whole => 1,
            Form::Pieces => self.window.max(if messages.flow == Flow::There { 2 } else { 1 }),
        }
    }
}

/// A driver: sends each peer its messages, waits until all are answered (or, where only the way there carries bytes, until they
/// have left), and so on.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed; [`Error::JobFailed`] if other bytes came than ought to.
pub fn driver(drive: &Drive) -> Result<Measured> {
    match drive.over {
        _ if drive.flow == Flow::Line && drive.over != Over::Shm => {
            Err(Error::Config("--flow line goes with --over shm alone: only there a count goes by itself".into()))
        }
        Over::Tcp => tcp::drive(drive),
        Over::Shm => shm::drive(drive),
        Over::Udp => udp::drive(drive),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(over: Over, bytes: u64, piece: u64, peers: u16) -> Echo {
        Echo {
            executable: "none".into(),
            over,
            flow: Flow::Both,
            wait: Wait::Adaptive,
            bytes,
            piece,
            datagram: 2,
            window: 8,
            rotate: false,
            drivers: 1,
            peers,
            pace: Pace::Rounds(5),
        }
    }

    #[test]
    fn peers_share_the_pieces() {
        assert_eq!(echo(Over::Tcp, 10, 4, 2).shares(), [6, 4]);
        assert_eq!(echo(Over::Shm, 4, 4, 3).shares(), [4, 0, 0]);
        assert_eq!(echo(Over::Udp, 64, 4, 1).shares(), [64]);
    }

    #[test]
    fn one_piece_has_one_form() {
        assert_eq!(echo(Over::Tcp, 4, 4, 2).forms(), [Form::Whole]);
        assert_eq!(echo(Over::Shm, 8, 4, 1).forms(), [Form::Whole, Form::Pieces]);
        assert_eq!(echo(Over::Tcp, 8, 4, 2).forms(), [Form::Pieces]);
        assert_eq!(Echo { flow: Flow::Back, ..echo(Over::Tcp, 8, 4, 1) }.forms(), [Form::Pieces]);
        assert_eq!(echo(Over::Udp, 8, 16, 1).forms(), [Form::Pieces]);
        assert_eq!(echo(Over::Udp, 2, 16, 1).forms(), [Form::Whole]);
    }

    /// A peer's listener in this process, which answers one driver.
    fn answering(over: Over, wait: Wait) -> (String, std::thread::JoinHandle<Result<()>>) {
        match over {
            Over::Shm => {
                let (listener, name) = shm::listen().unwrap();
                (name, std::thread::spawn(move || shm::answer(listener.accept().unwrap().0, wait)))
            }
            _ => {
                let (listener, port) = tcp::listen().unwrap();
                let answer = if over == Over::Tcp { tcp::answer } else { udp::answer };
                (port, std::thread::spawn(move || answer(listener.accept().unwrap().0, wait)))
            }
        }
    }

    /// Every kind with every flow in every form with every policy, with one peer and with two: the ends themselves compare what
    /// came with what ought to come.
    #[test]
    fn what_is_sent_comes_back() {
        let shapes = [(Form::Whole, vec![3 << 20]), (Form::Pieces, vec![3 << 20, 100_032])];
        for over in [Over::Tcp, Over::Shm, Over::Udp] {
            for (flow, directions, wait) in [
                (Flow::Both, 2, Wait::Sleep),
                (Flow::Both, 2, Wait::Adaptive),
                (Flow::Both, 2, Wait::Spin),
                (Flow::There, 1, Wait::Adaptive),
                (Flow::Back, 1, Wait::Adaptive),
                (Flow::Back, 1, Wait::Sleep),
            ] {
                for (form, bytes) in shapes.clone() {
                    let (peers, threads) = call(over, wait, &bytes);
                    let drive = Drive {
                        over,
                        flow,
                        peers,
                        piece: 100_000,
                        datagram: 4096,
                        window: 3,
                        rotate: form == Form::Pieces,
                        form,
                        wait,
                        pace: Pace::Rounds(5),
                    };
                    let measured = driver(&drive).unwrap();
                    assert_eq!(measured.rounds, 5, "{drive:?}");
                    assert_eq!(measured.bytes, 5 * directions * bytes.iter().sum::<u64>(), "{drive:?}");
                    threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
                }
            }
        }
    }

    type Called = (Vec<(String, u64)>, Vec<std::thread::JoinHandle<Result<()>>>);

    fn call(over: Over, wait: Wait, bytes: &[u64]) -> Called {
        let (names, threads): (Vec<_>, Vec<_>) = bytes.iter().map(|_| answering(over, wait)).unzip();
        (names.into_iter().zip(bytes.iter().copied()).collect(), threads)
    }

    #[test]
    fn a_cache_line_goes_there_and_back_over_shared_memory_alone() {
        let (peers, threads) = call(Over::Shm, Wait::Adaptive, &[64]);
        let mut drive = Drive {
            over: Over::Shm,
            flow: Flow::Line,
            peers,
            piece: 64,
            datagram: 64,
            window: 1,
            rotate: false,
            form: Form::Whole,
            wait: Wait::Adaptive,
            pace: Pace::Rounds(100),
        };
        let measured = driver(&drive).unwrap();
        assert_eq!((measured.rounds, measured.bytes), (100, 0));
        threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        drive.over = Over::Tcp;
        assert!(driver(&drive).unwrap_err().to_string().contains("--over shm"));
    }
}
