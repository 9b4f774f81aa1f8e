//! Single rules, by hand: what one queue pair answers to what comes, and when.
//!
//! Invariant: each test names the rule that it is about.

use std::time::{Duration, Instant};

use super::{
    super::{
        Body, Cause, Config, Event, Immediate, Message, NakCode, Packet, Piece, Psn, QueuePair, Receiver, RnrTimer,
        Secret, State, Syndrome, Target, Transmit,
    },
    pair::packet,
};

const START: Psn = Psn::new(100);
const REMOTE: Psn = Psn::new(500);

/// Takes notes; has room for so many messages.
struct Program {
    room: usize,
    complete: Vec<u8>,
    refuse: Option<&'static str>,
}

impl Receiver for Program {
    fn is_ready(&self) -> bool {
        self.complete.len() < self.room
    }
    fn begin(&mut self, _: &Target) -> Result<(), String> {
        self.refuse.map_or(Ok(()), |why| Err(why.into()))
    }
    fn place(&mut self, _: usize, _: &[u8]) {}
    fn complete(&mut self, _: Option<&Target>, immediate: &Immediate) -> Result<(), String> {
        self.complete.push(immediate[0]);
        Ok(())
    }
}

struct Side {
    qp: QueuePair,
    program: Program,
    now: Instant,
}

impl Side {
    /// One end, connected, with nothing owed.
    fn connected() -> Side {
        let now = Instant::now();
        let config = Config { mtu: 256, window: 8, retry_limit: 3, ..Config::default() };
        let mut qp = QueuePair::new(config, START);
        qp.connect(now, 2, REMOTE, now + Duration::from_secs(9));
        let mut side = Side { qp, program: Program { room: 99, complete: Vec::new(), refuse: None }, now };
        side.hear(Body::Ready, 0);
        assert_eq!(side.qp.poll_event(), Some(Event::Connected));
        assert!(side.sends().is_empty());
        side
    }

    fn post(&mut self, length: u32) {
        let target = Target { rkey: 1, offset: 0, length };
        self.qp.post(Message { target: (length > 0).then_some(target), immediate: [9; 48] });
    }

    fn hear(&mut self, body: Body, psn: u32) {
        self.hear_asking(body, psn, false);
    }

    fn hear_asking(&mut self, body: Body, psn: u32, ack_request: bool) {
        let packet = Packet { ack_request, ..packet(1, Psn::new(psn), body) };
        let payload = match body {
            Body::WriteFirst(_) | Body::WriteMiddle | Body::WriteLast(_) => &[0; 256][..],
            Body::WriteOnly(target, _) => &[0; 256][..target.length as usize],
            _ => &[],
        };
        self.qp.handle_packet(self.now, &packet, payload, &mut self.program);
    }

    fn sends(&mut self) -> Vec<Transmit> {
        std::iter::from_fn(|| self.qp.poll_transmit(self.now)).collect()
    }

    fn psns(&mut self) -> Vec<u32> {
        self.sends().iter().map(|transmit| transmit.packet.psn.bits()).collect()
    }

    fn answers(&mut self) -> Vec<(u32, Body)> {
        self.sends().iter().map(|transmit| (transmit.packet.psn.bits(), transmit.packet.body)).collect()
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.qp.poll_event()).collect()
    }

    fn wait(&mut self) {
        self.now = self.qp.next_deadline().expect("something is due");
        self.qp.handle_timeout(self.now);
    }
}

fn send(first: u8) -> Body {
    let mut immediate = [0; 48];
    immediate[0] = first;
    Body::Send(immediate)
}

fn ack() -> Body {
    Body::Acknowledge(Syndrome::Ack)
}

fn nak(code: NakCode) -> Body {
    Body::Acknowledge(Syndrome::Nak(code))
}

#[test]
fn a_write_is_cut_into_first_middle_and_last_with_the_immediate() {
    let mut side = Side::connected();
    side.post(600);
    side.post(256);
    side.post(0);
    let sent = side.sends();
    let target = Target { rkey: 1, offset: 0, length: 600 };
    let bodies = [
        Body::WriteFirst(target),
        Body::WriteMiddle,
        Body::WriteLast([9; 48]),
        Body::WriteOnly(Target { length: 256, ..target }, [9; 48]),
        Body::Send([9; 48]),
    ];
    assert!(sent.iter().map(|transmit| transmit.packet.body).eq(bodies));
    let piece = |ticket, start, len| Some(Piece { ticket, start, len });
    let pieces = [piece(0, 0, 256), piece(0, 256, 256), piece(0, 512, 88), piece(1, 0, 256), None];
    assert!(sent.iter().map(|transmit| transmit.payload).eq(pieces));
    assert!(sent.iter().map(|transmit| transmit.packet.ack_request).eq([false, false, true, true, true]));
}

