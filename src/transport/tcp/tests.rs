//! Every flavour of ring under a whole transport: payloads, wake-ups, and memory that the kernel keeps for longer than it should.
//!
//! Invariant: where the kernel refuses io_uring or a flavour, its tests say so loudly and are not run.
#![forbid(unsafe_code)]

use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{ring::Flavour, *};
use crate::{
    mem::RegionOptions,
    wire::{JobToken, Note, NoteKind, handshake::Identity},
};

const SERVER: PeerId = PeerId::server(0, 0);
const WORKER: PeerId = PeerId::worker(0);
const BYTES: usize = 32 << 20;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// An end that is to have a ring of this flavour, which its thread makes: see [`adopt`].
fn end(me: PeerId, token: &JobToken) -> TcpTransport {
    let identity = Identity { job: 1, token: token.clone(), me, epoch: 0 };
    let options = TcpOptions { listen: me == SERVER, io: Io::Epoll, ..TcpOptions::new(identity) };
    TcpTransport::new(options).unwrap()
}

/// Gives an end its ring, on the thread that uses it.
fn adopt(end: &mut TcpTransport, flavour: Flavour) {
    end.ring = Some(Ring::of(flavour, end.poller.fd()).unwrap());
}

fn flavours() -> impl Iterator<Item = Flavour> {
    let poller = Poller::new().unwrap();
    let flavours = [Flavour::Deferred, Flavour::Cooperative, Flavour::Plain].into_iter();
    flavours.filter(move |flavour| match Ring::of(*flavour, poller.fd()) {
        Ok(_) => true,
        Err(trouble) => {
            eprintln!("NOT RUN with {flavour:?}: {trouble:?}");
            false
        }
    })
}

fn memory(end: &mut TcpTransport) -> Lease {
    let (region, lease) = Region::allocate(BYTES, &RegionOptions::default()).unwrap();
    end.register(&region).unwrap();
    lease.split_at(BYTES).0
}

/// Sleeps as a waiter does: until one of the ends is to be polled.
fn sleep(ends: &mut [&mut TcpTransport], limit: Instant) {
    let mut until = limit;
    for end in ends.iter_mut() {
        if end.arm_wakeup().unwrap() == Armed::Ready {
            return;
        }
        until = until.min(end.next_deadline().unwrap_or(limit));
    }
    let mut fds: Vec<PollFd<'_>> = ends.iter().map(|end| PollFd::new(end.fd(), PollFlags::POLLIN)).collect();
    let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
    // Interrupted is as good as woken.
    let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap());
    assert!(Instant::now() < limit, "a wake-up was lost");
}

/// Sleeps until the end has something to tell.
fn hear(end: &mut TcpTransport, heard: &mut Vec<Completion>) {
    let limit = soon();
    while heard.is_empty() {
        end.flush().unwrap();
        sleep(&mut [&mut *end], limit);
        end.poll(Instant::now(), heard).unwrap();
    }
}

/// Says a note, and answers each with the next, until `turns` were heard. Payloads go along now and then.
fn converse(mut end: TcpTransport, flavour: Flavour, peer: PeerId, remote: Option<Endpoint>, turns: u64) {
    adopt(&mut end, flavour);
    let mut heard = Vec::new();
    end.connect(peer, &remote.clone().unwrap_or(Endpoint::new("tcp", "")), soon()).unwrap();
    hear(&mut end, &mut heard);
    assert!(matches!(heard.pop(), Some(Completion::Connected { .. })));
    let note = |clock| Note { clock, ..Note::new(NoteKind::Heartbeat) };
    if remote.is_some() {
        end.post(WorkRequest { id: 0, peer, note: note(0), payload: None }).unwrap();
    }
    let mut last = 0;
    while last + 1 < turns {
        hear(&mut end, &mut heard);
        for completion in heard.drain(..) {
            match completion {
                Completion::Arrived { note: said, .. } => {
                    last = said.clock;
                    let answer = WorkRequest { id: last, peer, note: note(last + 1), payload: None };
                    end.post(answer).unwrap();
                }
                Completion::Sent { .. } => {}
                Completion::Broken { .. } if last + 2 >= turns => return,
                other => panic!("{other:?} after {last}"),
            }
        }
    }
    end.flush().unwrap();
}

#[test]
fn two_threads_that_sleep_between_notes_lose_no_wake_up() {
    for flavour in flavours() {
        let token = JobToken::random().unwrap();
        let (mut server, worker) = (end(SERVER, &token), end(WORKER, &token));
        let endpoint = server.offer(WORKER).unwrap();
        let other = thread::spawn(move || converse(server, flavour, WORKER, None, 4000));
        converse(worker, flavour, SERVER, Some(endpoint), 4000);
        other.join().unwrap();
    }
}

