//! A queue pair: its states, and the two halves between them.
//!
//! The states are those of IBA 10.3.1 as far as they mean something here: Init (it has a number, nothing is known of the peer),
//! RTR ("ready to receive": it knows the peer, and greets it), RTS ("ready to send": it heard from the peer), Error. A queue pair
//! is never used twice, so there is no way back to Reset; a fresh one with a fresh number takes its place. The greeting stands for
//! the connection manager (IBA chapter 12): it says hello until the peer says anything, and answers hellos.
//!
//! Invariant: before RTS nothing is sent but greetings, and in Init nothing that comes is listened to; in Error nothing is applied
//! and nothing is sent but the last word, once for each packet that asks for it.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    Body, Cause, Config, Counters, Message, Packet, Psn, Receiver, Syndrome, Transmit, requester::Requester,
    responder::Responder,
};

/// The first pause between two hellos; each is twice as long as the one before.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Where in its life a queue pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has a number; the peer is not known.
    Init,
    /// Ready to receive; the peer is greeted.
    Rtr,
    /// Ready to send: the peer is there.
    Rts,
    /// Over.
    Error,
}

/// What a queue pair has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The peer is there.
    Connected,
    /// The message was applied by the peer, all of it.
    Sent {
        /// Its number.
        ticket: u64,
    },
    /// The message will not be completed; whether it was applied is unknown.
    Failed {
        /// Its number.
        ticket: u64,
    },
    /// It is over. The last event.
    Broken(Cause),
}

/// One end of a reliable connection.
#[derive(Debug)]
pub struct QueuePair {
    config: Config,
    state: State,
    remote_qpn: u32,
    requester: Requester,
    responder: Responder,
    greeting: Option<Greeting>,
    /// A hello came and is not answered.
    owes_ready: bool,
    last_heard: Option<Instant>,
    /// What is said after the end, and whether it is to be said now.
    last_word: Option<(Psn, Body)>,
    owes_last_word: bool,
    events: VecDeque<Event>,
    counters: Counters,
}

#[derive(Debug)]
struct Greeting {
    next: Instant,
    pause: Duration,
    deadline: Instant,
    hellos: u32,
}

