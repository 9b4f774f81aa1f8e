//! What a process shows of its work: the metrics that are asked for, and the timeline that is sent to the launcher at the end.
//!
//! Invariant: where neither is wanted nothing is started, nothing is allocated, and no thread has a recorder.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{JobConfig, Member, MetricsEndpoint, Recorder, Report, TimelinePart, Trace, metrics::rank_text};
use crate::{
    Result,
    observe::{LaneMeter, MARKS_MAX, Meters, Ring},
    types::{PeerId, Rank},
};

/// A process' meters and rings.
#[derive(Debug)]
pub struct Observation {
    rank: Rank,
    config: JobConfig,
    meters: Option<Arc<Meters>>,
    rings: Vec<(u16, Arc<Ring>)>,
    /// Open as long as the process works.
    endpoint: Option<MetricsEndpoint>,
}

impl Observation {
    /// Opens what the job's settings ask for; the launcher is told where metrics are read.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Config`] if the port for metrics cannot be had.
    pub fn start(member: &Member) -> Result<Observation> {
        let (rank, config) = (member.rank(), member.config().clone());
        let mut observation = Observation { rank, config, meters: None, rings: Vec::new(), endpoint: None };
        if let Some(address) = observation.config.metrics {
            let meters = Arc::new(Meters::default());
            let (config, read) = (observation.config.clone(), meters.clone());
            let address = address.of(Some(rank), &config)?;
            let endpoint = MetricsEndpoint::start(address, move || rank_text(&config, rank, read.clone()))?;
            member.reporter().report(Report::MetricsAt { address: endpoint.address() })?;
            (observation.meters, observation.endpoint) = (Some(meters), Some(endpoint));
        }
        Ok(observation)
    }

    /// A meter and a recorder for a thread that has a transport.
    pub fn recorder(&mut self, lane: u16) -> (Option<Arc<LaneMeter>>, Option<Box<Recorder>>) {
        let meter = self.meters.as_ref().map(|meters| meters.lane(lane));
        (meter.clone(), Recorder::new(meter, self.trace(lane)))
    }

    /// A ring for a thread's marks, if a timeline is wanted.
    pub fn trace(&mut self, lane: u16) -> Option<Trace> {
        let steps = self.config.timeline?;
        let ring = Arc::new(Ring::new(MARKS_MAX));
        self.rings.push((lane, ring.clone()));
        Some(Trace { steps, ring, me: PeerId { rank: self.rank, lane } })
    }

    /// The process has allocated so many bytes of a kind.
    pub fn add_memory(&self, kind: &'static str, bytes: u64) {
        if let Some(meters) = &self.meters {
            meters.add_memory(kind, bytes);
        }
    }

    /// Sends the marks of all threads to the launcher, once they write no more.
    ///
    /// # Errors
    ///
    /// [`crate::Error::JobFailed`] when the launcher is gone.
    pub fn send_timeline(&self, member: &Member) -> Result<()> {
        if self.rings.is_empty() {
            return Ok(());
        }
        let (clock, reporter) = (member.clock_offset()?, member.reporter());
        let parts = self.rings.iter().flat_map(|(lane, ring)| TimelinePart::of(*lane, clock, ring));
        parts.into_iter().try_for_each(|part| reporter.report(Report::Timeline(part)))
    }
}
