//! server
use crate::{Error, Result, session::Member};

/// Serves this rank's shards until the job ends.
pub fn run(member: Member) -> Result<()> {
    Err(Error::Config(format!("{} has joined, but the server itself is not part of this branch", member.rank())))
}
