//! Each way to be refused, as the one who is refused sees it; and the limits of the waiting room.
//!
//! Invariant: every refusal is final in its text and leaves the pair on the same listener running.

use std::{
    io::{Read, Write},
    net::TcpListener,
    time::{Duration, Instant},
};

use gradwire::{
    transport::{
        Completion, Endpoint, Transport,
        tcp::{Io, TcpOptions, TcpTransport},
    },
    types::PeerId,
    wire::{
        JobToken,
        handshake::{Answering, HandshakeError, Identity, Refusal},
    },
};

use crate::{
    pair::{JOB, ROGUE, RunningPair, SERVER, WORKER, identity, interfaces},
    raw,
};

/// What a whole transport under `identity` hears when it calls `peer` at `endpoint`.
fn hears(identity: Identity, peer: PeerId, endpoint: &Endpoint, within: Duration) -> String {
    let mut transport = TcpTransport::new(TcpOptions { listen: false, ..TcpOptions::new(identity) }).unwrap();
    transport.connect(peer, endpoint, Instant::now() + within).unwrap();
    let (mut heard, limit) = (Vec::new(), Instant::now() + within + Duration::from_secs(5));
    while heard.is_empty() {
        assert!(Instant::now() < limit, "neither connected nor broken");
        transport.poll(Instant::now(), &mut heard).unwrap();
        std::thread::sleep(Duration::from_micros(200));
    }
    match &heard[..] {
        [Completion::Broken { error, .. }] => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_wrong_caller_hears_why() {
    interfaces().into_iter().for_each(every_wrong_caller_hears_why_by);
}

fn every_wrong_caller_hears_why_by(io: Io) {
    let pair = RunningPair::start(io);
    pair.await_exchanges(1);
    let long = Duration::from_secs(20);
    let ours = |me| identity(me, &pair.token);
    let cases = [
        (Identity { token: JobToken::random().unwrap(), ..ours(ROGUE) }, SERVER, "token is wrong or missing"),
        (Identity { job: JOB + 1, ..ours(ROGUE) }, SERVER, "another job"),
        (Identity { epoch: 1, ..ours(ROGUE) }, SERVER, "different epochs"),
        (ours(ROGUE), PeerId::server(0, 1), "another peer than the one wanted"),
        (ours(WORKER), SERVER, "connected already"),
    ];
    for (identity, peer, expected) in cases {
        let told = hears(identity, peer, &pair.endpoint, long);
        assert!(told.contains(expected) && told.contains(&peer.to_string()), "{told}");
    }
    // Not to be expected may pass; the deadline ends it.
    let told = hears(ours(PeerId::worker(9)), SERVER, &pair.endpoint, Duration::from_millis(100));
    assert!(told.contains("deadline") && told.contains("this peer is not expected"), "{told}");
    pair.stop();
}

#[test]
fn a_missing_token_and_a_wrong_version_are_refused_by_name() {
    interfaces().into_iter().for_each(a_missing_token_and_a_wrong_version_are_refused_by_name_by);
}

fn a_missing_token_and_a_wrong_version_are_refused_by_name_by(io: Io) {
    let pair = RunningPair::start(io);
    pair.await_exchanges(1);
    let rogue = identity(ROGUE, &pair.token);
    let unsigned = raw::call(pair.address(), &rogue, (SERVER, 0), |hello| hello[72..].fill(0)).unwrap();
    assert_eq!(unsigned.unwrap_err(), HandshakeError::Refused(Refusal::WrongToken));
    let other_version = raw::call(pair.address(), &rogue, (SERVER, 0), |hello| hello[4] = 9).unwrap();
    assert_eq!(other_version.unwrap_err(), HandshakeError::Refused(Refusal::WrongVersion));
    pair.stop();
}

#[test]
fn a_listener_of_another_version_or_no_listener_of_ours_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::new("tcp", listener.local_addr().unwrap().to_string());
    let others = std::thread::spawn(move || {
        let mut challenge = *Answering::begin([1; 32]).challenge();
        challenge[4] = 9;
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&challenge[..8]).unwrap();
        // The caller leaves with its own prefix, so that both sides can tell.
        let mut farewell = Vec::new();
        stream.read_to_end(&mut farewell).unwrap();
        assert_eq!(&farewell[..6], b"GRWR\x01\x00");
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        let _ = stream.read_to_end(&mut farewell);
    });
    let ours = identity(WORKER, &JobToken::random().unwrap());
    let told = hears(ours.clone(), SERVER, &endpoint, Duration::from_secs(20));
    assert!(told.contains("version 9") && told.contains("version 1"), "{told}");
    let told = hears(ours, SERVER, &endpoint, Duration::from_secs(20));
    assert!(told.contains("not gradwire's handshake"), "{told}");
    others.join().unwrap();
}

