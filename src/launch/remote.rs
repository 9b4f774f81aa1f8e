//! The launcher's end of an agent: the ssh process, what is said to it, what it says, and why it ended.
//!
//! ssh never asks for anything (`BatchMode`): a host whose key is not known, or that wants a password, is an error.
//!
//! Invariant: saying something never blocks the launcher; the agent's end, or its silence, is told exactly once.
#![forbid(unsafe_code)]

use std::{
    io::{Read, Write},
    os::fd::AsFd,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    message::{BEAT, FromAgent, LINE_BYTES_MAX, ToAgent, line},
    output::{Piece, Splitter},
    pipes::{SharedSink, lock as lock_sink},
    spawn,
};
use crate::{Error, Result, session::LineBuffer};

/// How long a host may take to accept a connection.
const CONNECT_S: u32 = 10;

/// How long ssh may take to end after its output has.
const END_TIME: Duration = Duration::from_secs(2);

/// Lines of ssh's own errors that are quoted.
const WORDS_MAX: usize = 3;

/// What a remote tells the launcher, each time with the host's number.
#[derive(Debug)]
pub(super) enum Word {
    /// The agent has said something; output is printed at once and not told.
    Agent(FromAgent),
    /// The agent is gone; why, in words that follow the host's name.
    Ended(String),
}

/// Hears what remotes tell.
pub(super) type Listener = Arc<dyn Fn(usize, Word) + Send + Sync>;

/// An agent on another host.
pub(super) struct Remote {
    child: Arc<Mutex<Child>>,
    orders: Sender<ToAgent>,
    reader: JoinHandle<()>,
}

/// What every remote of a job is started with.
pub(super) struct RemoteOptions {
    /// ssh and its own options.
    pub ssh: Vec<String>,
    /// gradwire over there.
    pub executable: String,
    /// How long an agent may be silent.
    pub silence: Duration,
}

