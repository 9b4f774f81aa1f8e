//! What the launcher says of a job while it runs.
//!
//! Invariant: what lasts is said once.

use super::*;

impl Supervisor {
    /// Says once a job that a path goes over another fabric than the job would rather have.
    pub(super) fn tell_fallback(&mut self, rank: Rank, paths: &[PathChoice]) {
        let fallback = paths.iter().find_map(|path| Some((path, path.missed.as_ref()?)));
        if let Some((path, missed)) = fallback
            && !std::mem::replace(&mut self.told_fallback, true)
        {
            let (name, PathChoice { peer, fabric, .. }) = (&self.options.config.name, path);
            self.processes.say(&format!(
                "gradwire: job {name}: {rank} reaches {peer} over {fabric} only: {missed}; `gradwire doctor` says what would help"
            ));
        }
    }

    pub(super) fn not_finite(&mut self, clock: Clock, worker: Option<u16>, tensor: &str, count: u64) {
        let whose = worker
            .map_or("the sum of the gradients".into(), |worker| format!("the gradient of {}", Rank::worker(worker)));
        let outcome = match self.options.config.skips_nonfinite() {
            true => format!("the step was skipped on all servers ({count} so far)"),
            false => "the step was taken all the same: set skip_nonfinite to skip such steps".into(),
        };
        let text = format!("clock {clock}: {whose} for tensor `{tensor}` was not finite; {outcome}");
        warn!("{text}");
        self.not_finite = (count, Some(text));
    }
}
