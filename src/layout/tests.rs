//! Properties of the layout: it tiles the flat space, deals every chunk once, and agrees with the views.
//!
//! Invariant: every property holds for any declarations, chunk size and number of shards; no example is singled out.

use proptest::prelude::*;

use super::*;

fn options(chunk_elements: u32, shards: u16) -> LayoutOptions {
    LayoutOptions { chunk_elements, shards }
}

/// Up to 12 tensors, each declared by a non-empty set of up to 3 workers.
fn declarations() -> impl Strategy<Value = Vec<Vec<TensorSpec>>> {
    prop::collection::vec((prop::collection::vec(1u64..40, 0..3), 0u16..3, 1u8..8), 1..12).prop_map(|tensors| {
        let mut workers = vec![Vec::new(); 3];
        for (index, (shape, group, who)) in tensors.into_iter().enumerate() {
            let spec = TensorSpec::new(format!("t{index}"), shape).group(group);
            (0..3).filter(|worker| who & (1 << worker) != 0).for_each(|worker| workers[worker].push(spec.clone()));
        }
        workers
    })
}

proptest! {
    #[test]
    fn chunks_tile_the_flat_space(workers in declarations(), size in 1u32..20, shards in 1u16..5) {
        let layout = Layout::build(&workers, options(size * 16, shards)).unwrap();
        let mut end = 0;
        for chunk in &layout.chunks {
            prop_assert_eq!(chunk.start, end);
            prop_assert!(chunk.len > 0 && chunk.len <= size * 16);
            let mut within = 0;
            for span in &chunk.spans {
                prop_assert_eq!(span.start, within);
                within += span.len;
            }
            prop_assert_eq!(within, chunk.len);
            end += u64::from(chunk.len);
        }
        prop_assert_eq!(end, layout.elements);
    }

    #[test]
    fn pieces_cover_each_tensor_once(workers in declarations(), size in 1u32..20) {
        let layout = Layout::build(&workers, options(size * 16, 2)).unwrap();
        for tensor in &layout.tensors {
            let mut next = 0;
            for piece in layout.pieces(tensor) {
                prop_assert_eq!(piece.tensor_start, next);
                let chunk = layout.chunk(piece.chunk);
                prop_assert_eq!(chunk.start + u64::from(piece.chunk_start), tensor.start + next);
                prop_assert_eq!(&chunk.contributors, &tensor.contributors);
                prop_assert!(layout.tensors_of(piece.chunk).any(|found| found == tensor));
                next += u64::from(piece.len);
            }
            prop_assert_eq!(next, tensor.len);
        }
    }

    #[test]
    fn every_chunk_is_dealt_once_and_evenly(workers in declarations(), size in 1u32..4, shards in 1u16..5) {
        let layout = Layout::build(&workers, options(size * 16, shards)).unwrap();
        let mut dealt: Vec<_> = layout.shards.iter().flatten().copied().collect();
        dealt.sort();
        prop_assert_eq!(dealt.len(), layout.chunks.len());
        prop_assert!(dealt.windows(2).all(|pair| pair[0] < pair[1]));
        let loads: Vec<u64> = layout.shards.iter()
            .map(|order| order.iter().map(|id| u64::from(layout.chunk(*id).len)).sum()).collect();
        let (low, high) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        prop_assert!(high - low <= u64::from(size * 16));
        for (shard, order) in layout.shards.iter().enumerate() {
            for (position, id) in order.iter().enumerate() {
                prop_assert_eq!(layout.chunk(*id).shard, ShardId(shard as u16));
                prop_assert_eq!(layout.chunk(*id).position, position as u32);
            }
        }
    }

    #[test]
    fn views_pack_exactly_the_declared_chunks(workers in declarations()) {
        let layout = Layout::build(&workers, options(32, 2)).unwrap();
        for worker in 0..3u16 {
            let view = WorkerView::new(&layout, worker);
            let own: u64 = view.chunks.iter().map(|id| u64::from(layout.chunk(*id).len)).sum();
            prop_assert_eq!(own, view.elements);
            let ordered: usize = (0..2).map(|shard| view.order(&layout, ShardId(shard)).len()).sum();
            prop_assert_eq!(ordered, view.chunks.len());
        }
    }
}

#[test]
fn disagreement_names_the_tensor_and_both_shapes() {
    let declarations = [vec![TensorSpec::new("w", [2, 3])], vec![TensorSpec::new("w", [3, 2])]];
    let error = Layout::build(&declarations, options(16, 1)).unwrap_err().to_string();
    for part in ["`w`", "[2, 3]", "[3, 2]", "worker 0", "worker 1"] {
        assert!(error.contains(part), "{error} does not name {part}");
    }
}

#[test]
fn impossible_tensors_are_refused() {
    let build = |specs: Vec<TensorSpec>| Layout::build(&[specs], options(16, 1)).unwrap_err().to_string();
    assert!(build(vec![]).contains("no worker declares"));
    assert!(build(vec![TensorSpec::new("w", [0])]).contains("no elements"));
    assert!(build(vec![TensorSpec::new("w", [u64::MAX, 2])]).contains("2^42"));
    assert!(build(vec![TensorSpec::new("w", [1]), TensorSpec::new("w", [1])]).contains("twice"));
}
