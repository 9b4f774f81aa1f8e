//! The disk as this module sees it: the few operations that change it, behind one trait so that a test can fail any of them,
//! and the mapping through which files are read.
//!
//! Invariant: every change that checkpoint code makes to a file system goes through [`Disk`].

use std::{
    fs::{self, File},
    io,
    ops::Deref,
    path::Path,
};

use super::stream::StreamFile;
use crate::{Error, Result};

/// The operations that change a file system, and those that make changes durable.
pub trait Disk: Sync {
    /// Makes a directory whose parent is there.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes an empty file; what was there under that name is gone.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;
    /// Gives a file or directory another name in the same directory, replacing a file of that name.
    fn rename(&self, source: &Path, target: &Path) -> io::Result<()>;
    /// Gives a file another name besides those that it has.
    fn link(&self, source: &Path, target: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a name; the file with its last one.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// A file that is being written.
pub trait DiskFile: Send {
    /// Appends bytes.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes what was written durable; nothing is written after it.
    fn sync(&mut self) -> io::Result<()>;
}

/// The machine's own file systems.
pub struct SystemDisk;

/// The one that everything outside tests uses.
pub static SYSTEM: SystemDisk = SystemDisk;

impl Disk for SystemDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(StreamFile::new(File::create(path)?)?))
    }

    fn rename(&self, source: &Path, target: &Path) -> io::Result<()> {
        fs::rename(source, target)
    }

    fn link(&self, source: &Path, target: &Path) -> io::Result<()> {
        fs::hard_link(source, target)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}

/// A whole file, mapped for reading.
#[derive(Debug)]
pub struct Map(memmap2::Mmap);

impl Map {
    /// Maps a file of at most `bytes_max` bytes.
    pub fn open(path: &Path, bytes_max: u64) -> Result<Map> {
        let file = File::open(path).map_err(|error| Error::file("open", path, error))?;
        let metadata = file.metadata().map_err(|error| Error::file("read the size of", path, error))?;
        let refuse = |defect: String| Err(Error::Checkpoint { path: path.into(), defect });
        if !metadata.is_file() {
            return refuse("is not a file".into());
        }
        if metadata.len() > bytes_max {
            return refuse(format!(
                "has {} bytes, more than the {bytes_max} that such a file may have",
                metadata.len()
            ));
        }
        // SAFETY: the mapping is read-only, and the bytes under it stay as they are while it lives: a file of a complete
        // checkpoint is never written again (writers fill new files and rename them; removing one keeps its bytes until the
        // last mapping is gone). A user who edits or truncates such a file, or one given to `--init-from`, under a running job
        // breaks this, as with any mapped file; docs/checkpoint.md says so.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| Error::file("map", path, error))?;
        Ok(Map(map))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
