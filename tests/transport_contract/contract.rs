//! What every fabric promises. Each function here is one promise; `contract!` makes a test of each for a fabric.
//!
//! Invariant: only the trait is used, and no promise depends on how long anything takes.

use std::time::Duration;

use gradwire::{
    mem::Lease,
    transport::{Completion, RemoteSlot, Transport},
    wire::{Note, NoteKind},
};

pub use crate::lives::*;
use crate::world::{Fabric, World, fill, is_filled, note, write};

/// Makes a test of every promise. `$make` is an expression that gives a fresh fabric; `$before` is done first, and may return.
macro_rules! contract {
    ($make:expr) => {
        contract!($make, ());
    };
    ($make:expr, $before:expr) => {
        contract!(@ $make, $before,
            both_sides_hear_connected_once,
            a_note_travels_alone,
            a_payload_lands_in_its_slot_and_nowhere_else,
            a_source_longer_than_its_note_is_sent_in_part,
            many_writes_arrive_in_order,
            a_full_queue_hands_the_request_back_and_takes_it_later,
            a_write_to_an_unarmed_slot_breaks_that_path_only,
            a_write_longer_than_the_slot_breaks_the_path,
            a_request_that_contradicts_itself_fails_alone,
            a_slot_armed_for_another_is_not_written,
            a_slot_is_armed_again_and_again,
            a_fence_returns_the_slots_and_nothing_lands_after,
            a_fence_leaves_no_request_without_an_answer,
            a_vanished_peer_fails_what_is_queued_then_breaks,
            sizes_from_one_byte_to_eight_mib_both_ways,
            three_peers_do_not_mix,
            a_path_that_nobody_answers_breaks_at_its_deadline,
            a_fenced_path_can_be_built_again,
            a_path_built_again_takes_nothing_of_the_old_one,
            an_offer_is_worth_nothing_after_a_fence,
            a_request_without_a_path_fails,
        );
    };
    (@ $make:expr, $before:expr, $($promise:ident,)*) => {
        $(#[test] fn $promise() { $before; crate::contract::$promise($make); })*
    };
}

pub fn both_sides_hear_connected_once<F: Fabric>(fabric: F) {
    let mut world = World::apart(fabric, 2, 4096);
    world.connect(0, 1, Duration::from_secs(20));
    world.connect(1, 0, Duration::from_secs(20));
    let (a, b) = (world.peer(0), world.peer(1));
    world.until("Connected", |w| w.sides[0].is_connected_to(b) && w.sides[1].is_connected_to(a));
    world.for_a_while();
    for side in &world.sides {
        assert!(matches!(side.heard[..], [Completion::Connected { .. }]), "{:?}", side.heard);
    }
    world.assert_works(0, 1);
}

pub fn a_note_travels_alone<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let said = Note { clock: u64::MAX, credit: 5, length: 77, ..Note::new(NoteKind::Attach) };
    world.sides[0].post(note(42, b, said));
    world.until("a note", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);
    let arrivals = world.sides[1].arrivals(a);
    assert!(matches!(&arrivals[..], [(heard, None)] if *heard == said), "{arrivals:?}");
    let outcomes = world.sides[0].outcomes();
    assert!(matches!(outcomes[..], [(42, None, None)]), "{outcomes:?}");
}

pub fn a_payload_lands_in_its_slot_and_nowhere_else<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 16 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut memory = world.sides[1].cut(12 << 10);
    memory.bytes_mut().fill(0xEE);
    let [before, slot, after] = <[Lease; 3]>::try_from(memory.chunks(4096)).unwrap();
    let slot = world.sides[1].arm(a, slot);
    assert_eq!((slot.offset, slot.len), (4096, 4096));
    let mut source = world.sides[0].cut(1000);
    fill(&mut source, 1);
    world.sides[0].post(write(7, b, source.freeze(), slot));
    world.until("the payload", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);

    let (heard, lease) = world.sides[1].arrivals(a).pop().unwrap();
    let lease = lease.expect("a slot comes with the payload");
    assert_eq!((heard.kind, heard.length, lease.offset(), lease.len()), (NoteKind::Push, 1000, 4096, 4096));
    assert!(is_filled(&lease.bytes()[..1000], 1));
    let untouched = [before.bytes(), &lease.bytes()[1000..], after.bytes()];
    assert!(untouched.iter().all(|bytes| bytes.iter().all(|byte| *byte == 0xEE)));
    let (id, source, error) = world.sides[0].outcomes().pop().unwrap();
    assert!(id == 7 && error.is_none());
    assert!(is_filled(source.unwrap().thaw().expect("nobody else holds it").bytes(), 1));
}

