//! Checkpoints, as whoever asks for one and the ranks that write it see them.
//!
//! Invariant: whoever asked for a checkpoint is answered once: when its manifest is on the disk, or could not be written.

use super::*;

impl Roster {
    /// Asks for a checkpoint at the next clock that no shard can have passed; with a reason, the job ends with it. The error
    /// says why there can be none.
    pub fn request_checkpoint(&mut self, stop: Option<String>, waiting: Option<ConnectionId>) -> Result<(), String> {
        if self.config.checkpoint.dir.is_none() {
            return Err("this job has no checkpoint directory; start it with --checkpoint-dir DIR".into());
        }
        if !self.running || self.ended {
            let when = if self.ended { "is ending" } else { "has not begun to train" };
            return Err(format!("no checkpoint can be written now: the job {when}"));
        }
        self.ended = stop.is_some();
        let command = self.checkpoints.request(self.clock_reached(), stop, waiting);
        self.send(self.everybody(), FromLauncher::Command(command));
        Ok(())
    }

    /// The manifest of a checkpoint was written, or could not be.
    pub fn checkpoint_recorded(&mut self, clock: Clock, outcome: Result<(), String>) {
        let recorded = self.checkpoints.recorded(clock, outcome.is_ok());
        if recorded.stopping && outcome.is_ok() {
            self.dismiss_waiting();
            self.over = true;
            self.send(self.everybody(), FromLauncher::Command(Command::Leave { clock }));
        }
        let answer = match &outcome {
            Ok(()) => FromLauncher::CheckpointWritten { clock },
            Err(text) => FromLauncher::Refused(text.clone()),
        };
        if !recorded.waiting.is_empty() {
            self.send(recorded.waiting, answer);
        }
        self.notice(match outcome {
            Ok(()) => Notice::Checkpoint { clock, stopping: recorded.stopping },
            Err(text) => Notice::CheckpointFailed(text),
        });
    }
}
