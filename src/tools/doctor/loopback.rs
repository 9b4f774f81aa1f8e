//! Each fabric between two threads of this process.
//!
//! Invariant: a fabric that cannot be had is reported with its reason, and the others are tried all the same.

use std::{
    thread,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::exchange::{End, Figures};
use crate::{
    Error, Result,
    transport::{
        Driver, Endpoint,
        shm::{ShmOptions, ShmTransport},
        soft::{SoftOptions, SoftTransport},
        tcp::{TcpOptions, TcpTransport},
        verbs::{VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{JobToken, handshake::Identity, job_id},
};

const CONNECT_TIME: Duration = Duration::from_secs(10);

type Ends = [Box<dyn Driver>; 2];

/// Makes two ends under the names given.
type Open = fn([Identity; 2]) -> Result<Ends>;

/// How to make two ends of each fabric that can reach each other; the first may listen. A new driver is a line here.
const FABRICS: [(&str, Open); 4] = [("shm", shm), ("verbs", verbs), ("tcp", tcp), ("soft", soft)];

/// Where Linux lists RDMA devices.
const RDMA_DEVICES: &str = "/sys/class/infiniband";

fn shm([first, second]: [Identity; 2]) -> Result<Ends> {
    let end = |identity| ShmTransport::new(ShmOptions::new(identity));
    Ok([Box::new(end(first)?), Box::new(end(second)?)])
}

fn verbs([first, second]: [Identity; 2]) -> Result<Ends> {
    let end = |identity| -> Result<VerbsTransport> {
        VerbsTransport::new(VerbsOptions::new(identity).with_environment(|name| std::env::var(name).ok())?)
    };
    Ok([Box::new(end(first)?), Box::new(end(second)?)])
}

fn soft(_: [Identity; 2]) -> Result<Ends> {
    let end = || SoftTransport::new(SoftOptions::default());
    Ok([Box::new(end()?), Box::new(end()?)])
}

fn tcp([first, second]: [Identity; 2]) -> Result<Ends> {
    let calling = TcpOptions { listen: false, ..TcpOptions::new(second) };
    Ok([Box::new(TcpTransport::new(TcpOptions::new(first))?), Box::new(TcpTransport::new(calling)?)])
}

/// What became of a fabric.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// Its name.
    pub fabric: &'static str,
    /// What it reached.
    #[serde(flatten)]
    pub figures: Option<Figures>,
    /// Why it did not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Tries every fabric on this machine alone, verbs only where there is a device: that there is none is told elsewhere.
pub fn try_fabrics() -> Vec<Tried> {
    let has_device = std::fs::read_dir(RDMA_DEVICES).is_ok_and(|mut devices| devices.next().is_some());
    let there = FABRICS.iter().filter(|(fabric, _)| *fabric != "verbs" || has_device);
    let tried = there.map(|(fabric, open)| match try_one(*open) {
        Ok(figures) => Tried { fabric, figures: Some(figures), error: None },
        Err(error) => Tried { fabric, figures: None, error: Some(error.to_string()) },
    });
    tried.collect()
}

fn try_one(open: Open) -> Result<Figures> {
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    let token = JobToken::random()?;
    let identity = |me| Identity { job: job_id("doctor", "loopback"), token: token.clone(), me, epoch: 0 };
    let [mut first, mut second] = open([identity(server), identity(worker)])?;
    let (to_worker, to_server) = (first.offer(worker)?, second.offer(server)?);
    let deadline = Instant::now() + CONNECT_TIME;
    thread::scope(|scope| {
        let answering = scope.spawn(move || {
            let mut end = joined(&mut *first, worker, &to_server, deadline)?;
            end.answer()
        });
        let measured = joined(&mut *second, server, &to_worker, deadline).and_then(|mut end| end.measure());
        // Hanging up ends the other thread, whatever it waits for.
        drop(second);
        let answered = answering.join().map_err(|_| Error::JobFailed("the answering thread panicked".into()))?;
        let figures = measured?;
        answered.map(|()| figures)
    })
}

fn joined<'a>(driver: &'a mut dyn Driver, peer: PeerId, remote: &Endpoint, deadline: Instant) -> Result<End<'a>> {
    let mut end = End::new(driver, peer)?;
    end.connect(remote, deadline)?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fabric_gives_figures() {
        for tried in try_fabrics() {
            let figures = tried.figures.unwrap_or_else(|| panic!("{}: {:?}", tried.fabric, tried.error));
            assert!(figures.latency_us_p50 > 0.0 && figures.latency_us_p99 >= figures.latency_us_p50, "{figures:?}");
            assert!(figures.bytes_per_s > 0.0, "{figures:?}");
        }
    }

    #[test]
    fn a_fabric_that_cannot_be_opened_says_why() {
        let error = try_one(|_| Err(Error::Config("no such thing here".into()))).unwrap_err().to_string();
        assert_eq!(error, "no such thing here");
    }
}
