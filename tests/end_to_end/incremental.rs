//! Jobs that store only what has changed: they go on from such checkpoints with the bits of a job that stored everything.
//!
//! Invariant: what is compared with was written by a job that linked to nothing.

use std::process::Command;

use gradwire::{checkpoint, launch::JobOptions};

use crate::{
    jobs::{home, options, run, stored, with_variable},
    program::model,
};

/// Most chunks change at every eighth clock only.
fn rare(home: &std::path::Path, incremental: bool) -> JobOptions {
    let mut options = options(home, "rare");
    let checkpoint = &mut options.config.checkpoint;
    (checkpoint.every, checkpoint.keep, checkpoint.incremental) = (Some(1), 2, incremental);
    options
}

#[test]
fn a_job_goes_on_from_links_with_another_number_of_servers() {
    let all = vec![model(); 2];
    let [home, other] = [home(), home()];
    let mut first = rare(home.path(), true);
    with_variable(&mut first, "WORKER_STEPS", 21);
    run(first);
    let dir = home.path().join("checkpoints");
    let found = checkpoint::latest(&dir).unwrap().checkpoint.unwrap();
    let linked = found.manifest().files.iter().filter(|file| file.since.is_some()).count();
    assert!(
        (found.clock(), found.manifest().format_version()) == (21, 3) && linked > 0,
        "{linked} files are linked to"
    );
    for arguments in [vec!["list"], vec!["verify"], vec!["export"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gradwire"));
        command.arg("checkpoint").args(&arguments).arg(&dir);
        if arguments == ["export"] {
            command.arg(home.path().join("model.safetensors"));
        }
        let told = command.output().unwrap();
        let text = String::from_utf8_lossy(&told.stdout) + String::from_utf8_lossy(&told.stderr);
        assert!(told.status.success(), "{arguments:?}: {text}");
        assert!(arguments != ["list"] || text.contains("2 shards") && text.contains("of them linked"), "{text}");
    }
    let mut second = rare(home.path(), true);
    (second.config.resume, second.config.servers) = (Some(dir), 3);
    run(second);
    run(rare(other.path(), false));
    assert_eq!(stored(home.path(), &all), stored(other.path(), &all));
}
