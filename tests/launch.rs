//! The launcher with real processes: how jobs end, what they say, and that nobody is left behind.
//!
//! Ranks that take part in the rendezvous are this test program itself, started again (see `rank_process`).
//!
//! Invariant: every test ends all that it started, also when it fails.

use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use gradwire::{
    TensorSpec,
    launch::{EXIT_PREEMPTED, Job, JobOptions, Outcome, OutputTo, Signal},
    session::{self, JobConfig, Member, Report},
    types::{Rank, Role, ShardId},
};
use nix::{
    sys::signal::{self, Signal as OsSignal},
    unistd::Pid,
};

const GRADWIRE: &str = env!("CARGO_BIN_EXE_gradwire");

/// Long enough for a busy machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(40);

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    home
}

/// A shell command line that becomes this program in the part of a rank.
fn part(behaviour: &str) -> String {
    let program = std::env::current_exe().unwrap();
    format!("RANK_BEHAVIOUR={behaviour} exec {} --exact rank_process --nocapture --test-threads=1", program.display())
}

fn shell(line: &str) -> Vec<OsString> {
    ["sh", "-c", line].map(OsString::from).to_vec()
}

fn options(home: &Path, workers: u16, worker: &str) -> JobOptions {
    let config = JobConfig { name: "test".into(), workers, join_ms: 30_000, ..JobConfig::default() };
    let mut options = JobOptions::new(config, shell(worker), GRADWIRE);
    options.server_command = shell(&part("serve"));
    options.home = Some(home.into());
    options.output = OutputTo::Collect;
    options.grace = Duration::from_secs(1);
    options
}

fn end(job: &mut Job) -> Outcome {
    job.wait_for(PATIENCE).unwrap_or_else(|| panic!("the job did not end; it has written:\n{}", job.output()))
}

/// Waits until the job has written this.
fn wait_for_text(job: &Job, text: &str) {
    wait_until(text, || job.output().contains(text));
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The number that follows a word in a text.
fn number_after(text: &str, word: &str) -> Option<i32> {
    let rest = &text[text.find(word)? + word.len()..];
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
}

fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie is dead, only not yet reaped by whoever adopted it.
    !stat.is_empty() && !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z')
}

fn gradwire(home: &Path, arguments: &[&str]) -> Output {
    command(home, arguments).output().unwrap()
}

fn command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(GRADWIRE);
    command.args(arguments).env("GRADWIRE_HOME", home).stdin(Stdio::null());
    command
}

/// Not a test: the part of a rank in the jobs of the tests below. Started by the test runner it does nothing.
#[test]
fn rank_process() {
    let Ok(behaviour) = std::env::var("RANK_BEHAVIOUR") else { return };
    let code = match play(&behaviour) {
        Ok(code) => code,
        Err(e) => {
            println!("rank process: {e}");
            1
        }
    };
    std::process::exit(code);
}

