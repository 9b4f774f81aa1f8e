//! The output of all ranks on one screen: whole lines with the rank before them, and one live line at the bottom for progress bars.
//!
//! Invariant: a line of one rank is never torn apart by another's; nothing that a rank has written is lost but superseded states
//! of a progress bar.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{IsTerminal, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::pipes::Sink;
use crate::{
    Error, Result,
    types::{Rank, Role},
};

/// A line longer than this is broken: nobody reads it, and it must not grow without bound.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Where output does not go to a terminal, a progress bar's state is printed this often.
const LIVE_INTERVAL: Duration = Duration::from_secs(5);

/// A piece of a rank's output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Piece {
    /// A whole line.
    Line(String),
    /// The state of a line that will be overwritten or continued.
    Live(String),
}

/// Cuts a stream of bytes into pieces.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    partial: Vec<u8>,
    /// The last byte was a carriage return: what comes next overwrites, unless it is the line's end.
    returned: bool,
    /// What `partial` held when it was last shown.
    shown: usize,
}

impl Splitter {
    /// Takes bytes; gives the pieces that they complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for &byte in bytes {
            match byte {
                b'\n' => pieces.push(Piece::Line(self.take())),
                b'\r' => {
                    if !self.partial.is_empty() && !self.returned {
                        pieces.push(Piece::Live(self.text()));
                    }
                    self.returned = true;
                }
                byte => {
                    if self.returned {
                        self.take();
                    }
                    self.partial.push(byte);
                    if self.partial.len() >= LINE_BYTES_MAX {
                        pieces.push(Piece::Line(self.take()));
                    }
                }
            }
        }
        pieces
    }

    /// Nothing has come for a while: a line that is not yet whole (a question, a bar without its end) is shown as it is.
    pub fn idle(&mut self) -> Option<Piece> {
        if self.partial.is_empty() || self.returned || self.shown == self.partial.len() {
            return None;
        }
        self.shown = self.partial.len();
        Some(Piece::Live(self.text()))
    }

    /// The stream has ended.
    pub fn end(&mut self) -> Option<Piece> {
        if self.partial.is_empty() { None } else { Some(Piece::Line(self.take())) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.partial).into_owned()
    }

    fn take(&mut self) -> String {
        let text = self.text();
        self.partial.clear();
        (self.returned, self.shown) = (false, 0);
        text
    }
}

/// Which stream of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Stream {
    Out,
    Err,
}

/// Prints the pieces of all ranks.
pub(super) struct Printer {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    terminal: bool,
    colours: bool,
    columns: usize,
    /// The live line at the bottom of the terminal.
    live: Option<(Rank, String)>,
    /// When each rank's state was last printed, where there is no terminal.
    printed: BTreeMap<Rank, Instant>,
}

impl Printer {
    /// Onto this process' own streams.
    pub fn inherit() -> Printer {
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok()).unwrap_or(80);
        Printer {
            out: Box::new(std::io::stdout()),
            err: Box::new(std::io::stderr()),
            terminal,
            colours: terminal && std::env::var_os("NO_COLOR").is_none(),
            columns,
            live: None,
            printed: BTreeMap::new(),
        }
    }

    /// Into two writers, as if there were no terminal.
    pub fn plain(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>) -> Printer {
        let printed = BTreeMap::new();
        Printer { out, err, terminal: false, colours: false, columns: 80, live: None, printed }
    }

    /// Prints a line above the live one.
    fn line(&mut self, stream: Stream, text: &str) {
        let clear = if self.terminal { "\r\x1b[K" } else { "" };
        let target = if stream == Stream::Out { &mut self.out } else { &mut self.err };
        let _ = target.write_all(format!("{clear}{text}\n").as_bytes()).and_then(|()| target.flush());
        if let Some((rank, text)) = self.live.take() {
            self.show(rank, text);
        }
    }

    /// Puts the live line at the bottom.
    fn show(&mut self, rank: Rank, text: String) {
        let room = self.columns.saturating_sub(6);
        let visible: String = text.chars().take(room).collect();
        let line = format!("\r\x1b[K{} {visible}", self.tag(rank));
        let _ = self.err.write_all(line.as_bytes()).and_then(|()| self.err.flush());
        self.live = Some((rank, text));
    }

    fn tag(&self, rank: Rank) -> String {
        let letter = if rank.role == Role::Server { 's' } else { 'w' };
        let tag = format!("[{letter}{}]", rank.index);
        if !self.colours {
            return tag;
        }
        // Six colours that can be read on light and dark; servers in one, workers in turn.
        let colour = if rank.role == Role::Server { 90 } else { 31 + rank.index % 6 };
        format!("\x1b[{colour}m{tag}\x1b[0m")
    }
}

impl Sink for Printer {
    /// Prints a piece. A stream that takes nothing (a closed pipe) does not stop the job.
    fn print(&mut self, rank: Rank, stream: Stream, piece: Piece, now: Instant) {
        let tag = self.tag(rank);
        let text = match piece {
            Piece::Line(text) => {
                self.live.take_if(|(other, _)| *other == rank);
                text
            }
            Piece::Live(text) if self.terminal => return self.show(rank, text),
            Piece::Live(text) => {
                let last = self.printed.get(&rank);
                if last.is_some_and(|last| now.saturating_duration_since(*last) < LIVE_INTERVAL) {
                    return;
                }
                self.printed.insert(rank, now);
                text
            }
        };
        self.line(stream, &format!("{tag} {text}"));
    }

