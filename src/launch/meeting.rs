//! Where the processes of a foreign launcher meet: a file in a directory that all hosts share, written by rank 0, which tells the
//! others where its rendezvous is and gives them the token.
//!
//! Invariant: the file is the user's own and nobody else's to read; what a former run has left is never joined, since nobody
//! answers where it points to, and is written over.
#![forbid(unsafe_code)]

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::{SocketAddr, TcpStream},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{addresses::addresses, directory::make_home};
use crate::{
    Error, Result,
    session::{Address, VERSION},
    wire::JobToken,
};

/// Time between two looks for the file.
const PAUSE: Duration = Duration::from_millis(50);

/// How long one address is tried.
const REACH_TIME: Duration = Duration::from_secs(2);

/// What the file says.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: String,
    size: u16,
    addresses: Vec<SocketAddr>,
}

/// A place to meet.
#[derive(Debug)]
pub struct Meeting {
    file: PathBuf,
    /// Removed with the meeting by whoever has opened it.
    opened: bool,
}

impl Meeting {
    /// The meeting of the run of this name in this directory; `$HOME/.gradwire/rendezvous` if none is given.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if the directory is another user's or open to others.
    pub fn new(directory: Option<&Path>, run: &str) -> Result<Meeting> {
        let usual = || {
            let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
            let nowhere = || Error::Config("HOME is not set: say where ranks meet with --rendezvous-dir DIR".into());
            home.map(|home| PathBuf::from(home).join(".gradwire/rendezvous")).ok_or_else(nowhere)
        };
        let directory = directory.map_or_else(usual, |directory| Ok(directory.to_path_buf()))?;
        make_home(&directory)?;
        let name: String =
            run.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
        Ok(Meeting { file: directory.join(name), opened: false })
    }

    /// The file with the token.
    pub fn token_file(&self) -> PathBuf {
        beside(&self.file, ".token")
    }

    /// Rank 0: tells the others that its rendezvous listens there.
    pub fn open(&mut self, listening: SocketAddr, interface: Option<&str>, token: &JobToken, size: u16) -> Result<()> {
        let addresses = addresses(listening, interface)?;
        let record = Record { version: VERSION.into(), size, addresses };
        self.opened = true;
        write(&self.token_file(), &token.to_hex())?;
        // Whoever sees the record finds the token.
        write(&self.file, &serde_json::to_string(&record).expect("a record has text keys"))
    }

    /// The others: waits for rank 0's word, and gives an address at which it answers.
    ///
    /// # Errors
    ///
    /// [`Error::JobFailed`] saying what is missing after `time`, or that rank 0 is of another version or size; [`Error::Config`] if
    /// the file is not the user's alone.
    pub fn find(&self, size: u16, time: Duration) -> Result<Address> {
        let until = Instant::now() + time;
        loop {
            let missing = match self.read()? {
                None => {
                    format!("rank 0 has not written {}; is that directory shared by all hosts?", self.file.display())
                }
                Some(record) => match record.check(size).and_then(|()| record.reach()) {
                    Ok(address) => return Ok(address.into()),
                    Err(why) => why,
                },
            };
            if Instant::now() >= until {
                return Err(Error::JobFailed(format!("waited {} s for rank 0: {missing}", time.as_secs_f64())));
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn read(&self) -> Result<Option<Record>> {
        let Ok(metadata) = fs::metadata(&self.file) else { return Ok(None) };
        if metadata.uid() != nix::unistd::getuid().as_raw() || metadata.mode() & 0o077 != 0 {
            return Err(Error::Config(format!("{} is not this user's alone; remove it", self.file.display())));
        }
        // A file that is being replaced, or of another version, is looked at again.
        Ok(fs::read(&self.file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        if self.opened {
            let _ = fs::remove_file(&self.file);
            let _ = fs::remove_file(self.token_file());
        }
    }
}

impl Record {
    fn check(&self, size: u16) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!(
                "it runs gradwire {} and this process {VERSION}; use the same one on all hosts",
                self.version
            ));
        }
        match self.size == size {
            true => Ok(()),
            false => Err(format!("it is of a run of {} processes and this one of {size}", self.size)),
        }
    }

    fn reach(&self) -> Result<SocketAddr, String> {
        let mut tried = Vec::new();
        for address in &self.addresses {
            match TcpStream::connect_timeout(address, REACH_TIME) {
                Ok(_) => return Ok(*address),
                Err(e) => tried.push(format!("{address} ({e})")),
            }
        }
        Err(format!("nobody answers at {}; is that port open?", tried.join(", ")))
    }
}

/// A file's neighbour whose name has this behind it.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// Writes a file that nobody else may read, whole or not at all.
fn write(path: &Path, text: &str) -> Result<()> {
    let failed = |e| Error::file("write", path, e);
    let new = beside(path, ".new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    fs::rename(&new, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::TcpListener, os::unix::fs::PermissionsExt};

    fn private() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        directory
    }

    #[test]
    fn what_a_former_run_left_is_passed_over_until_rank_0_writes() {
        let directory = private();
        let token = JobToken::random().unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut former = Meeting::new(Some(directory.path()), "run 1").unwrap();
        former.open(closed, None, &token, 2).unwrap();
        let here = Meeting::new(Some(directory.path()), "run 1").unwrap();
        let text = here.find(2, Duration::from_millis(100)).unwrap_err().to_string();
        assert!(text.contains("nobody answers") && text.contains(&closed.to_string()), "{text}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut open = Meeting::new(Some(directory.path()), "run 1").unwrap();
        open.open(listener.local_addr().unwrap(), None, &token, 2).unwrap();
        let found = here.find(2, Duration::from_secs(20)).unwrap();
        assert_eq!(found.to_string(), listener.local_addr().unwrap().to_string());
        assert_eq!(fs::metadata(here.token_file()).unwrap().mode() & 0o777, 0o600);
        let text = here.find(3, Duration::from_millis(1)).unwrap_err().to_string();
        assert!(text.contains("a run of 2 processes and this one of 3"), "{text}");
        drop(open);
        let text = here.find(2, Duration::from_millis(1)).unwrap_err().to_string();
        assert!(text.contains("has not written") && text.contains("shared by all hosts"), "{text}");
    }
}
