//! A rank's transport: the drivers of the fabrics that its job allows, as the job's settings want them.
//!
//! Invariant: a fabric that the job does not name is never used, and one that it names and that cannot be had here is said so.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use super::{Fabric, JobConfig, Member, cores_from_environment};
use crate::{
    Error, Result,
    transport::{
        Driver, Fabrics, Missing,
        shm::{ShmOptions, ShmTransport},
        soft::{SoftFaults, SoftOptions, SoftTransport},
        tcp::{Io, TcpOptions, TcpTransport},
        verbs::{VerbsOptions, VerbsTransport, numa_node_of},
    },
    types::PeerId,
    wire::{JobToken, handshake::Identity, job_id},
};

/// The variable with which one rank uses only some of its job's fabrics.
const OWN_TRANSPORTS: &str = "GRADWIRE_RANK_TRANSPORTS";

/// The transport of one lane of a rank, or of a worker (lane 0). Servers listen; workers call.
///
/// # Errors
///
/// [`Error::Config`] if `GRADWIRE_RANK_TRANSPORTS` leaves nothing; why the last fabric cannot be opened, if none can.
pub fn open(member: &Member, lane: u16, listen: bool) -> Result<Fabrics> {
    let config = member.config();
    let me = PeerId { rank: member.rank(), lane };
    let identity = Identity {
        job: job_id(&config.name, &format!("{:016x}", config.instance)),
        token: member.token().clone(),
        me,
        epoch: 0,
    };
    let own = std::env::var(OWN_TRANSPORTS).ok();
    let mut drivers: Vec<Box<dyn Driver>> = Vec::new();
    let allowed = allowed(&config.transports, own.as_deref())?;
    let (mut missing, mut last_error) = (Vec::new(), None);
    for fabric in &allowed {
        match driver(*fabric, config, identity.clone(), listen.then(|| member.local_ip())) {
            Ok(driver) => drivers.push(driver),
            Err(why) if !may_be_missing(*fabric) => return Err(why),
            Err(why) => {
                tracing::info!("{me} does without {}: {why}", fabric.name());
                missing.push(Missing { fabric: fabric.name(), why: why.to_string(), better: drivers.len() });
                last_error = Some(why);
            }
        }
    }
    match last_error {
        Some(why) if drivers.is_empty() => Err(why),
        _ => Fabrics::new(me, drivers, missing),
    }
}

/// A driver; one that listens does so on the address by which this rank reached the rendezvous, unless an interface is named.
fn driver(
    fabric: Fabric,
    config: &JobConfig,
    identity: Identity,
    listen: Option<Option<IpAddr>>,
) -> Result<Box<dyn Driver>> {
    let (listen, own) = (listen.is_some(), listen.flatten());
    Ok(match fabric {
        Fabric::Shm => Box::new(ShmTransport::new(ShmOptions::new(identity))?),
        Fabric::Soft => {
            // Every end its own dice: the same ones would hit the packets of all at the same places.
            let salt = u64::from(identity.me.rank.index) << 32 | u64::from(identity.me.lane) << 1 | u64::from(listen);
            let faults = SoftFaults { seed: config.soft.seed.wrapping_add(salt), ..config.soft };
            Box::new(SoftTransport::new(SoftOptions { faults, ..SoftOptions::default() })?)
        }
        Fabric::Verbs => Box::new(verbs(identity)?),
        Fabric::Tcp => {
            let options = TcpOptions {
                listen,
                address: own.filter(|_| config.interface.is_none() && std::env::var_os("GRADWIRE_IFNAME").is_none()),
                interface: config.interface.clone(),
                ports: config.ports.map(|ports| ports.first..=ports.last),
                ..TcpOptions::new(identity)
            };
            let mut options = options.with_environment(|name| std::env::var(name).ok())?;
            if !listen && options.io == Io::Uring {
                // A worker's program and its progress thread take turns, and a ring belongs to one thread.
                tracing::debug!("{} moves its bytes by epoll: only servers use io_uring", options.identity.me);
                options.io = Io::Epoll;
            }
            Box::new(TcpTransport::new(options)?)
        }
    })
}