    fn say(&mut self, text: &str) {
        self.line(Stream::Err, text);
    }

    /// Leaves the screen in order.
    fn finish(&mut self) {
        if self.live.take().is_some() {
            let _ = self.err.write_all(b"\n");
        }
        let _ = self.out.flush().and_then(|()| self.err.flush());
    }
}

/// Writes each rank's streams into files of their own (`w0.out`, `w0.err`), and what the launcher says onto the screen.
pub(super) struct Files {
    directory: PathBuf,
    open: BTreeMap<(Rank, Stream), File>,
    screen: Printer,
}

impl Files {
    /// Makes the directory.
    pub fn new(directory: PathBuf) -> Result<Files> {
        std::fs::create_dir_all(&directory).map_err(|e| Error::file("create", &directory, e))?;
        Ok(Files { directory, open: BTreeMap::new(), screen: Printer::inherit() })
    }

    fn append(&mut self, rank: Rank, stream: Stream, text: &str) -> std::io::Result<()> {
        use std::collections::btree_map::Entry;
        let file = match self.open.entry((rank, stream)) {
            Entry::Occupied(file) => file.into_mut(),
            Entry::Vacant(place) => {
                let letter = if rank.role == Role::Server { 's' } else { 'w' };
                let ending = if stream == Stream::Out { "out" } else { "err" };
                place.insert(File::create(self.directory.join(format!("{letter}{}.{ending}", rank.index)))?)
            }
        };
        file.write_all(format!("{text}\n").as_bytes())
    }
}

impl Sink for Files {
    /// Whole lines only: the states of a progress bar are for a screen. A file that takes nothing is told of once a line.
    fn print(&mut self, rank: Rank, stream: Stream, piece: Piece, _: Instant) {
        let Piece::Line(text) = piece else { return };
        if let Err(e) = self.append(rank, stream, &text) {
            self.screen
                .say(&format!("gradwire: output of {rank} cannot be written to {}: {e}", self.directory.display()));
        }
    }

    fn say(&mut self, text: &str) {
        self.screen.say(text);
    }

    fn finish(&mut self) {
        self.screen.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn line(text: &str) -> Piece {
        Piece::Line(text.into())
    }

    fn live(text: &str) -> Piece {
        Piece::Live(text.into())
    }

    /// Whatever the pieces in which bytes come, the lines are the same.
    #[test]
    fn lines_do_not_depend_on_how_the_bytes_come() {
        let bytes = b"one\ntwo\r\n\nthr\xc3\xa9e\nrest";
        for size in 1..bytes.len() {
            let mut splitter = Splitter::default();
            let pieces = bytes.chunks(size).flat_map(|chunk| splitter.feed(chunk)).chain(None);
            let mut lines: Vec<Piece> = pieces.filter(|piece| matches!(piece, Piece::Line(_))).collect();
            lines.extend(splitter.end());
            assert_eq!(lines, ["one", "two", "", "thr\u{e9}e", "rest"].map(line), "pieces of {size}");
        }
    }

    #[test]
    fn progress_bars_are_states_of_one_line() {
        let mut splitter = Splitter::default();
        assert_eq!(splitter.feed(b"10%\r20%\r30%"), [live("10%"), live("20%")]);
        assert_eq!(splitter.idle(), Some(live("30%")));
        assert_eq!(splitter.idle(), None, "shown once");
        assert_eq!(splitter.feed(b"\rdone\n"), [live("30%"), line("done")]);
        assert_eq!(splitter.end(), None);
    }

    #[test]
    fn an_endless_line_is_broken() {
        let mut splitter = Splitter::default();
        let pieces = splitter.feed(&vec![b'x'; LINE_BYTES_MAX + 1]);
        assert_eq!(pieces.len(), 1);
        assert_eq!(splitter.end(), Some(line("x")));
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn ranks_stand_before_their_lines_and_states_are_rare_without_a_terminal() {
        let (out, err) = (Shared::default(), Shared::default());
        let mut printer = Printer::plain(Box::new(out.clone()), Box::new(err.clone()));
        let start = Instant::now();
        let (worker, server) = (Rank::worker(0), Rank::server(1));
        printer.print(worker, Stream::Out, line("hello"), start);
        for second in 0..10 {
            let piece = live(&format!("{second} s"));
            printer.print(worker, Stream::Out, piece, start + Duration::from_secs(second));
        }
        printer.print(server, Stream::Err, line("oh"), start);
        assert_eq!(out.0.lock().unwrap().as_slice(), b"[w0] hello\n[w0] 0 s\n[w0] 5 s\n");
        assert_eq!(err.0.lock().unwrap().as_slice(), b"[s1] oh\n");
    }

    #[test]
    fn on_a_terminal_the_live_line_stays_at_the_bottom() {
        let screen = Shared::default();
        let mut printer = Printer::plain(Box::new(screen.clone()), Box::new(screen.clone()));
        printer.terminal = true;
        let now = Instant::now();
        printer.print(Rank::worker(0), Stream::Err, live("50%"), now);
        printer.print(Rank::worker(1), Stream::Out, line("note"), now);
        printer.print(Rank::worker(0), Stream::Err, line("done"), now);
        printer.finish();
        let wanted = "\r\x1b[K[w0] 50%\r\x1b[K[w1] note\n\r\x1b[K[w0] 50%\r\x1b[K[w0] done\n";
        assert_eq!(String::from_utf8(screen.0.lock().unwrap().clone()).unwrap(), wanted);
    }
}
