//! Progress on stderr: one bar for the whole job, or plain lines where nobody watches a terminal.
//!
//! Invariant: only rank 0 draws. The other workers' progress is the same line, and two processes
//! drawing on one terminal would overwrite each other.

use crate::metrics::Scores;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Duration;

/// The job's line.
pub struct Progress {
    bar: Option<ProgressBar>,
    speaks: bool,
    loss: f32,
}

impl Progress {
    /// A line for a run of `clocks`; silent on every rank but 0.
    pub fn new(what: &str, clocks: u64, rank: usize) -> Self {
        let speaks = rank == 0;
        let bar = (speaks && std::io::stderr().is_terminal()).then(|| {
            let target = ProgressDrawTarget::stderr_with_hz(4);
            let bar = ProgressBar::with_draw_target(Some(clocks), target);
            let template = "{prefix} [{bar:30}] {pos}/{len} {elapsed} left {eta} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.with_prefix(what.to_string())
        });
        Self { bar, speaks, loss: 0.0 }
    }

    /// One clock done.
    pub fn step(&mut self, clock: u64, loss: f32) {
        // A batch's loss jumps about: what is shown moves a twentieth of the way each time.
        self.loss = match self.loss {
            0.0 => loss,
            shown => shown + 0.05 * (loss - shown),
        };
        if let Some(bar) = &self.bar {
            bar.set_position(clock + 1);
            bar.set_message(format!("loss {:.3}", self.loss));
        }
    }

    /// One pass over the data done.
    pub fn epoch(&self, epoch: usize, epochs: usize, loss: f64, scores: &Scores, took: Duration) {
        if !self.speaks {
            return;
        }
        let line = format!(
            "epoch {epoch:>2}/{epochs}  loss {loss:.4}  accuracy {:.4}  precision {:.4}  \
             recall {:.4}  F1 {:.4}  {:.1} s",
            scores.accuracy,
            scores.macro_precision,
            scores.macro_recall,
            scores.macro_f1,
            took.as_secs_f64()
        );
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
