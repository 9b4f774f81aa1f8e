//! One ordinary safetensors file of a checkpoint's parameters, by tensor name and shape, that other tools read.
//!
//! Invariant: a file of the given name is either the old one or the new one, whole.
#![forbid(unsafe_code)]

use std::path::Path;

use super::{
    disk::{Disk, SYSTEM},
    files::encode_header,
    paths,
    reader::{Checkpoint, ChunkData},
};
use crate::{Error, Result, types::ChunkId};

/// Writes the parameters (f32, padding and optimizer state left out) to the file `out`, and says how many bytes it has.
///
/// # Errors
///
/// [`Error::Checkpoint`] if a chunk is damaged or a tensor's name cannot be written; [`Error::File`] if the disk refuses.
pub fn export(checkpoint: &Checkpoint, out: &Path) -> Result<u64> {
    export_on(&SYSTEM, checkpoint, out)
}

pub(super) fn export_on(disk: &dyn Disk, checkpoint: &Checkpoint, out: &Path) -> Result<u64> {
    if out.file_name().is_none() {
        return Err(Error::Config(format!("{} does not name a file to export to", out.display())));
    }
    let refused = |defect| Error::Checkpoint { path: checkpoint.path().into(), defect };
    let table = &checkpoint.manifest().layout;
    let tensors: Vec<_> = table.tensors.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    if tensors.iter().any(|(name, _)| name == "__metadata__") {
        return Err(refused("has a tensor named `__metadata__`, which safetensors keeps for itself; rename it".into()));
    }
    let state = &checkpoint.manifest().state;
    // "pt" is what loaders that ask for a framework expect to find.
    let metadata =
        [("format", "pt".into()), ("gradwire.job", state.job.clone()), ("gradwire.clock", state.clock.to_string())];
    let header = encode_header(&metadata, &tensors).map_err(refused)?;
    let written = write(disk, checkpoint, &header, out);
    if written.is_err() {
        // The directory is the user's: no half file stays in it. The first error is the one to tell.
        let _ = disk.remove_file(&paths::temporary(out));
    }
    written
}

fn write(disk: &dyn Disk, checkpoint: &Checkpoint, header: &[u8], out: &Path) -> Result<u64> {
    let table = &checkpoint.manifest().layout;
    let failed = |error| Error::file("write", paths::temporary(out), error);
    let mut file = paths::start_file(disk, out)?;
    file.write(header).map_err(failed)?;
    let mut bytes = header.len() as u64;
    // Tensors and chunks follow one another in the same order, so each chunk is read, and its sum checked, once.
    let mut current: Option<(usize, ChunkData<'_>)> = None;
    for tensor in &table.tensors {
        let mut at = tensor.start;
        let end = tensor.start + tensor.shape.iter().product::<u64>();
        while at < end {
            let index = table.chunks.partition_point(|(start, _)| *start <= at) - 1;
            let data = match current {
                Some((read, data)) if read == index => data,
                _ => checkpoint.chunk(ChunkId(index as u32))?,
            };
            current = Some((index, data));
            let (start, len) = table.chunks[index];
            let to = end.min(start + u64::from(len));
            let part: &[u8] = bytemuck::cast_slice(&data.master[(at - start) as usize..(to - start) as usize]);
            file.write(part).map_err(failed)?;
            bytes += part.len() as u64;
            at = to;
        }
    }
    paths::finish_file(disk, file, out)?;
    Ok(bytes)
}
