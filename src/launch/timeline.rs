//! The timeline of a job as a trace that Perfetto and chrome://tracing load: what every rank has told, in the launcher's time, made
//! into spans of chunks.
//!
//! Invariant: a span has both of its ends; what has lost one of them is left out and counted, never guessed.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use serde_json::{Value, json};

use crate::{
    Error, Result,
    observe::{Mark, TaskKind, What},
    session::TimelinePart,
    types::{ChunkId, Clock, PeerId, Rank, Role},
};

/// The thread of a trace that shows what a worker's program does; its lanes' threads follow.
const PROGRAM: u64 = 0;

/// What was told by the ranks of a job.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    parts: Vec<(Rank, TimelinePart)>,
}

/// Something that has a beginning and an end.
#[derive(Debug)]
struct Span {
    name: &'static str,
    /// Whose row it stands in.
    of: PeerId,
    from_ns: u64,
    to_ns: u64,
    chunk: Option<ChunkId>,
    clock: Clock,
    /// The worker whose gradient or parameters it is about.
    worker: Option<u16>,
    /// Whether others of its row may overlap with it.
    overlaps: bool,
}

/// One end of a span that waits for the other, by who and what: several if it happens again.
type Open<K> = BTreeMap<K, VecDeque<u64>>;

/// Whose gradient or parameters, of which chunk and clock.
type Key = (u16, ChunkId, Clock);

/// Makes spans of marks.
#[derive(Debug, Default)]
struct Spans {
    found: Vec<Span>,
    missing: usize,
    given: Open<Key>,
    pushed: Open<Key>,
    replied: Open<Key>,
    started: Open<(PeerId, TaskKindNumber, ChunkId, Clock)>,
    /// By worker: when its program did last what a gradient could begin after.
    program: BTreeMap<u16, u64>,
    /// When a chunk's computation of a clock ended first: what was sent before answers a pull.
    computed: BTreeMap<(ChunkId, Clock), u64>,
}

type TaskKindNumber = u8;

impl Timeline {
    /// A rank has told something.
    pub fn add(&mut self, rank: Rank, part: TimelinePart) {
        self.parts.push((rank, part));
    }

    /// Writes the trace.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be written.
    pub fn write(&self, path: &Path, job: &str) -> Result<()> {
        let failed = |error| Error::file("write", path, error);
        let mut out = BufWriter::new(File::create(path).map_err(|error| Error::file("create", path, error))?);
        let spans = self.spans();
        let begin = spans.found.iter().map(|span| span.from_ns).min().unwrap_or(0);
        let mut write = |text: String| out.write_all(text.as_bytes()).map_err(failed);
        write(format!("{{\"displayTimeUnit\":\"ns\",\"otherData\":{},\n\"traceEvents\":[\n", self.about(&spans, job)))?;
        let names = self.names();
        let events =
            names.into_iter().chain(spans.found.iter().enumerate().flat_map(|(id, span)| span.events(id, begin)));
        for (at, event) in events.enumerate() {
            write(format!("{}{event}", if at == 0 { "" } else { ",\n" }))?;
        }
        write("\n]}\n".into())?;
        out.flush().map_err(failed)
    }

    /// What there is to know beside the events.
    fn about(&self, spans: &Spans, job: &str) -> Value {
        let threads = self.parts.iter().map(|(rank, part)| {
            let (offset_ns, error_ns) = (part.clock.offset_ns, part.clock.error_ns);
            json!({ "rank": rank.to_string(), "lane": part.lane, "clock_offset_ns": offset_ns, "clock_error_ns": error_ns,
                    "marks_lost": part.lost })
        });
        json!({ "job": job, "ends_missing": spans.missing, "threads": threads.collect::<Vec<_>>() })
    }

    /// The names of rows.
    fn names(&self) -> Vec<Value> {
        let mut rows: Vec<PeerId> =
            self.parts.iter().map(|(rank, part)| PeerId { rank: *rank, lane: part.lane }).collect();
        rows.sort_unstable();
        rows.dedup();
        let name = |of: PeerId, tid: u64, key: &str, name: String| json!({ "ph": "M", "name": key, "pid": process(of.rank), "tid": tid, "args": { "name": name } });
        rows.iter()
            .flat_map(|of| {
                let program =
                    (of.rank.role == Role::Worker).then(|| name(*of, PROGRAM, "thread_name", "program".into()));
                let lane = if of.rank.role == Role::Worker { "fabric".into() } else { format!("lane {}", of.lane) };
                let rows =
                    [name(*of, 0, "process_name", of.rank.to_string()), name(*of, thread(*of), "thread_name", lane)];
                rows.into_iter().chain(program)
            })
            .collect()
    }

