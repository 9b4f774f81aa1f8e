//! Calls that may wait without end, and why each that is left may.
//!
//! Invariant: an excuse names one file and one call, and says what ends the wait; one that nobody needs any more is an error.

use super::{
    complain,
    source::{Source, is_word, read_all},
};

/// Calls that wait for as long as it takes, by what they are called here.
const ENDLESS: &[(&str, &[&str])] = &[
    ("thread::sleep", &["thread", ":", ":", "sleep", "("]),
    ("thread::park", &["thread", ":", ":", "park", "("]),
    ("thread::scope", &["thread", ":", ":", "scope", "("]),
    ("recv", &[".", "recv", "(", ")"]),
    ("join", &[".", "join", "(", ")"]),
    ("wait", &[".", "wait", "(", ")"]),
    ("wait_while", &[".", "wait_while", "("]),
    ("waitpid", &["waitpid", "("]),
    ("waitid", &["waitid", "("]),
    ("accept", &[".", "accept", "(", ")"]),
    ("TcpStream::connect", &["TcpStream", ":", ":", "connect", "("]),
    ("read_exact", &[".", "read_exact", "("]),
    ("read_to_end", &[".", "read_to_end", "("]),
    ("read_line", &[".", "read_line", "("]),
    ("output", &[".", "output", "(", ")"]),
    ("status", &[".", "status", "(", ")"]),
    ("set_read_timeout(None)", &["set_read_timeout", "(", "None"]),
    ("PollTimeout::NONE", &["PollTimeout", ":", ":", "NONE"]),
];

/// File, call, and what ends the wait.
const ALLOWED: &[(&str, &str, &str)] = &[
    ("src/cli/bench/exchange.rs", "output", "`Job::output`: a text that is there"),
    (
        "src/cli/bench/parts.rs",
        "output",
        "a benchmark of our own in another process; whoever asked for it sees it run and may interrupt it",
    ),
    ("src/cli/gpu.rs", "output", "`Job::output`: a text that is there"),
    ("src/cli/group.rs", "wait", "the job, whose own waits have deadlines"),
    (
        "src/cli/run.rs",
        "wait",
        "the job, whose own waits have deadlines; the thread of signals waits for signals and ends with the process",
    ),
    ("src/cli/top.rs", "thread::sleep", "the time between two looks, which was asked for"),
    (
        "src/launch/job.rs",
        "join",
        "the supervisor has been told to end the job, and kills whoever has not ended within `grace`",
    ),
    (
        "src/launch/keeper.rs",
        "read_to_end",
        "the keeper waits for the launcher's end, which closes the pipe, whatever it is",
    ),
    ("src/launch/keeper.rs", "wait", "the keeper has been told that nothing is left to do; its pipe is closed"),
    ("src/launch/meeting.rs", "thread::sleep", "polls for a file, between two looks, under a deadline"),
    ("src/launch/processes.rs", "join", "the readers have been told to stop, and look every fraction of a second"),
    ("src/launch/processes.rs", "wait", "reaps a process whose end has been seen"),
    (
        "src/launch/processes.rs",
        "waitid",
        "a thread for the end of one process; the supervisor kills that by its deadlines",
    ),
    ("src/launch/remote.rs", "thread::sleep", "polls for the end of ssh or of its words, under a deadline"),
    ("src/launch/remote.rs", "wait", "reaps an ssh that has been killed"),
    ("src/launch/sweep.rs", "thread::sleep", "polls /proc for processes that end, between two looks, under a deadline"),
    ("src/mem/pages.rs", "join", "a thread that touches pages and does nothing else"),
    ("src/mem/pages.rs", "thread::scope", "threads that touch pages and do nothing else"),
    (
        "src/server/writer.rs",
        "join",
        "the lane's end closes the writer's channel; the launcher ends a job whose disk hangs by `setup_ms`",
    ),
    (
        "src/server/writer.rs",
        "recv",
        "the writer waits for snapshots of its own process, whose end closes the channel; a lane that has ended waits for the \
         writer, and the launcher ends a job whose disk hangs by `setup_ms`",
    ),
    ("src/server/memory/mod.rs", "wait without a time", "the device's own deadline (`gpu_ms`) ends it"),
    (
        "src/server/hosting.rs",
        "wait without a time",
        "the launcher's words wake it, or the end of its connection, or the end of a lane",
    ),
    (
        "src/server/hosting.rs",
        "recv",
        "the process' own threads; each sends how it ended, and its end closes the channel",
    ),
    ("src/server/node.rs", "recv", "the process' own threads; each sends how it ended, and its end closes the channel"),
    ("src/session/etcd.rs", "status", "the status of an HTTP answer that is there"),
    ("src/session/metrics.rs", "join", "the thread looks twice a second whether it is to end"),
    (
        "src/session/rendezvous/handle.rs",
        "join",
        "the thread has been told to close, and does within its farewell time",
    ),
    ("src/session/rendezvous/hub.rs", "PollTimeout::NONE", "where nobody is waited for; an order wakes it"),
    ("src/session/rendezvous/hub.rs", "accept", "the port does not block; `Hub::accept` is called so too"),
    ("src/session/rendezvous/member.rs", "join", "the connection has been shut down, which ends the reader"),
    (
        "src/session/rendezvous/member.rs",
        "set_read_timeout(None)",
        "the launcher's word; keep-alive probes end it, or leaving the seat",
    ),
    ("src/session/rendezvous/mod.rs", "thread::sleep", "between two tries to reach the rendezvous, under a deadline"),
    (
        "src/session/rendezvous/recorder.rs",
        "join",
        "its channel is closed, and each checkpoint ends as the disk answers; ranks that waited in vain have been ended before",
    ),
    ("src/session/rendezvous/recorder.rs", "recv", "the thread waits for work; the rendezvous' end closes the channel"),
    ("src/session/rendezvous/swaps.rs", "join", "its channel is closed, and each call of the store has an end"),
    (
        "src/session/rendezvous/swaps.rs",
        "recv",
        "the store's thread waits for work; the rendezvous' end closes the channel",
    ),
    ("src/sys/header.rs", "output", "for tests: a C compiler and the program that it made"),
    ("src/tools/bench/disk.rs", "join", "threads that write files; the benchmark is of how long that takes"),
    ("src/tools/bench/disk.rs", "thread::scope", "threads that write files; the benchmark is of how long that takes"),
    ("src/tools/bench/echo/mod.rs", "accept", "after the listener has become readable, which has a deadline"),
    ("src/tools/bench/echo/mod.rs", "join", "each of these threads waits with a deadline"),
    ("src/tools/bench/echo/mod.rs", "read_exact", "the sockets have a time-out from their making on"),
    (
        "src/tools/bench/echo/mod.rs",
        "read_line",
        "a process of our own that writes its line at once; its end closes the pipe",
    ),
    ("src/tools/bench/echo/mod.rs", "wait", "reaps a process that has been killed"),
    ("src/tools/bench/echo/tcp.rs", "read_exact", "the sockets have a time-out from their making on"),
    ("src/tools/bench/echo/udp.rs", "read_exact", "the sockets have a time-out from their making on"),
    ("src/tools/bench/streams.rs", "join", "threads that compute and do nothing else"),
    ("src/tools/bench/streams.rs", "thread::scope", "threads that compute and do nothing else"),
    ("src/tools/bench/streams.rs", "wait", "a barrier of threads, each of which comes to it whatever happens"),
    ("src/tools/bench/worker.rs", "wait", "`Worker::wait`, whose deadline is `wait_ms`"),
    ("src/tools/doctor/loopback.rs", "join", "both ends of the trial have deadlines"),
    ("src/tools/doctor/loopback.rs", "thread::scope", "both ends of the trial have deadlines"),
    ("src/tools/gpu/check.rs", "wait", "its own `wait`, which has a deadline"),
    ("src/tools/gpu/job.rs", "wait", "`Worker::wait`, whose deadline is `wait_ms`"),
    ("src/transport/tcp/ring.rs", "join", "the thread makes a few system calls that do not block"),
    ("src/transport/tcp/socket.rs", "accept", "the listener does not block"),
    ("src/worker/handle/ending.rs", "wait", "`Worker::wait`, whose deadline is `wait_ms`"),
    ("src/worker/progress.rs", "join", "the thread has been woken and told to end, and looks at that first"),
];