pub fn many_writes_arrive_in_order<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 1 << 20);
    let (a, b) = (world.peer(0), world.peer(1));
    let total = 3000;
    let (mut posted, mut arrived, mut sent) = (0u64, 0u64, 0u64);
    let mut sources: Vec<Lease> = world.sides[0].cut(64 << 10).chunks(1024);
    let mut slots: Vec<RemoteSlot> = Vec::new();
    for lease in world.sides[1].cut(64 << 10).chunks(1024) {
        slots.push(world.sides[1].arm(a, lease));
    }
    world.until("3,000 writes", |w| {
        while posted < total {
            // Two of three are notes alone; the others wait for a slot.
            let request = if posted % 3 > 0 {
                note(posted, b, Note { clock: posted, ..Note::new(NoteKind::Absent) })
            } else if let (Some(_), Some(_)) = (sources.last(), slots.last()) {
                let mut source = sources.pop().unwrap();
                fill(&mut source, posted);
                write(posted, b, source.freeze(), slots.pop().unwrap())
            } else {
                break;
            };
            match w.sides[0].transport().post(request) {
                Ok(()) => posted += 1,
                Err(full) => {
                    if let Some((source, slot)) = full.0.payload {
                        sources.push(source.thaw().unwrap());
                        slots.push(slot);
                    }
                    break;
                }
            }
        }
        for (id, source, error) in w.sides[0].outcomes() {
            assert!(error.is_none() && id == sent, "{id} was sent as number {sent}");
            sent += 1;
            sources.extend(source.map(|source| source.thaw().unwrap()));
        }
        for (heard, lease) in w.sides[1].arrivals(a) {
            assert_eq!(heard.clock, arrived);
            if let Some(lease) = lease {
                assert!(is_filled(lease.bytes(), arrived));
                let slot = w.sides[1].arm(a, lease);
                slots.push(slot);
            }
            arrived += 1;
        }
        arrived == total && sent == total
    });
}

pub fn a_full_queue_hands_the_request_back_and_takes_it_later<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    let counted = |id| note(id, b, Note { clock: id, ..Note::new(NoteKind::Absent) });
    let mut taken = 0;
    let handed_back = loop {
        match world.sides[0].transport().post(counted(taken)) {
            Ok(()) => taken += 1,
            Err(full) => break full.0,
        }
        assert!(taken < 100_000, "a queue without limit");
    };
    assert_eq!((handed_back.id, handed_back.note.clock), (taken, taken));
    let mut handed_back = Some(handed_back);
    world.until("all that was posted, and the one that was handed back", |w| {
        if w.sides[0].sent() > 0
            && let Some(request) = handed_back.take()
        {
            handed_back = w.sides[0].transport().post(request).err().map(|full| full.0);
        }
        w.sides[1].arrived() as u64 == taken + 1
    });
    let clocks = world.sides[1].arrivals(a).into_iter().map(|(heard, _)| heard.clock);
    assert!(clocks.eq(0..=taken));
}

pub fn a_write_to_an_unarmed_slot_breaks_that_path_only<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 3, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let nowhere = RemoteSlot { rkey: world.rkey(0, 1), offset: 8192, len: 4096 };
    let source = world.sides[1].cut(64).freeze();
    world.sides[1].post(write(1, a, source, nowhere));
    world.until("both ends to break", |w| w.sides[0].broken_by(b).is_some() && w.sides[1].broken_by(a).is_some());
    let told = world.sides[0].broken_by(b).unwrap();
    assert!(told.contains("worker 0") && told.contains("slot"), "{told}");
    assert_eq!(world.sides[0].arrived(), 0);
    assert!(world.sides[2].heard.is_empty());
    world.assert_works(0, 2);
    world.assert_works(1, 2);
}

