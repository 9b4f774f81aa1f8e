//! Tests of the framing: whatever way the bytes are cut, what goes in on one side comes out on the other.
//!
//! Invariant: no test here opens a socket.

use proptest::prelude::*;

use super::*;
use crate::{
    mem::{Region, RegionOptions},
    wire::{FrameTarget, NoteKind},
};

fn leases(size: usize, count: usize) -> Vec<Lease> {
    let (_, lease) = Region::allocate(size * count, &RegionOptions::default()).unwrap();
    let mut leases = lease.chunks(size);
    leases.truncate(count);
    leases
}

fn header(clock: u64, length: Option<u32>) -> FrameHeader {
    let kind = if length.is_some() { NoteKind::Push } else { NoteKind::Absent };
    let target = length.map(|_| FrameTarget { rkey: 9, offset: clock });
    FrameHeader { target, note: Note { clock, length: length.unwrap_or(0), ..Note::new(kind) } }
}

/// Moves everything from one half to the other, at most `step` bytes at a time and `limit` bytes offered at a time.
fn carry(
    outbound: &mut Outbound,
    inbound: &mut Inbound,
    step: usize,
    limit: usize,
    slots: &mut Vec<Lease>,
) -> Vec<(Note, Option<Lease>)> {
    let mut arrived = Vec::new();
    let mut sent = Vec::new();
    while !outbound.is_empty() {
        let mut ranges = [IoSlice::new(&[]); RANGES_MAX];
        let (count, bytes) = outbound.gather(&mut ranges, limit);
        assert_eq!(ranges[..count].iter().map(|range| range.len()).sum::<usize>(), bytes);
        let wire: Vec<u8> = ranges[..count].iter().flat_map(|range| range.iter().copied()).take(step).collect();
        let mut moved = 0;
        for target in &mut inbound.targets(limit) {
            let count = target.len().min(step - moved).min(wire.len() - moved);
            target[..count].copy_from_slice(&wire[moved..moved + count]);
            moved += count;
        }
        assert!(moved > 0, "no progress");
        inbound.received(moved);
        outbound.advance(moved, |queued| sent.push(queued.id));
        while let Some(write) = inbound.next(|_| Ok(slots.pop().unwrap())).unwrap() {
            arrived.push(write);
        }
    }
    assert!(sent.is_sorted(), "writes are done in the order in which they were posted");
    arrived
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn writes_survive_any_cutting(
        lengths in prop::collection::vec(prop::option::of(prop_oneof![0u32..200, 0u32..40_000]), 1..40),
        step in prop_oneof![20usize..200, 1usize..60_000],
        limit in prop_oneof![20usize..200, 1usize..60_000],
    ) {
        let (mut outbound, mut inbound) = (Outbound::default(), Inbound::default());
        let (mut slots, mut sources) = (leases(40_064, 40), leases(40_064, 40));
        for (at, length) in lengths.iter().enumerate() {
            let source = length.map(|length| {
                let (mut source, _) = sources.pop().unwrap().split_at(length as usize);
                source.bytes_mut().fill(at as u8 + 1);
                source.freeze()
            });
            outbound.push(at as u64, &header(at as u64, *length), source);
        }
        let arrived = carry(&mut outbound, &mut inbound, step, limit, &mut slots);
        prop_assert_eq!(arrived.len(), lengths.len());
        for (at, ((note, lease), length)) in arrived.iter().zip(&lengths).enumerate() {
            prop_assert_eq!(*note, header(at as u64, *length).note);
            prop_assert_eq!(lease.is_some(), length.is_some());
            if let (Some(lease), Some(length)) = (lease, length) {
                let (payload, beyond) = lease.bytes().split_at(*length as usize);
                prop_assert!(payload.iter().all(|byte| *byte == at as u8 + 1));
                prop_assert!(beyond.iter().all(|byte| *byte == 0));
            }
        }
        prop_assert!(inbound.is_between_frames());
    }
}

#[test]
fn a_payload_is_received_in_place_after_what_came_with_its_header() {
    let mut inbound = Inbound::default();
    let mut slots = leases(1 << 20, 1);
    let place = slots[0].bytes().as_ptr();
    let mut first = header(0, Some(1 << 20)).encode().to_vec();
    first.extend([7; 100]);
    for (target, byte) in inbound.targets(usize::MAX)[1].iter_mut().zip(&first) {
        *target = *byte;
    }
    inbound.received(first.len());
    assert!(inbound.next(|_| Ok(slots.pop().unwrap())).unwrap().is_none());
    let [in_slot, in_buffer] = inbound.targets(usize::MAX);
    assert_eq!(in_slot.as_ptr() as usize, place as usize + 100);
    assert_eq!((in_slot.len(), in_buffer.len()), ((1 << 20) - 100, BUFFER_BYTES));
    assert!(!inbound.is_between_frames());
    assert_eq!(inbound.into_slot().unwrap().bytes()[..101], [&[7; 100][..], &[0]].concat());
}

#[test]
fn a_refused_slot_and_a_damaged_header_are_told_apart() {
    let feed = |bytes: &[u8]| {
        let mut inbound = Inbound::default();
        inbound.targets(0)[1][..bytes.len()].copy_from_slice(bytes);
        inbound.received(bytes.len());
        inbound.next(|_| Err(SlotRefusal::NotArmed)).unwrap_err()
    };
    assert_eq!(feed(&header(0, Some(8)).encode()), Defect::Slot(SlotRefusal::NotArmed));
    let mut damaged = header(0, Some(8)).encode();
    damaged[20] ^= 1;
    assert_eq!(feed(&damaged), Defect::Wire(WireError::Checksum("note")));
}