impl Remote {
    /// Starts the agent on host number `index`.
    pub fn start(
        index: usize,
        host: &str,
        options: &RemoteOptions,
        sink: &SharedSink,
        listener: Listener,
    ) -> Result<Remote> {
        let [program, rest @ ..] = options.ssh.as_slice() else {
            return Err(Error::Config("--ssh names no command".into()));
        };
        let mut command = Command::new(program);
        // ssh takes the first value that it is given: these come before the user's.
        command.args(["-T", "-o", "BatchMode=yes", "-o", &format!("ConnectTimeout={CONNECT_S}")]).args(rest);
        command.args(["--", host, &format!("exec {} agent", quoted(&options.executable))]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = spawn::supervised(&mut command, None)?;
        let (Some(stdin), Some(stdout), Some(stderr)) = (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            unreachable!("all three are pipes");
        };
        let child = Arc::new(Mutex::new(child));
        let (orders, orders_in) = channel();
        let words = Arc::new(Mutex::new(Vec::new()));
        let (for_errors, errors_to, name) = (Arc::clone(&words), Arc::clone(sink), host.to_owned());
        let errors = thread(host, "errors", move || read_errors(stderr, &name, &for_errors, &errors_to))?;
        thread(host, "orders", move || write_orders(stdin, &orders_in))?;
        let reader = Reader {
            silence: options.silence,
            sink: Arc::clone(sink),
            tell: Box::new(move |word| listener(index, word)),
            greeted: false,
        };
        let (for_reader, executable) = (Arc::clone(&child), options.executable.clone());
        let reader = thread(host, "words", move || {
            let mut reader = reader;
            let why = reader.read(stdout).unwrap_or_else(|| {
                let status = end_of(&for_reader);
                // Its last words are read before they are quoted.
                let until = Instant::now() + END_TIME;
                while !errors.is_finished() && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(5));
                }
                let words = lock(&words).join("; ");
                explain(status, &words, reader.greeted, &executable)
            });
            (reader.tell)(Word::Ended(why));
        })?;
        Ok(Remote { child, orders, reader })
    }

    /// Says something to the agent, when it can be said.
    pub fn say(&self, order: ToAgent) {
        // If the writer is gone the agent is, which is told by other means.
        let _ = self.orders.send(order);
    }

    /// Has the agent clear up, waits for its end until then, and ends ssh.
    pub fn end(&mut self, until: Instant) {
        self.say(ToAgent::End);
        while !self.reader.is_finished() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn thread(host: &str, what: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let named = std::thread::Builder::new().name(format!("{what} {host}"));
    named.spawn(body).map_err(|e| Error::os("pthread_create", format!("host {host}"), e))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A word for the shell over there.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Writes orders as they come, and a sign of life where none come.
fn write_orders(mut stdin: ChildStdin, orders: &Receiver<ToAgent>) {
    loop {
        let order = match orders.recv_timeout(BEAT) {
            Ok(order) => order,
            Err(RecvTimeoutError::Timeout) => ToAgent::Beat,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if stdin.write_all(&line(&order)).and_then(|()| stdin.flush()).is_err() || matches!(order, ToAgent::End) {
            return;
        }
    }
}

/// Prints what ssh and the agent write to standard error, and keeps the last lines.
fn read_errors(mut stderr: ChildStderr, host: &str, words: &Mutex<Vec<String>>, sink: &SharedSink) {
    let (mut splitter, mut bytes) = (Splitter::default(), [0; 4096]);
    let take = |text: String| {
        let text = text.trim_end();
        if !text.is_empty() {
            lock_sink(sink).say(&format!("[{host}] {text}"));
            let mut words = lock(words);
            words.push(text.to_owned());
            let surplus = words.len().saturating_sub(WORDS_MAX);
            words.drain(..surplus);
        }
    };
    while let Ok(n @ 1..) = stderr.read(&mut bytes) {
        for piece in splitter.feed(&bytes[..n]) {
            if let Piece::Line(text) = piece {
                take(text);
            }
        }
    }
    if let Some(Piece::Line(text)) = splitter.end() {
        take(text);
    }
}

struct Reader {
    silence: Duration,
    sink: SharedSink,
    tell: Box<dyn Fn(Word) + Send>,
    /// The agent has said hello.
    greeted: bool,
}

impl Reader {
    /// Reads the agent's words to their end; gives why it does not read on, if that is not the end.
    fn read(&mut self, mut stdout: ChildStdout) -> Option<String> {
        let (mut buffer, mut bytes) = (LineBuffer::default(), vec![0; 64 << 10]);
        loop {
            loop {
                match buffer.next_line(LINE_BYTES_MAX) {
                    Ok(Some(line)) => {
                        if let Err(why) = self.take(&line) {
                            return Some(why);
                        }
                    }
                    Ok(None) => break,
                    Err(why) => return Some(format!("broke the agent's protocol: {why}")),
                }
            }
            let time = PollTimeout::try_from(self.silence).unwrap_or(PollTimeout::MAX);
            // Before its hello the host has the launcher's own deadline.
            if poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], time) == Ok(0) && self.greeted {
                return Some(format!("was silent for {} s: it, or the way to it, is gone", self.silence.as_secs_f64()));
            }
            match stdout.read(&mut bytes) {
                Ok(n) if n > 0 => buffer.extend(&bytes[..n]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                _ => return None,
            }
        }
    }

    fn take(&mut self, line: &[u8]) -> Result<(), String> {
        match serde_json::from_slice::<FromAgent>(line) {
            Ok(FromAgent::Output { rank, stream, piece }) => {
                lock_sink(&self.sink).print(rank, stream, piece, Instant::now());
            }
            Ok(FromAgent::Beat) => {}
            Ok(message) => {
                self.greeted |= matches!(message, FromAgent::Hello { .. });
                (self.tell)(Word::Agent(message));
            }
            // A shell's start-up file may print before the agent is there.
            Err(_) if !self.greeted => {}
            Err(e) => return Err(format!("broke the agent's protocol: {e}")),
        }
        Ok(())
    }
}

/// How ssh has ended; `None` if it does not.
fn end_of(child: &Mutex<Child>) -> Option<ExitStatus> {
    let until = Instant::now() + END_TIME;
    loop {
        match lock(child).try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => {}
            _ => return None,
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Why the agent is gone, after the host's name.
fn explain(status: Option<ExitStatus>, words: &str, greeted: bool, executable: &str) -> String {
    let said = if words.is_empty() { String::new() } else { format!(": {words}") };
    match status.map(|status| (status.code(), status)) {
        Some((Some(126 | 127), _)) if !greeted => format!(
            "has no gradwire that can be run at {executable}{said}; install it there, or name its place with --remote-gradwire"
        ),
        Some((Some(255), _)) if !greeted => format!("cannot be reached by ssh{said}"),
        Some((Some(code), _)) if !greeted => {
            format!(
                "has a gradwire at {executable} that is no agent (exit code {code}){said}; use the same version there"
            )
        }
        Some((_, status)) => format!("is lost: its ssh session ended ({status}){said}"),
        None => format!("is lost: its ssh session ended{said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn every_end_is_told_by_what_helps() {
        let exit = |code: i32| Some(ExitStatus::from_raw(code << 8));
        let told = |status, greeted| explain(status, "some words", greeted, "/opt/gradwire");
        assert!(
            told(exit(127), false).contains("no gradwire that can be run at /opt/gradwire: some words; install it")
        );
        assert!(told(exit(255), false).contains("cannot be reached by ssh: some words"));
        assert!(told(exit(2), false).contains("use the same version there"));
        assert!(told(exit(255), true).contains("is lost"));
        assert!(told(Some(ExitStatus::from_raw(9)), true).contains("signal: 9"));
    }

    #[test]
    fn a_path_with_a_quote_stays_one_word() {
        assert_eq!(quoted("/a b/it's"), r"'/a b/it'\''s'");
    }
}
