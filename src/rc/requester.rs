//! The sending half: messages cut into packets, a window of them unacknowledged, and what is sent again when.
//!
//! Go-back-N (IBA 9.7.5.1.2): after a time-out, or when the receiver names a gap, sending continues from the oldest packet that
//! is not acknowledged. An acknowledgement is asked for with the last packet of a message, the last that the window lets out, and
//! every sixteenth (IBA leaves that to the sender, 9.7.5.1.1). Added to the specification, which leaves congestion and timing to
//! others: the window shrinks by half when something was lost and grows by one packet a round trip, and the time-out follows the
//! measured round trip (RFC 6298, with its rule not to measure what was sent twice).
//!
//! Invariant: `acknowledged <= cursor <= sent <= queued`; a timer runs whenever something sent is not acknowledged, unless the
//! receiver asked for a pause; the oldest message leaves when all of its packets are acknowledged, and never before.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{Body, Cause, Config, Counters, Immediate, NakCode, Packet, Psn, Syndrome, Target};

/// An acknowledgement is asked for at least every so many packets.
const ACK_EVERY: u64 = 16;

/// The window never shrinks below so many packets.
const WINDOW_MIN: u64 = 4;

/// What a caller posts: a write and what it says, or words alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where `target.length` bytes of the source go; `None` without payload.
    pub target: Option<Target>,
    /// Delivered when all of it is there.
    pub immediate: Immediate,
}

/// A range of a message's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which message: the number that [`super::QueuePair::post`] gave.
    pub ticket: u64,
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

/// A packet to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Its fields.
    pub packet: Packet,
    /// Its payload.
    pub payload: Option<Piece>,
}

/// A message from the queue's point of view: packets `[first, end)`, counted from the connection's first one.
#[derive(Debug)]
struct Outgoing {
    first: u64,
    end: u64,
    /// `None` for a probe, which is nobody's.
    posted: Option<(u64, Message)>,
}

#[derive(Debug)]
pub(super) struct Requester {
    start: Psn,
    queue: VecDeque<Outgoing>,
    tickets: u64,
    /// Every packet before this one is acknowledged.
    acknowledged: u64,
    /// The next to send.
    cursor: u64,
    /// Every packet before this one was sent at least once.
    sent: u64,
    queued: u64,
    window: u64,
    /// Packets acknowledged since the window last grew.
    grown: u64,
    round_trip: RoundTrip,
    /// A packet sent once, whose acknowledgement is timed.
    timed: Option<(u64, Instant)>,
    timer: Option<Instant>,
    /// The receiver asked for a pause.
    paused_until: Option<Instant>,
    retries: u32,
    not_ready: u32,
    /// When what is in flight last made progress, or began.
    stalled_since: Option<Instant>,
    /// The gap that was last gone back to: a NAK for it that comes again is the same one.
    went_back_to: Option<u64>,
}

/// Smoothed round trip and its variation (RFC 6298, section 2).
#[derive(Debug, Default)]
struct RoundTrip {
    smooth: Option<Duration>,
    variation: Duration,
}

impl RoundTrip {
    fn measured(&mut self, sample: Duration) {
        match &mut self.smooth {
            Some(smooth) => {
                self.variation = (self.variation * 3 + smooth.abs_diff(sample)) / 4;
                *smooth = (*smooth * 7 + sample) / 8;
            }
            None => (self.smooth, self.variation) = (Some(sample), sample / 2),
        }
    }

    fn timeout(&self, config: &Config, doublings: u32) -> Duration {
        // Before the first measurement, ten times the least.
        let plain = self.smooth.map_or(config.timeout_min * 10, |smooth| smooth + self.variation * 4);
        let doubled = plain.max(config.timeout_min).saturating_mul(1 << doublings.min(16));
        doubled.min(config.timeout_max)
    }
}

impl Requester {
    pub(super) fn new(config: &Config, start: Psn) -> Requester {
        Requester {
            start,
            queue: VecDeque::new(),
            tickets: 0,
            acknowledged: 0,
            cursor: 0,
            sent: 0,
            queued: 0,
            window: config.window.into(),
            grown: 0,
            round_trip: RoundTrip::default(),
            timed: None,
            timer: None,
            paused_until: None,
            retries: 0,
            not_ready: 0,
            stalled_since: None,
            went_back_to: None,
        }
    }

    /// Appends a message, or a probe; returns a message's number.
    pub(super) fn push(&mut self, config: &Config, message: Option<Message>) -> u64 {
        let length = message.and_then(|message| message.target).map_or(0, |target| target.length);
        let packets = u64::from(length.div_ceil(config.mtu).max(1));
        let ticket = self.tickets;
        self.tickets += u64::from(message.is_some());
        let posted = message.map(|message| (ticket, message));
        self.queue.push_back(Outgoing { first: self.queued, end: self.queued + packets, posted });
        self.queued += packets;
        ticket
    }

