//! Two queue pairs, what they post to each other, and the checks: exactly once, in order, the right bytes, or an end of both.
//!
//! Invariant: the checks look at what the pair's users see, and at no state inside.

use std::time::{Duration, Instant};

use super::{
    super::{
        Body, Cause, Config, Counters, Event, Immediate, Message, Packet, Psn, QueuePair, Receiver, Secret, Target,
    },
    channel::{Channel, Random, Weather},
};

/// Nothing may take longer, in virtual time, after the last message was posted.
const PATIENCE_US: u64 = 30_000_000;

pub const SECRETS: [Secret; 2] = [Secret([7; 16]), Secret([8; 16])];

pub fn config(random: &mut Random) -> Config {
    Config {
        mtu: 32 + random.below(100) as u32,
        window: 4 + random.below(20) as u32,
        retry_limit: 14,
        not_ready_limit: 500,
        timeout_min: Duration::from_millis(4),
        timeout_max: Duration::from_millis(100),
        probe_interval: Duration::from_millis(50),
        ..Config::default()
    }
}

/// What side `from` posts as number `index`: a function of the two.
pub fn message(from: usize, index: u64) -> Message {
    let mut random = Random(from as u64 * 1_000_003 + index);
    let mut immediate = [0; 48];
    immediate[..8].copy_from_slice(&index.to_le_bytes());
    immediate[8] = from as u8;
    let length = [0, 1, 40, 400, 1500][random.below(5) as usize];
    let target = Target { rkey: 1 + from as u32, offset: 4096 * index, length: random.below(length + 1) as u32 };
    Message { target: (!random.percent(40)).then_some(target), immediate }
}

pub fn byte(from: usize, index: u64, at: usize) -> u8 {
    (index as u8).wrapping_mul(37) ^ (at as u8).wrapping_mul(11) ^ (at >> 8) as u8 ^ from as u8
}

/// The program behind a queue pair.
#[derive(Default)]
pub struct Program {
    me: usize,
    ready: bool,
    write: Option<(Target, Vec<u8>)>,
    received: u64,
    defect: Option<String>,
}

impl Program {
    fn demand(&mut self, holds: bool, what: &str) {
        if !holds {
            self.defect.get_or_insert(format!("side {} at message {}: {what}", self.me, self.received));
        }
    }
}

impl Receiver for Program {
    fn is_ready(&self) -> bool {
        self.ready
    }

    fn begin(&mut self, target: &Target) -> Result<(), String> {
        self.demand(self.write.is_none(), "a write begins within a write");
        self.write = Some((*target, vec![0xEE; target.length as usize]));
        Ok(())
    }

    fn place(&mut self, at: usize, payload: &[u8]) {
        let Some((_, bytes)) = &mut self.write else { return self.demand(false, "bytes of no write") };
        match bytes.get_mut(at..at + payload.len()) {
            Some(range) => range.copy_from_slice(payload),
            None => self.demand(false, "bytes beyond the write"),
        }
    }

    fn complete(&mut self, target: Option<&Target>, immediate: &Immediate) -> Result<(), String> {
        let (from, index) = (1 - self.me, self.received);
        let write = self.write.take();
        self.demand(*immediate == message(from, index).immediate, "not the next message, or not its immediate");
        self.demand(target.copied() == message(from, index).target, "another target");
        if let Some((_, bytes)) = write {
            let right = bytes.iter().enumerate().all(|(at, found)| *found == byte(from, index, at));
            self.demand(right, "wrong bytes");
        }
        self.received += 1;
        Ok(())
    }
}

struct End {
    qp: QueuePair,
    program: Program,
    posted: u64,
    sent: u64,
    failed: u64,
    connected: bool,
    broken: Option<(Cause, u64)>,
}

pub struct World {
    pub channel: Channel,
    pub wrapped: bool,
    random: Random,
    begun: Instant,
    ends: [End; 2],
    to_post: u64,
    next_post_us: u64,
    not_ready: u64,
}

impl World {
    pub fn new(seed: u64, weather: Weather) -> World {
        let mut random = Random(seed);
        let begun = Instant::now();
        let starts = [0, 1].map(|_| match random.below(2) {
            0 => Psn::new(random.next() as u32),
            _ => Psn::new(0u32.wrapping_sub(random.below(60) as u32)),
        });
        let deadline = begun + Duration::from_secs(20);
        let ends = [0, 1].map(|me| {
            let mut qp = QueuePair::new(config(&mut random), starts[me]);
            qp.connect(begun, 1 - me as u32, starts[1 - me], deadline);
            let program = Program { me, ready: true, ..Program::default() };
            End { qp, program, posted: 0, sent: 0, failed: 0, connected: false, broken: None }
        });
        let wrapped = starts.iter().any(|start| start.bits() > Psn::MASK - 60);
        let to_post = 5 + random.below(50);
        let not_ready = weather.not_ready;
        let channel = Channel::new(seed, weather);
        World { channel, wrapped, random, begun, ends, to_post, next_post_us: 0, not_ready }
    }

    pub fn is_broken(&self) -> bool {
        self.ends.iter().any(|end| end.broken.is_some())
    }

    pub fn sum(&self, count: impl Fn(&Counters) -> u64) -> u64 {
        self.ends.iter().map(|end| count(end.qp.counters())).sum()
    }

