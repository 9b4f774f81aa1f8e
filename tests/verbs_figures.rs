//! What the verbs transport reaches between two processes, to be set beside perftest's figures: run by `scripts/bench-rdma`; alone
//! this program says that it does nothing.
//!
//! `VERBS_FIGURES` says what is measured: `poll`, half of the time that a note takes there and back, where both ends look without
//! pause (as `ib_send_lat`); `sleep`, likewise, where both sleep until the device wakes them (`ib_send_lat -e`); `rate`, writes of
//! 1 MiB, each with its note, in one direction (`ib_write_bw`). `VERBS_DEVICES` names the two devices, the measuring one first.
//!
//! Invariant: the figure is one line of output, and every wait has a deadline.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Lease, Region, RegionOptions, SharedLease},
    transport::{
        Completion, Endpoint, RemoteSlot, Transport, Waiter, WorkRequest,
        verbs::{VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};

const MEASURING: PeerId = PeerId::worker(0);
const ANSWERING: PeerId = PeerId::server(0, 0);

/// Notes there and back; the first tenth is not counted.
const ROUNDS: usize = 500;

/// Writes; the first tenth is not counted.
const WRITES: u64 = 100;
const WRITE_BYTES: u32 = 1 << 20;
/// Writes under way, and slots at the peer.
const SLOTS: u64 = 16;

const LOOKS_A_CLOCK: u64 = 1024;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// One end of the path.
struct End {
    transport: VerbsTransport,
    peer: PeerId,
    waiter: Option<Waiter>,
    heard: Vec<Completion>,
    is_connected: bool,
    /// Notes that have come and were not asked for, and the slots that they fill.
    arrived: usize,
    slots: VecDeque<Lease>,
    looks: u64,
    now: Instant,
}

impl End {
    fn open(me: PeerId, peer: PeerId, device: &str, sleeps: bool) -> End {
        let identity = Identity { job: job_id("figures", ""), token: JobToken::random().unwrap(), me, epoch: 0 };
        let options = VerbsOptions { hca: vec![device.parse().unwrap()], ..VerbsOptions::new(identity) };
        let transport = VerbsTransport::new(options).unwrap();
        let waiter = sleeps.then(|| Waiter::new().unwrap());
        End {
            transport,
            peer,
            waiter,
            heard: Vec::new(),
            is_connected: false,
            arrived: 0,
            slots: VecDeque::new(),
            looks: 0,
            now: Instant::now(),
        }
    }

    fn connect(&mut self, address: &str) {
        self.transport.connect(self.peer, &Endpoint::new("verbs", address), Instant::now() + PATIENCE).unwrap();
        self.look_until(|end| end.is_connected);
    }

    /// Looks until that is so. The clock is read once in many looks: perftest reads none while it looks, and where the clock is no
    /// register of the processor (in the virtual machine) reading it takes longer than looking.
    fn look_until(&mut self, is_over: impl Fn(&End) -> bool) {
        let deadline = self.now + PATIENCE;
        while !is_over(self) {
            self.looks += 1;
            self.transport.poll(self.now, &mut self.heard).unwrap();
            let slept = self.waiter.as_ref().filter(|_| self.heard.is_empty());
            if let Some(waiter) = slept {
                waiter.wait_from(self.now, &mut [&mut self.transport], Some(deadline)).unwrap();
            }
            if slept.is_some() || self.looks.is_multiple_of(LOOKS_A_CLOCK) {
                self.now = Instant::now();
                assert!(self.now < deadline, "nothing came for {PATIENCE:?}");
            }
            for completion in self.heard.drain(..) {
                match completion {
                    Completion::Arrived { lease, .. } => {
                        self.arrived += 1;
                        self.slots.extend(lease);
                    }
                    Completion::Connected { .. } => self.is_connected = true,
                    Completion::Broken { error, .. } | Completion::Failed { error, .. } => panic!("{error}"),
                    Completion::Sent { .. } | Completion::Released { .. } => {}
                }
            }
        }
    }

    /// Waits for the next note.
    fn arrival(&mut self) {
        self.look_until(|end| end.arrived > 0);
        self.arrived -= 1;
    }

    fn note(&mut self) {
        let note = Note::new(NoteKind::Credit);
        self.transport.post(WorkRequest { id: 0, peer: self.peer, note, payload: None }).unwrap();
        self.transport.flush().unwrap();
    }
}

fn memory(end: &mut End) -> (Lease, u32) {
    let options = RegionOptions { prefault: true, ..RegionOptions::default() };
    let (region, lease) = Region::allocate(SLOTS as usize * WRITE_BYTES as usize, &options).unwrap();
    (lease, end.transport.register(&region).unwrap().rkey("verbs"))
}

/// Counts of the processor's own clock, as perftest reads it: the system's may be far away (in the virtual machine a reading of it
/// takes 1.7 us), and is read once before and once after.
fn cycles() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the counter.
    return unsafe { std::arch::x86_64::_rdtsc() };
    #[cfg(not(target_arch = "x86_64"))]
    return std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
}