#[test]
fn the_window_holds_and_an_acknowledgement_opens_it() {
    let mut side = Side::connected();
    (0..20).for_each(|_| side.post(0));
    assert!(side.psns().into_iter().eq(100..108));
    side.hear(ack(), 102);
    assert!(side.psns().into_iter().eq(108..111));
    assert_eq!(side.events(), [0, 1, 2].map(|ticket| Event::Sent { ticket }));
}

#[test]
fn an_acknowledgement_of_what_was_never_sent_is_nothing() {
    let mut side = Side::connected();
    (0..20).for_each(|_| side.post(0));
    side.sends();
    for (body, psn) in
        [(ack(), 108), (ack(), 99), (ack(), 5000), (nak(NakCode::Sequence), 108), (nak(NakCode::RemoteAccess), 108)]
    {
        side.hear(body, psn);
        assert!(side.events().is_empty() && side.sends().is_empty(), "{body:?} {psn}");
    }
}

#[test]
fn a_sequence_error_goes_back_once() {
    let mut side = Side::connected();
    (0..8).for_each(|_| side.post(0));
    side.sends();
    side.hear(nak(NakCode::Sequence), 103);
    assert_eq!(side.events().len(), 3, "it acknowledges what is before it");
    // The window is half of what it was.
    assert!(side.psns().into_iter().eq(103..107));
    side.hear(nak(NakCode::Sequence), 103);
    assert!(side.psns().is_empty(), "the same NAK again");
}

#[test]
fn not_ready_pauses_and_then_sends_again() {
    let mut side = Side::connected();
    side.post(0);
    side.post(0);
    side.sends();
    let timer = RnrTimer::at_least(Duration::from_millis(5));
    side.hear(Body::Acknowledge(Syndrome::NotReady(timer)), 101);
    assert_eq!(side.events(), [Event::Sent { ticket: 0 }]);
    assert!(side.sends().is_empty(), "not in the pause");
    let asked = side.now;
    side.wait();
    assert_eq!(side.now, asked + timer.duration());
    assert_eq!(side.psns(), [101]);
}

#[test]
fn a_receiver_without_room_says_so_and_takes_it_later() {
    let mut side = Side::connected();
    side.program.room = 1;
    side.hear_asking(send(1), 500, true);
    side.hear_asking(send(2), 501, true);
    side.hear_asking(send(3), 502, true);
    assert!(matches!(side.answers()[..], [(501, Body::Acknowledge(Syndrome::NotReady(_)))]));
    side.program.room = 9;
    side.hear_asking(send(2), 501, true);
    assert_eq!(side.program.complete, [1, 2]);
    assert_eq!(side.answers(), [(501, ack())]);
}

#[test]
fn one_nak_for_a_gap_and_a_duplicate_is_acknowledged_and_not_applied() {
    let mut side = Side::connected();
    side.hear(send(1), 500);
    assert!(side.answers().is_empty(), "nobody asked");
    side.hear(send(3), 502);
    assert_eq!(side.answers(), [(501, nak(NakCode::Sequence))]);
    side.hear(send(4), 503);
    assert!(side.answers().is_empty());
    side.hear(send(1), 500);
    assert_eq!(side.answers(), [(500, ack())]);
    side.hear_asking(send(2), 501, true);
    assert_eq!(side.answers(), [(501, ack())]);
    assert_eq!(side.program.complete, [1, 2]);
    side.hear(send(9), 510);
    assert_eq!(side.answers(), [(502, nak(NakCode::Sequence))], "another gap, another NAK");
}

#[test]
fn acknowledgements_are_coalesced() {
    let mut side = Side::connected();
    (0..10).for_each(|at| side.hear_asking(send(at), 500 + u32::from(at), true));
    assert_eq!(side.answers(), [(509, ack())]);
}

#[test]
fn silence_is_answered_with_longer_waits_and_then_with_the_end() {
    let mut side = Side::connected();
    side.post(0);
    side.post(0);
    let mut waits = Vec::new();
    for _ in 0..4 {
        assert_eq!(side.psns(), [100, 101]);
        let before = side.now;
        side.wait();
        waits.push(side.now - before);
    }
    assert!(waits.windows(2).all(|pair| pair[1] == pair[0] * 2), "{waits:?}");
    let events = side.events();
    assert_eq!(events[..2], [0, 1].map(|ticket| Event::Failed { ticket }));
    assert!(
        matches!(events[2..], [Event::Broken(Cause::RetryExhausted { tries: 4, over })] if over == waits.iter().sum())
    );
    assert_eq!(side.answers(), [(0, Body::Bye)]);
    assert_eq!((side.qp.state(), side.qp.next_deadline()), (State::Error, None));
}