impl QueuePair {
    /// A queue pair in Init, whose first packet will have the number `start`.
    pub fn new(config: Config, start: Psn) -> QueuePair {
        QueuePair {
            config,
            state: State::Init,
            remote_qpn: 0,
            requester: Requester::new(&config, start),
            responder: Responder::new(Psn::new(0)),
            greeting: None,
            owes_ready: false,
            last_heard: None,
            last_word: None,
            owes_last_word: false,
            events: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// Now the peer is known: its number, and that of its first packet. Ends in `Connected`, or `Broken` at `deadline`.
    ///
    /// # Panics
    ///
    /// If the queue pair has been connected before.
    pub fn connect(&mut self, now: Instant, remote_qpn: u32, remote_start: Psn, deadline: Instant) {
        assert_eq!(self.state, State::Init, "a queue pair is connected once");
        self.remote_qpn = remote_qpn;
        self.responder = Responder::new(remote_start);
        self.state = State::Rtr;
        self.greeting = Some(Greeting { next: now, pause: PAUSE_MIN, deadline, hellos: 0 });
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// What it has done.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Messages posted and not completed.
    pub fn queued(&self) -> usize {
        self.requester.len()
    }

    /// Appends a message; it is sent once the peer is there. Returns its number: they count from 0.
    ///
    /// # Panics
    ///
    /// In Init and in Error: whoever posts knows that there is a connection.
    pub fn post(&mut self, message: Message) -> u64 {
        assert!(matches!(self.state, State::Rtr | State::Rts), "a message for a queue pair in {:?}", self.state);
        self.requester.push(&self.config, Some(message))
    }

    /// We end it. The peer is told; no event follows, and what was posted is the caller's to account for.
    pub fn end(&mut self) {
        self.fail(Cause::PeerEnded, Some((Psn::new(0), Body::Bye)));
        self.events.clear();
    }

    /// It ends without a word to the peer, as a NIC's queue pair does when the NIC fails.
    pub fn die(&mut self) {
        self.fail(Cause::Died, None);
    }

    /// A packet came that is for this queue pair, and was sealed for it.
    pub fn handle_packet(&mut self, now: Instant, packet: &Packet, payload: &[u8], receiver: &mut dyn Receiver) {
        match self.state {
            State::Init => return,
            State::Error => {
                // Who still sends has not understood; the answer to an answer would go on for ever.
                self.owes_last_word |=
                    self.last_word.is_some() && !matches!(packet.body, Body::Acknowledge(_) | Body::Bye);
                return;
            }
            State::Rtr | State::Rts => {}
        }
        self.last_heard = Some(now);
        if packet.body == Body::Bye {
            self.fail(Cause::PeerEnded, None);
            return;
        }
        if self.state == State::Rtr {
            // Whatever it says: it knows us, so it is ready to receive (IBA 10.3.1, "communication established").
            self.state = State::Rts;
            self.greeting = None;
            self.events.push_back(Event::Connected);
        }
        match packet.body {
            Body::Hello => self.owes_ready = true,
            Body::Ready | Body::Bye => {}
            Body::Acknowledge(syndrome) => {
                let events = &mut self.events;
                let completed = |ticket| events.push_back(Event::Sent { ticket });
                let answer = (packet.psn, syndrome);
                let outcome = self.requester.acknowledge(now, &self.config, answer, &mut self.counters, completed);
                if let Err(cause) = outcome {
                    self.fail(cause, Some((Psn::new(0), Body::Bye)));
                }
            }
            _ => {
                let timer = self.config.not_ready_timer;
                if let Err(refusal) = self.responder.handle(packet, payload, timer, receiver, &mut self.counters) {
                    let word = Body::Acknowledge(Syndrome::Nak(refusal.code));
                    self.fail(Cause::Refusing(refusal.reason), Some((self.responder.expected(), word)));
                }
            }
        }
    }

    /// Time passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        match self.state {
            State::Init | State::Error => {}
            State::Rtr => {
                let greeting = self.greeting.as_ref().expect("who is ready to receive greets");
                if now >= greeting.deadline {
                    let hellos = greeting.hellos;
                    self.fail(Cause::Deadline { hellos }, Some((Psn::new(0), Body::Bye)));
                }
            }
            State::Rts => {
                if let Err(cause) = self.requester.handle_timeout(now, &self.config, &mut self.counters) {
                    self.fail(cause, Some((Psn::new(0), Body::Bye)));
                } else if self.probe_time().is_some_and(|time| now >= time) {
                    self.counters.probes += 1;
                    self.requester.push(&self.config, None);
                }
            }
        }
    }

    /// When [`QueuePair::handle_timeout`], or for greetings [`QueuePair::poll_transmit`], has something to do.
    pub fn next_deadline(&self) -> Option<Instant> {
        match self.state {
            State::Init | State::Error => None,
            State::Rtr => self.greeting.as_ref().map(|greeting| greeting.next.min(greeting.deadline)),
            State::Rts => self.requester.next_deadline().or_else(|| self.probe_time()),
        }
    }

    /// The next packet to be sent. To be asked until there is none, after anything else was called.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        let greeting = |body| Some((Psn::new(0), body));
        let word = match self.state {
            State::Init => None,
            State::Error if std::mem::take(&mut self.owes_last_word) => self.last_word,
            State::Error => None,
            State::Rtr => match &mut self.greeting {
                Some(due) if now >= due.next => {
                    due.hellos += 1;
                    due.next = now + due.pause;
                    due.pause = (due.pause * 2).min(PAUSE_MAX);
                    greeting(Body::Hello)
                }
                _ => None,
            },
            State::Rts if std::mem::take(&mut self.owes_ready) => greeting(Body::Ready),
            State::Rts => match self.responder.answer() {
                Some((psn, syndrome)) => Some((psn, Body::Acknowledge(syndrome))),
                None => {
                    return self.requester.poll_transmit(now, &self.config, self.remote_qpn, &mut self.counters);
                }
            },
        };
        let (psn, body) = word?;
        Some(Transmit { packet: Packet { qpn: self.remote_qpn, psn, ack_request: false, body }, payload: None })
    }

    /// What happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When an idle connection asks whether the peer is there; anything in flight asks by itself.
    fn probe_time(&self) -> Option<Instant> {
        let is_idle = self.requester.len() == 0;
        self.last_heard.filter(|_| is_idle).map(|heard| heard + self.config.probe_interval)
    }

    /// The end: everything in flight fails (IBA 10.3.1.5, "completed with flush error"), then the queue pair is broken.
    fn fail(&mut self, cause: Cause, last_word: Option<(Psn, Body)>) {
        if self.state == State::Error {
            return;
        }
        // Before there was a peer nobody can be told.
        self.last_word = last_word.filter(|_| self.state != State::Init);
        self.owes_last_word = self.last_word.is_some();
        self.state = State::Error;
        self.greeting = None;
        self.events.extend(self.requester.drain().map(|ticket| Event::Failed { ticket }));
        self.events.push_back(Event::Broken(cause));
    }
}
