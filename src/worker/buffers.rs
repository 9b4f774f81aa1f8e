//! A worker's two flat buffers: gradients on their way out, parameters on their way in, by chunk.
//!
//! Invariant: a chunk's bytes are touched only while its lease is at home.

use std::sync::Arc;

use crate::{
    Error, Result,
    layout::{Layout, Piece, WorkerView},
    mem::{DeviceMemory, Lease, Region, RegionOptions},
    optim::{Kernels, Wire},
    types::{ChunkId, Dtype, Version},
};

/// One chunk of this worker.
#[derive(Debug)]
pub(super) struct ChunkBuffer {
    pub id: ChunkId,
    /// `None` while it is on its way.
    pub gradient: Option<Lease>,
    /// `None` while it is awaited.
    pub parameters: Option<Lease>,
    pub version: Version,
    /// Tensors that have a piece here.
    pub tensors: u32,
    /// Tensors whose gradient of this clock has been written.
    pub written: u32,
    /// Whether this clock's contribution has been given.
    pub pushed: bool,
}

/// One tensor of this worker.
#[derive(Debug)]
pub(super) struct TensorBuffer {
    pub name: String,
    pub len: usize,
    /// Its first element in the worker's flat buffers, where it lies in one piece: its chunks follow one another there too.
    pub start: usize,
    /// The worker's own chunk and the piece in it.
    pub pieces: Vec<(usize, Piece)>,
    /// Whether this clock's gradient has been written.
    pub written: bool,
}

#[derive(Debug)]
pub(super) struct Buffers {
    /// The memory of the two, to be registered; the chunks hold its leases.
    pub gradients: Region,
    pub parameters: Region,
    pub chunks: Vec<ChunkBuffer>,
    pub tensors: Vec<TensorBuffer>,
    /// By chunk of the layout: the index in `chunks`.
    own: Vec<Option<usize>>,
    kernels: Kernels,
    /// The device that holds both; none for the host.
    pub device: Option<DeviceMemory>,
    gradient_dtype: Dtype,
    parameter_dtype: Dtype,
    /// The chunks that are complete and not pushed yet.
    ready: Vec<usize>,
}

impl Buffers {
    /// Allocates both buffers.
    pub fn new(
        layout: &Arc<Layout>,
        worker: u16,
        names: &[String],
        (gradient_dtype, parameter_dtype): (Dtype, Dtype),
        device: Option<DeviceMemory>,
    ) -> Result<Buffers> {
        let view = WorkerView::new(layout, worker);
        let options = |name: &str| RegionOptions {
            name: format!("worker-{worker}-{name}"),
            prefault: true,
            ..RegionOptions::default()
        };
        let elements = view.elements as usize;
        let allocate = |name: &str, dtype: Dtype| match &device {
            Some(device) => device.allocate(elements * dtype.size()),
            None => Region::allocate(elements * dtype.size(), &options(name)),
        };
        let (parameters, mut parameter_rest) = allocate("parameters", parameter_dtype)?;
        let (gradients, mut gradient_rest) = allocate("gradients", gradient_dtype)?;
        let mut own = vec![None; layout.chunks.len()];
        let mut chunks = Vec::with_capacity(view.chunks.len());
        for id in &view.chunks {
            let len = layout.chunk(*id).len as usize;
            let (parameters, tail) = parameter_rest.split_at(len * parameter_dtype.size());
            parameter_rest = tail;
            let (gradient, tail) = gradient_rest.split_at(len * gradient_dtype.size());
            gradient_rest = tail;
            own[id.index()] = Some(chunks.len());
            chunks.push(ChunkBuffer {
                id: *id,
                gradient: Some(gradient),
                parameters: Some(parameters),
                version: 0,
                tensors: 0,
                written: 0,
                pushed: false,
            });
        }
        let (tensors, kernels) = (Vec::new(), Kernels::best());
        let ready = Vec::with_capacity(chunks.len());
        let mut buffers = Buffers {
            gradients,
            parameters,
            chunks,
            tensors,
            own,
            kernels,
            device,
            gradient_dtype,
            parameter_dtype,
            ready,
        };
        names.iter().for_each(|name| buffers.add_tensor(layout, &view, name));
        Ok(buffers)
    }

