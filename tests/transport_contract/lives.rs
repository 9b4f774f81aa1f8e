//! What every fabric promises about the lives of a path: that it ends in time, and begins again.
//!
//! Invariant: as in `contract`.

use std::time::Duration;

use gradwire::{
    mem::Lease,
    transport::{RemoteSlot, Transport},
    wire::{Note, NoteKind},
};

use crate::world::{Fabric, World, fill, note, write};

pub fn a_path_that_nobody_answers_breaks_at_its_deadline<F: Fabric>(fabric: F) {
    let mut world = World::apart(fabric, 2, 4096);
    for (alone, other) in [(0, 1), (1, 0)] {
        let peer = world.peer(other);
        let begun = world.fabric.now();
        world.connect(alone, other, Duration::from_millis(120));
        world.until("Broken", |w| w.sides[alone].broken_by(peer).is_some());
        assert!(world.fabric.now() - begun >= Duration::from_millis(120), "before its deadline");
        let told = world.sides[alone].broken_by(peer).unwrap();
        assert!(told.contains(&peer.to_string()) && told.contains("deadline"), "{told}");
        assert!(world.sides[other].heard.is_empty(), "{:?}", world.sides[other].heard);
        world.sides[alone].transport().fence(peer);
        world.sides[alone].heard.clear();
    }
}

pub fn a_fenced_path_can_be_built_again<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 64 << 10);
    let (a, b) = (world.peer(0), world.peer(1));
    let lease = world.sides[1].cut(512);
    let stale = world.sides[1].arm(a, lease);
    for turn in 0..3 {
        assert_eq!(world.sides[1].transport().fence(a).len(), usize::from(turn == 0));
        world.until("the other end to hear", |w| w.sides[0].broken_by(b).is_some());
        begin_again(&mut world, [0, 1]);
        world.assert_works(0, 1);
    }
    // A slot of the first life is no slot of the last one.
    let source = world.sides[0].cut(64).freeze();
    world.sides[0].post(write(1, b, source, stale));
    world.until("the path to break", |w| w.sides[1].broken_by(a).is_some());
}

pub fn a_path_built_again_takes_nothing_of_the_old_one<F: Fabric>(fabric: F) {
    const SLOT: usize = 2 << 20;
    let mut world = World::joined(fabric, 2, 9 * SLOT);
    let (a, b) = (world.peer(0), world.peer(1));
    let mut slots: Vec<Lease> = (0..3).map(|_| world.sides[1].cut(SLOT)).collect();
    for life in 1..4u64 {
        let armed: Vec<RemoteSlot> = slots.drain(..).map(|lease| world.sides[1].arm(a, lease)).collect();
        for slot in &armed {
            let mut source = world.sides[0].cut(1000 + SLOT / 2);
            fill(&mut source, life);
            world.sides[0].post(write(life, b, source.freeze(), *slot));
            let said = Note { clock: life, ..Note::new(NoteKind::Absent) };
            world.sides[0].post(note(life, b, said));
        }
        for _ in 0..life {
            world.step();
        }
        // The receiver first, with all that is under way; then the writer, whether it has heard of it or not.
        let complete = world.sides[1].arrivals(a).into_iter().filter_map(|(_, lease)| lease);
        let mut back: Vec<Lease> = complete.collect();
        back.append(&mut world.sides[1].transport().fence(a));
        assert_eq!(back.len(), 3, "every slot comes back, by arrival or by fence");
        begin_again(&mut world, [0, 1]);
        // The same slots are open to the new path, and nobody has written on it.
        back.iter_mut().for_each(|lease| lease.bytes_mut().fill(0xEE));
        back.into_iter().for_each(|lease| {
            world.sides[1].arm(a, lease);
        });
        world.for_a_while();
        assert_eq!(world.sides[1].arrived(), 0, "something of the old path: {:?}", world.sides[1].heard);
        world.assert_works(0, 1);
        // Off and on again, to look at them.
        slots = world.sides[1].transport().fence(a);
        assert_eq!(slots.len(), 3);
        assert!(slots.iter().all(|lease| lease.bytes().iter().all(|byte| *byte == 0xEE)), "the old path has landed");
        begin_again(&mut world, [1, 0]);
    }
}

pub fn an_offer_is_worth_nothing_after_a_fence<F: Fabric>(fabric: F) {
    let mut world = World::joined(fabric, 2, 4096);
    let (a, b) = (world.peer(0), world.peer(1));
    // The offers of a path that never ended at the other end's wish.
    world.sides[0].transport().fence(b);
    world.until("the other end to hear", |w| w.sides[1].broken_by(a).is_some());
    world.sides[1].transport().fence(a);
    let stale = world.sides[0].transport().offer(b).unwrap();
    let fresh = world.sides[1].transport().offer(a).unwrap();
    let deadline = world.fabric.now() + Duration::from_secs(20);
    world.sides[0].transport().connect(b, &fresh, deadline).unwrap();
    world.sides[0].transport().fence(b);
    // Now one end goes by what was offered before that fence, and the other waits for the next path.
    world.sides.iter_mut().for_each(|side| side.heard.clear());
    let deadline = world.fabric.now() + Duration::from_millis(150);
    world.sides[1].transport().connect(a, &stale, deadline).unwrap();
    world.sides[0].transport().offer(b).unwrap();
    world.sides[0].transport().connect(b, &fresh, deadline).unwrap();
    world.until("the stale end to break", |w| w.sides[1].broken_by(a).is_some());
    assert!(!world.sides[1].is_connected_to(a), "a path came of an offer that a fence had ended");
    world.sides[1].transport().fence(a);
    world.until("the other end to break", |w| w.sides[0].broken_by(b).is_some());
    assert!(!world.sides[0].is_connected_to(b));
    begin_again(&mut world, [0, 1]);
    world.assert_works(0, 1);
}

/// The receiver has fenced its end of the path between the first two; now the writer does, and both connect, in this order.
fn begin_again<F: Fabric>(world: &mut World<F>, [first, second]: [usize; 2]) {
    let (a, b) = (world.peer(0), world.peer(1));
    world.sides[0].transport().fence(b);
    world.sides.iter_mut().for_each(|side| side.heard.clear());
    world.connect(first, second, Duration::from_secs(20));
    world.connect(second, first, Duration::from_secs(20));
    world.until("Connected", |w| w.sides[0].is_connected_to(b) && w.sides[1].is_connected_to(a));
}