/// A wait on a condition without a time (`.wait(guard)`, but for a type's own method of that name), or on drivers without a deadline (`.wait(…, None)`).
fn waits_without_time(source: &Source) -> Vec<usize> {
    let tokens = &source.tokens;
    let calls = (0..tokens.len()).filter(|at| source.reads(*at, &[".", "wait", "("]));
    let endless = calls.filter(|at| {
        let mut depth = 0;
        let close = (at + 2..tokens.len()).find(|index| {
            match tokens[*index].text.as_str() {
                "(" => depth += 1,
                ")" => depth -= 1,
                _ => {}
            }
            depth == 0
        });
        let close = close.expect("a call that ends");
        let own = *at > 0 && tokens[at - 1].text == "self";
        let alone = close == at + 4 && is_word(&tokens[at + 3].text) && !own;
        alone || source.reads(close - 2, &[",", "None", ")"])
    });
    endless.map(|at| tokens[at].line).collect()
}

#[test]
fn every_wait_has_a_deadline_or_a_reason() {
    let mut broken = Vec::new();
    let mut excused = Vec::new();
    for source in read_all(&["src"]) {
        let of_tests = source.path.ends_with("tests.rs") || source.path.contains("/tests/");
        let inner = source.test_lines();
        let named =
            ENDLESS.iter().flat_map(|(name, words)| source.lines_with(words).into_iter().map(|line| (*name, line)));
        let timeless = waits_without_time(&source).into_iter().map(|line| ("wait without a time", line));
        for (name, line) in named.chain(timeless) {
            if of_tests || inner.iter().any(|range| range.contains(&line)) {
                continue;
            }
            match ALLOWED.iter().find(|(path, call, _)| (*path, *call) == (source.path.as_str(), name)) {
                Some((path, call, _)) => excused.push((*path, *call)),
                None => broken.push(format!("{}:{line}: {name}", source.path)),
            }
        }
    }
    complain("whoever waits does so with a deadline, or tests/tidy/waits.rs says what ends the wait", broken);
    let needless = ALLOWED.iter().filter(|(path, call, _)| !excused.contains(&(*path, *call)));
    complain(
        "an excuse that nobody needs any more",
        needless.map(|(path, call, _)| format!("{path}: {call}")).collect(),
    );
}

/// The scanner sees what it is for, and nothing else.
#[test]
fn waits_are_recognised() {
    let lines = |text: &str| {
        let source = Source::new("src/m.rs".into(), text.into());
        let named = ENDLESS.iter().map(|(_, words)| source.lines_with(words).len()).sum::<usize>();
        named + waits_without_time(&source).len()
    };
    for endless in
        ["a.recv()", "t.join()", "c.wait(guard)", "w.wait(&mut [d], None)", "child.wait()", "s.read_exact(&mut b)"]
    {
        assert_eq!(lines(endless), 1, "{endless}");
    }
    for fine in
        ["a.recv_timeout(t)", "p.join(\"x\")", "c.wait_timeout(guard, t)", "w.wait(&mut [d], until)", "fs::read(p)"]
    {
        assert_eq!(lines(fine), 0, "{fine}");
    }
}
