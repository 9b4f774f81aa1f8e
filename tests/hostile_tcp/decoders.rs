//! 100,000 random and mutated frames at the decoder, and as many handshake messages.
//!
//! Invariant: the decoders allocate nothing at all, whatever the bytes say.

use gradwire::{
    types::PeerId,
    wire::{
        FrameHeader, FrameTarget, JobToken, Note, NoteKind,
        handshake::{Answering, Calling, Heard, Identity, Told},
    },
};

use crate::{Random, allocator};

/// A frame whose checksums are right and whose fields are random; those that a decoder must look at most of all.
pub fn sealed_frame(random: &mut Random) -> [u8; FrameHeader::SIZE] {
    let mut bytes = [0; FrameHeader::SIZE];
    random.fill(&mut bytes);
    // Small kinds are mostly assigned ones, small flags too.
    bytes[16] %= 16;
    bytes[17] %= 4;
    seal(&mut bytes);
    bytes
}

pub fn seal(bytes: &mut [u8; FrameHeader::SIZE]) {
    for (from, to) in [(0, 12), (16, 60)] {
        let checksum = crc32c(&bytes[from..to]);
        bytes[to..to + 4].copy_from_slice(&checksum.to_le_bytes());
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn a_hundred_thousand_frames_are_refused_or_read_without_an_allocation() {
    let mut random = Random(1);
    let good = FrameHeader {
        target: Some(FrameTarget { rkey: 77, offset: 4096 }),
        note: Note { length: 1 << 20, clock: 5, ..Note::new(NoteKind::Push) },
    };
    let (mut read, mut refused) = (0, 0);
    allocator::reset();
    for turn in 0..100_000 {
        let bytes = match turn % 4 {
            0 => {
                let mut bytes = [0; FrameHeader::SIZE];
                random.fill(&mut bytes);
                bytes
            }
            1 => sealed_frame(&mut random),
            _ => {
                let mut bytes = good.encode();
                for _ in 0..=random.below(3) {
                    bytes[random.below(FrameHeader::SIZE)] ^= 1 << random.below(8);
                }
                bytes
            }
        };
        match FrameHeader::decode(&bytes) {
            // Only one encoding says it: what was read is written back to the same bytes.
            Ok(header) => {
                assert_eq!(header.encode(), bytes);
                read += 1;
            }
            Err(_) => refused += 1,
        }
    }
    assert_eq!(allocator::allocated().count, 0);
    assert!(read > 1000 && refused > 50_000, "{read} read, {refused} refused: the mix is not what it should be");
}

#[test]
fn a_hundred_thousand_handshake_messages_let_nobody_in() {
    let mut random = Random(2);
    let token = JobToken::random().unwrap();
    let identity = |me| Identity { job: 1, token: token.clone(), me, epoch: 0 };
    let (server, worker) = (identity(PeerId::server(0, 0)), identity(PeerId::worker(0)));
    let mut calling = Calling::begin(server.me, 0, [2; 32]);
    let listening = Answering::begin([1; 32]);
    calling.space().copy_from_slice(listening.challenge());
    let Ok(Told::Answer(hello)) = calling.received(40, &worker) else { panic!("a challenge is answered") };

    let mut kept_waiting = 0;
    allocator::reset();
    for turn in 0..50_000 {
        let mut bytes = hello;
        match turn % 3 {
            0 => random.fill(&mut bytes),
            1 => random.fill(&mut bytes[8..]),
            _ => bytes[random.below(104)] ^= 1 << random.below(8),
        }
        let length = if turn % 2 == 0 { 104 } else { random.below(104) + 1 };
        let mut answering = Answering::begin([1; 32]);
        answering.space()[..length].copy_from_slice(&bytes[..length]);
        let heard = answering.received(length, &server, |_, _| Ok(()));
        assert!(!matches!(heard, Ok(Heard::Accept { .. })), "turn {turn}");
        kept_waiting += usize::from(heard == Ok(Heard::More));

        let mut calling = Calling::begin(server.me, 0, [2; 32]);
        calling.space().copy_from_slice(listening.challenge());
        let _ = calling.received(40, &worker);
        calling.space().copy_from_slice(&bytes[..40]);
        assert_ne!(calling.received(40, &worker), Ok(Told::Accepted), "turn {turn}");
    }
    assert_eq!(allocator::allocated().count, 0);
    assert!(kept_waiting > 1000, "whoever has said half is waited for");
}
