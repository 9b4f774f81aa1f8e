//! A path that is fenced while the kernel receives into a slot: from the fence on the slot's bytes are its owner's.
//!
//! The peer is a bare socket that has passed the handshake, so that it can stop in the middle of a payload and go on after the fence.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use gradwire::{
    transport::{Endpoint, Transport, tcp::Io},
    wire::{
        FrameHeader, FrameTarget, JobToken, Note, NoteKind,
        handshake::{Calling, Told},
    },
};

use crate::pair::{SERVER, WORKER, end, identity, memory, refusal};

const BYTES: usize = 8 << 20;
/// More than the read buffer, less than the payload.
const FIRST: usize = 200_000;
const UNTOUCHED: u8 = 0xEE;
const SENT: u8 = 0x11;

fn dial(address: &str, token: &JobToken) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut calling = Calling::begin(SERVER, 0, [5; 32]);
    loop {
        let count = stream.read(calling.space()).unwrap();
        match calling.received(count, &identity(WORKER, token)).unwrap() {
            Told::More => {}
            Told::Answer(hello) => stream.write_all(&hello).unwrap(),
            Told::Accepted => return stream,
        }
    }
}

fn nothing_lands_after(io: Io) {
    let token = JobToken::random().unwrap();
    let mut server = end(SERVER, &token, io).unwrap();
    let address = server.offer(WORKER).unwrap().on("tcp").unwrap().to_string();
    let mut slot = memory(&mut server, BYTES);
    slot.bytes_mut().fill(UNTOUCHED);
    let remote = server.arm(WORKER, slot).unwrap();
    server.connect(WORKER, &Endpoint::new("tcp", ""), Instant::now() + Duration::from_secs(20)).unwrap();
    let (begun, begin) = std::sync::mpsc::channel();
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let peer = std::thread::spawn(move || {
        let mut stream = dial(&address, &token);
        let note = Note { length: BYTES as u32, ..Note::new(NoteKind::Push) };
        let target = Some(FrameTarget { rkey: remote.rkey, offset: remote.offset });
        stream.write_all(&FrameHeader { target, note }.encode()).unwrap();
        stream.write_all(&[SENT; FIRST]).unwrap();
        begun.send(()).unwrap();
        wait.recv_timeout(Duration::from_secs(20)).unwrap();
        // The other end may have hung up, which is what it should do.
        let _ = stream.write_all(&vec![SENT; BYTES - FIRST]);
    });
    let (mut heard, mut is_begun, mut turns) = (Vec::new(), false, 0);
    let limit = Instant::now() + Duration::from_secs(20);
    // A few more turns after the bytes are in the sockets, so that the next receive into the slot waits for more.
    while turns < 20 {
        assert!(Instant::now() < limit, "the peer did not begin");
        server.poll(Instant::now(), &mut heard).unwrap();
        server.flush().unwrap();
        is_begun = is_begun || begin.try_recv().is_ok();
        turns += usize::from(is_begun);
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut slots = server.fence(WORKER);
    let slot = slots.pop().expect("the slot comes back at once");
    let landed = slot.bytes().iter().filter(|byte| **byte == SENT).count();
    assert!(landed > 0 && landed <= FIRST, "{landed} bytes landed before the fence");
    go_on.send(()).unwrap();
    peer.join().unwrap();
    for _ in 0..20 {
        server.poll(Instant::now(), &mut heard).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(slot.bytes().iter().filter(|byte| **byte == SENT).count(), landed, "bytes landed after the fence");
    assert!(slot.bytes()[landed..].iter().all(|byte| *byte == UNTOUCHED));
    assert!(slots.is_empty() && heard.len() == 1, "{heard:?}");
}

#[test]
fn nothing_lands_after_a_fence_in_the_middle_of_a_payload_with_epoll() {
    nothing_lands_after(Io::Epoll);
}

#[test]
fn nothing_lands_after_a_fence_in_the_middle_of_a_payload_with_io_uring() {
    if let Some(refusal) = refusal() {
        eprintln!("NOT RUN: {refusal}");
        return;
    }
    nothing_lands_after(Io::Uring);
}
