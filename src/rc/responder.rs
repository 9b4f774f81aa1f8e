//! The receiving half: what is next in the sequence is applied, everything else is answered and not applied.
//!
//! A request from before the expected one is a duplicate: acknowledged again, never executed again (IBA 9.7.5.1.4; reads and
//! atomics, which a duplicate does repeat, are not here). One from after it means that a packet is missing: one NAK is sent for
//! the gap and none until it is filled (IBA 9.7.5.2.1). Answers are coalesced: only the newest that is due is sent, which says
//! what all the others would have said (IBA 9.7.5.1.3).
//!
//! Invariant: `expected` moves by one packet, when that packet has been applied; a completion is given only with all the bytes of
//! its message in place.

use super::{Body, Counters, Immediate, NakCode, Packet, Psn, RnrTimer, Syndrome, Target};

/// Where requests take effect: the memory, and the program's queue of completions.
pub trait Receiver {
    /// Whether there is room for one more completion (in verbs' words: a posted receive).
    fn is_ready(&self) -> bool;

    /// A write begins. An error is why its bytes may not land; it ends the connection.
    fn begin(&mut self, target: &Target) -> Result<(), String>;

    /// The bytes from `at` on of the write that has begun.
    fn place(&mut self, at: usize, payload: &[u8]);

    /// A message is complete; with a target, it is the one that has begun. An error is why it makes no sense.
    fn complete(&mut self, target: Option<&Target>, immediate: &Immediate) -> Result<(), String>;
}

/// A request that ends the connection.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: NakCode,
    pub(super) reason: String,
}

#[derive(Debug)]
pub(super) struct Responder {
    expected: Psn,
    /// The write that is under way, and how much of it is here.
    write: Option<(Target, usize)>,
    /// The sender knows which packet we wait for; until that one comes, nothing more is said about those behind it.
    is_told: bool,
    answer: Option<Syndrome>,
}

impl Responder {
    pub(super) fn new(start: Psn) -> Responder {
        Responder { expected: start, write: None, is_told: false, answer: None }
    }

    pub(super) fn handle(
        &mut self,
        packet: &Packet,
        payload: &[u8],
        not_ready_timer: RnrTimer,
        receiver: &mut dyn Receiver,
        counters: &mut Counters,
    ) -> Result<(), Refusal> {
        let ahead = packet.psn.distance_from(self.expected);
        if ahead < 0 {
            counters.duplicates += 1;
            self.answer.get_or_insert(Syndrome::Ack);
            return Ok(());
        }
        if ahead > 0 {
            counters.out_of_order += 1;
            if !std::mem::replace(&mut self.is_told, true) {
                self.answer = Some(Syndrome::Nak(NakCode::Sequence));
            }
            return Ok(());
        }
        let completes = matches!(packet.body, Body::Send(_) | Body::WriteLast(_) | Body::WriteOnly(..));
        if completes && !receiver.is_ready() {
            counters.rnr_sent += 1;
            self.is_told = true;
            self.answer = Some(Syndrome::NotReady(not_ready_timer));
            return Ok(());
        }
        self.apply(packet, payload, receiver)?;
        self.expected = self.expected.plus(1);
        self.is_told = false;
        if packet.ack_request || self.answer.is_some() {
            // An answer about a gap that is filled now, or about an earlier packet, is said by this one.
            self.answer = Some(Syndrome::Ack);
        }
        Ok(())
    }

    /// The answer that is due: all that it says is as of now.
    pub(super) fn answer(&mut self) -> Option<(Psn, Syndrome)> {
        let syndrome = self.answer.take()?;
        let psn = if syndrome == Syndrome::Ack { self.expected.before() } else { self.expected };
        Some((psn, syndrome))
    }

    /// The packet that ended the connection.
    pub(super) fn expected(&self) -> Psn {
        self.expected
    }

    /// Opcodes must follow each other as First, Middle …, Last, or Only (IBA 9.7.4.1), and their bytes add up to the length.
    fn apply(&mut self, packet: &Packet, payload: &[u8], receiver: &mut dyn Receiver) -> Result<(), Refusal> {
        let no_access = |why: String| Refusal {
            code: NakCode::RemoteAccess,
            reason: format!("it sent a write that may not land: {why}"),
        };
        let invalid = |reason: String| Refusal { code: NakCode::InvalidRequest, reason };
        match (&packet.body, self.write) {
            (Body::Probe, None) => {}
            (Body::Send(immediate), None) => receiver.complete(None, immediate).map_err(invalid)?,
            (Body::WriteOnly(target, immediate), None) => {
                receiver.begin(target).map_err(no_access)?;
                receiver.place(0, payload);
                receiver.complete(Some(target), immediate).map_err(invalid)?;
            }
            (Body::WriteFirst(target), None) => {
                receiver.begin(target).map_err(no_access)?;
                receiver.place(0, payload);
                self.write = Some((*target, payload.len()));
            }
            (Body::WriteMiddle, Some((target, at))) if at + payload.len() < target.length as usize => {
                receiver.place(at, payload);
                self.write = Some((target, at + payload.len()));
            }
            (Body::WriteLast(immediate), Some((target, at))) if at + payload.len() == target.length as usize => {
                receiver.place(at, payload);
                self.write = None;
                receiver.complete(Some(&target), immediate).map_err(invalid)?;
            }
            _ => return Err(invalid("it sent a packet of a write out of place, or of a wrong length".into())),
        }
        Ok(())
    }
}
