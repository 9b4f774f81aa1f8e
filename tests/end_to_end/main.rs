//! Whole jobs with real processes over tcp: the same bits as the simulator and the oracle, failures by name, resuming,
//! preemption, every consistency.
//!
//! Workers are this test program itself, started again (see `worker_process`).
//!
//! Invariant: every test ends all that it started, also when it fails; no assertion is on how fast something is.

mod bits;
mod broken_links;
mod broken_paths;
#[path = "../lost_servers/cluster.rs"]
mod cluster;
mod damaged;
mod decisions;
mod elastic;
mod etcd;
mod every_step;
mod fabrics;
mod failing_disk;
mod failures;
mod gpu;
mod idle;
mod incremental;
mod io_uring;
mod jobs;
mod leaving;
mod live;
mod namespaces;
#[path = "../support/processes.rs"]
mod processes;
mod program;
mod program_c;
mod random_faults;
mod replicas;
mod replicas_hosts;
mod scaling;
#[path = "../seccomp/filter.rs"]
mod seccomp;
mod seen;
mod surface;
mod switch;
mod together;
mod turning;
mod verbs_hosts;
mod verbs_links;
mod verbs_pairs;
mod verdicts;
mod wire;

/// Not a test: a worker of the jobs of these tests. Started by the test runner it does nothing.
#[test]
fn worker_process() {
    let Ok(part) = std::env::var("WORKER_PART") else { return };
    if std::env::var_os("WORKER_BY_C").is_some() {
        let steps = std::env::var("WORKER_STEPS").map_or(program::STEPS, |steps| steps.parse().unwrap());
        let outcome = program_c::play(steps);
        println!("\nworker process: {outcome:?}");
        std::process::exit(i32::from(outcome.is_err()));
    }
    let code = match program::play(&part) {
        Ok(()) => 0,
        Err(gradwire::Error::Preempted { clock }) => {
            println!("\npreempted at clock {clock}");
            75
        }
        Err(error) => {
            println!("\nworker process: {error}");
            1
        }
    };
    std::process::exit(code);
}