pub fn a_write_longer_than_the_slot_breaks_the_path<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut memory = world.sides[1].cut(192);
    memory.bytes_mut().fill(0xEE);
    let (small, beyond) = memory.split_at(64);
    let slot = world.sides[1].arm(a, small);
    // The writer lies about the slot's length; the owner knows better.
    let source = world.sides[0].cut(128).freeze();
    world.sides[0].post(write(1, b, source, RemoteSlot { len: 128, ..slot }));
    world.until("the path to break", |w| w.sides[1].broken_by(a).is_some());
    assert!(world.sides[1].broken_by(a).unwrap().contains("128 bytes"));
    if F::OWNER_PLACES_BYTES {
        assert!(beyond.bytes().iter().all(|byte| *byte == 0xEE), "bytes beyond the slot were written");
    }
    assert_eq!(world.sides[1].transport().fence(a).len(), 1, "the slot stays its owner's");
}

pub fn a_request_that_contradicts_itself_fails_alone<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let slot_lease = world.sides[1].cut(64);
    let slot = world.sides[1].arm(a, slot_lease);
    let mut wrong = Vec::new();
    let mut longer = write(0, b, world.sides[0].cut(64).freeze(), slot);
    longer.note.length = 65;
    wrong.push(longer);
    wrong.push(write(1, b, world.sides[0].cut(128).freeze(), slot));
    wrong.push(note(2, b, Note { length: 0, ..Note::new(NoteKind::Push) }));
    let mut no_kind = write(3, b, world.sides[0].cut(64).freeze(), slot);
    no_kind.note.kind = NoteKind::Heartbeat;
    wrong.push(no_kind);
    let count = wrong.len();
    wrong.into_iter().for_each(|request| world.sides[0].post(request));
    let mut failed = Vec::new();
    world.until("each to fail", |w| {
        failed.extend(w.sides[0].outcomes());
        failed.len() == count
    });
    failed.sort_by_key(|(id, ..)| *id);
    for (at, (id, source, error)) in failed.iter().enumerate() {
        assert!(*id == at as u64 && error.is_some() && source.is_some() == (at != 2), "{id}: {error:?}");
    }
    world.assert_works(0, 1);
}

/// Once a reply pool's slots were longer than the last chunk of a shard: the request failed, and workers waited in vain.
pub fn a_source_longer_than_its_note_is_sent_in_part<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut memory = world.sides[1].cut(128);
    memory.bytes_mut().fill(0xEE);
    let slot = world.sides[1].arm(a, memory);
    let mut source = world.sides[0].cut(128);
    source.bytes_mut().fill(0x11);
    let mut request = write(0, b, source.freeze(), slot);
    request.note.length = 40;
    world.sides[0].post(request);
    world.until("the write to land", |w| w.sides[1].arrived() == 1);
    let lease = world.sides[1].arrivals(a).pop().and_then(|(_, lease)| lease).expect("the slot's lease");
    assert!(lease.bytes()[..40].iter().all(|byte| *byte == 0x11));
    assert!(lease.bytes()[40..].iter().all(|byte| *byte == 0xEE), "more was sent than the note says");
}

pub fn a_slot_armed_for_another_is_not_written<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 3, 64 << 10);
    let (a, b, c) = (world.peer(0), world.peer(1), world.peer(2));
    let lease = world.sides[0].cut(256);
    let slot = world.sides[0].arm(c, lease);
    let source = world.sides[1].cut(256).freeze();
    world.sides[1].post(write(1, a, source, slot));
    world.until("the trespasser's path to break", |w| w.sides[0].broken_by(b).is_some());
    assert_eq!(world.sides[0].transport().fence(b).len(), 0, "the slot is not the trespasser's");

    let mut source = world.sides[2].cut(256);
    fill(&mut source, 9);
    world.sides[2].post(write(2, a, source.freeze(), slot));
    world.until("the rightful write", |w| w.sides[0].arrived() == 1);
    let (_, lease) = world.sides[0].arrivals(c).pop().unwrap();
    assert!(is_filled(lease.unwrap().bytes(), 9));
}