/// A pair on this thread, connected.
fn pair(flavour: Flavour) -> (TcpTransport, TcpTransport) {
    let token = JobToken::random().unwrap();
    let (mut server, mut worker) = (end(SERVER, &token), end(WORKER, &token));
    [&mut server, &mut worker].into_iter().for_each(|end| adopt(end, flavour));
    let endpoint = server.offer(WORKER).unwrap();
    server.connect(WORKER, &Endpoint::new("tcp", ""), soon()).unwrap();
    worker.connect(SERVER, &endpoint, soon()).unwrap();
    let heard = drive(&mut server, &mut worker, 2);
    assert!(heard.iter().all(|heard| matches!(heard, Completion::Connected { .. })), "{heard:?}");
    (server, worker)
}

/// Sleeps and polls until there are so many completions.
fn drive(server: &mut TcpTransport, worker: &mut TcpTransport, count: usize) -> Vec<Completion> {
    let (mut heard, limit) = (Vec::new(), soon());
    while heard.len() < count {
        for end in [&mut *server, &mut *worker] {
            end.flush().unwrap();
            end.poll(Instant::now(), &mut heard).unwrap();
        }
        if heard.len() < count {
            sleep(&mut [&mut *server, &mut *worker], limit);
        }
    }
    heard
}

fn push(server: &mut TcpTransport, worker: &mut TcpTransport) {
    let (slot, mut source) = (memory(server), memory(worker));
    source.bytes_mut().fill(7);
    let slot = server.arm(WORKER, slot).unwrap();
    let note = Note { length: BYTES as u32, ..Note::new(NoteKind::Push) };
    worker.post(WorkRequest { id: 1, peer: SERVER, note, payload: Some((source.freeze(), slot)) }).unwrap();
}

#[test]
fn every_flavour_carries_a_payload() {
    for flavour in flavours() {
        let (mut server, mut worker) = pair(flavour);
        push(&mut server, &mut worker);
        for heard in drive(&mut server, &mut worker, 2) {
            match heard {
                Completion::Arrived { lease: Some(lease), .. } => assert!(lease.bytes().iter().all(|byte| *byte == 7)),
                Completion::Sent { source, .. } => drop(source.unwrap().thaw().unwrap()),
                other => panic!("{flavour:?}: {other:?}"),
            }
        }
    }
}

/// A ring belongs to its thread: a fence on another one cannot have the kernel let go, as if the kernel did not want to.
#[test]
fn what_the_kernel_keeps_beyond_a_fence_is_withheld_and_released_later() {
    if !flavours().any(|flavour| flavour == Flavour::Deferred) {
        return;
    }
    let (mut server, mut worker) = pair(Flavour::Deferred);
    push(&mut server, &mut worker);
    // The worker sends what its socket takes and then nothing more, so that in the end a receive into the slot waits.
    worker.flush().unwrap();
    let mut heard = Vec::new();
    for _ in 0..50 {
        server.poll(Instant::now(), &mut heard).unwrap();
        server.flush().unwrap();
        thread::sleep(Duration::from_millis(1));
    }
    assert!(heard.is_empty(), "{BYTES} bytes fit into a socket: {heard:?}");
    let fenced = thread::scope(|scope| scope.spawn(|| server.fence(WORKER)).join().unwrap());
    assert!(fenced.is_empty(), "the kernel may still write to it: {fenced:?}");
    let limit = soon();
    while heard.is_empty() {
        assert!(Instant::now() < limit, "what was withheld is not released");
        server.poll(Instant::now(), &mut heard).unwrap();
    }
    match &heard[..] {
        [Completion::Released { peer: WORKER, slots }] => assert_eq!(slots.len(), 1),
        other => panic!("{other:?}"),
    }
    // The name is free for a new path.
    server.connect(WORKER, &Endpoint::new("tcp", ""), soon()).unwrap();
}

#[test]
fn a_transport_that_is_dropped_on_another_thread_leaves_its_memory_to_the_kernel() {
    for flavour in flavours() {
        let (server, mut worker) = pair(flavour);
        thread::spawn(move || drop(server)).join().unwrap();
        let mut heard = Vec::new();
        let limit = soon();
        while heard.is_empty() {
            assert!(Instant::now() < limit, "the other end does not notice");
            worker.poll(Instant::now(), &mut heard).unwrap();
        }
        assert!(matches!(heard[..], [Completion::Broken { .. }]), "{heard:?}");
    }
}
