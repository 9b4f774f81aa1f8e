//! io_uring refused by the kernel, in each way in which it is: the transport works all the same, and says why it uses epoll.
//!
//! Invariant: the refusals are real; they come from a seccomp filter.

use gradwire::transport::tcp::Io;
use nix::errno::Errno;

use crate::{
    ALONE, alone,
    pair::{Pair, memory, refusal},
    run,
    seccomp::refuse_io_uring,
};

/// Not a test by itself: a pair in a process to which io_uring is refused.
#[test]
fn pair_under_a_filter() {
    let Ok(errno) = std::env::var(ALONE) else { return };
    let mut pair = Pair::new(Io::Auto, Io::Auto);
    pair.connect();
    let (source, slot) = (memory(&mut pair.worker, 300_000), memory(&mut pair.server, 300_000));
    pair.exchange(source, slot, 7);
    for end in [&pair.server, &pair.worker] {
        let choice = end.io();
        assert_eq!(choice.name, "epoll", "{choice}");
        assert!(choice.reason.starts_with(&format!("io_uring_setup: {errno} (")), "{choice}");
    }
    let told = refusal().expect("an error to whoever insists");
    for part in [&format!("io_uring_setup: {errno}"), "io_uring was asked for", "GRADWIRE_TCP_IO=auto"] {
        assert!(told.contains(part), "no `{part}` in: {told}");
    }
    println!("it works: {}", pair.server.io());
}

#[test]
fn each_refusal_leads_to_epoll_and_is_told() {
    for (errno, told) in [(Errno::EPERM, "seccomp"), (Errno::ENOSYS, "without it"), (Errno::ENOMEM, "ulimit -l")] {
        let mut command = alone("refused::pair_under_a_filter", &format!("{errno:?}"));
        refuse_io_uring(&mut command, errno as i32);
        let text = run(&mut command);
        assert!(text.contains("it works: epoll: io_uring_setup") && text.contains(told), "{text}");
    }
}

#[test]
fn who_asks_gets_what_was_asked_for() {
    let pair = Pair::new(Io::Epoll, Io::Epoll);
    assert_eq!(pair.server.io().name, "epoll");
    assert!(pair.server.io().reason.contains("asked for"));
    if let Some(refusal) = refusal() {
        eprintln!("NOT RUN: {refusal}");
        return;
    }
    let mut pair = Pair::new(Io::Uring, Io::Auto);
    assert_eq!(pair.server.io().name, "io_uring");
    assert!(pair.worker.io().reason.contains("measure"), "{}", pair.worker.io());
    pair.connect();
}
