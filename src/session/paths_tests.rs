//! What found no room in the driver leaves in its order; slots go to whoever serves.
//!
//! Invariant: requests to one peer leave in the order in which they were given; no slot is left with a lane that serves no more.

use super::*;
use crate::{
    mem::{HugePages, Locking, RegionOptions},
    transport::sim::{SimNetwork, SimOptions, SimTransport},
};

const STEP: Duration = Duration::from_millis(1);

fn network(now: Instant) -> SimNetwork {
    let options = SimOptions { delay_max: STEP, queue_max: 2, lingers: false, refuse_one_in: 0, corrupt_one_in: 0 };
    SimNetwork::new(1, options, now)
}

fn paths(network: &SimNetwork, me: PeerId) -> Paths<SimTransport> {
    let second = Duration::from_secs(1);
    let options = PathOptions {
        epoch: 0,
        heartbeat: second,
        deadline: 10 * second,
        rebuild: Duration::ZERO,
        checksums: PayloadChecksums::Off,
        life: 0,
    };
    Paths::new(network.transport(me), options)
}

/// Once `retry` put a request that still found no room behind the others. Pushes and replies survive that, which is why no
/// seed of the simulation notices; a `Finished` that overtakes a push would not.
#[test]
fn what_found_no_room_leaves_in_order() {
    let mut now = Instant::now();
    let network = network(now);
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    let mut ends = [server, worker].map(|me| paths(&network, me));
    for (end, peer) in ends.iter_mut().zip([worker, server]) {
        end.connect(peer, &Endpoint::default(), now + Duration::from_secs(1)).unwrap();
    }
    for clock in 0..50 {
        let note = Note { clock, ..Note::new(NoteKind::Absent) };
        ends[1].post(WorkRequest { id: clock, peer: server, note, payload: None });
    }
    let mut clocks = Vec::new();
    while clocks.len() < 50 {
        for end in &mut ends {
            let mut completions = Vec::new();
            end.poll(now, &mut completions).unwrap();
            end.flush().unwrap();
            clocks.extend(completions.into_iter().filter_map(|completion| match completion {
                Completion::Arrived { note, .. } => Some(note.clock),
                _ => None,
            }));
        }
        now += STEP;
        network.advance(now);
    }
    assert!(clocks.into_iter().eq(0..50));
}

/// A slot that its transport withheld while the shard moved twice, and back, once stayed with the lane between.
#[test]
fn a_slot_that_comes_back_late_goes_to_whoever_serves_by_then() {
    let now = Instant::now();
    let network = network(now);
    let lanes = [0, 1, 2].map(|server| PeerId::server(server, 0));
    for moves in [vec![1, 2], vec![1, 2, 0], vec![1, 0], vec![1, 2, 1]] {
        let mut paths = paths(&network, PeerId::worker(0));
        let options = RegionOptions { huge_pages: HugePages::Never, lock: Locking::None, ..RegionOptions::default() };
        let (_region, slot) = Region::allocate(64, &options).unwrap();
        paths.set_aside(lanes[0]);
        paths.paths.get_mut(&lanes[0]).unwrap().armed = 1;
        let mut serves = 0;
        for next in &moves {
            paths.redirect(lanes[serves], lanes[*next], now);
            serves = *next;
            let waits = serves != 0; // for its own slots a path waits in any case
            assert_eq!(paths.inherits_later(lanes[serves]), waits, "{moves:?}");
        }
        paths.released(lanes[0], vec![slot]);
        let held = lanes.map(|lane| paths.paths.get(&lane).map_or(0, |path| path.held.len()));
        assert!(held[serves] == 1 && held.iter().sum::<usize>() == 1, "{moves:?}: {held:?}");
    }
}

/// A process that was stopped while a path was to be rebuilt goes on with what was left of the time then: word of who serves by now
/// may wait for it. While it runs, the time runs out.
#[test]
fn the_time_for_a_path_runs_only_while_this_end_does() {
    let begin = Instant::now();
    let (server, second) = (PeerId::server(0, 0), Duration::from_secs(1));
    let given_up = |stopped: Duration| {
        let network = network(begin);
        let mut paths = paths(&network, PeerId::worker(0));
        paths.options.rebuild = 10 * second;
        paths.redirect(PeerId::server(1, 0), server, begin);
        let mut completions = Vec::new();
        let mut now = begin + second;
        for pause in [second, stopped].into_iter().chain(std::iter::repeat(STEP)) {
            network.advance(now);
            paths.poll(now, &mut completions).unwrap();
            if !completions.is_empty() {
                break;
            }
            let next = paths.next_deadline().expect("a path is being rebuilt");
            now = if pause == STEP { next.max(now + STEP) } else { now + pause };
        }
        assert!(matches!(&completions[..], [Completion::Broken { peer, .. }] if *peer == server), "{completions:?}");
        now - begin
    };
    let awake = given_up(STEP);
    assert!(awake >= 10 * second && awake < 11 * second, "{awake:?}");
    let stopped = given_up(100 * second);
    assert!(stopped >= 110 * second && stopped < 112 * second, "{stopped:?}");
}
