//! Tests of the handshake: both state machines against each other, and each against what it must refuse.
//!
//! Invariant: every reason to refuse has a test that causes it.

use super::*;

const SERVER: PeerId = PeerId::server(0, 1);
const WORKER: PeerId = PeerId::worker(3);

fn identity(me: PeerId) -> Identity {
    Identity { job: 7, token: JobToken::from_hex(&"5a".repeat(32)).unwrap(), me, epoch: 2 }
}

/// Gives `bytes` to the caller in pieces of `step`; the last answer counts.
fn tell(caller: &mut Calling, bytes: &[u8], step: usize, identity: &Identity) -> Result<Told, HandshakeError> {
    let mut told = Ok(Told::More);
    for piece in bytes.chunks(step) {
        caller.space()[..piece.len()].copy_from_slice(piece);
        told = caller.received(piece.len(), identity);
    }
    told
}

fn hear(listener: &mut Answering, bytes: &[u8], step: usize) -> Result<Heard, HandshakeError> {
    let mut heard = Ok(Heard::More);
    for piece in bytes.chunks(step) {
        listener.space()[..piece.len()].copy_from_slice(piece);
        heard = listener.received(piece.len(), &identity(SERVER), |peer, _| match peer {
            WORKER => Ok(()),
            _ => Err(Refusal::UnknownPeer),
        });
        if !matches!(heard, Ok(Heard::More)) {
            break;
        }
    }
    heard
}

/// The listener, and the hello that `caller` sends it.
fn hello_of(caller: &Identity, wanted: PeerId) -> (Answering, Calling, [u8; HELLO]) {
    let listener = Answering::begin([1; NONCE]);
    let mut calling = Calling::begin(wanted, 0, [2; NONCE]);
    let told = tell(&mut calling, &listener.challenge().clone(), 7, caller);
    let Ok(Told::Answer(hello)) = told else { panic!("{told:?}") };
    (listener, calling, hello)
}

fn refusal_of(caller: &Identity, wanted: PeerId) -> Refusal {
    let (mut listener, mut calling, hello) = hello_of(caller, wanted);
    let heard = hear(&mut listener, &hello, HELLO);
    let Ok(Heard::Refuse { why, reply, .. }) = heard else { panic!("{heard:?}") };
    assert_eq!(tell(&mut calling, &reply, 3, caller), Err(HandshakeError::Refused(why)));
    why
}

#[test]
fn two_of_one_job_accept_each_other_however_the_bytes_are_cut() {
    for step in [1, 7, 8, 9, 40, 104] {
        let me = identity(WORKER);
        let (mut listener, mut calling, hello) = hello_of(&me, SERVER);
        let heard = hear(&mut listener, &hello, step);
        let Ok(Heard::Accept { peer: WORKER, reply }) = heard else { panic!("{heard:?}") };
        assert!(calling.has_answered());
        assert_eq!(tell(&mut calling, &reply, step, &me), Ok(Told::Accepted));
        assert!(calling.space().is_empty(), "what follows the handshake is none of its business");
    }
}

#[test]
fn every_refusal_has_its_reason() {
    let me = identity(WORKER);
    let other_token = JobToken::from_hex(&"5b".repeat(32)).unwrap();
    assert_eq!(refusal_of(&Identity { job: 8, ..me.clone() }, SERVER), Refusal::WrongJob);
    assert_eq!(refusal_of(&Identity { token: other_token, ..me.clone() }, SERVER), Refusal::WrongToken);
    assert_eq!(refusal_of(&me, PeerId::server(0, 0)), Refusal::WrongPeer);
    assert_eq!(refusal_of(&Identity { epoch: 3, ..me.clone() }, SERVER), Refusal::WrongEpoch);
    assert_eq!(refusal_of(&identity(PeerId::worker(4)), SERVER), Refusal::UnknownPeer);
}

#[test]
fn a_missing_signature_is_a_wrong_token() {
    let (mut listener, _, mut hello) = hello_of(&identity(WORKER), SERVER);
    hello[HELLO_SIGNED..].fill(0);
    assert!(matches!(hear(&mut listener, &hello, HELLO), Ok(Heard::Refuse { why: Refusal::WrongToken, .. })));
}

