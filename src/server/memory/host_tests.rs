//! Parameters that are sent from where they lie.
//!
//! Invariant: a reader sees the parameters of one step however long it reads, and nothing is copied where nobody reads.

use std::sync::Arc;

use crate::{
    layout::{Init, Layout, LayoutOptions, TensorSpec},
    mem::{Lease, Region, RegionOptions, SharedLease},
    optim::{OptimizerConfig, OptimizerKind, Reduction},
    server::{Contribution, Memory, MemoryOptions, Seeded, Task, Work},
    types::{ChunkId, Dtype, ShardId},
};

/// More than two tiles.
const ELEMENTS: usize = 2 * super::TILE_ELEMENTS + 17;

fn memory(dtype: Dtype) -> Memory {
    let tensors = vec![TensorSpec { init: Init::Constant(1.0), ..TensorSpec::new("a", [ELEMENTS as u64]) }];
    let options = LayoutOptions { chunk_elements: ELEMENTS.next_multiple_of(1024) as u32, shards: 1 };
    let layout = Layout::build(&[tensors], options).unwrap();
    assert_eq!(layout.shards[0].len(), 1);
    let options = MemoryOptions {
        optimizer: OptimizerConfig::new(OptimizerKind::SGD, 0.5),
        reduction: Reduction::Sum,
        gradient_dtype: Dtype::F32,
        parameter_dtype: dtype,
        two_step: false,
        measures: false,
        region: RegionOptions::default(),
    };
    Memory::new(options, Arc::new(layout), ShardId(0), &Seeded(0), None).unwrap()
}

fn place() -> Lease {
    Region::allocate(ELEMENTS.next_multiple_of(1024) * 4, &RegionOptions::default()).unwrap().1
}

/// A step on a gradient of ones; the room that was given for a copy, if it was not needed.
fn step(
    memory: &mut Memory,
    published: Option<SharedLease>,
    room: Lease,
) -> (SharedLease, Option<SharedLease>, Option<Lease>) {
    let mut lease = place();
    bytemuck::cast_slice_mut(lease.bytes_mut()).fill(1f32);
    let contributions = vec![Contribution { worker: 0, weight: 1, lease }];
    let work = Work::new(Task::Step, ChunkId(0), 0);
    memory.start(Work { contributions, weight: 1, wire: Some(room), published, ..work }).unwrap();
    let done = std::iter::repeat_with(|| memory.advance().unwrap()).flatten().next().unwrap();
    (done.published.unwrap(), done.before, done.wire)
}

fn all_are(copy: &SharedLease, value: f32) -> bool {
    bytemuck::cast_slice::<u8, f32>(copy.bytes())[..ELEMENTS].iter().all(|element| *element == value)
}

fn address(copy: &SharedLease) -> *const u8 {
    copy.bytes().as_ptr()
}

#[test]
fn parameters_stay_where_nobody_reads_them_and_move_where_somebody_does() {
    let mut memory = memory(Dtype::F32);
    let (first, before, room) = step(&mut memory, None, place());
    assert!(all_are(&first, 0.5) && before.is_none());
    let home = address(&first);
    // The shard gives up its own hold: nobody reads.
    let (second, before, room) = step(&mut memory, Some(first), room.expect("not needed"));
    assert!(all_are(&second, 0.0) && address(&second) == home && before.is_none());
    // A reply is still on its way.
    let reply = second.clone();
    let (third, before, room) = step(&mut memory, Some(second), room.expect("not needed"));
    assert!(all_are(&third, -0.5) && address(&third) != home && room.is_none());
    assert!(all_are(&reply, 0.0) && before.as_ref().map(address) == Some(home));
    drop(reply);
    let free = before.unwrap().thaw().expect("the last reader is done");
    let (fourth, before, room) = step(&mut memory, Some(third), free);
    assert!(all_are(&fourth, -1.0) && before.is_none() && room.is_some());
}

#[test]
fn other_formats_are_copied_for_the_wire() {
    let mut memory = memory(Dtype::Bf16);
    let (first, before, room) = step(&mut memory, None, place());
    let bits = bytemuck::cast_slice::<u8, u16>(first.bytes());
    assert!(bits[..ELEMENTS].iter().all(|bits| *bits == 0x3f00) && before.is_none() && room.is_none());
    let (_, before, _) = step(&mut memory, Some(first.clone()), place());
    assert_eq!(before.as_ref().map(address), Some(address(&first)));
}
