//! The same job on every fabric, and on several at once: the same bits, and the job says which path took which fabric.

use std::ffi::OsString;

use gradwire::{
    launch::{Job, JobOptions},
    session::Fabric,
    transport::{
        soft::SoftFaults,
        verbs::{VerbsOptions, VerbsTransport},
    },
    types::PeerId,
    wire::{JobToken, handshake::Identity},
};

use crate::{
    bits::{same, simulated},
    jobs::{digests, end, home, options, run, stored},
    program::model,
};

/// Lets rank `index` of `role` ("worker", "server") do without all fabrics but these.
pub fn restrict(options: &mut JobOptions, role: &str, index: u16, fabrics: &str) {
    let prefix = format!("if [ $GRADWIRE_RANK = {index} ]; then export GRADWIRE_RANK_TRANSPORTS={fabrics}; fi; ");
    if role == "worker" {
        options.command[2] = (prefix + options.command[2].to_str().unwrap()).into();
    } else {
        let command = options.server_command.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ");
        let line = format!("{prefix}exec {command} \"$@\"");
        options.server_command = ["sh", "-c", &line, "server"].map(OsString::from).to_vec();
    }
}

/// Two workers and two servers, of which worker 1 knows tcp only and server 1 has no shared memory: worker 0 reaches server 0
/// over shm and server 1 over soft, worker 1 reaches both over tcp.
pub fn mixed(options: &mut JobOptions) {
    options.config.transports = vec![Fabric::Shm, Fabric::Soft, Fabric::Tcp];
    restrict(options, "worker", 1, "tcp");
    restrict(options, "server", 1, "soft,tcp");
}

/// Loss, duplicates and late packets, more than any network would show.
pub fn hostile() -> SoftFaults {
    SoftFaults { loss: 0.05, duplicate: 0.02, reorder: 0.02, seed: 11, ..SoftFaults::default() }
}

/// Runs a job that must go well and end with the simulator's bits; how many paths each fabric carried.
fn run_alike(options: JobOptions, home: &std::path::Path, what: &str) -> Vec<(String, usize)> {
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{what}: {:?}\n{}", outcome.reason, job.output());
    let all = vec![model(); 2];
    same(&simulated(all.clone(), false), &stored(home, &all), what);
    let digests = digests(&job.output());
    assert!(digests.len() == 2 && digests[0] == digests[1], "{what}: {}", job.output());
    outcome.paths.into_iter().collect()
}

fn alone(fabric: Fabric) {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![fabric];
    let paths = run_alike(options, home.path(), fabric.name());
    assert_eq!(paths, [(fabric.name().to_string(), 4)]);
}

#[test]
fn shm_alone_gives_the_bits_of_the_simulator() {
    alone(Fabric::Shm);
}

#[test]
fn soft_alone_gives_the_bits_of_the_simulator() {
    alone(Fabric::Soft);
}

#[test]
fn soft_under_loss_reordering_and_duplicates_gives_the_same_bits() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Soft];
    options.config.soft = hostile();
    run_alike(options, home.path(), "soft with faults");
}

#[test]
fn three_fabrics_in_one_job_give_the_same_bits() {
    let home = home();
    let mut options = options(home.path(), "train");
    mixed(&mut options);
    options.config.soft = hostile();
    let paths = run_alike(options, home.path(), "shm, soft and tcp");
    let expected = [("shm", 1), ("soft", 1), ("tcp", 2)].map(|(name, count)| (name.to_string(), count));
    assert_eq!(paths, expected);
}

/// Verbs where there is an RDMA device: worker 0 reaches server 0 over shm and server 1 over verbs, worker 1 both over tcp.
#[test]
fn verbs_shm_and_tcp_in_one_job_give_the_same_bits() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Shm, Fabric::Verbs, Fabric::Tcp];
    restrict(&mut options, "worker", 1, "tcp");
    restrict(&mut options, "server", 1, "verbs,tcp");
    let identity = Identity { job: 1, token: JobToken::random().unwrap(), me: PeerId::worker(0), epoch: 0 };
    let absence = VerbsTransport::new(VerbsOptions::new(identity)).err();
    let paths = run_alike(options, home.path(), "shm, verbs and tcp");
    let expected: &[(&str, usize)] = match &absence {
        None => &[("shm", 1), ("tcp", 2), ("verbs", 1)],
        Some(absence) => {
            assert!(std::env::var_os("GRADWIRE_TEST_RDMA").is_none(), "GRADWIRE_TEST_RDMA is set: {absence}");
            println!("verbs is NOT among the fabrics here: {absence}");
            &[("shm", 1), ("tcp", 3)]
        }
    };
    assert!(paths.iter().map(|(name, count)| (name.as_str(), *count)).eq(expected.iter().copied()), "{paths:?}");
}

/// Left to itself a job on one host takes shared memory.
#[test]
fn what_is_not_chosen_by_name_is_shared_memory_on_one_host() {
    let home = home();
    assert_eq!(run_alike(options(home.path(), "train"), home.path(), "default"), [("shm".to_string(), 4)]);
    // Whether there is RDMA or not: nothing better was missed.
    let output = run(options(home.path(), "train"));
    assert!(!output.contains("gradwire doctor"), "{output}");
}

#[test]
fn ranks_without_a_common_fabric_are_told_which_each_has() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.transports = vec![Fabric::Shm, Fabric::Tcp];
    restrict(&mut options, "worker", 0, "shm");
    restrict(&mut options, "worker", 1, "shm");
    restrict(&mut options, "server", 1, "tcp");
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert_ne!(outcome.code, 0);
    for part in ["worker", "server 1", "shm", "tcp", "no fabric in common", "--transport"] {
        assert!(reason.contains(part), "no `{part}` in: {reason}");
    }
}
