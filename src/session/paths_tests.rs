//! What found no room in the driver leaves in its order.
//!
//! Invariant: requests to one peer leave in the order in which they were given.

use super::*;
use crate::transport::sim::{SimNetwork, SimOptions};

/// Once `retry` put a request that still found no room behind the others. Pushes and replies survive that, which is why no
/// seed of the simulation notices; a `Finished` that overtakes a push would not.
#[test]
fn what_found_no_room_leaves_in_order() {
    let (mut now, step) = (Instant::now(), Duration::from_millis(1));
    let network = SimNetwork::new(
        1,
        SimOptions { delay_max: step, queue_max: 2, lingers: false, refuse_one_in: 0, corrupt_one_in: 0 },
        now,
    );
    let (server, worker) = (PeerId::server(0, 0), PeerId::worker(0));
    let second = Duration::from_secs(1);
    let options = PathOptions {
        epoch: 0,
        heartbeat: second,
        deadline: 10 * second,
        rebuild: Duration::ZERO,
        checksums: PayloadChecksums::Off,
        life: 0,
    };
    let mut ends = [server, worker].map(|me| Paths::new(network.transport(me), options));
    for (end, peer) in ends.iter_mut().zip([worker, server]) {
        end.connect(peer, &Endpoint::default(), now + second).unwrap();
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
        now += step;
        network.advance(now);
    }
    assert!(clocks.into_iter().eq(0..50));
}
