//! Unix sockets with abstract names: listening, calling, messages with descriptors, and whose process the other end is.
//!
//! Sockets keep the bounds of messages (SOCK_SEQPACKET), so a message is here or it is not, and its descriptors with it.
//!
//! Invariant: every descriptor made or received here is closed on exec, none is lost, nothing blocks, and no send raises SIGPIPE
//! in the host process.

use std::{
    fmt,
    io::{self, IoSlice},
    mem::{MaybeUninit, size_of},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, Backlog, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, accept4, bind,
        connect, getsockopt, listen, recv, send, sendmsg, shutdown, socket, sockopt,
    },
};

use crate::{Error, Result};

const NO_BLOCK: MsgFlags = MsgFlags::MSG_NOSIGNAL.union(MsgFlags::MSG_DONTWAIT);

/// Room for the descriptors of one message: more than any message of ours has, so that one with too many is told by its number.
const DESCRIPTORS_MAX: usize = 4;

/// Whose end of a connection the other one is.
#[derive(Debug)]
pub(super) enum Owner {
    /// Our own process: its end is not to be waited for.
    Ourselves,
    /// Another process, by its number and by what tells its end.
    Process { pid: i32, pidfd: OwnedFd },
}

impl Owner {
    /// Whether it is known to have ended, all its threads.
    pub(super) fn has_ended(&self) -> bool {
        let Owner::Process { pidfd, .. } = self else { return false };
        let mut watched = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut watched, PollTimeout::ZERO), Ok(1))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Ourselves => f.write_str("our own process"),
            Owner::Process { pid, .. } => write!(f, "process {pid}"),
        }
    }
}

/// Listens under an abstract name.
pub(super) fn listen_as(name: &str) -> Result<OwnedFd> {
    let subject = || format!("the abstract socket {name}");
    let fd = open().map_err(|e| Error::os("socket", subject(), e))?;
    let address = UnixAddr::new_abstract(name.as_bytes()).map_err(|e| Error::os("sockaddr_un", subject(), e))?;
    bind(fd.as_raw_fd(), &address).map_err(|e| Error::os("bind", subject(), e))?;
    listen(&fd, Backlog::MAXALLOWABLE).map_err(|e| Error::os("listen", subject(), e))?;
    Ok(fd)
}