#[test]
fn an_impostor_that_does_not_know_the_token_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = Endpoint::new("tcp", listener.local_addr().unwrap().to_string());
    let impostor = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(Answering::begin([1; 32]).challenge()).unwrap();
        let mut hello = [0; 104];
        stream.read_exact(&mut hello).unwrap();
        let mut accept = [0; 40];
        accept[..8].copy_from_slice(b"GRWR\x01\x00\x03\x00");
        stream.write_all(&accept).unwrap();
        let _ = stream.read(&mut hello);
    });
    let told = hears(identity(WORKER, &JobToken::random().unwrap()), SERVER, &endpoint, Duration::from_secs(20));
    assert!(told.contains("without knowing the job's token"), "{told}");
    impostor.join().unwrap();
}

#[test]
fn silent_strangers_hold_neither_the_door_nor_their_seats() {
    interfaces().into_iter().for_each(silent_strangers_hold_neither_the_door_nor_their_seats_by);
}

fn silent_strangers_hold_neither_the_door_nor_their_seats_by(io: Io) {
    let token = JobToken::random().unwrap();
    let mut server = TcpTransport::new(TcpOptions { io, ..TcpOptions::new(identity(SERVER, &token)) }).unwrap();
    let endpoint = server.offer(WORKER).unwrap();
    let address = endpoint.on("tcp").unwrap().parse().unwrap();
    let mut silent: Vec<_> = (0..100).map(|_| raw::dial(address)).collect();
    let mut heard = Vec::new();
    // Sockets that nobody reads keep the descriptor quiet: the driver must not look at a listener it has no seat for.
    for _ in 0..10 {
        server.poll(Instant::now(), &mut heard).unwrap();
    }

    let mut worker =
        TcpTransport::new(TcpOptions { io, listen: false, ..TcpOptions::new(identity(WORKER, &token)) }).unwrap();
    let deadline = Instant::now() + Duration::from_secs(4);
    server.connect(WORKER, &Endpoint::new("tcp", ""), deadline).unwrap();
    worker.connect(SERVER, &endpoint, deadline).unwrap();
    while heard.len() < 2 {
        server.poll(Instant::now(), &mut heard).unwrap();
        worker.poll(Instant::now(), &mut heard).unwrap();
        std::thread::sleep(Duration::from_micros(500));
    }
    assert!(heard.iter().all(|completion| matches!(completion, Completion::Connected { .. })), "{heard:?}");

    // Five seconds later all of them are gone; time is an argument.
    for _ in 0..10 {
        server.poll(Instant::now() + Duration::from_secs(6), &mut heard).unwrap();
    }
    assert!(silent.iter_mut().all(raw::is_closed));
    assert_eq!(heard.len(), 2);
}

#[test]
fn a_reset_is_told_from_a_close() {
    interfaces().into_iter().for_each(a_reset_is_told_from_a_close_by);
}

fn a_reset_is_told_from_a_close_by(io: Io) {
    let pair = RunningPair::start(io);
    pair.await_exchanges(1);
    let rogue = identity(ROGUE, &pair.token);
    drop(raw::call_until_accepted(pair.address(), &rogue, (SERVER, 0)));
    let stream = raw::call_until_accepted(pair.address(), &rogue, (SERVER, 1));
    // A close that lingers for no time at all is a reset.
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    drop(stream);
    let limit = Instant::now() + Duration::from_secs(20);
    while pair.shared.rogue_breaks.lock().unwrap().len() < 2 {
        assert!(Instant::now() < limit, "both ends of a connection are to be noticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let reasons = pair.shared.rogue_breaks.lock().unwrap().clone();
    assert!(reasons[0].contains("the peer closed the connection"), "{reasons:?}");
    assert!(reasons[1].contains("reset"), "{reasons:?}");
    pair.stop();
}