#[test]
fn a_write_that_may_not_land_ends_both_ends() {
    let mut side = Side::connected();
    side.program.refuse = Some("no slot");
    let target = Target { rkey: 1, offset: 0, length: 300 };
    side.hear(Body::WriteFirst(target), 500);
    let word = [(500, nak(NakCode::RemoteAccess))];
    assert_eq!(side.answers(), word);
    assert!(matches!(&side.events()[..], [Event::Broken(Cause::Refusing(why))] if why.contains("no slot")));
    side.hear(Body::WriteMiddle, 501);
    assert_eq!(side.answers(), word, "it says so again if that was lost");
    side.hear(ack(), 100);
    assert!(side.answers().is_empty(), "but not to an answer");

    let mut other = Side::connected();
    other.post(300);
    other.sends();
    other.hear(nak(NakCode::RemoteAccess), 100);
    assert_eq!(other.events(), [Event::Failed { ticket: 0 }, Event::Broken(Cause::Refused(NakCode::RemoteAccess))]);
}

#[test]
fn packets_of_a_write_out_of_place_are_an_invalid_request() {
    let target = |length| Target { rkey: 1, offset: 0, length };
    let wrong: [&[Body]; 6] = [
        &[Body::WriteMiddle],
        &[Body::WriteLast([0; 48])],
        &[Body::WriteFirst(target(600)), send(1)],
        &[Body::WriteFirst(target(600)), Body::WriteFirst(target(600))],
        &[Body::WriteFirst(target(513)), Body::WriteMiddle, Body::WriteMiddle],
        &[Body::WriteFirst(target(600)), Body::WriteLast([0; 48])],
    ];
    for bodies in wrong {
        let mut side = Side::connected();
        bodies.iter().zip(500..).for_each(|(body, psn)| side.hear(*body, psn));
        assert!(matches!(&side.answers()[..], [(_, word)] if *word == nak(NakCode::InvalidRequest)), "{bodies:?}");
        assert!(side.program.complete.is_empty());
    }
}

#[test]
fn an_idle_connection_has_no_deadline_but_its_probe() {
    let mut side = Side::connected();
    assert_eq!(side.qp.next_deadline(), Some(side.now + Config::default().probe_interval));
    side.wait();
    assert_eq!(side.answers(), [(100, Body::Probe)]);
    side.hear(ack(), 100);
    assert!(side.events().is_empty(), "a probe is nobody's message");
    assert_eq!(side.qp.next_deadline(), Some(side.now + Config::default().probe_interval));
}

#[test]
fn before_it_knows_its_peer_it_is_deaf_and_after_the_greeting_it_speaks() {
    let now = Instant::now();
    let mut side = Side::connected();
    side.qp = QueuePair::new(Config::default(), START);
    side.hear(Body::Hello, 0);
    side.hear(send(1), 0);
    assert!(side.sends().is_empty() && side.events().is_empty() && side.program.complete.is_empty());
    side.qp.connect(now, 2, REMOTE, now + Duration::from_millis(50));
    side.post(0);
    assert!(matches!(side.answers()[..], [(0, Body::Hello)]), "a message waits for the peer");
    while side.qp.state() == State::Rtr {
        side.wait();
        side.sends();
    }
    let events = side.events();
    assert!(matches!(events[..], [Event::Failed { .. }, Event::Broken(Cause::Deadline { hellos: 5.. })]), "{events:?}");
    assert_eq!(side.now, now + Duration::from_millis(50));
}

#[test]
fn a_packet_is_read_only_under_its_secret_and_any_flipped_bit_is_refused() {
    let (secret, other) = (Secret([1; 16]), Secret([2; 16]));
    let target = Target { rkey: 3, offset: u64::MAX, length: 5 };
    let bodies = [
        (Body::Send([1; 48]), 0),
        (Body::WriteFirst(target), 4),
        (Body::WriteMiddle, 7),
        (Body::WriteLast([2; 48]), 1),
        (Body::WriteOnly(target, [3; 48]), 5),
        (Body::Probe, 0),
        (ack(), 0),
        (nak(NakCode::RemoteAccess), 0),
        (Body::Hello, 0),
        (Body::Ready, 0),
        (Body::Bye, 0),
    ];
    for (body, len) in bodies {
        let packet = packet(Psn::MASK, Psn::new(77), body);
        let (payload, mut bytes) = (vec![9; len], Vec::new());
        packet.encode(&payload, &secret, &mut bytes);
        assert_eq!(Packet::decode(&bytes, &secret), Ok((packet, &payload[..])));
        assert_eq!(Packet::destination(&bytes), Some(Psn::MASK));
        assert!(Packet::decode(&bytes, &other).is_err());
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Packet::decode(&bytes, &secret).is_err());
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        for len in 0..bytes.len() {
            assert!(Packet::decode(&bytes[..len], &secret).is_err());
        }
    }
}
