//! Offers for paths that broke, on their way from one end to the other.
//!
//! Invariant: an offer reaches the rank that it is for, as from the end that made it; what it means is for the ends to judge.

use super::*;

impl Roster {
    /// Passes on what `from` offers the other end of a broken path.
    pub(super) fn pass_on(&mut self, from: PeerId, proposal: Proposal) -> Result<(), String> {
        let to = proposal.peer;
        let Some(seat) = self.seats.get(&to.rank) else {
            return Err(format!("an offer to {to}, who is not of this job"));
        };
        // Whoever is gone will not answer; the job hears of that by other ways.
        let connection = seat.connection.into_iter().collect();
        let proposal = Proposal { peer: from, ..proposal };
        self.send(connection, FromLauncher::Command(Command::Rebuild { lane: to.lane, proposal }));
        Ok(())
    }
}
