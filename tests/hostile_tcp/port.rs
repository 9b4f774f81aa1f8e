//! Thousands of hostile connections at a live port, before the handshake and after it.
//!
//! Invariant: the pair on the same listener is not disturbed, and no allocation of its thread is larger than what a connection
//! always costs.

use std::{
    io::Write,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use gradwire::{
    transport::tcp::Io,
    wire::{FrameHeader, FrameTarget, Note, NoteKind},
};

use crate::{
    Random,
    decoders::{seal, sealed_frame},
    pair::{ROGUE, RunningPair, SERVER, identity, interfaces},
    raw,
};

/// A connection's buffer is 16 KiB; a length field of a hostile frame says up to 4 GiB.
const LARGEST_ALLOCATION: usize = 32 << 10;

#[test]
fn three_thousand_strangers_do_not_disturb_the_pair() {
    let interfaces = interfaces();
    interfaces.iter().for_each(|io| strangers(*io, 3000 / interfaces.len()));
}

fn strangers(io: Io, count: usize) {
    let pair = RunningPair::start(io);
    pair.await_exchanges(1);
    let mut random = Random(3);
    for turn in 0..count {
        let mut stream = raw::dial(pair.address());
        let mut bytes = vec![0; 1 + random.below(300)];
        random.fill(&mut bytes);
        match turn % 4 {
            0 => {}
            1 => bytes.splice(0..0, *b"GRWR\x01\x00\x02\x00").for_each(drop),
            2 => bytes.splice(0..0, *b"GET / HTTP/1.1\r\n").for_each(drop),
            _ => bytes = sealed_frame(&mut random).to_vec(),
        }
        // The listener may have closed the connection before all is written.
        let _ = stream.write_all(&bytes);
        if turn % 100 == 0 && turn % 4 != 1 {
            assert!(raw::is_closed(&mut stream), "turn {turn}: a stranger is not shown the door");
        }
    }
    let allocated = pair.stop();
    assert!(allocated.largest <= LARGEST_ALLOCATION, "{allocated:?}");
}

#[test]
fn two_thousand_wrong_frames_of_an_authenticated_peer_break_its_own_path_only() {
    let interfaces = interfaces();
    interfaces.iter().for_each(|io| wrong_frames(*io, 2000 / interfaces.len()));
}

fn wrong_frames(io: Io, count: usize) {
    let pair = RunningPair::start(io);
    let mut random = Random(4);
    let rogue = identity(ROGUE, &pair.token);
    let slot = pair.rogue_slot;
    let mut good = 0;
    for turn in 0..count {
        let mut stream = raw::call_until_accepted(pair.address(), &rogue, (SERVER, turn as u32));
        let mut bytes = Vec::new();
        for clock in 0..random.below(4) {
            bytes.extend(raw::note_bytes(clock as u64));
            good += 1;
        }
        bytes.extend(wrong_frame(turn, &mut random, slot.rkey, slot.offset));
        // What follows a wrong frame is never looked at, however much it is.
        let mut rest = vec![0; random.below(2000)];
        random.fill(&mut rest);
        bytes.extend(rest);
        let _ = stream.write_all(&bytes);
        if turn % 7 == 6 {
            // Half a frame, then nothing: the close is what ends it.
            drop(stream);
        } else {
            assert!(raw::is_closed(&mut stream), "turn {turn}");
        }
    }
    let limit = Instant::now() + Duration::from_secs(20);
    while pair.shared.rogue_breaks.lock().unwrap().len() < count {
        assert!(Instant::now() < limit, "not every wrong frame broke its path");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Whether the good notes before a wrong frame are heard is not in doubt: they are complete.
    assert_eq!(pair.shared.rogue_notes.load(Ordering::Relaxed), good);
    let reasons = pair.shared.rogue_breaks.lock().unwrap().clone();
    assert!(reasons.iter().all(|reason| reason.contains("worker 1")), "{:?}", reasons.first());
    for part in ["checksum", "no region has the key", "not lie within", "no slot is armed", "do not fit", "unassigned"]
    {
        assert!(reasons.iter().any(|reason| reason.contains(part)), "no path broke because of `{part}`");
    }
    let allocated = pair.stop();
    assert!(allocated.largest <= LARGEST_ALLOCATION.max(count * 24 * 2), "{allocated:?}");
}

/// A frame that must break the path; what is wrong with it depends on `turn`.
fn wrong_frame(turn: usize, random: &mut Random, rkey: u32, offset: u64) -> Vec<u8> {
    let frame = |rkey, offset, length| {
        let note = Note { length, ..Note::new(NoteKind::Push) };
        FrameHeader { target: Some(FrameTarget { rkey, offset }), note }.encode()
    };
    let any_length = random.next() as u32;
    match turn % 7 {
        0 => {
            let mut bytes = raw::note_bytes(1);
            bytes[random.below(FrameHeader::SIZE)] ^= 1 << random.below(8);
            bytes.to_vec()
        }
        1 => frame(rkey ^ 1, offset, any_length).to_vec(),
        2 => frame(rkey, u64::MAX - u64::from(any_length), u32::MAX).to_vec(),
        3 => frame(rkey, offset + 1 + random.below(2000) as u64, 8).to_vec(),
        4 => frame(rkey, offset, 1025 + random.below(2000) as u32).to_vec(),
        5 => {
            let mut bytes = raw::note_bytes(1);
            bytes[16] = 50 + random.below(200) as u8;
            seal(&mut bytes);
            bytes.to_vec()
        }
        _ => frame(rkey, offset, 1000)[..random.below(63) + 1].to_vec(),
    }
}
