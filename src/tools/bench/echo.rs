//! The ceiling of the socket benchmarks: drivers that send bytes over plain loopback sockets, and peers that send them back.
//!
//! Both are processes, as workers and servers are; there is a socket from every driver to every peer. A round is over when all
//! bytes are back in the driver's memory. Sockets sleep in the kernel as the job's do, have TCP_NODELAY and the kernel's own
//! buffer sizes; memory has been touched before the first round. Nothing is checked and nothing is computed.
//!
//! Invariant: every wait has a deadline, and no process started here outlives the one that started it.

use std::{
    io::{BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{prctl, signal::Signal},
};

use super::{Figure, Measured, Pace};
use crate::{Error, Result};

/// How long anybody waits for the other side.
const WAIT_TIME: Duration = Duration::from_secs(60);

/// Most bytes in each direction in a round: both sides keep all of them in memory.
pub const BYTES_MAX: u64 = 4 << 30;

/// How bytes come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// Bytes that each driver sends in a round.
    pub bytes: u64,
    /// Bytes of a piece; peers share the pieces.
    pub piece: u64,
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
    /// The forms in which this echo differs: bytes that fit into one piece come back whole either way.
    pub fn forms(&self) -> &'static [Form] {
        match (self.bytes <= self.piece, self.peers) {
            (true, _) => &[Form::Whole],
            (false, 1) => &[Form::Whole, Form::Pieces],
            // Several peers are written to at once.
            (false, _) => &[Form::Pieces],
        }
    }

    /// Runs it.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] if a process of it did not do its part.
    pub fn run(&self, form: Form) -> Result<Figure> {
        let shares = self.shares();
        let mut peers = Vec::new();
        let mut arguments = vec!["echo-driver".to_string(), "--form".into(), form.name().into()];
        for share in shares.iter().filter(|share| **share > 0) {
            let mut peer =
                Helper::start(&self.executable, &["echo-peer".into(), "--callers".into(), self.drivers.to_string()])?;
            arguments.extend(["--peer".into(), format!("{}:{share}", peer.line()?)]);
            peers.push(peer);
        }
        arguments.extend(["--piece".into(), self.piece.to_string()]);
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

fn prepare(stream: &TcpStream) -> Result<()> {
    let both = stream.set_read_timeout(Some(WAIT_TIME)).and_then(|()| stream.set_write_timeout(Some(WAIT_TIME)));
    both.and_then(|()| stream.set_nodelay(true)).map_err(io("setsockopt"))
}

/// A peer: says on standard output which port it has, then sends back what `callers` drivers send it, until they hang up.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed.
pub fn peer(callers: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io("bind"))?;
    println!("{}", listener.local_addr().map_err(io("getsockname"))?.port());
    std::io::stdout().flush().map_err(io("write"))?;
    let mut lines = Vec::new();
    for _ in 0..callers {
        await_any(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)])?;
        let (stream, _) = listener.accept().map_err(io("accept"))?;
        let line = std::thread::Builder::new().name("echo".into()).spawn(move || send_back(stream));
        lines.push(line.map_err(io("pthread_create"))?);
    }
    for line in lines {
        line.join().map_err(|_| failed("panicked"))??;
    }
    Ok(())
}

/// One driver's bytes, until it hangs up. It says first how many there are in a round, and in which pieces they go back.
fn send_back(mut stream: TcpStream) -> Result<()> {
    prepare(&stream)?;
    let mut hello = [0; 16];
    stream.read_exact(&mut hello).map_err(io("recv"))?;
    let number = |at: usize| u64::from_le_bytes(hello[at..at + 8].try_into().expect("eight bytes"));
    let (bytes, piece) = (number(0), number(8));
    if bytes == 0 || bytes > BYTES_MAX || piece == 0 {
        return Err(Error::Config(format!("an echo of {bytes} bytes in pieces of {piece}")));
    }
    let mut memory = touched(bytes);
    loop {
        for part in memory.chunks_mut(piece.min(bytes) as usize) {
            let first = stream.read(part).map_err(io("recv"))?;
            if first == 0 {
                return Ok(());
            }
            stream.read_exact(&mut part[first..]).map_err(io("recv"))?;
            stream.write_all(part).map_err(io("send"))?;
        }
    }
}

/// Memory whose pages are there.
fn touched(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i % 251) as u8 + 1).collect()
}

/// A driver's end of one connection.
struct Line {
    stream: TcpStream,
    source: Vec<u8>,
    target: Vec<u8>,
    sent: usize,
    received: usize,
}

