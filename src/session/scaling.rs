//! Which shard moves where as servers join and leave: the fewest moves that even the shards out, one at a time.
//!
//! A job of `n` servers has those of the numbers below `n`. A move is a tenure that names another lane ([`Tenure::given_to`]); what
//! follows from it is the lanes' own affair.
//!
//! Invariant: one shard is on the move at a time; whatever is given to a server that is gone is taken back, whoever asked for it.

use super::{JobConfig, Tenure};
use crate::types::{PeerId, Rank, ShardId};

/// What is to be done next about the shards of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// This lane is to follow from now on, or none.
    Give(ShardId, Option<PeerId>),
    /// A shard is on the move.
    Moves(ShardId),
    /// A shard is to go to a server that is not there.
    Awaits(Rank),
    /// Every shard is where it is to be.
    Rests,
}

/// What is to be done next to have the shards on the servers below `servers` (on those where they are, without a number), where
/// `may_follow` says of a server whether a shard can be given to it.
pub fn next_step(tenures: &[Tenure], servers: Option<u16>, may_follow: impl Fn(Rank) -> bool) -> Step {
    let held = || (0..).map(ShardId).zip(tenures);
    let given = held().find_map(|(shard, tenure)| Some((shard, tenure.other?, tenure.is_paired)));
    if let Some((shard, to, is_paired)) = given {
        // While it counts as complete, whoever serves has the next word.
        return if may_follow(to.rank) || is_paired { Step::Moves(shard) } else { Step::Give(shard, None) };
    }
    let Some(servers) = servers.filter(|servers| *servers > 0) else { return Step::Rests };
    let load = |server: u16| held().filter(|(_, tenure)| tenure.primary.rank == Rank::server(server)).count();
    let emptiest = (0..servers).min_by_key(|server| load(*server)).expect("there is at least one");
    let fullest = (0..servers).rev().max_by_key(|server| load(*server)).expect("there is at least one");
    let leaves = held().find(|(_, tenure)| tenure.primary.rank.index >= servers);
    let uneven = || {
        let of_fullest = held().filter(|(_, tenure)| tenure.primary.rank == Rank::server(fullest));
        of_fullest.last().filter(|_| load(fullest) > load(emptiest) + 1)
    };
    match leaves.or_else(uneven) {
        None => Step::Rests,
        Some(_) if !may_follow(Rank::server(emptiest)) => Step::Awaits(Rank::server(emptiest)),
        Some((shard, _)) => Step::Give(shard, Some(JobConfig::seat(shard, emptiest))),
    }
}

/// How many shards move until there are so many servers.
pub fn moves_to(tenures: &[Tenure], servers: u16) -> usize {
    let mut tenures = tenures.to_vec();
    let mut moves = 0;
    while let Step::Give(shard, to) = next_step(&tenures, Some(servers), |_| true) {
        tenures[usize::from(shard.0)] = Tenure::alone(to.expect("nobody is gone here"));
        moves += 1;
    }
    moves
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shards on these servers.
    fn on(servers: &[u16]) -> Vec<Tenure> {
        let lanes = servers.iter().zip(0..).map(|(server, shard)| JobConfig::seat(ShardId(shard), *server));
        lanes.map(Tenure::alone).collect()
    }

    #[test]
    fn shards_are_evened_out_by_the_fewest_moves() {
        for shards in 1..9u16 {
            for (before, after) in (1..6).flat_map(|before| (1..6).map(move |after| (before, after))) {
                let mut tenures = on(&(0..shards).map(|shard| shard % before).collect::<Vec<_>>());
                let foreseen = moves_to(&tenures, after);
                let mut moves = 0;
                while let Step::Give(shard, to) = next_step(&tenures, Some(after), |_| true) {
                    tenures[usize::from(shard.0)] = Tenure::alone(to.unwrap());
                    moves += 1;
                }
                let load = |server| tenures.iter().filter(|tenure| tenure.primary.rank.index == server).count();
                let loads: Vec<usize> = (0..after).map(load).collect();
                assert_eq!(loads.iter().sum::<usize>(), usize::from(shards), "{before} to {after}");
                assert!(
                    loads.iter().max().unwrap() - loads.iter().min().unwrap() <= 1,
                    "{before} to {after}: {loads:?}"
                );
                assert_eq!(moves, foreseen);
                assert_eq!(tenures[0].primary.rank, Rank::server(0), "the shard that decides stays");
                // Whoever leaves gives up all, and whoever joins gets no more than its share.
                let leaving = (0..shards).filter(|shard| shard % before >= after).count();
                let joining = usize::from(after.saturating_sub(before)) * usize::from(shards) / usize::from(after);
                assert!(moves <= leaving.max(joining) + usize::from(after), "{before} to {after}: {moves} moves");
            }
        }
        assert_eq!(moves_to(&on(&[0, 1, 0, 1]), 4), 2);
        assert_eq!(moves_to(&on(&[0, 1, 2, 3]), 1), 3);
    }

    #[test]
    fn one_shard_moves_at_a_time_and_comes_back_from_the_dead() {
        let mut tenures = on(&[0, 0, 0, 0]);
        let [one, two] = [Rank::server(1), Rank::server(2)];
        assert_eq!(next_step(&tenures, Some(2), |rank| rank != one), Step::Awaits(one));
        let to = JobConfig::seat(ShardId(3), 1);
        assert_eq!(next_step(&tenures, Some(2), |_| true), Step::Give(ShardId(3), Some(to)));
        tenures[3] = tenures[3].given_to(Some(to)).unwrap();
        assert_eq!(next_step(&tenures, Some(3), |_| true), Step::Moves(ShardId(3)), "whatever else is to move");
        for wanted in [None, Some(2)] {
            assert_eq!(next_step(&tenures, wanted, |rank| rank == two), Step::Give(ShardId(3), None));
        }
        tenures[3] = Tenure { is_paired: true, ..tenures[3] };
        assert_eq!(next_step(&tenures, None, |_| false), Step::Moves(ShardId(3)), "who serves goes on alone first");
        assert_eq!(next_step(&on(&[0, 1]), None, |_| true), Step::Rests);
    }
}
