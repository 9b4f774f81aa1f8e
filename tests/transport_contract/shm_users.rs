//! Shared memory and other users of the host: neither called nor calling are they told a word.
//!
//! Invariant: what needs root is skipped aloud without it.

use std::{
    os::{fd::AsRawFd, unix::process::CommandExt},
    time::{Duration, Instant},
};

use gradwire::{
    transport::{Completion, Endpoint, Transport},
    wire::JobToken,
};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, connect, listen, recv, socket,
};

use crate::shm_processes::{PATIENCE, Process, SERVER, WORKER, address, end};

const NOBODY: u32 = 65534;

fn socket_name(address: &str) -> UnixAddr {
    UnixAddr::new_abstract(format!("gradwire-{}", address.rsplit('/').next().unwrap()).as_bytes()).unwrap()
}

fn may_change_user(test: &str) -> bool {
    let may = nix::unistd::geteuid().is_root();
    if !may {
        eprintln!("SKIPPED {test}: only root can start a process of another user");
    }
    may
}

#[test]
fn a_caller_of_another_user_is_hung_up_on_before_a_word() {
    if !may_change_user("a_caller_of_another_user_is_hung_up_on_before_a_word") {
        return;
    }
    let token = JobToken::random().unwrap();
    let mut server = end(&token, SERVER);
    let here = address(&mut server);
    let mut caller = Process::start("caller of another user", &token, &here, |command| {
        command.uid(NOBODY);
    });
    caller.says("CALLING");
    let mut heard = Vec::new();
    let limit = Instant::now() + PATIENCE;
    while caller.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < limit);
        server.poll(Instant::now(), &mut heard).unwrap();
    }
    assert_eq!(caller.says("HEARD "), "0 bytes");
    assert!(heard.is_empty(), "{heard:?}");
}

pub fn play_foreign_caller(remote: &str) {
    println!("CALLING");
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    connect(socket.as_raw_fd(), &socket_name(remote)).unwrap();
    let count = recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::empty()).unwrap();
    println!("HEARD {count} bytes");
}

#[test]
fn a_listener_of_another_user_is_told_nothing() {
    if !may_change_user("a_listener_of_another_user_is_told_nothing") {
        return;
    }
    let token = JobToken::random().unwrap();
    let mut worker = end(&token, WORKER);
    let own = address(&mut worker);
    let mut listener = Process::start("listener of another user", &token, "", |command| {
        command.uid(NOBODY);
    });
    // An impostor under the name of a server that has gone.
    let (place, _) = own.rsplit_once('/').unwrap();
    let forged = format!("{place}/{}", listener.says("LISTENING "));
    worker.connect(SERVER, &Endpoint::new("shm", forged), Instant::now() + Duration::from_millis(300)).unwrap();
    let mut heard = Vec::new();
    while heard.is_empty() {
        worker.poll(Instant::now(), &mut heard).unwrap();
        std::thread::yield_now();
    }
    assert!(
        matches!(&heard[..], [Completion::Broken { error, .. }]
        if error.to_string().contains(&format!("user {NOBODY}"))),
        "{heard:?}"
    );
    assert_eq!(listener.says("HEARD "), "0 bytes");
}

pub fn play_foreign_listener() {
    let name = format!("{:032x}", u128::from(std::process::id()));
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    bind(socket.as_raw_fd(), &socket_name(&name)).unwrap();
    listen(&socket, Backlog::new(8).unwrap()).unwrap();
    println!("LISTENING {name}");
    let limit = Instant::now() + PATIENCE;
    while Instant::now() < limit {
        let caller = accept(socket.as_raw_fd()).unwrap();
        // An ordinary listener would speak first.
        let hello = recv(caller, &mut [0; 256], MsgFlags::empty()).unwrap();
        println!("HEARD {hello} bytes");
    }
}
