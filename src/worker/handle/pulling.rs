//! Parameters that are asked for, apart from any push.
//!
//! Invariant: a pull leaves every chunk's parameters at home, or names one that did not come.

use std::time::{Duration, Instant};

use super::{Buffers, Command, Worker};
use crate::{Error, Result, types::Version};

impl Worker {
    /// Brings every chunk's parameters up to `min_version` or later (under `bsp`, version = clocks applied), waiting at most
    /// `time` for it.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`] naming the chunk that did not reach the version in time; what there was has been brought all the same.
    pub fn pull(&mut self, min_version: Version, time: Duration) -> Result<()> {
        self.is_ours()?;
        if self.wants_reply == Some(true) {
            return Err(Error::Config(
                "pull between push_pull and wait: the parameters are on their way already".into(),
            ));
        }
        let since = Instant::now();
        self.progress.command(self.buffers.chunks.iter_mut().filter_map(|chunk| {
            let into = chunk.parameters.take()?;
            Some(Command::Pull { chunk: chunk.id, min_version, patience: Some(time), into })
        }));
        self.progress.set_waiting(true);
        // The server answers in time even if the version is not there; this allows for the way.
        let answered = self.until(time + Duration::from_secs(5), Buffers::parameters_home);
        self.progress.set_waiting(false);
        answered?;
        match self.buffers.chunks.iter().find(|chunk| chunk.version < min_version) {
            None => Ok(()),
            Some(chunk) => Err(Error::Deadline {
                from: self.owner(chunk.id).to_string(),
                awaited: "a version that was not reached",
                chunk: Some(chunk.id),
                clock: None,
                waited: since.elapsed(),
            }),
        }
    }

    /// The version of the parameters at hand: the oldest of all chunks.
    pub fn version(&self) -> Version {
        self.buffers.chunks.iter().map(|chunk| chunk.version).min().unwrap_or(0)
    }
}
