//! io_uring refused by the kernel, in each way in which it is: the transport works all the same by epoll, and who asks for io_uring is
//! told why there is none.
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
    let mut pair = Pair::new(Io::default(), Io::default());
    pair.connect();
    let (source, slot) = (memory(&mut pair.worker, 300_000), memory(&mut pair.server, 300_000));
    pair.exchange(source, slot, 7);
    let told = refusal().expect("an error to whoever asks for it");
    for part in [&format!("io_uring_setup: {errno} ("), "io_uring was asked for", "leave GRADWIRE_TCP_IO away"] {
        assert!(told.contains(part), "no `{part}` in: {told}");
    }
    println!("it works without: {told}");
}

#[test]
fn each_refusal_is_told_and_matters_to_nobody_else() {
    for (errno, told) in [(Errno::EPERM, "seccomp"), (Errno::ENOSYS, "without it"), (Errno::ENOMEM, "ulimit -l")] {
        let mut command = alone("refused::pair_under_a_filter", &format!("{errno:?}"));
        refuse_io_uring(&mut command, errno as i32);
        let text = run(&mut command);
        assert!(text.contains("it works without: ") && text.contains(told), "{text}");
    }
}