fn verbs(identity: Identity) -> Result<VerbsTransport> {
    let cores = cores_from_environment()?;
    // A server has a core for each lane; a worker is near any of its own.
    let core = cores.get(usize::from(identity.me.lane)).or(cores.first());
    let options = VerbsOptions { numa_node: core.and_then(|core| numa_node_of(*core)), ..VerbsOptions::new(identity) };
    VerbsTransport::new(options.with_environment(|name| std::env::var(name).ok())?)
}

/// Whether a machine may lack what the fabric needs. Devices that were asked for, by name or by number, may not be missing.
fn may_be_missing(fabric: Fabric) -> bool {
    match fabric {
        Fabric::Shm => true,
        Fabric::Verbs => {
            let is_said = |name| std::env::var_os(name).is_some_and(|text| !text.is_empty());
            !is_said("GRADWIRE_HCA") && !is_said("GRADWIRE_RAILS")
        }
        Fabric::Tcp | Fabric::Soft => false,
    }
}

/// Opens every fabric once, for a job that does not exist: what each would use, or why it cannot be had on this machine.
pub fn probe() -> Vec<(&'static str, Result<String>)> {
    [Fabric::Shm, Fabric::Verbs, Fabric::Tcp, Fabric::Soft].map(|fabric| (fabric.name(), probe_one(fabric))).into()
}

/// The same with one fabric.
///
/// # Errors
///
/// Why it cannot be had.
pub fn probe_one(fabric: Fabric) -> Result<String> {
    let identity = Identity { job: job_id("probe", ""), token: JobToken::random()?, me: PeerId::worker(0), epoch: 0 };
    Ok(match fabric {
        Fabric::Shm => {
            ShmTransport::new(ShmOptions::new(identity))?;
            "for ranks of one host and user".into()
        }
        Fabric::Verbs => {
            format!("for peers that have a device too: {}", verbs(identity)?.place())
        }
        Fabric::Soft => {
            SoftTransport::new(SoftOptions::default())?;
            "for tests, by name only (--transport soft)".into()
        }
        Fabric::Tcp => {
            let options = TcpOptions::new(identity).with_environment(|name| std::env::var(name).ok())?;
            let name = options.io.name();
            TcpTransport::new(options)?;
            format!("to any host, by {name}")
        }
    })
}

/// The job's fabrics, in its order, without those that this rank does without.
fn allowed(job: &[Fabric], own: Option<&str>) -> Result<Vec<Fabric>> {
    let Some(own) = own else { return Ok(job.to_vec()) };
    let names: Vec<&str> = own.split(',').map(str::trim).collect();
    let left: Vec<Fabric> = job.iter().copied().filter(|fabric| names.contains(&fabric.name())).collect();
    match left.is_empty() {
        true => Err(Error::Config(format!(
            "{OWN_TRANSPORTS} is `{own}`, which names none of the job's fabrics: {}",
            job.iter().map(|fabric| fabric.name()).collect::<Vec<_>>().join(",")
        ))),
        false => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_may_do_without_a_fabric_but_not_without_all() {
        assert_eq!(allowed(&[Fabric::Tcp], None).unwrap(), [Fabric::Tcp]);
        assert_eq!(allowed(&[Fabric::Tcp], Some("verbs, tcp")).unwrap(), [Fabric::Tcp]);
        assert_eq!(allowed(&[Fabric::Verbs, Fabric::Tcp], Some("verbs")).unwrap(), [Fabric::Verbs]);
        let error = allowed(&[Fabric::Tcp], Some("verbs")).unwrap_err().to_string();
        assert!(error.contains(OWN_TRANSPORTS) && error.contains("verbs") && error.contains("tcp"), "{error}");
    }
}
