//! One place in the pipeline: its stream, the staging of one job on the device, its bounce memory on the host, and what it holds
//! until it is done.
//!
//! Invariant: a slot holds the leases of its job from the first copy that is put on a stream until its last event has happened;
//! nobody touches its bounce memory meanwhile.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::{PipelineOptions, table::Segment};
use crate::{
    Result,
    cuda::{Context, Event, Stream},
    mem::Lease,
    optim::NORM_TILE,
};

/// Arrays on the device begin at multiples of this: whole cache lines, and what 16-byte accesses need.
pub(super) const ALIGNMENT: usize = 256;

/// Launches of one job at most: a reduction, and the two halves of the norm of what it has made.
pub(super) const LAUNCHES_MAX: usize = 3;

/// Sizes of a slot's parts, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotShape {
    /// One contribution.
    pub contribution: usize,
    /// All contributions.
    pub contributions: usize,
    /// The wire copy.
    pub wire: usize,
    /// One launch's table.
    pub table: usize,
    /// One array of f32.
    pub array: usize,
    /// All arrays of a chunk that are ever brought to the host.
    pub arrays: usize,
    /// A norm's partial sums.
    pub partials: usize,
}

impl SlotShape {
    pub(super) fn new(options: &PipelineOptions) -> SlotShape {
        let elements = options.chunks.iter().copied().max().unwrap_or(0) as usize;
        let padded = |bytes: usize| bytes.next_multiple_of(ALIGNMENT);
        let contribution = padded(elements * options.gradient_dtype.size());
        let addresses = options.spans_max * options.contributions_max.max(1) * size_of::<u64>();
        let array = padded(elements * size_of::<f32>());
        SlotShape {
            contribution,
            contributions: contribution * options.contributions_max,
            wire: padded(elements * options.parameter_dtype.size()),
            table: padded(options.spans_max * size_of::<Segment>() + addresses),
            array,
            arrays: array * (1 + options.state_slots),
            partials: padded(elements.div_ceil(NORM_TILE) * size_of::<f64>()),
        }
    }

    /// Device memory: contributions, wire copy, tables, result, partial sums.
    pub(super) fn device_bytes(&self) -> usize {
        self.contributions + self.wire + LAUNCHES_MAX * self.table + ALIGNMENT + self.partials
    }

    /// Host memory: tables, result, arrays.
    pub(super) fn host_bytes(&self) -> usize {
        LAUNCHES_MAX * self.table + ALIGNMENT + self.arrays
    }
}

/// The parts of a slot's bounce memory.
pub(super) struct Bounce {
    pub tables: Lease,
    pub result: Lease,
    pub arrays: Lease,
}

/// What a job holds until it is done.
#[derive(Debug)]
pub(super) struct Held {
    pub chunk: usize,
    pub contributions: Vec<Lease>,
    pub wire: Option<Lease>,
    pub has_norm: bool,
    pub has_arrays: bool,
    pub since: Instant,
}

pub(super) struct Slot {
    /// Addresses on the device.
    pub contributions: u64,
    pub wire: u64,
    pub tables: u64,
    pub result: u64,
    pub partials: u64,
    pub bounce: Bounce,
    /// What its job is put on, in order.
    pub stream: Stream,
    pub done: Event,
    /// A wake-up has been put behind `done`.
    pub will_wake: bool,
    pub held: Option<Held>,
}

impl Slot {
    pub(super) fn new(context: &Context, shape: &SlotShape, device: u64, bounce: Lease) -> Result<Slot> {
        let (tables, rest) = bounce.split_at(LAUNCHES_MAX * shape.table);
        let (bounce_result, arrays) = rest.split_at(ALIGNMENT);
        let wire = device + shape.contributions as u64;
        let device_tables = wire + shape.wire as u64;
        let result = device_tables + (LAUNCHES_MAX * shape.table) as u64;
        Ok(Slot {
            contributions: device,
            wire,
            tables: device_tables,
            result,
            partials: result + ALIGNMENT as u64,
            bounce: Bounce { tables, result: bounce_result, arrays },
            stream: Stream::new(context)?,
            done: Event::new(context)?,
            will_wake: false,
            held: None,
        })
    }
}
