//! What a benchmark prints: a table or objects on standard output, a drawing, and on standard error how far it is.
//!
//! Invariant: standard output has results and nothing else.

use std::time::{Duration, Instant};

use super::choice::Choice;
use crate::{
    Result,
    tools::bench::{Row, header, plot},
};

/// How often a run that takes long says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// The rows of one benchmark, and the time since it last said something.
pub(super) struct Show<'a> {
    choice: &'a Choice,
    title: String,
    rows: Vec<Row>,
    said: Instant,
}

impl<'a> Show<'a> {
    /// Begins the table: `about` follows the benchmark's name in its title.
    pub fn new(choice: &'a Choice, about: &str) -> Show<'a> {
        let title = format!("{} {about}, medians of {}", choice.kind.name(), choice.repetitions);
        if !choice.json {
            println!("{title}\n{}", header(choice.kind.rate()));
        }
        Show { choice, title, rows: Vec::new(), said: Instant::now() }
    }

    /// Says that so many repetitions of a size are done, if nothing has been said for a while.
    pub fn progress(&mut self, size: u64, done: u16) {
        if self.said.elapsed() < PROGRESS_EVERY {
            return;
        }
        self.said = Instant::now();
        let (at, of) = (self.rows.len() + 1, self.choice.sizes.len());
        let size = crate::tools::bench::plain_bytes(size);
        eprintln!("gradwire: {size} (size {at} of {of}): repetition {done} of {}", self.choice.repetitions);
    }

    /// Prints a row.
    pub fn row(&mut self, row: Row) {
        if self.choice.json {
            println!("{}", row.json())
        } else {
            println!("{}", row.line())
        }
        self.rows.push(row);
    }

    /// Draws what has been printed, where that was asked for.
    pub fn finish(self) -> Result<()> {
        match &self.choice.plot {
            Some(path) => plot(path, &self.title, &self.rows),
            None => Ok(()),
        }
    }
}