/// A driver: sends `bytes` to each of the peers (port, bytes), waits until all are back, and so on.
///
/// # Errors
///
/// [`Error::Os`] naming the call that failed; [`Error::JobFailed`] if other bytes came back than were sent.
pub fn driver(peers: &[(u16, u64)], piece: u64, form: Form, pace: Pace) -> Result<Measured> {
    let mut lines = Vec::new();
    for (port, bytes) in peers {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
        let mut stream = TcpStream::connect_timeout(&address, WAIT_TIME).map_err(io("connect"))?;
        prepare(&stream)?;
        let piece = if form == Form::Whole { *bytes } else { piece };
        stream.write_all(&[bytes.to_le_bytes(), piece.to_le_bytes()].concat()).map_err(io("send"))?;
        lines.push(Line { stream, source: touched(*bytes), target: touched(*bytes), sent: 0, received: 0 });
    }
    lines.iter_mut().for_each(|line| line.target.fill(0));
    let total = peers.iter().map(|(_, bytes)| bytes).sum();
    let measured = match (lines.as_mut_slice(), form) {
        ([line], Form::Whole) => Measured::take(total, pace, || line.whole())?,
        (lines, _) => {
            for line in lines.iter() {
                line.stream.set_nonblocking(true).map_err(io("fcntl"))?;
            }
            Measured::take(total, pace, || both_ways(lines))?
        }
    };
    match lines.iter().all(|line| line.source == line.target) {
        true => Ok(measured),
        false => Err(failed("sent back other bytes than it got")),
    }
}

impl Line {
    fn whole(&mut self) -> Result<()> {
        self.stream.write_all(&self.source).map_err(io("send"))?;
        self.stream.read_exact(&mut self.target).map_err(io("recv"))
    }

    fn is_done(&self) -> bool {
        self.received == self.target.len()
    }

    /// Does what can be done now; says whether that was anything.
    fn advance(&mut self) -> Result<bool> {
        let received = match self.target.get_mut(self.received..).filter(|rest| !rest.is_empty()) {
            Some(rest) => moved("recv", self.stream.read(rest))?,
            None => 0,
        };
        let sent = match self.source.get(self.sent..).filter(|rest| !rest.is_empty()) {
            Some(rest) => moved("send", self.stream.write(rest))?,
            None => 0,
        };
        self.received += received;
        self.sent += sent;
        Ok(received + sent > 0)
    }
}

fn moved(call: &'static str, result: std::io::Result<usize>) -> Result<usize> {
    match result {
        Ok(0) => Err(failed("hung up")),
        Ok(count) => Ok(count),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(error) => Err(io(call)(error)),
    }
}

/// A round in which sending and receiving overlap.
fn both_ways(lines: &mut [Line]) -> Result<()> {
    for line in lines.iter_mut() {
        (line.sent, line.received) = (0, 0);
    }
    while !lines.iter().all(Line::is_done) {
        let mut moved = false;
        for line in lines.iter_mut() {
            moved |= line.advance()?;
        }
        if !moved {
            let wants = |line: &Line| match line.sent == line.source.len() {
                true => PollFlags::POLLIN,
                false => PollFlags::POLLIN | PollFlags::POLLOUT,
            };
            let open = lines.iter().filter(|line| !line.is_done());
            let mut fds: Vec<PollFd<'_>> = open.map(|line| PollFd::new(line.stream.as_fd(), wants(line))).collect();
            await_any(&mut fds)?;
        }
    }
    Ok(())
}

fn await_any(fds: &mut [PollFd<'_>]) -> Result<()> {
    let timeout = PollTimeout::try_from(WAIT_TIME).unwrap_or(PollTimeout::MAX);
    match poll(fds, timeout) {
        Ok(0) => Err(failed("was waited for in vain")),
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(Error::os("poll", "the raw echo", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(bytes: u64, piece: u64, peers: u16) -> Echo {
        Echo { executable: "none".into(), bytes, piece, drivers: 1, peers, pace: Pace::Rounds(5) }
    }

    #[test]
    fn peers_share_the_pieces() {
        assert_eq!(echo(10, 4, 2).shares(), [6, 4]);
        assert_eq!(echo(4, 4, 3).shares(), [4, 0, 0]);
        assert_eq!(echo(64, 4, 1).shares(), [64]);
    }

    #[test]
    fn one_piece_has_one_form() {
        assert_eq!(echo(4, 4, 2).forms(), [Form::Whole]);
        assert_eq!(echo(8, 4, 1).forms(), [Form::Whole, Form::Pieces]);
        assert_eq!(echo(8, 4, 2).forms(), [Form::Pieces]);
    }

    /// Both forms over real sockets: `driver` itself compares what came back with what it sent.
    #[test]
    fn what_is_sent_comes_back() {
        for (form, bytes) in [(Form::Whole, vec![3 << 20]), (Form::Pieces, vec![3 << 20, 100_000])] {
            let listeners: Vec<_> =
                bytes.iter().map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
            let ports = listeners.iter().map(|listener| listener.local_addr().unwrap().port());
            let peers: Vec<(u16, u64)> = ports.zip(bytes).collect();
            let threads: Vec<_> = listeners
                .into_iter()
                .map(|listener| std::thread::spawn(move || send_back(listener.accept().unwrap().0)))
                .collect();
            let measured = driver(&peers, 1 << 20, form, Pace::Rounds(5)).unwrap();
            assert_eq!(measured.rounds, 5);
            assert_eq!(measured.bytes, peers.iter().map(|(_, bytes)| bytes).sum::<u64>());
            threads.into_iter().for_each(|thread| thread.join().unwrap().unwrap());
        }
    }
}
