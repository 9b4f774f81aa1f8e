//! The embedded store of tenures: a log on the launcher's disk, for a job that ends with its launcher anyway.
//!
//! A line is `CRC TENURE`: eight hexadecimal digits, the CRC-32C of what follows the blank, and a JSON object. What a swap has
//! answered lies on the disk. A line that could not be written wholly is cut off again before anything else is written; the first
//! line that is torn ends the log when it is opened.
//!
//! Invariant: a swap that was answered with success is there after a crash at any moment; of others all is there or nothing.
#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};

use super::{Swap, Tenure, TenureStore};
use crate::{
    Error, Result,
    types::{Epoch, ShardId},
};

/// The file as the log needs it.
pub(super) trait LogFile: Send {
    /// Writes at the end.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Has all of it on the disk.
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts off what lies behind `length`, and has that on the disk.
    fn cut(&mut self, length: u64) -> io::Result<()>;
}

impl LogFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn cut(&mut self, length: u64) -> io::Result<()> {
        self.set_len(length)?;
        self.sync_data()
    }
}

#[derive(Serialize, Deserialize)]
struct Entry {
    shard: ShardId,
    #[serde(flatten)]
    tenure: Tenure,
}

impl Entry {
    fn line(&self) -> Vec<u8> {
        let text = serde_json::to_string(self).expect("an entry has text keys");
        format!("{:08x} {text}\n", crc32c::crc32c(text.as_bytes())).into_bytes()
    }

    /// The entry of a line (without its end); nothing if it is torn.
    fn read(line: &[u8]) -> Option<Entry> {
        let (sum, text) = line.split_at_checked(9)?;
        let sum = std::str::from_utf8(sum).ok()?.strip_suffix(' ')?;
        let sum = u32::from_str_radix(sum, 16).ok()?;
        (sum == crc32c::crc32c(text)).then(|| serde_json::from_slice(text).ok())?
    }
}

/// The tenures of a job, in memory and in a file.
#[derive(Debug)]
pub struct TenureLog(Log<File>);

impl TenureLog {
    /// Opens the log, or makes it.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be read or written.
    pub fn open(path: &Path) -> Result<TenureLog> {
        let failed = |what| move |e| Error::file(what, path, e);
        let file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path);
        let file = file.map_err(failed("open"))?;
        let bytes = std::fs::read(path).map_err(failed("read"))?;
        let directory = path.parent().unwrap_or(Path::new("/"));
        // The file's name must be as durable as what stands in it.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("sync the directory of"))?;
        Ok(TenureLog(Log::recover(file, &bytes).map_err(failed("write"))?))
    }
}

impl TenureStore for TenureLog {
    fn compare_and_swap(&mut self, shard: ShardId, expected: Epoch, next: Tenure) -> Swap {
        self.0.swap(shard, expected, next)
    }
}

#[derive(Debug)]
struct Log<F> {
    file: F,
    /// Bytes of it that are whole lines.
    length: u64,
    /// Something may lie behind them.
    is_torn: bool,
    tenures: BTreeMap<ShardId, Tenure>,
}

impl<F: LogFile> Log<F> {
    /// A log that holds these bytes.
    fn recover(file: F, bytes: &[u8]) -> io::Result<Log<F>> {
        let mut log = Log { file, length: 0, is_torn: true, tenures: BTreeMap::new() };
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            let Some(Entry { shard, tenure }) = line.strip_suffix(b"\n").and_then(Entry::read) else { break };
            log.length += line.len() as u64;
            log.tenures.insert(shard, tenure);
        }
        log.mend()?;
        Ok(log)
    }

    /// Cuts off what may be torn.
    fn mend(&mut self) -> io::Result<()> {
        if self.is_torn {
            self.file.cut(self.length)?;
            self.is_torn = false;
        }
        Ok(())
    }

    fn swap(&mut self, shard: ShardId, expected: Epoch, next: Tenure) -> Swap {
        match self.tenures.get(&shard) {
            Some(present) if present.epoch != expected => return Swap::Present(*present),
            None if expected != 0 => {
                return Swap::Unavailable(format!("the log of tenures has lost those of shard {}", shard.0));
            }
            _ => {}
        }
        match self.write(&Entry { shard, tenure: next }.line()) {
            Ok(()) => {
                self.tenures.insert(shard, next);
                Swap::Swapped
            }
            Err(error) => {
                // What was written of it may not be found when the log is read again, nor stand before the next line.
                let _ = self.mend();
                Swap::Unavailable(format!("the log of tenures could not be written: {error}"))
            }
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        self.mend()?;
        self.is_torn = true;
        self.file.append(line)?;
        self.file.sync()?;
        self.is_torn = false;
        self.length += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
#[path = "tenure_log_tests.rs"]
mod tests;