    /// Messages that are not completed.
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    /// Takes everything that is not completed.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = u64> + '_ {
        (self.timer, self.paused_until) = (None, None);
        self.queue.drain(..).filter_map(|outgoing| Some(outgoing.posted?.0))
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.paused_until.or(self.timer)
    }

    /// The next packet, if the window has room for it.
    pub(super) fn poll_transmit(
        &mut self,
        now: Instant,
        config: &Config,
        qpn: u32,
        counters: &mut Counters,
    ) -> Option<Transmit> {
        let limit = self.queued.min(self.acknowledged + self.window);
        if self.paused_until.is_some() || self.cursor >= limit {
            return None;
        }
        let place = self.cursor;
        let at = self.queue.partition_point(|outgoing| outgoing.end <= place);
        let outgoing = &self.queue[at];
        let (body, payload) = outgoing.cut(place, config.mtu);
        let is_last = place + 1 == outgoing.end || place + 1 == self.acknowledged + self.window;
        let ack_request = is_last || place % ACK_EVERY == ACK_EVERY - 1;
        self.cursor += 1;
        if place < self.sent {
            counters.resent += 1;
        } else {
            self.sent = self.cursor;
            if ack_request {
                self.timed.get_or_insert((place, now));
            }
        }
        self.stalled_since.get_or_insert(now);
        self.timer.get_or_insert(now + self.round_trip.timeout(config, self.retries));
        let packet = Packet { qpn, psn: self.start.plus(place), ack_request, body };
        Some(Transmit { packet, payload })
    }

    /// An answer came; `completed` is told of each message that it completes.
    pub(super) fn acknowledge(
        &mut self,
        now: Instant,
        config: &Config,
        (psn, syndrome): (Psn, Syndrome),
        counters: &mut Counters,
        completed: impl FnMut(u64),
    ) -> Result<(), Cause> {
        // The first packet that the receiver does not claim to have.
        let next = if syndrome == Syndrome::Ack { psn.plus(1) } else { psn };
        let ahead = next.distance_from(self.start.plus(self.acknowledged));
        // Answers of the past say nothing new; what was never sent cannot be answered (IBA 9.7.5.1.1, ghost acknowledgements).
        let Ok(ahead) = u64::try_from(ahead) else { return Ok(()) };
        let place = self.acknowledged + ahead;
        let is_about_a_packet = syndrome != Syndrome::Ack;
        if place + u64::from(is_about_a_packet) > self.sent {
            return Ok(());
        }
        if ahead > 0 {
            self.progress(now, config, place, completed);
        }
        match syndrome {
            Syndrome::Ack => {}
            Syndrome::Nak(NakCode::Sequence) if self.went_back_to == Some(place) => {}
            Syndrome::Nak(NakCode::Sequence) => {
                counters.naks += 1;
                self.go_back(place);
                self.went_back_to = Some(place);
            }
            Syndrome::NotReady(_) if self.paused_until.is_some() => {}
            Syndrome::NotReady(timer) => {
                counters.rnr_received += 1;
                self.not_ready += 1;
                if self.not_ready > config.not_ready_limit {
                    return Err(Cause::NotReady { tries: self.not_ready, over: self.stalled_for(now) });
                }
                (self.cursor, self.timer, self.timed) = (place, None, None);
                self.paused_until = Some(now + timer.duration());
            }
            Syndrome::Nak(code) => return Err(Cause::Refused(code)),
        }
        Ok(())
    }

    /// Time passed.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        config: &Config,
        counters: &mut Counters,
    ) -> Result<(), Cause> {
        if self.paused_until.is_some_and(|until| now >= until) {
            self.paused_until = None;
        }
        if self.timer.is_none_or(|timer| now < timer) {
            return Ok(());
        }
        counters.timeouts += 1;
        self.retries += 1;
        if self.retries > config.retry_limit {
            return Err(Cause::RetryExhausted { tries: self.retries, over: self.stalled_for(now) });
        }
        self.went_back_to = None;
        self.go_back(self.acknowledged);
        Ok(())
    }

    /// Everything before `place` is acknowledged, for the first time.
    fn progress(&mut self, now: Instant, config: &Config, place: u64, mut completed: impl FnMut(u64)) {
        if let Some((_, begun)) = self.timed.take_if(|(timed, _)| *timed < place) {
            self.round_trip.measured(now.saturating_duration_since(begun));
        }
        self.grown += place - self.acknowledged;
        if self.grown >= self.window {
            self.grown = 0;
            self.window = (self.window + 1).min(config.window.into());
        }
        self.acknowledged = place;
        self.cursor = self.cursor.max(place);
        (self.retries, self.not_ready, self.went_back_to, self.paused_until) = (0, 0, None, None);
        let in_flight = self.cursor > place;
        self.stalled_since = in_flight.then_some(now);
        self.timer = in_flight.then(|| now + self.round_trip.timeout(config, 0));
        while self.queue.front().is_some_and(|first| first.end <= place) {
            let first = self.queue.pop_front().expect("looked at just now");
            first.posted.into_iter().for_each(|(ticket, _)| completed(ticket));
        }
    }

    /// Sending continues from `place`; the timer starts anew with the packet there.
    fn go_back(&mut self, place: u64) {
        (self.cursor, self.timer, self.timed) = (place, None, None);
        self.window = (self.window / 2).max(WINDOW_MIN);
        self.grown = 0;
    }

    fn stalled_for(&self, now: Instant) -> Duration {
        self.stalled_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }
}

impl Outgoing {
    /// The packet at `place`: First, Middle, Last or Only, and the bytes that go with it (IBA 9.4.4).
    fn cut(&self, place: u64, mtu: u32) -> (Body, Option<Piece>) {
        let Some((ticket, Message { target, immediate })) = self.posted else { return (Body::Probe, None) };
        let Some(target) = target else { return (Body::Send(immediate), None) };
        let start = (place - self.first) as usize * mtu as usize;
        let len = (target.length as usize - start).min(mtu as usize);
        let body = match (place == self.first, place + 1 == self.end) {
            (true, true) => Body::WriteOnly(target, immediate),
            (true, false) => Body::WriteFirst(target),
            (false, false) => Body::WriteMiddle,
            (false, true) => Body::WriteLast(immediate),
        };
        (body, Some(Piece { ticket, start, len }))
    }
}
