//! How a job ends: when its workers are through, by a failure, or on demand.
//!
//! Invariant: once it ends nobody joins any more, and nothing that somebody has asked for is left open.

use super::*;

impl Roster {
    /// When no worker will push any more, the servers may go.
    pub(super) fn end_servers(&mut self) {
        let done = self.seats.iter().all(|(rank, seat)| rank.role == Role::Server || self.is_through(*rank, seat));
        if self.dismissed || !done || self.turns_members() {
            return; // a job that is to stop at a clock which nobody has reached ends here too
        }
        (self.ended, self.dismissed) = (true, true);
        self.give_up_change();
        self.give_up_scale("the job has ended");
        self.dismiss_waiting();
        let checkpoint = self.config.checkpoint.at_end && self.config.checkpoint.dir.is_some();
        let clock = self.clock_reached();
        self.send(self.everybody(), FromLauncher::Command(Command::End { clock, checkpoint }));
    }

    /// Ends the job by name: every rank is told, nobody may join any more.
    pub fn fail(&mut self, text: String) {
        (self.ended, self.dismissed, self.over) = (true, true, true);
        self.send(self.everybody(), FromLauncher::Command(Command::JobFailed { text }));
    }

    /// Tells every rank to end now, without a checkpoint.
    pub fn stop(&mut self, reason: String) {
        (self.ended, self.dismissed, self.over) = (true, true, true);
        let command = Command::Stop { reason, checkpoint: false, clock: None };
        self.send(self.everybody(), FromLauncher::Command(command));
    }
}
