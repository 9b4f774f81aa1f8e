//! A wire between ranks that can damage what it carries: the callers are in a network namespace of their own, in which this process
//! listens at the addresses of the others; what is said to it there it says to them here, and back.
//!
//! Nothing in the product knows of it. It reads frames as docs/wire.md has them, so that it can tell a payload from a header.
//!
//! Invariant: what counts as damaged is one bit of one payload that was on its way; a connection is damaged once, unless the wire is
//! told to go on, so that nothing that was damaged is lost with a path that is being given up already.

use std::{
    io::{ErrorKind, Read, Result, Write},
    net::{Shutdown, TcpListener, TcpStream},
    ops::Range,
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use gradwire::{
    transport::sim::SimRandom,
    types::Clock,
    wire::{FrameHeader, NoteKind},
};
use nix::sched::{CloneFlags, setns};

/// Bytes with which every message of the handshake begins.
const PREFIX: usize = 8;

/// What is to be damaged.
#[derive(Clone, Debug)]
pub struct Damage {
    /// How many payloads.
    pub count: usize,
    /// One in so many.
    pub one_in: u64,
    /// Only of these kinds.
    pub kinds: &'static [NoteKind],
    /// Of these clocks; what is of a later one is held back until [`Wire::let_go`].
    pub clocks: Range<Clock>,
    /// Connections are damaged again and again: nobody is expected to give one up.
    pub goes_on: bool,
    pub seed: u64,
}

struct Shared {
    damage: Damage,
    random: Mutex<SimRandom>,
    /// A line for each payload that was damaged.
    told: Mutex<Vec<String>>,
    lets_go: AtomicBool,
    over: AtomicBool,
}

/// The wire and the namespace in which its callers live; both are gone when it is dropped.
pub struct Wire {
    namespace: String,
    shared: Arc<Shared>,
}

/// One connection across the wire.
struct Connection {
    shared: Arc<Shared>,
    /// The two ends, once the caller has said who it is.
    ends: OnceLock<String>,
    is_damaged: AtomicBool,
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).output().is_ok_and(|output| output.status.success())
}

impl Wire {
    /// A namespace without anything in it; `None`, and a line that says so, where none can be made.
    pub fn new(damage: Damage) -> Option<Wire> {
        let namespace = format!("gw-w-{}-{}", std::process::id(), damage.seed);
        if !nix::unistd::geteuid().is_root() || !ip(&["netns", "add", &namespace]) {
            assert!(std::env::var_os("CI").is_none(), "CI must be able to make network namespaces");
            println!("NOT RUN: network namespaces need root and iproute2");
            return None;
        }
        assert!(ip(&["-n", &namespace, "link", "set", "lo", "up"]));
        let random = Mutex::new(SimRandom::new(damage.seed));
        let (lets_go, over) = (AtomicBool::new(false), AtomicBool::new(false));
        Some(Wire { namespace, shared: Arc::new(Shared { damage, random, told: Mutex::default(), lets_go, over }) })
    }