fn half_round_trip_us(end: &mut End) -> f64 {
    let mut times: Vec<u64> = Vec::with_capacity(ROUNDS);
    let (begun, first) = (Instant::now(), cycles());
    for _ in 0..ROUNDS {
        let posted = cycles();
        end.note();
        end.arrival();
        times.push(cycles() - posted);
    }
    let us_a_cycle = begun.elapsed().as_secs_f64() * 1e6 / (cycles() - first) as f64;
    let counted = &mut times[ROUNDS / 10..];
    counted.sort_unstable();
    counted[counted.len() / 2] as f64 * us_a_cycle / 2.0
}

fn mib_per_s(end: &mut End, rkey: u32, source: &SharedLease) -> f64 {
    let (mut posted, mut answered, mut begun) = (0, 0, Instant::now());
    while answered < WRITES {
        while posted < WRITES && posted - answered < SLOTS {
            let offset = posted % SLOTS * u64::from(WRITE_BYTES);
            let slot = RemoteSlot { rkey, offset, len: WRITE_BYTES };
            let note = Note { clock: posted, length: WRITE_BYTES, weight: 1, ..Note::new(NoteKind::Push) };
            let payload = Some((source.clone(), slot));
            end.transport.post(WorkRequest { id: posted, peer: end.peer, note, payload }).unwrap();
            posted += 1;
        }
        end.transport.flush().unwrap();
        end.arrival();
        answered += 1;
        if answered == WRITES / 10 {
            begun = Instant::now();
        }
    }
    (WRITES - WRITES / 10) as f64 / begun.elapsed().as_secs_f64()
}

/// Not a test: the end that answers. Started by the runner it does nothing.
#[test]
fn answering_process() {
    let Ok(measured) = std::env::var("VERBS_FIGURES_ANSWER") else { return };
    // perftest's server has nothing to look at while it is written to: here it sleeps then.
    let mut end = End::open(ANSWERING, MEASURING, &devices()[1], measured != "poll");
    let (lease, rkey) = memory(&mut end);
    let offered = end.transport.offer(MEASURING).unwrap();
    println!("\nADDRESS {} {rkey}", offered.on("verbs").unwrap());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    end.connect(line.trim());
    if measured != "rate" {
        for _ in 0..ROUNDS {
            end.arrival();
            end.note();
        }
    } else {
        for slot in lease.chunks(WRITE_BYTES as usize) {
            end.transport.arm(MEASURING, slot).unwrap();
        }
        end.note();
        for _ in 0..WRITES {
            end.arrival();
            let lease = end.slots.pop_front().expect("a write fills a slot");
            end.transport.arm(MEASURING, lease).unwrap();
            end.note();
        }
    }
    // The other end hangs up when it has all it wants.
    std::io::stdin().read_line(&mut line).unwrap();
}

fn devices() -> [String; 2] {
    let text = std::env::var("VERBS_DEVICES").expect("VERBS_DEVICES, as in rxe1,rxe0");
    let (first, second) = text.split_once(',').expect("two devices with a comma between");
    [first.into(), second.into()]
}

fn start(measured: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "answering_process", "--nocapture", "--test-threads=1"])
        .env("VERBS_FIGURES_ANSWER", measured)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn figures() {
    let Ok(measured) = std::env::var("VERBS_FIGURES") else {
        println!("NOT RUN: scripts/bench-rdma runs this beside perftest");
        return;
    };
    let mut end = End::open(MEASURING, ANSWERING, &devices()[0], measured == "sleep");
    let mut child = start(&measured);
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = said.by_ref().find_map(|line| Some(line.strip_prefix("ADDRESS ")?.to_string())).expect("an address");
    let (theirs, rkey) = line.rsplit_once(' ').unwrap();
    let ours = end.transport.offer(ANSWERING).unwrap();
    writeln!(child.stdin.as_mut().unwrap(), "{}", ours.on("verbs").unwrap()).unwrap();
    end.connect(theirs);
    let figure = match measured.as_str() {
        "poll" | "sleep" => half_round_trip_us(&mut end),
        "rate" => {
            let (lease, _) = memory(&mut end);
            end.arrival();
            mib_per_s(&mut end, rkey.parse().unwrap(), &lease.freeze())
        }
        other => panic!("VERBS_FIGURES is `{other}`; it must be poll, sleep or rate"),
    };
    println!("\nFIGURE {measured} {figure:.2}");
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}
