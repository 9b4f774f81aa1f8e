//! Requests that each complete by themselves, and requests that complete by the list: every one is reported and arrives, either way.
//!
//! It also prints what the one costs against the other: `VERBS_SIGNALLING_RUNS=15 scripts/rdma-vm -- PROGRAM --nocapture
//! verbs_signalling`, where PROGRAM is this test program. One run, as without the variable, says nothing about cost.
//!
//! Invariant: both ways are run in turn, so that what else the machine does meets both.

use std::time::{Duration, Instant};

use gradwire::{
    mem::Lease,
    transport::verbs::VerbsOptions,
    wire::{Note, NoteKind},
};

use crate::{
    verbs::{Verbs, is_there},
    world::{World, note, write},
};

/// Requests of a round, all of them under way at once.
const ROUND: usize = 64;
/// Rounds of a run: a few where nothing is measured.
const ROUNDS: [u64; 2] = [4, 200];

const SELDOM: fn(&mut VerbsOptions) = |_| {};
const ALWAYS: fn(&mut VerbsOptions) = |options| options.signal_every = Some(1);

/// How long some rounds of requests take from the first post until all have arrived and all are reported. 0 bytes: notes alone.
fn run(spoil: fn(&mut VerbsOptions), rounds: u64, bytes: usize) -> Duration {
    let mut world = World::joined(Verbs::spoilt(spoil), 2, ROUND * bytes.max(64));
    let (a, b) = (world.peer(0), world.peer(1));
    let mut cut = |side: usize| world.sides[side].cut(ROUND * bytes).chunks(bytes);
    let (mut sources, mut slots) = if bytes > 0 { (cut(0), cut(1)) } else { (Vec::new(), Vec::new()) };
    let begun = Instant::now();
    for _ in 0..rounds {
        for id in 0..ROUND as u64 {
            let request = match (sources.pop(), slots.pop()) {
                (Some(source), Some(slot)) => write(id, b, source.freeze(), world.sides[1].arm(a, slot)),
                _ => note(id, b, Note::new(NoteKind::Absent)),
            };
            world.sides[0].post(request);
        }
        world.until("a round", |w| w.sides[1].arrived() == ROUND && w.sides[0].sent() == ROUND);
        slots.extend(world.sides[1].arrivals(a).into_iter().filter_map(|(_, lease)| lease));
        let sent = world.sides[0].outcomes().into_iter().filter_map(|(_, source, _)| source);
        sources.extend(sent.map(|source| -> Lease { source.thaw().unwrap() }));
    }
    begun.elapsed()
}

fn median(mut all: Vec<Duration>) -> f64 {
    all.sort();
    all[all.len() / 2].as_secs_f64()
}

#[test]
fn requests_complete_one_by_one_and_by_the_list() {
    if !is_there() {
        return;
    }
    let runs = std::env::var("VERBS_SIGNALLING_RUNS").ok().map(|text| text.parse::<usize>().unwrap());
    let rounds = ROUNDS[usize::from(runs.is_some())];
    for bytes in [0, 4096] {
        let (mut seldom, mut always) = (Vec::new(), Vec::new());
        for _ in 0..runs.unwrap_or(1) {
            seldom.push(run(SELDOM, rounds, bytes));
            always.push(run(ALWAYS, rounds, bytes));
        }
        let ratios: Vec<String> =
            always.iter().zip(&seldom).map(|(a, s)| format!("{:.2}", a.as_secs_f64() / s.as_secs_f64())).collect();
        println!("{bytes} bytes: always {always:?}, seldom {seldom:?}, pair by pair {}", ratios.join(" "));
        println!(
            "{bytes} bytes: ratio of medians {:.3} (every request over a quarter of the queue)",
            median(always) / median(seldom)
        );
    }
}