/// Calls who listens under an abstract name.
pub(super) fn call(name: &str) -> io::Result<OwnedFd> {
    let fd = open()?;
    connect(fd.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
    Ok(fd)
}

/// The next caller, if there is one.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    match accept4(listener.as_raw_fd(), SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC) {
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        // A caller that has gone again is no concern of ours; the listener is readable again if there is another.
        Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The process at the other end, if it is of our own user; else why nothing is said to it.
///
/// What is asked for is the process that called or, seen by the caller, that began to listen.
pub(super) fn owner(connection: &OwnedFd) -> Result<Owner, String> {
    let credentials = getsockopt(connection, sockopt::PeerCredentials).map_err(|e| format!("SO_PEERCRED: {e}"))?;
    let own = nix::unistd::geteuid().as_raw();
    if credentials.uid() != own {
        return Err(format!("it is of user {} and we are of user {own}", credentials.uid()));
    }
    match credentials.pid() {
        pid if pid <= 0 => Err("its process is in a process namespace that we cannot see".into()),
        pid if pid.unsigned_abs() == std::process::id() => Ok(Owner::Ourselves),
        pid => {
            let pidfd = getsockopt(connection, sockopt::PeerPidfd).or_else(|e| match e {
                // Linux before 6.5. The number cannot have passed to another process before the other end has answered our
                // challenge, which comes after this.
                Errno::ENOPROTOOPT => pidfd_open(pid),
                e => Err(e),
            });
            Ok(Owner::Process { pid, pidfd: pidfd.map_err(|e| format!("pidfd of its process {pid}: {e}"))? })
        }
    }
}

fn pidfd_open(pid: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the call takes two numbers and touches no memory of ours.
    let fd = unsafe { nix::libc::syscall(nix::libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: the kernel has just made this descriptor (closed on exec) for us; nobody else owns it.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends bytes as one message; false if there is no room.
pub(super) fn send_bytes(connection: &OwnedFd, bytes: &[u8]) -> io::Result<bool> {
    sent(|| send(connection.as_raw_fd(), bytes, NO_BLOCK))
}

/// Sends a message with a descriptor; false if there is no room for it now.
pub(super) fn send_descriptor(connection: &OwnedFd, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<bool> {
    let descriptors = [descriptor.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&descriptors)];
    let result = sent(|| sendmsg::<UnixAddr>(connection.as_raw_fd(), &[IoSlice::new(bytes)], &control, NO_BLOCK, None));
    match result {
        // Too many descriptors of this user are on their way (RLIMIT_NOFILE): those read first make room.
        Err(e) if e.raw_os_error() == Some(Errno::ETOOMANYREFS as i32) => Ok(false),
        result => result,
    }
}

fn sent(mut send: impl FnMut() -> nix::Result<usize>) -> io::Result<bool> {
    loop {
        match send() {
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(false),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Receives bytes of a message whose descriptors, if it has any, the kernel drops; `None` if there is none, 0 at the end.
pub(super) fn receive_bytes(connection: &OwnedFd, space: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match recv(connection.as_raw_fd(), space, MsgFlags::MSG_DONTWAIT) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
}

/// What was received.
#[derive(Debug)]
pub(super) struct Received {
    /// Bytes of the message, also those for which there was no space; 0 at the end.
    pub(super) len: usize,
    pub(super) descriptors: Vec<OwnedFd>,
    /// Descriptors were lost: the message had too many, or this process may open no more.
    pub(super) cut: bool,
}

/// Receives one message with its descriptors; `None` if there is none.
pub(super) fn receive(connection: &OwnedFd, space: &mut [u8]) -> io::Result<Option<Received>> {
    #[repr(C)]
    union Control {
        header: nix::libc::cmsghdr,
        bytes: [u8; size_of::<nix::libc::cmsghdr>() + 8 + DESCRIPTORS_MAX * size_of::<RawFd>()],
    }
    let mut control = MaybeUninit::<Control>::zeroed();
    let mut range = nix::libc::iovec { iov_base: space.as_mut_ptr().cast(), iov_len: space.len() };
    let flags = nix::libc::MSG_CMSG_CLOEXEC | nix::libc::MSG_DONTWAIT | nix::libc::MSG_TRUNC;
    loop {
        // SAFETY: all zeroes is a message header without addresses, ranges and control bytes.
        let mut message: nix::libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        (message.msg_iov, message.msg_iovlen) = (&raw mut range, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of::<Control>());
        // SAFETY: the header names `space`, which is borrowed exclusively, and `control`; both have the lengths it says and
        // outlive the call.
        let count = match Errno::result(unsafe { nix::libc::recvmsg(connection.as_raw_fd(), &mut message, flags) }) {
            Ok(count) => count as usize,
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let cut = message.msg_flags & nix::libc::MSG_CTRUNC != 0;
        return Ok(Some(Received { len: count, descriptors: descriptors_of(&message), cut }));
    }
}

/// Takes all descriptors out of a received message, even of one that was cut, so that none is lost.
fn descriptors_of(message: &nix::libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: `message` was filled by a successful recvmsg and its control bytes are still there; the macros walk the headers that
    // the kernel wrote, within the length that it left in the message.
    let mut next = unsafe { nix::libc::CMSG_FIRSTHDR(message) };
    while !next.is_null() {
        // SAFETY: as above; a header that the macros return is aligned and within the control bytes.
        let header = unsafe { &*next };
        if (header.cmsg_level, header.cmsg_type) == (nix::libc::SOL_SOCKET, nix::libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN only computes.
            let data_bytes = header.cmsg_len - unsafe { nix::libc::CMSG_LEN(0) } as usize;
            for at in 0..data_bytes / size_of::<RawFd>() {
                // SAFETY: the kernel wrote so many descriptors behind this header, made for us just now, owned by nobody else.
                descriptors.push(unsafe {
                    let data = nix::libc::CMSG_DATA(next).cast::<RawFd>();
                    OwnedFd::from_raw_fd(data.add(at).read_unaligned())
                });
            }
        }
        // SAFETY: as for the first.
        next = unsafe { nix::libc::CMSG_NXTHDR(message, next) };
    }
    descriptors
}

/// Ends our half: the other end hears of it, and its own end can still be heard.
pub(super) fn end_sending(connection: &OwnedFd) {
    // It fails only if the connection has ended already.
    let _ = shutdown(connection.as_raw_fd(), Shutdown::Write);
}

/// Ends a connection for good, even if a child process holds a copy of the socket.
pub(super) fn end(connection: &OwnedFd) {
    // It fails only if the connection has ended already.
    let _ = shutdown(connection.as_raw_fd(), Shutdown::Both);
}

fn open() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
}
