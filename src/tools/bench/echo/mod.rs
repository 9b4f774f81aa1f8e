//! The ceiling of the benchmarks: drivers that send bytes by the rawest means that a fabric stands on, and peers that send as
//! many back.
//!
//! Both are processes, as workers and servers are; there is a connection from every driver to every peer. A round is over when
//! all bytes are back in the driver's memory. Memory has been touched before the first round; nothing is checked during the
//! rounds and nothing computed.
//!
//! Invariant: every wait has a deadline, and no process started here outlives the one that started it.

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
    /// What its processes do while they wait.
    pub wait: Wait,
    /// Bytes that each driver sends in a round.
    pub bytes: u64,
    /// Bytes of a piece; peers share the pieces.
    pub piece: u64,
    /// Bytes of a datagram, over UDP.
    pub datagram: u64,
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
        arguments.extend(["--piece".into(), self.piece.to_string(), "--datagram".into(), self.datagram.to_string()]);
        arguments.extend(match self.pace {
            Pace::Rounds(rounds) => ["--rounds".into(), rounds.to_string()],
            Pace::Seconds(seconds) => ["--seconds".into(), seconds.to_string()],
        });
        let drivers = (0..self.drivers).map(|_| Helper::start(&self.executable, &arguments));
        let mut drivers = drivers.collect::<Result<Vec<Helper>>>()?;
        let mut parts = Vec::new();
        for driver in &mut drivers {
            let part: Measured = serde_json::from_str(&driver.line()?).map_err(|_| failed("reported no figures"))?;
            parts.push(part);
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
    /// Bytes of a round.
    bytes: u64,
    /// Bytes of what comes back at once.
    piece: u64,
}

impl Hello {
    fn encode(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.bytes.to_le_bytes());
        bytes[8..].copy_from_slice(&self.piece.to_le_bytes());
        bytes
    }

    fn read(mut stream: impl Read) -> Result<Hello> {
        let mut hello = [0; 16];
        stream.read_exact(&mut hello).map_err(io("recv"))?;
        let number = |at: usize| u64::from_le_bytes(hello[at..at + 8].try_into().expect("eight bytes"));
        let (bytes, piece) = (number(0), number(8));
        if bytes == 0 || bytes > BYTES_MAX || piece == 0 {
            return Err(Error::Config(format!("an echo of {bytes} bytes in pieces of {piece}")));
        }
        Ok(Hello { bytes, piece })
    }
}

/// A peer: says on standard output how it is called, then sends back what `callers` drivers send it, until they hang up.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed.
pub fn peer(over: Over, callers: u16, wait: Wait) -> Result<()> {
    match over {
        Over::Tcp => serve(tcp::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, tcp::send_back),
        Over::Shm => serve(shm::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, shm::answer),
        Over::Udp => serve(tcp::listen()?, |listener| Ok(listener.accept()?.0), callers, wait, udp::send_back),
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
    /// How each peer is called, and its bytes of a round.
    pub peers: Vec<(String, u64)>,
    /// Bytes of a piece.
    pub piece: u64,
    /// Bytes of a datagram.
    pub datagram: u64,
    /// How the bytes come back.
    pub form: Form,
    /// What it does while it waits.
    pub wait: Wait,
    /// How long.
    pub pace: Pace,
}

/// A driver: sends each peer its bytes, waits until as many are back, and so on.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed; [`Error::JobFailed`] if other bytes came back than ought to.
pub fn driver(drive: &Drive) -> Result<Measured> {
    let Drive { over, peers, piece, datagram, form, wait, pace } = drive;
    match over {
        Over::Tcp => tcp::drive(peers, *piece, *form, *wait, *pace),
        Over::Shm => shm::drive(peers, *piece, *form, *wait, *pace),
        Over::Udp => udp::drive(peers, *datagram, *wait, *pace),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(over: Over, bytes: u64, piece: u64, peers: u16) -> Echo {
        let (wait, datagram, pace) = (Wait::Adaptive, 2, Pace::Rounds(5));
        Echo { executable: "none".into(), over, wait, bytes, piece, datagram, drivers: 1, peers, pace }
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
                let answer = if over == Over::Tcp { tcp::send_back } else { udp::send_back };
                (port, std::thread::spawn(move || answer(listener.accept().unwrap().0, wait)))
            }
        }
    }

    /// Every kind in every form with every policy, with one peer and with two: the ends themselves compare what came with what
    /// ought to come.
    #[test]
    fn what_is_sent_comes_back() {
        for over in [Over::Tcp, Over::Shm, Over::Udp] {
            for wait in [Wait::Sleep, Wait::Adaptive, Wait::Spin] {
                for (form, bytes) in [(Form::Whole, vec![3 << 20]), (Form::Pieces, vec![3 << 20, 100_032])] {
                    let (names, threads): (Vec<_>, Vec<_>) = bytes.iter().map(|_| answering(over, wait)).unzip();
                    let peers = names.into_iter().zip(bytes).collect();
                    let drive =
                        Drive { over, peers, piece: 1 << 20, datagram: 4096, form, wait, pace: Pace::Rounds(5) };
                    let measured = driver(&drive).unwrap();
                    assert_eq!(measured.rounds, 5);
                    assert_eq!(measured.bytes, drive.peers.iter().map(|(_, bytes)| bytes).sum::<u64>());
                    threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
                }
            }
        }
    }
}
