//! Two transports over a device that reaches itself (`fake_link`): what needs no kernel is tried wherever tests run.
//!
//! Invariant: no test needs libibverbs.

use std::time::{Duration, Instant};

use super::{VerbsOptions, VerbsTransport, fake_link::Link};
use crate::{
    mem::{Lease, Region, RegionOptions, SharedLease},
    transport::{Completion, RemoteSlot, Transport, WorkRequest},
    types::PeerId,
    wire::{FrameHeader, JobToken, Note, NoteKind, handshake::Identity, job_id},
};

const A: PeerId = PeerId::worker(0);
const B: PeerId = PeerId::server(0, 0);

struct End {
    link: &'static Link,
    transport: VerbsTransport,
    me: PeerId,
    peer: PeerId,
    heard: Vec<Completion>,
    now: Instant,
}

impl End {
    fn new(link: &'static Link, me: PeerId, peer: PeerId, change: fn(&mut VerbsOptions)) -> End {
        let identity = Identity { job: job_id("tests", ""), token: JobToken::random().unwrap(), me, epoch: 0 };
        let mut options = VerbsOptions::new(identity);
        change(&mut options);
        let transport = VerbsTransport::over(options, vec![link.device()]).unwrap();
        End { link, transport, me, peer, heard: Vec::new(), now: Instant::now() }
    }

    fn post(&mut self, id: u64, note: Note, payload: Option<(SharedLease, RemoteSlot)>) {
        self.transport.post(WorkRequest { id, peer: self.peer, note, payload }).unwrap();
    }

    /// Sends a note, which is all that the other end sees arrive.
    fn pass(&mut self, to: &mut End, note: Note) {
        self.post(0, note, None);
        self.transport.flush().unwrap();
        let mut arrived = 0;
        for told in to.look() {
            if let Completion::Arrived { note: told, .. } = told {
                assert_eq!(told, note);
                arrived += 1;
            }
        }
        assert_eq!(arrived, 1);
    }

    /// How many of what has happened since the last look are such; no path may have ended.
    fn count(&mut self, is_such: fn(&Completion) -> bool) -> u64 {
        let such = self.look().filter(|told| match told {
            Completion::Broken { error, .. } => panic!("{error}"),
            told => is_such(told),
        });
        such.count() as u64
    }

    /// What has happened since the last look.
    fn look(&mut self) -> std::vec::Drain<'_, Completion> {
        self.transport.poll(self.now, &mut self.heard).unwrap();
        assert!(!self.link.overran.get(), "a completion queue was too short");
        self.heard.drain(..)
    }

    fn memory(&mut self, bytes: usize) -> Lease {
        let (region, lease) = Region::allocate(bytes, &RegionOptions::default()).unwrap();
        self.transport.register(&region).unwrap();
        lease.split_at(bytes).0
    }
}

/// Two ends with a path between them.
fn joined(link: &'static Link, change: fn(&mut VerbsOptions)) -> [End; 2] {
    let mut ends = [End::new(link, A, B, change), End::new(link, B, A, change)];
    let [a, b] = &mut ends;
    join(a, b);
    ends
}

/// Makes a path between an end that calls and one that waits for it.
fn join(caller: &mut End, other: &mut End) {
    let (them, me) = (other.me, caller.me);
    let offers = [other.transport.offer(me).unwrap(), caller.transport.offer(them).unwrap()];
    // The caller last: it is heard at once.
    other.transport.connect(me, &offers[1], other.now + Duration::from_secs(9)).unwrap();
    caller.transport.connect(them, &offers[0], caller.now + Duration::from_secs(9)).unwrap();
    let is_connected: fn(&Completion) -> bool = |told| matches!(told, Completion::Connected { .. });
    let mut connected = 0;
    while connected < 2 {
        connected += caller.count(is_connected) + other.count(is_connected);
    }
}

fn note(clock: u64) -> Note {
    Note { clock, ..Note::new(NoteKind::Credit) }
}

/// `NOTE_ROUNDS` says how often, for whoever counts what a note costs: `valgrind --tool=callgrind` on a release build of this test,
/// with two numbers of rounds, tells instructions by their difference.
#[test]
fn a_note_goes_there_and_back() {
    let [mut a, mut b] = joined(Link::new(), |_| {});
    let rounds = std::env::var("NOTE_ROUNDS").map_or(2000, |text| text.parse().unwrap());
    let begun = Instant::now();
    for clock in 0..rounds {
        a.pass(&mut b, note(clock));
        b.pass(&mut a, note(clock));
    }
    println!("{:.1} ns a note", begun.elapsed().as_nanos() as f64 / 2.0 / rounds as f64);
}