    fn add_tensor(&mut self, layout: &Layout, view: &WorkerView, name: &str) {
        let tensor = layout.tensor(name).expect("the layout holds every declared tensor");
        let pieces: Vec<(usize, Piece)> = layout
            .pieces(tensor)
            .map(|piece| (self.own[piece.chunk.index()].expect("a declared tensor's chunks are ours"), piece))
            .collect();
        pieces.iter().for_each(|(chunk, _)| self.chunks[*chunk].tensors += 1);
        let first = pieces[0].1;
        let start = view.start(first.chunk).expect("a declared tensor's chunks are ours") as usize;
        let (name, start) = (name.to_string(), start + first.chunk_start as usize);
        self.tensors.push(TensorBuffer { name, len: tensor.len as usize, start, pieces, written: false });
    }

    /// This worker's own chunk of the layout's `id`.
    pub fn own(&mut self, id: ChunkId) -> &mut ChunkBuffer {
        let index = self.own[id.index()].expect("an event about a chunk of ours");
        &mut self.chunks[index]
    }

    /// Writes a tensor's gradient into its chunks.
    pub fn write(&mut self, tensor: usize, gradient: &[f32]) -> Result<()> {
        let dtype = self.gradient_dtype;
        for (index, piece) in &self.tensors[tensor].pieces {
            let chunk = &mut self.chunks[*index];
            let lease = chunk.gradient.as_mut().expect("gradients are at home before they are written");
            let (start, len) = (piece.chunk_start as usize * dtype.size(), piece.len as usize * dtype.size());
            let from = piece.tensor_start as usize;
            let values = &gradient[from..from + piece.len as usize];
            match &self.device {
                None => self.kernels.encode(values, Wire { bytes: &mut lease.bytes_mut()[start..start + len], dtype }),
                Some(device) => {
                    let mut bytes = vec![0; len];
                    self.kernels.encode(values, Wire { bytes: &mut bytes, dtype });
                    device.put(lease, start, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// A tensor's gradient lies in its chunks; those that are complete thereby are ready to be pushed.
    pub fn mark_written(&mut self, tensor: usize) {
        let TensorBuffer { pieces, written, .. } = &mut self.tensors[tensor];
        *written = true;
        for (index, _) in pieces {
            let chunk = &mut self.chunks[*index];
            chunk.written += 1;
            if chunk.written == chunk.tensors {
                self.ready.push(*index);
            }
        }
    }

    /// The gradients of all tensors lie in the chunks; all that have not been pushed are ready.
    pub fn mark_all_written(&mut self) {
        for tensor in &mut self.tensors {
            tensor.written = true;
        }
        self.ready.clear();
        self.ready.extend((0..self.chunks.len()).filter(|index| !self.chunks[*index].pushed));
    }

    /// The chunks that are ready to be pushed, each once.
    pub fn take_ready(&mut self) -> (std::vec::Drain<'_, usize>, &mut [ChunkBuffer]) {
        (self.ready.drain(..), &mut self.chunks)
    }

    /// A tensor that was not pushed gives zeros to the chunks that it shares with one that was: a chunk is pushed whole. Chunks in
    /// which nothing was pushed stay as they are.
    pub fn fill_gaps(&mut self) -> Result<()> {
        let size = self.gradient_dtype.size();
        for tensor in self.tensors.iter().filter(|tensor| !tensor.written) {
            for (index, piece) in &tensor.pieces {
                let chunk = &mut self.chunks[*index];
                if chunk.written > 0 {
                    let lease = chunk.gradient.as_mut().expect("a chunk that is not complete has not been pushed");
                    let (start, len) = (piece.chunk_start as usize * size, piece.len as usize * size);
                    match &self.device {
                        None => lease.bytes_mut()[start..start + len].fill(0),
                        Some(device) => device.put(lease, start, &vec![0; len])?,
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies a tensor's parameters out.
    pub fn read(&self, tensor: usize, out: &mut [f32]) -> Result<()> {
        let size = self.parameter_dtype.size();
        for (index, piece) in &self.tensors[tensor].pieces {
            let chunk = &self.chunks[*index];
            let lease = chunk.parameters.as_ref().ok_or_else(|| {
                let name = &self.tensors[tensor].name;
                Error::Config(format!("the parameters of `{name}` are on their way: call wait() before reading them"))
            })?;
            let start = piece.chunk_start as usize * size;
            let len = piece.len as usize * size;
            let out = &mut out[piece.tensor_start as usize..][..piece.len as usize];
            match &self.device {
                None => decode(self.parameter_dtype, &lease.bytes()[start..start + len], out),
                Some(device) => {
                    // As long as the elements are wide, so that they are aligned.
                    let mut words = vec![0u32; len.div_ceil(4)];
                    let bytes = &mut bytemuck::cast_slice_mut(&mut words)[..len];
                    device.get(lease, start, bytes)?;
                    decode(self.parameter_dtype, bytes, out);
                }
            }
        }
        Ok(())
    }

    /// Whether every gradient has been sent and no parameters are awaited.
    pub fn all_home(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.gradient.is_some() && chunk.parameters.is_some())
    }

    /// Whether no parameters are awaited.
    pub fn parameters_home(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.parameters.is_some())
    }

    /// A new clock begins.
    pub fn begin_clock(&mut self) {
        for chunk in &mut self.chunks {
            chunk.written = 0;
            chunk.pushed = false;
        }
        self.tensors.iter_mut().for_each(|tensor| tensor.written = false);
    }
}

fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        Dtype::Bf16 | Dtype::F16 => {
            for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                let bits = u16::from_le_bytes([pair[0], pair[1]]);
                *value = match dtype {
                    Dtype::Bf16 => half::bf16::from_bits(bits).to_f32(),
                    _ => half::f16::from_bits(bits).to_f32(),
                };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{LayoutOptions, TensorSpec};

    /// Views rely on it: worker 1 lacks a tensor in the middle, and the chunks are shorter than most tensors.
    #[test]
    fn a_tensor_lies_in_one_piece() {
        let spec = |name: &str, len: u64| TensorSpec::new(name, [len]);
        let all = vec![spec("a", 30), spec("b", 100), spec("c", 7), spec("d", 200), spec("e", 1)];
        let part = vec![all[0].clone(), all[1].clone(), all[3].clone(), all[4].clone()];
        let options = LayoutOptions { chunk_elements: 64, shards: 2 };
        let layout = Arc::new(Layout::build(&[all, part.clone()], options).unwrap());
        let names: Vec<String> = part.iter().map(|spec| spec.name.clone()).collect();
        let buffers = Buffers::new(&layout, 1, &names, (Dtype::Bf16, Dtype::F32), None).unwrap();
        assert!(buffers.tensors.iter().any(|tensor| tensor.pieces.len() > 2));
        for tensor in &buffers.tensors {
            for (chunk, piece) in &tensor.pieces {
                let chunk = &buffers.chunks[*chunk];
                let element = tensor.start + piece.tensor_start as usize;
                let place = |lease: &Option<Lease>| lease.as_ref().unwrap().offset();
                assert_eq!(place(&chunk.gradient) + piece.chunk_start as usize * 2, element * 2, "{}", tensor.name);
                assert_eq!(place(&chunk.parameters) + piece.chunk_start as usize * 4, element * 4, "{}", tensor.name);
            }
        }
    }
}
