//! A peer on shared memory that writes whatever it likes into its ring.
//!
//! Invariant: the memory is real and is written to behind the drivers' backs, through /proc.

use std::{
    fs,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use gradwire::{
    mem::{Lease, Region, RegionOptions},
    transport::{Completion, Transport, shm::ShmTransport},
    types::PeerId,
    wire::{Note, NoteKind},
};

use crate::{shm::Shm, world::note};

const SERVER: PeerId = PeerId::server(0, 0);
const PATIENCE: Duration = Duration::from_secs(60);

/// A peer that writes whatever it likes into its ring, again and again, while a third end's notes go on arriving.
#[test]
fn a_peer_that_scribbles_over_its_ring_disturbs_nobody_else() {
    const ROUNDS: u64 = 10_000;
    // A name that no other test's rings have.
    let (scribbler, third) = (PeerId::worker(4711), PeerId::worker(4712));
    let names = [SERVER, scribbler, third];
    let fabric = Shm::new();
    let mut ends = names.map(|me| fabric.end(me));
    let (region, lease) = Region::allocate(4096, &RegionOptions::default()).unwrap();
    ends[0].register(&region).unwrap();
    let mut heard: [Vec<Completion>; 3] = Default::default();
    let mut state = Scribble { lease: Some(lease), ring: None, random: 0x2545_f491_4f6c_dd1d, broken: 0 };
    join(&mut ends, &names, &mut heard, 2);
    join(&mut ends, &names, &mut heard, 1);
    for round in 0..ROUNDS {
        state.begin(&mut ends, &names);
        state.scribble();
        ends[2].post(note(round, SERVER, Note { clock: round, ..Note::new(NoteKind::Absent) })).unwrap();
        let mut arrived = false;
        for _ in 0..100 {
            poll_all(&mut ends, &mut heard);
            arrived |= heard[0]
                .iter()
                .any(|c| matches!(c, Completion::Arrived { from, note, .. } if *from == third && note.clock == round));
            if arrived {
                break;
            }
        }
        assert!(arrived, "round {round}: the third end's note did not arrive: {:?}", heard[0]);
        for completion in heard[0].iter().chain(&heard[2]) {
            let own = matches!(completion, Completion::Broken { peer, .. } if *peer != scribbler);
            assert!(!own, "round {round}: {completion:?}");
        }
        state.settle(&mut ends, &names, &mut heard);
    }
    assert!(state.broken > ROUNDS / 8, "only {} of {ROUNDS} rounds broke the path", state.broken);
}

fn poll_all(ends: &mut [ShmTransport; 3], heard: &mut [Vec<Completion>; 3]) {
    for (end, heard) in ends.iter_mut().zip(heard) {
        end.flush().unwrap();
        end.poll(Instant::now(), heard).unwrap();
    }
}

/// Connects end `at` with the server.
fn join(ends: &mut [ShmTransport; 3], names: &[PeerId; 3], heard: &mut [Vec<Completion>; 3], at: usize) {
    let deadline = Instant::now() + PATIENCE;
    let (to_server, to_it) = (ends[0].offer(names[at]).unwrap(), ends[at].offer(SERVER).unwrap());
    ends[0].connect(names[at], &to_it, deadline).unwrap();
    ends[at].connect(SERVER, &to_server, deadline).unwrap();
    let knows =
        |heard: &[Completion], who| heard.iter().any(|c| matches!(c, Completion::Connected { peer } if *peer == who));
    while !(knows(&heard[0], names[at]) && knows(&heard[at], SERVER)) {
        assert!(Instant::now() < deadline, "{heard:?}");
        poll_all(ends, heard);
    }
    heard.iter_mut().for_each(Vec::clear);
}

struct Scribble {
    /// The server's slot for the scribbler, while it is not armed.
    lease: Option<Lease>,
    /// Where the ring lies in our memory, once it was looked for.
    ring: Option<u64>,
    random: u64,
    broken: u64,
}

impl Scribble {
    fn below(&mut self, limit: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % limit
    }

    /// Arms the slot if it came back, and every other time lets the scribbler say something honest first.
    fn begin(&mut self, ends: &mut [ShmTransport; 3], names: &[PeerId; 3]) {
        if let Some(lease) = self.lease.take() {
            ends[0].arm(names[1], lease).unwrap();
        }
        if self.below(2) == 0 {
            // Where its own driver finds scribbles, the queue fills up.
            let _ = ends[1].post(note(1, SERVER, Note::new(NoteKind::Heartbeat)));
            ends[1].flush().unwrap();
        }
    }

    /// Writes through /proc into the ring from the scribbler to the server.
    fn scribble(&mut self) {
        let find = || {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            let line = maps.lines().find(|line| line.contains("ring from worker 4711 to server 0"));
            u64::from_str_radix(line.expect("its ring").split('-').next().unwrap(), 16).unwrap()
        };
        let start = *self.ring.get_or_insert_with(find);
        let memory = fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
        for _ in 0..1 + self.below(3) {
            let bytes: Vec<u8> = (0..1 + self.below(200)).map(|_| self.below(256) as u8).collect();
            let control = 128 * self.below(6);
            let (at, bytes) = match self.below(5) {
                0 => (4096 + self.below(1024), bytes),
                1 => (self.below(1024), bytes),
                // Small numbers are those that could pass.
                2 => (0, self.below(6).to_le_bytes().to_vec()),
                3 => (control, self.below(1200).to_le_bytes().to_vec()),
                _ => (control, (u64::MAX - self.below(3)).to_le_bytes().to_vec()),
            };
            memory.write_all_at(&bytes, start + at).unwrap();
        }
    }

    /// Ends the scribbler's path if it broke on either side, sees its slot come back, and connects it again.
    fn settle(&mut self, ends: &mut [ShmTransport; 3], names: &[PeerId; 3], heard: &mut [Vec<Completion>; 3]) {
        // Whatever was scribbled is looked at by these.
        poll_all(ends, heard);
        poll_all(ends, heard);
        let told = [&heard[0], &heard[1]].map(|heard| {
            heard.iter().find_map(|completion| match completion {
                Completion::Broken { error, .. } => Some(error.to_string()),
                _ => None,
            })
        });
        if told == [None, None] {
            for completion in heard[0].drain(..) {
                if let Completion::Arrived { lease: Some(lease), .. } = completion {
                    self.lease = Some(lease);
                }
            }
            heard.iter_mut().for_each(Vec::clear);
            return;
        }
        if let [Some(told), _] = &told {
            assert!(told.contains("worker 4711"), "{told}");
            self.broken += 1;
        }
        self.ring = None;
        let mut slots = ends[0].fence(names[1]);
        ends[1].fence(SERVER);
        let limit = Instant::now() + PATIENCE;
        slots.extend(self.lease.take());
        while slots.is_empty() {
            for completion in heard[0].drain(..) {
                match completion {
                    Completion::Released { peer, slots: back } if peer == names[1] => slots.extend(back),
                    Completion::Arrived { lease, .. } => slots.extend(lease),
                    _ => {}
                }
            }
            assert!(Instant::now() < limit, "the slot does not come back");
            poll_all(ends, heard);
        }
        assert_eq!(slots.len(), 1);
        self.lease = slots.pop();
        heard.iter_mut().for_each(Vec::clear);
        join(ends, names, heard, 1);
    }
}
