//! Gradients and parameters where they lie: views into a worker's flat buffers, for bindings whose tensors are such views, and
//! pushes of what has been written there.
//!
//! Invariant: nothing here reads or writes a byte of the buffers; a view keeps its memory mapped for as long as it lives.

use std::ptr::NonNull;

use super::Worker;
use crate::{
    Result,
    cuda::Context,
    layout::TensorSpec,
    mem::{DeviceMemory, Region},
    session::Member,
    types::Dtype,
};

/// Where a tensor's gradient, or its parameters, lie in one of a worker's flat buffers: in one piece, in the layout's order, in
/// the number format that travels.
#[derive(Clone, Debug)]
pub struct FlatView {
    region: Region,
    start_bytes: usize,
    elements: usize,
    dtype: Dtype,
}

impl FlatView {
    /// The first byte, aligned to 32 bytes. It stays mapped as long as this view lives, whatever becomes of the worker.
    ///
    /// Whoever reads or writes there owes what a lease enforces elsewhere. Nobody may use the bytes during a call of the worker.
    /// A gradient is not to be written from the push of its tensor until the clock has ended; parameters are not to be written at
    /// all, and may change from the push until the clock has ended.
    ///
    /// # Panics
    ///
    /// If the bytes lie on a device.
    pub fn pointer(&self) -> NonNull<u8> {
        assert!(self.region.device_range().is_none(), "{} lies on a device", self.region.id());
        self.region.start().map_addr(|address| address.saturating_add(self.start_bytes))
    }

    /// Where a GPU has the first byte, for a worker whose buffers lie on one ([`Worker::on_gpu`]); owed as with `pointer`.
    pub fn device_address(&self) -> Option<u64> {
        self.region.device_range().map(|range| range.address + self.start_bytes as u64)
    }

    /// The GPU that has the bytes; none for host memory.
    pub fn device(&self) -> Option<u32> {
        self.region.device_range().map(|range| range.ordinal)
    }

    /// How many elements.
    pub fn elements(&self) -> usize {
        self.elements
    }

    /// Their number format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        self.elements * self.dtype.size()
    }
}

impl Worker {
    /// A worker, as [`with_member`](Worker::with_member), with gradients and parameters in a GPU's memory, from which gradients
    /// leave and to which parameters come without passing through the host's. Programs reach them by their addresses
    /// ([`gradient_view`](Worker::gradient_view)) and push in place, when what writes a gradient has ended; `push_pull` and
    /// `parameters` copy, and wait for the copy.
    ///
    /// # Errors
    ///
    /// As [`join`](Worker::join); [`Error::Config`](crate::Error::Config) naming the fabric, if a server is reached over one whose
    /// device does not reach the GPU's memory; [`Error::Gpu`](crate::Error::Gpu).
    pub fn on_gpu(member: Member, tensors: Vec<TensorSpec>, context: &Context) -> Result<Worker> {
        Worker::place(member, tensors, Some(DeviceMemory::new(context)?))
    }

    /// Where a tensor's gradient lies until it is pushed with [`push_pull_in_place`](Worker::push_pull_in_place).
    ///
    /// # Errors
    ///
    /// [`Error::Config`](crate::Error::Config) if there is no such tensor.
    pub fn gradient_view(&self, tensor: usize) -> Result<FlatView> {
        self.view(tensor, &self.buffers.gradients, self.config().gradient_dtype)
    }

    /// Where a tensor's parameters land.
    ///
    /// # Errors
    ///
    /// As [`gradient_view`](Worker::gradient_view).
    pub fn parameter_view(&self, tensor: usize) -> Result<FlatView> {
        self.view(tensor, &self.buffers.parameters, self.config().parameter_dtype)
    }

    fn view(&self, tensor: usize, region: &Region, dtype: Dtype) -> Result<FlatView> {
        let known = self.known(tensor)?;
        let start_bytes = known.start * dtype.size();
        Ok(FlatView { region: region.clone(), start_bytes, elements: known.len, dtype })
    }

    /// As [`push_pull`](Worker::push_pull), with the gradient that has been written to its view: nothing is copied.
    ///
    /// # Errors
    ///
    /// As [`push_pull`](Worker::push_pull).
    pub fn push_pull_in_place(&mut self, tensor: usize) -> Result<()> {
        self.give_in_place(tensor, true)
    }

    /// As [`push`](Worker::push), with the gradient that has been written to its view: nothing is copied.
    ///
    /// # Errors
    ///
    /// As [`push`](Worker::push).
    pub fn push_in_place(&mut self, tensor: usize) -> Result<()> {
        self.give_in_place(tensor, false)
    }

    /// Pushes, with push_pull, whatever lies in the gradient buffers of all tensors: for benchmarks, and for programs that write
    /// their gradients there.
    ///
    /// # Errors
    ///
    /// As [`push_pull`](Worker::push_pull).
    pub fn push_pull_all(&mut self) -> Result<()> {
        self.give_all(true)
    }

    /// The same with [`push`](Worker::push): nothing comes back.
    ///
    /// # Errors
    ///
    /// As [`push`](Worker::push).
    pub fn push_all(&mut self) -> Result<()> {
        self.give_all(false)
    }

    fn give_in_place(&mut self, tensor: usize, wants_reply: bool) -> Result<()> {
        self.known(tensor)?;
        self.begin_push(tensor, wants_reply)?;
        self.push_written(tensor, wants_reply);
        Ok(())
    }

    fn give_all(&mut self, wants_reply: bool) -> Result<()> {
        self.decide_reply(wants_reply)?;
        self.buffers.mark_all_written();
        self.push_ready(wants_reply);
        Ok(())
    }
}