    /// A program that runs at the callers' end.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// Carries what is said to a port at the callers' end to the same port here.
    pub fn carry(&self, port: u16) {
        let (path, shared) = (format!("/run/netns/{}", self.namespace), self.shared.clone());
        let bound = std::thread::spawn(move || {
            let namespace = std::fs::File::open(path).unwrap();
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            TcpListener::bind(("127.0.0.1", port)).unwrap()
        });
        let listener = bound.join().unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            while !shared.over.load(SeqCst) {
                match listener.accept() {
                    Ok((caller, _)) => join(caller, port, shared.clone()),
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
    }

    /// What has been damaged, a line each.
    pub fn damaged(&self) -> Vec<String> {
        self.shared.told.lock().unwrap().clone()
    }

    /// From here on everything may pass.
    pub fn let_go(&self) {
        self.shared.lets_go.store(true, SeqCst);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.let_go();
        self.shared.over.store(true, SeqCst);
        ip(&["netns", "del", &self.namespace]);
    }
}

/// Joins a caller to whoever listens at the port on this side; nobody: the caller is hung up on.
fn join(caller: TcpStream, port: u16, shared: Arc<Shared>) {
    let Ok(called) = TcpStream::connect(("127.0.0.1", port)) else { return };
    caller.set_nonblocking(false).unwrap();
    let connection = Arc::new(Connection { shared, ends: OnceLock::new(), is_damaged: AtomicBool::new(false) });
    for (from, to) in [(&caller, &called), (&called, &caller)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let connection = connection.clone();
        to.set_nodelay(true).unwrap();
        std::thread::spawn(move || {
            let _ = connection.pass(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
            let _ = from.shutdown(Shutdown::Both);
        });
    }
}

impl Connection {
    /// Passes on one direction: a handshake of ranks and their frames, or whatever else it is as it comes.
    fn pass(&self, from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
        loop {
            let mut prefix = [0; PREFIX];
            from.read_exact(&mut prefix)?;
            to.write_all(&prefix)?;
            let (length, frames_follow) = match (&prefix[..4], prefix[6]) {
                (b"GRWR", 1) => (32, false),
                (b"GRWR", 2) => (96, true),
                (b"GRWR", 3) => (32, true),
                (b"GRWR", _) => (0, false),
                _ => return std::io::copy(from, to).map(drop),
            };
            let mut rest = vec![0; length];
            from.read_exact(&mut rest)?;
            to.write_all(&rest)?;
            if prefix[6] == 2 {
                let _ = self.ends.set(format!("{} and {}", name(&rest[8..16]), name(&rest[16..24])));
            }
            if frames_follow {
                return self.pass_frames(from, to);
            }
        }
    }

    fn pass_frames(&self, from: &mut TcpStream, to: &mut TcpStream) -> Result<()> {
        let mut payload = Vec::new();
        loop {
            let mut header = [0; FrameHeader::SIZE];
            from.read_exact(&mut header)?;
            let frame = FrameHeader::decode(&header)
                .map_err(|error| std::io::Error::new(ErrorKind::InvalidData, error.to_string()))?;
            payload.resize(frame.payload_bytes(), 0);
            from.read_exact(&mut payload)?;
            while frame.note.kind == NoteKind::Push
                && frame.note.clock >= self.shared.damage.clocks.end
                && !self.shared.lets_go.load(SeqCst)
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.damage(&frame, &mut payload);
            to.write_all(&header)?;
            to.write_all(&payload)?;
        }
    }

    /// Flips a bit of a payload, if it is this one's turn.
    fn damage(&self, frame: &FrameHeader, payload: &mut [u8]) {
        let (damage, note) = (&self.shared.damage, &frame.note);
        if payload.is_empty() || !damage.kinds.contains(&note.kind) || !damage.clocks.contains(&note.clock) {
            return;
        }
        // Both directions stand in line here.
        let mut told = self.shared.told.lock().unwrap();
        let mut random = self.shared.random.lock().unwrap();
        let is_spared = !damage.goes_on && self.is_damaged.load(SeqCst);
        if told.len() >= damage.count || is_spared || !random.once_in(damage.one_in) {
            return;
        }
        self.is_damaged.store(true, SeqCst);
        let bit = random.below(8 * payload.len() as u64) as usize;
        payload[bit / 8] ^= 1 << (bit % 8);
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let (what, ends) =
            (if note.kind == NoteKind::Push { "gradient" } else { "parameters" }, self.ends.get().unwrap());
        told.push(format!(
            "{at:.3}: bit {bit} of {} bytes between {ends}: {what} of chunk {} at clock {}",
            payload.len(),
            note.chunk.0,
            note.clock
        ));
    }
}

/// A peer as a hello has it.
fn name(bytes: &[u8]) -> String {
    let role = if bytes[4] == 1 { "worker" } else { "server" };
    format!("{role} {}", u16::from_le_bytes([bytes[2], bytes[3]]))
}