    fn spans(&self) -> Spans {
        let marks = self.parts.iter().flat_map(|(rank, part)| {
            let me = PeerId { rank: *rank, lane: part.lane };
            part.marks().map(move |mark| (me, mark))
        });
        let mut marks: Vec<(PeerId, Mark)> = marks.collect();
        // By what follows what: a clock that is a little off must not have an end come before its beginning.
        marks.sort_by_key(|(_, mark)| (mark.clock, order(mark.what), mark.at_ns));
        let mut spans = Spans::default();
        marks.iter().for_each(|(me, mark)| spans.take(*me, mark));
        spans.missing += spans.given.values().chain(spans.pushed.values()).map(VecDeque::len).sum::<usize>();
        spans.missing += spans.replied.values().chain(spans.started.values()).map(VecDeque::len).sum::<usize>();
        spans.found.sort_by_key(|span| span.from_ns);
        spans
    }
}

/// What can only follow what, within a clock: of marks that belong together the first come first.
fn order(what: What) -> u8 {
    match what {
        What::Began | What::Given => 0,
        What::Pushed => 1,
        What::Landed => 2,
        What::Started(TaskKind::Step | TaskKind::Reduce) => 3,
        What::Ended(TaskKind::Step | TaskKind::Reduce) => 4,
        What::Started(_) => 5,
        What::Ended(_) => 6,
        What::Replied => 7,
        What::Received => 8,
        What::Waited => 9,
    }
}

impl Spans {
    fn take(&mut self, me: PeerId, mark: &Mark) {
        let Mark { at_ns, what, chunk, clock, peer } = *mark;
        let worker = if me.rank.role == Role::Worker { me.rank.index } else { peer.rank.index };
        let key = (worker, chunk, clock);
        match what {
            What::Began => {
                self.program.insert(worker, at_ns);
            }
            What::Given => {
                if let Some(from) = self.program.insert(worker, at_ns) {
                    self.add("backward", me, (from, at_ns), key, false);
                }
                self.given.entry(key).or_default().push_back(at_ns);
            }
            What::Pushed => {
                let from = self.given.get_mut(&key).and_then(VecDeque::pop_front);
                self.close("push", me, from, at_ns, key);
                self.pushed.entry(key).or_default().push_back(at_ns);
            }
            What::Landed => {
                let from = self.pushed.get_mut(&key).and_then(VecDeque::pop_front);
                self.close("wire", me, from, at_ns, key);
            }
            What::Started(task) => {
                self.started.entry((me, task as u8, chunk, clock)).or_default().push_back(at_ns);
            }
            What::Ended(task) => {
                let from = self.started.get_mut(&(me, task as u8, chunk, clock)).and_then(VecDeque::pop_front);
                self.missing += usize::from(from.is_none());
                let Some(from_ns) = from else { return };
                let (name, to_ns) = (task.name(), at_ns);
                if task != TaskKind::Reduce {
                    self.computed.entry((chunk, clock)).or_insert(to_ns);
                }
                let (chunk, worker, overlaps) = (Some(chunk), None, false);
                self.found.push(Span { name, of: me, from_ns, to_ns, chunk, clock, worker, overlaps });
            }
            What::Replied => self.replied.entry(key).or_default().push_back(at_ns),
            What::Received => {
                let from = self.replied.get_mut(&key).and_then(VecDeque::pop_front);
                let done = self.computed.get(&(chunk, clock)).copied();
                let pulled = from.zip(done).is_none_or(|(from, done)| from < done);
                self.close(if pulled { "pull" } else { "reply" }, me, from, at_ns, key);
            }
            What::Waited => {
                // From the last gradient that was given.
                if let Some(from_ns) = self.program.get(&worker).copied() {
                    let (name, of, to_ns) = ("wait", me, at_ns);
                    let (chunk, worker, overlaps) = (None, Some(worker), false);
                    self.found.push(Span { name, of, from_ns, to_ns, chunk, clock, worker, overlaps });
                }
            }
        }
    }

