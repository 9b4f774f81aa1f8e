//! Small files of /proc and /sys, below a root that is `/` except in tests.
//!
//! Invariant: what cannot be read is `None` or an empty list, never an error: its absence is a finding.

use std::path::PathBuf;

/// Where /proc, /sys and /dev are looked for.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// This machine's.
    pub fn here() -> Tree {
        Tree::at("/")
    }

    /// Those of a machine whose files are under `root`.
    pub fn at(root: impl Into<PathBuf>) -> Tree {
        Tree { root: root.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Whether there is such a file, folder or device.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// A file's text without the white space around it; `None` if it cannot be read or is empty.
    pub fn text(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_string()).filter(|text| !text.is_empty())
    }

    /// A file that holds one number.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// What follows `key` on the line that begins with it.
    pub fn field(&self, path: &str, key: &str) -> Option<String> {
        let text = self.text(path)?;
        text.lines().find_map(|line| line.strip_prefix(key)).map(|rest| rest.trim().to_string())
    }

    /// The names in a folder, in the order of their numbers where they are numbers.
    pub fn names(&self, path: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(path)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_by_key(|name| (name.parse::<u64>().ok(), name.clone()));
        names
    }

    /// Where a symbolic link points.
    pub fn link(&self, path: &str) -> Option<String> {
        Some(std::fs::read_link(self.path(path)).ok()?.to_string_lossy().into_owned())
    }
}
