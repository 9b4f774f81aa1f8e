//! A job's directory: how later commands find a running job by its name.
//!
//! Invariant: the directory is the user's alone (0700) and the token in it too (0600); a lock held for the launcher's life tells a
//! running job from what a killed one left.
#![forbid(unsafe_code)]

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use crate::{
    Error, Result,
    session::{Address, JobConfig, TenureLog, check_name},
    wire::JobToken,
};

/// The directory of one job.
#[derive(Debug)]
pub struct JobDirectory {
    path: PathBuf,
    /// Held by the launcher only.
    lock: Option<Flock<File>>,
}

/// Where jobs have their directories: `$GRADWIRE_HOME`, else `$XDG_RUNTIME_DIR/gradwire`, else `/tmp/gradwire-UID`.
fn home() -> PathBuf {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("GRADWIRE_HOME")
        .or_else(|| variable("XDG_RUNTIME_DIR").filter(|path| path.is_dir()).map(|path| path.join("gradwire")))
        .unwrap_or_else(|| PathBuf::from(format!("/tmp/gradwire-{}", nix::unistd::getuid())))
}

impl JobDirectory {
    /// Makes the directory of a new job under `under` (the usual place if `None`).
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if a job of this name is running, or if the place is another user's.
    pub fn create(under: Option<&Path>, name: &str) -> Result<JobDirectory> {
        check_name(name)?;
        let home = under.map_or_else(home, Path::to_path_buf);
        make_home(&home)?;
        let path = home.join(name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(Error::file("create", path, e)),
        }
        let lock_path = path.join("lock");
        let file = OpenOptions::new().create(true).write(true).truncate(false).mode(0o600).open(&lock_path);
        let file = file.map_err(|e| Error::file("open", &lock_path, e))?;
        let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Err(Error::Config(format!(
                "a job named `{name}` is running ({}); choose another --name, or look at it with `gradwire status {name}`",
                path.display()
            )));
        };
        let directory = JobDirectory { path, lock: Some(lock) };
        // What a killed launcher of this name may have left is of no use to anybody.
        for old in ["rendezvous", "token", "config.json", "pids", "cores", "tenures"] {
            let _ = fs::remove_file(directory.path.join(old));
        }
        Ok(directory)
    }

    /// The directory of a running job.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] if there is no such job, naming those that are running.
    pub fn open(name: &str) -> Result<JobDirectory> {
        check_name(name)?;
        let home = home();
        let path = home.join(name);
        if is_running(&path) {
            return Ok(JobDirectory { path, lock: None });
        }
        let running = JobDirectory::running();
        let others = match running.len() {
            0 => "none is running".into(),
            _ => format!("running are {}", running.join(", ")),
        };
        Err(Error::Config(format!(
            "no job named `{name}` is running on this machine under {} ({others})",
            home.display()
        )))
    }

    /// The names of the jobs that are running.
    pub fn running() -> Vec<String> {
        let mut names: Vec<String> =
            jobs(&home()).filter_map(|path| Some(path.file_name()?.to_str()?.into())).collect();
        names.sort();
        names
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that holds the token.
    pub fn token_file(&self) -> PathBuf {
        self.path.join("token")
    }

    /// Writes what later commands need: the token first, so that whoever sees the address finds the token.
    pub(super) fn describe(&self, address: &Address, token: &JobToken, config: &JobConfig) -> Result<()> {
        self.write("token", &format!("{}\n", token.to_hex()))?;
        self.write("config.json", &serde_json::to_string_pretty(config).expect("a configuration has text keys"))?;
        self.write("rendezvous", &format!("{address}\n"))
    }

    /// Writes one file, readable by the user alone.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path.join(name);
        let file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|e| Error::file("write", path, e))
    }

    /// The log of who serves which shard, for a job with two copies of each.
    pub(super) fn tenures(&self) -> Result<TenureLog> {
        TenureLog::open(&self.path.join("tenures"))
    }

    /// Where the job's rendezvous is.
    pub fn address(&self) -> Result<Address> {
        self.read("rendezvous")?.parse()
    }

    /// The job's token.
    pub fn token(&self) -> Result<JobToken> {
        JobToken::from_hex(&self.read("token")?)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.path.join(name);
        fs::read_to_string(&path).map_err(|e| Error::file("read", path, e))
    }

    /// The cores that other running jobs beside this one were dealt, each as often as it was.
    pub(super) fn cores_of_others(&self) -> Vec<usize> {
        let home = self.path.parent().unwrap_or(Path::new("/"));
        let others = jobs(home).filter(|path| *path != self.path);
        let texts = others.filter_map(|path| fs::read_to_string(path.join("cores")).ok());
        texts
            .flat_map(|text| text.split_whitespace().filter_map(|core| core.parse().ok()).collect::<Vec<_>>())
            .collect()
    }

    /// Removes the directory.
    pub(super) fn remove(self) {
        let _ = fs::remove_dir_all(&self.path);
        drop(self.lock);
    }
}

/// The directories of running jobs.
fn jobs(home: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(home).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| is_running(path))
}

/// Whether a launcher holds the lock.
fn is_running(path: &Path) -> bool {
    let Ok(file) = File::open(path.join("lock")) else { return false };
    Flock::lock(file, FlockArg::LockSharedNonblock).is_err()
}

/// Makes the place for directories, and refuses one that others could write to: /tmp is everybody's.
pub(super) fn make_home(home: &Path) -> Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(home).map_err(|e| Error::file("create", home, e))?;
    let metadata = fs::symlink_metadata(home).map_err(|e| Error::file("look at", home, e))?;
    let user = nix::unistd::getuid().as_raw();
    if !metadata.is_dir() || metadata.uid() != user || metadata.mode() & 0o022 != 0 {
        return Err(Error::Config(format!(
            "{} must be a directory that belongs to you and that nobody else may write to; set GRADWIRE_HOME to one",
            home.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn private_home() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).unwrap();
        home
    }

    #[test]
    fn a_name_is_used_once_at_a_time_and_again_after_a_crash() {
        let home = private_home();
        let first = JobDirectory::create(Some(home.path()), "a").unwrap();
        let token = JobToken::random().unwrap();
        first.describe(&"127.0.0.1:1".parse().unwrap(), &token, &JobConfig::default()).unwrap();
        let text = JobDirectory::create(Some(home.path()), "a").unwrap_err().to_string();
        assert!(text.contains("a job named `a` is running"), "{text}");
        assert_eq!(first.token().unwrap(), token);
        assert_eq!(fs::metadata(first.path()).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(first.token_file()).unwrap().mode() & 0o777, 0o600);
        // A crash: the lock goes with the process, the files stay.
        drop(first);
        let second = JobDirectory::create(Some(home.path()), "a").unwrap();
        assert!(second.token().is_err(), "the old token is gone");
        let path = second.path().to_path_buf();
        second.remove();
        assert!(!path.exists());
    }

    #[test]
    fn only_running_jobs_count_for_cores() {
        let home = private_home();
        let [a, b, c] = ["a", "b", "c"].map(|name| JobDirectory::create(Some(home.path()), name).unwrap());
        a.write("cores", "0 1 1").unwrap();
        b.write("cores", "7").unwrap();
        drop(b);
        assert_eq!(c.cores_of_others(), [0, 1, 1]);
    }

    #[test]
    fn a_place_that_others_can_write_to_is_refused() {
        let home = private_home();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let text = JobDirectory::create(Some(home.path()), "a").unwrap_err().to_string();
        assert!(text.contains("GRADWIRE_HOME"), "{text}");
    }
}
