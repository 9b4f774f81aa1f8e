//! What users meet: consistency other than bsp, pulls with deadlines, refusals, strangers on the port of a running job.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use gradwire::{Consistency, launch::Job, transport::sim::SimRandom};

use crate::jobs::{digests, end, home, options, run, wait_for_text, with_variable};

#[test]
fn stale_and_asynchronous_training_runs_to_its_end() {
    for consistency in [Consistency::Ssp { bound: 3 }, Consistency::Asp] {
        let home = home();
        let mut options = options(home.path(), "slow");
        options.config.consistency = consistency;
        let output = run(options);
        assert_eq!(digests(&output).len(), 2, "{consistency}: {output}");
    }
}

#[test]
fn a_pull_that_comes_too_early_says_so_and_brings_what_there_is() {
    let home = home();
    let output = run(options(home.path(), "too early"));
    let told = output.lines().find(|line| line.contains("pulled too early")).expect(&output);
    assert!(told.contains("server") && told.contains("chunk"), "{told}");
}

#[test]
fn two_declarations_that_disagree_are_refused_with_both_shapes() {
    let home = home();
    let mut job = Job::start(options(home.path(), "conflict")).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert_ne!(outcome.code, 0);
    for part in ["`layer0`", "[3]", "[4]", "worker 0", "worker 1"] {
        assert!(reason.contains(part), "no {part} in: {reason}");
    }
}

/// The shards' threads panicked at the first step.
#[test]
fn a_parameter_group_that_the_optimizer_lacks_is_refused_by_name() {
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.optimizer.groups.clear();
    let mut job = Job::start(options).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap_or_default();
    assert_ne!(outcome.code, 0);
    assert!(reason.contains("`layer1` is of parameter group 1") && !job.output().contains("panicked"), "{reason}");
}

/// Strangers on the servers' ports and at the rendezvous, all through a run: the bits are those of a quiet one.
#[test]
fn strangers_do_not_disturb_a_running_job() {
    let quiet = digests(&run(options(home().path(), "train")));
    let home = home();
    let mut options = options(home.path(), "train");
    options.config.ports = Some("23410-23417".parse().unwrap());
    with_variable(&mut options, "WORKER_PAUSE_MS", 10);
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "training from clock 0");
    let rendezvous: u16 = job.address().to_string().rsplit_once(':').unwrap().1.parse().unwrap();
    let mut random = SimRandom::new(1);
    let (mut reached, mut round) = (0, 0);
    while job.wait_for(Duration::ZERO).is_none() {
        for port in [23410, 23411, rendezvous] {
            let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else { continue };
            reached += 1;
            let bytes: Vec<u8> = (0..random.below(300)).map(|_| random.bits() as u8).collect();
            let _ = stream.write_all(&bytes);
            if round % 4 == 0 {
                let _ = stream.set_read_timeout(Some(Duration::from_millis(5)));
                let _ = stream.read(&mut [0; 64]);
            }
        }
        round += 1;
        assert!(round < 100_000, "the job does not end");
    }
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
    assert!(reached > 100, "only {reached} strangers got through");
    assert_eq!(digests(&job.output()), quiet);
}

#[test]
fn two_jobs_in_the_same_port_range_do_not_collide() {
    let homes = [home(), home()];
    let jobs = homes.iter().map(|home| {
        let mut options = options(home.path(), "train");
        options.config.ports = Some("23420-23439".parse().unwrap());
        Job::start(options).unwrap()
    });
    let mut jobs: Vec<Job> = jobs.collect();
    let outputs = jobs.iter_mut().map(|job| {
        let outcome = end(job);
        assert_eq!(outcome.code, 0, "{:?}\n{}", outcome.reason, job.output());
        digests(&job.output())
    });
    let outputs: Vec<_> = outputs.collect();
    assert_eq!(outputs[0], outputs[1]);
}

/// The first values come from a safetensors file for the tensors that it holds, from their own rules for the others.
#[test]
fn first_values_come_from_a_file() {
    let first = home();
    run(options(first.path(), "train"));
    let checkpoint = gradwire::checkpoint::latest(&first.path().join("checkpoints")).unwrap().checkpoint.unwrap();
    let file = first.path().join("model.safetensors");
    gradwire::checkpoint::export(&checkpoint, &file).unwrap();
    let second = home();
    let mut options = options(second.path(), "train");
    options.config.init_from = Some(file);
    // Nothing is trained: what comes out is what went in.
    with_variable(&mut options, "WORKER_STEPS", 0);
    run(options);
    let all = vec![crate::program::model(); 2];
    assert_eq!(crate::jobs::stored(second.path(), &all), crate::jobs::stored(first.path(), &all));
}