    fn close(&mut self, name: &'static str, me: PeerId, from: Option<u64>, to: u64, key: Key) {
        match from {
            Some(from) => self.add(name, me, (from, to), key, true),
            None => self.missing += 1,
        }
    }

    fn add(&mut self, name: &'static str, of: PeerId, (from_ns, to_ns): (u64, u64), key: Key, overlaps: bool) {
        let (worker, chunk, clock) = key;
        let (chunk, worker) = (Some(chunk), Some(worker));
        self.found.push(Span { name, of, from_ns, to_ns, chunk, clock, worker, overlaps });
    }
}

/// Servers and workers by number; 0 would be taken for the scheduler.
fn process(rank: Rank) -> u64 {
    1 + u64::from(rank.index) + if rank.role == Role::Worker { 1 << 16 } else { 0 }
}

fn thread(of: PeerId) -> u64 {
    PROGRAM + 1 + u64::from(of.lane)
}

impl Span {
    /// One complete event, or the beginning and the end of one that others may overlap.
    fn events(&self, id: usize, begin: u64) -> impl Iterator<Item = Value> {
        let us = |ns: u64| ns.saturating_sub(begin) as f64 / 1e3;
        let program = matches!(self.name, "backward" | "wait");
        let tid = if program { PROGRAM } else { thread(self.of) };
        let args = json!({ "chunk": self.chunk.map(|chunk| chunk.0), "clock": self.clock, "worker": self.worker });
        let mut event = json!({ "name": self.name, "cat": "chunk", "ph": "X", "pid": process(self.of.rank), "tid": tid,
                                "ts": us(self.from_ns), "args": args });
        if !self.overlaps {
            event["dur"] = json!(self.to_ns.saturating_sub(self.from_ns) as f64 / 1e3);
            return [Some(event), None].into_iter().flatten();
        }
        (event["ph"], event["id"]) = (json!("b"), json!(id));
        let mut end = event.clone();
        // A clock that is a little off must not have a span end before it begins.
        (end["ph"], end["ts"]) = (json!("e"), json!(us(self.to_ns.max(self.from_ns))));
        [Some(event), Some(end)].into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{observe::Ring, session::ClockOffset};

    /// The timeline of these marks, each with who tells it and at which time of its own clock.
    fn timeline(marks: &[(PeerId, u64, What, PeerId)], offset_ns: i64) -> Timeline {
        let mut timeline = Timeline::default();
        for (me, at_ns, what, peer) in marks {
            let ring = Ring::new(1);
            ring.write(Mark { at_ns: *at_ns, what: *what, chunk: ChunkId(4), clock: 7, peer: *peer });
            let offset_ns = if me.rank.role == Role::Worker { offset_ns } else { 0 };
            for part in TimelinePart::of(0, ClockOffset { offset_ns, error_ns: 1 }, &ring) {
                timeline.add(me.rank, part);
            }
        }
        timeline
    }

    #[test]
    fn both_sides_marks_make_spans_in_one_time() {
        let (server, worker) = (PeerId::server(0, 0), PeerId::worker(2));
        let step = TaskKind::Step;
        let marks = [
            (worker, 0, What::Began, worker),
            (worker, 10, What::Given, worker),
            (worker, 12, What::Pushed, server),
            (server, 1020, What::Landed, worker),
            (server, 1021, What::Replied, worker),
            (worker, 23, What::Received, server),
            (server, 1030, What::Started(step), server),
            (server, 1040, What::Ended(step), server),
            (server, 1041, What::Replied, worker),
            (worker, 50, What::Received, server),
            (worker, 51, What::Waited, worker),
        ];
        let spans = timeline(&marks, 1000).spans();
        let seen: Vec<_> = spans.found.iter().map(|span| (span.name, span.from_ns, span.to_ns)).collect();
        let wanted = [
            ("backward", 1000, 1010),
            ("push", 1010, 1012),
            ("wait", 1010, 1051),
            ("wire", 1012, 1020),
            ("pull", 1021, 1023),
            ("step", 1030, 1040),
            ("reply", 1041, 1050),
        ];
        assert_eq!((seen.as_slice(), spans.missing), (&wanted[..], 0));
        let lacking = timeline(&marks[3..4], 1000).spans();
        assert_eq!((lacking.found.len(), lacking.missing), (0, 1));
    }
}