pub fn a_slot_is_armed_again_and_again<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 16 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut slot_lease = world.sides[1].cut(4096);
    let mut source = world.sides[0].cut(4096);
    for turn in 0..50 {
        let slot = world.sides[1].arm(a, slot_lease);
        fill(&mut source, turn);
        world.sides[0].post(write(turn, b, source.freeze(), slot));
        world.until("a turn", |w| w.sides[1].arrived() == 1 && w.sides[0].sent() == 1);
        let (_, lease) = world.sides[1].arrivals(a).pop().unwrap();
        slot_lease = lease.unwrap();
        assert!(is_filled(slot_lease.bytes(), turn));
        let (_, back, _) = world.sides[0].outcomes().pop().unwrap();
        source = back.unwrap().thaw().unwrap();
    }
}

pub fn a_fence_returns_the_slots_and_nothing_lands_after<F: Fabric>(fabric: F) {
    const SLOT: usize = 8 << 20;
    let mut world = World::joined(fabric, 2, 4 * SLOT);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut slots = Vec::new();
    for _ in 0..3 {
        let lease = world.sides[1].cut(SLOT);
        slots.push(world.sides[1].arm(a, lease));
    }
    for (id, slot) in slots.into_iter().enumerate() {
        let mut source = world.sides[0].cut(SLOT);
        fill(&mut source, id as u64 + 1);
        world.sides[0].post(write(id as u64, b, source.freeze(), slot));
    }
    // A little of it is under way when the receiver ends the path.
    for _ in 0..3 {
        world.step();
    }
    let complete = world.sides[1].arrivals(a);
    world.sides[1].heard.clear();
    let fenced = world.sides[1].transport().fence(a);
    assert_eq!(complete.len() + fenced.len(), 3, "every slot comes back, by arrival or by fence");
    let frozen: Vec<Vec<u8>> = fenced.iter().map(|lease| lease.bytes().to_vec()).collect();
    world.until("the writer to hear of it", |w| w.sides[0].broken_by(b).is_some());
    world.for_a_while();
    assert!(world.sides[1].heard.is_empty(), "{:?}", world.sides[1].heard);
    assert!(
        fenced.iter().zip(&frozen).all(|(lease, before)| lease.bytes() == before),
        "something landed after the fence"
    );
    let outcomes = world.sides[0].outcomes();
    assert_eq!(outcomes.len(), 3, "every source comes back");
    assert!(outcomes.into_iter().all(|(_, source, _)| source.unwrap().thaw().is_ok()));
}

pub fn a_fence_leaves_no_request_without_an_answer<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 1 << 20);
    let (a, b) = (world.peer(0), world.peer(1));
    let slots: Vec<RemoteSlot> = (0..4)
        .map(|_| {
            let lease = world.sides[1].cut(1000);
            world.sides[1].arm(a, lease)
        })
        .collect();
    for (id, slot) in slots.into_iter().enumerate() {
        let source = world.sides[0].cut(1000).freeze();
        world.sides[0].post(write(id as u64, b, source, slot));
        if id == 1 {
            // Two may be sent by now, two are not; nobody was told of any.
            world.sides[0].transport().flush().unwrap();
        }
    }
    assert!(world.sides[0].transport().fence(b).is_empty());
    world.for_a_while();
    let heard = &world.sides[0].heard;
    assert!(heard.iter().all(|completion| matches!(completion, Completion::Failed { .. })), "{heard:?}");
    let outcomes = world.sides[0].outcomes();
    assert!(outcomes.iter().map(|(id, ..)| *id).eq(0..4), "{outcomes:?}");
    assert!(outcomes.into_iter().all(|(_, source, _)| source.unwrap().thaw().is_ok()));
}

pub fn a_vanished_peer_fails_what_is_queued_then_breaks<F: Fabric>(fabric: F) {
    const PIECE: usize = 4 << 20;
    let mut world = World::joined(fabric, 3, 8 * PIECE);
    let (b, c) = (world.peer(1), world.peer(2));
    for id in 0..8 {
        let slot_lease = world.sides[1].cut(PIECE);
        let a = world.peer(0);
        let slot = world.sides[1].arm(a, slot_lease);
        let source = world.sides[0].cut(PIECE).freeze();
        world.sides[0].post(write(id, b, source, slot));
    }
    let gone = world.sides[1].transport.take().unwrap();
    world.fabric.vanish(gone);
    world.until("Broken", |w| w.sides[0].broken_by(b).is_some() && w.sides[2].broken_by(b).is_some());
    let told = world.sides[0].broken_by(b).unwrap();
    assert!(told.contains("worker 0"), "{told}");
    world.for_a_while();
    let heard = &mut world.sides[0].heard;
    assert!(matches!(heard.last(), Some(Completion::Broken { .. })), "Broken is the last of it: {heard:?}");
    let outcomes = world.sides[0].outcomes();
    assert!(outcomes.iter().map(|(id, ..)| *id).eq(0..8), "{outcomes:?}");
    assert!(outcomes.iter().any(|(.., error)| error.is_some()), "32 MiB were not all sent to nobody");
    // What is posted to a broken path comes back as well.
    world.sides[0].post(note(99, b, Note::new(NoteKind::Heartbeat)));
    world.until("Failed", |w| matches!(w.sides[0].outcomes()[..], [(99, None, Some(_))]));
    assert!(world.sides[0].broken_by(c).is_none());
    world.assert_works(0, 2);
}

