//! Two hundred lives of a path, each ended in the middle of a payload, leave no descriptor and no memory behind.

use gradwire::{
    transport::{Completion, Transport, WorkRequest, tcp::Io},
    wire::{Note, NoteKind},
};

use crate::{
    ALONE, allocator, alone,
    pair::{Pair, SERVER, WORKER, memory, refusal},
    run,
};

const CYCLES: usize = 200;
const BYTES: usize = 4 << 20;

/// A leaked path would cost its read buffer each time: 3 MiB in all.
const GROWTH_MAX: usize = 64 << 10;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Not a test by itself: the cycles, in a process that does nothing else.
#[test]
fn cycles() {
    let Ok(io) = std::env::var(ALONE) else { return };
    let io = if io == "uring" { Io::Uring } else { Io::Epoll };
    let mut pair = Pair::new(io, io);
    let (mut source, mut slot) = (memory(&mut pair.worker, BYTES), memory(&mut pair.server, BYTES));
    let mut before = (0, 0);
    for turn in 0..CYCLES + 20 {
        if turn == 20 {
            before = (descriptors(), allocator::in_use());
        }
        pair.connect();
        let remote = pair.server.arm(WORKER, slot).unwrap();
        let note = Note { length: BYTES as u32, ..Note::new(NoteKind::Push) };
        let payload = Some((source.freeze(), remote));
        pair.worker.post(WorkRequest { id: 1, peer: SERVER, note, payload }).unwrap();
        pair.worker.flush().unwrap();
        pair.server.poll(std::time::Instant::now(), &mut pair.heard).unwrap();
        assert!(pair.heard.is_empty(), "4 MiB do not arrive in one poll: {:?}", pair.heard);
        let mut slots = pair.server.fence(WORKER);
        slot = slots.pop().expect("the slot comes back at once");
        pair.worker.fence(SERVER);
        pair.until("the request to fail", |heard| !heard.is_empty());
        source = match pair.heard.pop() {
            Some(Completion::Failed { source: Some(source), .. }) => source.thaw().unwrap(),
            other => panic!("{other:?}"),
        };
        assert!(pair.heard.is_empty() && slots.is_empty(), "{:?}", pair.heard);
    }
    let after = (descriptors(), allocator::in_use());
    assert_eq!(before.0, after.0, "descriptors");
    assert!(after.1 <= before.1 + GROWTH_MAX, "{} bytes were in use before, {} after", before.1, after.1);
    println!("the cycles left nothing");
}

#[test]
fn two_hundred_cycles_leave_nothing_with_epoll() {
    assert!(run(&mut alone("cycles::cycles", "epoll")).contains("left nothing"));
}

#[test]
fn two_hundred_cycles_leave_nothing_with_io_uring() {
    if let Some(refusal) = refusal() {
        eprintln!("NOT RUN: {refusal}");
        return;
    }
    assert!(run(&mut alone("cycles::cycles", "uring")).contains("left nothing"));
}