    /// Runs until everything is settled.
    pub fn run(&mut self) -> Result<(), String> {
        let mut settled_until = None;
        loop {
            self.turn()?;
            self.check()?;
            if self.is_settled() {
                // A while longer: nothing may come late, twice, or out of the blue.
                let until = *settled_until.get_or_insert(self.channel.now_us + 200_000);
                if self.channel.now_us >= until {
                    return Ok(());
                }
            }
            if self.channel.now_us > self.next_post_us + PATIENCE_US {
                return Err(format!("it hangs: {}", self.describe()));
            }
            let deadlines = self.ends.iter().filter_map(|end| end.qp.next_deadline());
            let deadlines =
                deadlines.map(|at| at.saturating_duration_since(self.begun).as_nanos().div_ceil(1000) as u64);
            let posting = (self.ends[0].posted < self.to_post && !self.is_broken()).then_some(self.next_post_us);
            let next = deadlines.chain(self.channel.next_due()).chain(posting).chain(settled_until).min();
            let Some(next) = next else { return Err(format!("nothing is due: {}", self.describe())) };
            let now_us = next.max(self.channel.now_us + 1);
            for (to, bytes) in self.channel.deliver(now_us) {
                self.receive(to, &bytes);
            }
        }
    }

    fn now(&self) -> Instant {
        self.begun + Duration::from_micros(self.channel.now_us)
    }

    fn receive(&mut self, to: usize, bytes: &[u8]) {
        let Ok((packet, payload)) = Packet::decode(bytes, &SECRETS[to]) else { return };
        let now = self.now();
        let ready = !self.random.percent(self.not_ready);
        let End { qp, program, .. } = &mut self.ends[to];
        program.ready = ready;
        qp.handle_packet(now, &packet, payload, program);
    }

    /// Time-outs, posts, sends and events of both ends.
    fn turn(&mut self) -> Result<(), String> {
        let now = self.now();
        let post = self.channel.now_us >= self.next_post_us && self.ends[0].posted < self.to_post && !self.is_broken();
        let burst = if post { self.random.below(20) } else { 0 };
        for me in [0, 1] {
            let end = &mut self.ends[me];
            end.qp.handle_timeout(now);
            for _ in 0..burst.min(self.to_post - end.posted.min(self.to_post)) {
                if end.broken.is_none() && !matches!(end.qp.state(), super::super::State::Error) {
                    let ticket = end.qp.post(message(me, end.posted));
                    assert_eq!(ticket, end.posted);
                    end.posted += 1;
                }
            }
            while let Some(transmit) = end.qp.poll_transmit(now) {
                let payload: Vec<u8> = transmit.payload.map_or(Vec::new(), |piece| {
                    (piece.start..piece.start + piece.len).map(|at| byte(me, piece.ticket, at)).collect()
                });
                let mut bytes = Vec::new();
                transmit.packet.encode(&payload, &SECRETS[1 - me], &mut bytes);
                self.channel.send(1 - me, bytes);
            }
            while let Some(event) = end.qp.poll_event() {
                end.hear(event, self.channel.now_us)?;
            }
        }
        if post {
            let pause = if self.random.percent(10) { 150_000 } else { 2_000 };
            self.next_post_us = self.channel.now_us + self.random.below(pause);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        for me in [0, 1] {
            let (end, other) = (&self.ends[me], &self.ends[1 - me]);
            if let Some(defect) = &end.program.defect {
                return Err(defect.clone());
            }
            if end.sent > other.program.received {
                return Err(format!("side {me} was told of {} sent, {} arrived", end.sent, other.program.received));
            }
            if other.program.received > end.posted {
                return Err(format!("{} arrived of {} posted", other.program.received, end.posted));
            }
        }
        Ok(())
    }

    /// All is there on both sides, or both have ended with everything accounted for.
    fn is_settled(&self) -> bool {
        let whole = |end: &End| end.broken.is_none() && end.posted == self.to_post && end.sent == self.to_post;
        let over = |end: &End| end.broken.is_some() && end.sent + end.failed == end.posted;
        self.ends.iter().all(whole) || self.ends.iter().all(over)
    }

    fn describe(&self) -> String {
        let end = |end: &End| {
            let End { posted, sent, failed, broken, qp, .. } = end;
            format!(
                "posted {posted} sent {sent} failed {failed} received {} broken {broken:?} {:?}",
                end.program.received,
                qp.state()
            )
        };
        format!("at {} us: {} / {}", self.channel.now_us, end(&self.ends[0]), end(&self.ends[1]))
    }
}

impl End {
    fn hear(&mut self, event: Event, now_us: u64) -> Result<(), String> {
        if self.broken.is_some() {
            return Err(format!("{event:?} after the end"));
        }
        match event {
            Event::Connected if !self.connected => self.connected = true,
            Event::Sent { ticket } if ticket == self.sent && self.failed == 0 => self.sent += 1,
            Event::Failed { ticket } if ticket == self.sent + self.failed => self.failed += 1,
            Event::Broken(cause) => self.broken = Some((cause, now_us)),
            event => return Err(format!("{event:?} after {} sent and {} failed", self.sent, self.failed)),
        }
        Ok(())
    }
}

/// The body of a packet that says nothing but an opcode: for tests by hand.
pub fn packet(qpn: u32, psn: Psn, body: Body) -> Packet {
    Packet { qpn, psn, ack_request: false, body }
}