pub fn sizes_from_one_byte_to_eight_mib_both_ways<F: Fabric>(fabric: F) {
    const LARGEST: usize = 8 << 20;
    let mut sizes = vec![1, 63, 64, 65, 16 << 10, (16 << 10) + 1, 1 << 20, LARGEST];
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut below = |limit: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % limit
    };
    for _ in 0..12 {
        // As many small ones as large ones.
        let magnitude = 64 << below(17);
        sizes.push(magnitude + below(magnitude));
    }
    let bytes = LARGEST + sizes.iter().sum::<usize>();
    let mut world = World::joined(fabric, 2, bytes);
    let mut slots: Vec<Lease> = world.sides.iter_mut().map(|side| side.cut(LARGEST)).collect();
    for (turn, size) in sizes.into_iter().enumerate() {
        let seed = |writer: usize| (turn * 2 + writer) as u64;
        for (owner, slot) in slots.drain(..).enumerate() {
            let writer = 1 - owner;
            let (owner_peer, writer_peer) = (world.peer(owner), world.peer(writer));
            let remote = world.sides[owner].arm(writer_peer, slot);
            let mut source = world.sides[writer].cut(size);
            fill(&mut source, seed(writer));
            world.sides[writer].post(write(turn as u64, owner_peer, source.freeze(), remote));
        }
        world.until("both writes", |w| w.sides.iter().all(|side| side.arrived() == 1 && side.sent() == 1));
        for owner in [0, 1] {
            let writer_peer = world.peer(1 - owner);
            let (heard, lease) = world.sides[owner].arrivals(writer_peer).pop().unwrap();
            let lease = lease.unwrap();
            assert_eq!(heard.length as usize, size);
            assert!(is_filled(&lease.bytes()[..size], seed(1 - owner)), "{size} bytes");
            slots.push(lease);
            assert!(world.sides[owner].outcomes().iter().all(|(.., error)| error.is_none()));
        }
    }
}

pub fn three_peers_do_not_mix<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 3, 1 << 20);
    let pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)];
    for round in 0..20u64 {
        for (from, to) in pairs {
            let (source_peer, target_peer) = (world.peer(from), world.peer(to));
            let slot_lease = world.sides[to].cut(1000);
            let slot = world.sides[to].arm(source_peer, slot_lease);
            let mut source = world.sides[from].cut(1000);
            let seed = round * 100 + from as u64 * 10 + to as u64;
            fill(&mut source, seed);
            world.sides[from].post(write(seed, target_peer, source.freeze(), slot));
        }
    }
    world.until("all to all", |w| w.sides.iter().all(|side| side.arrived() == 40));
    for (from, to) in pairs {
        let peer = world.peer(from);
        let arrivals = world.sides[to].arrivals(peer);
        assert_eq!(arrivals.len(), 20);
        for (round, (heard, lease)) in arrivals.into_iter().enumerate() {
            let seed = round as u64 * 100 + from as u64 * 10 + to as u64;
            assert!(heard.clock == seed && is_filled(lease.unwrap().bytes(), seed));
        }
    }
}

pub fn a_request_without_a_path_fails<F: Fabric>(fabric: F) {
    let mut world = World::apart(fabric, 2, 4096);
    let b = world.peer(1);
    world.sides[0].post(note(3, b, Note::new(NoteKind::Heartbeat)));
    world.until("Failed", |w| matches!(w.sides[0].outcomes()[..], [(3, None, Some(_))]));
}
