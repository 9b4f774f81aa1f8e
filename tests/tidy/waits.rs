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
const ALLOWED: &[(&str, &str, &str)] = &[];

/// A wait on a condition without a time (`.wait(guard)`), or on drivers without a deadline (`.wait(…, None)`).
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
        let alone = close == at + 4 && is_word(&tokens[at + 3].text);
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
