//! What a worker that errs, or means harm, can do to a shard: nothing but lose its path.
//!
//! Invariant: a misdeed is an error about the peer that did it, never a panic.

use super::*;
use crate::{
    layout::{LayoutOptions, TensorSpec},
    mem::{Region, RegionOptions},
};

/// A shard of two small chunks and two workers, both of which have attached.
fn shard() -> Shard {
    let declaration = vec![TensorSpec::new("a", [32])];
    shard_of(&[declaration.clone(), declaration])
}

fn shard_of(declarations: &[Vec<TensorSpec>]) -> Shard {
    let options = LayoutOptions { chunk_elements: 16, shards: 1 };
    let layout = Arc::new(Layout::build(declarations, options).unwrap());
    let config = ShardConfig {
        me: PeerId::server(0, 0),
        shard: ShardId(0),
        workers: 2,
        consistency: Consistency::Bsp,
        slots: 2,
        two_step: false,
        decision: None,
        loss_scale: Default::default(),
        live: Default::default(),
        epoch: 0,
        start_clock: 0,
        gradient_dtype: Dtype::F32,
        parameter_dtype: Dtype::F32,
        checkpoint_every: None,
        mirror: None,
        may_lose_workers: false,
    };
    let (_, replies) = Region::allocate(256, &RegionOptions::default()).unwrap();
    let mut shard = Shard::new(config, layout, replies.chunks(64), Vec::new(), None);
    for worker in 0..2 {
        say(&mut shard, worker, Note::new(NoteKind::Attach)).unwrap();
    }
    shard
}

fn say(shard: &mut Shard, worker: u16, note: Note) -> Result<()> {
    shard.handle_arrived(Instant::now(), PeerId::worker(worker), note, None)
}

/// A contribution of a worker that had finished was recorded beside the step that its absence had completed, and stayed in the
/// slot for the step after it.
#[test]
fn nothing_is_taken_from_a_worker_that_has_finished() {
    let mut shard = shard();
    say(&mut shard, 0, Note::new(NoteKind::Finished)).unwrap();
    for kind in [NoteKind::Absent, NoteKind::Pull, NoteKind::Attach, NoteKind::SetLearningRate, NoteKind::Finished] {
        assert!(say(&mut shard, 0, Note::new(kind)).is_err(), "{kind:?}");
    }
    say(&mut shard, 1, Note::new(NoteKind::Absent)).unwrap();
}

/// A rate that no optimizer takes got as far as the shard's memory, whose error ended the server.
#[test]
fn a_learning_rate_that_cannot_be_is_the_peers_fault() {
    for rate in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        let note = Note { version: rate.to_bits(), ..Note::new(NoteKind::SetLearningRate) };
        assert!(say(&mut shard(), 0, note).is_err(), "{rate}");
    }
}

/// The others were held at the clock of a stop until patience ended, because one shard never reached that clock.
#[test]
fn a_shard_whose_workers_have_all_finished_stores_what_is_asked_for() {
    let mut shard = shard_of(&[vec![TensorSpec::new("a", [32])], Vec::new()]);
    shard.request_checkpoint(5, true).unwrap();
    say(&mut shard, 0, Note::new(NoteKind::Finished)).unwrap();
    let mut effects = std::iter::from_fn(|| shard.poll_effect()).take(10);
    assert!(effects.any(|effect| matches!(effect, Effect::Snapshot { clock: 5 })));
    drop(effects);
    shard.handle_snapshotted(5);
    assert!(shard.poll_effect().is_none(), "once");
    say(&mut shard, 1, Note::new(NoteKind::Finished)).unwrap();
    while shard.poll_effect().is_some() {}
    assert!(shard.is_done());
}
