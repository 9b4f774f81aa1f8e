//! Where the processes of a job find each other: a port kept by the launcher, at which every caller proves that it holds the
//! job's token, takes its seat, and learns the job's view; later it carries reports and commands.
//!
//! Invariant: nothing that comes in on the port stops the job unless it comes from a rank that has proved itself; a refused
//! caller is told why and changes nothing.
#![forbid(unsafe_code)]

mod auth;
mod checkpoints;
mod connection;
mod control;
mod handle;
mod hub;
mod line;
mod member;
#[cfg(test)]
mod members_tests;
mod message;
mod notice;
mod notify;
mod peer;
mod recorder;
mod roster;
#[cfg(test)]
mod roster_tests;
#[cfg(test)]
mod scaling_tests;
mod shards;
mod swaps;
#[cfg(test)]
mod tenures_tests;
#[cfg(test)]
mod tests;
mod waiting;

use std::{
    fmt,
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    str::FromStr,
    time::{Duration, Instant},
};

pub(crate) use control::{ControlAnswer, control, control_with};
pub use handle::{CheckpointSink, NoticeSink, Order, Rendezvous, RendezvousOptions};
pub(crate) use line::LineBuffer;
pub use line::decode_lines;
pub use member::{Commands, Member, Reporter};
pub use message::{Command, Control, Offer, RankStatus, Report, Status, VERSION, View};
pub use notice::{Departure, Notice};
pub use peer::token_from_environment;
pub use roster::WorkerTurn;
pub use shards::{Scaling, ShardStatus};

use crate::{Error, Result, types::Rank};

/// How long one address is tried where a rendezvous is waited for.
const CONNECT_TIME: Duration = Duration::from_secs(2);

/// Time between two tries.
const PAUSE: Duration = Duration::from_millis(100);

/// Where a rendezvous is: `host:port`, or `[address]:port` for IPv6.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(String);

impl Address {
    /// What the name stands for at this moment.
    fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let found: Vec<SocketAddr> =
            self.0.to_socket_addrs().map_err(|e| Error::os("getaddrinfo", self.to_string(), e))?.collect();
        if found.is_empty() {
            return Err(Error::Config(format!("the rendezvous address `{self}` stands for no address")));
        }
        Ok(found)
    }
}

impl Address {
    /// Where somebody on the host of this address listens for it: on that address if it is one of numbers, else on every one.
    pub fn listen_at(&self) -> SocketAddr {
        let port = self.0.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or_default();
        self.0.parse().unwrap_or(SocketAddr::from((std::net::Ipv4Addr::UNSPECIFIED, port)))
    }

    /// Waits until somebody answers there: the host's name may not be known yet, or nobody may listen yet.
    ///
    /// # Errors
    ///
    /// Why nobody could be reached after `time`.
    pub fn wait_for(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            let outcome = self.resolve().and_then(|all| {
                let tried = all.iter().map(|address| TcpStream::connect_timeout(address, CONNECT_TIME));
                let failed = |e| Error::os("connect", format!("the rendezvous at {self}"), e);
                // There is at least one address.
                tried.reduce(Result::or).map_or(Ok(()), |outcome| outcome.map(drop).map_err(failed))
            });
            if outcome.is_ok() || Instant::now() >= until {
                return outcome;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Address> {
        let text = text.trim();
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => {
                Ok(Address(text.into()))
            }
            _ => Err(Error::Config(format!("`{text}` is no rendezvous address: write host:port or [address]:port"))),
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Address {
        Address(address.to_string())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// "worker 1 has", "worker 1 and worker 2 have", and no more than eight of them by name.
fn names(ranks: impl Iterator<Item = Rank>) -> String {
    let all: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
    let shown = all.len().min(8);
    match all.len() {
        0 | 1 => format!("{} has", all.concat()),
        n if n > shown => format!("{} and {} more have", all[..shown].join(", "), n - shown),
        n => format!("{} and {} have", all[..n - 1].join(", "), all[n - 1]),
    }
}

fn seconds(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}
