//! etcd as the store of tenures, with members that are killed: three real processes on loopback.
//!
//! Invariant: a swap that was answered with success is never undone; of two of one epoch one succeeds.

use std::time::{Duration, Instant};

use gradwire::{
    session::{EtcdStore, StoreChoice, Swap, Tenure, TenureStore},
    types::{Epoch, PeerId, ShardId},
};
use nix::sys::signal::Signal;

use super::{PATIENCE, S0, S1, cluster::Cluster, end, home, options, start, wait_for_text};

const SHARD: ShardId = ShardId(3);

fn tenure(epoch: Epoch, server: u16) -> Tenure {
    Tenure { epoch, ..Tenure::alone(PeerId::server(server, 0)) }
}

/// Swaps while members come and go: nothing may be known for a while, and what was not answered may have been done.
fn swap_in_the_end(store: &mut EtcdStore, epoch: Epoch) {
    let (deadline, next) = (Instant::now() + PATIENCE, tenure(epoch + 1, 0));
    loop {
        match store.compare_and_swap(SHARD, epoch, next) {
            Swap::Swapped => return,
            Swap::Present(present) if present == next => return,
            Swap::Present(other) => panic!("nobody else swaps: {other:?}"),
            Swap::Unavailable(why) => assert!(Instant::now() < deadline, "{why}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn etcd_keeps_tenures_while_members_die_and_none_without_a_majority() {
    let mut cluster = Cluster::start();
    let mut store = EtcdStore::open(&cluster.urls(), "job", 7).unwrap();
    let mut other = EtcdStore::open(&cluster.urls(), "job", 7).unwrap();
    assert_eq!(store.compare_and_swap(SHARD, 0, tenure(1, 0)), Swap::Swapped);
    assert_eq!(other.compare_and_swap(SHARD, 0, tenure(1, 1)), Swap::Present(tenure(1, 0)), "one of one epoch");
    let mut next_run = EtcdStore::open(&cluster.urls(), "job", 8).unwrap();
    assert_eq!(next_run.compare_and_swap(SHARD, 0, tenure(1, 1)), Swap::Swapped, "another run has its own");
    // A follower, then the leader of those that are there.
    let follower = (cluster.leader() + 1) % 3;
    cluster.kill(follower);
    swap_in_the_end(&mut store, 1);
    cluster.start_member(follower);
    cluster.wait_until_it_serves();
    let leader = cluster.leader();
    cluster.kill(leader);
    swap_in_the_end(&mut store, 2);
    let second = cluster.leader();
    cluster.kill(second);
    for _ in 0..3 {
        let outcome = store.compare_and_swap(SHARD, 3, tenure(4, 0));
        assert!(matches!(&outcome, Swap::Unavailable(why) if why.contains("etcd has not answered")), "{outcome:?}");
    }
    assert!(EtcdStore::open(&cluster.urls(), "job", 9).is_err(), "no job begins without a majority");
    cluster.start_member(second);
    swap_in_the_end(&mut store, 3);
    assert_eq!(other.compare_and_swap(SHARD, 3, tenure(4, 1)), Swap::Present(tenure(4, 0)));
    // Whoever ends takes the keys of its run along.
    drop(store);
    let mut again = EtcdStore::open(&cluster.urls(), "job", 7).unwrap();
    assert_eq!(again.compare_and_swap(SHARD, 0, tenure(1, 1)), Swap::Swapped);
}

#[test]
fn a_job_outlives_a_member_of_etcd_and_without_a_majority_nobody_takes_over() {
    let mut cluster = Cluster::start();
    let home = home();
    let mut options = options(home.path());
    options.config.store = StoreChoice::Etcd(cluster.urls());
    let mut job = start(options);
    let first = cluster.leader();
    cluster.kill(first);
    job.kill(S1, Signal::SIGKILL);
    wait_for_text(&job, "redundancy is full again");
    let second = cluster.leader();
    cluster.kill(second);
    job.kill(S0, Signal::SIGKILL);
    wait_for_text(&job, "no copy of a shard can take over, since that cannot be written down: etcd has not answered");
    let before = job.output().matches("redundancy is full again").count();
    cluster.start_member(second);
    super::wait_until(&job, "redundancy again", || job.output().matches("redundancy is full again").count() > before);
    std::fs::write(home.path().join("finish"), "").unwrap();
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
}