/// Smaller rings and queues than what is posted, payloads of several messages among notes: all of it arrives, in order, and all of
/// it is told as sent, in order, with its source.
#[test]
fn notes_and_payloads_come_in_the_order_of_posting() {
    const BYTES: usize = 10_000;
    const COUNT: u64 = 3000;
    let [mut a, mut b] = joined(Link::new(), |options| (options.ring_entries, options.send_depth) = (8, 32));
    let mut source = a.memory(BYTES);
    source.bytes_mut().iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
    let source = source.freeze();
    let slot = b.memory(BYTES);
    let mut slot = b.transport.arm(A, slot).unwrap();
    // A note ring and a region each.
    let registrations = |a: &End, b: &End| [a.transport.registrations(), b.transport.registrations()];
    assert_eq!((registrations(&a, &b), a.link.registrations()), ([2, 2], 4));
    let (mut posted, mut sent, mut arrived) = (0, 0, 0);
    while arrived < COUNT || sent < COUNT {
        // One payload at a time, for there is one slot.
        while posted < COUNT && posted < arrived + 20 && (posted % 20 != 0 || posted == arrived) {
            let payload = (posted % 20 == 0).then(|| (source.clone(), slot));
            let pushed = Note { clock: posted, length: BYTES as u32, ..Note::new(NoteKind::Push) };
            a.post(posted, if payload.is_some() { pushed } else { note(posted) }, payload);
            posted += 1;
        }
        a.transport.flush().unwrap();
        let mut filled = None;
        for told in b.look() {
            let Completion::Arrived { note, lease, from: A } = told else { panic!("{told:?}") };
            assert_eq!(note.clock, arrived);
            assert_eq!(lease.is_some(), arrived % 20 == 0);
            filled = filled.or(lease);
            arrived += 1;
        }
        if let Some(mut lease) = filled {
            assert_eq!(lease.bytes(), source.bytes());
            lease.bytes_mut().fill(0);
            slot = b.transport.arm(A, lease).unwrap();
        }
        for told in a.look() {
            let Completion::Sent { id, source } = told else { panic!("{told:?}") };
            assert_eq!((id, source.is_some()), (sent, sent % 20 == 0));
            sent += 1;
        }
    }
    assert!(source.thaw().is_ok(), "every source came back");
    assert_eq!((registrations(&a, &b), a.link.registrations()), ([2, 2], 4), "registered while data flow");
}

/// More paths than a completion queue has seats for, and as much at work on each as its queues hold, while the end that has them
/// all does not look. Then they end, unlooked at, and others take their seats.
#[test]
fn queues_hold_all_that_can_be_at_work() {
    const PATHS: u16 = 20;
    const NOTES: u64 = 200;
    let short: fn(&mut VerbsOptions) =
        |options| (options.ring_entries, options.send_depth, options.signal_every) = (64, 64, Some(1));
    let link = Link::new();
    let mut hub = End::new(link, B, A, short);
    for turn in 0..3 {
        let mut others: Vec<End> = (0..PATHS).map(|at| End::new(link, PeerId::worker(at), B, short)).collect();
        others.iter_mut().for_each(|other| join(other, &mut hub));
        for clock in 0..NOTES {
            for other in &mut others {
                other.post(clock, note(clock), None);
                hub.transport
                    .post(WorkRequest { id: clock, peer: other.me, note: note(clock), payload: None })
                    .unwrap();
            }
        }
        others.iter_mut().for_each(|other| other.transport.flush().unwrap());
        hub.transport.flush().unwrap();
        if turn == 2 {
            let has_arrived: fn(&Completion) -> bool = |told| matches!(told, Completion::Arrived { .. });
            let mut arrived = 0;
            while arrived < 2 * NOTES * u64::from(PATHS) {
                arrived += hub.count(has_arrived);
                arrived += others.iter_mut().map(|other| other.count(has_arrived)).sum::<u64>();
            }
        }
        others.iter().for_each(|other| drop(hub.transport.fence(other.me)));
    }
}

/// Headers carry no checksum here: whatever a peer writes into the ring is refused, which ends its path, or is a note that
/// somebody might have sent. Nothing lands where it may not, and no other path notices.
#[test]
fn whatever_lies_in_the_ring_is_refused_or_is_a_note() {
    let (mut refused, mut read) = (0, 0);
    for place in 0..FrameHeader::SIZE {
        for bits in [1, 2, 16, 128, 255] {
            let link = Link::new();
            let [mut a, mut b] = joined(link, |_| {});
            let slot = b.memory(64);
            let slot = b.transport.arm(A, slot).unwrap();
            let source = a.memory(64).freeze();
            let pushed = Note { clock: 5, length: 64, ..Note::new(NoteKind::Push) };
            link.spoil.set(Some((place, bits)));
            a.post(0, pushed, Some((source, slot)));
            a.transport.flush().unwrap();
            let told: Vec<Completion> = b.look().collect();
            match &told[..] {
                [Completion::Arrived { note, lease: Some(lease), .. }] => {
                    assert!(note.kind.has_payload() && note.length as usize <= lease.len(), "{note:?}");
                    assert_ne!(*note, pushed, "byte {place} counts for nothing");
                    read += 1;
                }
                [Completion::Broken { peer: A, error }] => {
                    let error = error.to_string();
                    assert!(error.contains("cannot be read") || error.contains("may not land"), "{error}");
                    assert_eq!(b.transport.fence(A).len(), 1, "the slot comes back");
                    refused += 1;
                }
                other => panic!("byte {place}, bits {bits}: {other:?}"),
            }
        }
    }
    // Region, offset and both checksums; some bits of kind, flags and length.
    assert!(refused >= 5 * 20 && read > 0, "{refused} refused, {read} read");
}
