//! The contract on verbs, where there is an RDMA device (the kernel's soft-RDMA is one), and what is verbs' own.
//!
//! Without a device every test says so and passes; where `GRADWIRE_TEST_RDMA` is set it fails instead.
//!
//! Invariant: both ends of every path are on this machine.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
    sync::{OnceLock, RwLockReadGuard},
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Locking, Region, RegionOptions},
    transport::{
        Armed, Completion, Driver, Endpoint, RemoteSlot, Transport, Waiter, Wakeup, Woken,
        verbs::{VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{JobToken, Note, NoteKind, handshake::Identity, job_id},
};

use crate::world::{Fabric, World, fill, note, write};

pub fn options(me: PeerId) -> VerbsOptions {
    let identity = Identity { job: job_id("contract", "1"), token: JobToken::random().unwrap(), me, epoch: 0 };
    VerbsOptions::new(identity).with_environment(|name| std::env::var(name).ok()).unwrap()
}

/// Whether this machine can run these tests; says so if not.
pub fn is_there() -> bool {
    static ABSENCE: OnceLock<Option<String>> = OnceLock::new();
    let look = || VerbsTransport::new(options(PeerId::worker(0))).err().map(|error| error.to_string());
    let Some(absence) = ABSENCE.get_or_init(look) else { return true };
    assert!(std::env::var_os("GRADWIRE_TEST_RDMA").is_none(), "GRADWIRE_TEST_RDMA is set: {absence}");
    eprintln!("SKIPPED, verbs is NOT tested here: {absence}");
    false
}

pub struct Verbs {
    spoil: fn(&mut VerbsOptions),
    /// Held as long as the ends are used.
    _guard: Option<RwLockReadGuard<'static, ()>>,
}

impl Verbs {
    fn new() -> Verbs {
        Verbs::spoilt(|options| options.queue_limit = 512)
    }

    pub fn spoilt(spoil: fn(&mut VerbsOptions)) -> Verbs {
        Verbs { spoil, _guard: None }
    }

    pub fn guarded(spoil: fn(&mut VerbsOptions), guard: RwLockReadGuard<'static, ()>) -> Verbs {
        Verbs { spoil, _guard: Some(guard) }
    }
}

impl Fabric for Verbs {
    type End = VerbsTransport;
    const OWNER_PLACES_BYTES: bool = false;

    fn ends(&mut self, peers: &[PeerId]) -> Vec<VerbsTransport> {
        let ends = peers.iter().map(|peer| {
            let mut options = options(*peer);
            (self.spoil)(&mut options);
            VerbsTransport::new(options).unwrap()
        });
        ends.collect()
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn step(&mut self) {
        std::thread::yield_now();
    }
}

mod default {
    contract!(
        super::Verbs::new(),
        if !super::is_there() {
            return;
        }
    );
}

mod short_queues {
    // A ring of four notes and a send queue of sixteen requests: credits and room run out all the time.
    const SPOIL: fn(&mut super::VerbsOptions) = |options| {
        (options.ring_entries, options.send_depth, options.queue_limit) = (4, 16, 64);
    };
    contract!(
        super::Verbs::spoilt(SPOIL),
        if !super::is_there() {
            return;
        }
    );
}

#[test]
fn a_sleeper_is_woken_by_the_device() {
    if !is_there() {
        return;
    }
    let mut world = World::joined(Verbs::new(), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let waiter = Waiter::new().unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    let mut sender = world.sides[0].transport.take().unwrap();
    for turn in 0..10 {
        // Whatever was left of the turn before is taken up, until there is nothing to do.
        while world.sides[1].transport().arm_wakeup().unwrap() == Armed::Ready {
            world.step();
        }
        let other = std::thread::spawn(move || {
            // So that the other end sleeps, most likely, when the note comes: one that is there before is found by looking.
            std::thread::sleep(Duration::from_millis(20));
            sender.post(note(turn, b, Note { clock: turn, ..Note::new(NoteKind::Absent) })).unwrap();
            sender.flush().unwrap();
            let mut heard = Vec::new();
            while heard.is_empty() && Instant::now() < limit {
                sender.poll(Instant::now(), &mut heard).unwrap();
                std::thread::yield_now();
            }
            assert!(matches!(heard[..], [Completion::Sent { .. }]), "{heard:?}");
            sender
        });
        while world.sides[1].arrived() == 0 {
            assert!(Instant::now() < limit, "a note was slept through");
            // The driver's own deadline, for looking after silent paths, may come between.
            let woken = waiter.wait(&mut [world.sides[1].transport()], Some(limit)).unwrap();
            world.step_side(1);
            assert!(woken == Woken::Event || world.sides[1].arrived() == 0, "the device woke nobody");
        }
        assert_eq!(world.sides[1].arrivals(a).len(), 1);
        sender = other.join().unwrap();
    }
}

#[test]
fn a_wrong_key_breaks_both_ends_by_name_and_in_words() {
    if !is_there() {
        return;
    }
    let mut world = World::joined(Verbs::new(), 3, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let wrong = RemoteSlot { rkey: world.rkey(0, 1) ^ 0x55, offset: 0, len: 4096 };
    let source = world.sides[1].cut(64).freeze();
    world.sides[1].post(write(1, a, source, wrong));
    world.until("both ends to break", |w| w.sides[0].broken_by(b).is_some() && w.sides[1].broken_by(a).is_some());
    let told = world.sides[1].broken_by(a).unwrap();
    assert!(told.contains("server 0") && told.contains("status 10") && told.contains("key or the range"), "{told}");
    let told = world.sides[0].broken_by(b).unwrap();
    assert!(told.contains("worker 0"), "{told}");
    eprintln!("the receiver was told: {told}");
    world.assert_works(0, 2);
}

#[test]
fn notes_wait_for_a_receiver_that_does_not_look() {
    if !is_there() {
        return;
    }
    let mut world = World::joined(Verbs::spoilt(|options| options.ring_entries = 8), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    for id in 0..100 {
        world.sides[0].post(note(id, b, Note { clock: id, ..Note::new(NoteKind::Absent) }));
    }
    let until = Instant::now() + Duration::from_millis(100);
    while Instant::now() < until {
        world.step_side(0);
    }
    assert!(world.sides[0].sent() <= 8, "{} notes went into a ring of 8", world.sides[0].sent());
    world.until("all notes", |w| w.sides[1].arrived() == 100 && w.sides[0].sent() == 100);
    let clocks = world.sides[1].arrivals(a).into_iter().map(|(heard, _)| heard.clock);
    assert!(clocks.eq(0..100));
}

#[test]
fn memory_is_registered_once_and_never_while_data_flow() {
    if !is_there() {
        return;
    }
    let mut world = World::joined(Verbs::new(), 2, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
    let first = world.sides[0].transport().register(&region).unwrap();
    let counts = |world: &mut World<Verbs>| [0, 1].map(|side: usize| world.sides[side].transport().registrations());
    let before = counts(&mut world);
    // On each rail: its memory and a note ring at both ends, and this region at one.
    let rails = world.sides[0].transport().carried().count() as u64;
    assert_eq!(before, [3 * rails, 2 * rails]);
    assert_eq!(world.sides[0].transport().register(&region).unwrap(), first);
    let mut slot_lease = world.sides[1].cut(4096);
    let mut source = lease;
    for turn in 0..50 {
        let slot = world.sides[1].arm(a, slot_lease);
        fill(&mut source, turn);
        world.sides[0].post(write(turn, b, source.freeze(), slot));
        world.until("a turn", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);
        slot_lease = world.sides[1].arrivals(a).pop().unwrap().1.unwrap();
        source = world.sides[0].outcomes().pop().unwrap().1.unwrap().thaw().unwrap();
    }
    assert_eq!(counts(&mut world), before);

    // What was never registered fails by itself.
    let (_other, foreign) = Region::allocate(4096, &RegionOptions::default()).unwrap();
    let slot = world.sides[1].arm(a, slot_lease);
    world.sides[0].post(write(99, b, foreign.freeze(), slot));
    world.until("its failure", |w| w.sides[0].heard.iter().any(|c| matches!(c, Completion::Failed { id: 99, .. })));
    let (_, source, error) = world.sides[0].outcomes().pop().unwrap();
    assert!(source.is_some() && error.unwrap().to_string().contains("not registered"));
    world.assert_works(0, 1);
}

#[test]
fn two_hundred_paths_one_after_the_other_leave_nothing_behind() {
    if !is_there() {
        return;
    }
    let mut world = World::apart(Verbs::spoilt(|options| options.ring_entries = 16), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    // Descriptors, and mappings of note rings.
    let held = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        (std::fs::read_dir("/proc/self/fd").unwrap().count(), maps.matches("gradwire-notes").count())
    };
    let mut before = None;
    for turn in 0..200 {
        world.connect(0, 1, Duration::from_secs(20));
        world.connect(1, 0, Duration::from_secs(20));
        world.until("Connected", |w| w.sides[0].is_connected_to(b) && w.sides[1].is_connected_to(a));
        world.sides[0].transport().fence(b);
        world.sides[1].transport().fence(a);
        world.sides.iter_mut().for_each(|side| side.heard.clear());
        if turn == 10 {
            before = Some(held());
        }
    }
    // Other tests of this process may hold some at the same moment.
    let limit = Instant::now() + Duration::from_secs(20);
    let (fds, rings) = before.unwrap();
    while held().0 > fds + 60 || held().1 > rings + 60 {
        assert!(Instant::now() < limit, "{:?} descriptors and rings, {:?} before", held(), (fds, rings));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_caller_goes_on_calling_until_its_peer_is_there() {
    if !is_there() {
        return;
    }
    // The device gives a hello up after 7 tries of 34 ms.
    let mut world = World::apart(Verbs::spoilt(|options| options.ack_timeout = 13), 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    world.connect(1, 0, Duration::from_secs(20));
    let until = Instant::now() + Duration::from_millis(1200);
    while Instant::now() < until {
        world.step();
    }
    assert!(world.sides[1].heard.is_empty(), "{:?}", world.sides[1].heard);
    world.connect(0, 1, Duration::from_secs(20));
    world.until("Connected", |w| w.sides[0].is_connected_to(b) && w.sides[1].is_connected_to(a));
    world.assert_works(0, 1);
}

/// Not a test: the peer of the test below, in a process of its own. Started by the test runner it does nothing.
#[test]
fn a_peer_process() {
    let Ok(theirs) = std::env::var("VERBS_PEER_OF") else { return };
    let (me, them) = (PeerId::worker(0), PeerId::server(0, 0));
    let mut transport = VerbsTransport::new(options(me)).unwrap();
    let ours = transport.offer(them).unwrap();
    println!("\nOFFER {}", ours.on("verbs").unwrap());
    std::io::stdout().flush().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    transport.connect(them, &Endpoint::new("verbs", theirs), deadline).unwrap();
    let mut heard = Vec::new();
    while Instant::now() < deadline {
        transport.poll(Instant::now(), &mut heard).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_process_is_noticed_though_nothing_is_sent() {
    if !is_there() {
        return;
    }
    let (me, them) = (PeerId::server(0, 0), PeerId::worker(0));
    let mut transport = VerbsTransport::new(options(me)).unwrap();
    let ours = transport.offer(them).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "verbs::a_peer_process"])
        .env("VERBS_PEER_OF", ours.on("verbs").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let offer = lines.map(Result::unwrap).find_map(|line| line.strip_prefix("OFFER ").map(str::to_string)).unwrap();
    assert!(transport.judge(ours.on("verbs").unwrap(), &offer).is_ok());
    let deadline = Instant::now() + Duration::from_secs(20);
    transport.connect(them, &Endpoint::new("verbs", offer), deadline).unwrap();
    let mut heard = Vec::new();
    let mut until = |what: &str, reached: fn(&Completion) -> bool| {
        while !heard.iter().any(reached) {
            assert!(Instant::now() < deadline + Duration::from_secs(20), "waited in vain for {what}: {heard:?}");
            transport.poll(Instant::now(), &mut heard).unwrap();
            std::thread::yield_now();
        }
        heard.drain(..).map(|completion| format!("{completion:?}")).collect::<String>()
    };
    until("Connected", |c| matches!(c, Completion::Connected { .. }));
    child.kill().unwrap();
    child.wait().unwrap();
    let killed = Instant::now();
    let told = until("Broken", |c| matches!(c, Completion::Broken { .. }));
    eprintln!("noticed after {:.2} s", killed.elapsed().as_secs_f64());
    assert!(told.contains("did not acknowledge") && told.contains("status 12"), "{told}");
}

/// Not a test: registers memory, under the limit that the test below sets. Started by the test runner it does nothing.
#[test]
fn a_registering_process() {
    if std::env::var_os("VERBS_REGISTERS").is_none() {
        return;
    }
    let mut transport = VerbsTransport::new(options(PeerId::worker(0))).unwrap();
    let options = RegionOptions { lock: Locking::None, ..RegionOptions::default() };
    let (small, _lease) = Region::allocate(4096, &options).unwrap();
    transport.register(&small).unwrap();
    let (region, _lease) = Region::allocate(1 << 20, &options).unwrap();
    let error = transport.register(&region).unwrap_err();
    println!("\nREFUSED {error}");
}

/// The kernel pins what a device may reach, up to a limit that is 64 KiB where nobody has raised it.
#[test]
fn a_limit_on_locked_memory_that_is_too_small_is_told_with_what_mends_it() {
    if !is_there() {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        println!("NOT RUN: becoming another user needs root");
        return;
    }
    for (limit, mends) in [("65536:65536", "LimitMEMLOCK="), ("65536:16777216", "ulimit -l")] {
        let output = Command::new("prlimit")
            .args([&format!("--memlock={limit}"), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["--inh-caps=-all", "--bounding-set=-all"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "verbs::a_registering_process", "--nocapture", "--test-threads=1"])
            .env("VERBS_REGISTERS", "1")
            .output()
            .unwrap();
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let told = text.lines().find_map(|line| line.strip_prefix("REFUSED ")).unwrap_or_else(|| panic!("{text}"));
        for part in ["of 1048576 bytes with RDMA device", "RLIMIT_MEMLOCK", "65536 bytes soft", mends] {
            assert!(told.contains(part), "{part}: {told}");
        }
        // The small region is pinned already, and counts.
        let needed: u64 = told.split("needs ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap().parse().unwrap();
        assert!(needed >= (1 << 20) + 4096, "{told}");
    }
}
