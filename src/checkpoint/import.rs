//! Initial parameters from an ordinary safetensors file (`--init-from`), tensor by tensor, in any part.
//!
//! Invariant: a tensor is filled only from one of the same name and shape; nothing is guessed.
#![forbid(unsafe_code)]

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::{disk::Map, files::decode_header};
use crate::{Error, Result};

/// A safetensors file from which tensors are filled.
#[derive(Debug)]
pub struct InitialParameters {
    path: PathBuf,
    map: Map,
    data_start: usize,
    metadata: Metadata,
}

impl InitialParameters {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be read, [`Error::Checkpoint`] if it is no safetensors file.
    pub fn open(path: &Path) -> Result<InitialParameters> {
        let map = Map::open(path, u64::MAX)?;
        let (data_start, metadata) =
            decode_header(&map).map_err(|defect| Error::Checkpoint { path: path.into(), defect })?;
        Ok(InitialParameters { path: path.into(), map, data_start, metadata })
    }

    /// The names of the tensors in the file, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// Whether a tensor of this name and shape, in a number format we read, is in the file.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] saying what is there instead.
    pub fn check(&self, name: &str, shape: &[u64]) -> Result<()> {
        self.find(name, shape).map(|_| ())
    }

    /// Fills `out` with elements `range` of the tensor `name`, whose shape must be `shape`, as f32 (from f32, bf16 or f16).
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`] if there is no such tensor, or it has another shape or a number format that is not read.
    pub fn fill(&self, name: &str, shape: &[u64], range: Range<u64>, out: &mut [f32]) -> Result<()> {
        assert_eq!(range.end.checked_sub(range.start), Some(out.len() as u64), "the range is as long as its target");
        let info = self.find(name, shape)?;
        let size = info.dtype.bitsize() / 8;
        let data = &self.map[self.data_start..][info.data_offsets.0..info.data_offsets.1];
        assert!(range.end <= (data.len() / size) as u64, "the range lies within the tensor");
        let source = &data[range.start as usize * size..range.end as usize * size];
        // The file may place a tensor at any byte, so its numbers are put together from bytes.
        match info.dtype {
            Dtype::F32 => read(source, out, f32::from_le_bytes),
            Dtype::BF16 => read(source, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F16 => read(source, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            other => unreachable!("{other:?} was refused by find"),
        }
        Ok(())
    }

    fn find(&self, name: &str, shape: &[u64]) -> Result<&TensorInfo> {
        let refuse = |defect| Err(Error::Checkpoint { path: self.path.clone(), defect });
        let Some(info) = self.metadata.info(name) else {
            let names = self.names();
            let close = names.iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
            let hint = close.map(|close| format!("; the most similar name in it is `{close}`")).unwrap_or_default();
            return refuse(format!("holds no tensor `{name}`{hint}"));
        };
        if !info.shape.iter().map(|dimension| *dimension as u64).eq(shape.iter().copied()) {
            return refuse(format!("holds tensor `{name}` as {:?}, the job declares it as {shape:?}", info.shape));
        }
        if !matches!(info.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
            return refuse(format!(
                "holds tensor `{name}` in {:?}, and F32, BF16 and F16 are read; convert it first",
                info.dtype
            ));
        }
        Ok(info)
    }
}

fn read<const SIZE: usize>(source: &[u8], out: &mut [f32], convert: impl Fn([u8; SIZE]) -> f32) {
    for (target, bytes) in out.iter_mut().zip(source.as_chunks::<SIZE>().0) {
        *target = convert(*bytes);
    }
}