fn play(behaviour: &str) -> gradwire::Result<i32> {
    if behaviour == "serve" {
        return serve();
    }
    let mut member = Member::from_environment()?;
    // Four chunks, so that each of two servers has a shard to store.
    member.declare(vec![TensorSpec::new("w", [1 << 20])])?;
    member.exchange(Vec::new())?;
    let reporter = member.reporter();
    // On a line of its own: the test runner has begun one.
    println!("\nrunning as {}", member.rank());
    match behaviour {
        "finish" => {
            reporter.report(Report::Finished { summary: member.rank().index.into() })?;
            Ok(0)
        }
        "vanish" => Ok(0),
        "fail second" if member.rank().index == 1 => {
            reporter.report(Report::Failed { text: "out of ideas".into(), elsewhere: false })?;
            Ok(5)
        }
        _ => loop {
            match member.poll_command()? {
                Some(session::Command::Stop { .. }) => return Ok(9),
                Some(session::Command::JobFailed { text }) => {
                    println!("heard: {text}");
                    return Ok(1);
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        },
    }
}

/// A server as far as the rendezvous is concerned: follows every command at once.
fn serve() -> gradwire::Result<i32> {
    // The arguments that the launcher gives came after the shell's script; what they say is in the environment too.
    let mut member = Member::from_environment()?;
    member.view()?;
    member.exchange(Vec::new())?;
    let (reporter, rank) = (member.reporter(), member.rank());
    let written = |clock| Report::CheckpointWritten { shard: ShardId(rank.index), clock, info: "part".into() };
    loop {
        match member.poll_command()? {
            Some(session::Command::Checkpoint { clock }) => reporter.report(written(clock))?,
            Some(session::Command::Stop { clock: Some(clock), .. }) => {
                reporter.report(written(clock))?;
            }
            Some(session::Command::Leave { .. }) => return Ok(75),
            Some(session::Command::Stop { clock: None, .. } | session::Command::End { .. }) => {
                reporter.report(Report::Finished { summary: "served".into() })?;
                return Ok(0);
            }
            Some(session::Command::JobFailed { .. }) => return Ok(1),
            Some(_) => {}
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Not a test: a launcher that is killed by `killing_the_launcher_leaves_nobody`.
#[test]
fn launcher_process() {
    let Ok(home) = std::env::var("LAUNCHER_HOME") else { return };
    let line = "setsid sleep 600 & echo grandchild=$!; sleep 600 & echo child=$!; echo self=$$; wait";
    let mut options = options(Path::new(&home), 1, line);
    options.output = OutputTo::Inherit;
    Job::start(options).unwrap().wait();
}

#[test]
fn a_job_runs_to_its_end_with_its_ranks_before_their_lines() {
    let home = home();
    let mut job = Job::start(options(home.path(), 2, &part("finish"))).unwrap();
    assert!(job.directory().join("token").exists());
    let outcome = end(&mut job);
    assert_eq!((outcome.code, outcome.reason.as_deref()), (0, None), "{}", job.output());
    assert_eq!(outcome.summaries[&Rank::worker(1)], 1);
    assert_eq!(outcome.summaries[&Rank::server(0)], "served");
    for line in ["[w0] running as worker 0\n", "[w1] running as worker 1\n"] {
        assert!(job.output().contains(line), "{}", job.output());
    }
    assert!(!job.directory().exists(), "removed at the end");
}

#[test]
fn commands_that_never_join_are_an_ordinary_job() {
    let home = home();
    let line = r#"printf 'a\nb'; echo "rank $GRADWIRE_RANK of $GRADWIRE_WORKERS on $GRADWIRE_CORES" >&2"#;
    let flags = ["run", "--by-hand", "s0", "-n", "2", "--name", "plain", "--", "sh", "-c", line];
    let output = gradwire(home.path(), &flags);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{err}");
    for line in ["[w0] a\n", "[w0] b\n", "[w1] a\n", "[w1] b\n"] {
        assert!(out.contains(line), "{out}");
    }
    assert!(err.contains("[w1] rank 1 of 2 on ") && err.contains("job plain, directory"), "{err}");
}

#[test]
fn the_first_failure_ends_all_with_its_code() {
    let home = home();
    let line = r#"[ $GRADWIRE_RANK = 1 ] && exit 42; sleep 600"#;
    let began = Instant::now();
    let output = gradwire(home.path(), &["run", "--by-hand", "s0", "-n", "3", "--", "sh", "-c", line]);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(42), "{err}");
    assert!(err.contains("worker 1 ended with exit code 42"), "{err}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 0, "no directory is left");
}

#[test]
fn a_rank_that_reports_its_failure_is_quoted() {
    let home = home();
    let mut job = Job::start(options(home.path(), 2, &part("'fail second'"))).unwrap();
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap();
    assert!(reason.contains("worker 1 failed: out of ideas"), "{reason}");
    assert_eq!(outcome.code, 5, "{reason}");
    assert!(job.output().contains("[w0] heard: worker 1 failed: out of ideas"), "{}", job.output());
}

#[test]
fn a_killed_rank_is_named_with_its_signal() {
    for (rank, name) in [(Rank::worker(1), "worker 1"), (Rank::server(0), "server 0")] {
        let home = home();
        let mut job = Job::start(options(home.path(), 2, &part("hang"))).unwrap();
        wait_for_text(&job, "running as worker 0");
        job.kill(rank, OsSignal::SIGKILL);
        let outcome = end(&mut job);
        assert_eq!(outcome.code, 137);
        assert!(outcome.reason.unwrap().starts_with(&format!("{name} was killed by signal 9")));
    }
}

#[test]
fn a_worker_that_leaves_without_a_word_fails_the_job() {
    let home = home();
    let outcome = end(&mut Job::start(options(home.path(), 1, &part("vanish"))).unwrap());
    assert_eq!(outcome.code, 1);
    let reason = outcome.reason.unwrap();
    assert!(reason.contains("worker 0") && reason.contains("without having finished"), "{reason}");
}

#[test]
fn a_worker_that_does_not_join_beside_one_that_does_is_named() {
    let home = home();
    let line = format!("[ $GRADWIRE_RANK = 0 ] && exit 0; {}", part("hang"));
    let began = Instant::now();
    let outcome = end(&mut Job::start(options(home.path(), 2, &line)).unwrap());
    assert!(outcome.reason.unwrap().contains("worker 0 ended before it joined the job"));
    assert!(began.elapsed() < Duration::from_secs(15), "long before the 30 s to join are over");
}

#[test]
fn a_missing_rank_is_named_in_time() {
    let home = home();
    let line = format!("[ $GRADWIRE_RANK = 1 ] && exec sleep 600; {}", part("hang"));
    let mut options = options(home.path(), 2, &line);
    options.config.join_ms = 2000;
    let outcome = end(&mut Job::start(options).unwrap());
    assert_eq!(outcome.code, 1);
    assert!(outcome.reason.unwrap().contains("worker 1 has not joined within 2 s"));
}

#[test]
fn a_command_that_does_not_exist_is_named() {
    let home = home();
    let mut options = options(home.path(), 1, "");
    options.command = vec!["/nonexistent/program".into()];
    let outcome = end(&mut Job::start(options).unwrap());
    assert!(outcome.reason.unwrap().contains("/nonexistent/program"));
}

#[test]
fn nobody_is_left_behind_whatever_group_he_moved_to() {
    let home = home();
    // A worker that ignores TERM, with a child in its group and a grandchild in a session of its own, all holding the pipes.
    let line = "trap '' TERM; sleep 600 & echo child=$!; setsid sh -c 'echo stray=$$; exec sleep 600' & \
                echo self=$$; wait; wait";
    let mut job = Job::start(options(home.path(), 1, line)).unwrap();
    for word in ["child=", "stray=", "self="] {
        wait_until(word, || number_after(&job.output(), word).is_some());
    }
    let output = job.output();
    let pids = ["child=", "stray=", "self="].map(|word| number_after(&output, word).unwrap());
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    let began = Instant::now();
    job.signal(Signal::Interrupt);
    let outcome = end(&mut job);
    assert_eq!(outcome.code, 130);
    assert!(began.elapsed() < Duration::from_secs(15));
    assert!(!pids.iter().any(|&pid| is_alive(pid)), "{pids:?}");
}

#[test]
fn killing_the_launcher_leaves_nobody() {
    let home = home();
    let mut launcher = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "launcher_process", "--nocapture"])
        .env("LAUNCHER_HOME", home.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut seen = String::new();
    let mut stdout = launcher.stdout.take().unwrap();
    let words = ["grandchild=", "] child=", "self="];
    while !words.iter().all(|word| number_after(&seen, word).is_some() && seen.ends_with('\n')) {
        let mut bytes = [0; 4096];
        let n = std::io::Read::read(&mut stdout, &mut bytes).unwrap();
        assert!(n > 0, "the launcher ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
    }
    let pids = words.map(|word| number_after(&seen, word).unwrap());
    let server: i32 = {
        let listed = std::fs::read_to_string(home.path().join("test/pids")).unwrap();
        listed.lines().find(|line| line.ends_with("server 0")).unwrap().split(' ').next().unwrap().parse().unwrap()
    };
    assert!(pids.iter().chain([&server]).all(|&pid| is_alive(pid)));
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    for pid in pids.into_iter().chain([server]) {
        wait_until("the end of a rank", || !is_alive(pid));
    }
    wait_until("the end of the directory", || !home.path().join("test").exists());
}

#[test]
fn preemption_writes_a_checkpoint_and_has_a_code_of_its_own() {
    let home = home();
    let mut options = options(home.path(), 2, &part("hang"));
    options.config.servers = 2;
    options.config.checkpoint.dir = Some(home.path().join("ckpt"));
    let (manifests, written) = std::sync::mpsc::channel();
    options.on_checkpoint = Some(Box::new(move |clock, parts, _| {
        manifests.send((clock, parts.len())).unwrap();
        Ok(())
    }));
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "running as worker 1");
    job.signal(Signal::Preempt(OsSignal::SIGTERM as i32));
    let outcome = end(&mut job);
    let reason = outcome.reason.unwrap();
    assert_eq!(outcome.code, EXIT_PREEMPTED, "{reason}\n{}", job.output());
    assert_eq!(written.recv().unwrap(), (outcome.checkpoint.unwrap(), 2));
    assert!(reason.contains("--resume"), "{reason}");
}

#[test]
fn without_a_checkpoint_directory_the_signal_is_passed_on() {
    let home = home();
    let line = "trap 'echo caught; exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    let flags = ["run", "--by-hand", "s0", "--name", "term", "--", "sh", "-c", line];
    let mut child = command(home.path(), &flags).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut first = String::new();
    std::io::BufRead::read_line(&mut out, &mut first).unwrap();
    assert_eq!(first, "[w0] ready\n");
    signal::kill(Pid::from_raw(child.id() as i32), OsSignal::SIGTERM).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut out, &mut rest).unwrap();
    assert_eq!(rest, "[w0] caught\n");
    assert_eq!(child.wait().unwrap().code(), Some(143));
}

#[test]
fn strangers_and_impostors_do_not_disturb_a_running_job() {
    let home = home();
    let mut job = Job::start(options(home.path(), 2, &part("hang"))).unwrap();
    wait_for_text(&job, "running as worker 1");
    let address = job.address().clone();
    let wrong = gradwire::wire::JobToken::random().unwrap();
    let text = Member::join(&address, &wrong, Role::Worker, Some(0)).unwrap_err().to_string();
    assert!(text.contains("wrong token"), "{text}");
    let text = Member::join(&address, job.token(), Role::Worker, Some(1)).unwrap_err().to_string();
    assert!(text.contains("worker 1 has joined already"), "{text}");
    let mut stranger = std::net::TcpStream::connect(address.to_string()).unwrap();
    std::io::Write::write_all(&mut stranger, &[0x16; 8000]).unwrap();
    assert_eq!(job.wait_for(Duration::from_millis(700)), None, "the job goes on");
    job.signal(Signal::Interrupt);
    assert_eq!(end(&mut job).code, 130);
}

#[test]
fn a_running_job_is_found_by_its_name() {
    let home = home();
    let mut options = options(home.path(), 1, &part("hang"));
    options.config.checkpoint.dir = Some(home.path().join("ckpt"));
    options.on_checkpoint = Some(Box::new(|_, _, _| Ok(())));
    let mut job = Job::start(options).unwrap();
    wait_for_text(&job, "running as worker 0");
    let output = gradwire(home.path(), &["status", "test", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["ranks"][1]["rank"], serde_json::json!({ "role": "worker", "index": 0 }));
    let table = gradwire(home.path(), &["status", "test"]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("worker 0     running"), "{table}");
    assert_eq!(gradwire(home.path(), &["status"]).stdout, b"test\n");
    let output = gradwire(home.path(), &["checkpoint", "now", "test"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("checkpoint of clock 2 is complete"), "{text}{:?}", output.stderr);
    let output = gradwire(home.path(), &["status", "tset"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("running are test"));
    let again = Job::start(self::options(home.path(), 1, "true"));
    assert!(again.err().unwrap().to_string().contains("a job named `test` is running"));
    job.signal(Signal::Interrupt);
    end(&mut job);
}

#[test]
fn a_process_joins_by_hand() {
    let home = home();
    let mut options = options(home.path(), 2, &part("finish"));
    options.by_hand = [Rank::worker(1)].into();
    let mut job = Job::start(options).unwrap();
    let node = ["node", "--role", "worker", "--rendezvous", &job.address().to_string(), "--", "sh", "-c"];
    let by_hand = |token: &Path| {
        let mut command = command(home.path(), &node);
        command.arg(part("finish")).env("GRADWIRE_TOKEN_FILE", token).env_remove("GRADWIRE_TOKEN");
        command.stdout(Stdio::piped()).output().unwrap()
    };
    let wrong = home.path().join("wrong");
    std::fs::write(&wrong, gradwire::wire::JobToken::random().unwrap().to_hex()).unwrap();
    let refused = by_hand(&wrong);
    assert!(String::from_utf8_lossy(&refused.stdout).contains("wrong token"), "{refused:?}");
    let output = by_hand(&job.directory().join("token"));
    assert!(String::from_utf8_lossy(&output.stdout).contains("running as worker 1"), "{output:?}");
    assert_eq!(end(&mut job).code, 0, "{}", job.output());
}

#[test]
fn the_command_line_is_told_what_is_right() {
    let home = home();
    for (arguments, hint) in [
        (vec!["run", "--set", "chunk_byte=1", "--", "true"], "did you mean `chunk_bytes`"),
        (vec!["run", "--optimizer", "adamx", "--", "true"], "did you mean `adam`"),
        (vec!["run", "--workers", "0", "--", "true"], "`workers` is 0"),
        (vec!["run"], "no command for the workers"),
        (vec!["run", "--by-hand", "w7", "--", "true"], "no such rank"),
        (vec!["rum"], "run"),
        (vec!["node", "--role", "server", "--rendezvous", "nowhere"], "host:port"),
        (vec!["status", "../x"], "cannot name a job"),
    ] {
        let output = gradwire(home.path(), &arguments);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {err}");
        assert!(err.contains(hint), "{arguments:?}: {err}");
    }
}

#[test]
fn info_says_what_there_is_and_why_not_more() {
    let home = home();
    let output = gradwire(home.path(), &["info", "--json"]);
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (fabric, about) in [("shm", "one host"), ("tcp", "epoll"), ("soft", "by name only")] {
        assert_eq!(info["fabrics"][fabric]["available"], true, "{}", info["fabrics"]);
        let told = info["fabrics"][fabric]["about"].as_str().unwrap();
        assert!(told.contains(about) || fabric == "tcp" && told.contains("io_uring"), "{told}");
    }
    let verbs = &info["fabrics"]["verbs"];
    assert!(verbs["available"] == true || !verbs["why"].as_str().unwrap().is_empty(), "{verbs}");
    assert!(!info["cores"].as_array().unwrap().is_empty());
    let plain = gradwire(home.path(), &["info"]);
    let plain = String::from_utf8_lossy(&plain.stdout).into_owned();
    for word in ["topology", "numa", "huge pages", "memlock", "tcp: yes", "verbs: ", "isa", "gpus"] {
        assert!(plain.contains(word), "{word} is not in\n{plain}");
    }
    let isas = info["isa"]["kernels"].as_array().unwrap();
    assert_eq!(isas.last(), Some(&info["isa"]["chosen"]), "the widest is taken");
    assert!(info["huge_pages"]["regions"]["huge"] == true || info["huge_pages"]["regions"]["why"].is_string());
}