#[test]
fn no_byte_of_a_hello_can_be_changed() {
    let me = identity(WORKER);
    for at in 0..HELLO {
        let (mut listener, _, mut hello) = hello_of(&me, SERVER);
        hello[at] ^= 0x10;
        let heard = hear(&mut listener, &hello, HELLO);
        assert!(!matches!(heard, Ok(Heard::Accept { .. } | Heard::More)), "byte {at}: {heard:?}");
    }
}

#[test]
fn a_recorded_hello_is_worth_nothing_under_another_challenge() {
    let (_, _, hello) = hello_of(&identity(WORKER), SERVER);
    let mut later = Answering::begin([9; NONCE]);
    assert!(matches!(hear(&mut later, &hello, HELLO), Ok(Heard::Refuse { why: Refusal::WrongToken, .. })));
}

#[test]
fn no_byte_of_an_accept_can_be_changed() {
    let me = identity(WORKER);
    for at in 0..ACCEPT {
        let (mut listener, mut calling, hello) = hello_of(&me, SERVER);
        let Ok(Heard::Accept { mut reply, .. }) = hear(&mut listener, &hello, HELLO) else { panic!() };
        reply[at] ^= 0x10;
        assert!(tell(&mut calling, &reply, ACCEPT, &me).is_err(), "byte {at}");
    }
}

#[test]
fn a_hello_is_no_accept() {
    // The labels keep one side's signature from serving as the other's: a listener that echoes what it got proves nothing.
    let me = identity(WORKER);
    let (_, mut calling, hello) = hello_of(&me, SERVER);
    let mut echoed = [0; ACCEPT];
    echoed[..PREFIX].copy_from_slice(&prefix(Message::Accept, 0));
    echoed[PREFIX..].copy_from_slice(&hello[HELLO_SIGNED..]);
    assert_eq!(tell(&mut calling, &echoed, ACCEPT, &me), Err(HandshakeError::Forged));
}

#[test]
fn another_version_is_told_to_both_sides_whatever_follows_its_prefix() {
    let mut theirs = Calling::farewell();
    theirs[4] = 9;
    let mut listener = Answering::begin([1; NONCE]);
    let heard = hear(&mut listener, &theirs, 8);
    let Ok(Heard::Refuse { why: Refusal::WrongVersion, mut reply, .. }) = heard else { panic!("{heard:?}") };

    // The other version's caller reads our refusal by the same eight bytes; here ours reads one of another version.
    reply[4] = 9;
    let mut calling = Calling::begin(SERVER, 0, [2; NONCE]);
    let told = tell(&mut calling, &reply, 8, &identity(WORKER));
    assert_eq!(told, Err(HandshakeError::Refused(Refusal::WrongVersion)));

    let mut challenge = *listener.challenge();
    challenge[4] = 9;
    let mut calling = Calling::begin(SERVER, 0, [2; NONCE]);
    let told = tell(&mut calling, &challenge[..8], 8, &identity(WORKER));
    assert_eq!(told, Err(HandshakeError::Version { theirs: 9 }));
}

#[test]
fn strangers_are_told_by_their_first_bytes() {
    for bytes in [&b"G"[..], b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02", b"GRWX", b"GRWR\x01\x00\x09\x00"] {
        let heard = hear(&mut Answering::begin([1; NONCE]), bytes, 4);
        let expected = if bytes == b"G" { Ok(Heard::More) } else { Err(HandshakeError::Stranger) };
        assert_eq!(heard, expected, "{bytes:?}");
        let mut calling = Calling::begin(SERVER, 0, [2; NONCE]);
        let told = tell(&mut calling, bytes, bytes.len(), &identity(WORKER));
        assert_eq!(told.is_err(), bytes != b"G", "{bytes:?}");
    }
    // A peer's own kind of message is out of place on the other side.
    let challenge = *Answering::begin([3; NONCE]).challenge();
    assert_eq!(hear(&mut Answering::begin([1; NONCE]), &challenge, 40), Err(HandshakeError::Stranger));
}
