//! Fuzzes both sides of the handshake with bytes cut at places that the input chooses.
//!
//! Invariant: nobody without the token is accepted, by either side.
#![no_main]

use gradwire::{
    types::PeerId,
    wire::{
        JobToken,
        handshake::{Answering, Calling, Heard, Identity, Told},
    },
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = (usize::from(input.0) + 1, input.1);
    let token = JobToken::from_hex(&"17".repeat(32)).expect("64 digits");
    let identity = |me| Identity { job: 1, token: token.clone(), me, epoch: 0 };
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));

    let mut answering = Answering::begin([3; 32]);
    for piece in bytes.chunks(step) {
        let count = piece.len().min(answering.space().len());
        if count == 0 {
            break;
        }
        answering.space()[..count].copy_from_slice(&piece[..count]);
        match answering.received(count, &identity(server), |_, _| Ok(())) {
            Ok(Heard::More) => {}
            Ok(Heard::Accept { .. }) => panic!("accepted without the token"),
            Ok(Heard::Refuse { .. }) | Err(_) => break,
        }
    }

    let mut calling = Calling::begin(server, 0, [4; 32]);
    for piece in bytes.chunks(step) {
        let count = piece.len().min(calling.space().len());
        calling.space()[..count].copy_from_slice(&piece[..count]);
        match calling.received(count, &identity(worker)) {
            Ok(Told::More | Told::Answer(_)) => {}
            Ok(Told::Accepted) => panic!("took an accept without the token"),
            Err(_) => break,
        }
    }
});
