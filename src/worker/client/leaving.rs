//! A worker that is told to leave: from which clock on nothing of it counts, and what it gives up.
//!
//! Invariant: what belongs to earlier clocks is sent and answered as ever; nothing that belongs to later ones is asked for.

use super::{Client, Event, Outgoing, Request};
use crate::types::Clock;

impl Request {
    /// Whether nobody answers it: it is about what comes after this worker's time.
    pub(super) fn is_void(self, leaves_from: Option<Clock>) -> bool {
        leaves_from.is_some_and(|from| match self {
            Request::Push { clock, .. } => clock >= from,
            Request::Pull { min_version, .. } => min_version > from,
        })
    }
}

impl Client {
    /// This worker is of the job no more from `clock` on. What waits for its turn there is given back; what it has asked for there is
    /// not answered, and not asked for again over another path.
    pub fn leave(&mut self, clock: Clock) {
        self.leaves_from = Some(clock);
        let is_late = |outgoing: &Outgoing| outgoing.clock >= clock;
        for lane in 0..self.lanes.len() {
            let waiting = std::mem::take(&mut self.lanes[lane].waiting).into_vec();
            let (late, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(is_late);
            self.lanes[lane].waiting = rest.into();
            for Outgoing { chunk, gradient, .. } in late {
                self.events.extend(gradient.map(|lease| Event::GradientSent { chunk, lease }));
            }
        }
        self.events.push_back(Event::Leaves(clock));
        (0..self.lanes.len()).for_each(|lane| self.pump(lane));
    }
}
